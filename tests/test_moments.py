"""Dividing by shared second moments: what the oracle in test_ddp does not show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lc3
from lc3.hooks import local_sgd
from lc3.moments import Moments, matrix_of
from lc3.session import check_beta2, check_form
from tests import ddp_cases
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (0, 1)),
        ((7,), (0, 7)),
        ((5, 7), (5, 7)),
        ((0, 4), (0, 0)),
        ((64, 16, 3, 3), (64, 144)),
        ((3, 96, 96), (288, 96)),
        ((1, 1), (1, 1)),
    ],
)
def test_a_tensor_counts_as_the_matrix_of_fewest_rows_and_columns(
    shape: tuple[int, ...], matrix: tuple[int, int]
) -> None:
    assert matrix_of(shape) == matrix


def moments_of(gradient: torch.Tensor, shape: tuple[int, ...]) -> Moments:
    moments = Moments({"a": shape}, 0.99, torch.device("cpu"))
    moments.take(["a"], moments.of({"a": gradient}))
    return moments


def test_a_gradient_of_rank_one_becomes_its_sign() -> None:
    """Its squares are an outer product, so nothing is approximated."""
    torch.manual_seed(0)
    matrix = torch.randn(20, 1) * torch.randn(1, 30)
    for shape in ((20, 30), (600,)):
        gradient = matrix.flatten().clone()
        moments_of(gradient, shape).divide({"a": gradient})
        torch.testing.assert_close(gradient, matrix.flatten().sign())


def test_what_comes_out_of_nothing_is_bounded() -> None:
    before = torch.zeros(6)
    after = torch.tensor([1.0, -1.0, 1e-30, 0.0, torch.inf, torch.nan])
    moments_of(before, (6,)).divide({"a": after})
    assert after[:2].tolist() == pytest.approx([10, -10])
    assert 0 < after[2] < 1e-20
    assert after[3] == 0
    assert after[4:].isnan().all()


def test_an_overflow_does_not_stay() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(20)
    moments = moments_of(gradient, (4, 5))
    kept = moments.kept["a"].clone()
    moments.take(["a"], moments.of({"a": gradient * torch.inf}))
    assert torch.equal(moments.kept["a"], kept)


def test_gradients_of_another_scale() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(20)
    moments = moments_of(gradient, (4, 5))
    small, large = gradient.clone(), 1024 * gradient
    moments.divide({"a": small})
    moments.rescale(1024.0)
    moments.divide({"a": large})
    torch.testing.assert_close(small, large)


def test_moments_come_in_the_first_steps_and_then_in_every_fifth() -> None:
    moments = Moments({}, 0.99, torch.device("cpu"))
    due = [step for step in range(26) if moments.due(step)]
    assert due == [*range(10), 14, 19, 24]


@pytest.mark.parametrize("value", [0.0, 1.0, 1, True, "0.99", float("nan")])
def test_a_beta2_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(lc3.ConfigError, match=r"between 0 and 1, like 0\.99"):
        lc3.Config(beta2=value)


def test_who_cannot_divide_says_so() -> None:
    config = lc3.Config(beta2=0.99)
    with pytest.raises(lc3.ConfigError, match="leave one of them out"):
        lc3.Config(beta2=0.99, mode="auto")
    for check in (check_form, check_beta2):
        with pytest.raises(lc3.ConfigError, match=r"beta2=0\.99 is for hooks\.ddp"):
            check(config, "horovod")
    net = nn.Linear(2, 2)
    with pytest.raises(lc3.ConfigError, match=r"with hooks\.local_sgd leave it out"):
        local_sgd.attach(net, torch.optim.SGD(net.parameters()), config)


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_goes_on_from_its_state(ranks: Pools, merged: bool) -> None:
    reports = ranks(2).run(ddp_cases.resumes_with_moments, merged)
    assert len({digest for report in reports for digest in report}) == 1


def test_an_overflow_on_one_rank_is_skipped_on_all(ranks: Pools) -> None:
    first, second = ranks(2).run(ddp_cases.overflows_with_moments)
    assert first["hashes"] == second["hashes"]
    hashes = first["hashes"]
    assert [i for i in range(1, 30) if hashes[i] == hashes[i - 1]] == [14]
    assert first["finite"]
    assert first["losses"][-1] < 0.8 * first["losses"][0]


def test_a_sparse_gradient_is_refused_on_all_ranks(ranks: Pools) -> None:
    for said in ranks(2).run(ddp_cases.sparse_with_moments):
        assert "AttachError: the gradient of 'weight' is sparse" in said
        assert "leave Config.beta2 out" in said
