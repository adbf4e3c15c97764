"""What becomes of a model's buckets of gradients: averaged, and followed.

Where the optimizers are not known whatever is exchanged counts as applied, unless the
loss's scaler skips the step. Where they are, gradients are handed out with the norm of
the mean, and what is applied of them is seen: see ``lc3.module.applied``.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lc3 import private
from lc3.engines.exchange import NO_HALF_GRADS, Exchange
from lc3.errors import AttachError
from lc3.module.applied import Applied, Kind, kind_of, unsuited
from lc3.module.moments import Moments
from lc3.module.sketch import SUMS, Sketch, squares

log = logging.getLogger(__name__)

_CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NORM = "lc3.norm"  # travels with the last bucket of a step
EXTRAS = {_NORM: SUMS + 1}  # of a plan whose gradients are followed


class Buckets:
    """Averages buckets whose optimizers are not known.

    Args:
        engine: averages.
        scaler: multiplies the loss; residuals follow its scale, and a step that it
            skips is undone.

    Attributes:
        moments: that gradients are divided by before they are coded, if any.
        follows: whether a step may turn out not to be applied.
        norm: global norm of the last step's mean gradient, estimated; nan: not known.
    """

    def __init__(self, engine: Exchange, scaler: GradScaler | None = None) -> None:
        self.engine = engine
        self.moments: Moments | None = None
        self.follows = scaler is not None
        self._scaler = scaler
        self._scale = 1.0 if scaler is None else scaler.get_scale()
        self._overflowed = False
        self._wide: list[Tensor] = []
        self._said: set[str] = set()
        if engine.transport.world > 1:
            engine.residuals.hold()

    @property
    def norm(self) -> float:
        """See above."""
        return math.nan

    def begin(self) -> None:
        """Settle what became of the last step's exchange, and follow the scaler.

        A scaler multiplies the loss, and changes by what. Powers of two are exact.
        """
        self.settle()
        if self._scaler is not None:
            scale = self._scaler.get_scale()
            if scale != self._scale:
                for buffer in self.engine.residuals.buffers():
                    buffer *= scale / self._scale
                self._scale = scale

    def reduce(
        self, buffer: Tensor, names: list[str], step: int, bucket: int, last: bool
    ) -> Tensor:
        """Average one bucket over the ranks.

        Args:
            buffer: the bucket's flat buffer, overwritten. Slices of it, never shaped
                views: for channels_last parameters the two differ in order.
            names: of its parameters, in the order of the buffer.
            step: synchronised backward passes before this one.
            bucket: its number in this backward pass.
            last: whether it ends the pass.

        Returns:
            ``buffer``, or for a gradient that passes through uncompressed a tensor like
            it.
        """
        if is_coded(buffer):
            reduced = self._coded(buffer, names, step, bucket, last)
        else:
            reduced = self._passed_through(buffer, names, step, bucket, last)
        if self._scaler is not None and not _finite(reduced):
            self._overflowed = True
        return reduced

    def _coded(
        self,
        buffer: Tensor,
        names: list[str],
        step: int,
        bucket: int,
        last: bool,  # noqa: ARG002  # all are alike
    ) -> Tensor:
        narrow = buffer.dtype != torch.float32
        flat = self._buffer_for(buffer) if narrow else buffer
        grads = self._parts(flat, names, bucket)
        half_grads = self._parts(buffer, names, bucket) if narrow else NO_HALF_GRADS
        self.engine.all_reduce(grads, step, bucket, half_grads)
        return _narrowed(flat, buffer) if narrow else buffer

    def _passed_through(
        self,
        buffer: Tensor,
        names: list[str],
        step: int,
        bucket: int,
        last: bool,  # noqa: ARG002  # all are alike
    ) -> Tensor:
        kind = "sparse" if buffer.layout != torch.strided else str(buffer.dtype)
        if kind not in self._said:
            self._said.add(kind)
            log.warning(
                "lc3: %s gradients pass through a plain all-reduce (first: %s)",
                kind,
                names[0],
            )
        return self.engine.channel.pass_through(buffer, step, bucket)

    def _parts(self, flat: Tensor, names: list[str], bucket: int) -> dict[str, Tensor]:
        """Return a bucket's gradients by name: views, [numel]."""
        sizes = [self.engine.plan.numel[name] for name in names]
        if sum(sizes) != flat.numel():
            raise AttachError(
                f"bucket {bucket} holds {flat.numel()} elements, its parameters "
                f"{sum(sizes)}; this torch lays out buckets in a way lc3 does not know"
            )
        return dict(zip(names, torch.split(flat, sizes), strict=True))

    def _buffer_for(self, buffer: Tensor) -> Tensor:
        """Return float32[numel] for what a half-precision bucket becomes.

        Memory used again by the next bucket.
        """
        if not self._wide or self._wide[0].numel() < buffer.numel():
            self._wide = [
                torch.empty(buffer.numel(), device=buffer.device, dtype=torch.float32)
            ]
        return self._wide[0][: buffer.numel()]

    def settle(self) -> None:
        """Take the last exchange for applied, unless the scaler skipped the step."""
        self._settle_as(0.0 if self._overflowed else 1.0)
        self._overflowed = False

    def _settle_as(self, share: float) -> None:
        residuals = self.engine.residuals
        if share == 0:
            self.engine.owing.update(residuals.open)
        residuals.settle_all(share)

    def discard(self) -> None:
        """Undo the last exchange: no optimizer applies its gradients."""
        self._settle_as(0.0)

    def release(self) -> None:
        """Give gradients their own size now: they have it."""

    def multiply(self, owed: Mapping[str, Tensor]) -> None:
        """Multiply what is owed by what gradients were divided by, in place."""
        if self.moments is not None:
            self.moments.multiply({n: o for n, o in owed.items() if o.numel()})

    def counters(self) -> dict[str, float]:
        """Return what is the same on every rank and goes on from a checkpoint."""
        return {"scale": self._scale}

    def load(self, counters: Mapping[str, int | float]) -> None:
        """Go on from what ``counters`` returned."""
        self._overflowed = False
        self._scale = float(counters["scale"])

    def close(self) -> None:
        """Follow nothing any longer."""


class FollowedBuckets(Buckets):
    """Averages buckets, and follows their gradients to the optimizers.

    Args:
        engine: averages; its plan has ``EXTRAS``.
        names: of the parameters.
        optimizers: that step them, each some of them.
        kind: of the optimizers. For "adam" gradients are divided by their second
            moments before they are coded.
        max_norm: clips the gradient by its global norm; ``None``: the script may.
        max_update: see ``Moments``; ``None`` without Adam.

    Attributes:
        applied: follows the optimizers.
    """

    def __init__(
        self,
        engine: Exchange,
        names: Mapping[Tensor, str],
        optimizers: Sequence[Optimizer],
        kind: Kind | None,
        max_norm: float | None,
        max_update: float | None,
    ) -> None:
        super().__init__(engine)
        self.follows = True
        plan, device = engine.plan, engine.messages.coder.device
        if kind == "adam":
            assert max_update is not None
            betas = _betas_of(optimizers, names)
            shapes = {n: list(p.shape) for p, n in names.items() if n in plan.coded}
            known = {name: betas.get(name, 0.999) for name in shapes}
            self.moments = Moments(shapes, known, device, max_update)
        elif kind == "other":
            log.warning("lc3: %s", unsuited(_least_suited(optimizers)))
        self._sketch = Sketch(plan.numel, device)
        self.applied = Applied(
            optimizers, names, engine.residuals, self.moments, max_norm
        )
        self._watched: list[Any] = self.applied.watch_accumulation()
        self._waiting: list[tuple[Tensor, list[str], int]] = []
        self._ours: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}

    @property
    def norm(self) -> float:
        """See ``Buckets``."""
        return self.applied.norm

    def begin(self) -> None:
        """Undo what no optimizer has applied, and foretell what one will."""
        self._ours, self._others = {}, {}
        self.applied.drop()
        self.applied.expect()
        self._waiting = []
        # What was undone, or clipped, is owed.
        self.engine.owing.update(self.engine.residuals.sent)

    def _coded(
        self, buffer: Tensor, names: list[str], step: int, bucket: int, last: bool
    ) -> Tensor:
        flat = self._widened(buffer)
        grads = self._parts(flat, names, bucket)
        for name, grad in grads.items():
            if grad.numel():
                self._sketch.add(name, grad, step)
        if self.applied.clips.limit is None:
            sums = self._sketch.take() if last else None
            self._exchange(grads, step, bucket, sums)
            self._keep(buffer, flat, grads)
            if sums is not None:
                self._hand_out(sums)
        else:
            self._waiting.append((buffer, names, bucket))
            if last:
                self._exchange_clipped(step)
        return buffer

    def _passed_through(
        self, buffer: Tensor, names: list[str], step: int, bucket: int, last: bool
    ) -> Tensor:
        mean = super()._passed_through(buffer, names, step, bucket, last)
        if last and self._waiting:
            self._exchange_clipped(step)
        elif last:  # the sums alone
            sums = self._sketch.take()
            self.engine.all_reduce({_NORM: sums}, step, bucket + 1)
            self._hand_out(sums)
        return mean

    def _exchange(
        self, grads: dict[str, Tensor], step: int, bucket: int, sums: Tensor | None
    ) -> None:
        """Average a bucket by 3LC, times what the script is expected to apply.

        Args:
            grads: by name float32[numel]; overwritten.
            step: see ``reduce``.
            bucket: see ``reduce``.
            sums: that are averaged with it, in place.
        """
        coded = [name for name in grads if name in self.engine.plan.coded]
        if self.applied.expected != 1 and coded:
            private.multiply([grads[name] for name in coded], self.applied.expected)
        divided: dict[str, Tensor] = {}
        if self.moments is not None:
            divided = {name: grads[name] for name in coded if grads[name].numel()}
            if divided:
                self._divide(self.moments, divided, step)
        exchanged = grads if sums is None else {**grads, _NORM: sums}
        self.engine.all_reduce(exchanged, step, bucket)
        if self.moments is not None:
            self.moments.multiply(divided)

    def _divide(self, moments: Moments, grads: dict[str, Tensor], step: int) -> None:
        """Divide gradients by what all ranks' squares are together."""
        if moments.due(step):
            mine = moments.of(grads).bfloat16()  # 0.4 % of a moment is no loss
            at = self.engine.channel.aside()
            with self.engine.channel.exchanging(0, *at):
                shared = self.engine.channel.mean(mine, *at)
            moments.take([*grads], shared.float())
        moments.divide(grads)

    def _exchange_clipped(self, step: int) -> None:
        """Find out the norm first, then exchange every bucket that has waited."""
        sums = self._sketch.take()
        at = self.engine.channel.aside()
        with self.engine.channel.exchanging(0, *at):
            sums = self.engine.channel.mean_of_small(sums, *at)
        self.applied.expect(squares(sums)[0])
        waiting, self._waiting = self._waiting, []
        for buffer, names, index in waiting:
            flat = self._widened(buffer)
            grads = self._parts(flat, names, index)
            self._exchange(grads, step, index, None)
            self._keep(buffer, flat, grads)
        self._hand_out(sums)

    def _widened(self, buffer: Tensor) -> Tensor:
        """Return a bucket in float32: itself, or a copy in memory used again."""
        if buffer.dtype == torch.float32:
            return buffer
        return self._buffer_for(buffer).copy_(buffer)

    def _keep(self, buffer: Tensor, flat: Tensor, grads: Mapping[str, Tensor]) -> None:
        """Let a bucket's buffer be what arrived, and remember where it is."""
        if buffer is not flat:
            _narrowed(flat, buffer)
        parts = torch.split(buffer, [grad.numel() for grad in grads.values()])
        for name, part in zip(grads, parts, strict=True):
            coded = name in self.engine.plan.coded
            (self._ours if coded else self._others)[name] = part

    def _hand_out(self, sums: Tensor) -> None:
        self.applied.hand_out(self._ours, self._others, *squares(sums))
        self._ours, self._others = {}, {}

    def settle(self) -> None:
        """Wait: the optimizers' steps settle it, and the next pass the rest."""

    def discard(self) -> None:
        """See ``Buckets.discard``."""
        self.applied.drop()

    def release(self) -> None:
        """Give gradients their own size now, and take the exchange for applied."""
        self.applied.release()

    def counters(self) -> dict[str, float]:
        """See ``Buckets.counters``."""
        return {**super().counters(), **self.applied.counters()}

    def load(self, counters: Mapping[str, int | float]) -> None:
        """See ``Buckets.load``."""
        self.applied.load(counters)

    def close(self) -> None:
        """See ``Buckets.close``."""
        self.applied.close()
        for watched in self._watched:
            watched.remove()


def is_coded(buffer: Tensor) -> bool:
    """Return whether 3LC codes a bucket: dense, of a dtype that it knows."""
    return buffer.layout == torch.strided and buffer.dtype in _CODED_DTYPES


def _betas_of(
    optimizers: Sequence[Optimizer], names: Mapping[Tensor, str]
) -> dict[str, float]:
    """Return Adam's beta2 of each parameter that one of the optimizers steps."""
    return {
        names[parameter]: float(group["betas"][1])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in names
    }


def _least_suited(optimizers: Sequence[Optimizer]) -> Optimizer:
    return next((o for o in optimizers if kind_of(o) == "other"), optimizers[0])


def _narrowed(wide: Tensor, into: Tensor) -> Tensor:
    """Write float32 to a narrower type; what is too large becomes its largest.

    What 3LC decodes can be s times the largest gradient.
    """
    most = torch.finfo(into.dtype).max
    return into.copy_(wide.clamp_(-most, most))


def _finite(values: Tensor) -> bool:
    dense = values.coalesce().values() if values.is_sparse else values
    if not dense.numel():
        return True
    return bool(torch.stack(dense.aminmax()).isfinite().all())  # nan is both ends
