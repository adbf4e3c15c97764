"""The step that makes a file as large as it may be: found on a sample, then checked."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lc3.errors import ConfigError
from lc3.ship.choose import QUANTIZED, Lossy, section_of
from lc3.ship.container import host

_SAMPLE = 1 << 18  # values of a tensor
_ROUNDS = 12
_NEAR = 0.005  # of the target, below it
_FINE = 1 / 16  # of log2 of the step, where a search ends
_HUGE = 1e100  # its square is a float64, and so is the sum
FINEST = 2.0**-120  # step; a file has it as a float32


def float_values(tensors: Mapping[str, Tensor]) -> int:
    """Return how many values of tensors may be quantized."""
    return sum(t.numel() for t in tensors.values() if t.dtype in QUANTIZED)


def step_for(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None,
    target_bytes: float,
    lossy: Lossy,
    *,
    sampled: bool = True,
) -> float:
    """Return the smallest step whose sections together take no more than a target.

    Args:
        tensors: by name.
        base: that the receiver has; ``None``: nothing.
        target_bytes: of all sections.
        lossy: all but the step.
        sampled: whether some rows stand for a large tensor, the same for every step.

    Raises:
        ConfigError: even the largest step takes more.
    """
    parts = list(_parts(tensors, base, _SAMPLE if sampled else math.inf))

    def size(step: float) -> float:
        tried = replace(lossy, step=step)
        return sum(
            times * len(section_of(name, part, old, tried).data)
            for name, part, old, times in parts
        )

    try:
        return search(size, target_bytes, _deviation(parts))
    except ConfigError as error:
        if exact := [name for name, part, old, _ in parts if _must_be_exact(part, old)]:
            raise ConfigError(
                f"{error}; {', '.join(map(repr, exact[:3]))} has values that are not "
                "finite, and so is stored exactly"
            ) from error
        raise


def is_sampled(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether ``step_for`` looks at a part of some tensor only."""
    return any(_is_large(tensor, _SAMPLE) for tensor in tensors.values())


Part = tuple[str, Tensor, Tensor | None, float]


def search(size: Callable[[float], float], target: float, start: float) -> float:
    """Return about the smallest step with ``size(step) <= target``.

    Args:
        size: in bytes; falls with the step.
        target: in bytes.
        start: a step to begin with.

    Raises:
        ConfigError: there is none.
    """
    low, high = -math.inf, math.inf  # of log2 of the step: too large, small enough
    lowest = math.log2(FINEST)
    at = max(math.log2(start), lowest)
    for count in itertools.count(1):
        found = size(2.0**at)
        if found <= target:
            high = at
            if found >= (1 - _NEAR) * target:
                break
        else:
            low = at
        if count >= _ROUNDS and (math.isinf(high) or high - low <= _FINE):
            break
        if math.isinf(high):
            at += 2.0
        elif math.isinf(low):
            if at == lowest:
                break
            # A few large values make the first step far too large.
            at = max(lowest, at - 2.0 ** max(0, count - _ROUNDS // 2))
        else:
            at = (low + high) / 2
    if math.isinf(high):
        raise ConfigError(
            f"even with a step of {2.0**at:.3g} the tensors take {found:,.0f} bytes, "
            f"more than the {max(0.0, target):,.0f} that names and shapes leave of "
            "what was asked for; ask for more bits"
        )
    return float(2.0**high)


def deviation_of(tensors: Mapping[str, Tensor]) -> float:
    """Return the root mean square of all weights; 1.0 where there are none."""
    return _deviation([(name, host(t), None, 1.0) for name, t in tensors.items()])


def _parts(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, most: float
) -> Iterator[Part]:
    """Yield parts of tensors, and how many times as large the whole ones are."""
    for name in tensors:
        tensor = host(tensors[name])
        old = base.get(name) if base is not None else None
        if old is not None and (old.dtype, old.shape) == (tensor.dtype, tensor.shape):
            old = host(old)
        else:
            old = None
        if not _is_large(tensor, most):
            yield name, tensor, old, 1.0
            continue
        rows = max(1, int(most) * len(tensor) // tensor.numel())
        start = (len(tensor) - rows) // 2
        part = tensor[start : start + rows].clone()
        times = tensor.numel() / part.numel()
        yield name, part, None if old is None else old[start : start + rows], times


def _is_large(tensor: Tensor, most: float) -> bool:
    return tensor.ndim > 1 and len(tensor) > 1 and tensor.numel() > most


def _must_be_exact(part: Tensor, old: Tensor | None) -> bool:
    finite = all(bool(t.isfinite().all()) for t in (part, old) if t is not None)
    return part.dtype in QUANTIZED and not finite


def _deviation(parts: list[Part]) -> float:
    """Return the root mean square of what is coded, of weights where there are any."""
    total, count = 0.0, 0
    for _, part, old, times in parts:
        if part.dtype in QUANTIZED and part.ndim > 1 and part.numel():
            x = part.double() if old is None else part.double() - old.double()
            x = torch.nan_to_num(x, 0.0, 0.0, 0.0).clamp(-_HUGE, _HUGE)
            total += times * x.square().sum().item()
            count += int(times * part.numel())
    return math.sqrt(total / count) if total else 1.0
