"""The codec as the paper states it, in NumPy: slow, obvious, the specification in code.

Each function is one section of the specification in ``lc3.format``.
Source: Lim, Andersen, Kaminsky, "3LC", MLSys 2019 (arXiv 1802.07389).
"""

from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec import Encoded
from lc3.codec.density import choose, sample_stride
from lc3.errors import FormatError
from lc3.format import (
    FLOAT32_MAX,
    NAN_SCALE,
    RUN_BASE,
    RUN_MAX,
    RUN_MIN,
    SCALE_BYTES,
    ZERO_BYTE,
    ZERO_SCALE,
    has_body,
    max_frame_bytes,
    quartic_bytes,
)

__all__ = ["add", "check", "encode", "max_frame_bytes"]

Floats = NDArray[np.float32]
Digits = NDArray[np.int8]


def encode(
    x: Tensor,
    sparsity: float,
    out: Tensor,
    residual: Tensor | None = None,
    density: float | None = None,
    source: Tensor | None = None,
) -> Encoded:
    """See ``lc3.codec.Codec.encode``."""
    if source is not None:
        x.copy_(source)
    values = x.numpy()
    if residual is not None:
        nothing = not values.any()
        with np.errstate(over="ignore", invalid="ignore"):
            values += residual.numpy()
        if nothing:
            return _write(ZERO_SCALE, out)
    if not np.isfinite(values).all():
        return _write(NAN_SCALE, out)
    scale = scale_of(values, sparsity)
    if scale == 0:
        return _write(ZERO_SCALE, out)
    threshold = scale * np.float32(0.5)
    if density is not None:
        magnitudes = np.abs(values)
        sample = magnitudes[:: sample_stride(values.size)]
        threshold, scale = choose(sample, density, magnitudes.max())
    digits = digits_of(values, threshold)
    values -= digits.astype(np.float32) * scale
    frame = scale.tobytes() + fold(quartic(digits))
    return _write(frame, out, int(np.count_nonzero(digits)))


def check(frame: Tensor, numel: int) -> int:
    """See ``lc3.codec.Codec.check``."""
    data = frame.numpy().tobytes()
    if not has_body(data):
        return SCALE_BYTES
    bytes_, used = unfold(data[SCALE_BYTES:], quartic_bytes(numel))
    digits_from(bytes_, numel)
    return SCALE_BYTES + used


def add(frame: Tensor, acc: Tensor) -> None:
    """See ``lc3.codec.Codec.add``."""
    data, values = frame.numpy().tobytes(), acc.numpy()
    scale = np.frombuffer(data[:SCALE_BYTES], "<f4")[0]
    if has_body(data):
        bytes_, _ = unfold(data[SCALE_BYTES:], quartic_bytes(values.size))
        digits = digits_from(bytes_, values.size)
        values[digits != 0] += digits[digits != 0].astype(np.float32) * scale
    elif np.isnan(scale):
        values[:] = np.nan


def scale_of(values: Floats, sparsity: float) -> np.float32:
    """Return the largest magnitude times s, capped at the largest finite float32."""
    with np.errstate(over="ignore"):
        scale = np.abs(values).max(initial=np.float32(0)) * np.float32(sparsity)
    return min(scale, np.float32(FLOAT32_MAX))


def digits_of(values: Floats, threshold: np.float32) -> Digits:
    """Return −1, 0 or 1; at half the scale, ``round_half_even(value / scale)``."""
    return (values > threshold).astype(np.int8) - (values < -threshold).astype(np.int8)


def quartic(digits: Digits) -> NDArray[np.uint8]:
    """Return five digits a byte, taken from five equal consecutive partitions."""
    length = quartic_bytes(digits.size)
    padded = np.ones(5 * length, np.int64)
    padded[: digits.size] = digits + 1
    weights = np.array([81, 27, 9, 3, 1])
    return (weights @ padded.reshape(5, length)).astype(np.uint8)


def fold(bytes_: NDArray[np.uint8]) -> bytes:
    """Replace runs of 2 to 14 zero bytes by one byte each, cutting longer ones."""
    folded = bytearray()
    for byte, group in groupby(bytes_.tolist()):
        count = len(list(group))
        if byte != ZERO_BYTE:
            folded += bytes([byte]) * count
            continue
        folded += bytes([RUN_BASE + RUN_MAX - RUN_MIN]) * (count // RUN_MAX)
        rest = count % RUN_MAX
        if rest >= RUN_MIN:
            folded.append(RUN_BASE + rest - RUN_MIN)
        elif rest == 1:
            folded.append(ZERO_BYTE)
    return bytes(folded)


def unfold(folded: bytes, length: int) -> tuple[NDArray[np.uint8], int]:
    """Return ``length`` quartic bytes and how many folded bytes they were read from."""
    bytes_: list[int] = []
    used = 0
    while len(bytes_) < length:
        if used == len(folded):
            raise FormatError(
                f"frame ends after {len(bytes_)} of {length} quartic bytes; was it cut?"
            )
        byte = folded[used]
        run = byte - RUN_BASE + RUN_MIN if byte >= RUN_BASE else 1
        bytes_ += [ZERO_BYTE if byte >= RUN_BASE else byte] * run
        used += 1
    if len(bytes_) > length:
        raise FormatError(
            f"a zero run crosses the end of a frame of {length} quartic bytes; do both "
            "ranks use the same plan?"
        )
    return np.array(bytes_, np.uint8), used


def digits_from(bytes_: NDArray[np.uint8], numel: int) -> Digits:
    """Return the digits −1, 0, 1 of quartic bytes, without the padding."""
    powers = np.array([81, 27, 9, 3, 1])[:, None]
    digits: Digits = (bytes_ // powers % 3).astype(np.int8).reshape(-1) - np.int8(1)
    if digits[numel:].any():
        raise FormatError(
            f"padding behind the {numel} values of a frame is not zero; do both ranks "
            "use the same plan?"
        )
    return digits[:numel]


def _write(frame: bytes, out: Tensor, nonzero_digits: int = 0) -> Encoded:
    out[: len(frame)] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    return Encoded(len(frame), nonzero_digits)
