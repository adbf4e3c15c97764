"""How much a layer's activations say of inputs and labels, by adaptive estimators.

A diagnostic, never a claim: with real widths every sample has a code of its own, so the
information is log2 of the number of samples whatever the network knows. The label-
shuffle control says so where it happens. Source: Chelombiev, Houghton, O'Donnell,
"Adaptive Estimators Show Information Compression in Deep Neural Networks", ICLR 2019
(arXiv 1902.09037); the kernel bound is Kolchinsky and Tracey's (arXiv 1706.02419).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lc3.errors import InputError

BINS = 30


class Information(NamedTuple):
    """What one layer says, in bits.

    Attributes:
        inputs: I(X; T), at most log2 of the number of samples.
        labels: I(T; Y), at most the entropy of the labels.
        shuffled: I(T; Y) when labels are shuffled: what a finite sample feigns.
    """

    inputs: float
    labels: float
    shuffled: float

    @property
    def telling(self) -> bool:
        """Whether the shuffled labels give at most half of the real ones' bits."""
        return self.shuffled <= self.labels / 2


def adaptive_bins(activations: Tensor, labels: Tensor, bins: int = BINS) -> Information:
    """Estimate by bins that each hold as many different values of the whole layer.

    Any rescaling that keeps the order of values changes nothing.

    Args:
        activations: float[n, units].
        labels: int64[n].
        bins: of a unit's value.

    Raises:
        InputError: shapes do not fit, values are not finite, or there are under 2 bins.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
        >>> found = adaptive_bins(x, torch.tensor([0, 0, 1, 1]), bins=2)
        >>> found.inputs, found.labels
        (1.0, 1.0)
    """
    x = _checked(activations, labels)
    if bins < 2:
        raise InputError(f"bins={bins} must be at least 2")
    values = np.unique(x)
    places = np.arange(1, bins) * values.size // bins
    codes = np.digitize(x, values[places]) if values.size > 1 else np.zeros(x.shape)
    _, code = np.unique(codes, axis=0, return_inverse=True)
    code = code.reshape(-1)
    y = labels.numpy()
    mixed = np.random.default_rng(0).permutation(y)
    return Information(_entropy(code), _mutual(code, y), _mutual(code, mixed))


def adaptive_kde(
    activations: Tensor, labels: Tensor, noise: float = 1e-3
) -> Information:
    """Estimate by the upper bound of a mixture of Gaussians around the samples.

    The noise that makes a deterministic layer's information finite grows with the
    layer's largest activation, so that rescaling changes nothing.

    Args:
        activations: float[n, units].
        labels: int64[n].
        noise: its variance in units of the largest activation's square.

    Raises:
        InputError: shapes do not fit, or values are not finite.

    Example:
        >>> x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
        >>> found = adaptive_kde(x, torch.tensor([0, 0, 1, 1]))
        >>> round(found.inputs, 3), round(found.labels, 3)
        (1.0, 1.0)
    """
    x = _checked(activations, labels)
    if not noise > 0:
        raise InputError(f"noise={noise!r} must be above 0")
    variance = noise * max(float(np.abs(x).max()) ** 2, 1e-300)
    y = labels.numpy()
    mixed = np.random.default_rng(0).permutation(y)
    whole = _spread(x, variance)

    def of_labels(given: np.ndarray) -> float:
        parts = [x[given == label] for label in np.unique(given)]
        return whole - sum(len(p) / len(x) * _spread(p, variance) for p in parts)

    return Information(whole, of_labels(y), of_labels(mixed))


def _spread(x: np.ndarray, variance: float) -> float:
    """Return the bound on H(T) less the entropy of the noise alone, in bits."""
    total = 0.0
    squares = np.square(x).sum(1)
    for start in range(0, len(x), 1024):
        part = x[start : start + 1024]
        cross = part @ x.T
        apart = squares[start : start + 1024, None] + squares[None, :] - 2 * cross
        near = np.exp(-np.maximum(apart, 0) / (2 * variance))
        total -= float(np.log2(near.mean(1)).sum())
    return total / len(x)


def _entropy(code: np.ndarray) -> float:
    counts = np.bincount(code)
    counts = counts[counts > 0]
    return float((counts / code.size * np.log2(code.size / counts)).sum())


def _mutual(code: np.ndarray, labels: np.ndarray) -> float:
    within = sum(
        (labels == label).mean() * _entropy(code[labels == label])
        for label in np.unique(labels)
    )
    return max(0.0, _entropy(code) - float(within))


def _checked(activations: Tensor, labels: Tensor) -> np.ndarray:
    x = activations.detach().to("cpu", torch.double).numpy()
    if x.ndim != 2 or labels.shape != (len(x),) or not len(x):
        raise InputError(
            f"activations of the shape {list(activations.shape)} and labels of "
            f"{list(labels.shape)} must be [n, units] and [n]"
        )
    if not np.isfinite(x).all():
        raise InputError("activations must be finite")
    return x
