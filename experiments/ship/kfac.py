"""Which weights go: K-FAC's score beside magnitudes, for all layers and for each.

Each seed trains a network of its own, as long as those that are shipped. It is pruned
in each way, and each is tuned on the same batches. What is asked: is K-FAC's score, of
any damping, better than the same density in each layer, and is it better than one
magnitude threshold, which costs nothing?
"""

from collections.abc import Callable, Iterator
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from experiments.ship.models import MAKERS, STEPS, Data, train
from experiments.ship.tables import Row, row
from lc3 import ship

DENSITIES = (0.05, 0.02)
NETWORKS = "lenet-300", "lenet-5"
TUNING = 300  # steps
SAMPLES = 5120  # of the Fisher
UNIFORM = "magnitude, the same density in each layer"
KFAC = {f"K-FAC, damping {damping:g}": damping for damping in (1e-4, 1e-3, 1e-2, 0.1)}
WAYS = (UNIFORM, "magnitude, one threshold", *KFAC)


def uniform(model: nn.Module, density: float) -> ship.Masks:
    """Keep the largest weights of each layer, the same share of each."""
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            flat = parameter.detach().abs().flatten()
            kept = torch.zeros(flat.numel(), dtype=torch.bool)
            kept[flat.topk(max(1, round(density * flat.numel()))).indices] = True
            masks[name] = kept.view_as(parameter)
    return ship.Masks(model, masks)


def pruned(model: nn.Module, data: Data, way: str, density: float) -> ship.Masks:
    """Prune a model in place by one of ``WAYS``; return the masks."""
    if way == UNIFORM:
        return uniform(model, density)
    if way not in KFAC:
        return ship.prune(model, [], density)
    generator = torch.Generator().manual_seed(77)
    batches: list[Tensor] = []
    while sum(len(x) for x in batches) < SAMPLES:
        batches.append(data.batch(generator)[0])
    return ship.prune(model, batches, density, "kfac", damping=KFAC[way])


def tuned(model: nn.Module, data: Data, masks: ship.Masks, seed: int) -> float:
    """Train what is left; return the score."""

    def after(_step: int, _optimizer: torch.optim.Optimizer) -> None:
        masks.apply()

    train(model, data, TUNING, seed=1000 + seed, lr=0.01, after=after)
    return data.score(model)


def kfac_rows(
    network: str, data: Data, seeds: int, say: Callable[[str], None]
) -> Iterator[Row]:
    """Yield the mean score of each way, and how far it is above the uniform one.

    Args:
        network: its name.
        data: to train on.
        seeds: how many.
        say: told each score as it comes.
    """
    if network not in NETWORKS:
        return
    scores: dict[tuple[float, str], list[float]] = {}
    full = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = MAKERS[network]()
        train(model, data, STEPS[network], seed=seed)
        weights: dict[str, Tensor] = {
            n: t.clone() for n, t in model.state_dict().items()
        }
        full.append(data.score(model))
        for density in DENSITIES:
            for way in WAYS:
                model.load_state_dict(weights)
                masks = pruned(model, data, way, density)
                score = tuned(model, data, masks, seed)
                scores.setdefault((density, way), []).append(score)
                say(f"kfac {network} seed {seed} {density:.0%} {way} {score:.2f}")
    for (density, way), found in scores.items():
        pairs = zip(found, scores[density, UNIFORM], strict=True)
        above = [a - b for a, b in pairs]
        spread = f", ± {stdev(above):.2f} of a seed" if seeds > 1 else ""
        yield row(
            *("kfac", network, f"{1 - density:.0%} gone, {way}"),
            score=mean(found),
            drop=mean(above),
            note=f"{seeds} seeds; unpruned {mean(full):.2f}{spread}",
        )
