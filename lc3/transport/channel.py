"""Sealed messages between ranks, and what is made of them in one round or two.

What one rank sends to another is sealed by step and bucket, so that a rank that has
failed may answer whatever the others are waiting in: a bucket's push or pull, a mean,
the next bucket's push.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from lc3.budget import Budget
from lc3.errors import ExchangeError, Lc3Error, PeerError
from lc3.format import (
    ASIDE_BUCKET,
    BUDGET_BUCKET,
    HEADER_BYTES,
    Tag,
    seal,
    seal_abort,
    unseal,
)
from lc3.meter import Meter
from lc3.transport.protocol import Transport

_ABORT_TIMEOUT_S = 5.0
_FEW_RANKS = 8  # that send each other a kilobyte rather than wait for another round


class Channel:
    """A transport whose messages are sealed, counted, and answered in failure.

    Args:
        transport: moves the messages.
        meter: counts them.
        plan: the fingerprint that every message carries.
        budget: counts the bytes of gradients, too.

    Attributes:
        failure: what this rank has stopped at, or ``None``.
    """

    def __init__(
        self,
        transport: Transport,
        meter: Meter,
        plan: int,
        budget: Budget | None = None,
    ) -> None:
        self.transport = transport
        self.meter = meter
        self.failure: BaseException | None = None
        self._plan = plan
        self._budget = budget
        self._asides = 0

    @contextmanager
    def exchanging(
        self, elements: int, step: int, bucket: int, hops: int = 2
    ) -> Iterator[None]:
        """Count what is sent, and tell the others if this rank fails on its own.

        Args:
            elements: of the parameters that are exchanged; 0 for what is no gradient.
            step: see ``Exchange.all_reduce``.
            bucket: see ``Exchange.all_reduce``.
            hops: 2 for a push and a pull, 1 for one of them.
        """
        sent_before, rounds_before = self.transport.sent_bytes, self.transport.rounds
        with self.telling_others(step, bucket):
            yield
        share = (self.transport.world - 1) / self.transport.world
        sent = self.transport.sent_bytes - sent_before
        if elements and self._budget is not None:
            self._budget.sent_bytes += sent
        self.meter.add(
            sent,
            hops * share * 4 * elements,
            self.transport.rounds - rounds_before,
        )

    @contextmanager
    def telling_others(self, step: int, bucket: int) -> Iterator[None]:
        """Answer the next exchange with an abort message if this rank fails on its own.

        Everything moves sealed messages in the same way, so the abort fits whatever
        the others are waiting in: this bucket's push, its pull, a norm, the next
        bucket's push.
        """
        if self.failure is not None:
            raise ExchangeError(
                f"lc3 stopped at an earlier error ({self.failure}); restart the job "
                "from its last checkpoint"
            ) from self.failure
        try:
            yield
        except (PeerError, ExchangeError) as error:
            self.failure = error
            raise
        except BaseException as error:
            self.tell(error, step, bucket)
            raise

    def tell(self, error: BaseException, step: int, bucket: int) -> None:
        """Answer the next exchange with an abort message, unless one has failed."""
        if self.failure is None:
            self.failure = error
            reason = f"{type(error).__name__}: {error}"
            self.transport.leave_word(reason)
            abort = seal_abort(reason, self._tag(self.transport.rank, step, bucket))
            # The others may be gone already; this one's own word is no news.
            with suppress(ExchangeError, PeerError):
                self.transport.all_to_all(
                    [abort] * self.transport.world, timeout_s=_ABORT_TIMEOUT_S
                )

    def pass_through(self, tensor: Tensor, step: int, bucket: int) -> Tensor:
        """Return the plain mean over ranks of a tensor that lc3 does not code.

        Args:
            tensor: dense of any floating type, or sparse.
            step: see ``Exchange.all_reduce``.
            bucket: see ``Exchange.all_reduce``.
        """
        sent_before = self.meter.sent_bytes
        with self.exchanging(0, step, bucket):
            mean_of = self._sparse_mean if tensor.is_sparse else self.mean
            mean = mean_of(tensor, step, bucket)
        sent = self.meter.sent_bytes - sent_before
        self.meter.buckets += 1
        self.meter.dense_bytes += sent
        self.meter.passed_through_bytes += sent
        return mean

    def all_gather_bytes(self, data: Tensor, step: int, bucket: int) -> list[Tensor]:
        """Send a tensor to every rank; return every rank's bytes, uint8[*], by rank.

        For what is no gradient, inside of ``exchanging``. In messages of their own
        kind, since a rank that has failed may answer any exchange with an abort.

        Args:
            data: of any dtype and shape.
            step: see ``Exchange.all_reduce``.
            bucket: the same on every rank, and no other exchange's in this step.
        """
        arrived = self.transport.all_gather(self._sealed(data, step, bucket))
        return self._unsealed(arrived, step, bucket)

    def all_gather_numbers(
        self, mine: Sequence[float], step: int, bucket: int
    ) -> list[list[float]]:
        """Return every rank's numbers, as many of each; inside of ``exchanging``.

        Args:
            mine: numbers of this rank.
            step: see ``Exchange.all_reduce``.
            bucket: see ``all_gather_bytes``.
        """
        data = torch.tensor(mine, dtype=torch.float64)
        said = self.all_gather_bytes(data, step, bucket)
        return [data.clone().view(torch.float64).tolist() for data in said]

    def all_to_all_bytes(
        self, parts: Sequence[Tensor], step: int, bucket: int
    ) -> list[Tensor]:
        """Send each rank its own; return every rank's bytes, uint8[*], by rank.

        See ``all_gather_bytes``.
        """
        messages = [self._sealed(part, step, bucket) for part in parts]
        return self._unsealed(self.transport.all_to_all(messages), step, bucket)

    def all_gather_readable(
        self, data: Tensor, step: int, bucket: int
    ) -> list[Tensor | Lc3Error]:
        """Do what ``all_gather_bytes`` does, whatever single ranks have sent.

        Returns:
            By rank its bytes, uint8[*], or why they cannot be read.
        """
        arrived = self.transport.all_gather(self._sealed(data, step, bucket))
        found: list[Tensor | Lc3Error] = []
        for sender, message in enumerate(arrived):
            try:
                found.append(unseal(message, self._tag(sender, step, bucket))[0])
            except Lc3Error as error:
                found.append(error)
        return found

    def any_rank(self, mine: Sequence[bool], step: int, bucket: int) -> list[bool]:
        """Return where some rank says yes.

        Inside of ``exchanging`` or ``telling_others``.

        Args:
            mine: what this rank says, as many on every rank.
            step: see ``Exchange.all_reduce``.
            bucket: see ``all_gather_bytes``.
        """
        flags = torch.tensor(mine, dtype=torch.bool)
        said = self.all_gather_bytes(flags, step, bucket)
        everybody = torch.stack([one.clone() for one in said]).view(torch.bool)
        some: list[bool] = everybody.any(0).tolist()
        return some

    def keep_budget(self, step: int) -> None:
        """At some steps share what ranks have sent of gradients, and steer by it.

        Inside of ``exchanging``.
        """
        if self._budget is not None and self._budget.due():
            mine = [self._budget.sent_bytes]
            everybody = self.all_gather_numbers(mine, step, BUDGET_BUCKET)
            self._budget.look(sum(sent for (sent,) in everybody) / len(everybody))

    def mean(self, values: Tensor, step: int, bucket: int) -> Tensor:
        """Return the mean over ranks of a dense tensor, the same bits everywhere.

        Inside of ``exchanging``. Every rank adds up its share of the elements, in rank
        order, and sends it to all: as many bytes as a ring, in two rounds.

        Args:
            values: of a floating type, the same shape on every rank.
            step: see ``Exchange.all_reduce``.
            bucket: see ``all_gather_bytes``.
        """
        parts = values.reshape(-1).tensor_split(self.transport.world)
        everybody = self.all_gather_bytes(
            self.mean_here(parts, step, bucket), step, bucket
        )
        whole = torch.cat([data.clone() for data in everybody]).view(values.dtype)
        return whole.view(values.shape).to(values.device)

    def mean_of_small(self, values: Tensor, step: int, bucket: int) -> Tensor:
        """Do what ``mean`` does for few values, in one round between few ranks.

        Args:
            values: float32[*].
            step: see ``Exchange.all_reduce``.
            bucket: see ``all_gather_bytes``.
        """
        world = self.transport.world
        if world > _FEW_RANKS:
            return self.mean(values, step, bucket)
        everybody = self.all_gather_bytes(values, step, bucket)
        total = sum_of(everybody).div_(world)
        return total.to(values.device)

    def mean_here(self, parts: Sequence[Tensor], step: int, bucket: int) -> Tensor:
        """Return the mean over ranks of this rank's part; the first half of ``mean``.

        Args:
            parts: by rank, what it is to get, of a floating type, flat; the same shapes
                on every rank.
            step: see ``Exchange.all_reduce``.
            bucket: see ``all_gather_bytes``.

        Returns:
            The mean, on the CPU; added up in float32 at least.
        """
        arrived = self.all_to_all_bytes(parts, step, bucket)
        dtype = parts[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        total, *others = [data.clone().view(dtype).to(wide) for data in arrived]
        for other in others:
            total += other
        total /= torch.tensor(float(self.transport.world), dtype=torch.float32)
        return total.to(dtype)

    def _sparse_mean(self, tensor: Tensor, step: int, bucket: int) -> Tensor:
        """Return the mean of sparse tensors: everybody gets everybody's entries."""
        mine = tensor.coalesce()
        indices = self.all_gather_bytes(mine.indices(), step, bucket)
        values = self.all_gather_bytes(mine.values(), step, bucket)
        total = torch.sparse_coo_tensor(
            torch.cat(
                [
                    i.clone().view(torch.int64).view(mine.sparse_dim(), -1)
                    for i in indices
                ],
                dim=1,
            ),
            torch.cat(
                [
                    v.clone().view(mine.dtype).view(-1, *mine.values().shape[1:])
                    for v in values
                ]
            ),
            mine.shape,
            check_invariants=True,  # the indices came from other ranks
        ).coalesce()
        return (total / self.transport.world).to(tensor.device)

    def collect(self, data: Tensor) -> list[Tensor]:
        """Return every rank's bytes on rank 0, nothing elsewhere; collective.

        Args:
            data: uint8[*].
        """
        step, bucket = self.aside()
        parts = [data, *(data[:0] for _ in range(1, self.transport.world))]
        with self.exchanging(0, step, bucket):
            arrived = self.all_to_all_bytes(parts, step, bucket)
        return arrived if self.transport.rank == 0 else []

    def aside(self) -> tuple[int, int]:
        """Return (step, bucket) of an exchange that belongs to no step."""
        self._asides += 1
        return self._asides, ASIDE_BUCKET

    def _sealed(self, data: Tensor, step: int, bucket: int) -> Tensor:
        buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        body = data.contiguous().view(-1).view(torch.uint8)
        message = torch.cat([buffer, body.cpu()])
        return seal(message, self._tag(self.transport.rank, step, bucket))

    def _unsealed(
        self, arrived: Sequence[Tensor], step: int, bucket: int
    ) -> list[Tensor]:
        return [
            unseal(message, self._tag(sender, step, bucket))[0]
            for sender, message in enumerate(arrived)
        ]

    def _tag(self, sender: int, step: int, bucket: int) -> Tag:
        return Tag(sender, step, bucket, self._plan)


def sum_of(chunks: Sequence[Tensor]) -> Tensor:
    """Return the sum of raw pieces, in rank order: float sums depend on it."""
    total = torch.zeros(chunks[0].numel() // 4, dtype=torch.float32)
    for chunk in chunks:
        total += floats(chunk)
    return total


def floats(chunk: Tensor) -> Tensor:
    """Return a raw piece as float32[*]; it may start at any byte."""
    return chunk.clone().view(torch.float32)
