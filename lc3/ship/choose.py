"""How one tensor is coded: whatever takes fewest bytes at the error that is asked for.

Weights, tensors of two dimensions and more, share one absolute step: steps in units of
each layer's deviation spoil the layers that matter. Biases and norms are few, and get
steps of their own, finer ones, or centres. What must be exact, whole numbers and what
is not finite, is exact.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.ship import bloomier, centres, planes, steps
from lc3.ship.format import BLOOMIER, CENTRES, EXPANSION, PLANES, RELATIVE, STEPS
from lc3.ship.steps import CHUNK, KERNEL, LONGEST_AXIS, Coder, Floats, Steps

QUANTIZED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FINER = 4  # steps of vectors in one of weights
_LEAST = 2.0**-100  # of a tensor's values; a step is a float32
_OF_DEVIATION = 32  # and in their root mean square
_DENSEST = 0.2  # share of weights that a filter is made of
_FILTER_R, _FILTER_T = 4, 9  # bits of a shared value, and of a cell
_OF_SMALLEST = 8  # and in the smallest, where all are positive as variances are


@dataclass(frozen=True)
class Lossy:
    """What may be lost, and which codings may be tried.

    Attributes:
        step: of all weights.
        largest_error: that any value may have; ``None``: about half a step.
        coder: of the numbers.
        dither_seed: from which each tensor's own is made; ``None``: no dither.
        transform: whether the DCT is tried.
        cluster: whether centres are tried for vectors.
        spatial: by name, the axis of a tensor that means a place.
        filtered: whether positions of weights that are not zero become a filter.
        rate_weight: of a bit of a weight in squared steps; 0: nearest values.
    """

    step: float
    largest_error: float | None = None
    coder: Coder = "predictive"
    dither_seed: int | None = None
    transform: bool = True
    cluster: bool = True
    spatial: Mapping[str, int] = field(default_factory=dict)
    filtered: bool = False
    rate_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Section:
    """A tensor as it is stored.

    Attributes:
        coding: of the format.
        data: its bytes.
        decoded: what a reader will see.
    """

    coding: int
    data: bytes
    decoded: Tensor


def exact(tensor: Tensor, base: Tensor | None) -> Section:
    """Return a section that loses nothing.

    Args:
        tensor: contiguous, on the CPU.
        base: that the receiver has; ``None``: nothing.
    """
    data = planes.encode(tensor, None)
    coding = PLANES
    if base is not None:
        relative = planes.encode(tensor, base)
        if len(relative) < len(data):
            data, coding = relative, PLANES | RELATIVE
    return Section(coding, _padded(data, tensor), tensor)


def section_of(
    name: str, tensor: Tensor, base: Tensor | None, lossy: Lossy | None
) -> Section:
    """Return the smallest section of a tensor.

    Args:
        name: of the tensor.
        tensor: contiguous, on the CPU.
        base: of the same dtype and shape, that the receiver has; ``None``: nothing.
        lossy: what may be lost; ``None``: nothing.
    """
    if lossy is None or tensor.dtype not in QUANTIZED or tensor.numel() == 0:
        return exact(tensor, base)
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    x = tensor.to(wide).numpy()
    if base is not None:
        x = x - base.to(wide).numpy()
    if not all(np.isfinite(x.reshape(-1)[p]).all() for p in steps.parts(x.size)):
        return exact(tensor, base)
    if wide == torch.float64 and np.abs(x).max() < _LEAST:
        return exact(tensor, base)
    if lossy.filtered and base is None and tensor.ndim > 1:
        section = _filtered(tensor, x)
        if section is not None:
            return section
    if tensor.ndim > 1:
        found = _of_weights(name, x, lossy)
    else:
        found = _of_vector(name, x, lossy)
    if found is not None:
        coding, data, values = found
        if base is not None:
            values = base.float() + values
            coding |= RELATIVE
        decoded = values.to(tensor.dtype)
        if _good(tensor, decoded, lossy):
            section = Section(coding, _padded(data, tensor), decoded)
            if len(data) < tensor.nbytes // 2:
                return section
            safe = exact(tensor, base)
            return section if len(section.data) < len(safe.data) else safe
    return exact(tensor, base)


def _filtered(tensor: Tensor, x: Floats) -> Section | None:
    """Return weights as shared values in a filter; ``None``: too few are zero."""
    flat = x.astype(np.float64).reshape(-1)
    keys = np.flatnonzero(flat)
    if not 0 < keys.size <= _DENSEST * flat.size:
        return None
    values, numbers = centres.cluster(flat[keys], 1 << _FILTER_R)
    table = bloomier.build(keys, numbers.astype(np.uint32), _FILTER_R, _FILTER_T)
    data = bloomier.section(table, values)
    decoded = bloomier.decode(data, tuple(tensor.shape), tensor.numel())
    return Section(BLOOMIER, _padded(data, tensor), decoded.to(tensor.dtype))


def _good(tensor: Tensor, decoded: Tensor, lossy: Lossy) -> bool:
    """Whether a decoded tensor is finite, and as near as it must be."""
    if not all(bool(p.isfinite().all()) for p in decoded.reshape(-1).split(CHUNK)):
        return False
    if lossy.largest_error is None:
        return True
    pairs = zip(
        decoded.reshape(-1).split(CHUNK), tensor.reshape(-1).split(CHUNK), strict=True
    )
    off = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return off <= lossy.largest_error


def _padded(data: bytes, tensor: Tensor) -> bytes:
    """Return a section with as many bytes as the format asks of such a tensor."""
    return data + bytes(max(0, -(-tensor.nbytes // EXPANSION) - len(data)))


Found = tuple[int, bytes, Tensor]


def _seed(name: str, lossy: Lossy) -> int | None:
    if lossy.dither_seed is None:
        return None
    return (lossy.dither_seed + (zlib.crc32(name.encode()) << 32)) % (1 << 64)


def _coded(
    x: Floats, how: Steps, rate_weight: float = 0.0
) -> tuple[bytes, Tensor] | None:
    numbers = steps.quantize(x, how, rate_weight)
    if numbers is None:
        return None
    return steps.section(numbers, x.shape, how), steps.replaced(numbers, x.shape, how)


def _of_weights(name: str, x: Floats, lossy: Lossy) -> Found | None:
    """Return plain steps, or those of a DCT if they are smaller at equal error."""
    how = Steps(lossy.step, lossy.coder, 0, _seed(name, lossy))
    plain = _coded(x, how, lossy.rate_weight)
    if plain is None:
        return None
    kind = _transform_of(name, x.shape, lossy)
    if kind:
        error = _squares(x, plain[1])
        finer = _as_near(x, how, kind, error, lossy.rate_weight)
        other = _coded(x, finer, lossy.rate_weight)
        if (
            other is not None
            and len(other[0]) < len(plain[0])
            and _squares(x, other[1]) <= error
            and _within(x, other[1], lossy)
        ):
            plain = other
    return STEPS, *plain


def _transform_of(name: str, shape: tuple[int, ...], lossy: Lossy) -> int:
    """Return which transform is worth a try; 0: none."""
    if name in lossy.spatial:
        return 2 + lossy.spatial[name] if math.prod(shape) else 0
    if lossy.transform and len(shape) > 2 and math.prod(shape[2:]) > 1:
        return KERNEL if max(shape[2:]) <= LONGEST_AXIS else 0
    return 0


def _as_near(
    x: Floats, how: Steps, kind: int, error: float, rate_weight: float
) -> Steps:
    """Return the largest steps of a transform whose squared error is no more."""
    low, high = 0.5 * how.step, 2.0 * how.step
    for _ in range(8):
        middle = math.sqrt(low * high)
        tried = Steps(middle, how.coder, kind, how.seed)
        numbers = steps.quantize(x, tried, rate_weight)
        if (
            numbers is not None
            and _squares(x, steps.replaced(numbers, x.shape, tried)) <= error
        ):
            low = middle
        else:
            high = middle
    return Steps(low, how.coder, kind, how.seed)


def _squares(x: Floats, decoded: Tensor) -> float:
    return sum(float(np.square(off).sum()) for off in _off(x, decoded))


def _off(x: Floats, decoded: Tensor) -> Iterator[NDArray[np.float64]]:
    """Yield by how much values are off, chunk by chunk."""
    values, flat = decoded.numpy().reshape(-1), x.reshape(-1)
    for part in steps.parts(flat.size):
        yield values[part].astype(np.float64) - flat[part]


def _within(x: Floats, decoded: Tensor, lossy: Lossy) -> bool:
    if lossy.largest_error is None:
        return True
    largest = max(float(np.abs(off).max()) for off in _off(x, decoded))
    return largest <= lossy.largest_error


def _of_vector(name: str, x: Floats, lossy: Lossy) -> Found | None:
    """Return fine steps of a tensor's own, or centres that are as near."""
    x = x.astype(np.float64)  # a vector is small
    step = min(lossy.step / _FINER, math.sqrt(np.square(x).mean()) / _OF_DEVIATION)
    if x.min() > 0:
        step = min(step, float(x.min()) / _OF_SMALLEST)
    if np.float32(step) <= 0:
        return None if x.any() else (CENTRES, *_as_centres(x, 1))
    plain = _coded(x, Steps(step, lossy.coder, 0, _seed(name, lossy)))
    if plain is None:
        return None
    if lossy.cluster and lossy.dither_seed is None:
        error = _squares(x, plain[1])
        for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            if 4 * count > len(plain[0]):
                break
            data, decoded = _as_centres(x, count)
            if (
                _squares(x, decoded) <= error
                and len(data) < len(plain[0])
                and _within(x, decoded, lossy)
            ):
                return CENTRES, data, decoded
    return STEPS, *plain


def _as_centres(x: NDArray[np.float64], count: int) -> tuple[bytes, Tensor]:
    values, numbers = centres.cluster(x.reshape(-1), count)
    decoded = torch.from_numpy(values[numbers]).reshape(x.shape)
    return centres.section(values, numbers), decoded
