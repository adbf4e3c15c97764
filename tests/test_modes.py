"""Every combination of DDP's modes equals the oracle, or is refused in a sentence."""

from collections.abc import Callable

import pytest

from tests import mode_cases
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(300)
Pools = Callable[[int], Ranks]


def test_every_combination_of_modes_equals_the_oracle(ranks: Pools) -> None:
    done = ranks(2).run(mode_cases.every_combination, timeout_s=250)
    assert done[0] == done[1] == [name for name, _ in mode_cases.matrix()]
    assert len(done[0]) == 60


def test_a_static_graph_must_begin_synchronised_with_and_without_lc3(
    ranks: Pools,
) -> None:
    for plain, attached in ranks(2).run(
        mode_cases.static_graph_that_begins_unsynchronised
    ):
        assert "expect_autograd_hooks_ INTERNAL ASSERT FAILED" in plain
        assert plain == attached
    assert all(ranks(2).run(mode_cases.static_graph_accumulates))


@pytest.mark.parametrize("view", [False, True])
def test_join_with_uneven_inputs(ranks: Pools, view: bool) -> None:
    assert ranks(3).run(mode_cases.joins, view) == [3, 5, 7]


def test_two_synchronised_backward_passes_a_step(ranks: Pools) -> None:
    assert all(ranks(3).run(mode_cases.backward_twice))


@pytest.mark.parametrize(
    "mode",
    ["ddp_optimizer", "no_optimization", "python_reducer_without_compiled_forward"],
)
def test_compile_changes_nothing(ranks: Pools, mode: str) -> None:
    hashes = ranks(2).run(mode_cases.compiled, mode)
    assert len(set(hashes)) == 1
    assert hashes == ranks(2).run(mode_cases.compiled, "eager")


def test_the_python_reducer_is_refused(ranks: Pools) -> None:
    for said in ranks(2).run(mode_cases.compiled, "python_reducer"):
        assert said.startswith("AttachError: with torch._dynamo.config.optimize_ddp =")
        assert 'set it to "ddp_optimizer" before the model is wrapped' in said


@pytest.mark.parametrize(("world", "runs"), [(2, 40), (3, 40), (4, 40)])
def test_random_models_with_ranks_that_are_late(
    ranks: Pools, world: int, runs: int
) -> None:
    done = ranks(world).run(mode_cases.random_runs, runs, world, timeout_s=250)
    assert done == [runs] * world
