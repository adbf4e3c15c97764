"""Dividing by shared second moments: what the oracle in test_ddp does not show."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lc3.module import applied
from lc3.module.moments import Moments, matrix_of
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
    moments = Moments({"a": shape}, {"a": 0.99}, torch.device("cpu"))
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


def test_an_update_is_bounded_by_the_lower_of_two() -> None:
    for most, bound in ((3.0, 3.0), (20.0, 10.0), (math.inf, 10.0)):
        moments = Moments({"a": (4,)}, {"a": 0.99}, torch.device("cpu"), most)
        moments.take(["a"], moments.of({"a": torch.zeros(4)}))
        gradient = torch.tensor([1.0, -1.0, 0.0, torch.inf])
        moments.divide({"a": gradient})
        assert gradient[:3].tolist() == pytest.approx([bound, -bound, 0])
        assert gradient[3].isnan()


def test_an_overflow_does_not_stay() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(20)
    moments = moments_of(gradient, (4, 5))
    kept = moments.kept["a"].clone()
    moments.take(["a"], moments.of({"a": gradient * torch.inf}))
    assert torch.equal(moments.kept["a"], kept)


def test_a_clipped_gradient_leaves_moments_of_what_was_applied() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 20)
    clipped, wanted = (moments_of(first, (4, 5)) for _ in range(2))
    clipped.take(["a"], clipped.of({"a": second}))
    clipped.settle({"a": 0.25})
    wanted.take(["a"], wanted.of({"a": 0.25 * second}))
    torch.testing.assert_close(clipped.kept["a"], wanted.kept["a"])
    clipped.take(["a"], clipped.of({"a": second}))
    clipped.settle({"a": 0.0})
    torch.testing.assert_close(clipped.kept["a"], wanted.kept["a"])


@pytest.mark.parametrize("shape", [(64, 64), (70, 130), (3, 5), (128, 64), (600,)])
def test_multiplying_undoes_dividing(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(math.prod(shape))
    moments = moments_of(gradient, shape)
    value = gradient.clone()
    moments.divide({"a": value})
    torch.testing.assert_close(value.square(), value.square().clamp(max=100))
    moments.multiply({"a": value})
    torch.testing.assert_close(value, gradient)
    squares = gradient.square() / moments.of_elements("a")
    assert 0.3 < float(squares.mean()) < 3


def test_moments_come_in_the_first_steps_and_then_in_every_tenth() -> None:
    moments = Moments({}, {}, torch.device("cpu"))
    due = [step for step in range(40) if moments.due(step)]
    assert due == [*range(10), 19, 29, 39]


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_goes_on_from_its_state(ranks: Pools, merged: bool) -> None:
    reports = ranks(2).run(ddp_cases.resumes_with_adam, merged)
    assert len({digest for report in reports for digest in report}) == 1


def test_an_overflow_on_one_rank_is_skipped_on_all(ranks: Pools) -> None:
    first, second = ranks(2).run(ddp_cases.overflows_with_adam)
    assert first["hashes"] == second["hashes"]
    hashes = first["hashes"]
    assert [i for i in range(1, 30) if hashes[i] == hashes[i - 1]] == [14]
    assert first["finite"]
    assert first["losses"][-1] < 0.8 * first["losses"][0]


def test_a_sparse_gradient_is_that_of_plain_ddp(ranks: Pools) -> None:
    assert ranks(2).run(ddp_cases.sparse_with_adam) == [0.0, 0.0]


class Coded(torch.Tensor):
    """What 8-bit optimizers keep: not every operator knows it."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.isinf:
            raise NotImplementedError("isinf of coded numbers")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_only_plain_second_moments_are_looked_at() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    held = torch.tensor([1.0, torch.inf])
    optimizer.state[parameter] = {"exp_avg_sq": held.as_subclass(Coded)}
    assert not applied._holds_inf(optimizer)
    optimizer.state[parameter] = {"exp_avg_sq": held}
    assert applied._holds_inf(optimizer)
    optimizer.state[parameter] = {"exp_avg_sq": held[:1]}
    assert not applied._holds_inf(optimizer)
