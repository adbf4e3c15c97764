"""Which rank each layer gets, from the spectra of all layers and one budget.

Source: Kim, Khan, Kyung, "Efficient Neural Network Compression", CVPR 2019 (arXiv
1811.12781): a layer's metric is its PCA energy ``y(r) = (S(r) − S(1)) / (S(m) − S(1))``
with S the running sum of its spectrum and m its largest rank. ``enc_map`` gives all
layers the same metric, ``enc_model`` maximizes the product of all, near ``enc_map``.
``greedy``, energy for each unit of cost, is what keeps most energy.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lc3.errors import ConfigError

Doubles = NDArray[np.float64]
_METRICS = np.arange(0.1, 1.01, 0.01)
_TURNS, _NUDGE = 500, 0.001
_MARGIN = 0.1  # of the budget, either way: the box of ``enc_model``


@dataclass(frozen=True)
class Layer:
    """What a choice of ranks knows of one layer.

    Attributes:
        spectrum: float64[m], not negative, descending: the energy of each component.
        cost: of one rank, in any unit that all layers share.
        grid: ascending ranks from 1 to m at which the metric is sampled; empty: about a
            hundred.
        kept: whether it stays at rank m whatever the budget.
    """

    spectrum: Doubles
    cost: float
    grid: tuple[int, ...] = ()
    kept: bool = False

    @property
    def largest(self) -> int:
        """The rank at which nothing is lost."""
        return len(self.spectrum)

    @property
    def sampled(self) -> list[int]:
        """The ranks at which the metric is sampled, from 1 to the largest."""
        step = max(1, self.largest // 100)
        return list(self.grid) or [*range(1, self.largest, step), self.largest]

    def metric(self, ranks: Sequence[int]) -> Doubles:
        """Return the PCA energy of ranks: 0 at rank 1, 1 at the largest."""
        sums = np.cumsum(self.spectrum)
        span = sums[-1] - sums[0]
        if span <= 0:
            return np.ones(len(ranks))
        values: Doubles = (sums[np.asarray(ranks) - 1] - sums[0]) / span
        return values


def enc_map(layers: Sequence[Layer], budget: float) -> list[int]:
    """Return the ranks at which all layers have the same PCA energy.

    Args:
        layers: of the network.
        budget: share of the cost of all layers at their largest ranks, 0 < budget ≤ 1.

    Raises:
        ConfigError: the budget is out of range, or less than what is kept takes.

    Example:
        >>> fast, slow = (Layer(x ** np.arange(8.0), 1) for x in (0.1, 0.9))
        >>> enc_map([fast, slow], 0.5)
        [2, 6]
    """
    whole, target = _checked(layers, budget)
    curves = [_curve(layer) for layer in layers]
    open_layers = [i for i, layer in enumerate(layers) if not layer.kept]

    def ranks_at(metric: float) -> list[int]:
        return [
            layer.largest
            if layer.kept
            else int(np.round(curve(metric) * layer.largest))
            for layer, curve in zip(layers, curves, strict=True)
        ]

    def cost_of(ranks: Sequence[int]) -> float:
        return sum(ranks[i] * layers[i].cost for i in open_layers) / whole

    costs = [0.0, *(cost_of(ranks_at(a)) for a in _METRICS)]
    costs_once, where = np.unique(costs, return_index=True)
    at_cost = _pchip(costs_once, np.array([0.0, *_METRICS])[where])
    shift = 0.0
    for _ in range(_TURNS + 1):
        wanted = target + shift
        ranks = ranks_at(float(at_cost(wanted)) if wanted <= 1 else 1.0)
        found = cost_of(ranks)
        if target - _NUDGE < found < target + _NUDGE:
            break
        shift += _NUDGE if found <= target else -_NUDGE
    return [
        min(max(rank, round(layer.largest / 10), 1), layer.largest)
        for rank, layer in zip(ranks, layers, strict=True)
    ]


def enc_model(layers: Sequence[Layer], budget: float) -> list[int]:
    """Return ranks near ``enc_map``'s with the largest product of PCA energies.

    The paper enumerates sets of ranks in a box; as the logarithm of a layer's energy
    bends down, taking the best step again and again ends at the same maximum.

    Args:
        layers: of the network.
        budget: share of the cost of all layers at their largest ranks.

    Raises:
        ConfigError: as ``enc_map``.

    Example:
        >>> fast, slow = (Layer(x ** np.arange(8.0), 1) for x in (0.1, 0.9))
        >>> enc_model([fast, slow], 0.5)
        [2, 6]
    """
    whole, _ = _checked(layers, budget)
    low = enc_map(layers, max(budget * (1 - _MARGIN), 1e-9)) if budget < 1 else []
    high = enc_map(layers, min(1.0, budget * (1 + _MARGIN)))
    if budget >= 1:
        return high
    starts = [
        max(2, min(a, b)) if layer.largest > 1 else 1
        for layer, a, b in zip(layers, low, high, strict=True)
    ]
    starts = [min(s, layer.largest) for s, layer in zip(starts, layers, strict=True)]
    ends = [max(s, b) for s, b in zip(starts, high, strict=True)]
    values = [
        np.log(np.maximum(layer.metric(range(1, layer.largest + 1)), 1e-12))
        for layer in layers
    ]
    return _climb(layers, starts, ends, values, budget * whole)


def greedy(layers: Sequence[Layer], budget: float) -> list[int]:
    """Return ranks of which each was the best in energy for its cost when it was taken.

    Args:
        layers: of the network; each gets at least rank 1.
        budget: share of the cost of all layers at their largest ranks.

    Raises:
        ConfigError: as ``enc_map``; or rank 1 everywhere costs more.

    Example:
        >>> fast, slow = (Layer(x ** np.arange(8.0), 1) for x in (0.1, 0.9))
        >>> greedy([fast, slow], 0.5)
        [1, 7]
    """
    whole, _ = _checked(layers, budget)
    starts = [layer.largest if layer.kept else 1 for layer in layers]
    ends = [layer.largest for layer in layers]
    values = [np.cumsum(layer.spectrum) for layer in layers]
    return _climb(layers, starts, ends, values, budget * whole)


def uniform(layers: Sequence[Layer], budget: float) -> list[int]:
    """Return the same rank for all layers, the largest that the budget allows.

    Args:
        layers: of the network.
        budget: share of the cost of all layers at their largest ranks.

    Raises:
        ConfigError: as ``greedy``.

    Example:
        >>> uniform([Layer(np.ones(8), 1), Layer(np.ones(8), 1)], 0.5)
        [4, 4]
    """
    whole, _ = _checked(layers, budget)
    chosen: list[int] = []
    for rank in range(1, max(layer.largest for layer in layers) + 1):
        ranks = [
            layer.largest if layer.kept else min(rank, layer.largest)
            for layer in layers
        ]
        if _cost(layers, ranks) > budget * whole * (1 + 1e-12):
            break
        chosen = ranks
    if not chosen:
        raise ConfigError(_too_little(budget, _cost(layers, ranks) / whole))
    return chosen


RULES: dict[str, Callable[[Sequence[Layer], float], list[int]]] = {
    "enc-map": enc_map,
    "enc-model": enc_model,
    "greedy": greedy,
}


def energy_lost(layers: Sequence[Layer], ranks: Sequence[int]) -> float:
    """Return which share of all layers' energy ranks leave out."""
    total = sum(float(layer.spectrum.sum()) for layer in layers)
    pairs = zip(layers, ranks, strict=True)
    return sum(float(layer.spectrum[r:].sum()) for layer, r in pairs) / total


def _cost(layers: Sequence[Layer], ranks: Sequence[int]) -> float:
    return sum(layer.cost * r for layer, r in zip(layers, ranks, strict=True))


def _checked(layers: Sequence[Layer], budget: float) -> tuple[float, float]:
    """Return the whole cost, and the share that layers which are not kept may take."""
    if not 0 < budget <= 1:
        raise ConfigError(f"budget={budget!r} must be a share above 0, at most 1")
    if not layers or any(layer.largest < 1 or layer.cost <= 0 for layer in layers):
        raise ConfigError("ranks need layers, each with a spectrum and a cost above 0")
    whole = _cost(layers, [layer.largest for layer in layers])
    kept = sum(layer.cost * layer.largest for layer in layers if layer.kept)
    if kept >= budget * whole and kept:
        raise ConfigError(_too_little(budget, kept / whole))
    return whole, budget - kept / whole


def _too_little(budget: float, least: float) -> str:
    return (
        f"budget={budget:.4g} of the cost is less than the {least:.4g} that the "
        "smallest ranks take; give more"
    )


def _climb(
    layers: Sequence[Layer],
    starts: Sequence[int],
    ends: Sequence[int],
    values: Sequence[Doubles],
    most: float,
) -> list[int]:
    """Return ranks from ``starts`` up, the best gain for its cost first."""
    ranks = list(starts)
    left = most * (1 + 1e-12) - _cost(layers, ranks)
    if left < 0:
        whole = _cost(layers, [layer.largest for layer in layers])
        raise ConfigError(_too_little(most / whole, _cost(layers, ranks) / whole))
    heap = [
        (-(values[i][r] - values[i][r - 1]) / layers[i].cost, i)
        for i, r in enumerate(ranks)
        if r < ends[i]
    ]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        if layers[i].cost > left:
            continue  # a cheaper layer may still fit
        ranks[i] += 1
        left -= layers[i].cost
        r = ranks[i]
        if r < ends[i]:
            gain = (values[i][r] - values[i][r - 1]) / layers[i].cost
            heapq.heappush(heap, (-gain, i))
    return ranks


def _curve(layer: Layer) -> Callable[[float], float]:
    """Return the share of the largest rank at which a layer has a metric."""
    grid = layer.sampled
    metric = np.concatenate([[0.0], layer.metric(grid)])
    share = np.array([0, *grid]) / layer.largest
    until = int((metric < 1).sum()) + 1
    metric, first = np.unique(metric[:until], return_index=True)
    share, first = np.unique(share[first], return_index=True)
    if share.size < 2:
        return lambda _: 1 / layer.largest
    return _pchip(metric[first], share)


def _pchip(x: Doubles, y: Doubles) -> Callable[[float], float]:
    """Return the monotone cubic through points.

    Raises:
        ConfigError: scipy, which has it, is not installed.
    """
    try:
        from scipy.interpolate import PchipInterpolator
    except ImportError as error:
        raise ConfigError(
            "the ENC rules need scipy: pip install 'torch-lc3[ship]'"
        ) from error
    found = PchipInterpolator(x, y)
    return lambda at: float(found(at)) if math.isfinite(at) else 1.0
