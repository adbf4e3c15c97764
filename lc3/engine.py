"""The one path a gradient takes, readable top to bottom.

``all_reduce`` is ``reduce_scatter`` (push: every rank sends each owner its pieces) and
``all_gather`` (pull: every owner sends its means to everybody). Both directions are
coded with error feedback. Without owners it is ``broadcast_all`` instead: every rank
sends all pieces to all others, and there is nothing to pull. A residual changes only
when everything has arrived and is finite, so a step that fails, or overflows on any
rank, leaves all residuals as they were.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from lc3.auto import Auto, Wire
from lc3.budget import Budget
from lc3.channel import Channel, floats, sum_of
from lc3.coder import Coder
from lc3.config import Settings
from lc3.format import BUDGET_BUCKET, HEADER_BYTES, Tag, is_nan_frame, scale_of
from lc3.message import pack, unpack
from lc3.meter import Direction, Meter
from lc3.plan import Layout, Piece, Plan
from lc3.residual import Residuals, arena
from lc3.transport import Transport

T = TypeVar("T")
_LARGEST_FLOAT = torch.finfo(torch.float32).max
NO_HALF_GRADS: Mapping[str, Tensor] = MappingProxyType({})  # of float32 gradients


class Engine:
    """Averages gradients over the ranks of an exchange, compressed both ways.

    Not thread-safe, and every rank must make the same calls in the same order: a hook
    calls it from one worker lane.

    Args:
        plan: the same on every rank.
        config: the same on every rank.
        transport: moves the messages.
        coder: for the device of the gradients.
        meter: is written to.
        auto: lets buckets travel uncoded; ``None``: none does.
        owners: the plan's number of each rank of the exchange, if they are some of its
            owners only. Default: all, in order.
        residuals: memory that is this rank's already.

    Attributes:
        direct: whether ranks average what they send each other, without owners.
        budget: what is sent of each value; moved, if the configuration has a budget.
        channel: for what is no gradient: means, bytes, and a word of failure.
        owing: names of parameters whose residuals may hold something.
        means: by parameter name float32[slice], of the slices that this rank owns: what
            the last push brought. The pull uses the memory again. Nothing, if direct.
    """

    def __init__(
        self,
        plan: Plan,
        config: Settings,
        transport: Transport,
        coder: Coder,
        meter: Meter,
        auto: Auto | None = None,
        owners: Sequence[int] | None = None,
        residuals: Residuals | None = None,
    ) -> None:
        self.owners = range(transport.world) if owners is None else owners
        self.direct = config.topology == "direct"
        me = self.owners[transport.rank]
        self.auto = auto
        self.owing: set[str] = set()
        self.plan = plan
        self.config = config
        self.transport = transport
        self.coder = coder
        self.meter = meter
        self._me = me
        self.residuals = residuals or Residuals(plan, me, coder.device)
        slices = [] if self.direct else list(plan.slices_of(plan.numel, me))
        buffers = arena([slice_.numel for slice_ in slices], coder.device)
        self.means = {s.name: buffer for s, buffer in zip(slices, buffers, strict=True)}
        self.budget = Budget(config)
        self.channel = Channel(transport, meter, plan.fingerprint, self.budget)

    def all_reduce(
        self,
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """Replace every gradient by its 3LC mean over ranks, the same bits everywhere.

        Args:
            grads: by parameter name, float32[numel], contiguous; overwritten. The same
                names on every rank.
            step: synchronised backward passes before this one, the same on every rank.
            bucket: its number in this step, the same on every rank.
            half_grads: by the same names float16 or bfloat16[numel], contiguous: the
                gradients, if those of ``grads`` are only the output.

        Raises:
            FormatError, PlanMismatch: what arrived does not fit; every other rank is
                told.
            PeerError: another rank failed and said so.
            ExchangeError: the transport failed.
        """
        pieces = self.pieces(grads)
        self.meter.buckets += 1
        if self.transport.world == 1 or not any(pieces):
            widen(grads, half_grads)
            return
        extras = self.plan.extras
        elements = sum(
            [
                piece.numel
                for owned in pieces
                for piece in owned
                if piece.name not in extras
            ]
        )
        with self.channel.exchanging(elements, step, bucket):
            if self.auto is None:
                self.push_and_pull(pieces, grads, step, bucket, half_grads)
            else:
                widen(grads, half_grads)
                self._first_to_arrive(self.auto, pieces, grads, step, bucket)

    def _first_to_arrive(
        self,
        auto: Auto,
        pieces: Sequence[Sequence[Piece]],
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
    ) -> None:
        names, elements = tuple(grads), sum(g.numel() for g in grads.values())
        wire = auto.wire(names, elements)
        if wire != "3lc":
            self._uncoded(pieces, grads, wire)
            return
        start = time.perf_counter()
        self.push_and_pull(pieces, grads, step, bucket)
        self.owing.update(name for name in names if name in self.plan.coded)
        median = auto.took(names, time.perf_counter() - start)
        if median is not None:
            mine = torch.tensor([median], dtype=torch.float64)
            shared = self.channel.all_gather_bytes(mine, step, bucket)
            medians = [one.clone().view(torch.float64) for one in shared]
            auto.compare(names, elements, medians)

    def _uncoded(
        self,
        pieces: Sequence[Sequence[Piece]],
        grads: Mapping[str, Tensor],
        wire: Wire,
    ) -> None:
        """Average by the transport's all-reduce; what 3LC still owed comes along."""
        owing = [name for name in grads if name in self.owing]
        for name in owing:
            grads[name].add_(self.residuals.sent[name])
        world = self.transport.world
        owned = [p for p in self._owned(pieces) if p.name in owing]
        for piece in owned:
            values = grads[piece.name][piece.start : piece.stop]
            values.add_(self.residuals.of_owned(piece), alpha=world)
        flat = torch.cat([grad.reshape(-1) for grad in grads.values()])
        if wire == "bfloat16":
            flat = (flat / world).bfloat16()
            with self.meter.stage("exchange"):
                self.transport.all_reduce(flat)
        else:
            with self.meter.stage("exchange"):
                self.transport.all_reduce(flat)
            flat /= world
        parts = torch.split(flat, [grad.numel() for grad in grads.values()])
        for grad, part in zip(grads.values(), parts, strict=True):
            grad.copy_(part)
        for piece in chain.from_iterable(self.pieces(owing)):
            if grads[piece.name].isfinite().all():
                self.residuals.keep_sent(piece, torch.zeros((), dtype=torch.float32))
                self.owing.discard(piece.name)
        for piece in owned:
            if piece.name not in self.owing:
                self.residuals.keep_owned(piece, torch.zeros((), dtype=torch.float32))

    def push_and_pull(
        self,
        pieces: Sequence[Sequence[Piece]],
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """Do what ``all_reduce`` does, at any world size; see there."""
        if self.direct:
            self.broadcast_all(pieces, grads, step, bucket, half_grads)
            return
        owned = pieces[self.transport.rank]
        means = self.reduce_scatter(pieces, grads, step, bucket, half_grads)
        residuals = [self.residuals.of_owned(p) if p.coded else None for p in owned]
        pulled = self.all_gather(pieces, means, residuals, step, bucket)
        with self.meter.stage("decode"):
            self.keep_residuals(pieces, pulled, grads)
            for piece, values in self._views(pieces, grads):
                if piece.coded:
                    values.zero_()
            self.apply(pieces, pulled, grads)
            mine = pulled[self.transport.rank]
            for piece, mean, chunk in zip(owned, means, mine, strict=True):
                if piece.coded:
                    left = None if is_nan_frame(chunk) else mean
                    self.residuals.keep_owned(piece, left)

    def pieces(self, names: Iterable[str]) -> Layout:
        """Return the pieces of some parameters by owner, in plan order.

        One list of all of them, if there are no owners.
        """
        return self.plan.layout(names, self.owners, merged=self.direct)

    def _owned(self, pieces: Sequence[Sequence[Piece]]) -> Sequence[Piece]:
        """Return the pieces that this rank is the owner of; if direct, of none."""
        return () if self.direct else pieces[self.transport.rank]

    def native_form(self, names: Collection[str], elements: int) -> Wire | None:
        """Return the form of a bucket that DDP's own all-reduce can average as well.

        ``None``: it has to be coded, or residuals have to come along. The same on every
        rank.
        """
        if self.auto is None:
            return None
        wire = self.auto.wire(tuple(names), elements)
        return None if wire == "3lc" or not self.owing.isdisjoint(names) else wire

    def reduce_scatter(
        self,
        pieces: Sequence[Sequence[Piece]],
        values: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> list[Tensor]:
        """Push: send every owner its pieces, return the means of this rank's own.

        Args:
            pieces: by owner, in plan order.
            values: by parameter name, float32[numel]. Left holding, for coded pieces,
                values plus residual less what the frames carry: the residual to be,
                see ``keep_residuals``.
            step: see ``all_reduce``.
            bucket: see ``all_reduce``.
            half_grads: see ``all_reduce``.

        Returns:
            For each piece of this rank a view, float32[piece], of memory that the next
            exchange uses again. NaN where some rank's values were not finite.
        """
        messages = self._pushes(pieces, values, step, bucket, half_grads)
        with self.meter.stage("exchange"):
            arrived = self.transport.all_to_all(messages)
        with self.meter.stage("decode"):
            owned = pieces[self.transport.rank]
            by_sender = self._unpack(arrived, [owned] * len(arrived), step, bucket)
            means = [self.mean_of(piece).zero_() for piece in owned]
            said = list(zip(*by_sender, strict=True))
            both = list(zip(owned, means, said, strict=True))
            self.coder.add([(mean, frames) for p, mean, frames in both if p.coded])
            for piece, mean, chunks_of in both:
                if not piece.coded:
                    mean.copy_(sum_of(chunks_of))
            self._divide(means)
        return means

    def broadcast_all(
        self,
        pieces: Sequence[Sequence[Piece]],
        values: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """Replace values by their 3LC means, from what every rank sends to all others.

        Every rank adds up the same frames in the same order, so the means are the same
        bits everywhere, and nobody has to send them.

        Args:
            pieces: one list, in an order that all ranks have alike.
            values: by parameter name, float32[numel]; overwritten. NaN in all of a
                coded piece where some rank's values were not finite.
            step: see ``all_reduce``.
            bucket: see ``all_reduce``.
            half_grads: see ``all_reduce``.
        """
        (everything,) = pieces
        (message,) = self._pushes(pieces, values, step, bucket, half_grads)
        with self.meter.stage("exchange"):
            arrived = self.transport.all_gather(message)
        with self.meter.stage("decode"):
            by_sender = self._unpack(arrived, [everything] * len(arrived), step, bucket)
            sums: list[tuple[Tensor, Sequence[Tensor]]] = []
            said = zip(*by_sender, strict=True)
            for (piece, view), chunks in zip(
                self._views(pieces, values), said, strict=True
            ):
                if not piece.coded:
                    view.copy_(sum_of(chunks))
                elif sum(map(scale_of, chunks)) <= _LARGEST_FLOAT:
                    self.residuals.keep_sent(piece, view)
                    sums.append((view.zero_(), chunks))
                else:
                    self.residuals.keep_sent(piece, None)
                    view.fill_(torch.nan)
            self.coder.add(sums)
            self._divide(values.values())

    def _divide(self, sums: Iterable[Tensor]) -> None:
        """Make sums over the ranks means, in place."""
        # On the device: CUDA multiplies by 1/W when W is a number on the host.
        world = torch.tensor(
            float(self.transport.world), device=self.coder.device, dtype=torch.float32
        )
        for total in sums:
            total /= world

    def _pushes(
        self,
        pieces: Sequence[Sequence[Piece]],
        values: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Return a message for each list of pieces; see ``reduce_scatter``."""
        if bucket == 0:
            self._keep_budget(step)
        with self.meter.stage("encode"):
            everything = [piece for owned in pieces for piece in owned]
            views = [view for _, view in self._views(pieces, values)]
            residuals = [
                self.residuals.of_sent(p) if p.coded else None for p in everything
            ]
            sparsity, direction = self.budget.sparsity, self.meter.push
            coded = [v for v, p in zip(views, everything, strict=True) if p.coded]
            wanted = self.meter.norms_due(step)
            if wanted:
                widen(values, half_grads)
                half_grads = NO_HALF_GRADS
            sources = [view for _, view in self._views(pieces, half_grads)]
            before = _square(coded) if wanted else 0.0
            chunks = self._encode(
                everything, views, residuals, sparsity, direction, sources
            )
            if wanted:
                self.meter.add_norms(step, before, _square(coded))
            return self._pack(pieces, chunks, direction, step, bucket)

    def all_gather(
        self,
        pieces: Sequence[Sequence[Piece]],
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        step: int,
        bucket: int,
    ) -> list[list[Tensor]]:
        """Pull: send what this rank owns to everybody, return what everybody sent.

        Every rank, the owner too, gets the same bytes, so replicas that ``apply`` them
        stay bit-identical.

        Args:
            pieces: by owner, in plan order.
            values: for each piece of this rank float32[piece]. Left holding, for coded
                pieces, what the frame does not carry.
            residuals: for each of them what earlier frames did not carry, or ``None``.
            step: see ``all_reduce``.
            bucket: see ``all_reduce``.

        Returns:
            By owner, for each of its pieces the bytes, uint8[*].
        """
        sparsity = self.budget.pull_sparsity
        owned = pieces[self.transport.rank]
        with self.meter.stage("encode"):
            chunks = self._encode(owned, values, residuals, sparsity, self.meter.pull)
            (message,) = self._pack([owned], chunks, self.meter.pull, step, bucket)
        with self.meter.stage("exchange"):
            arrived = self.transport.all_gather(message)
        with self.meter.stage("decode"):
            return self._unpack(arrived, pieces, step, bucket)

    def _keep_budget(self, step: int) -> None:
        """At some steps share what ranks have sent, and steer by it."""
        if self.budget.due():
            mine = torch.tensor([self.budget.sent_bytes], dtype=torch.float64)
            everybody = self.channel.all_gather_bytes(mine, step, BUDGET_BUCKET)
            shared = [float(data.clone().view(torch.float64)) for data in everybody]
            self.budget.look(sum(shared) / len(shared))

    def mean_of(self, piece: Piece) -> Tensor:
        """Return the buffer of the mean of a piece of this rank: float32[piece]."""
        return self.means[piece.name][piece.offset : piece.offset + piece.numel]

    def keep_residuals(
        self,
        pieces: Sequence[Sequence[Piece]],
        pulled: Sequence[Sequence[Tensor]],
        left: Mapping[str, Tensor],
    ) -> None:
        """Make what a push has ``left`` the residual, where the pull is finite."""
        chunks = chain.from_iterable(pulled)
        for (piece, view), chunk in zip(self._views(pieces, left), chunks, strict=True):
            if piece.coded:
                lost = is_nan_frame(chunk)
                self.residuals.keep_sent(piece, None if lost else view)

    def apply(
        self,
        pieces: Sequence[Sequence[Piece]],
        pulled: Sequence[Sequence[Tensor]],
        into: Mapping[str, Tensor],
    ) -> None:
        """Add coded pieces to ``into``, float32[numel] by name; copy raw ones there."""
        sums: list[tuple[Tensor, list[Tensor]]] = []
        chunks = chain.from_iterable(pulled)
        for (piece, view), chunk in zip(self._views(pieces, into), chunks, strict=True):
            if piece.coded:
                sums.append((view, [chunk]))
            else:
                view.copy_(floats(chunk))
        self.coder.add(sums)

    def gather(
        self, shares: Mapping[str, Tensor], names: Collection[str]
    ) -> dict[str, Tensor]:
        """Return whole parameters from every rank's shares of them; collective.

        Args:
            shares: by parameter name float32[slice], of the slices that this rank owns.
            names: of the parameters, the same on every rank.

        Returns:
            By name float32[numel], the same on every rank.
        """
        mine = self.plan.slices_of(names, self.transport.rank)
        parts = [shares[slice_.name].reshape(-1) for slice_ in mine]
        device = self.coder.device
        message = torch.cat(
            [torch.empty(0, device=device, dtype=torch.float32), *parts]
        )
        whole = {
            name: torch.zeros(self.plan.numel[name], device=device, dtype=torch.float32)
            for name in names
        }
        step, bucket = self.channel.aside()
        with self.channel.exchanging(0, step, bucket):
            everybody = self.channel.all_gather_bytes(message, step, bucket)
        for owner, data in enumerate(everybody):
            slices = list(self.plan.slices_of(names, owner))
            values = data.clone().view(torch.float32)
            split = torch.split(values, [slice_.numel for slice_ in slices])
            for slice_, part in zip(slices, split, strict=False):
                whole[slice_.name][slice_.start : slice_.stop] = part
        return whole

    @property
    def senders(self) -> int:
        """How many ranks' worker-side residuals there are of each element."""
        return self.transport.world

    def keep_own_part(self) -> None:
        """Forget worker-side residuals of what this rank does not push: nothing."""

    def push_what_owners_owe(self) -> None:
        """Let this rank's pushes carry what its pulls owed, if there are none any more.

        For a state of a run that had owners: residuals of means, times the senders that
        a push is averaged over.
        """
        if self.direct:
            for slice_ in self.plan.slices_of(self.residuals.owned, self._me):
                owed = self.residuals.owned[slice_.name]
                sent = self.residuals.sent[slice_.name][slice_.start : slice_.stop]
                sent.add_(owed, alpha=self.senders)
                owed.zero_()

    def pending(self) -> dict[str, Tensor]:
        """Return what gradients still owe the parameters, as a mean; collective.

        By coded parameter float32[numel], the same on every rank: the mean over ranks
        of what their pushes did not carry yet, plus what pulls did not.
        """
        names = [name for name in self.plan.numel if name in self.plan.coded]
        owed = self.gather(self.residuals.owned, names)
        if not names:
            return owed
        sizes = [self.plan.numel[name] for name in names]
        step, bucket = self.channel.aside()
        with self.channel.exchanging(0, step, bucket):
            sent = torch.cat([self.residuals.sent[name] for name in names])
            total = self.channel.mean(sent, step, bucket).mul_(self.transport.world)
        for name, part in zip(
            names, total.div_(self.senders).split(sizes), strict=True
        ):
            owed[name] += part
        return owed

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        self.coder.close()

    @staticmethod
    def _views(
        pieces: Sequence[Sequence[Piece]], values: Mapping[str, Tensor]
    ) -> Iterator[tuple[Piece, Tensor]]:
        """Yield every piece, owner after owner, with its part of ``values``, if any."""
        for owned in pieces if values else ():
            for piece in owned:
                yield piece, values[piece.name][piece.start : piece.stop]

    def _encode(
        self,
        pieces: Sequence[Piece],
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        sparsity: float,
        direction: Direction,
        sources: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Return the bytes of each piece, uint8[*], until the next call.

        Coded ``values`` become the residuals to be. A piece whose values are all zero
        (a parameter unused on this rank, or on every rank) says nothing and keeps its
        residual: DDP may throw the result away.
        """
        coded = [i for i, piece in enumerate(pieces) if piece.coded]
        frames = self.coder.encode(
            [values[i] for i in coded],
            [residuals[i] for i in coded],
            sparsity,
            self.budget.density,
            [sources[i] for i in coded] if sources else (),
        )
        raw = [i for i, piece in enumerate(pieces) if not piece.coded]
        for i in raw if sources else ():
            values[i].copy_(sources[i])
        chunks = dict(
            zip(raw, self.coder.to_host([values[i] for i in raw]), strict=True)
        )
        for i, (frame, nonzero) in zip(coded, frames, strict=True):
            chunks[i] = frame
            piece = pieces[i]
            direction.add_frame(piece.name, piece.numel, frame.numel(), nonzero)
        for i in raw:
            direction.raw_bytes[pieces[i].name] += chunks[i].numel()
        return [chunks[i] for i in range(len(pieces))]

    def _pack(
        self,
        pieces: Sequence[Sequence[Piece]],
        chunks: Iterable[Tensor],
        direction: Direction,
        step: int,
        bucket: int,
    ) -> list[Tensor]:
        """Return a message for each list of pieces, whose bytes are in a row."""
        tag = Tag(self.transport.rank, step, bucket, self.plan.fingerprint)
        left = iter(chunks)
        parts = [[next(left) for _ in some] for some in pieces]
        entropy = self.config.entropy
        packed = self._map(
            lambda index: pack(pieces[index], parts[index], tag, entropy), pieces
        )
        for one in packed:
            direction.add_message(
                HEADER_BYTES, one.raw_saved_bytes, one.coded_saved_bytes
            )
        return [one.message for one in packed]

    def _unpack(
        self,
        arrived: Sequence[Tensor],
        pieces: Sequence[Sequence[Piece]],
        step: int,
        bucket: int,
    ) -> list[list[Tensor]]:
        """Return by sender the checked bytes of each of its pieces; see ``unpack``."""
        return self._map(
            lambda sender: unpack(
                arrived[sender],
                Tag(sender, step, bucket, self.plan.fingerprint),
                pieces[sender],
                self.coder.host,
            ),
            pieces,
        )

    def _map(
        self, work: Callable[[int], T], pieces: Sequence[Sequence[Piece]]
    ) -> list[T]:
        """Return what is to be made of each list of pieces, on the coding threads."""
        if self.coder.threads == 1:
            return [work(index) for index in range(len(pieces))]
        weights = [sum([piece.numel for piece in some]) for some in pieces]
        return self.coder.map(work, weights)


def widen(into: Mapping[str, Tensor], half_grads: Mapping[str, Tensor]) -> None:
    """Write half-precision gradients as float32."""
    for name, half in half_grads.items():
        into[name].copy_(half)


def _square(values: Iterable[Tensor]) -> float:
    """Return the squared norm of some float32 tensors."""
    return sum(float(v.norm()) ** 2 for v in values)
