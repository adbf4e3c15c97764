"""One step's gradients on their way to their owners, and the deltas on the way back.

A bucket is pushed as soon as it is there. What a push leaves lies in DDP's bucket until
the pull, which makes it the residual; if no pull follows, the step never was.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from lc3.engines.exchange import Exchange
from lc3.errors import AttachError, DivergedError
from lc3.format import PULL_BUCKET
from lc3.masters.edits import Edits
from lc3.masters.norm import MeanNorm
from lc3.masters.owners import Owners
from lc3.masters.stand_in import StandIn
from lc3.module.model import flat_view
from lc3.residual import arena_like

_MOST_IN_A_ROW = 20  # steps that are skipped; a GradScaler's begin with some


class Pushes:
    """Pushes the gradients of one model, bucket by bucket, and pulls.

    Args:
        model: hands over the buckets.
        parameters: its trainable ones, by name.
        owners: have masters of them.
        engine: of all ranks; of two levels owners are of one.
        scaler: multiplies the loss; residuals follow its scale.

    Attributes:
        means: by name float32[slice], this rank's share of what was pushed.
        edits: what was written to the parameters between two steps.
        norm: global norm of the last mean gradient; nan before the first.
        scale: that gradients are multiplied by.
        overflowed: whether the last pass's gradients were not finite on some rank.
        skipped: how many steps were not made for that.
        loaded: whether a state was loaded since the last pass.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        parameters: Mapping[str, Tensor],
        owners: Owners,
        engine: Exchange,
        scaler: GradScaler | None,
    ) -> None:
        self._numel = {name: p.numel() for name, p in parameters.items()}
        self._owners, self._engine, self._meter = owners, engine, engine.meter
        self.means: Mapping[str, Tensor] = owners.engine.means
        self.edits = Edits(parameters, owners, engine)
        # DDP's buckets hold float32 gradients, and what a push leaves of them, until
        # the pull. Where .grad is the bucket, or narrower, memory of ours does.
        in_place = not (model.gradient_as_bucket_view or model.mixed_precision)
        copied = {
            name: flat_view(parameter.detach())
            for name, parameter in parameters.items()
            if not (in_place and parameter.dtype == torch.float32)
        }
        self._copies = arena_like(copied) if copied else {}
        self._values: dict[str, Tensor] = {}
        self._pushed: set[str] = set()
        self._norm = MeanNorm(engine)
        self._stand_in = StandIn(parameters)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        self.norm = math.nan
        self.overflowed = self.loaded = False
        self.skipped = 0
        self._skipped_in_a_row, self._bad = 0, False

    def push(self, buffer: Tensor, names: list[str], step: int, bucket: int) -> Tensor:
        """Bring one bucket's gradients to their owners. Runs on the lane.

        Args:
            buffer: the bucket's, flat; kept until the pull, or overwritten.
            names: of its parameters, in the order of the buffer.
            step: synchronised backward passes before this one.
            bucket: its number in this backward pass.

        Returns:
            What stands for it in ``.grad``: see ``StandIn``.

        Raises:
            AttachError: a gradient is sparse.
            DivergedError: see ``skipped``: too many in a row were this rank's doing.
        """
        if buffer.layout != torch.strided:
            raise AttachError(
                f"the gradient of {names[0]!r} is sparse; push_pull needs dense ones: "
                "make the embedding with sparse=False"
            )
        if self._skipped_in_a_row:
            self._bad = self._bad or not bool(buffer.isfinite().all())
        if self._pushed.intersection(names):
            self._pushed.clear()  # a step that was not made: residuals are as before
        if not self._pushed:
            self._begin()
        values = self._floats(buffer, names)
        self._values.update(values)
        values = {name: value for name, value in values.items() if value.numel()}
        self._norm.add(values, step)
        self._meter.buckets += 1
        self._meter.at_step(step + 1)
        if self._engine.transport.world == 1:
            for name, value in values.items():
                self.means[name].copy_(value)
        elif values:
            elements = sum(value.numel() for value in values.values())
            with self._engine.channel.exchanging(elements, step, bucket, hops=1):
                self._owners.push(values, step, bucket)
        self._pushed.update(names)
        given = self._stand_in.instead_of(buffer, names[0] not in self._copies)
        if len(self._pushed) < len(self._numel):
            return given
        self._find_norm()
        self.overflowed = not math.isfinite(self.norm)
        if self.overflowed:
            self._skip(step, bucket)
            return given.fill_(math.nan)
        self._stand_in.fill(self.norm * self.scale)
        self._skipped_in_a_row, self._bad = 0, False
        return given

    def _begin(self) -> None:
        """Take the buckets of another step, in the units of its loss."""
        self._stand_in.begin()
        self._norm.begin()
        scale = self.scale if self._scaler is None else self._scaler.get_scale()
        if scale != self.scale:
            for buffer in self._engine.residuals.sent.values():
                buffer *= scale / self.scale
            self.scale = scale

    def _floats(self, buffer: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Return a bucket's gradients by name, float32[numel], until the pull."""
        sizes = [self._numel[name] for name in names]
        values = dict(zip(names, torch.split(buffer, sizes), strict=True))
        for name in self._copies.keys() & values.keys():
            values[name] = self._copies[name].copy_(values[name])
        return values

    def _find_norm(self) -> None:
        """Let all ranks know the norm of the mean gradient, finite or not.

        And whether parameters hold what the last pull has left: each rank looks at its
        own share.
        """
        if self.loaded:  # a state that belongs to this model
            self.loaded = False
            self.edits.remember()
        norm, written = self._norm.find(
            self.means, self.edits.written(), self._meter.steps - 1
        )
        if written:
            self.edits.take_over()
        self.norm = norm / self.scale

    def _skip(self, step: int, bucket: int) -> None:
        """Let a step never have been: pushes' residuals are kept by the pull only."""
        self._pushed.clear()
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._bad and self._skipped_in_a_row >= _MOST_IN_A_ROW:
            rank = self._engine.transport.rank
            error = DivergedError(
                f"after {step + 1} steps gradients of rank {rank} are not "
                f"finite, in the {self._skipped_in_a_row}th step in a row that nobody "
                "makes: look at this rank's parameters, data and learning rate, and "
                "load a checkpoint from before"
            )
            self._engine.channel.tell(error, step, bucket)
            raise error
        self._bad = False

    def take_factors(self) -> dict[str, float]:
        """Return what the script has multiplied gradients by: see ``StandIn``.

        Raises:
            AttachError: nothing was pushed; or single elements were changed.
        """
        if not self._pushed:
            raise AttachError(
                "step() without a synchronised backward pass since the last one; a "
                "pass under no_sync() pushes nothing, and a model whose dtype was "
                "changed after it was wrapped has to be wrapped again"
            )
        self._pushed.clear()
        return self._stand_in.take_factors(self.scale)

    def pull(self) -> None:
        """Bring every rank what masters have moved. Runs on the lane."""
        step, bucket, owners = self._meter.steps - 1, PULL_BUCKET, self._owners
        if self._engine.transport.world == 1:
            for name, master in owners.masters.items():
                owners.replica[name].copy_(master)
        else:
            values = {n: value for n, value in self._values.items() if value.numel()}
            elements = sum(value.numel() for value in values.values())
            with self._engine.channel.exchanging(elements, step, bucket, hops=1):
                owners.pull(values, step, bucket)
        self._values.clear()  # DDP may replace its buckets

    def close(self) -> None:
        """Watch no longer."""
        self._stand_in.close()
