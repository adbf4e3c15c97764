"""The error-feedback buffers, by parameter name: what was not sent yet.

A gradient that no optimizer applies must leave no residual. So an exchange may write
what its frames lack to a second copy (``hold``), and ``settle`` says later how much of
that exchange was applied.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lc3.plan import Piece, Plan


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

    def of_sent(self, piece: Piece) -> Tensor:
        """Return the worker-side residual of a coded piece: a view, float32[piece]."""
        return self.sent[piece.name][piece.start : piece.stop]

    def of_owned(self, piece: Piece) -> Tensor:
        """Return the owner-side residual of a coded piece that this rank owns."""
        return self.owned[piece.name][piece.offset : piece.offset + piece.numel]

    def keep_sent(self, piece: Piece, left: Tensor | None) -> None:
        """Make ``left``, float32[piece], the worker side's; ``None``: it stays."""
        self._keep(0, self.of_sent(piece), left, piece.name, piece.start)

    def keep_owned(self, piece: Piece, left: Tensor | None) -> None:
        """Make ``left``, float32[piece], the owner side's; ``None``: it stays."""
        self._keep(1, self.of_owned(piece), left, piece.name, piece.offset)

    def _keep(
        self, side: int, old: Tensor, left: Tensor | None, name: str, at: int
    ) -> None:
        new = old
        if self._next is not None:
            new = self._next[side][name][at : at + old.numel()]
            self.open.add(name)
        if left is not None:
            new.copy_(left)
        elif new is not old:
            new.copy_(old)

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
