"""3LC as a communication hook of DistributedDataParallel.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

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

from lc3.checkpoint import Parts, load, merge, save
from lc3.config import Config
from lc3.engine import NO_HALVES, widen
from lc3.errors import AttachError, StateError
from lc3.meter import Meter
from lc3.moments import Moments
from lc3.owners import flat_view
from lc3.session import session_for

log = logging.getLogger(__name__)

_CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attach(
    model: DistributedDataParallel,
    config: Config = Config(),  # noqa: B008  # frozen
    *,
    scaler: GradScaler | None = None,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | int | None = None,
) -> "State":
    """Compress the gradients of ``model`` from its next backward pass on.

    Collective: every rank of the group calls it, with the same configuration.

    Args:
        model: wrapped in DistributedDataParallel, without a hook of its own.
        config: what to compress, and how much.
        scaler: that multiplies the loss. Residuals follow its scale, and a step that it
            skips for one tensor's overflow is undone for all of them; that takes one
            more copy of the residuals.
        group: a process group that nobody else uses, over the ranks of the model's.
            Default: lc3 makes one, which it can only if the model is on all ranks.
        mesh: for nodes or sites with a fast network inside: the number of ranks in
            each, or a mesh of two dimensions, between and inside. Gradients travel
            densely inside and by 3LC between: see ``lc3.two_levels``. Default: by 3LC
            between all ranks.

    Returns:
        The state: its ``meter``, ``state_dict()``, ``close()``.

    Raises:
        AttachError: the model cannot be compressed.
        ConfigError: a pattern of the configuration matches no parameter.
        PlanMismatch: ranks differ in configuration, parameters or version.
        PeerError: one of these happened on another rank.
    """
    state = State(model, config, scaler=scaler, group=group, mesh=mesh)
    model.register_comm_hook(state, lc3_hook)
    return state


def lc3_hook(
    state: "State", bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Replace every gradient in ``bucket`` by its 3LC mean (``register_comm_hook``)."""
    return state.session.on_bucket(bucket, state.reduce, state.uncoded)


class State:
    """Everything lc3 keeps for one model: made by ``attach``.

    Attributes:
        config: the configuration.
        meter: bytes and seconds so far, on this rank.
        engine: averages gradients; holds the plan and the residuals.
        session: names, group and worker lane; counts the steps.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        config: Config = Config(),  # noqa: B008  # frozen
        *,
        scaler: GradScaler | None = None,
        group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | int | None = None,
    ) -> None:
        self.session = session_for(model, config, group, mesh)
        self.config = config
        self.meter = self.session.meter
        self.engine = self.session.engine
        self._group = model.process_group
        self._said: set[str] = set()
        self._wide = torch.empty(0)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        self._moments: Moments | None = None
        if config.beta2 is not None:
            shapes = {name: list(p.shape) for p, name in self.session.names.items()}
            self._moments = Moments(shapes, config.beta2, self.engine.coder.device)
        self._before: list[Tensor] = []
        self._overflowed = False

    def reduce(
        self, buffer: Tensor, names: list[str], step: int, bucket: int
    ) -> Tensor:
        """Average one bucket over the ranks. Runs on the lane.

        Args:
            buffer: the bucket's flat buffer, overwritten. Slices of it, never shaped
                views: for channels_last parameters the two differ in order.
            names: of its parameters, in the order of the buffer.
            step: synchronised backward passes before this one.
            bucket: its number in this backward pass.

        Returns:
            What the hook's future must hold: ``buffer``, or for a gradient that passes
            through uncompressed a tensor like it.
        """
        self.meter.at_step(step + 1)
        if bucket == 0 and self._scaler is not None:
            self._begin()
        reduced = self._reduce(buffer, names, step, bucket)
        if self._scaler is not None and not _finite(reduced):
            self._overflowed = True
        return reduced

    def uncoded(
        self, bucket: dist.GradBucket, names: list[str], step: int
    ) -> torch.futures.Future[Tensor] | None:
        """Start DDP's own all-reduce of a bucket that ``mode="auto"`` sends uncoded.

        On the model's own group, as without lc3, and without a detour over the lane.
        ``None``: the bucket goes the lane's way, since it is coded, since residuals
        have to come along, or since a scaler may undo the step.
        """
        buffer = bucket.buffer()
        if self._scaler is not None or not _coded(buffer):
            return None
        if (wire := self.engine.native_form(names, buffer.numel())) is None:
            return None
        self.meter.at_step(step + 1)
        narrow = wire == "bfloat16" and buffer.dtype == torch.float32
        self.meter.add_all_reduce(
            buffer.numel(),
            2 if narrow else buffer.element_size(),
            self.engine.exchange.world,
        )
        return (bf16_compress_hook if narrow else allreduce_hook)(self._group, bucket)

    def _reduce(
        self, buffer: Tensor, names: list[str], step: int, bucket: int
    ) -> Tensor:
        if not _coded(buffer):
            if self._moments is not None:
                raise AttachError(
                    f"the gradient of {names[0]!r} is sparse or {buffer.dtype} and "
                    "cannot be divided by a second moment; freeze the parameter, make "
                    "it float32, or leave Config.beta2 out"
                )
            self._say_once(
                f"{buffer.dtype if buffer.layout == torch.strided else 'sparse'} "
                f"gradients pass through a plain all-reduce (first: {names[0]})"
            )
            return self.engine.pass_through(buffer, step, bucket)
        narrow = buffer.dtype != torch.float32
        flat = self._room_for(buffer) if narrow else buffer
        sizes = [self.engine.plan.numel[name] for name in names]
        if sum(sizes) != flat.numel():
            raise AttachError(
                f"bucket {bucket} holds {flat.numel()} elements, its parameters "
                f"{sum(sizes)}; this torch lays out buckets in a way lc3 does not know"
            )
        grads = dict(zip(names, torch.split(flat, sizes), strict=True))
        parts = torch.split(buffer, sizes)
        halves = dict(zip(names, parts, strict=True)) if narrow else NO_HALVES
        if self._moments is not None:
            widen(grads, halves)
            halves = NO_HALVES
            self._divide(self._moments, grads, step)
        self.engine.all_reduce(grads, step, bucket, halves)
        return buffer.copy_(flat) if narrow else buffer

    def _divide(self, moments: Moments, grads: dict[str, Tensor], step: int) -> None:
        """Divide gradients by what all ranks' squares are together."""
        if moments.due(step):
            mine = moments.of(grads)
            at = self.engine.aside()
            with self.engine.exchanging(0, *at):
                shared = self.engine.mean(mine, *at)
            moments.take([*grads], shared)
        moments.divide(grads)

    def _begin(self) -> None:
        """Bring the residuals into the units of this step's gradients, and keep them.

        A scaler multiplies the loss, and changes by what. Powers of two are exact.
        """
        assert self._scaler is not None
        self._settle()
        residuals = self.engine.residuals
        scale = self._scaler.get_scale()
        if scale != self._scale:
            if self._moments is not None:  # residuals then have no scale
                self._moments.rescale(scale / self._scale)
            else:
                for buffer in residuals.buffers():
                    buffer *= scale / self._scale
            self._scale = scale
        if not self._before:
            self._before = [torch.empty_like(b) for b in residuals.buffers()]
        for kept, buffer in zip(self._before, residuals.buffers(), strict=True):
            kept.copy_(buffer)

    def _settle(self) -> None:
        """Undo a step that the scaler skips: what it had sent is owed again."""
        if self._overflowed:
            now = self.engine.residuals.buffers()
            for kept, buffer in zip(self._before, now, strict=True):
                buffer.copy_(kept)
            self.engine.owing.update(self.engine.residuals.sent)
            self._overflowed = False

    def _room_for(self, buffer: Tensor) -> Tensor:
        """Return float32[numel] for what a half-precision bucket becomes.

        Memory used again by the next bucket; first for the residuals to be, which the
        old ones must outlive until the pull has arrived, then for the mean.
        """
        if self._wide.numel() < buffer.numel():
            self._wide = torch.empty(buffer.numel(), device=buffer.device)
        return self._wide[: buffer.numel()]

    def _say_once(self, what: str) -> None:
        kind = what.split()[0]
        if kind not in self._said:
            self._said.add(kind)
            log.warning("lc3: %s", what)

    def pending(self) -> dict[str, Tensor]:
        """Return what gradients still owe the parameters; collective.

        By coded parameter float32[numel] in memory order, the same on every rank: the
        mean over ranks of the residuals, in the units of the gradients; with
        ``Config.beta2`` of gradients that are divided, as ``.grad`` then is.
        """
        owed: dict[str, Tensor] = {}

        def ask() -> Tensor:
            self._settle()
            owed.update(self.engine.pending())
            return torch.empty(0)

        self.session.lane.submit(ask).wait()
        return owed

    def check_replicas(self) -> None:
        """Raise ``ReplicasDiffer`` if ranks hold other parameters; collective."""
        self.session.check_replicas()

    def flush(self) -> None:
        """Add what is pending to the gradients, densely, and owe nothing; collective.

        For the last ``optimizer.step()`` before the model is handed over. Call it after
        ``backward()``, on every rank.
        """
        owed = self.pending()
        for buffer in self.engine.residuals.buffers():
            buffer.zero_()
        for parameter, name in self.session.names.items():
            if name in owed:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                flat_view(parameter.grad).add_(owed[name].to(parameter.dtype))

    def _parts(self) -> Parts:
        residuals = self.engine.residuals
        counters = {
            "step": self.session.step,
            "scale": self._scale,
            "senders": self.engine.senders,
            **self.engine.budget.counters(),
        }
        moments = {} if self._moments is None else {"moments": self._moments.kept}
        return Parts(counters, residuals.sent, {"owned": residuals.owned}, moments)

    def state_dict(self) -> dict[str, Any]:
        """Return residuals and step of this rank: tensors, strings, numbers only.

        Every rank saves its own. The same rank of an equal run continues from it bit
        for bit; ``lc3.merge_states`` of all ranks' fits any number of ranks.
        """
        self._settle()
        rank = self.engine.exchange.rank
        return save("ddp", self.engine.plan, rank, self._parts())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict`` of this rank, or from merged ones.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        mine = self._parts()
        rank = self.engine.exchange.rank
        found = load(state, "ddp", self.engine.plan, rank, mine)
        merged, senders = state["rank"] is None, found.counters["senders"]
        if not merged and senders != self.engine.senders:
            raise StateError(
                f"the state was saved with {senders} senders of each element, this run "
                f"has {self.engine.senders}; attach with the same mesh, or load "
                "lc3.merge_states of all ranks'"
            )
        mine.copy_from(found)
        if merged:
            self.engine.keep_own_part()
        self.engine.push_what_owners_owe()
        self.engine.owing.update(self.engine.residuals.sent)
        self._overflowed = False
        self._scale = float(found.counters["scale"])
        self.engine.budget.load(found.counters)
        self.session.begin_step(int(found.counters["step"]))

    def gather_state(self) -> list[dict[str, Any]]:
        """Return every rank's ``state_dict()`` on rank 0, none elsewhere; collective.

        For checkpoints that one rank writes; ``load_gathered`` takes it on any.
        """
        mine, gathered = io.BytesIO(), list[dict[str, Any]]()
        torch.save(self.state_dict(), mine)
        data = torch.frombuffer(bytearray(mine.getbuffer()), dtype=torch.uint8)

        def collect() -> Tensor:
            for state in self.engine.collect(data):
                file = io.BytesIO(bytes(state.numpy()))
                loaded = torch.load(file, map_location="cpu", weights_only=True)
                gathered.append(loaded)
            return torch.empty(0)

        self.session.lane.submit(collect).wait()
        return gathered

    def load_gathered(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from what ``gather_state`` returned on rank 0, with any ranks.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        exchange = self.engine.exchange
        if len(states) == exchange.world:
            self.load_state_dict(states[exchange.rank])
        else:
            self.load_state_dict(merge(states))

    def close(self) -> None:
        """End the lane and the group it made. The model can no longer run backward."""
        self.session.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an lc3 State holds a process group and cannot be pickled; save "
            "state.state_dict(), and save model.module, not the DDP wrapper"
        )


def figures(meter: Meter) -> dict[str, float]:
    """Return the main figures under the names that loggers get."""
    stages = {f"lc3/seconds_{stage}": spent for stage, spent in meter.seconds.items()}
    return {
        "lc3/ratio": meter.ratio,
        "lc3/bits_push": meter.push.bits_per_element,
        "lc3/bits_pull": meter.pull.bits_per_element
        if meter.pull.coded_elements
        else 0.0,
        **stages,
    }


def _coded(buffer: Tensor) -> bool:
    return buffer.layout == torch.strided and buffer.dtype in _CODED_DTYPES


def _finite(values: Tensor) -> bool:
    dense = values.coalesce().values() if values.is_sparse else values
    return bool(dense.isfinite().all())
