"""The orthonormal DCT-II over axes of a tensor, and back, with the same bits anywhere.

Where an axis means a place, as in the kernel of a convolution, most of the energy goes
to few coefficients. Where it does not, as between hidden units, it spreads, and coding
the coefficients takes more. Source: Laude, Richter, Ostermann, arXiv 1805.07258.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lc3.codec.compiled import kernel

Doubles = NDArray[np.float64]


def forward(x: Doubles, axes: tuple[int, ...]) -> Doubles:
    """Return the coefficients of float64[...] over some of its axes."""
    for axis in axes:
        x = _along(x, axis, _matrix(x.shape[axis]))
    return x


def inverse(x: Doubles, axes: tuple[int, ...]) -> Doubles:
    """Return the float64[...] that has these coefficients."""
    for axis in axes:
        x = _along(x, axis, _matrix(x.shape[axis]).T.copy())
    return x


@cache
def _matrix(n: int) -> Doubles:
    """Return float64[n, n] in multiples of 2^-30, where no machine's cosine differs."""
    k: Any = np.arange(n)[:, None]
    i: Any = np.arange(n)[None, :]
    scale = np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n))
    table: Doubles = scale * np.cos(np.pi * (2 * i + 1) * k / (2 * n))
    rounded: Doubles = np.rint(table * 2**30) / 2**30
    return rounded


def _along(x: Doubles, axis: int, matrix: Doubles) -> Doubles:
    shape = x.shape
    outer = int(np.prod(shape[:axis], dtype=np.int64))
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    out = np.empty((outer, shape[axis], inner))
    _multiply(np.ascontiguousarray(x).reshape(out.shape), matrix, out)
    return out.reshape(shape)


@kernel()
def _multiply(x: Any, matrix: Any, out: Any) -> None:
    """Write the product along the middle axis, each sum in order."""
    for a in range(x.shape[0]):
        for k in range(matrix.shape[0]):
            for b in range(x.shape[2]):
                out[a, k, b] = matrix[k, 0] * x[a, 0, b]
            for i in range(1, matrix.shape[1]):
                weight = matrix[k, i]
                for b in range(x.shape[2]):
                    out[a, k, b] += weight * x[a, i, b]
