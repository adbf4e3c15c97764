"""The outer step: masters move by what the ranks have moved on the mean.

Local steps are an optimizer whose gradient is the mean of what all ranks have moved
since their last exchange (DiLoCo, arXiv 2311.08105), here with Nesterov's momentum and
with a decay of what was not sent (SparseLoCo, arXiv 2508.15706).
"""

import logging
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lc3.knobs import Knobs
from lc3.masters.owners import Owners
from lc3.module.steps import Written

log = logging.getLogger(__name__)


class Outer:
    """The outer optimizer of this rank's masters.

    Args:
        owners: the masters.
        knobs: say whether there is a momentum.

    Attributes:
        velocity: by parameter name float32[slice], of the slices that this rank owns;
            nothing without momentum.
    """

    def __init__(self, owners: Owners, knobs: Knobs) -> None:
        self.owners = owners
        self.velocity = {
            name: torch.zeros_like(master)
            for name, master in owners.masters.items()
            if knobs.outer_momentum
        }

    def step(self, knobs: Knobs, scale: float, names: Collection[str]) -> None:
        """Move the masters by the means that the last push has brought.

        Args:
            knobs: its rate and momentum.
            scale: factor of a mean over all ranks, of which some have said nothing.
            names: names of the parameters that were pushed.
        """
        for piece in self.owners.owned_of(names):
            mean = self.owners.mean(piece)
            if scale != 1:
                mean *= scale
            if not mean.isfinite().all():
                continue
            update = mean
            if knobs.outer_momentum:
                part = slice(piece.offset, piece.offset + piece.numel)
                velocity = self.velocity[piece.name][part]
                velocity.mul_(knobs.outer_momentum).add_(mean)
                update = mean.add(velocity, alpha=knobs.outer_momentum)
            self.owners.master(piece).sub_(update, alpha=knobs.outer_lr)

    def forget(self, knobs: Knobs, names: Collection[str]) -> None:
        """Let what was not sent decay: this rank's residuals, its masters' lead.

        Args:
            knobs: say by how much.
            names: names of the parameters that were exchanged.
        """
        if knobs.residual_decay == 1:
            return
        for name, residual in self.owners.engine.residuals.sent.items():
            if name in names:
                residual.mul_(knobs.residual_decay)
        self.owners.decay_lead(knobs.residual_decay, names)

    def rebase(self, base: Mapping[str, Tensor], *, forget: bool) -> None:
        """Go on from another model, which all ranks have alike.

        Args:
            base: of some parameters or all, by name [numel].
            forget: whether what is owed is owed no longer.
        """
        self.owners.rebase(base, keep_lead=not forget)
        if not forget:
            return
        residuals = self.owners.engine.residuals
        for held in (residuals.sent, self.velocity):
            for name, tensor in held.items():
                if name in base:
                    tensor.zero_()

    def go_on_from(
        self, written: Written, moved: Mapping[str, Tensor], *, far: bool
    ) -> None:
        """Let what all ranks were given be what they have moved from.

        Args:
            written: what they were given.
            moved: by name [numel], what this rank has moved; changed.
            far: whether it is so far away that nothing is owed any longer.
        """
        for name, flat in written.base.items():
            given = self.owners.replica[name].to(flat.dtype)  # rounded
            moved[name].add_(flat.float() - given)
            if name in written.late:
                moved[name].add_(written.late[name])
        self.rebase(written.base, forget=written.whole or far)
        log.info("lc3: all ranks were given other parameters; they go on from these")

    def apply_owed(self, flats: Mapping[str, Tensor], knobs: Knobs) -> None:
        """Apply what several ranks had not sent: one rank has nobody to send it to.

        Args:
            flats: the model's parameters by name [numel]; changed.
            knobs: say how far.
        """
        for name, owed in self.owners.engine.residuals.sent.items():
            flats[name].sub_(owed.to(flats[name]), alpha=knobs.outer_lr)
            owed.zero_()
