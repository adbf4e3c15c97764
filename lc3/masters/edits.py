"""What a script writes to a model's parameters between the steps of its owners.

Each rank looks at the share that it owns. What all ranks have written alike, such as
weights that they load, the masters take over.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from lc3.engines.exchange import Exchange
from lc3.errors import ReplicasDiffer
from lc3.masters.owners import Owners
from lc3.module.model import flat_view, together

log = logging.getLogger(__name__)

_LOADED = 0.01  # of the parameters' norm: what changes them more forgets what is owed


class Edits:
    """Sees what was written to a model's parameters, in this rank's share.

    Args:
        parameters: the model's, by name.
        owners: their masters and replica.
        engine: averages and codes.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], owners: Owners, engine: Exchange
    ) -> None:
        self._parameters = parameters
        self._owners, self._engine = owners, engine
        self._slices = {
            one.name: slice(one.start, one.stop)
            for one in engine.plan.slices_of(list(parameters), engine.transport.rank)
        }
        self._shared = {
            piece.name: self._own(piece.name).clone() for piece in owners.owned
        }

    def flats(self) -> dict[str, Tensor]:
        """Return views of the parameters' memory, wherever it is by now."""
        return {n: flat_view(p.detach()) for n, p in self._parameters.items()}

    def _own(self, name: str) -> Tensor:
        """Return this rank's share of a parameter of the model: a view, or a copy."""
        flat = flat_view(self._parameters[name].detach())
        return flat[self._slices[name]].float()

    def remember(self) -> None:
        """Take what parameters hold now for what all ranks hold."""
        for name, shared in self._shared.items():
            shared.copy_(self._own(name))

    def written(self) -> bool:
        """Return whether parameters hold something else in this rank's share."""
        return any(
            not torch.equal(self._own(name), shared)
            for name, shared in self._shared.items()
        )

    def copy_replica(self) -> None:
        """Let parameters be the replica."""
        replica = self._owners.replica
        for name, flat in self.flats().items():
            if flat.data_ptr() != replica[name].data_ptr():
                flat.copy_(replica[name])
            if flat.dtype == torch.float32:
                replica[name] = flat
        self.remember()

    def take_over(self) -> None:
        """Let masters be what all ranks have written to their parameters; collective.

        Raises:
            ReplicasDiffer: not all ranks hold the same.
        """
        flats = self.flats()
        moved = whole = 0.0
        for name, shared in self._shared.items():
            moved += float((self._own(name) - shared).norm()) ** 2
            whole += float(shared.norm()) ** 2
        channel = self._engine.channel
        tag = channel.aside()
        with channel.exchanging(0, *tag):
            everybody = channel.all_gather_numbers(
                [together(flats), moved, whole], *tag
            )
            sums = [numbers[0] for numbers in everybody]
            if len(set(sums)) > 1:
                usual = max(sums, key=sums.count)
                others = [r for r, value in enumerate(sums) if value != usual]
                raise ReplicasDiffer(
                    "parameters were changed outside of step() since the last one, "
                    f"and ranks {others} hold others than the rest; load weights on "
                    "every rank, before the next backward pass"
                )
        _, moved, whole = map(sum, zip(*everybody, strict=True))
        forget = not moved <= _LOADED**2 * whole
        for name, shared in self._shared.items():
            now, master = self._own(name), self._owners.masters[name]
            if forget:
                master.copy_(now)
            else:
                master.add_(now - shared)
            shared.copy_(now)
        if forget:
            for residual in self._engine.residuals.sent.values():
                residual.zero_()
        for name, flat in flats.items():
            if flat.dtype == torch.float32:
                self._owners.replica[name] = flat
            else:
                self._owners.replica[name].copy_(flat)
        log.info("lc3: all ranks were given other parameters; they go on from these")
