"""What a step costs in Python does not grow: calls, between rooms, upward."""

from collections.abc import Callable

import pytest

from tests import calls
from tests.ranks import Ranks

MOST = {
    "ddp, plain": (300, 110, 5),
    "ddp, sgd": (350, 110, 5),
    "ddp, adamw": (465, 130, 5),
    "local_sgd": (510, 140, 5),
    "push_pull": (460, 140, 5),
}


@pytest.mark.parametrize("form", calls.FORMS)
def test_a_step_makes_few_calls(ranks: Callable[[int], Ranks], form: str) -> None:
    for found in ranks(2).run(calls.walk, form):
        most = dict(zip(("calls", "crossings", "upward"), MOST[form], strict=True))
        assert all(found[key] <= limit for key, limit in most.items()), found
        assert found["calls"] > 100
