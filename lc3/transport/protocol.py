"""Moving messages between ranks: byte strings of any length, in rank order.

Two transports have the same methods: ``GroupTransport`` over a process group of
torch.distributed, and ``LoopbackTransport``, N ranks as N threads of one process.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

SIZE_BYTES = 8  # of what announces a message's length
MOST_BYTES = 1 << 26  # of a message, but for what a plan is about


class NotMadeError(Exception):
    """A message could not be made; the cause says why."""


class Lazily(Sequence[Tensor]):
    """Messages that are made when they are asked for, each once.

    Args:
        make: returns the message to a rank, uint8[*].
        world: number of ranks.
        made: those by rank that there are.
    """

    def __init__(
        self, make: Callable[[int], Tensor], world: int, made: dict[int, Tensor]
    ) -> None:
        self._make = make
        self._world = world
        self._made = made

    def __len__(self) -> int:
        return self._world

    def __getitem__(self, rank: Any) -> Any:
        """Return the message to a rank.

        Raises:
            NotMadeError: see there.
        """
        if not 0 <= rank < self._world:
            raise IndexError(rank)
        if (message := self._made.get(rank)) is None:
            try:
                message = self._make(rank)
            except Exception as error:
                raise NotMadeError from error
            self._made[rank] = message
        return message


class Transport(Protocol):
    """Collectives over byte strings. Every rank calls the same ones in the same order.

    Attributes:
        rank: this rank in the group.
        world: number of ranks.
        sent_bytes: bytes given to the transport for other ranks so far, the sizes that
            announce them included. A rank's message to itself is never sent.
        rounds: times this rank has waited for a message of every other.
        most_bytes: limit on a message; a longer one is refused before anything is
            allocated.
    """

    rank: int
    world: int
    sent_bytes: int
    rounds: int
    most_bytes: int

    def all_to_all(
        self, messages: Sequence[Tensor], timeout_s: float | None = None
    ) -> list[Tensor]:
        """Send ``messages[r]``, uint8[*], to each rank r; return what came, by rank.

        Messages may be ``Lazily`` made: then each can leave before the next is made,
        and this rank's own is made last.

        Raises:
            NotMadeError: one of them could not be made.
            ExchangeError: the transport failed, or took more than ``timeout_s``
                (default: the group's own timeout).
        """
        ...

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """Send ``message``, uint8[*], to every rank; return what came, by rank.

        Moved as ``all_to_all`` moves its messages, so that a rank that has failed may
        answer either with an abort message.
        """
        ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Make a dense tensor its sum over ranks, by the transport's own means.

        Nobody can answer it with an abort message.
        """
        ...

    def leave_word(self, reason: str) -> None:
        """Leave word of why this rank stops, for ranks that come after it has gone.

        Their next exchange raises it as a ``PeerError``, where the transport has a
        place for it.
        """
        ...


@runtime_checkable
class Divisible(Transport, Protocol):
    """A ``Transport`` whose ranks can exchange in parts as well."""

    def among(self, members: Sequence[int]) -> Transport:
        """Return an exchange between some of the ranks, numbered in their order.

        Over the same transport and counting for itself. This rank is one of them; all
        ranks of the job use their parts at the same time.
        """
        ...
