"""3LC as a communication hook of DistributedDataParallel.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lc3 import private
from lc3.config import Config, Settings, settle
from lc3.module.applied import Kind, kind_of_all, unwrapped
from lc3.module.link import Link, Unregistered, linked_hook
from lc3.module.model import Frozen, named_parameters
from lc3.session.attaching import attaching_to
from lc3.session.averages import Alone, Averages
from lc3.session.buckets import EXTRAS, Buckets, FollowedBuckets, is_coded
from lc3.session.checks import check_clipping, check_module, check_scaler, update_bound
from lc3.session.groups import alone
from lc3.session.wrapped import Wrapped, senders, session_for

log = logging.getLogger(__name__)

# Divided by their moments all gradients are of one kind, so that biases can be coded.
FOR_ADAM = Settings(sparsity=1.1, min_ndim=0, min_numel=1)


def attach(
    model: DistributedDataParallel,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    config: Config | Settings | None = None,
    *,
    max_norm: float | None = None,
    max_update: float | None = None,
    scaler: GradScaler | None = None,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | int | None = None,
    check_every: int | None = None,
) -> Averages:
    """Compress the gradients of ``model`` from its next backward pass on.

    Collective: every rank of the group calls it, with the same arguments. The script
    stays as it is: ``.grad`` has the norm that it has without lc3 (within 15 %, by an
    estimate that all ranks share), and may be clipped, scaled, or not applied at all.
    Adam and its relatives get an exchange of their own: gradients are divided by their
    second moments before they are coded, and the optimizer divides by the same.
    Buffers, which DDP sends before every pass, are sent where they have changed: see
    ``lc3.module.buffers``. One process, whose model is not wrapped, trains as without
    lc3.

    Args:
        model: wrapped in DistributedDataParallel, without a hook of its own.
        optimizer: that steps the model's parameters, or several that each step some. It
            is not replaced; hooks on its ``step()`` are added. ``None``: gradients are
            3LC's decoded ones, with a norm many times the gradient's, and whatever is
            exchanged counts as applied, unless ``State.discard`` says it is not.
        config: what to compress, and how much. What it leaves open is for Adam as in
            ``FOR_ADAM``, by one hop where two ranks, or two nodes, exchange; else as in
            ``Settings()``.
        max_norm: clips the gradient by its global norm, as ``clip_grad_norm_`` in the
            script does; needs the optimizer.
        max_update: for Adam: bounds every element of a gradient divided by the root of
            its second moment, so in learning rates. Less follows Adam more closely, for
            more bytes. Default: 3. ``math.inf`` is Adam's own bound, 1 / √(1 − β2).
        scaler: that multiplies the loss; needed only without ``optimizer``. Residuals
            follow its scale, and a step that it skips is undone.
        group: a process group that nobody else uses, over the ranks of the model's.
            Default: lc3 makes one, which it can only if the model is on all ranks.
        mesh: for nodes or sites with a fast network inside: the number of ranks in
            each, or a mesh of two dimensions, between and inside. Gradients travel
            densely inside and by 3LC between: see ``lc3.engines.two_levels``. Default:
            by 3LC between all ranks.
        check_every: compare all replicas by checksums whenever so many steps have been
            made, and raise ``ReplicasDiffer`` where they differ: it finds a rank that
            sends others than it keeps, or broken memory. Four bytes a tensor travel.
            ``None``: only what ``check_replicas`` is called for.

    Returns:
        The state: its ``meter``, ``state_dict()``, ``close()``.

    Raises:
        AttachError: the model cannot be compressed.
        ConfigError: a pattern of the configuration matches no parameter, or an argument
            is out of range.
        PlanMismatch: ranks differ in configuration, parameters or version.
        PeerError: one of these happened on another rank.

    Example:
        >>> model = torch.nn.Linear(8, 2)  # one process; more wrap it first
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> state = attach(model, optimizer)
        >>> state
        <lc3 ddp: one process, nothing to exchange>
    """
    model = cast(DistributedDataParallel, private.uncompiled(model))
    if alone() and not isinstance(model, DistributedDataParallel):
        check_module(model)
        check_scaler(scaler)
        optimizers = [] if optimizer is None else unwrapped(optimizer)
        check_clipping(max_norm, optimizers)
        update_bound(max_update, kind_of_all(optimizers))
        log.info("lc3: one process, so there is nothing to exchange")
        return Alone(settle(config, Settings()))
    with attaching_to(model, group):
        own: Any = {"max_norm": max_norm, "max_update": max_update, "scaler": scaler}
        state = State(model, optimizer, config, **own, group=group, mesh=mesh)
        state.session.link_to(model, state.reduce, state.uncoded, check_every)
        state.unregistered.close()
    return state


def hook(state: "State", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Replace every gradient in ``bucket`` by its 3LC mean.

    For ``model.register_comm_hook(State(model, optimizer), hook)``, as torch's own
    hooks are registered; ``attach`` does the same in one call.
    """
    return linked_hook(state.link(), bucket)


class State(Averages):
    """Everything lc3 keeps for one model: made by ``attach``. See ``FormState``.

    Attributes:
        kind: of the optimizer: "adam", "sgd" or "other"; ``None`` without one.
        unregistered: warns until this is the model's hook.
    """

    form = "ddp"
    session: Wrapped

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        config: Config | Settings | None = None,
        *,
        max_norm: float | None = None,
        max_update: float | None = None,
        scaler: GradScaler | None = None,
        group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | int | None = None,
    ) -> None:
        optimizers = [] if optimizer is None else unwrapped(optimizer)
        self.kind: Kind | None = kind_of_all(optimizers)
        check_scaler(scaler)
        check_clipping(max_norm, optimizers)
        self._max_update = update_bound(max_update, self.kind)
        defaults = Settings()
        if self.kind == "adam":
            two = senders(model, mesh) == 2
            defaults = replace(FOR_ADAM, topology="direct" if two else "owners")
        self.settings = settle(config, defaults)
        clips = {"max_norm": max_norm, "max_update": self._max_update}
        facts = {"optimizer": self.kind, **clips}
        extras = EXTRAS if optimizers else {}
        self.session = session_for(model, self.settings, group, mesh, facts, extras)
        self.meter, self.engine = self.session.meter, self.session.engine
        chosen = self.settings != settle(config, Settings())
        if chosen and not self.engine.transport.rank:
            kinds = " and ".join(sorted({type(one).__name__ for one in optimizers}))
            log.info("lc3: %s, chosen for %s", self.settings, kinds)
        self._group = model.process_group
        self._wrapper = weakref.ref(model)
        self._link: Link | None = None
        self.unregistered = Unregistered(model)
        self._module = model.module
        self._frozen = Frozen(
            (name, parameter)
            for name, parameter in named_parameters(model.module)
            if name not in model.parameters_to_ignore
        )
        self._seen: set[str] = set()
        self._buckets: Buckets
        if optimizers and self.engine.transport.world > 1:
            self._buckets = FollowedBuckets(
                self.engine, self.session.names, optimizers, self.kind, **clips
            )
        else:
            scales = scaler is not None and scaler.is_enabled() and not optimizers
            self._buckets = Buckets(self.engine, scaler if scales else None)

    def link(self) -> Link:
        """Return what leads a model's hook here until this is closed."""
        if self._link is None:
            model = self._wrapper()
            assert model is not None  # its hook has called
            self._link = self.session.adopt(model, self.reduce, self.uncoded)
            self.unregistered.close()
        return self._link

    def reduce(
        self, buffer: Tensor, names: list[str], step: int, bucket: int
    ) -> Tensor:
        """Replace every gradient in a bucket by its mean. Runs on the lane."""
        self.meter.at_step(step + 1)
        if bucket == 0:
            self._seen.clear()
            self._frozen.check("wrap the module again, and attach to that")
            self._buckets.begin()
        self._seen.update(names)
        last = len(self._seen) == len(self.session.names)
        return self._buckets.reduce(buffer, names, step, bucket, last)

    def uncoded(
        self, bucket: dist.GradBucket, names: list[str], step: int
    ) -> torch.futures.Future[Tensor] | None:
        """Start DDP's own all-reduce of a bucket that ``mode="auto"`` sends uncoded.

        On the model's own group, as without lc3, and without a detour over the lane.
        ``None``: the bucket goes the lane's way, since it is coded, since residuals
        have to come along, or since the step may not be applied.
        """
        buffer = bucket.buffer()
        if self._buckets.follows or not is_coded(buffer):
            return None
        if (wire := self.engine.native_form(names, buffer.numel())) is None:
            return None
        self.meter.at_step(step + 1)
        narrow = wire == "bfloat16" and buffer.dtype == torch.float32
        element_bytes = 2 if narrow else buffer.element_size()
        world = self.engine.transport.world
        self.meter.add_all_reduce(buffer.numel(), element_bytes, world)
        return (bf16_compress_hook if narrow else allreduce_hook)(self._group, bucket)

    def _knobs(self) -> dict[str, object]:
        said = {"optimizer": self.kind, "max_update": self._max_update}
        return {knob: value for knob, value in said.items() if value is not None}

    def close(self) -> None:
        """End the lane and the group it made; gradients travel as without lc3 then."""
        self.unregistered.close()
        self._buckets.close()
        self.session.close()
