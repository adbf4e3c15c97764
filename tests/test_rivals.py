"""The rivals are what their papers say, and send what they count."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.harness import quantized, rivals, rivals_each_step
from tests import rivals_cases
from tests.ranks import Ranks

Pools = Callable[[int], Ranks]
VECTORS_OF = Path(__file__).parent / "vectors"
VECTORS, DEMO, MULOCO = (
    json.loads((VECTORS_OF / f"{name}.json").read_text())
    for name in ("sparseloco", "demo", "muloco")
)


def made(shape: list[int]) -> torch.Tensor:
    """Return the tensor that the authors' code has coded: no two magnitudes equal."""
    count = math.prod(shape)
    values = (torch.arange(count) * 7919) % 12289
    return ((values.double() + 0.3 - 6144) / 6144).pow(3).float().reshape(shape)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: str(case["shape"]))
def test_sparse_is_the_authors(case: dict[str, Any]) -> None:
    x = made(case["shape"])
    coded = rivals.sparse(x)
    decoded = rivals.of_sparse(coded, x)
    expected = torch.zeros(x.numel())
    expected[case["places"]] = torch.tensor(case["values"])
    torch.testing.assert_close(decoded.reshape(-1), expected, rtol=0, atol=1e-6)
    assert case["index_bytes"] == 12 * case["kept"] // 8
    codes = -(-2 * case["kept"] // 8)
    assert coded.numel() == case["index_bytes"] + codes + 20


def test_a_chunk_of_64_by_64_costs_what_the_paper_says() -> None:
    """64 of 4 096 values, each by 12 + 2 bits: 0.21875 bits of a value."""
    x = torch.randn(640, 640)
    coded = rivals.sparse(x)
    bits = 8 * (coded.numel() - 20) / 640**2
    assert bits == 0.21875
    assert int((rivals.of_sparse(coded, x) != 0).sum()) <= 100 * 64


def test_e3m0_has_eight_magnitudes() -> None:
    x = torch.linspace(-3, 3, 4001)
    coded = rivals.e3m0(x)
    assert coded.numel() == 2001 + 4
    found = rivals.of_e3m0(coded, x)
    assert bool((found * x >= 0).all())
    levels = [0.0, *(3 * 2.0**-k for k in range(6, -1, -1))]
    assert sorted(set(found.abs().tolist())) == pytest.approx(levels)
    nearest = torch.tensor(levels)[
        (x.abs()[:, None] - torch.tensor(levels)).abs().argmin(1)
    ]
    between = torch.isclose(found.abs(), nearest)
    assert between.float().mean() > 0.998  # ties aside
    nothing = torch.zeros(5)
    assert torch.equal(rivals.of_e3m0(rivals.e3m0(nothing), nothing), nothing)


@pytest.mark.parametrize("kind", ["DiLoCo", "DiLoCo, E3M0", "SparseLoCo"])
def test_three_ranks_equal_a_few_lines(ranks: Pools, kind: str) -> None:
    for apart, replicas, counted, shared in ranks(3).run(rivals_cases.trains, kind):
        assert apart < 1e-6
        assert replicas
        assert counted
        assert shared


@pytest.mark.parametrize("case", DEMO, ids=lambda case: str(case["shape"]))
def test_demos_coefficients_are_the_authors(case: dict[str, Any]) -> None:
    x = made(case["shape"])
    coefficients = rivals_each_step.cosines(x)
    energy = float(coefficients.double().square().sum())
    assert energy == pytest.approx(case["sum"], rel=1e-5)
    places, values = rivals_each_step.largest(coefficients, 32)
    assert places.numel() == case["kept"]
    sent = rivals_each_step.spread([places], [values], x)
    decoded = rivals_each_step.of_cosines(sent, x)
    assert float(decoded.double().norm()) == pytest.approx(case["norm"], rel=1e-5)
    expected = torch.tensor(case["decoded"])
    torch.testing.assert_close(decoded.reshape(-1)[::37], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", MULOCO, ids=lambda c: f"{c['bits']}, {c['shape']}")
def test_codes_by_statistics_are_mulocos_authors(case: dict[str, Any]) -> None:
    x = made(case["shape"])
    codes, table, mean = quantized.statistical(x, case["bits"])
    sent = quantized.packed(codes, case["bits"])
    assert sent.numel() == case["bytes"]
    assert sent[:200].tolist() == case["packed"]
    expected = torch.tensor(case["decoded"])
    found = (table[codes] + mean)[::17]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_muloco_equals_a_few_lines(ranks: Pools, bits: int) -> None:
    for apart, replicas, counted in ranks(3).run(rivals_cases.muloco, bits):
        assert apart < 1e-6
        assert replicas
        assert counted


def test_demo_equals_a_few_lines(ranks: Pools) -> None:
    """32 of 4 096 coefficients by 16 + 32 bits: 0.375 bits of a value."""
    for found in ranks(3).run(rivals_cases.steps_together, "DeMo", 6):
        assert found["wrong"] < 0.001  # signs of what is nearly zero
        assert found["replicas"]
        chunks = [(2, 32), (2, 32), (2, 32), (1, 10)]  # of the net's four tensors
        assert found["sent"] == 6 * 2 * 6 * sum(n * kept for n, kept in chunks)
    places, _ = rivals_each_step.largest(
        rivals_each_step.cosines(torch.randn(640, 640)), 32
    )
    assert 48 * places.numel() / 640**2 == 0.375


def test_one_bit_adam_equals_a_few_lines(ranks: Pools) -> None:
    steps = 150  # a sign that hangs on the last bit would come to tell later on
    for found in ranks(3).run(rivals_cases.steps_together, "OneBitAdam", steps):
        assert found["wrong"] < 0.001
        assert found["replicas"]
        assert 100 < found["frozen_at"] < steps - 40
        coded = steps - found["frozen_at"]
        dense = 2 * 2 * 4 * found["elements"] // 3 * found["frozen_at"]
        ones = found["sent"] - dense
        assert ones < 1.25 * coded * 2 * 2 * found["elements"] / 8 / 3 + 300 * coded


def test_ef21_muon_equals_a_few_lines(ranks: Pools) -> None:
    for found in ranks(3).run(rivals_cases.steps_together, "Ef21Muon", 8):
        assert found["wrong"] < 0.01
        assert found["replicas"]
        # A tenth by 9 bits and a place, after a first step in float32.
        assert found["push"] * 8 - 32 == pytest.approx(7 * 0.1 * (9 + 32), rel=0.01)


def test_natural_compression_is_a_power_of_two() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 1.49, 1.5, -3.1, 1e-20, -7e8])
    coded = rivals_each_step.natural(x)
    assert coded.numel() == len(x) + 1
    found = rivals_each_step.of_natural(coded, len(x))
    assert found[:6].tolist() == [0.0, 1.0, -1.0, 1.0, 2.0, -4.0]
    assert bool(((found - x).abs() <= x.abs() / 3).all())


def test_an_update_of_muon_is_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((20, 40), (40, 20)):
        x = torch.randn(shape)
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        found = rivals_each_step.orthogonal(x)
        sizes = torch.linalg.svdvals(found)
        assert bool((sizes > 0.6).all())
        assert bool((sizes < 1.3).all())
        assert float((found * (u @ vt)).sum() / found.norm() / (u @ vt).norm()) > 0.97
