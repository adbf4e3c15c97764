"""A transport between threads: N ranks in one process."""

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lc3.errors import ExchangeError
from lc3.transport.protocol import MOST_BYTES, SIZE_BYTES


class Loopback:
    """N ranks in one process: ``ranks[r]`` is the ``Transport`` of rank r's thread.

    Args:
        world: number of ranks.
        timeout_s: how long a rank waits for the others before it gives up.
    """

    def __init__(self, world: int, timeout_s: float = 60.0) -> None:
        self._barrier = threading.Barrier(world, timeout=timeout_s)
        self._slots: list[Any] = [None] * world
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, ...], Loopback] = {}
        self.ranks = [LoopbackTransport(self, rank, world) for rank in range(world)]

    def part(self, members: Sequence[int]) -> "Loopback":
        """Return the one loopback that some of the ranks share."""
        with self._lock:
            return self._parts.setdefault(
                tuple(members), Loopback(len(members), self._timeout_s)
            )

    def swap(self, rank: int, given: Any, timeout_s: float | None) -> list[Any]:
        """Show ``given`` to all ranks; return what each of them gave, by rank."""
        try:
            self._slots[rank] = given
            self._barrier.wait(timeout_s)
            shown = list(self._slots)
            self._barrier.wait(timeout_s)
        except threading.BrokenBarrierError as error:
            raise ExchangeError("another rank's thread left the exchange") from error
        return shown


class LoopbackTransport:
    """A ``Transport`` between the threads of one process. Built by ``Loopback``."""

    def __init__(self, loopback: Loopback, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self.sent_bytes = self.rounds = 0
        self.most_bytes = MOST_BYTES
        self._loopback = loopback

    def among(self, members: Sequence[int]) -> "LoopbackTransport":
        """See ``Divisible.among``."""
        return self._loopback.part(members).ranks[list(members).index(self.rank)]

    def all_to_all(
        self, messages: Sequence[Tensor], timeout_s: float | None = None
    ) -> list[Tensor]:
        """See ``Transport.all_to_all``. Messages are copied, as a network would."""
        outgoing = sum(m.numel() for r, m in enumerate(messages) if r != self.rank)
        shown = self._loopback.swap(
            self.rank, [message.clone() for message in messages], timeout_s
        )
        self.sent_bytes += outgoing + SIZE_BYTES * (self.world - 1)
        self.rounds += 1
        return [given[self.rank] for given in shown]

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """See ``Transport.all_gather``."""
        return self.all_to_all([message] * self.world)

    def all_reduce(self, tensor: Tensor) -> None:
        """See ``Transport.all_reduce``. Added in rank order."""
        first, *others = self._loopback.swap(self.rank, tensor.clone(), None)
        tensor.copy_(first)
        for other in others:
            tensor += other
        self.sent_bytes += 2 * (self.world - 1) * tensor.nbytes // self.world
        self.rounds += 2 * (self.world - 1)

    def leave_word(self, reason: str) -> None:
        """See ``Transport.leave_word``. No place: a thread that comes late waits."""
