"""Local steps between sites of several ranks: equal to plain ranks that hold shards."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forked, site_cases
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(300)
Pools = Callable[[int], Ranks]
STEPS = 40


@pytest.mark.parametrize("kind", site_cases.OPTIMIZERS)
@pytest.mark.parametrize("overlap", [0, 3])
def test_sites_equal_plain_ranks_that_hold_shards(
    ranks: Pools, kind: str, overlap: int
) -> None:
    knobs: dict[str, Any] = {"sync_every": 4, "overlap": overlap}
    plain = ranks(2).run(site_cases.for_sites, kind, STEPS, knobs)
    sites = ranks(4).run(site_cases.in_sites, kind, STEPS, knobs)
    for rank, (found, sent) in enumerate(sites):
        site, place = divmod(rank, site_cases.INSIDE)
        for step, held in enumerate(found):
            wanted = plain[site][0][step][place]
            for name, values in held.items():
                assert torch.equal(values, wanted[name]), (rank, step, name)
        # Half of one rank's; headers do not halve, of a model as small as this.
        assert 0.4 * plain[site][1] < sent < 0.65 * plain[site][1]


def test_a_site_resumes_bit_for_bit(ranks: Pools, tmp_path: Path) -> None:
    assert all(ranks(4).run(site_cases.resumes, str(tmp_path)))


def test_a_shard_that_is_not_finite_leaves_out_its_site(ranks: Pools) -> None:
    found = ranks(4).run(site_cases.nan_in_a_shard)
    assert [one["left_out"] for one in found] == [0, 0, 1, 1]
    for one in found:
        assert one["last"] < 0.5 * one["first"]


def test_weights_loaded_into_every_shard_hold(ranks: Pools) -> None:
    assert all(ranks(4).run(site_cases.loaded_on_all))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no mesh", "the model is sharded; give the mesh, too"),
        ("number", "mesh=2 must be a DeviceMesh of two dimensions"),
        ("flat", r"the mesh has the shape \(4,\), the job 4 ranks"),
        ("plain", "mesh has sites of 2 ranks, and parameter 'layers.0.weight' of this"),
        ("first version", "sharded by FSDP's first version"),
        ("other ranks", "is sharded over the ranks"),
    ],
)
def test_what_is_no_site_is_refused(ranks: Pools, what: str, words: str) -> None:
    for said in ranks(4).run(site_cases.refused, what):
        assert said.startswith("AttachError: "), said
        assert re.search(words, said), said


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("after an evaluation", "attached"),
        ("other steps on one rank", "ranks differ: sync_every is 4 on rank 0 and 5 on"),
        ("a pattern on one rank", "matches no trainable parameter|ranks differ"),
        ("an error on one rank", "optimizer is a str|optimizers? "),
    ],
)
def test_all_ranks_of_all_sites_attach_or_none(
    ranks: Pools, what: str, words: str
) -> None:
    for said in ranks(4).run(site_cases.refused, what):
        assert re.search(words, said), said


def test_another_shards_state_is_refused(ranks: Pools) -> None:
    for rank, said in enumerate(ranks(4).run(site_cases.others_state)):
        assert f"this run has 'local_sgd, shard {rank % 2} of 2'" in said
        assert "ranks of a site hold other shards" in said


def test_a_shard_that_differs_is_heard_of_by_all(ranks: Pools) -> None:
    for said in ranks(4).run(site_cases.a_replica_drifts):
        assert "layers.0.weight" in said, said


def test_a_rank_that_fails_is_heard_in_every_site(ranks: Pools) -> None:
    for rank, said in enumerate(ranks(4).run(site_cases.a_rank_fails)):
        assert "no memory left for frames" in said, (rank, said)


def test_the_example_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    said: list[tuple[str, ...]] = []
    for steps in ("16", "32", "32"):
        folder = tmp_path / ("whole" if said[1:] else "stopped")
        done = forked.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", "4", "-m", "experiments.examples.sites"),
                *(str(folder), steps),
            ],
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = re.search(r"from step (\d+): loss (\d\.\d+)", done.stdout)
        assert found, done.stdout
        said.append(found.groups())
    assert [first for first, _ in said] == ["0", "16", "0"]
    assert said[1][1] == said[2][1]
