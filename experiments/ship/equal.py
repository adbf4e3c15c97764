"""Bytes of lc3 and of NNCodec where both lose as much.

Three losses: points of score; predictions of the test set that are others than those of
the model as it was; squared error of the weights. Both are measured on a grid of steps,
four to an octave. Which of the changed predictions were right is chance, so a score is
the noisiest of the three: of 300 changes by ± 0.15 points in 10,000 pictures.
Losses are made monotone in the bytes (isotonic regression), for both alike.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from experiments.ship import nncodec
from experiments.ship.models import accuracy
from experiments.ship.tables import Named, Row, matrices, row
from lc3.ship.choose import Lossy, section_of
from lc3.ship.model import RATE_WEIGHT
from lc3.ship.rate import deviation_of

OCTAVES = [e / 4 for e in range(-6, 9)]  # of steps, around the weights' deviation
QPS = range(-10, 6)  # of NNCodec, above the one of the deviation; four to an octave
SHOWN = (-6, -2, 2)  # of these, at equal squared error
DROPS = (0.25, 0.5, 1.0)  # points
CHANGED = (2.0, 4.0, 6.0)  # per cent


class Point(NamedTuple):
    """One file.

    Attributes:
        nbytes: of all of it.
        drop: points of score lost.
        error: summed squared error of the weights.
        changed: per cent of predictions that are others.
    """

    nbytes: int
    drop: float
    error: float
    changed: float = math.nan


Loss = Literal["drop", "error", "changed"]
Predict = Callable[[Named], Tensor]


def at(points: list[Point], kind: Loss, loss: float) -> float:
    """Return how many bytes lose so much; nan: none of the grid's does.

    Example:
        >>> grid = [Point(100, 0.0, 1.0), Point(50, 1.0, 2.0), Point(25, 3.0, 4.0)]
        >>> round(at(grid, "drop", 2.0), 1), round(at(grid, "error", 2.0), 1)
        (35.4, 50.0)
    """
    ordered = sorted(points, reverse=True)
    size = np.log([p.nbytes for p in ordered])
    fit = IsotonicRegression(increasing=False)
    curve = fit.fit_transform(size, [getattr(p, kind) for p in ordered])
    over = np.flatnonzero(curve > loss)
    if not over.size or over[0] == 0:
        return math.nan
    k = int(over[0])
    share = (loss - curve[k - 1]) / (curve[k] - curve[k - 1])
    return float(np.exp(size[k - 1] + share * (size[k] - size[k - 1])))


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
    network: str, weights: Named, predict: Predict | None, answers: Tensor | None
) -> Iterator[Row]:
    """Yield bytes of both at equal loss; a row that says so where NNCodec is not there.

    Args:
        network: its name.
        weights: a state dict of float32.
        predict: returns what a model with other weights predicts; ``None``: only
            squared errors are compared.
        answers: that are right, of the same shape.
    """
    if not nncodec.installed():
        yield row("equal", network, "NNCodec", note="not installed: no figure")
        return
    said = None if predict is None else predict(weights)

    def point(nbytes: int, state: Named) -> Point:
        error = squares(state, weights)
        if predict is None or said is None or answers is None:
            return Point(nbytes, math.nan, error)
        now = predict(state)
        drop = accuracy(said, answers) - accuracy(now, answers)
        return Point(nbytes, drop, error, 100 - accuracy(now, said))

    size = deviation_of(weights)
    middle = round(4 * math.log2(size))  # NNCodec's step is about 2^(qp / 4)
    mine = [point(*ours(weights, size * 2.0**octave)) for octave in OCTAVES]
    theirs = []
    for above in QPS:
        stream = nncodec.encode(weights, middle + above)
        theirs.append(point(len(stream), nncodec.decode(stream, weights)))
    values = sum(t.numel() for t in weights.values())

    def of(what: str, kind: Loss, loss: float, note: str = "") -> Iterator[Row]:
        one, other = at(mine, kind, loss), at(theirs, kind, loss)
        if not math.isnan(one + other):
            yield row(
                *("equal", network, what),
                bytes=round(one),
                bits=8 * one / values,
                rival_bits=8 * other / values,
                ratio=one / other,
                note=note,
            )

    if predict is not None:
        for drop in DROPS:
            yield from of(f"{drop:g} points lost", "drop", drop)
        for changed in CHANGED:
            what = f"{changed:g} % of predictions changed"
            yield from of(what, "changed", changed)
    for above in SHOWN:
        found = theirs[QPS.index(above)]
        what = f"the squared error of NNCodec at qp {middle + above}"
        note = "" if predict is None else f"it loses {found.drop:.2f} points"
        yield from of(what, "error", found.error, note)
