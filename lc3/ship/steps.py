"""Uniform quantization with one step, plain or dithered, and the section that it makes.

Of every source, entropy-coded uniform steps take at most a quarter of a bit a value
more than any quantizer at fine steps. With subtractive dither the error is uniform in
half a step either way and independent of what is coded, whatever that is, so the
errors of many senders average out; each needs a seed of its own. The bytes are
specified in ``lc3.ship.format``. Source: Choi, El-Khamy, Lee, arXiv 1802.02271.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec.compiled import kernel
from lc3.errors import FormatError
from lc3.ship import contexts, planes, rounding, transform
from lc3.ship.format import Reader, varint
from lc3.ship.mixing import mixed

Coder = Literal["context", "zstd", "predictive"]
Numbers = NDArray[np.int32]
Floats = NDArray[np.float32] | NDArray[np.float64]
CHUNK = 1 << 18  # values
CODERS: tuple[Coder, ...] = ("context", "zstd", "predictive")
LONGEST_AXIS = 1024  # of a transform: its matrix has as many rows and columns
KERNEL = 1  # transform: the DCT over all axes from the third on
_WIDTHS = {1: np.int8, 2: np.int16, 4: np.int32}


@dataclass(frozen=True, slots=True)
class Steps:
    """How a tensor is quantized.

    Attributes:
        step: the distance of two values, a float32 above 0.
        coder: of the numbers.
        transform: 0: none, ``KERNEL``, or 2 + an axis.
        seed: of the dither; ``None``: none.
    """

    step: float
    coder: Coder = "predictive"
    transform: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Round the step to the float32 that the file has."""
        object.__setattr__(self, "step", float(np.float32(self.step)))


def quantize(x: Floats, steps: Steps, rate_weight: float = 0.0) -> Numbers | None:
    """Return the numbers of values; ``None``: some are too large for such a step.

    Without a transform memory holds the numbers and a chunk of values beside ``x``.

    Args:
        x: float32[...] or float64[...], finite.
        steps: how.
        rate_weight: of a bit in squared steps, where there is no dither; 0: each value
            gets the nearest number.

    Returns:
        int32[numel].

    Example:
        >>> quantize(np.array([0.9, -2.2]), Steps(0.5))
        array([ 2, -4], dtype=int32)
    """
    if steps.transform:
        x = transform.forward(x.astype(np.float64), axes_of(steps.transform, x.shape))
    flat = x.reshape(-1)
    if rate_weight and steps.seed is None and flat.size:
        largest = max(float(flat.max()), -float(flat.min()))
        if largest / steps.step >= contexts.LARGEST - 1:
            return None
        return rounding.cheapest(flat, rows_of(x.shape), steps.step, rate_weight)
    numbers = np.empty(flat.size, np.int32)
    for part in parts(flat.size):
        scaled = flat[part].astype(np.float64) / steps.step
        if steps.seed is not None:
            scaled += dither(steps.seed, scaled.size, part.start)
        if np.abs(scaled).max() >= contexts.LARGEST:
            return None
        numbers[part] = np.rint(scaled)
    return numbers


def dequantize(numbers: Numbers, shape: tuple[int, ...], steps: Steps) -> Tensor:
    """Return float32[shape] of numbers, int32[numel].

    Example:
        >>> dequantize(np.array([2, -4], np.int32), (2,), Steps(0.5))
        tensor([ 1., -2.])
    """
    return replaced(numbers.copy(), shape, steps)


def replaced(numbers: Numbers, shape: tuple[int, ...], steps: Steps) -> Tensor:
    """Be ``dequantize`` in the memory of the numbers, which are lost.

    With a transform the values need memory of their own.
    """
    wide = np.empty(numbers.size, np.float64) if steps.transform else None
    x: Any = numbers.view(np.float32) if wide is None else wide
    with np.errstate(over="ignore"):
        for part in parts(x.size):
            values = numbers[part].astype(np.float64)
            if steps.seed is not None:
                values -= dither(steps.seed, values.size, part.start)
            x[part] = values * steps.step
        x = x.reshape(shape)
        if steps.transform:
            x = transform.inverse(x, axes_of(steps.transform, shape))
        return torch.from_numpy(x.astype(np.float32, copy=False))


def parts(numel: int) -> Iterator[slice]:
    """Yield consecutive slices of at most ``CHUNK`` that cover so many values."""
    for start in range(0, numel, CHUNK):
        yield slice(start, min(start + CHUNK, numel))


def axes_of(code: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of a transform.

    Raises:
        FormatError: the tensor has no such axes.
    """
    axes = tuple(range(2, len(shape))) if code == KERNEL else (code - 2,)
    if not axes or max(axes) >= len(shape):
        raise FormatError(
            f"a tensor of {len(shape)} dimensions has no transform {code}"
        )
    sizes = [shape[axis] for axis in axes]
    if not all(1 <= size <= LONGEST_AXIS for size in sizes):
        raise FormatError(
            f"transform {code} is over axes of {sizes} elements, not of 1 to "
            f"{LONGEST_AXIS}"
        )
    return axes


def dither(seed: int, numel: int, start: int = 0) -> NDArray[np.float64]:
    """Return float64[numel], uniform in ±1/2; of a seed the same on every machine.

    The i-th value depends on the seed and i alone, so any part can be made.

    Args:
        seed: 0 ≤ seed < 2^64, another one for each sender and tensor.
        numel: how many.
        start: the place of the first.

    Example:
        >>> dither(7, 2).round(4)
        array([-0.1102, -0.4832])
        >>> dither(7, 1, start=1).round(4)
        array([-0.4832])
    """
    out = np.empty(numel, np.float64)
    _dither(np.uint64(seed), start, out)
    return out


@kernel()
def _dither(seed: np.uint64, start: int, out: Any) -> None:
    """Fill float64[*] from SplitMix64."""
    for i in range(out.size):
        z = mixed(seed, np.uint64(start + i))
        out[i] = (np.float64(z >> np.uint64(32)) + 0.5) / 4294967296.0 - 0.5


def rows_of(shape: tuple[int, ...]) -> int:
    """Return how many rows the matrix of a tensor's numbers has."""
    return shape[0] if len(shape) > 1 else 1


def section(numbers: Numbers, shape: tuple[int, ...], steps: Steps) -> bytes:
    """Return the section of a tensor's numbers, int32[numel]."""
    if steps.coder == "zstd":
        largest = max(int(numbers.max(initial=0)), -int(numbers.min(initial=0)))
        width = 1 if largest < 128 else 2 if largest < 1 << 15 else 4
        narrow = numbers.astype(_WIDTHS[width]).view(np.uint8)
        code = bytes([width]) + planes.compressed(narrow)
        del narrow
    else:
        predicts = steps.coder == "predictive"
        code = contexts.encode(numbers, rows_of(shape), predicts=predicts)
    head = struct.pack("<BBf", steps.transform, CODERS.index(steps.coder), steps.step)
    seed = b"\0" if steps.seed is None else struct.pack("<BQ", 1, steps.seed)
    return head + seed + varint(len(code)) + code


def read_steps(reader: Reader) -> Steps:
    """Return how the tensor of a section was quantized, and stop before its code.

    Raises:
        FormatError: it is no such section.
    """
    kind, coder = reader.byte(), reader.byte()
    step = reader.float32()
    if not (math.isfinite(step) and step > 0):
        raise FormatError(f"a step of {step} is not finite and above 0")
    dithered = reader.byte()
    if coder >= len(CODERS) or dithered > 1 or kind > 33:
        raise FormatError(
            f"transform {kind}, coder {coder}, dither {dithered} are not of format 1"
        )
    seed = reader.uint("Q") if dithered else None
    return Steps(step, CODERS[coder], kind, seed)


def decode(data: bytes | memoryview, shape: tuple[int, ...]) -> Tensor:
    """Return float32[shape] of a section.

    Raises:
        FormatError: it is no section of such a tensor.
    """
    reader = Reader(data, "a section of steps")
    steps = read_steps(reader)
    if steps.transform:
        axes_of(steps.transform, shape)
    code = reader.bytes(reader.varint())
    reader.ends()
    numel = math.prod(shape)
    if steps.coder == "zstd":
        numbers = _from_zstd(code, numel)
    else:
        predicts = steps.coder == "predictive"
        rows = rows_of(shape) if numel else 1
        numbers = contexts.decode(code, numel, rows, predicts=predicts)
    return replaced(numbers, shape, steps)


def _from_zstd(code: memoryview, numel: int) -> Numbers:
    width = code[0] if code else 0
    if width not in _WIDTHS:
        raise FormatError(f"numbers of {width} bytes are not of format 1")
    content = planes.decompress(code[1:], numel * width)
    return content.view(_WIDTHS[width]).astype(np.int32)
