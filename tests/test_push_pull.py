"""Push-pull equals 3LC parameter servers bit for bit; uncoded, it is DDP."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import push_pull_cases
from tests.ddp_cases import Case
from tests.push_pull_cases import CODED
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]
BUCKETS = (("bucket_cap_mb", 0.1),)
CASES = {
    "sgd": ("sgd", Case(BUCKETS, config=CODED)),
    "adamw": ("adamw", Case(BUCKETS, config=CODED)),
    "no_sync, channels last": (
        "sgd",
        Case(BUCKETS, accumulate=2, channels_last=True, config=CODED),
    ),
    "unused at times": (
        "adamw",
        Case(
            (*BUCKETS, ("find_unused_parameters", True)),
            used="(step + rank) % 3 == 0 and step % 4 > 0",
            config=CODED,
        ),
    ),
    "bucket view": (
        "sgd",
        Case((*BUCKETS, ("gradient_as_bucket_view", True)), config=CODED),
    ),
    "bfloat16": ("sgd", Case(BUCKETS, dtype=torch.bfloat16, config=CODED)),
}


@pytest.mark.parametrize(
    ("world", "name"),
    [*((world, name) for world in (2, 3) for name in CASES), (4, "sgd"), (4, "adamw")],
)
def test_push_pull_equals_the_servers(ranks: Pools, world: int, name: str) -> None:
    kind, case = CASES[name]
    steps = 50 if name in ("sgd", "adamw") else 20
    reports = ranks(world).run(push_pull_cases.equals_the_servers, kind, case, steps)
    assert len({report["hash"] for report in reports}) == 1
    for report in reports:
        assert report["ratio"] > 5
        assert 0 < report["distance"] < 1


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_uncoded_it_is_ddp(ranks: Pools, kind: str) -> None:
    assert ranks(2).run(push_pull_cases.uncoded_is_ddp, kind) == [0.0, 0.0]


def test_groups_schedulers_and_clipping(ranks: Pools) -> None:
    for distance in ranks(2).run(push_pull_cases.groups_schedule_and_clipping):
        assert distance < 1e-6


@pytest.mark.parametrize("by_script", [True, False])
def test_what_is_coded_is_clipped_by_the_gradients_norm(
    ranks: Pools, by_script: bool
) -> None:
    results = ranks(2).run(push_pull_cases.clipped_beside_ddp, by_script)
    assert results[0] == results[1]
    moved, ratios = results[0]
    assert moved == pytest.approx(1, abs=0.1)
    assert all(0.8 < ratio < 1.2 for ratio in ratios), ratios


def test_a_step_that_overflows_on_one_rank_never_was(ranks: Pools) -> None:
    results = ranks(2).run(push_pull_cases.skips_alike)
    assert results[0] == results[1]
    assert results[0][1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_bit_for_bit(
    ranks: Pools, tmp_path: Path, dtype: torch.dtype
) -> None:
    assert all(ranks(2).run(push_pull_cases.resumes, str(tmp_path / "state"), dtype))


def test_optimizer_memory_is_a_share(ranks: Pools) -> None:
    shares = ranks(4).run(push_pull_cases.memory_of_the_share)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 1 / 4 + 0.05


def test_gradients_lie_in_ddps_buckets(ranks: Pools) -> None:
    """A residual, a bucket, and of two ranks masters, means, moments, a copy: half."""
    for held in ranks(2).run(push_pull_cases.bytes_beside_the_buckets):
        assert 8 + 5 * 4 / 2 < held < 8 + 5 * 4 / 2 + 1.5


def test_passes_between_backward_and_step_change_nothing(ranks: Pools) -> None:
    """What a push has left lies in DDP's buckets until the step."""
    case = push_pull_cases.looks_before_the_step
    plain, looked = (ranks(2).run(case, looks) for looks in (False, True))
    assert len({*plain, *looked}) == 1


def test_muon_owns_whole_matrices(ranks: Pools) -> None:
    assert len(set(ranks(2).run(push_pull_cases.muon_on_whole_matrices))) == 1


def test_one_rank_trains_as_without_lc3(ranks: Pools) -> None:
    assert all(ranks(2).run(push_pull_cases.one_rank_is_plain_training))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("float64", "AttachError: parameter '0.weight' is torch.float64; push_pull"),
        ("params", r"AttachError: params must hold .* missing: \['2.bias'\]"),
        ("max_norm", r"ConfigError: max_norm=0\.0 must be a positive"),
        ("no backward", r"AttachError: step\(\) without a synchronised backward"),
        ("twice", r"AttachError: a second synchronised backward pass adds .*no_sync"),
    ],
)
def test_misuse_is_named(ranks: Pools, what: str, words: str) -> None:
    for said in ranks(2).run(push_pull_cases.misuse, what):
        assert re.match(words, said), said


@pytest.mark.parametrize("what", ["nothing", "clip", "scale", "thrown away", "frozen"])
def test_what_a_script_does_to_gradients_is_what_ddp_makes_of_it(
    ranks: Pools, what: str
) -> None:
    """Uncoded, so that only the order of adding differs."""
    for far, norms in ranks(2).run(push_pull_cases.beside_ddp, what):
        assert far < 1e-6
        assert norms == pytest.approx([1.0, 1.0], rel=1e-4)


def test_changing_single_elements_and_adding_a_group_are_refused(ranks: Pools) -> None:
    for masked, added in ranks(2).run(push_pull_cases.refusals_at_step):
        assert "were changed one by one" in masked
        assert "parameter.register_hook" in masked
        assert "to add some, close() this optimizer" in added
