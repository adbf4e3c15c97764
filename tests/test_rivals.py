"""DiLoCo and SparseLoCo are what their papers say, and send what they count."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import rivals
from tests import rivals_cases
from tests.ranks import Ranks

Pools = Callable[[int], Ranks]
VECTORS = json.loads((Path(__file__).parent / "golden/sparseloco.json").read_text())


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
