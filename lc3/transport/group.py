"""A transport over a process group of torch.distributed."""

import socket
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lc3.errors import ExchangeError, FormatError, PeerError
from lc3.transport.protocol import MOST_BYTES, SIZE_BYTES, NotMadeError

if not dist.is_initialized():
    # DDP imports this with its first model. The default group is the default argument
    # of all its functions, so if there is one by then they hold it to the very end, and
    # gloo's threads outlive destroy_process_group() (see ``GroupTransport.leave``).
    import torch.distributed.nn.functional

_WORD, _WORD_S = (
    "lc3/stopped",
    2.0,
)  # the key, and how long to look for the store's host
_NOT_MADE_S = 5.0  # that what left already may take
_BUFFER_BYTES, _BUFFERS_BYTES = 1 << 18, 1 << 25  # of one receive, and of all
_FIRST, _REST = 0, 1  # parts of a message
_TAG = 0x3C3000
_AHEAD = 2  # rounds: a push and a pull
_TRANSPORTS: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = (
    weakref.WeakKeyDictionary()
)  # made over a group so far


class Pairwise:
    """A ``Transport`` of messages between pairs of ranks, each in one round.

    A receive may be longer than what comes, so nobody has to announce sizes first. What
    does not fit into the buffer of a receive follows in a second message between just
    those two ranks. A ragged all_gather is an all_to_all of one message to everybody.

    gloo sends a message only when it knows of the receive that waits for it, so that a
    round takes the way there and back. Receives posted some rounds ahead are known by
    then: it takes one way.

    Args:
        members: numbers, by which ranks are sent to, of those that exchange.
        me: this rank's number, which is among them.
        ahead: rounds, for which receives are posted before their turn. They stay when
            the exchange ends, so what is sent there next must not be taken for theirs.
    """

    def __init__(self, members: Sequence[int], me: int, ahead: int = 0) -> None:
        self._members = members
        self.rank = members.index(me)
        self.world = len(members)
        self.sent_bytes = self.rounds = 0
        self.most_bytes = MOST_BYTES
        # Each begins with another, so that not all send to the first at once.
        self._peers = [
            (self.rank + ahead) % self.world for ahead in range(1, self.world)
        ]
        buffers = max(1, ahead) * len(self._peers)
        buffer = min(_BUFFER_BYTES, _BUFFERS_BYTES // max(1, buffers))
        self._buffers = torch.empty(buffers, buffer, dtype=torch.uint8)
        self._ahead = ahead
        self._posted: dict[int, deque[tuple[Tensor, Any]]] = {}

    def all_to_all(
        self, messages: Sequence[Tensor], timeout_s: float | None = None
    ) -> list[Tensor]:
        """See ``Transport.all_to_all``."""
        if self.world == 1:
            return list(messages)
        with self._transport_errors():
            return self._moved(messages, timeout_s)

    def _moved(
        self, messages: Sequence[Tensor], timeout_s: float | None
    ) -> list[Tensor]:
        """Move messages, and count the round and the bytes."""
        arrived = self._pairwise(messages, timeout_s)
        self.rounds += 1
        return arrived

    def _pairwise(
        self, messages: Sequence[Tensor], timeout_s: float | None
    ) -> list[Tensor]:
        """Send and receive with every peer at once; the rest of long ones after it."""
        if not (self._posted and all(self._posted.values())):
            self._post()
        sending: list[Any] = []
        prefixed: dict[int, Tensor] = {}  # all_gather: one for everybody
        try:
            for peer in self._peers:
                message = messages[peer]
                if id(message) not in prefixed:
                    size = bytearray(message.numel().to_bytes(SIZE_BYTES, "little"))
                    announced = torch.frombuffer(size, dtype=torch.uint8)
                    prefixed[id(message)] = torch.cat([announced, message])
                self.sent_bytes += SIZE_BYTES + message.numel()
                parts = self._parts(prefixed[id(message)])
                sending += map(self._send, parts, repeat(peer), (_FIRST, _REST))
            # This rank's own is made while those travel.
            arrived = [messages[self.rank]] * self.world
        except NotMadeError:
            for work in sending:  # of memory that is not ours behind this
                with suppress(RuntimeError):
                    self._wait(work, _NOT_MADE_S)
            raise
        read: list[tuple[int, Tensor]] = []
        for peer in self._peers:
            buffer, receiving = self._posted[peer].popleft()
            self._wait(receiving, timeout_s)
            head = buffer[:SIZE_BYTES].numpy().tobytes()
            numel = int.from_bytes(head, "little", signed=True)
            self._check_size(peer, numel)
            arrived[peer] = torch.empty(numel, dtype=torch.uint8)
            first, *rest = self._parts(arrived[peer], SIZE_BYTES)
            first.copy_(buffer[SIZE_BYTES : SIZE_BYTES + first.numel()])
            sending += map(self._receive, rest, repeat(peer), repeat(_REST))
            read.append((peer, buffer))
        for work in sending:
            self._wait(work, timeout_s)
        if self._ahead:
            self._post_ahead(read)
        return arrived

    def _post(self) -> None:
        """Post receives of this round and of those ahead."""
        per_peer = torch.tensor_split(self._buffers, len(self._peers))
        for peer, buffers in zip(self._peers, per_peer, strict=True):
            if not self._posted.setdefault(peer, deque()):
                for buffer in buffers:
                    receiving = self._receive(buffer, peer, _FIRST)
                    self._posted[peer].append((buffer, receiving))

    def _post_ahead(self, read: Sequence[tuple[int, Tensor]]) -> None:
        """Post receives of a later round into buffers that have been read.

        When all of this round has arrived: if it was the last one a peer may be gone,
        which is an error only to a round that waits for it. Nor does word of a receive
        then reach a peer that closes behind what it has sent: that would reset the
        connection, and what was sent could be lost.
        """
        for peer, buffer in read:
            with suppress(RuntimeError):
                receiving = self._receive(buffer, peer, _FIRST)
                self._posted[peer].append((buffer, receiving))

    def _parts(self, data: Tensor, before: int = 0) -> list[Tensor]:
        """Return what of a message goes with its size, and what after that, if any."""
        first = self._buffers.shape[1] - before
        return [data] if data.numel() <= first else [data[:first], data[first:]]

    def _check_size(self, peer: int, numel: int) -> None:
        if not 0 <= numel <= self.most_bytes:
            raise FormatError(
                f"rank {peer} announces a message of {numel} bytes; for this model "
                f"{self.most_bytes} are the most: is it a rank of this job?"
            )

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """See ``Transport.all_gather``."""
        return self.all_to_all([message] * self.world)

    @contextmanager
    def _transport_errors(self) -> Iterator[None]:
        try:
            yield
        except FormatError:
            raise
        except (ExchangeError, RuntimeError, ValueError) as error:
            if (word := self._word()) is not None:
                raise word from error
            if isinstance(error, ExchangeError):
                raise
            raise ExchangeError(
                f"the exchange with the other ranks failed ({error}); a rank died, the "
                "link is down, or the process group's timeout passed: look at the "
                "other ranks' logs"
            ) from error

    def _word(self) -> PeerError | None:
        """Return what a rank that has stopped has left word of."""
        return None

    def _send(self, data: Tensor, peer: int, part: int) -> Any:
        raise NotImplementedError

    def _receive(self, buffer: Tensor, peer: int, part: int) -> Any:
        raise NotImplementedError

    def _wait(self, work: Any, timeout_s: float | None) -> None:
        if timeout_s is None:
            work.wait()
        elif not work.wait(timedelta(seconds=timeout_s)):
            raise ExchangeError(f"no answer from the other ranks within {timeout_s} s")


class GroupTransport(Pairwise):
    """A ``Transport`` over a process group that nobody else uses.

    On gloo a message travels in one round, see ``Pairwise``. Other backends (NCCL)
    exchange sizes, then bytes, by ``all_to_all_single``. Both move the same bytes.

    Args:
        group: the process group.
        device: that the backend moves tensors of: the CPU, but for NCCL. Messages are
            on the CPU all the same.
        members: ranks in the group that exchange, this one among them. Default: all.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        members: Sequence[int] | None = None,
    ) -> None:
        everybody = range(dist.get_world_size(group))
        super().__init__(
            everybody if members is None else members, dist.get_rank(group), _AHEAD
        )
        self._held = [group]
        # Ranks make theirs in the same order, so that they number them alike.
        number = _TRANSPORTS.get(group, 0)
        _TRANSPORTS[group] = number + 1
        self._tags = [_TAG + 2 * number + part for part in (_FIRST, _REST)]
        self._device = device
        self._one_round = dist.get_backend(group) == "gloo"

    def among(self, members: Sequence[int]) -> "GroupTransport":
        """See ``Divisible.among``."""
        ranks = [self._members[member] for member in members]
        part = GroupTransport(self._group, self._device, ranks)
        part._held = self._held
        part.most_bytes = self.most_bytes
        return part

    def leave(self, *, destroy: bool) -> None:
        """Let go of the group, so that it can end; nothing can be exchanged then.

        What is left of a group that somebody still holds are threads that may need the
        interpreter's lock when it is gone, at exit, and abort the process
        (pytorch/pytorch#190489).

        Args:
            destroy: end the group, too; of a group that was made for this exchange.
        """
        if destroy and dist.is_initialized():
            with suppress(ValueError):  # it has gone with all the others already
                dist.destroy_process_group(self._group)
        self._held.clear()
        self._posted.clear()

    @property
    def _group(self) -> dist.ProcessGroup:
        return self._held[0]

    def _moved(
        self, messages: Sequence[Tensor], timeout_s: float | None
    ) -> list[Tensor]:
        if self._one_round:
            return super()._moved(messages, timeout_s)
        arrived = self._sizes_then_bytes(list(messages), timeout_s)
        self.rounds += 2
        sizes = [messages[peer].numel() for peer in self._peers]
        self.sent_bytes += sum(sizes) + SIZE_BYTES * (self.world - 1)
        return arrived

    def _sizes_then_bytes(
        self, messages: Sequence[Tensor], timeout_s: float | None
    ) -> list[Tensor]:
        in_job_order = sorted(self._peers, key=lambda peer: self._members[peer])
        payload = torch.cat([messages[peer] for peer in in_job_order]).to(self._device)
        outgoing = [0] * dist.get_world_size(self._group)
        for peer in self._peers:
            outgoing[self._members[peer]] = messages[peer].numel()
        announced = torch.tensor(outgoing, dtype=torch.int64, device=self._device)
        sizes = torch.empty_like(announced)
        self._wait(self._start(sizes, announced), timeout_s)
        incoming = sizes.tolist()
        for peer in self._peers:
            self._check_size(peer, incoming[self._members[peer]])
        received = torch.empty(sum(incoming), dtype=torch.uint8, device=self._device)
        self._wait(self._start(received, payload, incoming, outgoing), timeout_s)
        parts = torch.split(received.cpu(), incoming)
        arrived = [parts[member] for member in self._members]
        arrived[self.rank] = messages[self.rank]
        return arrived

    def all_reduce(self, tensor: Tensor) -> None:
        """See ``Transport.all_reduce``. Counted as a ring. Not among members only."""
        assert self.world == dist.get_world_size(self._group)
        with self._transport_errors():
            dist.all_reduce(tensor, group=self._group)
        self.sent_bytes += 2 * (self.world - 1) * tensor.nbytes // self.world
        self.rounds += 2 * (self.world - 1)

    def leave_word(self, reason: str) -> None:
        """See ``Transport.leave_word``. In the group's store, where the first stays."""
        word = f"{self._members[self.rank]} {reason}"
        with suppress(RuntimeError):
            if (store := self._store()) is not None:
                store.compare_set(_WORD, "", word)

    def _word(self) -> PeerError | None:
        """Return what a rank that has stopped has left word of."""
        word = ""
        with suppress(RuntimeError):
            store = self._store()
            if store is not None and store.check([_WORD]):
                word = store.get(_WORD).decode()
        rank, _, reason = word.partition(" ")
        return PeerError(int(rank), reason) if rank.isdecimal() else None

    def _store(self) -> Any:
        """Return the group's store; none if its host is not to be reached.

        What is asked of a store across a cut link is never answered.
        """
        store: Any = self._group.get_group_store()
        host = store
        while isinstance(host, dist.PrefixStore):
            host = host.underlying_store
        if isinstance(host, dist.TCPStore):
            try:
                socket.create_connection((host.host, host.port), _WORD_S).close()
            except OSError:
                return None
        return store

    def _send(self, data: Tensor, peer: int, part: int) -> Any:
        to, tag = self._members[peer], self._tags[part]
        return self._group.send([data], to, tag)

    def _receive(self, buffer: Tensor, peer: int, part: int) -> Any:
        of, tag = self._members[peer], self._tags[part]
        return self._group.recv([buffer], of, tag)

    def _start(
        self,
        received: Tensor,
        sent: Tensor,
        incoming: list[int] | None = None,
        outgoing: list[int] | None = None,
    ) -> Any:
        return dist.all_to_all_single(
            received, sent, incoming, outgoing, group=self._group, async_op=True
        )
