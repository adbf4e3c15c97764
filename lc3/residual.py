"""The error-feedback buffers, by parameter name: what was not sent yet.

A gradient that no optimizer applies must leave no residual. So an exchange may write
what its frames lack to a second copy (``hold``), and ``settle`` says later how much of
that exchange was applied.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from lc3.plan import Piece, Plan

Kept = tuple[Piece, Tensor, bool]
Coded = tuple[list[Tensor | None], list[Tensor], list[Tensor | None]]
Parts = tuple[list[Tensor | None], list[Tensor | None]]


class Residuals:
    """What this rank still owes, on both sides of the exchange.

    Attributes:
        sent: worker side: for every coded parameter float32[numel], what its pushes did
            not carry yet.
        owned: owner side: for every coded parameter of which this rank owns a slice,
            float32[slice], what its pulls did not carry yet.
        open: names of parameters that were exchanged and are not settled yet.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        coded = [name for name in plan.numel if name in plan.coded]
        slices = list(plan.slices_of(plan.coded, rank))
        sent = arena([plan.numel[name] for name in coded], device)
        owned = arena([slice_.numel for slice_ in slices], device)
        self.sent = dict(zip(coded, sent, strict=True))
        self.owned = {s.name: buffer for s, buffer in zip(slices, owned, strict=True)}
        self.open: set[str] = set()
        self._next: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def hold(self) -> None:
        """Write to a second copy from now on; it takes as much memory once more."""
        if self._next is None and self.sent:
            owned = arena_like(self.owned) if self.owned else {}
            self._next = arena_like(self.sent), owned

    def leave_owned(self) -> None:
        """Have no owner side: masters that are ahead of their replica are one."""
        self.owned = {}

    def of_sent(self, pieces: Iterable[Piece]) -> Parts:
        """Return worker-side residuals, and where an exchange leaves new ones.

        Args:
            pieces: coded ones, and raw ones that have neither.

        Returns:
            For each piece a view, float32[piece], or ``None``; and for each a view of
            the second copy, or ``None``: where its values were, since nothing is held.
        """
        places = [(p, p.start) if p.coded else None for p in pieces]
        return self._parts(0, self.sent, places)

    def of_owned(self, pieces: Iterable[Piece]) -> Parts:
        """Do what ``of_sent`` does on the owner side, for pieces of this rank's."""
        places = [(p, p.offset) if p.coded else None for p in pieces]
        return self._parts(1, self.owned, places)

    def to_send(self, both: Sequence[tuple[Piece, Tensor]]) -> Coded:
        """Return what coding reads and writes of some pieces that are pushed.

        Args:
            both: pieces, coded and raw ones, and their values, float32[piece].

        Returns:
            For each its residual, where what its frame lacks is left, and what to read
            if that is not there: a view, float32[piece], or ``None``.
        """
        return _coded(both, *self.of_sent([piece for piece, _ in both]))

    def to_pull(self, pieces: Iterable[tuple[Piece, Tensor]]) -> Coded:
        """Do what ``to_send`` does, for pieces of this rank's that are pulled."""
        both = list(pieces)
        return _coded(both, *self.of_owned([piece for piece, _ in both]))

    def _parts(
        self,
        side: int,
        now: Mapping[str, Tensor],
        places: Sequence[tuple[Piece, int] | None],
    ) -> Parts:
        parts: Parts = [], []
        copies = (now,) if self._next is None else (now, self._next[side])
        for found, copy in zip_longest(parts, copies):
            for place in places:
                if place is None or copy is None:
                    found.append(None)
                    continue
                piece, start = place
                all_of_it = copy[piece.name]
                whole = all_of_it.numel() == piece.numel
                found.append(
                    all_of_it if whole else all_of_it[start : start + piece.numel]
                )
        return parts

    def keep_sent(self, kept: Sequence[Kept]) -> None:
        """Make what an exchange has left the worker side's residuals.

        Args:
            kept: a coded piece; float32[piece], what is left of it, which is read if
                nothing is held; whether its exchange never was, so that the old
                residual stays.
        """
        self._keep(kept, self.of_sent)

    def keep_owned(self, kept: Sequence[Kept]) -> None:
        """Do what ``keep_sent`` does, on the owner side."""
        self._keep(kept, self.of_owned)

    def _keep(self, kept: Sequence[Kept], of: Callable[[list[Piece]], Parts]) -> None:
        held = self._next is not None
        for piece, left, lost in kept:
            if held:
                self.open.add(piece.name)
            if lost == held:
                ((old,), (room,)) = of([piece])
                assert old is not None  # it is coded
                if room is None:
                    old.copy_(left)
                else:
                    room.copy_(old)

    def clear_sent(self, pieces: Sequence[Piece]) -> None:
        """Let an exchange leave nothing of some coded pieces on the worker side."""
        self._clear(pieces, *self.of_sent(pieces))

    def clear_owned(self, pieces: Sequence[Piece]) -> None:
        """Let an exchange leave nothing of some coded pieces on the owner side."""
        self._clear(pieces, *self.of_owned(pieces))

    def _clear(
        self,
        pieces: Sequence[Piece],
        olds: Sequence[Tensor | None],
        rooms: Sequence[Tensor | None],
    ) -> None:
        for old, room in zip(olds, rooms, strict=True):
            now = old if room is None else room
            assert now is not None  # it is coded
            now.zero_()
        if self._next is not None:
            self.open.update([piece.name for piece in pieces])

    def settle(self, applied: Mapping[str, float]) -> None:
        """Say how much of the last exchange of some parameters was applied.

        Args:
            applied: by parameter name: 1: all of it; 0: the exchange never was; between
                them, as after clipping: so much of what the exchange changed.
        """
        if self._next is None:
            return
        for name in self.open.intersection(applied):
            fraction = applied[name]
            for now, new in zip((self.sent, self.owned), self._next, strict=True):
                if name not in now:
                    continue
                if fraction == 1:
                    now[name], new[name] = new[name], now[name]
                elif fraction:
                    now[name].lerp_(new[name], fraction)
        self.open.difference_update(applied)

    def settle_all(self, fraction: float) -> None:
        """Settle every parameter that is open alike; see ``settle``."""
        self.settle(dict.fromkeys(self.open, fraction))

    def buffers(self) -> list[Tensor]:
        """Return all of them, both sides."""
        return [*self.sent.values(), *self.owned.values()]


def _coded(
    both: Sequence[tuple[Piece, Tensor]],
    residuals: list[Tensor | None],
    rooms: Sequence[Tensor | None],
) -> Coded:
    left: list[Tensor] = []
    sources: list[Tensor | None] = []
    for (_, values), room in zip(both, rooms, strict=True):
        left.append(values if room is None else room)
        sources.append(None if room is None else values)
    return residuals, left, sources


def arena(sizes: Sequence[int], device: torch.device) -> Sequence[Tensor]:
    """Return zeros, float32[size] each, that lie in one block of memory.

    Kernels that work on many of them at once then need one address.
    """
    return torch.split(
        torch.zeros(sum(sizes), device=device, dtype=torch.float32), list(sizes)
    )


def arena_like(
    named: Mapping[str, Tensor], device: str | None = None
) -> dict[str, Tensor]:
    """Return zeros in one block of memory: by name float32[numel].

    Args:
        named: the tensors, all on one device.
        device: another one, whose memory is pinned for theirs. Default: theirs.
    """
    here = next(iter(named.values())).device
    sizes = [tensor.numel() for tensor in named.values()]
    buffers = arena(sizes, here if device is None else torch.device(device))
    if device is not None and here.type == "cuda":
        buffers = torch.split(
            torch.zeros(sum(sizes), dtype=torch.float32, pin_memory=True), sizes
        )
    return dict(zip(named, buffers, strict=True))
