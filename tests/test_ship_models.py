"""Making a model smaller before it is shipped: ranks, pruning, a step for a score."""

import doctest
import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lc3 import ship
from lc3.errors import ConfigError, InputError
from lc3.ship import information, pruning, ranks
from lc3.ship.factoring import factored
from lc3.ship.ranks import Layer

SPECTRA = Path(__file__).parent / "vectors/resnet56_spectra.json"
MODULES = (
    *("bloomier", "centres", "factoring", "fitting", "information", "model", "pruning"),
    *("ranks", "steps"),
)


def published() -> tuple[list[Layer], list[int]]:
    """Return ResNet-56's spectra, as the authors file them, and their ranks."""
    data = json.loads(SPECTRA.read_text())
    parts = zip(
        *(data["spectra"], data["flops"], data["largest"], data["grids"]), strict=True
    )
    layers = [
        Layer(np.array(spectrum), flops / largest, tuple(grid), kept=i == 0)
        for i, (spectrum, flops, largest, grid) in enumerate(parts)
    ]
    return layers, data["published"]


def test_enc_map_returns_the_published_ranks() -> None:
    layers, expected = published()
    for budget in (0.5055, 0.506):
        assert ranks.enc_map(layers, budget) == expected
    found = ranks.enc_map(layers, 0.5)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) == 1


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75, 1.0])
def test_no_rule_goes_over_the_budget_and_greedy_loses_least(budget: float) -> None:
    layers, _ = published()
    layers = [Layer(layer.spectrum, layer.cost) for layer in layers]
    whole = sum(layer.cost * layer.largest for layer in layers)
    lost = {}
    for rule in (ranks.enc_map, ranks.enc_model, ranks.greedy, ranks.uniform):
        found = rule(layers, budget)
        cost = sum(x.cost * r for x, r in zip(layers, found, strict=True))
        over = 1.01 if rule is ranks.enc_map else 1 + 1e-9
        assert cost <= budget * whole * over
        assert all(1 <= r <= x.largest for x, r in zip(layers, found, strict=True))
        lost[rule.__name__] = ranks.energy_lost(layers, found)
    assert min(lost.values()) == lost["greedy"] <= lost["uniform"]


def test_enc_model_has_the_larger_product() -> None:
    layers, _ = published()

    def product(found: list[int]) -> float:
        pairs = zip(layers, found, strict=True)
        return float(sum(np.log(x.metric([r])[0]) for x, r in pairs))

    assert product(ranks.enc_model(layers, 0.506)) >= product(
        ranks.enc_map(layers, 0.506)
    )


def test_a_list_of_shapes_as_long_as_resnet_50_takes_less_than_a_second() -> None:
    random = np.random.default_rng(0)
    layers = [
        Layer(np.sort(random.exponential(size=size))[::-1] ** 2, float(4 * size))
        for size in (64, *[64] * 9, *[128] * 12, *[256] * 18, *[512] * 9)
    ]
    ranks.enc_map(layers[:2], 0.5)  # scipy is imported
    start = time.process_time()
    ranks.greedy(layers, 0.3)
    ranks.enc_map(layers, 0.3)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("split", ["spatial", "channel"])
def test_factors_of_the_largest_rank_are_the_layer(split: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 1))
    rank = {"spatial": 9, "channel": 5}[split]
    x = torch.randn(2, 3, 11, 9)
    assert torch.allclose(factored(conv, rank, split)(x), conv(x), atol=1e-5)
    linear = nn.Linear(7, 4)
    y = torch.randn(3, 7)
    assert torch.allclose(factored(linear, 4)(y), linear(y), atol=1e-5)


@pytest.mark.parametrize("rule", list(ranks.RULES))
def test_a_model_of_low_rank_trains_and_saves(tmp_path: Path, rule: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()),
        *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    before = {n: t.clone() for n, t in net.state_dict().items()}
    small = ship.low_rank(net, 0.4, rule)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    ratio = sum(p.numel() for p in small.parameters()) / sum(
        p.numel() for p in net.parameters()
    )
    assert 0.3 < ratio < 0.41
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    ship.save(small.state_dict(), tmp_path / "m.lc3m")
    small.load_state_dict(ship.load(tmp_path / "m.lc3m"))


def test_a_shared_weight_is_not_factored() -> None:
    first, last = nn.Embedding(30, 20), nn.Linear(20, 30, bias=False)
    last.weight = first.weight
    net = nn.Sequential(first, nn.Linear(20, 20), last)
    small = ship.low_rank(net, 0.3)
    assert isinstance(small[1], nn.Sequential)  # type: ignore[index]
    assert small[2].weight is small[0].weight  # type: ignore[index]


def test_the_kfac_score_is_that_of_the_dense_inverse() -> None:
    """Where the Fisher matrix is a Kronecker product: equal to 1e-5 of its own."""
    torch.manual_seed(0)
    o, i = 5, 7
    a, g = (torch.randn(n, 3 * n, dtype=torch.double) for n in (i, o))
    a, g = a @ a.T / len(a), g @ g.T / len(g)
    weight = torch.randn(o, i, dtype=torch.double)
    fisher = torch.kron(g, a)
    inverse = torch.linalg.inv(fisher).diagonal().view(o, i)
    expected = 0.5 * weight.square() / inverse
    found = pruning.obs_score(weight, a, g, damping=1e-12)
    assert ((found - expected).abs() / expected).max() < 1e-5
    # What is split between the factors does not matter, damped or not.
    damped = pruning.obs_score(weight, a, g, damping=0.1)
    again = pruning.obs_score(weight, 100 * a, g / 100, damping=0.1)
    assert torch.allclose(damped, again, rtol=1e-12)
    assert not torch.allclose(damped, found, rtol=0.01)


def test_the_factors_are_second_moments_of_inputs_and_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(50, 2, 3, 3)
    layers: Any = {"0": net[0], "2": net[2]}
    found = pruning.factors(net, layers, [x[:20], x[20:]])
    hidden = nn.Sequential(*list(net)[:2])(x).detach()
    ones = torch.cat([hidden, torch.ones(50, 1)], 1).double()
    assert torch.allclose(found["2"][0], ones.T @ ones / 50)
    assert found["0"][0].shape == (2 * 2 * 2 + 1,) * 2
    assert found["0"][0][-1, -1].item() == pytest.approx(1)
    # Of labels drawn from p the mean of the squared gradient is p (1 - p).
    p = net(x).softmax(1)
    expected = (p * (1 - p)).mean(0).double()
    assert torch.allclose(found["2"][1].diagonal(), expected, rtol=0.6)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("score", ["magnitude", "kfac", "fisher"])
def test_one_number_goes_in_and_masks_stay_through_training(score: Any) -> None:
    torch.manual_seed(0)
    first = nn.Linear(30, 40)
    with torch.no_grad():
        first.weight.mul_(0.1)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(40, 5))
    batches = [torch.randn(64, 30) for _ in range(3)]
    masks = ship.prune(net, batches, 0.1, score)
    kept = {n: m.clone() for n, m in masks.masks.items()}
    assert sum(int(m.sum()) for m in kept.values()) == round(0.1 * 1400)
    if score == "magnitude":  # its weights are a tenth as large
        assert masks["0.weight"].sum() < masks["2.weight"].sum()
    assert masks.densities().keys() == {"0.weight", "2.weight"}
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    with masks.follow(optimizer):
        for batch in batches * 3:
            optimizer.zero_grad()
            net(batch).square().sum().backward()
            optimizer.step()
    named = dict(net.named_parameters())
    assert all(not named[n][~m].any() for n, m in kept.items())
    optimizer.step()
    assert any(named[n][~m].any() for n, m in kept.items())  # closed: free again


def test_fit_finds_the_largest_step_and_gives_the_weights_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(200, 64)
    with torch.no_grad():
        right = net(x)
    before = {n: t.clone() for n, t in net.state_dict().items()}

    def evaluate(model: nn.Module) -> float:
        return -float((model(x) - right).square().mean().detach())

    plans = [ship.fit(net, evaluate, drop=drop) for drop in (1e-4, 1e-2)]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert plans[0].step < plans[1].step
    assert plans[0].nbytes > plans[1].nbytes
    for plan, drop in zip(plans, (1e-4, 1e-2), strict=True):
        assert -drop <= plan.score <= -drop / 2
        written = plan.save(net, tmp_path / "m.lc3m")
        assert plan.nbytes < written < plan.nbytes + 200
        net.load_state_dict(ship.load(tmp_path / "m.lc3m"))
        assert evaluate(net) == plan.score
        net.load_state_dict(before)
    with pytest.raises(ConfigError, match=r"evaluate returned nan"):
        ship.fit(net, lambda _: float("nan"))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (lambda n: ship.low_rank(n, 0.0), r"budget=0\.0 must be a share"),
        (lambda n: ship.low_rank(n, 0.001), "less than the .* smallest ranks take"),
        (lambda n: ship.low_rank(n, 0.5, "svd"), "rule='svd' must be one of enc-map"),  # type: ignore[arg-type]
        (lambda n: ship.low_rank(n, 0.5, split="x"), "split='x' must be one of"),  # type: ignore[arg-type]
        (lambda n: ship.low_rank(nn.ReLU(), 0.5), "ReLU has no layer that can be fac"),
        (lambda n: ship.prune(n, [], 0.0), r"density=0\.0 must be above 0"),
        (lambda n: ship.prune(n, [], 0.5, "obd"), "score='obd' must be one of kfac"),  # type: ignore[arg-type]
        (lambda n: ship.prune(n, [], 0.5, "kfac"), "needs batches of inputs"),
        (lambda n: ship.prune(n, [], 0.5, "fisher"), "needs batches of inputs"),
        (lambda n: ship.prune(n, [], 0.5, damping=0.0), r"damping=0\.0 must be above"),
        (lambda n: ship.prune(nn.ReLU(), [], 0.5), "no layer that can be pruned"),
        (lambda n: ship.fit(n, lambda _: 0.0, drop=-1), "drop=-1 must be a number"),
    ],
)  # fmt: skip
def test_bad_choices_are_named(job: Any, words: str) -> None:
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with pytest.raises(ConfigError, match=words):
        job(net)


def test_information_is_bounded_and_does_not_see_a_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator)
    y = (x[:, 0] > 0).long()
    found = information.adaptive_bins(x, y, bins=4)
    assert found == information.adaptive_bins(x.double() ** 3 * 1000, y, bins=4)
    assert 0 <= found.shuffled < 0.2 < found.labels <= 1
    assert found.inputs <= np.log2(400)
    assert found.telling
    wide = information.adaptive_bins(torch.randn(400, 50), y)
    assert wide.inputs == pytest.approx(np.log2(400))
    assert not wide.telling  # each sample has a code of its own: nothing is said
    smooth = information.adaptive_kde(x, y)
    scaled = information.adaptive_kde(x * 1000, y)
    assert smooth.labels == pytest.approx(scaled.labels)
    assert 0.5 < smooth.labels <= 1.0001
    assert smooth.shuffled < smooth.labels
    with pytest.raises(InputError, match=r"must be \[n, units\] and \[n\]"):
        information.adaptive_bins(x, y[:5])
    with pytest.raises(InputError, match="must be finite"):
        information.adaptive_kde(x * torch.inf, y)


def test_a_shipped_model_differs_only_where_it_does_so_more_than_another_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=generator)
    y = (x[:, 0] > 0).long()

    def net(weight: Tensor) -> nn.Module:
        layer = nn.Linear(4, 1, bias=False)
        layer.weight.data = weight
        return nn.Sequential(layer, nn.Tanh(), nn.Flatten())

    full = net(torch.tensor([[1.0, 0.1, 0.0, 0.0]]))
    near, other = (net(torch.tensor([[1.0, a, 0.0, 0.0]])) for a in (0.11, 0.4))
    broken = net(torch.tensor([[0.5, 1.0, 0.0, 0.0]]))
    idle = net(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    for shipped, different in ((full, False), (near, False), (broken, True)):
        found = list(information.compare(full, shipped, other, x, y, ["1"]))
        assert [one.estimator for one in found] == ["bins", "kernels"]
        assert all(one.telling for one in found)
        assert [one.different for one in found] == [different] * 2
    lost = list(information.compare(full, idle, other, x, y, ["1"]))
    assert not any(one.telling or one.different for one in lost)
    text = information.page(lost)
    assert text.count("nothing: shuffled labels give more than half") == 2
    assert text.count("| another seed |") == 2
    same = found[0]._replace(shipped=found[0].full)
    assert "| no more than another seed |" in information.page([same])
    with pytest.raises(InputError, match="no layer '7'"):
        list(information.compare(full, full, full, x, y, ["7"]))


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_ship_run(name: str) -> None:
    module = importlib.import_module(f"lc3.ship.{name}")
    given = {"torch": torch, "model": nn.Linear(8, 2), "np": np, "nn": nn}
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    failed, tried = doctest.testmod(module, extraglobs=given, optionflags=flags)
    assert tried
    assert not failed


def test_every_public_name_has_an_example() -> None:
    for name in set(ship.__all__) - {"Masks", "Plan", "Row", "information"}:
        assert ">>>" in (getattr(ship, name).__doc__ or ""), name


def test_layers_without_factors_are_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.used(self.used(x)))

    inputs = torch.randn(4, 6)
    images = torch.randn(4, 2, 6, 6)
    same = nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), nn.Flatten())
    idle = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    idle.forward = lambda x: idle["a"](x)
    for model, batch, words in (
        (Twice(), inputs, "uses layer 'used' twice"),
        (idle, inputs, "does not reach layer 'b'"),
        (same, images, "padding='same'"),
    ):
        for score in ("kfac", "fisher"):
            with pytest.raises(ConfigError, match=words):
                ship.prune(model, [batch], 0.5, score)
        assert ship.prune(model, [], 0.5).densities()


@pytest.mark.parametrize("train", [True, False])
def test_layers_that_torch_reads_the_weights_of_stay_whole(train: bool) -> None:
    net = nn.Sequential(
        nn.TransformerEncoderLayer(32, 2, batch_first=True), nn.Linear(32, 32)
    )
    small = ship.low_rank(net, 0.5).train(train)
    with torch.no_grad():
        assert small(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    assert isinstance(small.get_submodule("1"), nn.Sequential)
    with pytest.raises(ConfigError, match="no layer that can be factored"):
        ship.low_rank(nn.TransformerEncoderLayer(32, 2), 0.5)


def test_factors_are_trained_as_the_layer_is() -> None:
    last = nn.Linear(64, 64)
    net = nn.Sequential(nn.Linear(64, 64), last).requires_grad_(False)
    last.bias.requires_grad_(True)
    small = ship.low_rank(net, 0.25)
    assert [n for n, p in small.named_parameters() if p.requires_grad] == ["1.1.bias"]


def test_a_layer_that_is_not_finite_is_named() -> None:
    layer = nn.Linear(64, 64)
    net = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight[3, 3] = float("nan")
    with pytest.raises(ConfigError, match="weight of '0' has values that are not fin"):
        ship.low_rank(net, 0.5)
    with pytest.raises(ConfigError, match="budget='a' must be a number"):
        ship.low_rank(net, "a")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="drop='a' must be a number"):
        ship.fit(net, lambda _: 0.0, "a")  # type: ignore[arg-type]
