"""The engine's verbs without owners, by one hop.

Every rank sends all pieces to all others and adds up the same frames in the same order,
so the means are the same bits everywhere, and nobody has to send them.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lc3.budget import Budget
from lc3.config import Settings
from lc3.engines.engine import Engine, views_of
from lc3.engines.exchange import NO_HALF_GRADS
from lc3.format import scale_of
from lc3.meter import Meter
from lc3.plan import Layout, Plan
from lc3.residual import Kept, Residuals
from lc3.transport.channel import sum_of
from lc3.transport.protocol import Transport
from lc3.wire.coder import Coder

_LARGEST_FLOAT = torch.finfo(torch.float32).max


class Direct(Engine):
    """An ``Engine`` whose ranks average what they send each other."""

    direct = True

    def pieces(self, names: Iterable[str]) -> Layout:
        """Return one list of all pieces of some parameters, in their order."""
        return self.plan.layout(names, self.owners, merged=True)

    def push_and_pull(
        self,
        pieces: Layout,
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """Replace values by their 3LC means, from what every rank sends to all others.

        Args:
            pieces: one list, in an order that all ranks have alike.
            grads: by parameter name, float32[numel]; overwritten. NaN in all of a coded
                piece where some rank's values were not finite.
            step: see ``Exchange.all_reduce``.
            bucket: see ``Exchange.all_reduce``.
            half_grads: see ``Exchange.all_reduce``.
        """
        (everything,) = pieces
        arrived = self.exchanged(pieces, grads, step, bucket, half_grads)
        with self.meter.stage("decode"):
            by_sender = self.messages.unpack(
                arrived, [everything] * len(arrived), step, bucket
            )
            self.average(pieces, grads, by_sender)

    def exchanged(
        self,
        pieces: Layout,
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> list[Tensor]:
        """Send all pieces to everybody; return every rank's message, uint8[*].

        The first half of ``push_and_pull``, which see; ``average`` is the second.
        """
        (message,) = self.pushes(pieces, grads, step, bucket, half_grads)
        with self.meter.stage("exchange"):
            return self.transport.all_gather(message)

    def average(
        self,
        pieces: Layout,
        grads: Mapping[str, Tensor],
        by_sender: Sequence[Sequence[Tensor]],
    ) -> None:
        """Replace values by the sum of what ranks sent over the number of all ranks.

        Args:
            pieces: see ``push_and_pull``.
            grads: what ``exchanged`` has left, the residuals to be; overwritten.
            by_sender: the bytes of each piece by sender, of all or some of the ranks.
        """
        sums: list[tuple[Tensor, Sequence[Tensor]]] = []
        kept: list[Kept] = []
        said = zip(*by_sender, strict=True)
        for (piece, view), chunks in zip(views_of(pieces, grads), said, strict=True):
            if not piece.coded:
                view.copy_(sum_of(chunks))
                continue
            lost = not sum(map(scale_of, chunks)) <= _LARGEST_FLOAT
            kept.append((piece, view, lost))
            if not lost:
                sums.append((view, chunks))
        self.residuals.keep_sent(kept)
        for _, view, lost in kept:
            if lost:
                view.fill_(torch.nan)
        self.messages.coder.sum(sums)
        self.divide(grads.values())


def engine_for(
    plan: Plan,
    config: Settings,
    transport: Transport,
    coder: Coder,
    meter: Meter,
    owners: Sequence[int] | None = None,
    residuals: Residuals | None = None,
    budget: Budget | None = None,
) -> Engine:
    """Return the engine of a configuration's topology; see ``Engine``."""
    kind = Direct if config.topology == "direct" else Engine
    return kind(plan, config, transport, coder, meter, owners, residuals, budget)
