"""The paper's own form: owners run the optimizer, everybody pulls model deltas.

Backward pushes gradients to their owners, bucket by bucket. ``step()`` runs the
optimizer on this rank's share of float32 masters (1/W of its memory and work, as
ZeRO-1), and pulls 3LC of ``master − replica``. Source: Lim, Andersen, Kaminsky, "3LC",
MLSys 2019 (arXiv 1802.07389); masters with error feedback: EF21-P (arXiv 2209.15218).

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lc3 import private
from lc3.applied import smallest, watch_accumulation
from lc3.checkpoint import OPTIONAL, Parts
from lc3.config import Config, Settings, settle
from lc3.errors import AttachError, DivergedError, ReplicasDiffer, StateError
from lc3.format import NORM_BUCKET, PULL_BUCKET
from lc3.model import flat_view, together
from lc3.owners import owners_of
from lc3.residual import arena_like
from lc3.session import (
    alike_in,
    attaching_to,
    check_form,
    check_norm,
    check_owners,
    check_scaler,
    session_for,
)
from lc3.sketch import Sketch, squares
from lc3.state import FormState

log = logging.getLogger(__name__)

_MOST_IN_A_ROW = 20  # steps that are skipped; a GradScaler's begin with some
_LOADED = 0.01  # of the parameters' norm: what changes them more forgets what is owed
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Groups = list[dict[str, Any]]


def attach(
    model: DistributedDataParallel,
    make_optimizer: Callable[[Groups], Optimizer],
    config: Config | Settings | None = None,
    *,
    params: Iterable[Parameter] | Iterable[dict[str, Any]] | None = None,
    max_norm: float | None = None,
    scaler: GradScaler | None = None,
    group: dist.ProcessGroup | None = None,
    check_every: int | None = None,
) -> "PushPull":
    """Return the optimizer that trains ``model``, whose ``step()`` pulls deltas.

    Collective: every rank calls it with the same arguments.

    Args:
        model: wrapped in DistributedDataParallel, without a hook.
        make_optimizer: makes the optimizer of this rank's share from parameter groups:
            ``functools.partial(torch.optim.AdamW, lr=1e-3)``. Masters are slices
            without a shape, so it must work element by element; with
            ``Tuning(min_shard=2**40)`` every parameter has one owner and its own shape,
            which is what Muon needs.
        config: what to compress, and how much.
        params: parameters or groups of them, as for any optimizer. Default: all.
        max_norm: clips the gradient by its global norm, that of the mean gradient.
        scaler: that multiplies the loss; ``scaler.step`` and ``scaler.update`` are
            called as usual. Residuals follow its scale.
        group: a process group that nobody else uses. Default: lc3 makes one.
        check_every: compare all replicas by checksums whenever so many steps have been
            made, and raise ``ReplicasDiffer`` where they differ: it finds a rank that
            sends others than it keeps, or broken memory. Four bytes a tensor travel.
            ``None``: only what ``check_replicas`` is called for.

    Raises:
        AttachError: the model cannot be compressed.
        ConfigError: an argument is out of range, or a pattern matches no parameter.
        PlanMismatch: ranks differ in configuration, parameters or version.
        PeerError: one of these happened on another rank.
    """
    model = cast(DistributedDataParallel, private.uncompiled(model))
    with attaching_to(model, group):
        check_norm(max_norm)
        check_scaler(scaler)
        if not callable(make_optimizer):
            raise AttachError(
                "push_pull makes the optimizer of this rank's share itself, and got an "
                f"{type(make_optimizer).__name__}; give what makes one: "
                "functools.partial(torch.optim.AdamW, lr=1e-3)"
            )
        settings = settle(config, Settings())
        check_form(settings, "hooks.push_pull")
        check_owners(settings, "hooks.push_pull")
        optimizer = PushPull(
            model, make_optimizer, settings, params, max_norm, scaler, group
        )
        optimizer.session.link_to(model, optimizer.take, check_every)
        return optimizer


class PushPull(FormState, Optimizer):
    """An optimizer whose step works on this rank's share. Made by ``attach``.

    Learning rates and other options are read from ``param_groups`` at every step, so
    schedulers work as usual. ``zero_grad`` has nothing to do. Gradients are at their
    owners. The model's own ``.grad`` stands for them: one number everywhere, so that
    its norm is that of the mean gradient. What multiplies it (``clip_grad_norm_``, a
    GradScaler, a scale) multiplies the gradients at their owners, by parameter;
    changing single elements is an error. It is nan on every rank if a gradient was not
    finite. What no ``step()`` follows leaves nothing behind.

    See ``FormState``, too: a state is what there is beside the model, and another
    number of ranks gets masters and the optimizer's state exactly.

    Attributes:
        owners: the masters of this rank's share.
        inner: the optimizer of this rank's share.
        grad_norm: global norm of the last step's mean gradient, before clipping; of
            what is coded an estimate with a standard error of 4.4 %: see
            ``lc3.sketch``.
        skipped: steps that were not made, on any rank, for a gradient was not finite.
    """

    form = "push_pull"

    def __init__(
        self,
        model: DistributedDataParallel,
        make_optimizer: Callable[[Groups], Optimizer],
        settings: Settings,
        params: Iterable[Parameter] | Iterable[dict[str, Any]] | None,
        max_norm: float | None,
        scaler: GradScaler | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.settings = settings
        self.session = session_for(model, settings, group)
        self._module = model.module
        self.meter, self.engine = self.session.meter, self.session.engine
        names = self.session.names
        self._parameters = {name: parameter for parameter, name in names.items()}
        groups = _groups(params, self._parameters)
        flat = self._flats()
        replica = {n: f.float() for n, f in flat.items()}  # float32: the model's own
        self.owners = owners_of(self.session.flat_engine, replica)
        self._means = self.session.flat_engine.means
        self._shared = {
            piece.name: self._own(piece.name).clone() for piece in self.owners.owned
        }
        self._masters = {
            name: Parameter(self._shaped(name, master))
            for name, master in self.owners.masters.items()
        }
        self.inner = make_optimizer(
            [
                {
                    **options,
                    "params": [
                        self._masters[names[p]]
                        for p in options["params"]
                        if names[p] in self._masters
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
        options = {
            f"optimizer's {key} of group {number}": repr(value)
            for number, group in enumerate(self.inner.param_groups)
            for key, value in group.items()
            if key != "params"
        }
        facts = {
            "max_norm": max_norm,
            "optimizer": type(self.inner).__name__,
            **options,
        }
        self.session.agree_on(facts)
        super().__init__(groups, self.inner.defaults)
        self._values = arena_like(replica)
        self._pushed: set[str] = set()
        self._buffers: list[Tensor] = []
        self._stand_in = 0.0
        self._first = smallest(names)
        self._watched = watch_accumulation(self._first, self._is_handed)
        self._max_norm = max_norm
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        self._overflowed = False
        self._loaded = False
        self.grad_norm = math.nan
        self._skipped_in_a_row, self._bad = 0, False
        self.skipped = 0
        # What is decoded has a norm many times the gradient's.
        self._sketch: Sketch | None = None
        plan = self.engine.plan
        coded = {name: n for name, n in plan.numel.items() if name in plan.coded}
        if coded and self.engine.transport.world > 1:
            self._sketch = Sketch(coded, self.engine.messages.coder.device)

    def _flats(self) -> dict[str, Tensor]:
        """Return views of the parameters' memory, wherever it is by now."""
        return {n: flat_view(p.detach()) for n, p in self._parameters.items()}

    def _own(self, name: str) -> Tensor:
        """Return this rank's share of a parameter of the model: a view, or a copy."""
        (slice_,) = self.engine.plan.slices_of([name], self.engine.transport.rank)
        flat = flat_view(self._parameters[name].detach())
        return flat[slice_.start : slice_.stop].float()

    def _shaped(self, name: str, values: Tensor) -> Tensor:
        """Return a share as its parameter's shape if it is all of it, in that order."""
        parameter = self._parameters[name]
        if values.numel() == parameter.numel() and parameter.is_contiguous():
            return values.view(parameter.shape)
        return values

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Push a bucket's gradients to their owners; DDP gets what stands for them."""
        return self.session.on_bucket(bucket, self.push)

    def push(self, buffer: Tensor, names: list[str], step: int, bucket: int) -> Tensor:
        """Bring one bucket's gradients to their owners. Runs on the lane."""
        if buffer.layout != torch.strided:
            raise AttachError(
                f"the gradient of {names[0]!r} is sparse; push_pull needs dense ones: "
                "make the embedding with sparse=False"
            )
        if self._pushed.intersection(names):
            self._pushed.clear()  # a step that was not made: residuals are as before
        if not self._pushed:
            self._buffers, self._stand_in = [], 0.0
            if self._sketch is not None:
                self._sketch.take()
        if not self._pushed and self._scaler is not None:
            self._follow(self._scaler.get_scale())
        sizes = [self._values[name].numel() for name in names]
        for name, gradient in zip(names, torch.split(buffer, sizes), strict=True):
            self._values[name].copy_(gradient)
        values = {
            name: self._values[name] for name in names if self._values[name].numel()
        }
        if self._sketch is not None:
            for name in self.engine.plan.coded.intersection(values):
                self._sketch.add(name, values[name], step)
        self.meter.buckets += 1
        self.meter.at_step(step + 1)
        if self.engine.transport.world == 1:
            for name, value in values.items():
                self._means[name].copy_(value)
        elif values:
            elements = sum(value.numel() for value in values.values())
            with self.engine.channel.exchanging(elements, step, bucket, hops=1):
                self.owners.push(values, step, bucket)
        self._pushed.update(names)
        if self._skipped_in_a_row:
            self._bad = self._bad or not bool(buffer.isfinite().all())
        self._buffers.append(buffer.zero_())
        if len(self._pushed) < len(self._parameters):
            return buffer
        self._find_norm()
        self._overflowed = not math.isfinite(self.grad_norm)
        if not self._overflowed:
            elements = sum(one.numel() for one in self._buffers)
            self._stand_in = self.grad_norm * self._scale / math.sqrt(max(elements, 1))
            for one in self._buffers:
                one.fill_(self._stand_in)
            self._skipped_in_a_row, self._bad = 0, False
            return buffer
        # This step never was: the pushes' residuals are kept by the pull only.
        self._pushed.clear()
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._bad and self._skipped_in_a_row >= _MOST_IN_A_ROW:
            rank = self.engine.transport.rank
            error = DivergedError(
                f"after {step + 1} steps gradients of rank {rank} are not "
                f"finite, in the {self._skipped_in_a_row}th step in a row that nobody "
                "makes: look at this rank's parameters, data and learning rate, and "
                "load a checkpoint from before"
            )
            self.engine.channel.tell(error, step, bucket)
            raise error
        self._bad = False
        return buffer.fill_(math.nan)

    def _follow(self, scale: float) -> None:
        """Bring the residuals into the units of gradients of a loss times ``scale``."""
        if scale != self._scale:
            for buffer in self.engine.residuals.sent.values():
                buffer *= scale / self._scale
            self._scale = scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change this rank's masters and pull what everybody's have moved; collective.

        Raises:
            AttachError: there was no synchronised backward pass since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._overflowed:
            self._overflowed = False
            super().zero_grad(set_to_none=False)  # nan would stay in them
            return loss
        if not self._pushed:
            raise AttachError(
                "step() without a synchronised backward pass since the last one; a "
                "pass under no_sync() pushes nothing, and a model whose dtype was "
                "changed after it was wrapped has to be wrapped again"
            )
        self._pushed.clear()
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: mine[key] for key in mine if key != "params"})
        factors = self._factors()
        self._stand_in = 0.0
        super().zero_grad(set_to_none=False)  # what stood for gradients is no gradient
        shrink = 1.0
        if self._max_norm is not None:
            whole = max(factors.values(), default=1.0) * self._scale
            shrink = min(1.0, self._max_norm / (self.grad_norm * whole + 1e-6))
        for name, master in self._masters.items():
            mean = self._means[name]
            # Unused on every rank: no gradient, as DDP has it.
            used = name in factors and bool(mean.any())
            factor = shrink * factors.get(name, 1.0)
            master.grad = self._shaped(name, mean.mul_(factor)) if used else None
        self.inner.step()
        for master in self._masters.values():
            master.grad = None  # its memory is the pull's from here on
        with self.meter.stage("wait"):
            self.session.lane.call(self._pull)
        self._copy_replica()
        return loss

    def _copy_replica(self) -> None:
        """Let parameters be the replica."""
        for name, flat in self._flats().items():
            replica = self.owners.replica[name]
            if flat.data_ptr() != replica.data_ptr():
                flat.copy_(replica)
            if flat.dtype == torch.float32:
                self.owners.replica[name] = flat
        self._remember()

    def _remember(self) -> None:
        """Remember what this rank's share of the parameters holds."""
        for name, shared in self._shared.items():
            shared.copy_(self._own(name))

    def _factors(self) -> dict[str, float]:
        """Return what the script has multiplied gradients by, where there are any.

        Raises:
            AttachError: single elements were changed; the gradients are elsewhere.
        """
        factors: dict[str, float] = {}
        grads = {
            name: parameter.grad
            for name, parameter in self._parameters.items()
            if parameter.grad is not None and parameter.grad.numel()
        }
        ends = [torch.stack(grad.aminmax()).float() for grad in grads.values()]
        found = torch.stack(ends).tolist() if ends else []
        for (name, grad), (least, most) in zip(grads.items(), found, strict=True):
            if most - least > 1e-3 * abs(most):
                raise AttachError(
                    f"elements of the gradient of {name!r} were changed one by one "
                    "before step(), but hooks.push_pull keeps gradients at their "
                    "owners: change them by a hook on the parameter "
                    "(parameter.register_hook), which runs before they are pushed"
                )
            given = float(torch.tensor(self._stand_in, dtype=grad.dtype))
            ratio = most / given if given else 1 / self._scale
            near = 1e-5 if grad.dtype == torch.float32 else 1e-2  # of rounding
            untouched = abs(ratio * self._scale - 1) < near
            factors[name] = 1 / self._scale if untouched else ratio
        return factors

    def _is_handed(self) -> bool:
        grad, pushed = self._first.grad, self._stand_in
        return grad is not None and bool(pushed) and bool((grad == pushed).all())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: what is exchanged is agreed on when lc3 is attached."""
        if hasattr(self, "_pushed"):
            raise AttachError(
                "hooks.push_pull exchanges the parameters that the model had at "
                "attach; to add some, close() this optimizer and wrap the model anew"
            )
        super().add_param_group(param_group)

    def _find_norm(self) -> None:
        """Let all ranks know the norm of the mean gradient, finite or not.

        And whether parameters hold what the last pull has left: each rank looks at its
        own share.
        """
        exact = whole = 0.0  # squared norms: of what is not coded, of all that arrived
        for name, mean in self._means.items():
            square = float(mean.double().square().sum())
            whole += square
            if self._sketch is None or name not in self.engine.plan.coded:
                exact += square
        sums = [] if self._sketch is None else self._sketch.take().tolist()
        if self._loaded:  # a state that belongs to this model
            self._loaded = False
            self._remember()
        written = any(
            not torch.equal(self._own(name), shared)
            for name, shared in self._shared.items()
        )
        step, bucket = self.meter.steps - 1, NORM_BUCKET
        with self.engine.channel.exchanging(0, step, bucket):
            everybody = self._numbers([exact, whole, written, *sums], step, bucket)
        if any(numbers[2] for numbers in everybody):
            self._take_over()
        total = sum(numbers[0] for numbers in everybody)
        if sums:
            found = torch.tensor(everybody, dtype=torch.float64)[:, 3:].mean(0)
            total += squares(found)[0]
        finite = math.isfinite(sum(numbers[1] for numbers in everybody) + total)
        self.grad_norm = math.sqrt(total) / self._scale if finite else math.nan

    def _numbers(
        self, mine: Sequence[float], step: int, bucket: int
    ) -> list[list[float]]:
        """Return every rank's numbers."""
        shared = self.engine.channel.all_gather_bytes(
            torch.tensor(mine, dtype=torch.float64), step, bucket
        )
        return [data.clone().view(torch.float64).tolist() for data in shared]

    def _take_over(self) -> None:
        """Let masters be what all ranks have written to their parameters.

        Raises:
            ReplicasDiffer: not all ranks hold the same.
        """
        flats = self._flats()
        moved = whole = 0.0
        for name, shared in self._shared.items():
            moved += float((self._own(name) - shared).norm()) ** 2
            whole += float(shared.norm()) ** 2
        tag = self.engine.channel.aside()
        with self.engine.channel.exchanging(0, *tag):
            everybody = self._numbers([together(flats), moved, whole], *tag)
            sums = [numbers[0] for numbers in everybody]
            if len(set(sums)) > 1:
                usual = max(sums, key=sums.count)
                others = [r for r, value in enumerate(sums) if value != usual]
                raise ReplicasDiffer(
                    "parameters were changed outside of step() since the last one, "
                    f"and ranks {others} hold others than the rest; load weights on "
                    "every rank, before the next backward pass"
                )
        _, moved, whole = map(sum, zip(*everybody, strict=True))
        forget = not moved <= _LOADED**2 * whole
        for name, shared in self._shared.items():
            now, master = self._own(name), self.owners.masters[name]
            if forget:
                master.copy_(now)
            else:
                master.add_(now - shared)
            shared.copy_(now)
        if forget:
            for residual in self.engine.residuals.sent.values():
                residual.zero_()
        for name, flat in flats.items():
            if flat.dtype == torch.float32:
                self.owners.replica[name] = flat
            else:
                self.owners.replica[name].copy_(flat)
        log.info("lc3: all ranks were given other parameters; they go on from these")

    def _pull(self) -> None:
        step, bucket = self.meter.steps - 1, PULL_BUCKET
        if self.engine.transport.world == 1:
            for name, master in self.owners.masters.items():
                self.owners.replica[name].copy_(master)
        else:
            elements = sum(value.numel() for value in self._values.values())
            with self.engine.channel.exchanging(elements, step, bucket, hops=1):
                self.owners.pull(self._values, step, bucket)

    def export(self) -> dict[str, Tensor]:
        """Return every parameter's exact master, float32 of its shape; collective."""
        result = self.session.lane.call(self.owners.export)
        return {
            name: _like(parameter, result[name])
            for name, parameter in self._parameters.items()
        }

    def check_replicas(self) -> None:
        """Raise ``ReplicasDiffer`` if ranks hold other parameters; collective."""
        self.session.check_replicas(alike_in(self._module))

    def _parts(self) -> Parts:
        """Return what is kept; optimizer state by parameter, not by its number."""
        slices: dict[str, dict[str, Tensor]] = {"masters": self.owners.masters}
        scalars: dict[str, Any] = {
            "": [
                {key: group[key] for key in group if key != "params"}
                for group in self.param_groups  # a scheduler changes these
            ]
        }
        for name, master in self._masters.items():
            for key, value in self.inner.state.get(master, {}).items():
                if isinstance(value, Tensor) and value.shape == master.shape:
                    slices.setdefault(OPTIONAL + key, {})[name] = value
                else:
                    scalars.setdefault(name, {})[key] = value
        return Parts(
            {
                "step": self.session.step,
                "scale": self._scale,
                **self.engine.budget.counters(),
            },
            self.engine.residuals.sent,
            slices,
            {
                "replica": {
                    name: self.owners.replica[name]
                    for name, parameter in self._parameters.items()
                    if parameter.dtype != torch.float32  # else the model's own
                }
            },
            scalars,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict`` of this rank, or from merged ones.

        The model is loaded beside it.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        mine = self._parts()
        found = self._found(state, mine)
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
            self._load_optimizer(found, groups)
        except Exception as error:
            self.inner.load_state_dict(before)
            raise StateError(
                f"the optimizer's state does not fit this {type(self.inner).__name__} "
                f"({type(error).__name__}: {error}); nothing was changed"
            ) from error
        mine.slices = {"masters": self.owners.masters}
        mine.copy_from(found)
        self._scale = float(found.counters["scale"])
        self._go_on(found)
        self._loaded = True

    def _load_optimizer(self, found: Parts, groups: Groups) -> None:
        states: dict[str, dict[str, Any]] = {
            name: dict(found.scalars.get(name, {})) for name in self._masters
        }
        for kind, named in found.slices.items():
            if kind.startswith(OPTIONAL):
                for name, value in named.items():
                    shaped = value.view(self._masters[name].shape)
                    states[name][kind.removeprefix(OPTIONAL)] = shaped.clone()
        numbers = self.inner.state_dict()["param_groups"]
        by_number = {
            number: states[name]
            for mine, theirs in zip(self.inner.param_groups, numbers, strict=True)
            for number, name in zip(
                theirs["params"], map(self._name_of, mine["params"]), strict=True
            )
            if states[name]
        }
        loaded = [
            {**group, "params": mine["params"]}
            for group, mine in zip(groups, numbers, strict=True)
        ]
        self.inner.load_state_dict({"state": by_number, "param_groups": loaded})
        for outer, inner in zip(
            self.param_groups, self.inner.param_groups, strict=True
        ):
            outer.update({key: inner[key] for key in inner if key != "params"})

    def _name_of(self, master: Tensor) -> str:
        return next(name for name, m in self._masters.items() if m is master)

    def _knobs(self) -> dict[str, object]:
        return {"optimizer": type(self.inner).__name__, "max_norm": self._max_norm}

    def close(self) -> None:
        """End the lane and the group it made; gradients travel as without lc3 then."""
        for watched in self._watched:
            watched.remove()
        self.session.close()


def _groups(
    params: Iterable[Parameter] | Iterable[dict[str, Any]] | None,
    parameters: Mapping[str, Tensor],
) -> Groups:
    """Return parameter groups, checked: every parameter in one of them, once."""
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


def _like(parameter: Tensor, flat: Tensor) -> Tensor:
    """Return float32[numel] in the memory order of a parameter as its shape."""
    shaped = torch.empty_like(parameter, dtype=torch.float32).detach()
    flat_view(shaped).copy_(flat)
    return shaped
