"""Masters and replicas equal one process of 3LC parameter servers, bit for bit."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lc3 import ConfigError
from lc3.engines.exchange import pending
from lc3.masters.owners import owners_of
from lc3.session.checks import check_owners
from lc3.transport.protocol import Transport
from tests.oracle import Floats, Servers
from tests.test_engine import (
    DIRECT,
    SHAPES,
    SMALL,
    engine_of,
    in_threads,
    random_gradients,
)

CONFIGS = {
    "s = 1": SMALL,
    "s = 1.75, pull 1.25": dataclasses.replace(
        SMALL, sparsity=1.75, pull_sparsity=1.25
    ),
    "without owners": DIRECT,
    "density": dataclasses.replace(SMALL, density=0.1),
    "blocks": dataclasses.replace(SMALL, block_size=64, entropy="none"),
}
BAD_STEP = 7


def start() -> dict[str, Tensor]:
    return random_gradients(99, 99)


def values(rank: int, step: int) -> dict[str, Tensor]:
    """Return a step's values; one rank has nothing to say at times, or a NaN."""
    some = random_gradients(rank, step)
    if step % 3 == 1 and rank == 0:
        some["a"].zero_()
    if step == BAD_STEP and rank == 1:
        some["c"][5] = torch.nan
    return some


def as_numpy(tensors: dict[str, Tensor]) -> dict[str, Floats]:
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


class Momentum:
    """SGD with momentum, for tensors of torch and arrays of NumPy alike."""

    def __init__(self) -> None:
        self.velocity: dict[tuple[str, int], Any] = {}

    def step(self, name: str, first: int, master: Any, mean: Any) -> None:
        if not np.isfinite(np.asarray(mean)).all():
            return
        before = self.velocity.get((name, first), 0.0 * mean)
        self.velocity[name, first] = before * 0.5 + mean
        master -= self.velocity[name, first] * 0.125


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_owners_equal_the_servers(world: int, name: str) -> None:
    steps, config = 60, CONFIGS[name]
    servers = Servers(SHAPES, world, config, as_numpy(start()))
    optimizer, expected = Momentum(), []
    for step in range(steps):
        everyone = [as_numpy(values(rank, step)) for rank in range(world)]
        servers.exchange(
            everyone,
            lambda n, p, master, mean: optimizer.step(n, p.start, master, mean),
        )
        expected.append({n: value.copy() for n, value in servers.replica.items()})

    def job(rank: int, transport: Transport) -> None:
        owners, mine = owners_of(engine_of(transport, config), start()), Momentum()
        for step in range(steps):
            pushed = values(rank, step)
            owners.push(pushed, step, 0)
            for piece in owners.owned:
                mean = owners.mean(piece)
                mine.step(piece.name, piece.start, owners.master(piece), mean)
            owners.pull(pushed, step, 0)
            for n, replica in owners.replica.items():
                np.testing.assert_array_equal(replica.numpy(), expected[step][n], n)
        for piece in owners.owned:
            np.testing.assert_array_equal(
                owners.master(piece).numpy(),
                servers.masters[piece.name][piece.start : piece.stop],
            )
        owners.flush()
        for n, replica in owners.replica.items():
            np.testing.assert_array_equal(replica.numpy(), servers.masters[n], n)

    for result in in_threads(world, job, timeout_s=60):
        if isinstance(result, Exception):
            raise result


def test_without_owners_a_run_goes_on_from_what_masters_were_ahead() -> None:
    """Where replicas would be if all had arrived is the same before and after."""
    rate = 0.5

    def job(rank: int, transport: Transport) -> tuple[Tensor, Tensor, Tensor]:
        before = owners_of(engine_of(transport), start())
        for step in range(6):
            pushed = random_gradients(rank, step)
            before.push(pushed, step, 0)
            for piece in before.owned:
                before.master(piece).sub_(before.mean(piece), alpha=rate)
            before.pull(pushed, step, 0)
        after = owners_of(engine_of(transport, DIRECT), dict(before.replica))
        for name, sent in before.engine.residuals.sent.items():
            after.engine.residuals.sent[name].copy_(sent)
        ahead = {name: master.clone() for name, master in before.masters.items()}
        after.take_lead(ahead, rate)
        where = []
        for owners in (before, after):
            masters, owed = owners.export(), pending(owners.engine)
            where.append(masters["a"].double() - rate * owed["a"])
        return where[0], where[1], before.export()["a"] - before.replica["a"]

    for old, new, lead in in_threads(2, job, timeout_s=60):
        assert float(lead.abs().max()) > 0.1
        torch.testing.assert_close(old, new, rtol=0, atol=1e-4)


def test_replicas_follow_the_masters() -> None:
    """What a pull lacks stays in master − replica, bounded."""

    def job(rank: int, transport: Transport) -> list[float]:
        owners = owners_of(engine_of(transport), start())
        distances = []
        for step in range(200):
            pushed = random_gradients(rank, step)
            owners.push(pushed, step, 0)
            for piece in owners.owned:
                owners.master(piece).sub_(owners.mean(piece), alpha=0.1)
            owners.pull(pushed, step, 0)
            behind = [
                owners.master(p) - owners.replica[p.name][p.start : p.stop]
                for p in owners.owned
            ]
            distances.append(max(float(b.abs().max()) for b in behind))
        return distances

    for distances in in_threads(2, job, timeout_s=60):
        assert max(distances[150:]) < 3 * max(distances[:100])


def test_what_works_on_masters_needs_owners() -> None:
    check_owners(SMALL, "a momentum")
    with pytest.raises(ConfigError, match="a momentum needs master weights on"):
        check_owners(DIRECT, "a momentum")
