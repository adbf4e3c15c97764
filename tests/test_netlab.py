"""The lab limits what its hosts send, counts it, and leaves nothing behind."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.lab import netlab
from tests import cut_link

ROOT = Path(__file__).parents[1]
REASON = netlab.missing()
lab = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SEND = """
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(500_000)
dist.barrier()
seconds = []
for _ in range(3):  # of which one at least should have the machine for itself
    start = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(x)
    seconds.append(time.perf_counter() - start)
if dist.get_rank() == 0:
    print(f"seconds {min(seconds):.3f}")
dist.destroy_process_group()
"""


ROUNDS = """
import time, torch, torch.distributed as dist
from lc3.transport.group import GroupTransport
dist.init_process_group("gloo")
transport = GroupTransport(dist.group.WORLD, torch.device("cpu"))
data = torch.arange(1000).to(torch.uint8)
seconds = []
for number in range(12):
    time.sleep(0.05)  # what a step computes
    start = time.perf_counter()
    for _ in range(2):  # a push and a pull
        for arrived in transport.all_gather(data):
            assert torch.equal(arrived, data)
    seconds.append(time.perf_counter() - start)
if dist.get_rank() == 0:
    print(f"seconds {min(seconds[1:]):.4f}")
dist.destroy_process_group()
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "experiments.lab.netlab", *arguments]


def ran(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@lab
@pytest.mark.timeout(200)
def test_links_have_their_rate_and_count_bytes(tmp_path: Path) -> None:
    """Two ranks, three all-reduces of 2 MB: each sends 6 MB, at 50 Mbit/s 0.96 s.

    Three times.
    """
    (tmp_path / "send.py").write_text(SEND)
    report = tmp_path / "report.json"
    arguments = (
        "--rate",
        "50mbit",
        "--report",
        str(report),
        "--",
        str(tmp_path / "send.py"),
    )
    done = ran(*arguments, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.search(r"seconds ([\d.]+)", done.stdout)
    assert found is not None
    assert 0.85 < float(found[1]) < 1.6
    for host in json.loads(report.read_text())["hosts"]:
        assert 18_000_000 < host["sent_bytes"] < 18_000_000 * 1.08
        assert 18_000_000 < host["received_bytes"] < 18_000_000 * 1.08


INSIDE_AND_BETWEEN = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
place, site = dist.get_rank() % 2, dist.get_rank() // 2
inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][site]
between = [dist.new_group([0, 2]), dist.new_group([1, 3])][place]
large, small = torch.ones(2_000_000), torch.ones(100_000)
for _ in range(3):
    dist.all_reduce(large, group=inside)
    dist.all_reduce(small, group=between)
dist.barrier()
dist.destroy_process_group()
"""


@lab
@pytest.mark.timeout(150)
def test_a_message_takes_one_way_over_a_link_with_a_delay(tmp_path: Path) -> None:
    """Of 15 ms a link, 30 between hosts: two rounds in 60 ms, and not in 120.

    gloo's messages wait for the receiver's word, unless it was there before.
    """
    (tmp_path / "rounds.py").write_text(ROUNDS)
    done = ran("--delay", "15ms", "--", str(tmp_path / "rounds.py"), timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.search(r"seconds ([\d.]+)", done.stdout)
    assert found is not None
    assert 0.060 <= float(found[1]) < 0.090


@lab
@pytest.mark.timeout(200)
def test_links_between_sites_are_limited_and_counted(tmp_path: Path) -> None:
    """Each rank sends 24 MB inside, and 1.2 MB between: at 10 Mbit/s 2 s a site."""
    (tmp_path / "send.py").write_text(INSIDE_AND_BETWEEN)
    report = tmp_path / "report.json"
    given = ("--sites", "2", "--ranks", "2", "--rate", "10mbit", "--report")
    done = ran(*given, str(report), "--", str(tmp_path / "send.py"), timeout=150)
    assert done.returncode == 0, done.stderr
    assert "site 1: 2," in done.stderr
    found = json.loads(report.read_text())
    for site in found["between"]:
        assert 2_400_000 < site["sent_bytes"] < 2_400_000 * 1.15
        assert 2_400_000 < site["received_bytes"] < 2_400_000 * 1.15
        assert 600_000 < site["most_in_a_second"] < 1_250_000 * 1.05
    assert len(found["hosts"]) == 4
    for host in found["hosts"]:
        assert 25_200_000 < host["sent_bytes"] < 25_200_000 * 1.08


def test_the_most_in_a_second_slides() -> None:
    counts = [(0.0, 0), (0.9, 10), (1.6, 30), (1.8, 31), (3.0, 35)]
    assert netlab._most_in(counts, 1.0) == 21


def processes_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().replace(b"\0", b" ").decode():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


@lab
@pytest.mark.timeout(200)
def test_a_killed_lab_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text("import time; time.sleep(100)")
    chance = random.Random(1)
    before = interfaces()
    mark = str(tmp_path / "wait.py")
    for _ in range(10):
        process = subprocess.Popen(
            command("--hosts", "3", "--", mark),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A shell without job control makes what it starts with & ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(chance.uniform(0.1, 2.5))
        process.send_signal(
            chance.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
        )
        process.wait(timeout=10)
        deadline = time.monotonic() + 10
        while (left := processes_with(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left
        assert interfaces() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "fast", "--", "x.py"], "'fast' is not a rate"),
        (["--rate", "1bit", "--", "x.py"], "'1bit' is not a rate"),
        (["--delay", "20s", "--", "x.py"], "'20s' is not a delay"),
        (["--delay", "2000ms", "--", "x.py"], "a delay from 0ms to 1000ms"),
        (["--hosts", "1", "--", "x.py"], "--hosts 1 must be 2 to 64"),
        (["--ranks", "0", "--", "x.py"], "--ranks 1 or more"),
        ([], "there is no job"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        netlab.parse(arguments)
    assert words in capsys.readouterr().err


def test_why_there_is_no_lab_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if all(netlab.shutil.which(tool) for tool in netlab.TOOLS):
        assert "sudo" in str(netlab.missing())
    monkeypatch.setattr(netlab.shutil, "which", lambda _tool: None)
    with pytest.raises(SystemExit):
        netlab.parse(["--", "x.py"])
    assert "apt-get install iproute2" in capsys.readouterr().err


def test_rates() -> None:
    assert netlab.rate_bits("10mbit") == 10_000_000
    assert netlab.rate_bits("2.5gbit") == 2_500_000_000


@lab
@pytest.mark.timeout(150)
@pytest.mark.parametrize("hook", ["ddp", "local_sgd"])
def test_a_cut_link_is_an_error_on_both_sides(tmp_path: Path, hook: str) -> None:
    """Within the group's timeout and 5 s, no thread left, and the processes end."""
    job = [sys.executable, "-m", "tests.cut_link", str(tmp_path), hook]
    done = ran("--hosts", "2", "--each", "--", *job, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said["error"].startswith("ExchangeError: ")
        assert "the link is down" in said["error"]
        assert said["seconds"] < cut_link.TIMEOUT_S + 5
        assert said["threads"] == []
        assert said["finite"]
