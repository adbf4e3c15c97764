"""Real Horovod ranks give what the oracle says: ``make test-horovod``."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.lab import netlab

ROOT = Path(__file__).parents[1]
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
HAVE = importlib.util.find_spec("horovod") is not None
horovod = pytest.mark.skipif(not HAVE, reason="Horovod has a suite: make test-horovod")
CASES = (
    *("equals_the_oracle", "accumulates", "unused_on_one_rank", "half_precision"),
    *("clips_between", "broadcasts", "resumes", "float64_passes_through"),
    *("a_process_set", "sent_on_loopback", "refusals"),
)


def run(world: int, *cases: str) -> list[dict[str, Any]]:
    """Return the results of ``cases`` on every rank."""
    horovodrun = Path(sys.executable).with_name("horovodrun")
    command = [str(horovodrun), "--gloo", "-np", str(world), sys.executable]
    if netlab.missing() is None:  # a loopback of its own, so that its count is theirs
        command = [*ALONE, *command]
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    done = subprocess.run(
        [*command, "-m", "tests.horovod_cases", *cases],
        cwd=ROOT,
        env={
            **environment,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
            # At 1 ms, an idle Horovod chatters more than a busy one: sent_on_loopback.
            "HOROVOD_CYCLE_TIME": "20",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "RESULTS " in line]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(lines[0].split("RESULTS ")[1])
    return results


@horovod
@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [2, 3])
def test_horovod(world: int) -> None:
    for rank, results in enumerate(run(world, *CASES)):
        meter, loopback = results.pop("sent_on_loopback")
        if netlab.missing() is None:
            assert meter == pytest.approx(loopback, rel=0.01)
        said = results.pop("refusals")
        assert [s.split(";")[0].split(",")[0] for s in said] == [
            "op must be hvd.Average",
            "groups does not go with 3LC",
            "backward_passes_per_step=0 must be an integer of at least 1",
            f"Horovod has {world} ranks",
            "Horovod sums what a compressor returns",
        ]
        assert all(results.values()), (rank, results)


@horovod
@pytest.mark.timeout(200)
def test_a_rank_that_fails_tells_the_others() -> None:
    said = [results["fails_on_rank_1"] for results in run(3, "fails_on_rank_1")]
    assert said[1].startswith(("RuntimeError", "AttributeError"))
    for other in (said[0], said[2]):
        assert other.startswith("PeerError: rank 1 stopped")


@pytest.mark.skipif(HAVE, reason="Horovod is installed here")
def test_without_horovod_the_import_says_how_to_get_it() -> None:
    with pytest.raises(ImportError, match=r"run launch/install_horovod\.sh"):
        importlib.import_module("lc3.hooks.horovod")


def test_the_installer_names_what_is_missing(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "g++", "make"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    done = subprocess.run(
        [str(ROOT / "launch/install_horovod.sh"), sys.executable],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1
    assert "is not installed; apt-get install g++ make cmake" in done.stderr
