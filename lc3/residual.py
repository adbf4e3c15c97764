"""The error-feedback buffers, by parameter name: what was not sent yet."""

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
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        coded = [name for name in plan.numel if name in plan.coded]
        slices = list(plan.slices_of(plan.coded, rank))
        sent = arena([plan.numel[name] for name in coded], device)
        owned = arena([slice_.numel for slice_ in slices], device)
        self.sent = dict(zip(coded, sent, strict=True))
        self.owned = {s.name: room for s, room in zip(slices, owned, strict=True)}

    def of_sent(self, piece: Piece) -> Tensor:
        """Return the worker-side residual of a coded piece: a view, float32[piece]."""
        return self.sent[piece.name][piece.start : piece.stop]

    def of_owned(self, piece: Piece) -> Tensor:
        """Return the owner-side residual of a coded piece that this rank owns."""
        return self.owned[piece.name][piece.offset : piece.offset + piece.numel]

    def buffers(self) -> list[Tensor]:
        """Return all of them, both sides."""
        return [*self.sent.values(), *self.owned.values()]


def arena(sizes: Sequence[int], device: torch.device) -> Sequence[Tensor]:
    """Return zeros, float32[size] each, that lie in one block of memory.

    Kernels that work on many of them at once then need one address.
    """
    return torch.split(torch.zeros(sum(sizes), device=device), list(sizes))


def arena_like(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros in one block of memory: by name float32[numel], where each is."""
    device = next(iter(named.values())).device
    rooms = arena([tensor.numel() for tensor in named.values()], device)
    return dict(zip(named, rooms, strict=True))
