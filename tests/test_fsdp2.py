"""FSDP2 inside of a site, 3LC between the sites."""

import os
import re
import sys
from collections.abc import Callable

import pytest
import torch

from tests import forked, fsdp2_cases
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(300)
Pools = Callable[[int], Ranks]


@pytest.mark.parametrize(("world", "per_site"), [(4, 2), (2, 1)])
def test_shards_equal_the_oracle(ranks: Pools, world: int, per_site: int) -> None:
    for found in ranks(world).run(fsdp2_cases.equals_the_oracle, per_site, 20):
        assert found["steps"] == 20
        assert found["buckets"] == found["followed"] == 20 * 4
        # Only this rank's shard travels, and only to the other site, compressed.
        assert found["dense"] == 20 * 4 * found["elements"]
        assert found["sent"] < found["dense"] / 5


def test_half_precision_is_reduced_as_float32(ranks: Pools) -> None:
    """Into float32 gradients: FSDP casts what was reduced, so it is waited for."""
    for found in ranks(4).run(fsdp2_cases.equals_the_oracle, 2, 5, torch.bfloat16):
        assert (found["buckets"], found["followed"]) == (20, 0)


def test_gradients_that_pile_up(ranks: Pools) -> None:
    assert all(ranks(4).run(fsdp2_cases.accumulates))


def test_one_site_sends_nothing(ranks: Pools) -> None:
    for found in ranks(2).run(fsdp2_cases.equals_the_oracle, 2, 0):
        assert found["sent"] == 0


def test_a_shard_that_differs_between_sites_is_named(ranks: Pools) -> None:
    first, second, third, fourth = ranks(4).run(fsdp2_cases.differs)
    assert first == third == ["nothing", "nothing"]
    for before, after in (second, fourth):  # hold the same shard
        assert before == "nothing"
        assert after.startswith(
            "ReplicasDiffer: parameter 'last.weight' differs on rank 3 after 1 steps"
        )


def test_it_resumes_bit_for_bit(ranks: Pools) -> None:
    assert all(ranks(4).run(fsdp2_cases.resumes))


def test_a_module_that_nobody_uses(ranks: Pools) -> None:
    assert len(set(ranks(4).run(fsdp2_cases.trains_with_a_module_unused))) == 1


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("auto", "ConfigError: mode='auto' lets a bucket of hooks.ddp"),
        ("one dimension", "AttachError: the mesh has the shape (4,), the job 4 ranks"),
        ("native HSDP", "AttachError: a module is sharded over a mesh of 2 dimensions"),
        ("not sharded", "AttachError: no module of this Net is sharded"),
    ],
)
def test_what_cannot_work_is_said_at_attach(ranks: Pools, what: str, said: str) -> None:
    for sentence in ranks(4).run(fsdp2_cases.refused, what):
        assert sentence.startswith(said)


def test_a_module_that_is_used_by_half_is_named(ranks: Pools) -> None:
    for sentence in ranks(4).run(fsdp2_cases.a_parameter_without_gradient, None):
        assert sentence.startswith(
            "AttachError: FSDP reduced 128 elements of a module whose shards have 256: "
            "one of ['used', 'unused'] … had no gradient"
        )


def test_a_site_that_leaves_a_parameter_out_tells_the_others(ranks: Pools) -> None:
    mine, other = ranks(2).run(fsdp2_cases.a_parameter_without_gradient, 0)
    assert mine.startswith("AttachError: FSDP reduced 256 elements of a module")
    assert other.startswith("PeerError: rank 0 stopped: AttachError: FSDP reduced 256")


def test_what_is_unfrozen_later_is_an_error(ranks: Pools) -> None:
    for sentence in ranks(2).run(fsdp2_cases.unfrozen_later):
        assert sentence.startswith("AttachError: parameter 'first.")
        assert "was frozen when lc3 was attached" in sentence


def test_the_example() -> None:
    done = forked.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "4", "-m", "experiments.examples.with_fsdp2"),
        ],
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"accuracy (0\.\d+), (\d+) times fewer bytes", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 0.8
    assert int(found[2]) > 20
