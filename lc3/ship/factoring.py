"""A model whose layers are split into two thinner ones, by one budget for all.

A linear layer becomes two; a convolution two along its height and width, or one of
fewer channels and one of 1 by 1. Both train on and save as any module. Which rank each
gets, ``lc3.ship.ranks`` chooses. Source: Kim, Khan, Kyung, CVPR 2019 (arXiv
1811.12781).
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lc3.errors import ConfigError
from lc3.ship.ranks import RULES, Layer

Rule = Literal["enc-map", "enc-model", "greedy"]
Split = Literal["spatial", "channel"]
SPLITS = ("spatial", "channel")
_NUDGE = 0.001
# Their forward passes read the weights of layers inside.
_READ_WEIGHTS = nn.TransformerEncoderLayer, nn.MultiheadAttention


def low_rank(
    model: nn.Module, budget: float, rule: Rule = "greedy", split: Split = "spatial"
) -> nn.Module:
    """Return a copy of a model whose layers are factored to a share of their weights.

    Layers are those of ``nn.Linear`` and of ``nn.Conv2d`` without groups whose weight
    no other layer shares. One that would not become smaller stays whole, and so do
    those inside of torch's own attention and transformer layers, which read the weights
    of their parts. ``model`` is not changed.

    Args:
        model: trained.
        budget: share of the weights of these layers that is left, 0 < budget ≤ 1.
        rule: ``"greedy"`` keeps most energy; ``"enc-map"`` gives all layers the same
            energy, ``"enc-model"`` maximizes the product.
        split: of convolutions: D·1 and 1·D kernels, or D·D and 1·1.

    Raises:
        ConfigError: an argument is out of range, there is no such layer, or the
            smallest ranks take more than the budget.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        >>> small = low_rank(net, 0.25)
        >>> small(torch.ones(2, 64)).shape
        torch.Size([2, 8])
        >>> sum(p.numel() for p in small.parameters()) < 1400
        True
    """
    if rule not in RULES:
        raise ConfigError(f"rule={rule!r} must be one of {', '.join(RULES)}")
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if not isinstance(budget, int | float):
        raise ConfigError(f"budget={budget!r} must be a number above 0, at most 1")
    names = [name for name, _ in splittable(model)]
    if not names:
        raise ConfigError(f"{type(model).__name__} has no layer that can be factored")
    layers = spectra(model, split)
    chosen = _within(RULES[rule], layers, budget)
    small = copy.deepcopy(model)
    for name, layer, rank in zip(names, layers, chosen, strict=True):
        whole = small.get_submodule(name)
        if rank < layer.largest:
            parent, _, leaf = name.rpartition(".")
            setattr(small.get_submodule(parent), leaf, factored(whole, rank, split))
    return small


def _within(
    rule: Callable[[Sequence[Layer], float], list[int]],
    layers: Sequence[Layer],
    budget: float,
) -> list[int]:
    """Return ranks that cost no more than the budget: ENC may miss it by a little."""
    whole = sum(layer.cost * layer.largest for layer in layers)
    asked = budget
    while True:
        chosen = rule(layers, asked)
        cost = sum(x.cost * r for x, r in zip(layers, chosen, strict=True)) / whole
        if cost <= budget * (1 + 1e-9):
            return chosen
        asked -= max(_NUDGE, cost - budget)
        if asked <= 0:
            raise ConfigError(
                f"budget={budget:.4g} of the weights is less than the {cost:.4g} that "
                "the smallest ranks take; give more"
            )


def splittable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that ``low_rank`` would factor, by name."""
    whole = [name for name, m in model.named_modules() if isinstance(m, _READ_WEIGHTS)]
    shared = Counter(
        id(p) for module in model.modules() for p in module.parameters(recurse=False)
    )
    for name, module in model.named_modules():
        plain = type(module) in (nn.Linear, nn.Conv2d) and name
        inside = any(name.startswith(f"{w}.") or not w for w in whole)
        if plain and not inside and shared[id(module.weight)] == 1:
            if isinstance(module, nn.Conv2d) and (
                module.groups > 1
                or isinstance(module.padding, str)
                or module.padding_mode != "zeros"
            ):
                continue
            yield name, module


def spectra(model: nn.Module, split: Split = "spatial") -> list[Layer]:
    """Return what a choice of ranks needs to know of each layer of ``splittable``.

    A layer's cost of a rank is the weights that it takes; its largest rank is the last
    one at which two layers are no larger than the whole one.
    """
    found = []
    for name, module in splittable(model):
        matrix = _matrix(module, split)
        if not matrix.isfinite().all():
            raise ConfigError(
                f"the weight of {name!r} has values that are not finite, so no layers "
                "of lower rank are near it"
            )
        values = torch.linalg.svdvals(matrix).square().cpu().numpy()
        most = max(1, matrix.numel() // sum(matrix.shape))
        found.append(Layer(values[:most], float(sum(matrix.shape))))
    return found


def factored(layer: nn.Module, rank: int, split: Split = "spatial") -> nn.Sequential:
    """Return the two layers that are nearest to one, on its device, of its dtype.

    They are trained, or not, as the one is.

    Args:
        layer: ``nn.Linear``, or ``nn.Conv2d`` without groups.
        rank: of their product, at least 1.
        split: of a convolution.

    Example:
        >>> factored(nn.Linear(8, 4), 2)
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=4, bias=True)
        )
    """
    left, values, right = torch.linalg.svd(_matrix(layer, split), full_matrices=False)
    root = values[:rank].sqrt()
    first, second = root[:, None] * right[:rank], left[:, :rank] * root
    weight = _weight(layer)
    if isinstance(layer, nn.Linear):
        pair: list[nn.Module] = [
            nn.Linear(layer.in_features, rank, bias=False),
            nn.Linear(rank, layer.out_features, bias=layer.bias is not None),
        ]
    else:
        assert isinstance(layer, nn.Conv2d)
        outputs, inputs, height, width = weight.shape
        if split == "spatial":
            pair = _spatial(layer, rank)
            first = first.reshape(rank, inputs, height, 1)
            second = second.reshape(outputs, width, rank).transpose(1, 2)
            second = second.reshape(outputs, rank, 1, width)
        else:
            pair = _channel(layer, rank)
            first = first.reshape(rank, inputs, height, width)
            second = second.reshape(outputs, rank, 1, 1)
    made = nn.Sequential(*pair).to(weight.device, weight.dtype)
    with torch.no_grad():
        _weight(made[0]).copy_(first)
        _weight(made[1]).copy_(second)
        _weight(made[0]).requires_grad_(weight.requires_grad)
        _weight(made[1]).requires_grad_(weight.requires_grad)
        old, new = layer.bias, made[1].bias
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            new.copy_(old)
            new.requires_grad_(old.requires_grad)
    return made.train(layer.training)


def _spatial(layer: nn.Conv2d, rank: int) -> list[nn.Module]:
    (h, w), (sh, sw), (ph, pw), (dh, dw) = _sizes(layer)
    biased = layer.bias is not None
    return [
        nn.Conv2d(
            layer.in_channels, rank, (h, 1), (sh, 1), (ph, 0), (dh, 1), bias=False
        ),
        nn.Conv2d(
            rank, layer.out_channels, (1, w), (1, sw), (0, pw), (1, dw), bias=biased
        ),
    ]


def _channel(layer: nn.Conv2d, rank: int) -> list[nn.Module]:
    kernel, stride, padding, dilation = _sizes(layer)
    biased = layer.bias is not None
    return [
        nn.Conv2d(
            layer.in_channels, rank, kernel, stride, padding, dilation, bias=False
        ),
        nn.Conv2d(rank, layer.out_channels, 1, bias=biased),
    ]


_Pair = tuple[int, int]


def _sizes(layer: nn.Conv2d) -> tuple[_Pair, _Pair, _Pair, _Pair]:
    padding = layer.padding
    assert not isinstance(padding, str)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    return (
        *((kernel[0], kernel[1]), (stride[0], stride[1])),
        *((padding[0], padding[1]), (dilation[0], dilation[1])),
    )


def _matrix(layer: nn.Module, split: Split) -> Tensor:
    """Return the matrix whose rank is that of the two layers, float64."""
    weight = _weight(layer).detach().double()
    if weight.ndim == 2 or split == "channel":
        return weight.flatten(1)
    outputs, inputs, height, width = weight.shape
    matrix = weight.permute(0, 3, 1, 2)
    return matrix.reshape(outputs * width, inputs * height)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
