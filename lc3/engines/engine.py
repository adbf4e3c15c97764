"""The one path a gradient takes, readable top to bottom.

``all_reduce`` is ``reduce_scatter`` (push: every rank sends each owner its pieces) and
``all_gather`` (pull: every owner sends its means to everybody). Both directions are
coded with error feedback. A residual changes only when everything has arrived and is
finite, so a step that fails, or overflows on any rank, leaves all residuals as they
were. ``lc3.engines.direct`` goes the same way by one hop.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from lc3.budget import Budget
from lc3.config import Settings
from lc3.engines.exchange import NO_HALF_GRADS, Wire, widen
from lc3.errors import ConfigError
from lc3.format import is_nan_frame
from lc3.meter import NORMS_EVERY, Meter
from lc3.plan import Layout, Piece, Plan
from lc3.residual import Residuals, arena
from lc3.transport.channel import Channel, floats, sum_of
from lc3.transport.protocol import Lazily, NotMadeError, Transport
from lc3.wire.coder import Coder, Sums
from lc3.wire.messages import Messages


class Engine:
    """An ``Exchange`` compressed both ways, between every rank and the owners.

    Args:
        plan: the same on every rank.
        config: the same on every rank.
        transport: moves the messages.
        coder: for the device of the gradients.
        meter: is written to.
        owners: the plan's number of each rank of the exchange, if they are some of its
            owners only. Default: all, in order.
        residuals: memory that is this rank's already.
        budget: what was steered so far. Default: nothing yet.

    Attributes:
        means: by parameter name float32[slice], of the slices that this rank owns: what
            the last push brought. The pull uses the memory again.
    """

    direct = False

    def __init__(
        self,
        plan: Plan,
        config: Settings,
        transport: Transport,
        coder: Coder,
        meter: Meter,
        owners: Sequence[int] | None = None,
        residuals: Residuals | None = None,
        budget: Budget | None = None,
    ) -> None:
        if self.direct != (config.topology == "direct"):
            raise ConfigError(
                f"topology={config.topology!r} is not that of {type(self).__name__}; "
                "lc3.engines.direct.engine_for returns the right one"
            )
        self.owners = range(transport.world) if owners is None else owners
        self.me = self.owners[transport.rank]
        self.plan = plan
        self.config = config
        self.transport = transport
        self.meter = meter
        self.residuals = residuals or Residuals(plan, self.me, coder.device)
        self.owing: set[str] = set()
        self.budget = budget or Budget(config)
        self.channel = Channel(transport, meter, plan.fingerprint, self.budget)
        self.messages = Messages(
            plan, coder, transport.rank, config.entropy, self.budget
        )
        slices = [] if self.direct else list(plan.slices_of(plan.numel, self.me))
        buffers = arena([slice_.numel for slice_ in slices], coder.device)
        self.means = {s.name: buffer for s, buffer in zip(slices, buffers, strict=True)}
        # On the device: CUDA multiplies by 1/W when W is a number on the host.
        world = float(transport.world)
        self._world = torch.tensor(world, device=coder.device, dtype=torch.float32)

    def all_reduce(
        self,
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """See ``Exchange.all_reduce``."""
        pieces = self.pieces(grads)
        self.meter.buckets += 1
        if self.transport.world == 1 or not any(pieces):
            widen(grads, half_grads)
            return
        with self.channel.exchanging(self.elements_of(pieces), step, bucket):
            self.push_and_pull(pieces, grads, step, bucket, half_grads)

    def push_and_pull(
        self,
        pieces: Layout,
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """Do what ``all_reduce`` does, at any world size; see there."""
        owned = pieces[self.transport.rank]
        means = self.reduce_scatter(pieces, grads, step, bucket, half_grads)
        owed, left, read = self.residuals.to_pull(zip(owned, means, strict=True))
        arrived = self.all_gather(pieces, left, owed, step, bucket, read)
        with self.meter.stage("decode"):
            pulled = self.messages.unpack(arrived, pieces, step, bucket)
            self.keep_residuals(pieces, pulled, grads)
            self._write(pieces, pulled, grads, self.messages.coder.sum)
            mine = pulled[self.transport.rank]
            self.residuals.keep_owned(
                [
                    (piece, mean, is_nan_frame(chunk))
                    for piece, mean, chunk in zip(owned, left, mine, strict=True)
                    if piece.coded
                ]
            )

    def pieces(self, names: Iterable[str]) -> Layout:
        """Return the pieces of some parameters by owner, in plan order."""
        return self.plan.layout(names, self.owners)

    def elements_of(self, pieces: Layout) -> int:
        """Return how many elements of parameters some pieces have."""
        extras = self.plan.extras
        return sum([p.numel for some in pieces for p in some if p.name not in extras])

    def reduce_scatter(
        self,
        pieces: Layout,
        values: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> list[Tensor]:
        """Push: send every owner its pieces, return the means of this rank's own.

        Args:
            pieces: by owner, in plan order.
            values: by parameter name, float32[numel]. Where residuals are not held in
                a second copy left holding, for coded pieces, values plus residual less
                what the frames carry: the residual to be, see ``keep_residuals``.
            step: see ``Exchange.all_reduce``.
            bucket: see ``Exchange.all_reduce``.
            half_grads: see ``Exchange.all_reduce``.

        Returns:
            For each piece of this rank a view, float32[piece], of memory that the next
            exchange uses again. NaN where some rank's values were not finite.
        """
        messages = self.pushes(pieces, values, step, bucket, half_grads)
        try:
            with self.meter.stage("exchange"):
                arrived = self.transport.all_to_all(messages)
        except NotMadeError as error:
            raise error.__cause__ or error from None
        with self.meter.stage("decode"):
            owned = pieces[self.transport.rank]
            by_sender = self.messages.unpack(
                arrived, [owned] * len(arrived), step, bucket
            )
            means = list(map(self.mean_of, owned))
            said = zip(*by_sender, strict=True)
            sums: list[tuple[Tensor, Sequence[Tensor]]] = []
            for piece, mean, chunks_of in zip(owned, means, said, strict=True):
                if piece.coded:
                    sums.append((mean, chunks_of))
                else:
                    mean.copy_(sum_of(chunks_of))
            self.messages.coder.sum(sums)
            self.divide(means)
        return means

    def divide(self, sums: Iterable[Tensor]) -> None:
        """Make sums over the ranks means, in place."""
        for total in sums:
            total /= self._world

    def pushes(
        self,
        pieces: Layout,
        values: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor],
    ) -> Sequence[Tensor]:
        """Return a message for each list of pieces; see ``reduce_scatter``."""
        if bucket == 0 and self.budget.target is not None:
            self.channel.keep_budget(step)
        wanted = step % NORMS_EVERY == 0
        if wanted:
            widen(values, half_grads)
            half_grads = NO_HALF_GRADS
        both = views_of(pieces, values)
        residuals, left, sources = self.residuals.to_send(both)
        if half_grads:
            sources = [view for _, view in views_of(pieces, half_grads)]
        sparsity, direction = self.budget.sparsity, self.meter.push

        def made(some: Layout, part: slice) -> list[Tensor]:
            given = left[part], residuals[part], sparsity, direction, step, bucket
            return self.messages.make(some, *given, sources[part])

        several = self.elements_of(pieces) >= self.messages.coder.several_calls_from
        if several and len(pieces) > 1 and not wanted:
            return self._one_by_one(pieces, made)
        with self.meter.stage("encode"):
            coded = [i for i, (piece, _) in enumerate(both) if piece.coded]
            before = _square([both[i][1] for i in coded]) if wanted else 0.0
            messages = made(pieces, slice(None))
            if wanted:
                self.meter.add_norms(step, before, _square([left[i] for i in coded]))
            return messages

    def _one_by_one(
        self, pieces: Layout, make: Callable[[Layout, slice], list[Tensor]]
    ) -> Lazily:
        """Return messages that are made while those before them travel."""
        ends = list(accumulate(map(len, pieces)))
        first = (self.transport.rank + 1) % len(pieces)

        def made(rank: int, within: str | None = "exchange") -> Tensor:
            part = slice(ends[rank] - len(pieces[rank]), ends[rank])
            with self.meter.stage("encode", within):
                return make((pieces[rank],), part)[0]

        return Lazily(made, len(pieces), {first: made(first, None)})

    def all_gather(
        self,
        pieces: Layout,
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        step: int,
        bucket: int,
        sources: Sequence[Tensor | None] = (),
    ) -> list[Tensor]:
        """Pull: send what this rank owns to everybody, return what everybody sent.

        Every rank, the owner too, gets the same bytes, so replicas that ``apply`` them
        stay bit-identical.

        Args:
            pieces: by owner, in plan order.
            values: for each piece of this rank float32[piece]. Left holding, for coded
                pieces, what the frame does not carry.
            residuals: for each of them what earlier frames did not carry, or ``None``.
            step: see ``Exchange.all_reduce``.
            bucket: see ``Exchange.all_reduce``.
            sources: of each piece what ``values`` are to be, if they are not yet.

        Returns:
            By owner its message, uint8[*]: see ``Messages.unpack``.
        """
        owned = pieces[self.transport.rank]
        sparsity, direction = self.budget.pull_sparsity, self.meter.pull
        with self.meter.stage("encode"):
            (message,) = self.messages.make(
                [owned], values, residuals, sparsity, direction, step, bucket, sources
            )
        with self.meter.stage("exchange"):
            return self.transport.all_gather(message)

    def mean_of(self, piece: Piece) -> Tensor:
        """Return the buffer of the mean of a piece of this rank: float32[piece]."""
        return self.means[piece.name][piece.offset : piece.offset + piece.numel]

    def keep_residuals(
        self,
        pieces: Layout,
        pulled: Sequence[Sequence[Tensor]],
        left: Mapping[str, Tensor],
    ) -> None:
        """Make what a push has ``left`` the residual, where the pull is finite."""
        both = views_of(pieces, left)
        chunks = chain.from_iterable(pulled)
        self.residuals.keep_sent(
            [
                (piece, view, is_nan_frame(chunk))
                for (piece, view), chunk in zip(both, chunks, strict=True)
                if piece.coded
            ]
        )

    def apply(
        self,
        pieces: Sequence[Sequence[Piece]],
        pulled: Sequence[Sequence[Tensor]],
        into: Mapping[str, Tensor],
    ) -> None:
        """Add coded pieces to ``into``, float32[numel] by name; copy raw ones there."""
        self._write(pieces, pulled, into, self.messages.coder.add)

    def _write(
        self,
        pieces: Sequence[Sequence[Piece]],
        pulled: Sequence[Sequence[Tensor]],
        into: Mapping[str, Tensor],
        write: Callable[[Sums], None],
    ) -> None:
        sums: list[tuple[Tensor, list[Tensor]]] = []
        chunks = chain.from_iterable(pulled)
        for (piece, view), chunk in zip(views_of(pieces, into), chunks, strict=True):
            if piece.coded:
                sums.append((view, [chunk]))
            else:
                view.copy_(floats(chunk))
        write(sums)

    @property
    def senders(self) -> int:
        """See ``Exchange.senders``: all."""
        return self.transport.world

    def native_form(self, names: Collection[str], elements: int) -> Wire | None:  # noqa: ARG002  # every bucket is coded
        """See ``Exchange.native_form``: none."""
        return None

    def keep_own_part(self) -> None:
        """See ``Exchange.keep_own_part``: a no-op on one level."""

    def close(self) -> None:
        """See ``Exchange.close``."""
        self.messages.coder.close()


def views_of(
    pieces: Sequence[Sequence[Piece]], values: Mapping[str, Tensor]
) -> list[tuple[Piece, Tensor]]:
    """Return every piece, owner after owner, with its part of ``values``."""
    return [
        (piece, values[piece.name][piece.start : piece.stop])
        for owned in pieces
        for piece in owned
    ]


def _square(values: Iterable[Tensor]) -> float:
    """Return the squared norm of some float32 tensors."""
    return sum(float(v.norm()) ** 2 for v in values)
