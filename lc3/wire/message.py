"""All pieces that one rank sends to one rank for one bucket, as bytes and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lc3.codec import Codec
from lc3.config import EntropyStage
from lc3.errors import FormatError
from lc3.format import (
    FLAG_ENTROPY_CODED,
    HEADER_BYTES,
    MAGIC,
    MAGIC_RANGE_CODED,
    Tag,
    seal,
    unseal,
)
from lc3.plan import Piece
from lc3.wire import rans
from lc3.wire.entropy import AUTO_MIN_BYTES, compress, decompress


@dataclass(frozen=True, slots=True)
class Packed:
    """A message, uint8[*], and what its entropy stage saved of each kind of piece."""

    message: Tensor
    raw_saved_bytes: int = 0
    coded_saved_bytes: int = 0


def pack(
    pieces: Sequence[Piece],
    chunks: Sequence[Tensor],
    tag: Tag,
    entropy: EntropyStage,
) -> Packed:
    """Return the message, entropy-coded where that makes it smaller.

    Args:
        pieces: the pieces, in plan order.
        chunks: the bytes of each piece, uint8[*]: a frame or raw values.
        tag: the tag of the header.
        entropy: the stage, see ``Config``.
    """
    size = sum([chunk.numel() for chunk in chunks])
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    if entropy != "none" and (entropy != "auto" or size >= AUTO_MIN_BYTES):
        both = list(zip(pieces, chunks, strict=True))
        raw = [chunk for piece, chunk in both if not piece.coded]
        coded = [chunk for piece, chunk in both if piece.coded]
        if entropy == "rans":
            numels = [piece.numel for piece in pieces if piece.coded]
            parts = [_raw_part(raw), rans.compress(coded, numels)]
            smaller = torch.cat([buffer, *parts])
            raw_bytes, coded_bytes = (part.numel() for part in parts)
        else:
            smaller, (raw_bytes, coded_bytes) = compress((raw, coded), HEADER_BYTES)
        if smaller.numel() < HEADER_BYTES + size:
            magic = MAGIC_RANGE_CODED if entropy == "rans" else MAGIC
            return Packed(
                seal(smaller, tag, FLAG_ENTROPY_CODED, magic),
                sum(chunk.numel() for chunk in raw) - raw_bytes,
                sum(chunk.numel() for chunk in coded) - coded_bytes,
            )
    return Packed(seal(torch.cat([buffer, *chunks]), tag))


def _raw_part(raw: Sequence[Tensor]) -> Tensor:
    """Return the raw pieces, uint8[*] each, as a range-coded body begins with them."""
    size = sum(chunk.numel() for chunk in raw)
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    smaller, _ = compress([raw], 4)
    part = smaller if smaller.numel() < 4 + size else torch.cat([smaller[:4], *raw])
    part[:4] = torch.tensor([part.numel() - 4], dtype=torch.int32).view(torch.uint8)
    return part


def _take_raw_part(body: Tensor, raw_bytes: int) -> tuple[Tensor, Tensor]:
    """Return the raw pieces of a range-coded body, and what follows them."""
    if raw_bytes == 0:
        return body[:0], body
    if body.numel() < 4:
        raise FormatError(f"a body of {body.numel()} bytes ends in a size")
    size = int.from_bytes(body[:4].numpy().tobytes(), "little")
    part, rest = body[4 : 4 + size], body[4 + size :]
    if part.numel() < size:
        raise FormatError(f"raw pieces of {size} bytes end after {part.numel()}")
    return part if size == raw_bytes else decompress(part, raw_bytes), rest


def unpack(
    message: Tensor, tag: Tag, pieces: Sequence[Piece], codec: Codec
) -> list[Tensor]:
    """Check a message and return of each piece its bytes, uint8[*], in the same order.

    Frames are checked, raw pieces have four bytes a value.

    Args:
        message: uint8[*], as it arrived.
        tag: the tag that its header must have.
        pieces: the pieces that it must hold, in plan order.
        codec: checks the frames.

    Raises:
        FormatError: it is damaged or belongs to another exchange.
        PlanMismatch: its sender works by another plan.
        PeerError: its sender stopped.
    """
    body, coding = unseal(message, tag)
    try:
        return _chunks_of(body, coding, pieces, codec)
    except FormatError as error:
        raise FormatError(f"message from {tag}: {error}") from error


def _chunks_of(
    body: Tensor, coding: str, pieces: Sequence[Piece], codec: Codec
) -> list[Tensor]:
    """Return of each piece in a body its bytes, checked."""
    raw = [piece for piece in pieces if not piece.coded]
    raw_bytes = sum([4 * piece.numel for piece in raw])
    if coding == "none":  # both kinds in one row
        values = frames = body
        rows = [(body, pieces)]
    else:
        coded = [piece for piece in pieces if piece.coded]
        if coding == "rans":
            values, rest = _take_raw_part(body, raw_bytes)
            frames = rans.decompress(rest, [piece.numel for piece in coded])
        else:
            most = raw_bytes + sum([codec.max_frame_bytes(p.numel) for p in coded])
            data = decompress(body, most)
            values, frames = data[:raw_bytes], data[raw_bytes:]
        rows = [(values, raw), (frames, coded)]
    found: list[list[Tensor]] = []
    for data, some in rows:
        if (chunks := _split(data, some, codec)) is None:
            break
        found.append(chunks)
    if len(found) < len(rows):
        read = _Cursor(frames)
        read_raw = read if values is frames else _Cursor(values)
        return _one_by_one(read_raw, read, pieces, codec)
    if not raw or coding == "none":
        return found[-1]
    of_raw, of_coded = map(iter, found)
    return [next(of_coded if piece.coded else of_raw) for piece in pieces]


def _split(data: Tensor, pieces: Sequence[Piece], codec: Codec) -> list[Tensor] | None:
    """Return of each of some pieces in a row its bytes, checked, by one call.

    ``None``: something is wrong, or the codec has no such call.
    """
    check_all = getattr(codec, "check_all", None)
    if check_all is None:
        return None
    numels = [piece.numel for piece in pieces]
    sizes = check_all(data, numels, [piece.coded for piece in pieces])
    if sizes is None or sum(sizes) != data.numel():
        return None
    return list(torch.split(data, sizes)) if sizes else []


def _one_by_one(
    raw: "_Cursor", frames: "_Cursor", pieces: Sequence[Piece], codec: Codec
) -> list[Tensor]:
    """Return of each piece its bytes, checked, or say what is wrong with which.

    ``raw`` and ``frames`` are one where both kinds are in one row.
    """
    chunks = []
    for piece in pieces:
        if piece.coded:
            chunks.append(frames.skip(codec.check(frames.left, piece.numel)))
            continue
        chunks.append(raw.skip(4 * piece.numel))
        if chunks[-1].numel() != 4 * piece.numel:
            raise FormatError(
                f"it ends {4 * piece.numel - chunks[-1].numel()} bytes inside a "
                f"raw piece of {piece.numel} values; do both ranks use the same "
                "plan?"
            )
    if left := max(raw.left.numel(), frames.left.numel()):
        raise FormatError(
            f"{left} bytes are left behind the last piece; do both ranks use the "
            "same plan?"
        )
    return chunks


@dataclass
class _Cursor:
    """Bytes, uint8[*], that are read from the front."""

    left: Tensor

    def skip(self, count: int) -> Tensor:
        """Return the next bytes, ``count`` of them or what is left."""
        skipped, self.left = self.left[:count], self.left[count:]
        return skipped
