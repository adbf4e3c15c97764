"""Bytes of lc3 and of NNCodec where both lose as much: in score, and in squared error.

Both are measured on a grid of steps, four to an octave. A score has noise of its own,
so the loss is made monotone in the bytes first (isotonic regression), for both alike.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from experiments import nncodec
from experiments.ship_tables import Named, Row, matrices, row
from lc3.ship.choose import Lossy, section_of
from lc3.ship.model import RATE_WEIGHT
from lc3.ship.rate import deviation_of

OCTAVES = [e / 4 for e in range(-6, 9)]  # of steps, around the weights' deviation
QPS = range(-10, 6)  # of NNCodec, above the one of the deviation; four to an octave
SHOWN = (-6, -2, 2)  # of these, at equal squared error
DROPS = (0.25, 0.5, 1.0)  # points


class Point(NamedTuple):
    """One file.

    Attributes:
        nbytes: of all of it.
        drop: points of score lost.
        error: summed squared error of the weights.
    """

    nbytes: int
    drop: float
    error: float


def at_drop(points: list[Point], drop: float) -> float:
    """Return how many bytes lose so many points; nan: none of the grid's does.

    Example:
        >>> grid = [Point(100, 0.0, 1.0), Point(50, 1.0, 2.0), Point(25, 3.0, 4.0)]
        >>> round(at_drop(grid, 2.0), 1)
        35.4
    """
    ordered = sorted(points, reverse=True)
    size = np.log([p.nbytes for p in ordered])
    fit = IsotonicRegression(increasing=False)
    loss = fit.fit_transform(size, [p.drop for p in ordered])
    over = np.flatnonzero(loss > drop)
    if not over.size or over[0] == 0:
        return math.nan
    k = int(over[0])
    share = (drop - loss[k - 1]) / (loss[k] - loss[k - 1])
    return float(np.exp(size[k - 1] + share * (size[k] - size[k - 1])))


def at_error(points: list[Point], error: float) -> float:
    """Return how many bytes have such a squared error; nan: it is beyond the grid.

    Example:
        >>> grid = [Point(100, 0.0, 1.0), Point(50, 1.0, 2.0), Point(25, 3.0, 4.0)]
        >>> round(at_error(grid, 2.0), 1)
        50.0
    """
    ordered = sorted(points, reverse=True)
    errors = np.log([p.error for p in ordered])
    if not errors[0] <= math.log(error) <= errors[-1]:
        return math.nan
    size = np.log([p.nbytes for p in ordered])
    return float(np.exp(np.interp(math.log(error), errors, size)))


def squares(state: Named, weights: Named) -> float:
    """Return the summed squared error of all weights."""
    return sum(
        float((state[n].double() - t.double()).square().sum())
        for n, t in matrices(weights).items()
    )


def ours(weights: Named, step: float) -> tuple[int, dict[str, Tensor]]:
    """Return how many bytes a file has, as ``save(bits=)`` writes it, and its state."""
    lossy = Lossy(step, rate_weight=RATE_WEIGHT)
    found = {n: section_of(n, t.contiguous(), None, lossy) for n, t in weights.items()}
    index = 40 + sum(len(n.encode()) + 16 for n in weights)
    return index + sum(len(s.data) for s in found.values()), {
        n: s.decoded for n, s in found.items()
    }


def equal_rows(
    network: str, weights: Named, score: Callable[[Named], float] | None
) -> Iterator[Row]:
    """Yield bytes of both at equal loss; a row that says so where NNCodec is not there.

    Args:
        network: its name.
        weights: a state dict of float32.
        score: returns that of a model with other weights, in per cent; ``None``: only
            squared errors are compared.
    """
    if not nncodec.installed():
        yield row("equal", network, "NNCodec", note="not installed: no figure")
        return

    def lost(state: Named) -> float:
        return full - score(state) if score is not None else math.nan

    full = score(weights) if score is not None else 0.0
    size = deviation_of(weights)
    mine, theirs = [], []
    for octave in OCTAVES:
        nbytes, state = ours(weights, size * 2.0**octave)
        mine.append(Point(nbytes, lost(state), squares(state, weights)))
    middle = round(4 * math.log2(size))  # NNCodec's step is about 2^(qp / 4)
    for qp in range(middle + QPS.start, middle + QPS.stop):
        stream = nncodec.encode(weights, qp)
        state = nncodec.decode(stream, weights)
        theirs.append(Point(len(stream), lost(state), squares(state, weights)))
    values = sum(t.numel() for t in weights.values())

    def of(
        what: str, one: float, other: float, drop: object = "", note: str = ""
    ) -> Row:
        ratio = one / other
        return row(
            *("equal", network, what),
            bytes=round(one),
            bits=8 * one / values,
            rival_bits=8 * other / values,
            ratio=ratio,
            drop=drop,
            note=note,
        )

    for drop in DROPS if score is not None else ():
        found = at_drop(mine, drop), at_drop(theirs, drop)
        if not any(map(math.isnan, found)):
            yield of(f"{drop:g} points lost", *found, drop=drop)
    for above in SHOWN:
        point = theirs[QPS.index(above)]
        same = at_error(mine, point.error)
        if not math.isnan(same):
            what = f"the squared error of NNCodec at qp {middle + above}"
            note = f"it loses {point.drop:.2f}" if score is not None else ""
            yield of(what, same, point.nbytes, note=note)
