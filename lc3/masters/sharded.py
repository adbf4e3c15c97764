"""An optimizer of this rank's share of the masters, as in ZeRO-1."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lc3.checkpoint import OPTIONAL, Parts
from lc3.errors import AttachError, StateError

Groups = list[dict[str, Any]]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Sharded:
    """An optimizer whose parameters are slices of float32 masters.

    Args:
        make_optimizer: makes it from parameter groups.
        groups: of all parameters of the model, see ``groups_of``.
        parameters: the model's, by name.
        masters: by name float32[slice], of the slices that this rank owns; stepped.

    Attributes:
        inner: the optimizer.
        masters: its parameters, by name. One that is a whole parameter has its shape.

    Raises:
        AttachError: ``make_optimizer`` makes no optimizer.
    """

    def __init__(
        self,
        make_optimizer: Callable[[Groups], Optimizer],
        groups: Groups,
        parameters: Mapping[str, Parameter],
        masters: Mapping[str, Tensor],
    ) -> None:
        self._of_model = parameters
        self.masters = {
            name: Parameter(self._shaped(name, master))
            for name, master in masters.items()
        }
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.inner = make_optimizer(
            [
                {
                    **options,
                    "params": [
                        self.masters[names[id(p)]]
                        for p in options["params"]
                        if names[id(p)] in self.masters
                    ],
                }
                for options in groups
            ]
        )
        if not isinstance(self.inner, Optimizer):
            raise AttachError(
                f"make_optimizer returned {type(self.inner).__name__}, not an "
                "optimizer of the groups that it was given"
            )

    def _shaped(self, name: str, values: Tensor) -> Tensor:
        """Return a share as its parameter's shape if it is all of it, in that order."""
        parameter = self._of_model[name]
        if values.numel() == parameter.numel() and parameter.is_contiguous():
            return values.view(parameter.shape)
        return values

    def facts(self) -> dict[str, object]:
        """Return what every rank must have alike: its class, and options by group."""
        options = {
            f"optimizer's {key} of group {number}": repr(value)
            for number, group in enumerate(self.inner.param_groups)
            for key, value in group.items()
            if key != "params"
        }
        return {"optimizer": type(self.inner).__name__, **options}

    def step(
        self, gradients: Mapping[str, Tensor | None], groups: Sequence[dict[str, Any]]
    ) -> None:
        """Step the masters.

        Args:
            gradients: by name float32[slice]; ``None`` where there is none.
            groups: parameter groups whose options count from now on.
        """
        for given, inner in zip(groups, self.inner.param_groups, strict=True):
            inner.update(_options(given))
        for name, master in self.masters.items():
            gradient = gradients[name]
            master.grad = None if gradient is None else self._shaped(name, gradient)
        self.inner.step()
        for master in self.masters.values():
            master.grad = None

    def add_to(self, parts: Parts, groups: Sequence[dict[str, Any]]) -> None:
        """Add the optimizer's state to what is kept, by parameter, not by number.

        Args:
            parts: added to.
            groups: parameter groups whose options are kept.
        """
        parts.scalars[""] = [_options(group) for group in groups]
        for name, master in self.masters.items():
            for key, value in self.inner.state.get(master, {}).items():
                if isinstance(value, Tensor) and value.shape == master.shape:
                    parts.slices.setdefault(OPTIONAL + key, {})[name] = value
                else:
                    parts.scalars.setdefault(name, {})[key] = value

    def load(self, found: Parts, into: Sequence[dict[str, Any]]) -> None:
        """Take the optimizer's state from what was kept.

        Args:
            found: as ``add_to`` has made it; the groups are taken out.
            into: parameter groups that get the options, too.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        groups = found.scalars.pop("", None)
        if not isinstance(groups, list):
            raise StateError("the state has no parameter groups; is it changed?")
        if len(groups) != len(self.inner.param_groups):
            raise StateError(
                f"the state has {len(groups)} parameter groups, this optimizer "
                f"{len(self.inner.param_groups)}"
            )
        before = copy.deepcopy(self.inner.state_dict())
        try:
            self._load(found, groups)
        except Exception as error:
            self.inner.load_state_dict(before)
            raise StateError(
                f"the optimizer's state does not fit this {type(self.inner).__name__} "
                f"({type(error).__name__}: {error}); nothing was changed"
            ) from error
        for group, inner in zip(into, self.inner.param_groups, strict=True):
            group.update(_options(inner))

    def _load(self, found: Parts, groups: Groups) -> None:
        states: dict[str, dict[str, Any]] = {
            name: dict(found.scalars.get(name, {})) for name in self.masters
        }
        for kind, named in found.slices.items():
            if kind.startswith(OPTIONAL):
                for name, value in named.items():
                    shaped = value.view(self.masters[name].shape)
                    states[name][kind.removeprefix(OPTIONAL)] = shaped.clone()
        names = {id(master): name for name, master in self.masters.items()}
        numbers = self.inner.state_dict()["param_groups"]
        by_number = {
            number: states[names[id(master)]]
            for mine, theirs in zip(self.inner.param_groups, numbers, strict=True)
            for number, master in zip(theirs["params"], mine["params"], strict=True)
            if states[names[id(master)]]
        }
        loaded = [
            {**group, "params": mine["params"]}
            for group, mine in zip(groups, numbers, strict=True)
        ]
        self.inner.load_state_dict({"state": by_number, "param_groups": loaded})


def groups_of(
    params: Iterable[Parameter] | Iterable[dict[str, Any]] | None,
    parameters: Mapping[str, Tensor],
) -> Groups:
    """Return parameter groups, checked: every parameter in one of them, once.

    Args:
        params: parameters or groups, as for any optimizer; ``None``: one group of all.
        parameters: the model's, by name.

    Raises:
        AttachError: they are no parameters, not all, not once, or of another dtype.
    """
    try:
        given: Sequence[Any] = list(parameters.values() if params is None else params)
    except TypeError as error:
        raise AttachError(
            f"params={params!r} must be parameters, or groups of them, as for any "
            "optimizer"
        ) from error
    if any(isinstance(g, dict) and "params" not in g for g in given):
        raise AttachError("a group in params has no key 'params'")
    groups = [g if isinstance(g, dict) else {"params": [g]} for g in given]
    if given and not isinstance(given[0], dict):
        groups = [{"params": given}]
    groups = [{**g, "params": list(g["params"])} for g in groups]
    found = [id(p) for g in groups for p in g["params"]]
    wanted = {id(p): name for name, p in parameters.items()}
    if sorted(found) != sorted(wanted):
        missing = [name for key, name in wanted.items() if key not in found]
        raise AttachError(
            "params must hold every trainable parameter of the model once; "
            + (f"missing: {missing[:3]}" if missing else "some are others, or twice")
        )
    for name, parameter in parameters.items():
        if parameter.dtype not in _DTYPES:
            raise AttachError(
                f"parameter {name!r} is {parameter.dtype}; push_pull keeps float32 "
                "masters of float32, bfloat16 and float16 parameters"
            )
    return groups


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
