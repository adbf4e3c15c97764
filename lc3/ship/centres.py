"""Clustering of one-dimensional tensors: a few shared values, and which one each takes.

Biases and the parameters of norms are few, and often near each other. Source: Laude,
Richter, Ostermann, arXiv 1805.07258; the clustering is Lloyd's.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.errors import FormatError
from lc3.ship import contexts
from lc3.ship.format import Reader, varint

Floats = NDArray[np.float32]
MOST = 256
_ROUNDS = 30


def cluster(x: NDArray[np.float64], count: int) -> tuple[Floats, NDArray[np.int32]]:
    """Return centres and which one each value is nearest to, by Lloyd's algorithm.

    It starts from quantiles, so the result depends on the values alone.

    Args:
        x: float64[n], finite, n ≥ 1.
        count: how many centres at most.

    Returns:
        float32[≤ count], ascending, and int32[n].

    Example:
        >>> cluster(np.array([1.0, 5.0, 1.5, 5.5]), 2)
        (array([1.25, 5.25], dtype=float32), array([0, 1, 0, 1], dtype=int32))
    """
    ordered = np.sort(x)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centres = np.unique(np.quantile(ordered, (np.arange(count) + 0.5) / count))
    for _ in range(_ROUNDS):
        cuts = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate([[0], cuts, [x.size]])
        sizes = np.diff(ends)
        kept = sizes > 0
        moved = np.diff(sums[ends])[kept] / sizes[kept]
        if moved.size == centres.size and (moved == centres).all():
            break
        centres = moved
    values = np.unique(centres.astype(np.float32))
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2
    return values, np.searchsorted(middles, x).astype(np.int32)


def section(values: Floats, numbers: NDArray[np.int32]) -> bytes:
    """Return the section of centres, float32[n ≥ 1], and numbers, int32[numel]."""
    code = contexts.encode(numbers, 1)
    table = values.astype("<f4").tobytes()
    return varint(values.size) + table + varint(len(code)) + code


def read_centres(reader: Reader) -> Floats:
    """Return the centres of a section, and stop before its code.

    Raises:
        FormatError: there are none, or too many.
    """
    count = reader.varint()
    if not 1 <= count <= MOST:
        raise FormatError(f"{count} centres are not from 1 to {MOST}")
    return np.frombuffer(reader.bytes(4 * count), "<f4").astype(np.float32)


def decode(data: bytes | memoryview, shape: tuple[int, ...], numel: int) -> Tensor:
    """Return float32[shape] of a section.

    Raises:
        FormatError: it is no section of such a tensor.
    """
    reader = Reader(data, "a section of centres")
    values = read_centres(reader)
    code = reader.bytes(reader.varint())
    reader.ends()
    numbers = contexts.decode(code, numel, 1)
    if numel and not 0 <= int(numbers.min()) <= int(numbers.max()) < values.size:
        raise FormatError(
            f"a number of a section names none of its {values.size} centres"
        )
    return torch.from_numpy(values[numbers]).reshape(shape)
