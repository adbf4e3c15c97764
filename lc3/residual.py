"""The error-feedback buffers, by parameter name: what was not sent yet."""

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
        self.sent = {
            name: torch.zeros(plan.numel[name], device=device)
            for name in plan.numel
            if name in plan.coded
        }
        self.owned = {
            slice_.name: torch.zeros(slice_.numel, device=device)
            for slice_ in plan.slices_of(plan.coded, rank)
        }

    def of_sent(self, piece: Piece) -> Tensor:
        """Return the worker-side residual of a coded piece: a view, float32[piece]."""
        return self.sent[piece.name][piece.start : piece.stop]

    def of_owned(self, piece: Piece) -> Tensor:
        """Return the owner-side residual of a coded piece that this rank owns."""
        return self.owned[piece.name][piece.offset : piece.offset + piece.numel]

    def buffers(self) -> list[Tensor]:
        """Return all of them, both sides."""
        return [*self.sent.values(), *self.owned.values()]
