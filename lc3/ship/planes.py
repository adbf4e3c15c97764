"""Exact coding: the bytes of all elements in planes, each as small as zstd makes it.

The exponents of trained weights take few values, the last digits any; apart, the first
compress and the others cost no time. Between two checkpoints of one training most of an
element does not change, so a delta leaves small numbers. The bytes are specified in
``lc3.ship.format``.
"""

from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec.compiled import kernel
from lc3.errors import FormatError
from lc3.ship import static
from lc3.ship.format import Reader, varint

Bytes = NDArray[np.uint8]
CHUNK = 1 << 17  # elements
_RAW, _ZSTD, _CONSTANT, _RANS = range(4)
_WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_LEVEL = 1
_SAMPLE = 1 << 14  # bytes


def encode(tensor: Tensor, base: Tensor | None) -> bytes:
    """Return a tensor's section.

    Args:
        tensor: of any dtype of the format, on the CPU.
        base: of the same dtype and shape, that the receiver has; ``None``: nothing.
    """
    words = _words(tensor)
    others = None if base is None else _words(base)
    rotated, signed = _kind(tensor.dtype)
    width = words.dtype.itemsize
    planes = np.empty((width, min(CHUNK, words.size)), np.uint8)
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    parts = []
    for start in range(0, words.size, CHUNK):
        chunk = words[start : start + CHUNK]
        if others is None and width == 2:
            _split_2(chunk, rotated, planes[0], planes[1])
        elif others is None and width == 4:
            _split_4(chunk, rotated, *planes)
        elif others is None:
            _split(chunk, rotated, planes)
        else:
            other = others[start : start + CHUNK]
            _split_difference(chunk, other, rotated, signed, planes)
        parts += [_smallest(plane[: chunk.size], compressor) for plane in planes]
    return b"".join(parts)


def decode(
    data: bytes | memoryview,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    base: Tensor | None,
) -> Tensor:
    """Return the tensor of a section.

    Args:
        data: the section.
        dtype: that the index says.
        shape: that the index says.
        base: of the same dtype and shape; ``None``: the section is not relative.

    Raises:
        FormatError: it is no section of such a tensor.
    """
    tensor = torch.empty(shape, dtype=dtype)
    words = _words(tensor)
    others = None if base is None else _words(base)
    reader = Reader(data, "a section of planes")
    rotated, signed = _kind(dtype)
    width = words.dtype.itemsize
    for start in range(0, words.size, CHUNK):
        chunk = words[start : start + CHUNK]
        planes = [_plane(reader, chunk.size) for _ in range(width)]
        for plane in planes:
            plane.flags.writeable = False  # one type, one machine code
        if others is not None:
            other = others[start : start + CHUNK]
            _join_difference(np.stack(planes), other, rotated, signed, chunk)
        elif width == 2:
            _join_2(planes[0], planes[1], rotated, chunk)
        elif width == 4:
            _join_4(planes[0], planes[1], planes[2], planes[3], rotated, chunk)
        else:
            _join(np.stack(planes), rotated, chunk)
    reader.ends()
    if dtype == torch.bool and words.size and words.max() > 1:
        raise FormatError("a bool of a section is neither 0 nor 1")
    return tensor


def compressed(data: Bytes, level: int = 3) -> bytes:
    """Return bytes as one zstd frame that says its content size."""
    return zstandard.ZstdCompressor(level=level).compress(data.data)


def decompress(data: memoryview, size: int) -> Bytes:
    """Return the content of a zstd frame, which must have this size.

    Raises:
        FormatError: it is damaged, or of another size.
    """
    try:
        parameters = zstandard.get_frame_parameters(data)
        if parameters.content_size != size:
            raise FormatError(
                f"a zstd frame says {parameters.content_size} bytes of content where "
                f"{size} are due"
            )
        content = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"a zstd frame is damaged: {error}") from error
    return np.frombuffer(content, np.uint8)


def _smallest(chunk: Bytes, compressor: zstandard.ZstdCompressor) -> bytes:
    """Return a chunk in the mode that takes fewest bytes, or is likely to.

    zstd goes through all of a chunk only if it is worth it on the beginning.
    """
    counts = static.histogram(chunk)
    if counts.max() == chunk.size:
        return bytes([_CONSTANT, 1, int(chunk[0])])
    mode, coded = _RAW, chunk.tobytes()
    expected = static.expected_bytes(counts)
    sample = chunk[:_SAMPLE]
    tried = len(compressor.compress(sample.data)) / sample.size
    if tried < 0.98 * min(1.0, expected / chunk.size):
        mode, coded = _ZSTD, compressor.compress(chunk.data)
    if expected < min(len(coded), chunk.size):
        mode, coded = _RANS, static.encode(chunk, counts)
    if len(coded) < chunk.size:
        return bytes([mode]) + varint(len(coded)) + coded
    return bytes([_RAW]) + varint(chunk.size) + chunk.tobytes()


def _plane(reader: Reader, size: int) -> Bytes:
    """Return the next plane of a chunk, uint8[size]."""
    mode = reader.byte()
    data = reader.bytes(reader.varint())
    if mode == _ZSTD:
        return decompress(data, size)
    if mode == _RANS:
        return static.decode(data, size)
    if mode == _RAW and len(data) == size:
        return np.frombuffer(data, np.uint8)
    if mode == _CONSTANT and len(data) == 1:
        return np.full(size, data[0], np.uint8)
    raise FormatError(
        f"a chunk of mode {mode} and {len(data)} bytes does not hold {size}"
    )


def _words(tensor: Tensor) -> NDArray[Any]:
    """Return an unsigned view of a tensor's memory: of a complex one both halves."""
    width = tensor.dtype.itemsize // (2 if tensor.is_complex() else 1)
    return bytes_of(tensor).view(_WORDS[width])


def bytes_of(tensor: Tensor) -> Bytes:
    """Return uint8[nbytes], the memory of a contiguous tensor on the CPU."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    """Return whether elements have exponents, and whether they are signed."""
    floating = dtype.is_floating_point or dtype.is_complex
    return floating, dtype.is_signed


@kernel()
def _split(words: Any, rotated: bool, planes: Bytes) -> None:
    """Write byte k of each word to plane k."""
    width = planes.shape[0]
    top = 8 * width - 1
    for i in range(words.size):
        word = np.uint64(words[i])
        if rotated:
            word = (word << np.uint64(1)) | (word >> np.uint64(top))
        for k in range(width):
            planes[k, i] = np.uint8((word >> np.uint64(8 * k)) & np.uint64(255))


@kernel()
def _split_2(words: Any, rotated: bool, low: Bytes, high: Bytes) -> None:
    """Be ``_split`` to two planes, at the speed of memory."""
    turn = np.uint32(1) if rotated else np.uint32(0)
    for i in range(words.size):
        word = np.uint32(words[i])
        word = (word << turn) | (turn & (word >> np.uint32(15)))
        low[i] = np.uint8(word & np.uint32(255))
        high[i] = np.uint8((word >> np.uint32(8)) & np.uint32(255))


@kernel()
def _split_4(words: Any, rotated: bool, a: Bytes, b: Bytes, c: Bytes, d: Bytes) -> None:
    """Be ``_split`` to four planes, at the speed of memory."""
    turn = np.uint32(1) if rotated else np.uint32(0)
    for i in range(words.size):
        word = np.uint32(words[i])
        word = (word << turn) | (turn & (word >> np.uint32(31)))
        a[i] = np.uint8(word & np.uint32(255))
        b[i] = np.uint8((word >> np.uint32(8)) & np.uint32(255))
        c[i] = np.uint8((word >> np.uint32(16)) & np.uint32(255))
        d[i] = np.uint8(word >> np.uint32(24))


@kernel()
def _join(planes: Bytes, rotated: bool, words: Any) -> None:
    """Be the inverse of ``_split``."""
    width = planes.shape[0]
    top = np.uint64(8 * width - 1)
    for i in range(words.size):
        word = np.uint64(0)
        for k in range(width):
            word |= np.uint64(planes[k, i]) << np.uint64(8 * k)
        if rotated:
            word = (word >> np.uint64(1)) | ((word & np.uint64(1)) << top)
        words[i] = word


@kernel()
def _join_2(low: Bytes, high: Bytes, rotated: bool, words: Any) -> None:
    """Be ``_join`` of two planes, at the speed of memory."""
    turn = np.uint32(1) if rotated else np.uint32(0)
    for i in range(words.size):
        word = np.uint32(low[i]) | (np.uint32(high[i]) << np.uint32(8))
        words[i] = (word >> turn) | ((word & turn) << np.uint32(15))


@kernel()
def _join_4(a: Bytes, b: Bytes, c: Bytes, d: Bytes, rotated: bool, words: Any) -> None:
    """Be ``_join`` of four planes, at the speed of memory."""
    turn = np.uint32(1) if rotated else np.uint32(0)
    for i in range(words.size):
        word = (
            np.uint32(a[i])
            | (np.uint32(b[i]) << np.uint32(8))
            | (np.uint32(c[i]) << np.uint32(16))
            | (np.uint32(d[i]) << np.uint32(24))
        )
        words[i] = (word >> turn) | ((word & turn) << np.uint32(31))


@kernel(inline="always")
def _ordered(word: np.uint64, top: np.uint64, floating: bool, signed: bool) -> Any:
    """Return a word that compares as the number it stands for."""
    highest = np.uint64(1) << top
    if not signed:
        return word
    if floating and word & highest:
        return ~word & (highest | (highest - np.uint64(1)))
    return word ^ highest


@kernel()
def _split_difference(
    words: Any, base: Any, floating: bool, signed: bool, planes: Bytes
) -> None:
    """Write the bytes of what changed, small where little did."""
    width = planes.shape[0]
    top = np.uint64(8 * width - 1)
    highest = np.uint64(1) << top
    mask = highest | (highest - np.uint64(1))
    for i in range(words.size):
        new = _ordered(np.uint64(words[i]), top, floating, signed)
        old = _ordered(np.uint64(base[i]), top, floating, signed)
        difference = (new - old) & mask
        folded = (difference << np.uint64(1)) & mask
        if difference & highest:
            folded = ~folded & mask
        for k in range(width):
            planes[k, i] = np.uint8((folded >> np.uint64(8 * k)) & np.uint64(255))


@kernel()
def _join_difference(
    planes: Bytes, base: Any, floating: bool, signed: bool, words: Any
) -> None:
    """Be the inverse of ``_split_difference``."""
    width = planes.shape[0]
    top = np.uint64(8 * width - 1)
    highest = np.uint64(1) << top
    mask = highest | (highest - np.uint64(1))
    for i in range(words.size):
        folded = np.uint64(0)
        for k in range(width):
            folded |= np.uint64(planes[k, i]) << np.uint64(8 * k)
        difference = folded >> np.uint64(1)
        if folded & np.uint64(1):
            difference = ~difference & mask
        old = _ordered(np.uint64(base[i]), top, floating, signed)
        new = (old + difference) & mask
        if not signed:
            words[i] = new
        elif floating and not new & highest:
            words[i] = ~new & mask
        else:
            words[i] = new ^ highest
