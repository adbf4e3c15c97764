"""Rounding to the number whose error and bits together cost least.

The nearest number has the least error, but a smaller one often costs fewer bits, and at
two bits a value and below these are worth more: with the bits that are saved the step
can be finer. A reader sees no difference. What a number costs is estimated from how
often it is met where rows and columns are as active. Source: Sullivan, Wiegand, "Rate-
distortion optimization for video compression", IEEE Signal Processing Magazine 15 (6).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lc3.codec.compiled import kernel

Numbers = NDArray[np.int32]
Floats = NDArray[np.float32] | NDArray[np.float64]

_CLASSES = 24  # of an expected magnitude, two for each octave
_MIDDLE = 14  # the class of a step
_COUNTED = 16  # magnitudes from 0 on; larger ones cost the bits of their digits more
_ROUNDS = 2


def cheapest(x: Floats, rows: int, step: float, weight: float) -> Numbers:
    """Return the numbers of values, each one of those around it or 0.

    Args:
        x: float32[n] or float64[n], finite, n ≥ 1, magnitudes below 2^24 steps.
        rows: of the matrix that they form.
        step: the distance of two values.
        weight: of a bit, in squared steps; 0: the nearest number.

    Returns:
        int32[n].

    Example:
        >>> x = np.array([0.6, 0.1, 0.0, -0.1, 0.0, 0.2, 0.0, 3.2])
        >>> cheapest(x, 1, 1.0, 0.0)
        array([1, 0, 0, 0, 0, 0, 0, 3], dtype=int32)
        >>> cheapest(x, 1, 1.0, 0.2)
        array([0, 0, 0, 0, 0, 0, 0, 3], dtype=int32)
    """
    numbers = np.empty(x.size, np.int32)
    by_row, by_column = np.zeros(rows), np.zeros(x.size // rows)
    _activity(x, by_row, by_column)
    overall = by_row.mean() / by_column.size or 1.0
    by_row = 2 * np.log2(by_row / by_column.size / step + 1e-9)
    by_column = 2 * np.log2(by_column / rows / overall + 1e-9) + _MIDDLE
    bits = np.zeros((_CLASSES, _COUNTED))
    counts = np.full(bits.shape, 0.05)
    choose(x, by_row, by_column, step, 0.0, bits, numbers, counts)
    for _ in range(_ROUNDS if weight else 0):
        bits = np.log2(counts.sum(1, keepdims=True) / counts)
        bits[:, 1:] += 1  # of the sign
        counts = np.full(bits.shape, 0.05)
        choose(x, by_row, by_column, step, weight, bits, numbers, counts)
    return numbers


@kernel()
def _activity(x: Any, by_row: Any, by_column: Any) -> None:
    """Add up magnitudes of each row and of each column."""
    i = 0
    for r in range(by_row.size):
        total = 0.0
        for c in range(by_column.size):
            size = abs(np.float64(x[i]))
            total += size
            by_column[c] += size
            i += 1
        by_row[r] = total


@kernel()
def choose(
    x: Any,
    by_row: Any,
    by_column: Any,
    step: float,
    weight: float,
    bits: Any,
    numbers: Numbers,
    counts: Any,
) -> None:
    """Write the number of each value, and count it where it was chosen.

    Args:
        x: float32[n] or float64[n].
        by_row: float64[rows], half octaves.
        by_column: float64[columns], half octaves: with the row's the class.
        step: the distance of two values.
        weight: of a bit, in squared steps.
        bits: float64[classes, magnitudes], what each costs.
        numbers: int32[n], written.
        counts: float64[classes, magnitudes], added to.
    """
    last = bits.shape[1] - 1
    i = 0
    for r in range(by_row.size):
        for c in range(by_column.size):
            where = min(max(int(by_row[r] + by_column[c]), 0), bits.shape[0] - 1)
            size = abs(np.float64(x[i])) / step
            below: Any = np.int64(size)
            best, least = np.int64(0), size * size + weight * bits[where, 0]
            for tried in range(max(below - 1, 1), below + 2):
                cost = (size - tried) * (size - tried)
                cost += weight * bits[where, min(tried, last)]
                if tried > last:
                    cost += weight * 2 * np.log2(tried / last)
                if cost < least:
                    best, least = np.int64(tried), cost
            counts[where, min(best, last)] += 1
            numbers[i] = -best if x[i] < 0 else best
            i += 1
