"""A budget of bytes is held, and every rank steers alike."""

import dataclasses
import itertools
import logging
import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from lc3 import ConfigError
from lc3.budget import LOOK_EVERY, Budget
from lc3.config import Settings
from lc3.transport.protocol import Transport
from tests.test_engine import engine_of, in_threads

SHAPES = [("a", (120, 130)), ("b", (90, 200)), ("bias", (130,))]
PLAIN = Settings(min_numel=500, min_shard=4000)


def gradients(rank: int, step: int, tails: float) -> dict[str, Tensor]:
    """Return noise around a mean of its own, with heavy tails or light ones."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    found = {}
    for name, shape in SHAPES:
        noise = torch.randn(shape, generator=generator).reshape(-1)
        found[name] = noise.sign() * noise.abs() ** tails
    return found


def run(
    config: Settings, steps: int, tails: float = 3, world: int = 3
) -> list[tuple[list[int], list[float]]]:
    """Return of each rank the bytes of every step, and what it sent by then."""

    def job(rank: int, transport: Transport) -> tuple[list[int], list[float]]:
        engine = engine_of(transport, config, shapes=SHAPES)
        late, sent, chosen = random.Random(rank), [0], []
        for step in range(steps):
            if late.random() < 0.05:
                time.sleep(0.002)
            engine.all_reduce(gradients(rank, step, tails), step, 0)
            sent.append(transport.sent_bytes)
            chosen.append(engine.budget.density or engine.budget.sparsity)
        return [b - a for a, b in itertools.pairwise(sent)], chosen

    results = in_threads(world, job)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def mean_bytes(results: list[Any], since: int) -> float:
    steps = [sum(sent[since:]) / len(sent[since:]) for sent, _ in results]
    return float(sum(steps) / len(steps))


@pytest.mark.parametrize(("begin", "share"), [(1.0, 0.3), (1.0, 0.6), (1.9, 0.5)])
def test_a_sparsity_holds_a_budget(begin: float, share: float) -> None:
    """Within 10 %, from wherever it begins, with ranks that are late."""
    most = mean_bytes(run(PLAIN, 60), 30)
    least = mean_bytes(run(dataclasses.replace(PLAIN, sparsity=1.95), 60), 30)
    target = round(least + share * (most - least))
    config = dataclasses.replace(PLAIN, sparsity=begin, bytes_per_step=target)
    results = run(config, 360)
    assert mean_bytes(results, 120) == pytest.approx(target, rel=0.1)
    chosen = [by_rank for _, by_rank in results]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(set(chosen[0])) > 5


def test_a_density_holds_a_budget() -> None:
    least = mean_bytes(run(dataclasses.replace(PLAIN, density=0.02), 60, 1), 30)
    most = mean_bytes(run(dataclasses.replace(PLAIN, density=0.2), 60, 1), 30)
    target = round((least * most) ** 0.5)
    config = dataclasses.replace(PLAIN, density=0.2, bytes_per_step=target)
    results = run(config, 300, 1)
    assert mean_bytes(results, 100) == pytest.approx(target, rel=0.1)
    chosen = [by_rank for _, by_rank in results]
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_budget_that_cannot_be_held_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="lc3.budget"):
        results = run(dataclasses.replace(PLAIN, bytes_per_step=10), 160, world=1 + 1)
    said = {record.getMessage() for record in caplog.records}
    assert all("bytes_per_step=10 cannot be held" in sentence for sentence in said)
    assert len(caplog.records) == 2  # a rank each
    assert results[0][1][-1] == 1.98


def test_a_budget_goes_on_from_its_counters() -> None:
    """The same decisions follow from the same counters."""
    config = dataclasses.replace(PLAIN, bytes_per_step=1000, pull_sparsity=1.2)
    straight = Budget(config)
    for exchange in range(40):
        if straight.due():
            straight.look(straight.sent_bytes)
        straight.sent_bytes += 900 + 30 * exchange
        if exchange == 20:
            counters = straight.counters()
    resumed = Budget(config)
    resumed.load(counters)
    for exchange in range(21, 40):
        if resumed.due():
            resumed.look(resumed.sent_bytes)
        resumed.sent_bytes += 900 + 30 * exchange
    assert resumed.counters() == straight.counters()
    assert Budget(PLAIN).counters() == {}


def test_without_a_budget_nothing_is_shared_or_moved() -> None:
    budget = Budget(PLAIN)
    assert not any(budget.due() for _ in range(5 * LOOK_EVERY))
    assert (budget.sparsity, budget.pull_sparsity) == (1.0, 1.0)


@pytest.mark.parametrize("budget", [0, -5, 1.5, True, "10kB"])
def test_a_budget_is_a_count_of_bytes(budget: Any) -> None:
    with pytest.raises(ConfigError, match="bytes_per_step="):
        Settings(bytes_per_step=budget)


def test_a_budget_needs_3lc() -> None:
    with pytest.raises(ConfigError, match="mode='auto' may send without it"):
        Settings(bytes_per_step=1000, mode="auto")
