"""A short form of ``make soak``."""

from collections.abc import Callable

import pytest

from lc3.config import Settings
from tests import faults, signals, soak
from tests.ranks import Ranks


@pytest.mark.parametrize("config", [soak.CONFIG, soak.DIRECT], ids=["owners", "direct"])
def test_steps_with_faults_equal_the_oracle(config: Settings) -> None:
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


@pytest.mark.timeout(280)
def test_a_signal_to_one_rank_hangs_nobody() -> None:
    seen = signals.campaign(5, seed=4)
    assert [seen[deed] for deed in signals.DEEDS] == [1, 1, 1, 1, 1]


@pytest.mark.timeout(280)
def test_what_bad_numbers_once_did(ranks: Callable[[int], Ranks]) -> None:
    """Statistics of all ranks, an inf second moment, none yet, a replica, a scale."""
    pool = ranks(faults.WORLD)
    for form, fault, ends in (
        ("local_sgd, momentum", "nan, all ranks", "well"),
        ("local_sgd, delayed, adamw", "nan, ranks in turn", "well"),
        ("local_sgd, delayed, momentum", "1e38", "well"),
        ("ddp, adamw", "1e38", "well"),
        ("ddp, direct, adamw", "nan, first step", "poisoned; restored: well"),
        ("push_pull, clipped, adamw", "nan parameter", "told"),
    ):
        found = pool.run(faults.cells, faults.FORMS[form], [fault], timeout_s=120)
        verdicts = {cells[fault].partition(":")[0] for cells in found}
        whole = {cells[fault] for cells in found}
        assert verdicts == {ends} or whole == {ends}, (form, fault, whole)


@pytest.mark.timeout(280)
def test_bad_numbers_neither_stall_nor_poison(ranks: Callable[[int], Ranks]) -> None:
    """Every fault once, of the 777 cells of ``make faults``."""
    forms = list(faults.FORMS)[::5]
    names = list(faults.FAULTS)
    every = -(-len(names) // len(forms))
    seen = faults.campaign(
        ranks(faults.WORLD), forms, lambda index: names[index * every :][:every]
    )
    assert sum(seen.values()) == len(names)
