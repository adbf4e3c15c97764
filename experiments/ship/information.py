"""The information page's figures: a shipped network beside another seed of it."""

from collections.abc import Iterator

import torch

from experiments.ship.models import MAKERS, STEPS, Data, Pictures, train
from experiments.ship.tables import Named, Row, row
from lc3.ship.choose import Lossy, section_of
from lc3.ship.information import Comparison, compare, verdict
from lc3.ship.model import RATE_WEIGHT
from lc3.ship.rate import step_for

SAMPLES = 2048
BITS = 2.0
LAYERS = {"lenet-300": ("2", "4", "5"), "lenet-5": ("6", "7")}  # hidden, then logits


def information_rows(network: str, weights: Named, data: Data) -> Iterator[Row]:
    """Yield what layers say in three models: trained, shipped, of another seed."""
    if not isinstance(data, Pictures):
        return
    full, shipped, other = (MAKERS[network]() for _ in range(3))
    full.load_state_dict(weights)
    values = sum(t.numel() for t in weights.values())
    lossy = Lossy(1.0, rate_weight=RATE_WEIGHT)
    step = step_for(weights, None, BITS * values / 8, lossy)
    lossy = Lossy(step, rate_weight=RATE_WEIGHT)
    decoded = {
        n: section_of(n, t.contiguous(), None, lossy).decoded
        for n, t in weights.items()
    }
    shipped.load_state_dict(decoded)
    torch.manual_seed(1)
    other = MAKERS[network]()
    train(other, data, STEPS[network], seed=1)
    x, y = data.test(SAMPLES)
    for one in compare(full, shipped, other, x, y, LAYERS[network]):
        yield from _rows(network, one)


def _rows(network: str, one: Comparison) -> Iterator[Row]:
    where = f"layer {one.layer}, {one.units} units, by {one.estimator}"
    models = {
        "trained": one.full,
        f"shipped at {BITS:g} bits": one.shipped,
        "another seed": one.other,
    }
    for name, said in models.items():
        yield row(
            *("information", network, f"{where}: {name}"),
            bits=said.inputs,
            rival_bits=said.labels,
            ratio=said.shuffled,
            note=verdict(one) if said is one.shipped else "",
        )
