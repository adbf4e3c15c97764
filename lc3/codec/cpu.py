"""The same bytes as ``reference``, from Numba: two passes over the values.

Pass 1 finds the largest magnitude. Pass 2 compares and packs a block of bytes that
stays in the cache, then folds zero runs, and touches the residual only where a digit is
not 0. Kernels release the GIL; their machine code is cached on disk. No fast-math:
every float operation is the float32 operation of the specification.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

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
    quartic_bytes,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_BLOCK = 4096
_INFINITY_BITS = np.int32(0x7F800000)
_POWERS = np.array([81, 27, 9, 3, 1])
_DIGITS = (np.arange(243)[:, None] // _POWERS % 3 - 1).astype(np.int8)

_OK = 0
_ENDS_EARLY = 1
_RUN_CROSSES = 2
_PADDING = 3


def encode(x: Tensor, sparsity: float, out: Tensor) -> int:
    """See ``lc3.codec.Codec.encode``."""
    values, frame = x.numpy(), out.numpy()
    largest = _max_magnitude_bits(values.view(np.int32))
    if largest >= _INFINITY_BITS:
        frame[:SCALE_BYTES] = np.frombuffer(NAN_SCALE, np.uint8)
        return SCALE_BYTES
    if largest == 0:
        frame[:SCALE_BYTES] = np.frombuffer(ZERO_SCALE, np.uint8)
        return SCALE_BYTES
    with np.errstate(over="ignore"):
        scale = np.int32(largest).view(np.float32) * np.float32(sparsity)
    scale = np.minimum(scale, np.float32(FLOAT32_MAX))
    frame[:SCALE_BYTES].view(np.float32)[0] = scale
    return SCALE_BYTES + int(_pack(values, scale, frame[SCALE_BYTES:]))


def decode_add(frame: Tensor, acc: Tensor) -> int:
    """See ``lc3.codec.Codec.decode_add``."""
    data, values = frame.numpy(), acc.numpy()
    if data.size < SCALE_BYTES:
        raise FormatError(
            f"{data.size} bytes are too few for a frame's scale of 4 bytes"
        )
    scale = data[:SCALE_BYTES].view(np.float32)[0]
    if data[:SCALE_BYTES].tobytes() == ZERO_SCALE:
        return SCALE_BYTES
    if np.isnan(scale):
        values.fill(np.nan)
        return SCALE_BYTES
    if not (np.isfinite(scale) and scale > 0):
        raise FormatError(
            f"scale {scale} of a frame must be 0, NaN, or finite and positive"
        )
    body = data[SCALE_BYTES:]
    problem, used, unfolded = _check(body, values.size)
    if problem == _ENDS_EARLY:
        raise FormatError(
            f"frame ends after {unfolded} of {quartic_bytes(values.size)} quartic "
            "bytes; was it cut?"
        )
    if problem == _RUN_CROSSES:
        raise FormatError(
            f"a zero run crosses the end of a frame of {quartic_bytes(values.size)} "
            "quartic bytes; do both ranks use the same plan?"
        )
    if problem == _PADDING:
        raise FormatError(
            f"padding behind the {values.size} values of a frame is not zero; do both "
            "ranks use the same plan?"
        )
    _add(body[:used], scale, values)
    return SCALE_BYTES + int(used)


@njit(nogil=True, cache=True)
def _max_magnitude_bits(bits: NDArray[np.int32]) -> np.int32:
    """Return the largest bit pattern without its sign: ordered like the magnitudes.

    Infinity and NaN are the patterns from 0x7f800000 on, so one integer maximum is both
    the finiteness check and the maximum.
    """
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return largest


@njit(nogil=True, cache=True)
def _pack(x: Floats, scale: np.float32, body: Bytes) -> int:
    """Write the folded quartic bytes of ``x``, take them off x, return their number."""
    n = x.size
    length = (n + 4) // 5
    full = max(0, n - 4 * length)  # bytes below this index have no padding
    half = np.float32(scale * np.float32(0.5))
    quartic = np.empty(_BLOCK, np.uint8)
    used = 0
    run = 0
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        whole = max(0, min(stop, full) - start)
        x0 = x[start : start + whole]
        x1 = x[length + start : length + start + whole]
        x2 = x[2 * length + start : 2 * length + start + whole]
        x3 = x[3 * length + start : 3 * length + start + whole]
        x4 = x[4 * length + start : 4 * length + start + whole]
        for j in range(whole):
            quartic[j] = (
                121
                + 81 * ((x0[j] > half) - (x0[j] < -half))
                + 27 * ((x1[j] > half) - (x1[j] < -half))
                + 9 * ((x2[j] > half) - (x2[j] < -half))
                + 3 * ((x3[j] > half) - (x3[j] < -half))
                + ((x4[j] > half) - (x4[j] < -half))
            )
        for j in range(whole, stop - start):
            byte = 0
            for partition in range(5):
                i = partition * length + start + j
                digit = 0
                if i < n:
                    digit = (x[i] > half) - (x[i] < -half)
                byte = 3 * byte + digit + 1
            quartic[j] = byte
        for j in range(stop - start):
            byte = quartic[j]
            if byte == ZERO_BYTE:
                run += 1
                if run == RUN_MAX:
                    body[used] = RUN_BASE + RUN_MAX - RUN_MIN
                    used += 1
                    run = 0
                continue
            if run > 0:
                body[used] = ZERO_BYTE if run == 1 else RUN_BASE + run - RUN_MIN
                used += 1
                run = 0
            body[used] = byte
            used += 1
            for partition in range(5):
                digit = _DIGITS[byte, partition]
                if digit != 0:
                    x[partition * length + start + j] -= np.float32(digit) * scale
    if run > 0:
        body[used] = ZERO_BYTE if run == 1 else RUN_BASE + run - RUN_MIN
        used += 1
    return used


@njit(nogil=True, cache=True)
def _check(body: Bytes, n: int) -> tuple[int, int, int]:
    """Return (problem, bytes used, quartic bytes unfolded) of the body of n values."""
    length = (n + 4) // 5
    used = 0
    at = 0
    while at < length:
        if used == body.size:
            return _ENDS_EARLY, used, at
        byte = body[used]
        used += 1
        if byte >= RUN_BASE:
            at += byte - RUN_BASE + RUN_MIN
            continue
        if at >= n - 4 * length:
            for partition in range(5):
                if partition * length + at >= n and _DIGITS[byte, partition] != 0:
                    return _PADDING, used, at
        at += 1
    if at > length:
        return _RUN_CROSSES, used, at
    return _OK, used, at


@njit(nogil=True, cache=True)
def _add(body: Bytes, scale: np.float32, acc: Floats) -> None:
    """Add a checked frame body to ``acc``; zero runs are skipped, not walked."""
    length = (acc.size + 4) // 5
    at = 0
    for used in range(body.size):
        byte = body[used]
        if byte >= RUN_BASE:
            at += byte - RUN_BASE + RUN_MIN
            continue
        if byte != ZERO_BYTE:
            for partition in range(5):
                digit = _DIGITS[byte, partition]
                if digit != 0:
                    acc[partition * length + at] += np.float32(digit) * scale
        at += 1
