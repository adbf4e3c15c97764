"""DDP's broadcast of buffers, where it changes something.

Before every forward pass DDP sends all buffers of rank 0 to all ranks, uncompressed:
masks and tables that never change, and statistics of norms that training does not use.
Here buffers are looked at first. Rank 0's are what they are without lc3.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lc3 import private
from lc3.module.model import checksums

_FIRST, _EVERY = 3, 10  # forward passes
_MESSAGE_BYTES = 1 << 28  # as DDP's


class Buffers:
    """Decides which buffers DDP sends before a forward pass; registered as its hook.

    Statistics of norms are sent before the first pass of an evaluation, other buffers
    before every pass if they change from one to the next. Those that have not changed
    in the first three passes are looked at again in every tenth, and sent if they
    have changed on some rank.

    Args:
        model: has buffers.
        any_rank: returns where some rank says yes; collective.
        count: function that is told how many bytes are sent.

    Attributes:
        sent_bytes: so far, from one rank on average.
        sends_all: whether all are sent before every pass, as without lc3.
        sends_none: whether none are, where ranks train alone.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        any_rank: Callable[[list[bool]], list[bool]],
        count: Callable[[int], None],
    ) -> None:
        self._model = model
        self._group = model.process_group
        self._any_rank = any_rank
        self._count = count
        self._passes = 0
        self._trained = False  # since the statistics were sent
        self._sums: dict[str, int] = {}
        self._moving: set[str] = set()
        self.sent_bytes = 0
        self.sends_all = False
        self.sends_none = False

    def due(self, buffers: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the buffers that are sent before this pass."""
        statistics = _statistics(self._model.module)
        others = [name for name in buffers if name not in statistics]
        training = self._model.training and self._model.module.training
        send = [name for name in others if name in self._moving]
        if not training:
            if self._trained:
                self._trained = False
                changed = self._changed(buffers, others)
                send = sorted(changed.union(send), key=others.index)
                send += [name for name in buffers if name in statistics]
            return send
        self._trained = True
        self._passes += 1
        if self._passes > _FIRST and self._passes % _EVERY:
            return send
        if not others or self._passes < _FIRST:
            return others
        self._moving = self._changed(buffers, others)
        return sorted(self._moving.union(send), key=others.index)

    def _changed(self, buffers: Mapping[str, Tensor], names: list[str]) -> set[str]:
        """Return which buffers have changed on some rank since they were looked at."""
        if not names:
            return set()
        sums = checksums(buffers[name] for name in names).tolist()
        now = dict(zip(names, sums, strict=True))
        mine = [self._sums.get(name, value) != value for name, value in now.items()]
        self._sums.update(now)
        pairs = zip(names, self._any_rank(mine), strict=True)
        return {name for name, one in pairs if one}

    def send(self, buffers: Mapping[str, Tensor]) -> None:
        """Give all ranks what rank 0 has of the buffers that are due."""
        if self.sends_all:
            private.broadcast(self._group, list(buffers.values()), _MESSAGE_BYTES)
            return
        if self.sends_none:
            return
        if not self._sums:
            sums = checksums(buffers.values()).tolist()
            self._sums = dict(zip(buffers, sums, strict=True))
        due = [buffers[name] for name in self.due(buffers)]
        if not due:
            return
        private.broadcast(self._group, due, _MESSAGE_BYTES)
        world = dist.get_world_size(self._group)
        sent = sum(buffer.nbytes for buffer in due) * (world - 1) // world
        self.sent_bytes += sent
        self._count(sent)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Buffers":
        copied = Buffers(self._model, self._any_rank, self._count)
        copied.sends_all = True  # of a model that is nobody's
        return copied


def send_buffers(state: Buffers, buffers: Mapping[str, Tensor]) -> None:
    """Do what DDP's broadcast of buffers does (``_register_buffer_comm_hook``)."""
    state.send(buffers)


def _statistics(module: nn.Module) -> set[str]:
    """Return the names of what norms keep for evaluation."""
    return {
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        if private.is_norm(part)
        for buffer, _ in part.named_buffers(recurse=False)
    }
