"""On a GPU: make gpu-check runs this; without one every test says so and is skipped."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.record import read_csv
from tests import ddp_cases, gpu_cases
from tests.ddp_cases import Case
from tests.ranks import Ranks

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU; make gpu-check runs it"
    ),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def pair() -> Ranks:  # type: ignore[misc]
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", [False, True])
def test_ddp_on_a_gpu_equals_the_oracle(
    pair: Ranks, dtype: torch.dtype, view: bool
) -> None:
    """Two ranks on one GPU or two, over gloo."""
    options = (("bucket_cap_mb", 0.1), ("gradient_as_bucket_view", view))
    case = Case(options, dtype=dtype, device="cuda", steps=8)
    first, second = pair.run(ddp_cases.equals_the_oracle, case, timeout_s=300)
    assert first["hash"] == second["hash"]


@pytest.mark.parametrize("hook", ["ddp", "push_pull", "local_sgd"])
def test_a_gpu_trains_as_the_cpu_does(pair: Ranks, hook: str) -> None:
    losses = pair.run(gpu_cases.trains, hook, "cuda", timeout_s=300)
    expected = pair.run(gpu_cases.trains, hook, "cpu", timeout_s=300)
    # Roundings differ, and then what is sent: after 40 steps by up to 3.4 %.
    for of_rank, there in zip(losses, expected, strict=True):
        assert of_rank == pytest.approx(there, rel=0.02)


def test_a_state_on_the_host_is_the_same_and_leaves_the_gpu_free(pair: Ranks) -> None:
    for same, added in pair.run(gpu_cases.state_on_the_host, timeout_s=300):
        assert same
        assert added <= 4


@pytest.mark.parametrize("own", [False, True])
def test_a_model_over_nccl(pair: Ranks, own: bool) -> None:
    """lc3's own group is gloo, or NCCL if it is given one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each rank; there is one")
    first, second = pair.run(gpu_cases.over_nccl, own, timeout_s=300)
    assert first == second


def test_the_harness_trains_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    methods = ["float32", "3LC s=1.00", "local H=8", "preconditioned s=1.00"]
    options = ["--device", "cuda", "--steps", "32", "--seeds", "1", "--out", str(out)]
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    training = ["experiments.harness.train", "--methods", *methods, *options]
    command = [sys.executable, "-m", *start, "-m", *training]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    rows = read_csv(out)
    assert {row["method"] for row in rows} == set(methods)
    card = torch.cuda.get_device_name()
    assert all(row["machine"].endswith(card) for row in rows)
    for method in methods:
        ends = [float(row["test_loss"]) for row in rows if row["method"] == method]
        assert ends[-1] < ends[0], method


def test_nothing_waits_for_the_gpu_but_what_has_to() -> None:
    """Encoding a bucket waits for the stream once, adding one up does not."""
    with torch.profiler.profile(acc_events=True) as profile:
        gpu_cases.encode_and_add()
    waits = {
        event.key: event.count
        for event in profile.key_averages()
        if "StreamSynchronize" in event.key
    }
    # The first call copies its tables, some of them from memory that is not pinned.
    assert sum(waits.values()) <= gpu_cases.CALLS + 10, waits
