"""AdamW in loops as people write them: lc3's line beside the loop without it."""

from collections.abc import Callable

import pytest

from tests import loop_cases
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]


@pytest.mark.parametrize("name", loop_cases.LOOPS)
def test_a_loop_trains_as_without_lc3(ranks: Pools, name: str) -> None:
    plain, coded = (
        ranks(2).run(loop_cases.trained, name, attach) for attach in (False, True)
    )
    assert len({hash_of for _, hash_of, _ in coded}) == 1
    loss, expected = coded[0][0], plain[0][0]
    assert loss < 1.12 * expected
    for norm, without in zip(coded[0][2][:3], plain[0][2][:3], strict=True):
        assert norm == pytest.approx(without, rel=0.2)  # an estimate, and two models


def test_an_optimizer_that_attach_was_not_given_is_an_error(ranks: Pools) -> None:
    for said in ranks(2).run(loop_cases.another_optimizer):
        assert "is not the optimizer that attach was given" in said


def test_max_norm_is_of_all_optimizers(ranks: Pools) -> None:
    for plain, coded in ranks(2).run(loop_cases.max_norm_of_two):
        assert coded == pytest.approx(plain, rel=0.01)


def test_only_what_is_added_to_a_gradient_is_an_error(ranks: Pools) -> None:
    for beside, added in ranks(2).run(loop_cases.gradients_of_gradients):
        assert beside == "nothing"
        assert added.startswith("a second synchronised backward pass adds")
