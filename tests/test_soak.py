"""A short form of ``make soak``."""

from collections.abc import Callable

import pytest

from lc3 import Config
from tests import soak
from tests.ranks import Ranks


@pytest.mark.parametrize("config", [soak.CONFIG, soak.DIRECT], ids=["owners", "direct"])
def test_steps_with_faults_equal_the_oracle(config: Config) -> None:
    seen = soak.steps(400, 1, config)
    assert seen["steps"] == 400
    assert min(seen["non-finite"], seen["silent"], seen["slow"]) > 3
    assert seen["more threads"] <= 0
    assert seen["more files"] <= 0


@pytest.mark.timeout(280)
def test_a_killed_worker_costs_nothing() -> None:
    assert soak.kills(1, 240, seed=3)["killed"] == 1


def test_raises_reach_every_rank(ranks: Callable[[int], Ranks]) -> None:
    assert soak.raises(12, 100, ranks(3))["heard"] == 24
