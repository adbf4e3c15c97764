"""Dense inside of nodes, 3LC between them: equal to the oracle, and heard when lost."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lc3 import AttachError
from lc3.codec import cpu
from lc3.config import Settings
from lc3.engines.exchange import pending, push_what_owners_owe
from lc3.engines.two_levels import Nodes, TwoLevels, nodes_of
from lc3.meter import Meter
from lc3.plan import make_plan
from lc3.transport.loopback import LoopbackTransport
from lc3.transport.protocol import Transport
from lc3.wire.coder import Coder
from tests import ddp_cases, two_levels_cases
from tests.ddp_cases import Case
from tests.oracle import TwoLevels as Oracle
from tests.ranks import Ranks
from tests.test_engine import DIRECT, SHAPES, SMALL, in_threads, random_gradients

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]
TABLES = {
    "2 x 2": [[0, 1], [2, 3]],
    "2 x 2, far ranks in a node": [[0, 2], [3, 1]],
    "2 x 3": [[0, 1, 2], [3, 4, 5]],
    "3 x 2": [[0, 1], [2, 3], [4, 5]],
    "one node": [[0, 1, 2]],
}


@pytest.mark.parametrize("nodes", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        Settings(sparsity=1.5, pull_sparsity=1.25, min_numel=100, block_size=64),
        DIRECT,
    ],
    ids=["small shares", "blocks", "without owners"],
)
def test_two_levels_equal_the_oracle(nodes: Nodes, config: Settings) -> None:
    world, steps = sum(map(len, nodes)), 12
    oracle = Oracle(SHAPES, nodes, config)

    def gradients(rank: int, step: int) -> dict[str, torch.Tensor]:
        grads = random_gradients(rank, step)
        if step % 3 == 1 and rank in nodes[0]:
            grads["a"].zero_()  # a node without gradient keeps its residuals
        return grads

    expected = [
        oracle.step(
            [
                {name: grad.numpy() for name, grad in gradients(rank, step).items()}
                for rank in range(world)
            ]
        )
        for step in range(steps)
    ]

    def job(rank: int, transport: Transport) -> TwoLevels:
        assert isinstance(transport, LoopbackTransport)
        plan = make_plan(SHAPES, world, config)
        engine = TwoLevels(plan, config, transport, nodes, Coder(cpu), Meter())
        for step in range(steps):
            grads = gradients(rank, step)
            engine.all_reduce(grads, step, 0)
            for name, grad in grads.items():
                np.testing.assert_array_equal(grad.numpy(), expected[step][name], name)
        return engine

    engines = in_threads(world, job)
    for engine in engines:
        if isinstance(engine, Exception):
            raise engine
    if len(nodes) == 1:
        return
    for name in engines[0].plan.coded:
        for node, ranks in enumerate(nodes):  # each element's residual once in a node
            held = sum(engines[rank].residuals.sent[name] for rank in ranks)
            np.testing.assert_array_equal(held.numpy(), oracle.sent[node][name], name)
        for rank, engine in enumerate(engines):
            for slice_ in engine.plan.slices_of([name], rank):
                np.testing.assert_array_equal(
                    engine.residuals.owned[name].numpy(),
                    oracle.owned[name][slice_.start : slice_.stop],
                )


def test_two_nodes_bring_on_what_owners_owed() -> None:
    """After a run of more nodes: each owner's slice, by the rank that pushes it."""

    def job(rank: int, transport: Transport) -> tuple[bool, torch.Tensor, torch.Tensor]:
        assert isinstance(transport, LoopbackTransport)
        plan = make_plan(SHAPES, 4, DIRECT)
        engine = TwoLevels(
            plan, DIRECT, transport, TABLES["2 x 2"], Coder(cpu), Meter()
        )
        for owed in engine.residuals.owned.values():
            owed += rank + 1
        before = pending(engine)["a"]
        push_what_owners_owe(engine)
        left = any(bool(owed.any()) for owed in engine.residuals.owned.values())
        return left, before, pending(engine)["a"]

    for left, before, after in in_threads(4, job):
        assert not left
        assert before.unique().tolist() == [1, 2, 3, 4]
        torch.testing.assert_close(before, after)


CASES = {
    "two levels": Case((("bucket_cap_mb", 0.1),), mesh=2, steps=12),
    "two levels, bfloat16 and no_sync": Case(
        (("bucket_cap_mb", 0.1),),
        accumulate=2,
        dtype=torch.bfloat16,
        mesh=2,
        steps=8,
    ),
    "two levels, unused at times": Case(
        (("bucket_cap_mb", 0.1), ("find_unused_parameters", True)),
        used="(step + rank) % 3 == 0 and step % 4 > 0",
        mesh=2,
        steps=12,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_hook_with_a_mesh_equals_the_oracle(ranks: Pools, name: str) -> None:
    reports = ranks(4).run(ddp_cases.equals_the_oracle, CASES[name])
    assert len({one["hash"] for one in reports}) == 1
    assert all(one["residual"] > 0 for one in reports)


def test_meshes_that_are_the_same(ranks: Pools) -> None:
    def of(what: str) -> str:
        hashes = ranks(4).run(two_levels_cases.hash_with, what)
        assert len(set(hashes)) == 1
        return str(hashes[0])

    assert of("mesh=2") == of("device mesh") != of("flat")
    assert of("mesh=1") == of("flat")
    assert of("one node") == of("plain DDP")


def test_between_nodes_travels_as_many_times_less_as_a_node_has_ranks(
    ranks: Pools,
) -> None:
    flat = sum(sent["meter"] for sent in ranks(4).run(two_levels_cases.bytes_of, None))
    levels = ranks(4).run(two_levels_cases.bytes_of, 2)
    # Of a flat exchange two of three messages leave the node.
    ratio = sum(sent["meter"] for sent in levels) / (flat * 2 / 3)
    assert 0.4 < ratio < 0.6
    elements = 4 * (64 * 64 + 64)
    for sent in levels:  # half of all float32 there, and half back
        assert sent["inside"] == pytest.approx(5 * 4 * elements, rel=0.1)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("3 in a node", "mesh=3: 4 ranks cannot be divided into nodes of that many"),
        ("0 in a node", "mesh=0: 4 ranks cannot be divided"),
        ("true", "mesh=True: 4 ranks cannot be divided"),
        ("one dimension", r"shape \[4\] and the ranks \[0, 1, 2, 3\]; lc3 needs two"),
        ("differs", r"mesh is (None|2) on rank 0 and (None|2) on rank 1"),
        ("differs among meshes", "mesh is 1 on rank 0 and 2 on rank 1"),
        ("auto", "mode='auto' lets"),
    ],
)
def test_a_mesh_that_does_not_fit(ranks: Pools, what: str, words: str) -> None:
    for said in ranks(4).run(two_levels_cases.refused, what):
        assert re.search(words, said), said


def test_a_device_mesh_over_other_ranks() -> None:
    class Mesh:
        mesh = torch.tensor([[0, 1], [2, 3]])

    with pytest.raises(AttachError, match=r"over the ranks \[4, 5, 6, 7\]"):
        nodes_of(Mesh(), range(4, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("failing", [0, 3])
def test_a_rank_that_fails_is_heard_in_every_node(ranks: Pools, failing: int) -> None:
    reports = ranks(4).run(two_levels_cases.a_rank_fails, failing)
    for rank, said in enumerate(reports):
        assert len(said) == 2
        kind = "MemoryError" if rank == failing else "PeerError"
        assert said[0].startswith(f"{kind}: "), said
        assert "no memory left for frames" in said[0]
        if rank != failing:
            assert f"rank {failing} stopped: MemoryError" in said[0]


def test_it_resumes_bit_for_bit(ranks: Pools, tmp_path: Path) -> None:
    assert all(ranks(4).run(two_levels_cases.resumes_bit_for_bit, str(tmp_path)))


@pytest.mark.parametrize(("before", "after"), [(None, 2), (2, None), (2, 2)], ids=str)
def test_merged_states_fit_every_mesh(ranks: Pools, before: Any, after: Any) -> None:
    for moved in ranks(4).run(two_levels_cases.through_a_merge, before, after):
        assert moved
        assert max(moved) < 1e-6


def test_a_scaler_with_two_levels(ranks: Pools) -> None:
    reports = ranks(4).run(two_levels_cases.with_a_scaler, 2)
    assert len(set(reports)) == 1
    assert reports[0][1] == 1024.0  # twice after three steps, half at step 5
