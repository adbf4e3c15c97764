"""The script that launchers start: every method, every restart, every complaint."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.lab import ranks
from tests import forked

ROOT = Path(__file__).parents[1]


def torchrun(world: int, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc-per-node", str(world), "-m", "launch.train", *arguments]


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return forked.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        timeout=120,
    )


def parameters(output: str) -> str:
    found = re.search(r"parameters ([0-9a-f]{16})", output)
    assert found is not None, output
    return found[1]


@pytest.mark.parametrize(
    ("method", "start", "how"),
    [
        ("3lc", subprocess.Popen, signal.SIGINT),  # torchrun itself
        ("push-pull", forked.Job, signal.SIGTERM),
        ("local", forked.Job, signal.SIGTERM),
    ],
)
def test_it_goes_on_where_it_stopped(
    tmp_path: Path, method: str, start: Any, how: signal.Signals
) -> None:
    """Bit for bit on as many ranks; on another number it goes on, too."""
    options = ["--method", method, "--steps", "48", "--save-every", "16"]
    straight = run(torchrun(2, *options))
    assert straight.returncode == 0, straight.stderr
    folder = tmp_path / "checkpoints"
    kept = [*options, "--checkpoints", str(folder)]
    with (tmp_path / "log").open("w") as log:
        process = start(torchrun(2, *kept), cwd=ROOT, stdout=log)
    deadline = time.monotonic() + 100
    while not list(folder.glob("step-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(60)
    (saved,) = folder.glob("step-*")
    again = run(torchrun(2, *kept))
    assert again.returncode == 0, again.stderr
    assert f"2 ranks, from step {saved.name[5:]}" in again.stdout
    assert parameters(again.stdout) == parameters(straight.stdout)
    other = run(torchrun(3, *kept))
    assert other.returncode == 0, other.stderr
    assert "3 ranks, from step 48" in other.stdout


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "no launcher has started this process"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            "mpirun has not said where rank 0 is; set MASTER_ADDR",
        ),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "GLOO_SOCKET_IFNAME": "warp0",
            },
            "there is no interface 'warp0' here",
        ),
    ],
)
def test_what_is_missing_is_said(variables: dict[str, str], words: str) -> None:
    known = {
        *(name for names in ranks.LAUNCHERS.values() for name in names),
        *("OMPI_COMM_WORLD_LOCAL_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"),
    }
    clean = {k: v for k, v in os.environ.items() if k not in known}
    if "OMPI_COMM_WORLD_RANK" in variables:
        variables = {**variables, "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    done = forked.run(
        [sys.executable, "-m", "launch.train", "--steps", "1"],
        cwd=ROOT,
        env={**clean, **variables},
        timeout=60,
    )
    assert done.returncode == 1
    assert words in done.stderr


def test_several_interfaces_need_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    two = {"eth0": "10.0.0.2", "eth1": "192.168.0.2"}
    monkeypatch.setattr(ranks, "interfaces", lambda: two)
    ranks.check_interface("127.0.0.1")
    with pytest.raises(ranks.LaunchError, match=r"eth0 10\.0\.0\.2, eth1 192"):
        ranks.check_interface("10.0.0.1")
    monkeypatch.setattr(ranks, "interfaces", lambda: {"eth0": "10.0.0.2"})
    ranks.check_interface("10.0.0.1")


def test_ranks_that_do_not_connect_end() -> None:
    script = "import time; from experiments.lab import ranks\n"
    script += "with ranks.connecting(0.5): "
    done = run([sys.executable, "-c", script + "time.sleep(60)"])
    assert done.returncode == 1
    assert "the ranks did not connect within 0.5 s" in done.stderr
    assert run([sys.executable, "-c", script + "time.sleep(0)"]).returncode == 0
