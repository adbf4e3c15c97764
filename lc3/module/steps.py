"""What happens to a model's parameters: steps of optimizers, and all else.

PyTorch tells of every optimizer's step, whichever optimizer it is: one that replaced
the first, one inside of another. What changes parameters between two steps is somebody
else: ``Given`` keeps what they held then.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lc3.errors import AttachError
from lc3.module.model import Model

log = logging.getLogger(__name__)

# Of the norm of what ranks shared: a change that is more than a step's rounding or
# clamping, and one that is more than what a rank may move by itself.
_CHANGED, _REPLACED = 0.01, 0.5
_PATIENCE = 3  # exchanges in a row with writes that are no load, but a part of the loop


class Counting:
    """Calls back around the steps of every optimizer that holds some parameter.

    Args:
        optimizers: optimizers that step the model; the last one's steps count.
        model: the model that is stepped.
        before: called before a step, with ``new``: whether the optimizer is another
            than those known.
        after: called after it, with ``counts``, and ``replaced``: whether the optimizer
            has taken another one's place.

    Attributes:
        optimizers: those that step the model by now.

    Raises:
        AttachError: none of them holds a parameter of the model.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        model: Model,
        before: Callable[..., None],
        after: Callable[..., None],
    ) -> None:
        self.optimizers = list(optimizers)
        self._model = model
        self._before, self._after = before, after
        self._held: WeakKeyDictionary[Optimizer, tuple[int, bool]] = WeakKeyDictionary()
        self._under_way: list[Optimizer] = []
        names = {id(p): name for name, p in model.parameters().items()}
        last = [names[id(p)] for p in _parameters(optimizers[-1]) if id(p) in names]
        if not last:
            raise AttachError(
                f"the {type(optimizers[-1]).__name__} steps no parameter of this "
                "model, so there are no steps to count; pass the optimizer of "
                "model.parameters()"
            )
        self._anchor = last[0]
        self._handles = [
            register_optimizer_step_pre_hook(self._pre),
            register_optimizer_step_post_hook(self._post),
        ]

    def _pre(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._holds(optimizer):
            return
        if optimizer in self._under_way:  # its last step has failed
            self._under_way.clear()
        self._under_way.append(optimizer)
        if len(self._under_way) == 1:
            self._before(new=not any(optimizer is known for known in self.optimizers))

    def _post(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer not in self._under_way:
            return
        del self._under_way[self._under_way.index(optimizer) :]
        if not self._under_way:
            anchor = self._model.last_seen[self._anchor]
            counts = any(parameter is anchor for parameter in _parameters(optimizer))
            known = any(optimizer is one for one in self.optimizers)
            replaced = counts and not known
            if replaced:
                self._replace_by(optimizer)
            self._after(counts=counts, replaced=replaced)

    def _holds(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer has some parameter of the model."""
        held = list(_parameters(optimizer))
        known = self._held.get(optimizer)
        if known is None or known[0] != len(held):
            known = len(held), self._model.holds_one_of(held)
            self._held[optimizer] = known
            if known[1]:
                self._model.parameters()  # raises what is wrong with them
        return known[1]

    def _replace_by(self, optimizer: Optimizer) -> None:
        """Take a new optimizer for those that hold nothing beside its parameters."""
        held = {id(p) for p in _parameters(optimizer)}
        self.optimizers = [
            one
            for one in self.optimizers
            if any(id(p) not in held for p in _parameters(one))
        ]
        self.optimizers.append(optimizer)
        log.info("lc3: a %s steps the model now", type(optimizer).__name__)

    def close(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()


@dataclass
class Written:
    """What parameters held after something else than an optimizer wrote to them.

    Attributes:
        base: by name [numel], before the next step; empty if nothing was written.
        late: by name float32[numel], what an exchange that was under way then has added
            to them since.
        far: whether that is far from what the ranks shared.
        whole: whether it is a load and nothing else, if all ranks have it alike: they
            held the ranks' own before.
    """

    base: dict[str, Tensor] = field(default_factory=dict)
    late: dict[str, Tensor] = field(default_factory=dict)
    far: bool = False
    whole: bool = False


class Watch:
    """Looks at a model's parameters before each step.

    Attributes:
        written: since the last exchange of each parameter began.
    """

    def __init__(self, model: Model) -> None:
        self.written = Written()
        self._model = model
        self._in_a_row = 0

    def take(self, names: Collection[str]) -> Written:
        """Return what was written to some parameters, and look anew at these."""
        now = self.written
        if not now.base:
            return now
        base, late = (
            {name: held.pop(name) for name in names if name in held}
            for held in (now.base, now.late)
        )
        if not now.base:
            self.written = Written()
        return replace(now, base=base, late=late) if base else Written()

    def look(
        self, shared: Mapping[str, Tensor], *, fresh: Collection[str], new: bool
    ) -> None:
        """Keep what parameters hold, if something was written to them.

        Args:
            shared: by name float32[numel], what all ranks held after the last exchange.
            fresh: names of those that should hold just that.
            new: whether the module may have other parameters.
        """
        all_fresh = len(fresh) == len(shared)
        if not all_fresh and self._in_a_row >= _PATIENCE:
            return
        touched = not all_fresh and self._model.touched(look_up=new)
        if not touched and not fresh:
            return
        flats = {n: f.to(shared[n].device) for n, f in self._model.flats().items()}
        if not touched and all(
            torch.equal(flats[n], shared[n].to(flats[n].dtype)) for n in fresh
        ):
            return
        moved = sum(float((f - shared[n]).norm()) ** 2 for n, f in flats.items())
        whole = sum(float(value.norm()) ** 2 for value in shared.values())
        self.written = Written(
            base={name: flat.clone() for name, flat in flats.items()},
            far=moved > (_CHANGED if all_fresh else _REPLACED) ** 2 * whole,
            whole=not all_fresh,
        )

    def told(self, written: Written, *, alike: bool) -> None:
        """Take in whether all ranks were given the same."""
        self._in_a_row = 0 if alike or not written.base else self._in_a_row + 1


def _parameters(optimizer: Optimizer) -> Any:
    return (p for group in optimizer.param_groups for p in group["params"])
