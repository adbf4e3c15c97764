"""The entropy stage: frames and raw pieces of a message as one zstd frame, lossless.

Quartic bytes with folded zero runs cost about twice the entropy of their digits. zstd's
Huffman coder takes most of that off at many times the speed of the quantizer. Level 1:
lower levels do not entropy-code at all, higher ones are slower and find nothing more.
"""

import threading
from collections.abc import Sequence

import torch
import zstandard
from torch import Tensor

from lc3.errors import FormatError
from lc3.format import ZSTD_MAGIC

LEVEL = 1
AUTO_MIN_BYTES = 128  # of a body; shorter ones hardly shrink (measured)
MAX_WINDOW_BYTES = 1 << 19  # what zstd reserves for a frame that is never one of ours


class _Contexts(threading.local):
    """One compressor and one decompressor a thread, made at its first use."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(
    parts: Sequence[Sequence[Tensor]], free_before: int
) -> tuple[Tensor, list[int]]:
    """Return the parts as one zstd frame, each in blocks (and code tables) of its own.

    Args:
        parts: each a sequence of uint8[*], contiguous, on the CPU.
        free_before: bytes to leave free before the frame.

    Returns:
        A new uint8[free_before + the sum of the sizes]: the free bytes, then the frame.
        The size of each part in it.
    """
    size = sum(chunk.numel() for chunks in parts for chunk in chunks)
    stream = _contexts.compressor.compressobj(size=size)
    pieces, sizes = [bytes(free_before)], []
    for index, chunks in enumerate(parts):
        written = [stream.compress(_bytes_of(chunk)) for chunk in chunks]
        last = index == len(parts) - 1
        written.append(
            stream.flush(
                zstandard.COMPRESSOBJ_FLUSH_FINISH
                if last
                else zstandard.COMPRESSOBJ_FLUSH_BLOCK
            )
        )
        pieces += written
        sizes.append(sum(map(len, written)))
    return torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8), sizes


def is_compressed(data: Tensor) -> bool:
    """Whether uint8[*] begins like a zstd frame. No 3LC frame does."""
    return data[: len(ZSTD_MAGIC)].numpy().tobytes() == ZSTD_MAGIC


def decompress(data: Tensor, max_bytes: int) -> Tensor:
    """Return what one zstd frame, uint8[*], holds: uint8[≤ max_bytes].

    Nothing is reserved before the frame's header says that it fits.

    Raises:
        FormatError: it is not one whole zstd frame that says its size, or holds more
            than ``max_bytes``.
    """
    view = _bytes_of(data)
    if not is_compressed(data):
        raise FormatError(
            f"{len(view)} bytes said to be a zstd frame do not start like one"
        )
    try:
        header = zstandard.get_frame_parameters(view)
        if header.content_size > max_bytes:  # "unknown" is the largest number
            raise FormatError(
                f"a zstd frame announces {header.content_size} bytes, but at most "
                f"{max_bytes} are due; do both ranks use the same plan?"
            )
        if header.window_size > max(MAX_WINDOW_BYTES, header.content_size):
            raise FormatError(
                f"a zstd frame of {header.content_size} bytes asks for a window of "
                f"{header.window_size}; lc3 writes no such frame"
            )
        content = _contexts.decompressor.decompress(
            view, max_output_size=header.content_size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise FormatError(f"the zstd frame is damaged: {error}") from error
    if not content:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes_of(data: Tensor) -> memoryview:
    return memoryview(data.numpy())  # type: ignore[arg-type]  # a buffer since 3.12
