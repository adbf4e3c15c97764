"""A module's float buffers under local steps: averaged now and then, kept while finite.

Statistics of a normalisation are each rank's own between two exchanges. What one bad
batch has made of them must not stay, nor reach other ranks.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lc3.local.says import Says
from lc3.module.model import Model
from lc3.transport.channel import Channel

_EVERY = 8  # exchanges from one mean of buffers to the next


class Statistics:
    """The float buffers of one model.

    Args:
        model: that has them.
        channel: averages them.

    Attributes:
        channel: see above; another one where other ranks exchange.
        in_step: whether all ranks average them in the same exchanges. If not, this rank
            may be asked for its own in any.
    """

    def __init__(self, model: Model, channel: Channel) -> None:
        self._model = model
        self.channel = channel
        self.in_step = True
        self._then: dict[str, Tensor] = {}
        self._good: dict[str, Tensor] = {}
        model.mark_buffers()
        self.keep()

    def begin(self, exchange: int, *, now: bool) -> tuple[tuple[bool, ...], bool]:
        """Take what an exchange is to average, if it is to.

        Args:
            exchange: its number, of those that buffers may come with.
            now: whether to average whatever its number is.

        Returns:
            By buffer whether it has changed and is averaged; whether all that others
            may ask for are finite.
        """
        buffers = self._model.float_buffers()
        changed = (False,) * len(buffers)
        due = now or exchange % _EVERY == _EVERY - 1
        if due:
            changed = tuple(self._model.changed_buffers())
        if due or not self.in_step:
            self._then = {name: buffer.clone() for name, buffer in buffers.items()}
        both = zip(buffers.values(), changed, strict=True)
        asked = (buffer for buffer, some in both if some or not self.in_step)
        return changed, _finite(asked)

    def mean(self, everybody: Sequence[Says], mine: Says, step: int) -> Tensor:
        """Return the mean of the buffers that have changed, over ranks where finite.

        Inside of ``Channel.exchanging``.

        Args:
            everybody: what all ranks say, by rank.
            mine: what this one says.
            step: the number of the exchange.

        Returns:
            float64[*], or float32 if no buffer is float64: one after the other. Of no
            elements if there is nothing to take over.
        """
        due = self._due(everybody)
        counted = sum([said.buffers_finite for said in everybody])
        if not due or not counted:
            return torch.empty(0, dtype=torch.float32)
        then = {**self._model.float_buffers(), **self._then}  # where others begin it
        flat = [then[name].reshape(-1) for name in due]
        wide = any(part.dtype == torch.float64 for part in flat)
        dtype = torch.float64 if wide else torch.float32
        values = torch.cat([part.to(dtype) for part in flat])
        if not mine.buffers_finite:
            values.zero_()
        mean = self.channel.mean(values, step, 1)
        return mean if counted == len(everybody) else mean * len(everybody) / counted

    def take(
        self, averaged: Tensor, everybody: Sequence[Says], mine: Says, *, late: bool
    ) -> None:
        """Write means to buffers.

        Args:
            averaged: from ``mean``.
            everybody: see ``mean``.
            mine: see ``mean``.
            late: whether to keep what this rank has changed meanwhile.
        """
        if averaged.numel():
            now = self._model.float_buffers()
            names = self._due(everybody)
            sizes = [now[name].numel() for name in names]
            for name, part in zip(names, averaged.split(sizes), strict=True):
                wanted = part.view(now[name].shape)
                if late and mine.buffers_finite:
                    wanted = wanted + (now[name] - self._then[name])
                now[name].copy_(wanted)
        elif not mine.buffers_finite:  # nobody's are
            self.restore()
        if mine.buffers and (averaged.numel() or any(mine.buffers)):
            self._model.mark_buffers()

    def keep(self) -> None:
        """Remember statistics that are finite; a look at all of them together."""
        for name, buffer, finite in self._looked_at():
            if finite and name in self._good:
                self._good[name].copy_(buffer)
            elif finite:
                self._good[name] = buffer.detach().clone()

    def restore(self) -> None:
        """Go back to the last statistics that were finite, where they are not."""
        for name, buffer, finite in self._looked_at():
            if not finite and name in self._good:
                buffer.copy_(self._good[name])

    def _due(self, everybody: Sequence[Says]) -> list[str]:
        """Return the names of buffers that have changed on some rank."""
        changed = zip(*[said.buffers for said in everybody], strict=True)
        names = self._model.float_buffers()
        return [n for n, some in zip(names, changed, strict=True) if any(some)]

    def _looked_at(self) -> list[tuple[str, Tensor, bool]]:
        """Return float buffers with their names, and whether each is finite."""
        buffers = self._model.float_buffers()
        if not buffers:
            return []
        found = torch.stack([b.isfinite().all() for b in buffers.values()]).tolist()
        return [(n, b, f) for (n, b), f in zip(buffers.items(), found, strict=True)]


def _finite(tensors: Iterable[Tensor]) -> bool:
    found = [t.isfinite().all() for t in tensors]
    return not found or bool(torch.stack(found).all())
