"""The DDP hook on real gloo ranks equals the oracle bit for bit, in every DDP mode."""

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lc3.config import Settings
from lc3.hooks import ddp
from tests import ddp_cases
from tests.ddp_cases import Case
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]


def options(**given: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(given.items())


ADAM = dataclasses.replace(ddp_cases.CONFIG, min_numel=1, min_ndim=0)
DIRECT = dataclasses.replace(ddp_cases.CONFIG, topology="direct")
CASES = {
    "one bucket": Case(options(bucket_cap_mb=25)),
    "buckets of 1 MB": Case(options(bucket_cap_mb=1)),
    "buckets of 0.1 MB": Case(options(bucket_cap_mb=0.1)),
    "bucket view": Case(options(bucket_cap_mb=0.1, gradient_as_bucket_view=True)),
    "channels last": Case(options(bucket_cap_mb=0.1), channels_last=True),
    "no_sync": Case(options(bucket_cap_mb=0.1), accumulate=3),
    "no_sync and bucket view": Case(
        options(bucket_cap_mb=0.1, gradient_as_bucket_view=True), accumulate=2
    ),
    "unused on all ranks": Case(
        options(bucket_cap_mb=0.1, find_unused_parameters=True), used="False"
    ),
    "unused on all but one rank": Case(
        options(bucket_cap_mb=0.1, find_unused_parameters=True), used="rank == 1"
    ),
    "unused at times": Case(
        options(bucket_cap_mb=0.1, find_unused_parameters=True),
        used="(step + rank) % 3 == 0 and step % 4 > 0",
    ),
    "unused and bucket view": Case(
        options(find_unused_parameters=True, gradient_as_bucket_view=True),
        used="(step + rank) % 3 == 0 and step % 4 > 0",
    ),
    "static graph": Case(options(bucket_cap_mb=0.1, static_graph=True)),
    "static graph, unused": Case(
        options(bucket_cap_mb=0.1, static_graph=True), used="rank == 0"
    ),
    "bfloat16": Case(options(bucket_cap_mb=0.1), dtype=torch.bfloat16),
    "float16": Case(options(bucket_cap_mb=0.1), dtype=torch.float16),
    "no entropy stage": Case(
        options(bucket_cap_mb=1),
        config=dataclasses.replace(ddp_cases.CONFIG, entropy="none"),
    ),
    "without owners": Case(options(bucket_cap_mb=0.1), config=DIRECT),
    "without owners, bfloat16, unused at times": Case(
        options(bucket_cap_mb=0.1, find_unused_parameters=True),
        used="(step + rank) % 3 == 0 and step % 4 > 0",
        dtype=torch.bfloat16,
        config=DIRECT,
    ),
    "without owners, no_sync": Case(
        options(bucket_cap_mb=0.1), accumulate=3, config=DIRECT
    ),
    "blocks": Case(
        options(bucket_cap_mb=0.1),
        config=Settings(pull_sparsity=1.25, block_size=1000, min_numel=0, min_ndim=0),
    ),
}
SAME_RESULT = (
    *("one bucket", "buckets of 1 MB", "buckets of 0.1 MB", "bucket view"),
    "no entropy stage",
)


@pytest.fixture(scope="module")
def reports(ranks: Pools) -> Callable[[int, str], list[dict[str, Any]]]:
    """Give what every rank reported of a case, run once."""
    done: dict[tuple[int, str], list[dict[str, Any]]] = {}

    def of(world: int, name: str) -> list[dict[str, Any]]:
        if (world, name) not in done:
            done[world, name] = ranks(world).run(
                ddp_cases.equals_the_oracle, CASES[name]
            )
        return done[world, name]

    return of


Reports = Callable[[int, str], list[dict[str, Any]]]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_hook_equals_the_oracle(reports: Reports, world: int, name: str) -> None:
    report = reports(world, name)
    assert len({one["hash"] for one in report}) == 1
    for one in report:
        assert one["steps"] == 20
        assert one["residual"] > 0


WITH_OPTIMIZER = {
    "SGD": Case(options(bucket_cap_mb=0.1)),
    "SGD, direct": Case(options(gradient_as_bucket_view=True), config=DIRECT),
    "Adam": Case(options(bucket_cap_mb=0.1), config=ADAM, adam=True),
    "Adam, channels last": Case(
        options(gradient_as_bucket_view=True),
        config=ADAM,
        adam=True,
        channels_last=True,
    ),
    "Adam, direct": Case(
        config=dataclasses.replace(ADAM, topology="direct"), adam=True
    ),
    "Adam, bounded": Case(config=ADAM, adam=True, max_update=1.5),
    "Adam, its own bound": Case(config=ADAM, adam=True, max_update=math.inf),
    "Adam, biases raw": Case(config=ddp_cases.CONFIG, adam=True),
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", WITH_OPTIMIZER)
def test_what_optimizers_apply_equals_the_oracle(
    ranks: Pools, world: int, name: str
) -> None:
    """Bit for bit, clipped, skipped and not applied; the norm within its error."""
    case = WITH_OPTIMIZER[name]
    report = ranks(world).run(ddp_cases.optimizers_equal_the_oracle, case)
    assert len({one["hash"] for one in report}) == 1
    assert max(map(abs, report[0]["errors"])) < 0.2
    assert sum(map(abs, report[0]["errors"])) / 20 < 0.06


@pytest.mark.parametrize(
    ("what", "near"), [("gan", 0.02), ("spike", 0.02), ("sam", 0.02)]
)
def test_a_gradient_that_is_not_applied_does_not_count(
    ranks: Pools, what: str, near: float
) -> None:
    for plain, coded in ranks(2).run(ddp_cases.throws_away, what):
        assert coded == pytest.approx(plain, rel=near)


def test_a_flush_owes_nothing_and_a_loaded_state_stays(ranks: Pools) -> None:
    """With SGD exactly; Adam's moments change between a push and a flush."""
    for sgd, adam, same in ranks(2).run(ddp_cases.flushes_and_loads):
        assert sgd < 1e-5
        assert adam < 0.3
        assert same


@pytest.mark.parametrize("world", [2, 3])
def test_buckets_and_the_entropy_stage_change_nothing(
    reports: Reports, world: int
) -> None:
    hashes = {name: reports(world, name)[0]["hash"] for name in SAME_RESULT}
    assert len(set(hashes.values())) == 1, hashes


def test_the_cases_are_what_they_say(reports: Reports) -> None:
    """Buckets are rebuilt, are several, and one of them is empty."""
    layouts = reports(2, "buckets of 0.1 MB")[0]["layouts"]
    first, later = ([names for s, names in layouts if s == step] for step in (0, 5))
    assert first != later
    assert len(later) >= 4
    assert ["alone"] in later
    assert (
        reports(2, "one bucket")[0]["buckets"]
        < reports(2, "buckets of 0.1 MB")[0]["buckets"]
    )


def test_many_runs_with_many_buckets(ranks: Pools) -> None:
    runs = 50
    results = ranks(3).run(ddp_cases.many_buckets, runs, timeout_s=200)
    assert all(result["hashes"] == results[0]["hashes"] for result in results)
    assert results[0]["buckets"] > 15
    for result in results:
        assert len(set(result["hashes"])) == runs
        assert result["left"] == {"files": 0, "threads": 0}
        assert result["grown"]["threads"] == 0
        assert result["grown"]["files"] <= 2


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("not ddp", "AttachError: attach needs a DistributedDataParallel, got Linear"),
        ("twice", "AttachError: lc3 is already attached to this model"),
        (
            "other hook",
            "AttachError: .* already has the communication hook fp16_compress",
        ),
        ("nothing trainable", "AttachError: the model has no trainable parameter"),
        (
            "complex",
            "AttachError: parameter 'weight' is torch.complex64; .*view_as_real",
        ),
        (
            "config differs",
            "PlanMismatch: .*Config.sparsity is 1.0 on rank 0 and 1.25 on",
        ),
        (
            "pattern matches nothing",
            "ConfigError: exclude pattern 'wait.*' matches no train",
        ),
    ],
)
def test_attach_refuses(ranks: Pools, what: str, words: str) -> None:
    said = ranks(2).run(ddp_cases.attach_outcome, what)
    for one in said:
        assert re.match(words, one), one
    assert len(set(said)) == 1


def test_an_error_on_one_rank_at_attach_is_an_error_on_all(ranks: Pools) -> None:
    said = ranks(3).run(ddp_cases.attach_outcome, "pattern matches nothing on one rank")
    assert said[1].startswith("ConfigError: exclude pattern 'wait.*'")
    assert said[0] == said[2]
    assert said[0].startswith("PeerError: rank 1 stopped: exclude pattern 'wait.*'")


def test_a_failing_rank_ends_backward_everywhere_with_its_reason(ranks: Pools) -> None:
    said = ranks(3).run(ddp_cases.backward_outcomes, "encode fails")
    assert said[2][0].startswith("MemoryError: no memory left for frames")
    for other in said[:2]:
        assert other[0].startswith(
            "PeerError: rank 2 stopped: MemoryError: no memory left for frames"
        )


def test_ranks_at_different_steps_are_told(ranks: Pools) -> None:
    said = ranks(2).run(ddp_cases.backward_outcomes, "another lc3 step")
    assert any("ranks run different numbers of steps" in one[0] for one in said)


def test_a_parameter_that_was_frozen_is_named(ranks: Pools) -> None:
    for said in ranks(2).run(ddp_cases.backward_outcomes, "frozen when attached"):
        assert said[0].startswith(
            "AttachError: a bucket holds a parameter of shape [64, 64] that was frozen"
        )


def test_a_closed_state_leaves_plain_ddp_and_another_may_follow(ranks: Pools) -> None:
    for outcome in ranks(2).run(ddp_cases.closes_and_goes_on):
        assert outcome == (True, True, 3)


@pytest.mark.parametrize("kind", ["sparse", "float64"])
def test_what_is_not_coded_passes_through_and_is_said_once(
    ranks: Pools, kind: str
) -> None:
    for result in ranks(2).run(ddp_cases.passes_through, kind):
        assert len(result["said"]) == 1
        assert "pass through a plain all-reduce" in result["said"][0]
        assert kind in result["said"][0]
        assert result["difference"] < 1e-6


@pytest.mark.parametrize(("budget", "half"), [(None, 5), (1500, 13)])
def test_a_run_resumes_bit_for_bit(
    ranks: Pools, tmp_path: Path, budget: int | None, half: int
) -> None:
    """With a budget, between two of its looks."""
    path = str(tmp_path / "state")
    results = ranks(2).run(ddp_cases.resumes_bit_for_bit, path, budget, half)
    assert results == [True, True]


def test_two_models_and_a_subgroup_side_by_side(ranks: Pools) -> None:
    results = ranks(3).run(ddp_cases.two_models_and_a_subgroup)
    assert len(set(results)) == 1


def test_one_rank_trains_as_without_lc3(ranks: Pools) -> None:
    assert all(ranks(2).run(ddp_cases.in_a_group_of_one))


def test_a_state_is_not_pickled() -> None:
    with pytest.raises(TypeError, match=r"state\.state_dict"):
        ddp.State.__reduce__(object.__new__(ddp.State))


def test_messages_of_every_length_arrive(ranks: Pools) -> None:
    assert ranks(3).run(ddp_cases.messages_of_every_length) == [27] * 3


ENDS = """
from pathlib import Path
import torch
import torch.distributed as dist
from lc3.hooks import ddp

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
state = ddp.attach(model)
model(torch.ones(4)).sum().backward()
state.close()
del model, state
dist.destroy_process_group()
print(*(p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")))
"""


def test_threads_of_the_default_group_end_with_it() -> None:
    """One that is busy when the interpreter ends aborts a training that went well."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout
    assert "gloo" not in done.stdout
