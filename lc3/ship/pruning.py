"""Pruning by one number: which weights of all layers matter least, and masks for them.

``"kfac"`` is MLPrune's score, what Optimal Brain Surgeon says of a weight where a
layer's Fisher matrix is the Kronecker product of the second moment A of its inputs and
G of the gradients at its outputs: ``½ w² / ([G⁻¹]_ii [A⁻¹]_jj)``. ``"fisher"`` takes
the Fisher's diagonal, ``"magnitude"`` the weight alone. All layers are sorted together,
so densities of layers fall out. Source: Zeng, Urtasun, "MLPrune", OpenReview
r1g5b2RcKm; labels are sampled from the model, as K-FAC (arXiv 1503.05671) says.
"""

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lc3.errors import ConfigError

Score = Literal["kfac", "magnitude", "fisher"]
Batches = Iterable[Tensor]
DAMPING = 1e-3  # of every layer's Fisher, in squared nats


class Masks:
    """Which weights are kept, for as long as it is open.

    After each step of the optimizer, ``apply`` sets the others to zero; ``follow`` does
    so by itself.

    Args:
        model: whose weights they are.
        masks: bool tensors by the name of a parameter, of its shape.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._parameters = dict(model.named_parameters())
        self.masks = dict(masks)
        self._handles: list[RemovableHandle] = []
        self.apply()

    def __getitem__(self, name: str) -> Tensor:
        """Return the mask of a parameter."""
        return self.masks[name]

    def apply(self) -> None:
        """Set what is pruned to zero, in place."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                self._parameters[name].mul_(mask)

    def follow(self, optimizer: torch.optim.Optimizer) -> Self:
        """Apply the masks after each of an optimizer's steps, until ``close``."""

        def after(*_: object) -> None:
            self.apply()

        self._handles.append(optimizer.register_step_post_hook(after))
        return self

    def close(self) -> None:
        """Follow no optimizer any more; what is zero stays so until it is trained."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def densities(self) -> dict[str, float]:
        """Return which share of each parameter is kept."""
        return {n: m.double().mean().item() for n, m in self.masks.items()}


def prune(
    model: nn.Module,
    batches: Batches,
    density: float,
    score: Score = "magnitude",
    *,
    damping: float = DAMPING,
) -> Masks:
    """Set all but the share ``density`` of a model's weights to zero; return the masks.

    Weights are those of ``nn.Linear`` and of ``nn.Conv2d`` without groups. One
    threshold for all layers decides.

    Args:
        model: whose weights are changed, in place; it returns logits, [n, classes].
        batches: of inputs, for ``"kfac"`` and ``"fisher"``; some thousands of samples.
            Not looked at for ``"magnitude"``.
        density: of weights that stay, 0 < density ≤ 1.
        score: what matters.
        damping: of ``"kfac"``: what is added to the diagonal of every layer's Fisher
            matrix. The same for all layers: where the loss is flat a weight's size
            decides.

    Raises:
        ConfigError: an argument is out of range, or there is no such layer or batch.

    Example:
        >>> net = nn.Linear(20, 5)
        >>> masks = prune(net, [], 0.1)
        >>> int((net.weight != 0).sum())
        10
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with masks.follow(optimizer):
        ...     net(torch.ones(3, 20)).sum().backward()
        ...     optimizer.step()
        >>> int((net.weight != 0).sum())
        10
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density={density!r} must be above 0, at most 1")
    if score not in SCORES:
        raise ConfigError(f"score={score!r} must be one of {', '.join(SCORES)}")
    if not damping > 0:
        raise ConfigError(f"damping={damping!r} must be above 0")
    layers = _layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no layer that can be pruned")
    scores = SCORES[score](model, layers, batches, damping)
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = max(1, round(density * flat.numel()))
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(kept).indices] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return Masks(
        model,
        {
            f"{name}.weight" if name else "weight": part.view_as(layers[name].weight)
            for name, part in zip(scores, parts, strict=True)
        },
    )


Layers = dict[str, nn.Linear | nn.Conv2d]


def _layers(model: nn.Module) -> Layers:
    found: Layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1
        ):
            found[name] = module
    return found


def _magnitude(
    _model: nn.Module, layers: Layers, _batches: Batches, _damping: float
) -> dict[str, Tensor]:
    return {name: layer.weight.detach().abs() for name, layer in layers.items()}


def _kfac(
    model: nn.Module, layers: Layers, batches: Batches, damping: float
) -> dict[str, Tensor]:
    return {
        name: obs_score(layers[name].weight.detach(), inputs, outputs, damping)
        for name, (inputs, outputs) in factors(model, layers, batches).items()
    }


def obs_score(
    weight: Tensor, inputs: Tensor, outputs: Tensor, damping: float = DAMPING
) -> Tensor:
    """Return ½ w² / ([G⁻¹]_ii [A⁻¹]_jj): what the loss rises by if a weight goes.

    Args:
        weight: [o, …], flattened to o rows of i inputs.
        inputs: A, float[i or i + 1, i or i + 1]: the last one is the bias's.
        outputs: G, float[o, o].
        damping: added to the diagonal of A ⊗ G, split between the factors so that
            each is damped alike (Martens, Grosse, arXiv 1503.05671, section 6.3).

    Returns:
        Of the shape of ``weight``.

    Example:
        >>> obs_score(torch.ones(1, 2), torch.eye(2), torch.eye(1), 1e-12)
        tensor([[0.5000, 0.5000]])
    """
    flat = weight.flatten(1).double()
    sizes = [f.double().diagonal().mean().clamp_min(1e-30) for f in (inputs, outputs)]
    share = (sizes[0] / sizes[1]).sqrt()
    a = _inverse_diagonal(inputs, damping**0.5 * share)[: flat.shape[1]]
    g = _inverse_diagonal(outputs, damping**0.5 / share)
    found = 0.5 * flat.square() / (g[:, None] * a[None, :])
    return found.to(weight.dtype).view_as(weight)


def _inverse_diagonal(factor: Tensor, added: Tensor) -> Tensor:
    factor = factor.double()
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.inv(factor + added.clamp_min(1e-30) * eye)
    return inverse.diagonal()


def factors(
    model: nn.Module, layers: Layers, batches: Batches
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and G of each layer, float64, on labels that the model draws itself.

    A is the mean over samples of the outer product of a layer's inputs with a 1 behind
    them; of a convolution over positions, too. G is the mean over samples of that of
    the gradients at its outputs, of a convolution summed over positions.

    Args:
        model: returns logits.
        layers: of the model.
        batches: of inputs.

    Raises:
        ConfigError: there is no batch, or a layer has no such factors.
    """
    sums: dict[str, list[Tensor]] = {}
    count = 0

    def look(name: str, inputs: Tensor, gradient: Tensor) -> None:
        rows, grads = _rows(layers[name], inputs, gradient)
        ones = rows.new_ones(*rows.shape[:-1], 1)
        rows = torch.cat([rows, ones], -1).flatten(0, 1).double()
        positions = grads.shape[1]
        flat = grads.flatten(0, 1).double()
        a, g = rows.T @ rows / positions, flat.T @ flat
        if name in sums:
            sums[name][0] += a
            sums[name][1] += g
        else:
            sums[name] = [a, g]

    for batch in batches:
        count += len(batch)
        _backward(model, layers, batch, look)
    if not count:
        raise ConfigError("the score needs batches of inputs, and there is none")
    return {name: (sums[name][0] / count, sums[name][1] / count) for name in layers}


def _fisher(
    model: nn.Module, layers: Layers, batches: Batches, _damping: float
) -> dict[str, Tensor]:
    """Return ½ w² F of each weight, F the mean of squared gradients of samples."""
    sums = {
        name: torch.zeros_like(layer.weight.detach().flatten(1), dtype=torch.double)
        for name, layer in layers.items()
    }
    count = 0

    def look(name: str, inputs: Tensor, gradient: Tensor) -> None:
        rows, grads = _rows(layers[name], inputs, gradient)
        each = torch.einsum("npo,npi->noi", grads, rows)
        sums[name] += each.square().sum(0).double()

    for batch in batches:
        count += len(batch)
        _backward(model, layers, batch, look)
    if not count:
        raise ConfigError("the score needs batches of inputs, and there is none")
    found = {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        score = 0.5 * weight.flatten(1).double().square() * sums[name] / count
        found[name] = score.to(weight.dtype).view_as(weight)
    return found


SCORES: dict[str, Callable[[nn.Module, Layers, Batches, float], dict[str, Tensor]]] = {
    "kfac": _kfac,
    "magnitude": _magnitude,
    "fisher": _fisher,
}


def _rows(
    layer: nn.Linear | nn.Conv2d, inputs: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Return [n, positions, inputs] and [n, positions, outputs] of one layer."""
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise ConfigError(
                f"a convolution with padding={layer.padding!r} of "
                f"{layer.padding_mode!r} has no K-FAC or Fisher score here; give its "
                'padding as numbers of zeros, or prune by score="magnitude"'
            )
        rows = nn.functional.unfold(
            inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        return rows.transpose(1, 2), gradient.flatten(2).transpose(1, 2)
    n = len(inputs)
    return (
        inputs.reshape(n, -1, inputs.shape[-1]),
        gradient.reshape(n, -1, gradient.shape[-1]),
    )


def _backward(
    model: nn.Module,
    layers: Layers,
    batch: Tensor,
    look: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Call ``look`` with each layer's inputs and each sample's gradient at its outputs.

    Parameters keep the gradients that they have.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if name in seen:
                raise ConfigError(
                    f"the model's forward pass uses layer {name!r} twice, which has no "
                    'K-FAC or Fisher score here; prune by score="magnitude"'
                )
            seen[name] = (given[0].detach(), output)

        return keep

    handles = [
        layer.register_forward_hook(hook(name)) for name, layer in layers.items()
    ]
    training = model.training
    model.eval()
    try:
        logits = model(batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if idle := [name for name in layers if name not in seen]:
        raise ConfigError(
            f"the model's forward pass does not reach layer {idle[0]!r}; prune by "
            'score="magnitude"'
        )
    flat = logits.flatten(0, -2)
    generator = torch.Generator().manual_seed(0)
    chances = flat.detach().softmax(-1).cpu()
    labels = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    loss = nn.functional.cross_entropy(flat, labels.to(flat.device), reduction="sum")
    outputs = [output for _, output in seen.values()]
    gradients = torch.autograd.grad(loss, outputs)
    for (name, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True):
        look(name, inputs, gradient)
