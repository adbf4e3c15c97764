"""Owners that hold the model: every rank keeps the masters of its share.

The paper's parameter servers, spread over the ranks. A push brings the mean of what the
ranks say about a share to its owner, the owner changes its masters, and the pull sends
everybody 3LC of ``master − replica``. What a pull does not carry is still in that
difference, so it needs no residual of its own, and replicas stay bit-identical.

Where ranks exchange without owners (``Tuning.topology``) the push brings every mean
to every rank, the replica is the master, and there is nothing to pull.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from lc3.engines.engine import Engine
from lc3.engines.exchange import gather
from lc3.format import is_nan_frame
from lc3.plan import Layout, Piece


class Owners:
    """The masters of this rank's share, and everybody's replica of the whole model.

    Args:
        engine: moves the pieces.
        replica: by parameter name float32[numel], the same bits on every rank; changed
            by every ``pull``, to the same bits on every rank.

    Attributes:
        masters: by parameter name float32[slice], of the slices that this rank owns.
        replica: see above.
        owned: the pieces whose masters this rank changes, in plan order.
    """

    owned: Sequence[Piece]

    def __init__(self, engine: Engine, replica: dict[str, Tensor]) -> None:
        self.engine = engine
        self.replica = replica
        self.pieces = engine.pieces(replica)
        engine.residuals.leave_owned()
        mine = engine.plan.slices_of(engine.plan.numel, engine.me)
        views = {s.name: replica[s.name][s.start : s.stop] for s in mine}
        self._take(views)

    def _take(self, views: Mapping[str, Tensor]) -> None:
        """Begin, where the masters are what the replica is."""
        self.owned = self.pieces[self.engine.transport.rank]
        self.masters = {name: view.clone() for name, view in views.items()}

    def owned_of(self, names: Collection[str]) -> Sequence[Piece]:
        """Return those of ``owned`` that are of some parameters."""
        if len(names) == len(self.replica):
            return self.owned
        return [piece for piece in self.owned if piece.name in names]

    def master(self, piece: Piece) -> Tensor:
        """Return the master of a piece that this rank owns: a view, float32[piece]."""
        return self.masters[piece.name][piece.offset : piece.offset + piece.numel]

    def mean(self, piece: Piece) -> Tensor:
        """Return what the last push brought of a piece: a view, float32[piece].

        NaN in all of a coded piece where some rank's values were not finite.
        """
        return self.engine.mean_of(piece)

    def push(self, values: Mapping[str, Tensor], step: int, bucket: int) -> None:
        """Bring the means of ``values`` over the ranks to their owners.

        Args:
            values: of some parameters, by name float32[numel]. Left for ``pull``, see
                ``Engine.reduce_scatter``; without owners they become the means.
            step: the same on every rank.
            bucket: its number in this step, the same on every rank.
        """
        self.engine.reduce_scatter(self.engine.pieces(values), values, step, bucket)

    def pull(self, values: Mapping[str, Tensor], step: int, bucket: int) -> None:
        """Bring every replica nearer to the masters, and keep the push's residuals.

        Args:
            values: what a push has left, of the parameters that are pulled. Where a
                mean was not finite the residuals stay what they were: the push never
                was.
            step: the same on every rank.
            bucket: the same on every rank, and not that of a push in this step unless
                there was only one.
        """
        every = len(values) == len(self.replica)
        pieces = self.pieces if every else self.engine.pieces(values)
        owned = pieces[self.engine.transport.rank]
        means = [self.mean(piece) for piece in owned]
        for piece, mean in zip(owned, means, strict=True):
            master = self.master(piece)
            if not piece.coded:
                mean.copy_(master)
            elif mean.isfinite().all():
                mean.copy_(master)
                mean -= self.replica[piece.name][piece.start : piece.stop]
        nothing = [None] * len(means)
        arrived = self.engine.all_gather(pieces, means, nothing, step, bucket)
        with self.engine.meter.stage("decode"):
            pulled = self.engine.messages.unpack(arrived, pieces, step, bucket)
            self.engine.keep_residuals(pieces, pulled, values)
            self._apply_finite(pieces, pulled)

    def push_here(self, values: Mapping[str, Tensor], step: int, bucket: int) -> None:  # noqa: ARG002  # nothing is sent
        """Take this rank's own values for the means: there is no other rank."""
        for piece in self.owned_of(values):
            self.mean(piece).copy_(values[piece.name][piece.start : piece.stop])

    def pull_here(self, values: Mapping[str, Tensor], step: int, bucket: int) -> None:  # noqa: ARG002  # nothing is sent
        """Make the replica equal to the masters: there is no other rank."""
        for piece in self.owned_of(values):
            part = self.replica[piece.name][piece.start : piece.stop]
            part.copy_(self.master(piece))

    def _apply_finite(self, pieces: Layout, pulled: list[list[Tensor]]) -> None:
        kept = [
            [
                (piece, chunk)
                for piece, chunk in zip(of_owner, chunks, strict=True)
                if not (piece.coded and is_nan_frame(chunk))
            ]
            for of_owner, chunks in zip(pieces, pulled, strict=True)
        ]
        self.engine.apply(
            [[piece for piece, _ in both] for both in kept],
            [[chunk for _, chunk in both] for both in kept],
            self.replica,
        )

    def rebase(self, base: Mapping[str, Tensor], *, keep_lead: bool) -> None:
        """Go on from another model, which all ranks have alike.

        Args:
            base: of some parameters or all, by name [numel]; a replica from now on.
            keep_lead: whether masters are as far ahead of it as they were.
        """
        for piece in self.owned_of(base):
            part = slice(piece.start, piece.stop)
            master = self.master(piece)
            ahead = master - self.replica[piece.name][part] if keep_lead else 0
            master.copy_(base[piece.name][part]).add_(ahead)
        self._set(base)

    def _set(self, base: Mapping[str, Tensor]) -> None:
        for name, flat in base.items():
            self.replica[name].copy_(flat)

    def decay_lead(self, factor: float, names: Collection[str]) -> None:
        """Multiply how far masters of some parameters are ahead of the replica."""
        for piece in self.owned_of(names):
            replica = self.replica[piece.name][piece.start : piece.stop]
            self.master(piece).sub_(replica).mul_(factor).add_(replica)

    def export(self) -> dict[str, Tensor]:
        """Return everybody's masters, by parameter name float32[numel]; collective."""
        return gather(self.engine, self.masters, list(self.replica))

    def take_lead(self, masters: Mapping[str, Tensor], share: float) -> None:
        """Let pushes bring on how far masters were ahead, if there are none any more.

        For a state of a run that had owners, its replica in place.

        Args:
            masters: masters of the slices that this rank owned, by name float32[slice].
            share: how far a mean of 1 moves a master.
        """

    def flush(self) -> None:
        """Make every replica equal to the masters, exactly; collective."""
        self._set(self.export())


class Everybody(Owners):
    """``Owners`` where there are none: every rank changes all of its replica alike.

    Attributes:
        masters: views of the replica.
    """

    def _take(self, views: Mapping[str, Tensor]) -> None:
        (self.owned,) = self.pieces
        self.masters = dict(views)
        self._means: Mapping[str, Tensor] = {}

    def master(self, piece: Piece) -> Tensor:
        """See ``Owners.master``."""
        return self.replica[piece.name][piece.start : piece.stop]

    def mean(self, piece: Piece) -> Tensor:
        """See ``Owners.mean``."""
        return self._means[piece.name][piece.start : piece.stop]

    def push(self, values: Mapping[str, Tensor], step: int, bucket: int) -> None:
        """See ``Owners.push``."""
        self.engine.push_and_pull(self.engine.pieces(values), values, step, bucket)
        self.take(values)

    def take(self, means: Mapping[str, Tensor]) -> None:
        """Let the means of a push be these, by name float32[numel]."""
        self._means = means

    def pull(self, values: Mapping[str, Tensor], step: int, bucket: int) -> None:
        """See ``Owners.pull``: there is nothing to pull."""

    def push_here(self, values: Mapping[str, Tensor], step: int, bucket: int) -> None:  # noqa: ARG002  # nothing is sent
        """See ``Owners.push_here``."""
        self._means = values

    def rebase(self, base: Mapping[str, Tensor], *, keep_lead: bool) -> None:  # noqa: ARG002  # nobody is ahead
        """See ``Owners.rebase``."""
        self._set(base)

    def decay_lead(self, factor: float, names: Collection[str]) -> None:
        """See ``Owners.decay_lead``: nobody is ahead."""

    def export(self) -> dict[str, Tensor]:
        """See ``Owners.export``."""
        return {name: flat.clone() for name, flat in self.replica.items()}

    def take_lead(self, masters: Mapping[str, Tensor], share: float) -> None:
        """See ``Owners.take_lead``."""
        plan, residuals = self.engine.plan, self.engine.residuals
        for slice_ in plan.slices_of(plan.coded, self.engine.me):
            replica = self.masters[slice_.name]
            owed = replica - masters[slice_.name].view(replica.shape).to(replica.device)
            sent = residuals.sent[slice_.name][slice_.start : slice_.stop]
            sent.add_(owed, alpha=self.engine.senders / share)

    def flush(self) -> None:
        """See ``Owners.flush``: they are."""


def owners_of(engine: Engine, replica: dict[str, Tensor]) -> Owners:
    """Return the masters of an engine's topology; see ``Owners``."""
    return (Everybody if engine.direct else Owners)(engine, replica)
