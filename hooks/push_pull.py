"""The paper's own form: owners run the optimizer, everybody pulls model deltas.

Backward pushes gradients to their owners, bucket by bucket. ``step()`` runs the
optimizer on this rank's share of float32 masters (1/W of its memory and work, as
ZeRO-1), and pulls 3LC of ``master − replica``. Source: Lim, Andersen, Kaminsky, "3LC",
MLSys 2019 (arXiv 1802.07389); masters with error feedback: EF21-P (arXiv 2209.15218).

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lc3 import private
from lc3.checkpoint import Parts
from lc3.config import Config, Settings, settle
from lc3.errors import AttachError
from lc3.masters.owners import owners_of
from lc3.masters.pushes import Pushes
from lc3.masters.sharded import Groups, Sharded, groups_of
from lc3.module.model import flat_view
from lc3.session.attaching import attaching_to
from lc3.session.checks import (
    alike_in,
    check_bound,
    check_form,
    check_owners,
    check_scaler,
)
from lc3.session.state import FormState
from lc3.session.wrapped import Wrapped, session_for


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
        check_bound("max_norm", max_norm)
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
        optimizer.link_to(model, check_every)
        return optimizer


class PushPull(FormState, Optimizer):
    """An optimizer whose step works on this rank's share. Made by ``attach``.

    Learning rates and other options are read from ``param_groups`` at every step, so
    schedulers work as usual. ``zero_grad`` has nothing to do. Gradients are at their
    owners. The model's own ``.grad`` stands for them: one number everywhere, so that
    its norm is that of the mean gradient. What multiplies it (``clip_grad_norm_``, a
    GradScaler, a scale) multiplies the gradients at their owners, by parameter;
    changing single elements is an error. It is nan on every rank if a gradient was not
    finite. What no ``step()`` follows leaves nothing behind. After ``step()`` there is
    no ``.grad``. Gradients lie in DDP's buckets until then; with
    ``gradient_as_bucket_view``, or in half precision, in memory of 4 bytes each more.

    See ``FormState``, too: a state is what there is beside the model, and another
    number of ranks gets masters and the optimizer's state exactly.

    Attributes:
        owners: the masters of this rank's share.
        inner: the optimizer of this rank's share.
    """

    form = "push_pull"
    session: Wrapped

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
        self._parameters = {
            name: cast(Parameter, p) for p, name in self.session.names.items()
        }
        groups = groups_of(params, self._parameters)
        flats = {n: flat_view(p.detach()) for n, p in self._parameters.items()}
        replica = {n: f.float() for n, f in flats.items()}  # float32: the model's own
        self.owners = owners_of(self.session.flat_engine, replica)
        self._sharded = Sharded(
            make_optimizer, groups, self._parameters, self.owners.masters
        )
        self.inner = self._sharded.inner
        self.session.agree_on({"max_norm": max_norm, **self._sharded.facts()})
        super().__init__(groups, self.inner.defaults)
        self._pushes = Pushes(model, self._parameters, self.owners, self.engine, scaler)
        self._max_norm = max_norm

    def link_to(self, model: DistributedDataParallel, check_every: int | None) -> None:
        """Let DDP hand its buckets to their owners, and get what stands for them."""
        self.session.link_to(model, self._pushes.push, check_every=check_every)

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's mean gradient, before clipping.

        Of what is coded an estimate with a standard error of 4.4 %: see
        ``lc3.module.sketch``.
        """
        return self._pushes.norm

    @property
    def skipped(self) -> int:
        """How many steps were not made, on any rank, for a gradient was not finite."""
        return self._pushes.skipped

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
        pushes = self._pushes
        if pushes.overflowed:
            pushes.overflowed = False
            super().zero_grad()  # nan would stay in them
            return loss
        factors = pushes.take_factors()
        super().zero_grad()  # what stood for gradients is no gradient
        shrink = 1.0
        if self._max_norm is not None:
            whole = max(factors.values(), default=1.0) * pushes.scale
            shrink = min(1.0, self._max_norm / (pushes.norm * whole + 1e-6))
        gradients: dict[str, Tensor | None] = {}
        for name in self._sharded.masters:
            mean = pushes.means[name]
            # Unused on every rank: no gradient, as DDP has it.
            used = name in factors and bool(mean.any())
            factor = shrink * factors.get(name, 1.0)
            gradients[name] = mean.mul_(factor) if used else None
        self._sharded.step(gradients, self.param_groups)
        with self.meter.stage("wait"):
            self.session.lane.call(pushes.pull)
        pushes.edits.copy_replica()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: what is exchanged is agreed on when lc3 is attached."""
        if hasattr(self, "_pushes"):
            raise AttachError(
                "hooks.push_pull exchanges the parameters that the model had at "
                "attach; to add some, close() this optimizer and wrap the model anew"
            )
        super().add_param_group(param_group)

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
        parts = super()._parts()
        parts.counters["scale"] = self._pushes.scale
        parts.slices = {"masters": self.owners.masters}
        parts.whole = {
            "replica": {
                name: self.owners.replica[name]
                for name, parameter in self._parameters.items()
                if parameter.dtype != torch.float32  # else the model's own
            }
        }
        self._sharded.add_to(parts, self.param_groups)  # a scheduler changes these
        return parts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict`` of this rank, or from merged ones.

        The model is loaded beside it.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        mine = self._parts()
        found = self._found(state, mine)
        self._sharded.load(found, self.param_groups)
        mine.slices = {"masters": self.owners.masters}
        mine.copy_from(found)
        self._pushes.scale = float(found.counters["scale"])
        self._go_on(found)
        self._pushes.loaded = True

    def _knobs(self) -> dict[str, object]:
        return {"optimizer": type(self.inner).__name__, "max_norm": self._max_norm}

    def close(self) -> None:
        """End the lane and the group it made; gradients travel as without lc3 then."""
        self._pushes.close()
        self.session.close()


def _like(parameter: Tensor, flat: Tensor) -> Tensor:
    """Return float32[numel] in the memory order of a parameter as its shape."""
    shaped = torch.empty_like(parameter, dtype=torch.float32).detach()
    flat_view(shaped).copy_(flat)
    return shaped
