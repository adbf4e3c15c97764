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


@pytest.mark.parametrize(
    ("sites", "form", "kind", "overlap", "fragments"),
    [
        (2, "fsdp2", "sgd", 0, 1),
        (2, "fsdp2", "sgd", 3, 3),
        (2, "fsdp2", "adamw", 0, 3),
        (2, "fsdp2", "adamw", 3, 1),
        (2, "fsdp2", "muon", 0, 1),
        (2, "ddp", "sgd", 0, 3),
        (2, "ddp", "adamw", 3, 3),
        (2, "ddp", "muon", 3, 1),
        (2, "hsdp of replicas", "adamw", 0, 1),
        (2, "hsdp of shards", "adamw", 0, 1),
        (3, "fsdp2", "adamw", 3, 3),
        (3, "ddp", "adamw", 0, 1),
    ],
)
def test_sites_equal_plain_ranks_that_hold_shards(
    ranks: Pools, sites: int, form: str, kind: str, overlap: int, fragments: int
) -> None:
    compare(ranks, sites, form, kind, knobs_of(overlap, fragments))


def knobs_of(overlap: int, fragments: int) -> dict[str, Any]:
    return {"sync_every": 4, "overlap": overlap, "fragments": fragments}


def compare(
    ranks: Pools, sites: int, form: str, kind: str, knobs: dict[str, Any]
) -> None:
    """Train sites, and a plain rank for each; all must hold the same bits."""
    plain = ranks(sites).run(site_cases.for_sites, kind, STEPS, knobs)
    inside = ranks(sites * site_cases.INSIDE).run(
        site_cases.in_sites, form, kind, STEPS, knobs
    )
    for rank, (found, sent) in enumerate(inside):
        site, place = divmod(rank, site_cases.INSIDE)
        for step, held in enumerate(found):
            shards = plain[site][0][step]
            for name, values in held.items():
                wanted = shards[place][name]
                if form in ("ddp", "hsdp of replicas"):
                    wanted = torch.cat([shard[name] for shard in shards])
                assert torch.equal(values, wanted), (rank, step, name)
        # Half of one rank's; headers do not halve, of a model as small as this.
        most = 0.65 if sites == 2 and knobs["fragments"] == 1 else 0.85
        assert 0.4 * plain[site][1] < sent < most * plain[site][1]


@pytest.mark.parametrize(("overlap", "fragments"), [(0, 1), (3, 3)])
def test_torchs_muon_on_shards_exchanges_as_plain_ranks_with_its_steps(
    ranks: Pools, overlap: int, fragments: int
) -> None:
    """Its arithmetic is another than of whole matrices; all around it is exact."""
    knobs = {**knobs_of(overlap, fragments), "outer_lr": 1.5, "residual_decay": 0.9}
    inside = ranks(4).run(site_cases.torchs_muon_in_sites, STEPS, knobs)
    recorded = [
        [
            [inside[site * site_cases.INSIDE + place][step][0] for place in (0, 1)]
            for step in range(STEPS)
        ]
        for site in (0, 1)
    ]
    plain = ranks(2).run(site_cases.replayed_for_sites, recorded, knobs)
    for rank, steps in enumerate(inside):
        site, place = divmod(rank, site_cases.INSIDE)
        for step, (_, held) in enumerate(steps):
            for name, values in held.items():
                assert torch.equal(values, plain[site][step][place][name]), (step, name)
    for site, (before, after) in enumerate(ranks(2).run(site_cases.muon_of_whole)):
        for place, shards in enumerate(recorded[site][0]):
            for name, values in shards.items():
                moved = (after[place][name] - before[place][name]).norm()
                assert moved > 0
                # It computes in bfloat16; of a shard alone it is further than this.
                assert (values - after[place][name]).norm() < 0.3 * moved, name


@pytest.mark.parametrize("form", ["fsdp2", "ddp", "hsdp of replicas"])
def test_a_site_resumes_bit_for_bit(ranks: Pools, form: str, tmp_path: Path) -> None:
    assert all(ranks(4).run(site_cases.resumes, form, str(tmp_path)))


@pytest.mark.parametrize("form", ["fsdp2", "ddp"])
def test_another_number_of_sites_keeps_masters_exactly(
    ranks: Pools, form: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    before = ranks(4).run(site_cases.saved_between_exchanges, form, folder)
    for world in (6, 2):
        after = ranks(world).run(site_cases.other_sites, form, folder, 2)
        for rank, masters in enumerate(after):
            for name, master in masters.items():
                assert torch.equal(master, before[rank % 2][name]), (world, rank, name)


def test_tensor_parallel_sites_hold_the_same(ranks: Pools) -> None:
    found = ranks(4).run(site_cases.tensor_parallel)
    whole = sum(i * o + o for i, o in site_cases.SIZES)
    for one in found:
        assert one["last"] < 0.8 * one["first"]
        assert whole / 2 <= one["numel"] < 0.6 * whole  # each half, a few on both
        for name, values in one["whole"].items():
            assert torch.equal(values, found[0]["whole"][name])


@pytest.mark.parametrize("form", ["fsdp2", "ddp"])
def test_a_parameter_without_gradient_stays(ranks: Pools, form: str) -> None:
    assert all(ranks(4).run(site_cases.unused, form))


@pytest.mark.parametrize("form", ["fsdp2", "ddp"])
def test_a_shard_that_is_not_finite_leaves_out_its_site(
    ranks: Pools, form: str
) -> None:
    found = ranks(4).run(site_cases.nan_in_a_shard, form)
    assert [one["left_out"] for one in found] == [0, 0, 1, 1]
    for one in found:
        assert one["last"] < 0.5 * one["first"]


@pytest.mark.parametrize(
    ("form", "on_one"), [("fsdp2", False), ("ddp", False), ("ddp", True)]
)
def test_weights_that_were_loaded_hold(ranks: Pools, form: str, on_one: bool) -> None:
    assert all(ranks(4).run(site_cases.loaded, form, on_one))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no mesh", "the model is sharded; give the mesh, too"),
        ("number", "mesh=3: 4 ranks cannot be divided into sites of that many"),
        ("a word", "mesh='2' must be a DeviceMesh of two dimensions"),
        ("flat", r"the mesh has the shape \(4,\), the job 4 ranks"),
        ("plain", "mesh has sites of 2 ranks, and parameter 'layers.0.weight' of this"),
        ("first version", "sharded by FSDP's first version"),
        ("other ranks", "is sharded over the ranks"),
        ("averaged over all ranks", r"over the ranks \[0, 1, 2, 3\], and this rank's"),
        ("deepspeed", "the model is DeepSpeed's DeepSpeedEngine"),
        (
            "two halves of a site",
            r"the ranks \[0, 1, 2, 3\] are a site, and of these \[0, 1\] do not train "
            r"together with \[2, 3\]",
        ),
        (
            "shards of another dimension in one site",
            r"rank 0 holds S\(0\) 0 of 2, and rank 2, .* S\(1\) 0 of 2; shard the",
        ),
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
        ("other shapes on one rank", "extra.* is not sharded|ranks differ"),
        ("other values on one rank", r"layers.0.weight' differs between .*\[2, 3\]"),
    ],
)
def test_all_ranks_of_all_sites_attach_or_none(
    ranks: Pools, what: str, words: str
) -> None:
    for said in ranks(4).run(site_cases.refused, what):
        assert re.search(words, said), said


def test_numbers_are_shared_out_among_the_ranks_of_a_site(ranks: Pools) -> None:
    found = ranks(4).run(site_cases.odd_shapes)
    assert found[0][0]["scale"] != 1.5
    for one in found:
        assert torch.equal(one[0]["scale"], found[0][0]["scale"])
        assert torch.equal(one[0]["shift"], found[0][0]["shift"])


def test_a_fragment_without_gradient_has_no_momentum_to_shrink(ranks: Pools) -> None:
    assert all(ranks(4).run(site_cases.unused_fragment))


def test_states_of_several_places_do_not_merge(ranks: Pools) -> None:
    for said in ranks(4).run(site_cases.merged):
        for words in said:
            assert "'local_sgd, shard" not in words
            assert "merge those of one form, and of sites those of one place" in words


def test_another_shards_state_is_refused(ranks: Pools) -> None:
    for rank, said in enumerate(ranks(4).run(site_cases.others_state)):
        assert f"this run has 'local_sgd, shard {rank % 2} of 2'" in said
        assert "the states of 3 ranks are not of sites of 2" in said


def test_a_shard_that_differs_is_heard_of_by_all(ranks: Pools) -> None:
    for said in ranks(4).run(site_cases.a_replica_drifts):
        assert "layers.0.weight" in said, said


def test_a_rank_that_fails_is_heard_in_every_site(ranks: Pools) -> None:
    for rank, said in enumerate(ranks(4).run(site_cases.a_rank_fails)):
        assert "no memory left for frames" in said, (rank, said)


def test_the_example_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "experiments/examples/sites.py"
    assert len(path.read_text().splitlines()) < 60
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
