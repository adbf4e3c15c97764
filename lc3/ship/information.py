"""How much a layer's activations say of inputs and labels, by adaptive estimators.

A diagnostic, never a claim: with real widths every sample has a code of its own, so the
information is log2 of the number of samples whatever the network knows. The label-
shuffle control says so where it happens. ``compare`` puts a shipped model beside the
one that it was made from, and beside another seed of the same training: what two seeds
differ by is no effect of shipping. Source: Chelombiev, Houghton, O'Donnell,
"Adaptive Estimators Show Information Compression in Deep Neural Networks", ICLR 2019
(arXiv 1902.09037); the kernel bound is Kolchinsky and Tracey's (arXiv 1706.02419).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Information]] = {
    "bins": adaptive_bins,
    "kernels": adaptive_kde,
}


class Comparison(NamedTuple):
    """One layer of three models, by one estimator.

    Attributes:
        layer: its name.
        units: how many values it has for a sample.
        estimator: of ``ESTIMATORS``.
        full: of the model as it was trained.
        shipped: of the same model as it was received.
        other: of another seed of the same training: the null.
    """

    layer: str
    units: int
    estimator: str
    full: Information
    shipped: Information
    other: Information

    @property
    def telling(self) -> bool:
        """Whether shuffled labels give at most half of what the labels give."""
        return self.full.telling and self.shipped.telling

    @property
    def different(self) -> bool:
        """Whether shipping changes more than another seed does, where it can tell."""
        pairs = zip(self.full[:2], self.shipped[:2], self.other[:2], strict=True)
        return self.telling and any(abs(b - a) > abs(c - a) for a, b, c in pairs)


def compare(
    full: nn.Module,
    shipped: nn.Module,
    other: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    layers: Iterable[str],
) -> Iterator[Comparison]:
    """Yield what layers say in a model, as it was shipped, and in another seed's.

    Args:
        full: trained.
        shipped: of the same structure, with the weights that were received.
        other: of the same structure, trained with another seed.
        inputs: of some thousands of samples.
        labels: int64[n].
        layers: names of submodules, whose outputs are looked at.

    Raises:
        InputError: there is no such layer, or its output does not fit the labels.

    Example:
        >>> nets = [nn.Sequential(nn.Linear(3, 2), nn.Tanh()) for _ in range(3)]
        >>> x, y = torch.randn(64, 3), torch.arange(64) % 2
        >>> [c.layer for c in compare(*nets, x, y, ["1"])]
        ['1', '1']
    """
    names = list(layers)
    seen = [_outputs(model, inputs, names) for model in (full, shipped, other)]
    for name in names:
        for kind, estimate in ESTIMATORS.items():
            found = [estimate(outputs[name], labels) for outputs in seen]
            yield Comparison(name, seen[0][name].shape[1], kind, *found)


def page(found: Sequence[Comparison]) -> str:
    """Return a page of a report, as Markdown: each figure with its two controls.

    Example:
        >>> said = Information(2.0, 1.0, 0.25)
        >>> print(page([Comparison("1", 10, "bins", said, said, said)]))
        | layer | units | by | model | I(X; T) | I(T; Y) | shuffled labels | it says |
        | --- | ---: | --- | --- | ---: | ---: | ---: | --- |
        | 1 | 10 | bins | trained | 2.00 | 1.00 | 0.25 | |
        | | | | shipped | 2.00 | 1.00 | 0.25 | no more than another seed |
        | | | | another seed | 2.00 | 1.00 | 0.25 | |
    """
    titles = ("layer", "units", "by", "model", "I(X; T)", "I(T; Y)")
    lines = [
        f"| {' | '.join(titles)} | shuffled labels | it says |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for one in found:
        first = f"{one.layer} | {one.units} | {one.estimator}"
        models = {
            "trained": one.full,
            "shipped": one.shipped,
            "another seed": one.other,
        }
        for name, said in models.items():
            figures = " | ".join(f"{bits:.2f}" for bits in said)
            words = verdict(one) + " " if name == "shipped" else ""
            lines.append(f"| {first} | {name} | {figures} | {words}|")
            first = "| |"
    return "\n".join(lines)


def verdict(one: Comparison) -> str:
    """Return what may be said of a comparison, in words."""
    if not one.telling:
        return "nothing: shuffled labels give more than half"
    return "more than another seed" if one.different else "no more than another seed"


def _outputs(
    model: nn.Module, inputs: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return float[n, units] of each layer, with the model as in evaluation."""
    modules = dict(model.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise InputError(f"the model has no layer {missing[0]!r}")
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_: nn.Module, _given: Any, output: Tensor) -> None:
            found[name] = output.detach().flatten(1)

        return keep

    handles = [modules[n].register_forward_hook(keeper(n)) for n in names]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if idle := [name for name in names if name not in found]:
        raise InputError(f"the model's forward pass does not reach layer {idle[0]!r}")
    return found


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
