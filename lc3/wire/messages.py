"""Gradients as messages between ranks, and back: frames, entropy stage, seal, meter."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from lc3.budget import Budget
from lc3.config import EntropyStage
from lc3.errors import Lc3Error
from lc3.format import HEADER_BYTES, Tag
from lc3.meter import Direction
from lc3.plan import Piece, Plan
from lc3.wire.coder import Coder
from lc3.wire.message import pack, unpack

T = TypeVar("T")


class Messages:
    """Makes messages of this rank's pieces, and checks those that came.

    Args:
        plan: its fingerprint is in every message.
        coder: makes the frames.
        rank: of the sender, in the exchange.
        entropy: the stage, see ``Config``.
        budget: says the density.
    """

    def __init__(
        self,
        plan: Plan,
        coder: Coder,
        rank: int,
        entropy: EntropyStage,
        budget: Budget,
    ) -> None:
        self.coder = coder
        self._fingerprint = plan.fingerprint
        self._rank = rank
        self._entropy = entropy
        self._budget = budget
        self._made: tuple[Tensor, list[Tensor]] | None = None  # for this rank itself

    def make(
        self,
        pieces: Sequence[Sequence[Piece]],
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        sparsity: float,
        direction: Direction,
        step: int,
        bucket: int,
        sources: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Return a message, uint8[*], for each list of pieces.

        A piece whose values are all zero (a parameter unused on this rank, or on every
        rank) says nothing and keeps its residual: DDP may throw the result away.

        Args:
            pieces: by message, coded and raw ones.
            values: of all of them in a row, float32[piece] each, contiguous. Coded ones
                become the residuals to be.
            residuals: float32[piece] of each coded piece, or ``None``.
            sparsity: see ``Codec.encode``.
            direction: counts what is sent.
            step: see ``Exchange.all_reduce``.
            bucket: see ``Exchange.all_reduce``.
            sources: of every piece what ``values`` are to be, if they are not yet:
                float32, float16 or bfloat16[piece]; or none.
        """
        everything = [piece for some in pieces for piece in some]
        sources = sources or [None] * len(everything)
        left = iter(
            self.encode(everything, values, residuals, sparsity, direction, sources)
        )
        parts = [[next(left) for _ in some] for some in pieces]
        messages = self.pack(
            pieces, parts, direction, Tag(self._rank, step, bucket, self._fingerprint)
        )
        mine = self._rank if len(pieces) > 1 else 0
        self._made = messages[mine], parts[mine]
        return messages

    def encode(
        self,
        pieces: Sequence[Piece],
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        sparsity: float,
        direction: Direction,
        sources: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Return each piece's bytes, uint8[*], until the next call; see ``make``."""
        coded = [i for i, piece in enumerate(pieces) if piece.coded]
        frames = self.coder.encode(
            [values[i] for i in coded],
            [residuals[i] for i in coded],
            sparsity,
            self._budget.density,
            [sources[i] for i in coded],
        )
        raw = [i for i, piece in enumerate(pieces) if not piece.coded]
        for i in raw:
            if (source := sources[i]) is not None:
                values[i].copy_(source)
        plain = self.coder.to_host([values[i] for i in raw]) if raw else []
        chunks = dict(zip(raw, plain, strict=True))
        for i, (frame, nonzero) in zip(coded, frames, strict=True):
            chunks[i] = frame
            piece = pieces[i]
            direction.add_frame(piece.name, piece.numel, frame.numel(), nonzero)
        for i in raw:
            direction.raw_bytes[pieces[i].name] += chunks[i].numel()
        return [chunks[i] for i in range(len(pieces))]

    def pack(
        self,
        pieces: Sequence[Sequence[Piece]],
        chunks: Sequence[Sequence[Tensor]],
        direction: Direction,
        tag: Tag,
    ) -> list[Tensor]:
        """Return a message of each list of pieces and of their bytes; see ``make``."""
        packed = self._map(
            lambda index: pack(pieces[index], chunks[index], tag, self._entropy), pieces
        )
        messages, raw_saved, coded_saved = [], 0, 0
        for one in packed:
            messages.append(one.message)
            raw_saved += one.raw_saved_bytes
            coded_saved += one.coded_saved_bytes
        direction.add_messages(HEADER_BYTES * len(packed), raw_saved, coded_saved)
        return messages

    def unpack(
        self,
        arrived: Sequence[Tensor],
        pieces: Sequence[Sequence[Piece]],
        step: int,
        bucket: int,
    ) -> list[list[Tensor]]:
        """Return by sender the checked bytes of each of its pieces; see ``unpack``."""
        return self._map(
            lambda sender: self._read(
                sender, arrived[sender], pieces[sender], step, bucket
            ),
            pieces,
        )

    def _read(
        self,
        sender: int,
        message: Tensor,
        pieces: Sequence[Piece],
        step: int,
        bucket: int,
    ) -> list[Tensor]:
        """Return the bytes of each piece of a message, or of this rank's own."""
        if self._made is not None and message is self._made[0]:
            return self._made[1]  # it has not travelled
        tag = Tag(sender, step, bucket, self._fingerprint)
        return unpack(message, tag, pieces, self.coder.host)

    def readable(
        self,
        arrived: Sequence[Tensor],
        pieces: Sequence[Piece],
        step: int,
        bucket: int,
    ) -> list[list[Tensor] | Lc3Error]:
        """Return by sender the bytes of each piece, or why they cannot be read."""

        def read(sender: int) -> list[Tensor] | Lc3Error:
            try:
                return self._read(sender, arrived[sender], pieces, step, bucket)
            except Lc3Error as error:
                return error

        return self._map(read, [pieces] * len(arrived))

    def _map(
        self, work: Callable[[int], T], pieces: Sequence[Sequence[Piece]]
    ) -> list[T]:
        """Return what is to be made of each list of pieces, on the coding threads."""
        if self.coder.threads == 1:
            return [work(index) for index in range(len(pieces))]
        weights = [sum([piece.numel for piece in some]) for some in pieces]
        return self.coder.map(work, weights)
