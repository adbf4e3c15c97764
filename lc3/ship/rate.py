"""The step that makes a file as large as it may be: found on a sample, then checked."""

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


def float_values(tensors: Mapping[str, Tensor]) -> int:
    """Return how many values of tensors may be quantized."""
    return sum(t.numel() for t in tensors.values() if t.dtype in QUANTIZED)


def step_for(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None,
    target_bytes: float,
    lossy: Lossy,
) -> float:
    """Return the smallest step whose sections together take no more than a target.

    Of large tensors some rows are coded, the same ones for every step.

    Args:
        tensors: by name.
        base: that the receiver has; ``None``: nothing.
        target_bytes: of all sections.
        lossy: all but the step.

    Raises:
        ConfigError: even the largest step takes more.
    """
    parts = list(_sampled(tensors, base))

    def size(step: float) -> float:
        tried = replace(lossy, step=step)
        return sum(
            times * len(section_of(name, part, old, tried).data)
            for name, part, old, times in parts
        )

    return search(size, target_bytes, _deviation(parts))


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
    at = math.log2(start)
    for _ in range(_ROUNDS):
        found = size(2.0**at)
        if found <= target:
            high = at
            if found >= (1 - _NEAR) * target:
                break
        else:
            low = at
        if math.isinf(high):
            at += 2.0
        elif math.isinf(low):
            at -= 1.0
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


def _sampled(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None
) -> Iterator[Part]:
    """Yield parts of tensors, and how many times as large the whole ones are."""
    for name in tensors:
        tensor = host(tensors[name])
        old = base.get(name) if base is not None else None
        if old is not None and (old.dtype, old.shape) == (tensor.dtype, tensor.shape):
            old = host(old)
        else:
            old = None
        if tensor.ndim < 2 or tensor.numel() <= _SAMPLE or len(tensor) < 2:
            yield name, tensor, old, 1.0
            continue
        rows = max(1, _SAMPLE * len(tensor) // tensor.numel())
        start = (len(tensor) - rows) // 2
        part = tensor[start : start + rows].clone()
        times = tensor.numel() / part.numel()
        yield name, part, None if old is None else old[start : start + rows], times


def _deviation(parts: list[Part]) -> float:
    """Return the root mean square of what is coded, of weights where there are any."""
    total, count = 0.0, 0
    for _, part, old, times in parts:
        if part.dtype in QUANTIZED and part.ndim > 1 and part.numel():
            x = part.double() if old is None else part.double() - old.double()
            x = torch.nan_to_num(x, 0.0, 0.0, 0.0)
            total += times * x.square().sum().item()
            count += int(times * part.numel())
    return math.sqrt(total / count) if total else 1.0
