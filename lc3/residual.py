"""The error-feedback buffers, by parameter name: what was not sent yet."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lc3.errors import StateError
from lc3.plan import Piece, Plan

STATE_FORMAT = 1


class Residuals:
    """What this rank still owes, on both sides of the exchange.

    Attributes:
        sent: worker side: for every coded parameter float32[numel], what its pushes did
            not carry yet.
        owned: owner side: for every coded parameter of which this rank owns a slice,
            float32[slice], what its pulls did not carry yet.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        self._plan = plan
        self._rank = rank
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

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all buffers: tensors, strings and integers only.

        They belong to this rank: every rank saves its own.
        """
        return {
            "format": STATE_FORMAT,
            "rank": self._rank,
            "world": self._plan.world,
            "plan": self._plan.fingerprint,
            "sent": {name: buffer.clone() for name, buffer in self.sent.items()},
            "owned": {name: buffer.clone() for name, buffer in self.owned.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a ``state_dict`` of the same rank, world and plan into the buffers.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        expected = {
            "format": STATE_FORMAT,
            "rank": self._rank,
            "world": self._plan.world,
            "plan": self._plan.fingerprint,
        }
        if set(state) != {*expected, "sent", "owned"}:
            raise StateError(
                f"residuals have the keys {sorted(state)}, expected "
                f"{sorted({*expected, 'sent', 'owned'})}; is this an lc3 state_dict?"
            )
        for key, value in expected.items():
            if state[key] != value:
                raise StateError(
                    f"residuals were saved with {key} {state[key]!r}, this run has "
                    f"{value!r}; load each rank's own file into the same model, Config "
                    "and number of ranks"
                )
        for side, buffers in (("sent", self.sent), ("owned", self.owned)):
            _check_buffers(side, buffers, state[side])
        for side, buffers in (("sent", self.sent), ("owned", self.owned)):
            for name, buffer in buffers.items():
                buffer.copy_(state[side][name])


def _check_buffers(
    side: str, buffers: Mapping[str, Tensor], loaded: Mapping[str, Tensor]
) -> None:
    if different := sorted(set(buffers) ^ set(loaded)):
        raise StateError(
            f"{side} residual {different[0]!r} is only on one side; same model?"
        )
    for name, buffer in buffers.items():
        value = loaded[name]
        if value.shape != buffer.shape or value.dtype != buffer.dtype:
            raise StateError(
                f"{side} residual {name!r} is {value.dtype}{list(value.shape)}, "
                f"expected {buffer.dtype}{list(buffer.shape)}"
            )
        if not value.isfinite().all():
            raise StateError(f"{side} residual {name!r} holds inf or nan; discard it")
