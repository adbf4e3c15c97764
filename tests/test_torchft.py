"""Machines that come and go: exchanges fail, training goes on, nothing is lost.

Real managers and a real lighthouse, each replica a process of its own.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lc3.errors import AttachError, ConfigError
from tests import churn, forked, torchft_cases
from tests.ranks import Ranks
from tests.torchft_cases import Replica

ROOT = Path(__file__).parents[1]
HAVE = importlib.util.find_spec("torchft") is not None
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not HAVE, reason="torchft has a suite: make test-torchft"),
]
Pools = Callable[[int], Ranks]
Row = dict[str, Any]


class Training:
    """Replicas of one training, ended with it.

    Args:
        folder: where they write.
        given: what every ``Replica`` has.
    """

    def __init__(self, folder: Path, **given: Any) -> None:
        self.folder = folder
        self.given = given
        self.jobs: dict[str, forked.Job] = {}
        self.shining: ExitStack = ExitStack()
        self.port = 0

    def shine(self, **given: Any) -> torchft_cases.Lighthouse:
        """Start a lighthouse, in place of one that was killed."""
        found: torchft_cases.Lighthouse = self.shining.enter_context(
            torchft_cases.lighthouse(port=self.port, **given)
        )
        self.port = found.port
        return found

    def start(self, number: int, name: str = "", **given: Any) -> str:
        name = name or f"r{number}"
        replica = Replica(
            name=name,
            lighthouse=f"http://127.0.0.1:{self.port}",
            folder=str(self.folder),
            number=number,
            **{**self.given, **given},
        )
        with (self.folder / f"{name}.log").open("a") as log:
            self.jobs[name] = forked.Job(
                [
                    *(sys.executable, "-m", "tests.torchft_cases"),
                    json.dumps(asdict(replica)),
                ],
                stdout=log,
            )
        return name

    def signal(self, name: str, number: int) -> None:
        self.jobs[name].send_signal(number)

    def lines(self, name: str, event: str = "exchange") -> list[Row]:
        path = self.folder / f"{name}.jsonl"
        text = path.read_text() if path.exists() else ""
        rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [row for row in rows if row["event"] == event]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait(self, ready: Callable[[], object], timeout_s: float = 60) -> Any:
        """Wait until something is so; return it."""
        end = time.monotonic() + timeout_s
        while not (found := ready()):
            if time.monotonic() > end:
                logs = {n: self.log(n)[-3000:] for n in self.jobs}
                raise AssertionError(f"not within {timeout_s} s: {logs}")
            time.sleep(0.05)
        return found

    def committed(self, name: str) -> list[Row]:
        return [row for row in self.lines(name) if row["committed"]]

    def end(self, *names: str) -> dict[str, Row]:
        """Let replicas end, and return how each of them did."""
        (self.folder / "stop").touch()
        found = {}
        for name in names or self.jobs:
            assert self.jobs[name].wait(60) == 0, self.log(name)[-3000:]
            (found[name],) = self.lines(name, "end")
        return found

    def close(self) -> None:
        for job in self.jobs.values():
            job.send_signal(signal.SIGCONT)
            job.kill()
        self.shining.close()

    def check_alike(self) -> int:
        """Check that replicas are identical after every exchange; return how many."""
        models: dict[tuple[int, int], set[str]] = {}
        for name in self.jobs:
            for row in self.committed(name):
                key = row["exchanges"], row["entry"]
                models.setdefault(key, set()).add(row["hash"])
        assert all(len(found) == 1 for found in models.values()), models
        return len(models)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    made = []

    def begin(**given: Any) -> Training:
        one = Training(tmp_path, **given)
        made.append(one)
        return one

    yield begin
    for one in made:
        one.close()


def test_without_failures_it_is_local_sgd_bit_for_bit(
    ranks: Pools, training: Callable[..., Training]
) -> None:
    run = training(steps=80)
    run.shine(least=4)
    names = [run.start(number) for number in range(4)]
    found = ranks(4).run(torchft_cases.local_sgd_alone, 80, 4)
    for name in names:
        assert run.jobs[name].wait(120) == 0, run.log(name)[-3000:]
        assert [row["hash"] for row in run.committed(name)] == found[0]
    assert len(found[0]) == 20
    assert found[1:] == found[:-1]


def test_tokens_weigh_as_in_local_sgd_also_after_an_exchange_that_failed(
    ranks: Pools, training: Callable[..., Training]
) -> None:
    """The third exchange fails on all: the fourth is of twice the steps and tokens."""
    tokens = 1, 2, 5
    run = training(steps=40, fault="unsure of 3")
    run.shine(least=3)
    names = [run.start(number, tokens=tokens[number]) for number in range(3)]
    weighed, plain, without = (
        ranks(3).run(torchft_cases.local_sgd_alone, 40, 4, *given)[0]
        for given in ((tokens, 3), (tokens, 0), ((), 3))
    )
    for name in names:
        assert run.jobs[name].wait(120) == 0, run.log(name)[-3000:]
        committed = [row["committed"] for row in run.lines(name)]
        assert committed == [True, True, False, *[True] * 7]
        assert [row["hash"] for row in run.committed(name)] == weighed
    assert weighed[:2] == plain[:2]
    assert weighed[2] not in plain
    assert not set(weighed) & set(without)


@pytest.mark.parametrize("kind", ["own", "taken"])
def test_who_joins_has_an_optimizer_of_its_own_or_takes_that_of_who_gives_the_model(
    training: Callable[..., Training], kind: str
) -> None:
    run = training(pause_s=0.03)
    run.shine(least=2)
    a, b = run.start(0), run.start(1)
    run.wait(lambda: len(run.committed(b)) > 3)
    c = run.start(2, given={"optimizer_state": kind})
    run.wait(lambda: run.committed(c))
    run.end()
    (joined,) = run.lines(c, "joined")
    at = joined["exchanges"]
    given, other = (
        next(row for row in run.committed(name) if row["exchanges"] == at)
        for name in (a, b)
    )
    nothing = torchft_cases.hash_of({})
    assert joined["optimizer"] == (given["optimizer"] if kind == "taken" else nothing)
    assert nothing != given["optimizer"] != other["optimizer"]
    assert run.check_alike() > 3


def test_a_rank_is_killed_and_joins_again(training: Callable[..., Training]) -> None:
    run = training(pause_s=0.03)
    run.shine(least=2)
    a, b, c = (run.start(number) for number in range(3))
    run.wait(lambda: all(len(run.committed(name)) > 4 for name in (a, b, c)))
    run.signal(b, signal.SIGKILL)
    before = run.committed(a)[-1]["exchanges"]
    run.wait(lambda: run.committed(a)[-1]["exchanges"] > before + 4, 30)
    assert run.committed(a)[-1]["world"] == 2
    again = run.start(1, "r1-again")
    (joined,) = run.wait(lambda: run.lines(again, "joined"))
    assert joined["exchanges"] > before
    run.wait(lambda: len(run.committed(again)) > 3)
    assert run.committed(again)[-1]["world"] == 3
    run.jobs.pop(b).kill()
    for row in run.end().values():
        assert row["error"] == ""
        assert row["counted"] > 0.8 * row["trained"]
    assert run.check_alike() > 10


def test_a_rank_that_sleeps_keeps_what_it_has_moved(
    training: Callable[..., Training],
) -> None:
    run = training(pause_s=0.03, timeout_s=4)
    run.shine(least=2)
    a, b, c = (run.start(number) for number in range(3))
    run.wait(lambda: all(len(run.committed(name)) > 4 for name in (a, b, c)))
    run.signal(b, signal.SIGSTOP)
    before = run.committed(a)[-1]["exchanges"]
    run.wait(lambda: run.committed(a)[-1]["exchanges"] > before + 4, 30)
    run.signal(b, signal.SIGCONT)
    slept = run.committed(b)[-1]["exchanges"]
    run.wait(lambda: run.committed(b)[-1]["exchanges"] > slept + 4, 40)
    ended = run.end()
    assert run.check_alike() > 10
    for row in ended.values():
        assert row["counted"] > 0.8 * row["trained"]


def test_the_lighthouse_is_killed_and_comes_again(
    training: Callable[..., Training],
) -> None:
    run = training(pause_s=0.03, quorum_s=4)
    light = run.shine(least=3)
    a, _, _ = (run.start(number) for number in range(3))
    run.wait(lambda: len(run.committed(a)) > 3)
    light.process.kill()
    light.process.join()
    failed = run.lines(a)[-1]["failed"]
    step = run.lines(a)[-1]["step"]
    run.wait(lambda: run.lines(a)[-1]["failed"] > failed, 30)
    run.shine()
    before = run.lines(a)[-1]["exchanges"]
    run.wait(lambda: run.lines(a)[-1]["exchanges"] > before + 4, 60)
    assert run.lines(a)[-1]["step"] > step
    for row in run.end().values():
        assert row["counted"] > 0.8 * row["trained"]
    assert run.check_alike() > 5


def test_what_a_rank_damages_is_left_out_and_named(
    training: Callable[..., Training],
) -> None:
    run = training(pause_s=0.03)
    run.shine(least=2)
    a, _ = run.start(0), run.start(1)
    bad = run.start(2, fault="damaged")
    run.wait(lambda: run.committed(a) and run.committed(a)[-1]["world"] == 3)
    met = run.committed(a)[-1]["exchanges"]
    run.wait(lambda: run.committed(a)[-1]["exchanges"] > met + 6)
    assert not run.committed(bad)
    assert f"lc3: {bad}" in run.log(a)
    assert "is left out of this exchange" in run.log(a)
    assert "CRC" in run.log(a)
    ended = run.end()
    assert ended[bad]["counted"] == 0
    assert ended[a]["counted"] > 0.8 * ended[a]["trained"]
    assert run.check_alike() > 5


def test_a_rank_with_nan_is_left_out_once(training: Callable[..., Training]) -> None:
    run = training(pause_s=0.03)
    run.shine(least=3)
    a, b, c = run.start(0), run.start(1), run.start(2, fault="nan at 10")
    run.wait(lambda: run.committed(c) and run.committed(c)[-1]["exchanges"] > 6)
    ended = run.end()
    assert [ended[name]["left_out"] for name in (a, b, c)] == [0, 0, 1]
    assert "is not finite" in run.log(c)
    assert run.check_alike() > 5


def test_another_configuration_is_refused_and_the_others_go_on(
    training: Callable[..., Training],
) -> None:
    run = training(pause_s=0.03)
    run.shine(least=2)
    a, b = run.start(0), run.start(1)
    run.wait(lambda: len(run.committed(a)) > 3)
    bad = run.start(2, given={"outer_lr": 1.0})
    assert run.jobs[bad].wait(60) != 0
    (said,) = run.lines(bad, "end")
    assert said["error"].startswith("PlanMismatch: ranks differ: outer_lr is 1.5 on r")
    run.jobs.pop(bad).kill()
    before = run.committed(a)[-1]["exchanges"]
    run.wait(lambda: run.committed(a)[-1]["exchanges"] > before + 3, 30)
    run.end()
    assert f"{'r2'} is left out: its configuration is another" in run.log(a) + run.log(
        b
    )


NEUTRAL = {"outer_lr": 1.0, "residual_decay": 1.0, "inner_momentum_scale": 1.0}


def mass_lost(run: Training, names: list[str]) -> float:
    """Return how much of what ranks have walked went nowhere, of all they walked.

    What has reached the model is, of each exchange, the mean times the ranks in it.
    """
    arrived = torch.zeros(3, dtype=torch.float64)
    entries: dict[int, Row] = {}
    walked = torch.zeros(3, dtype=torch.float64)
    owed = torch.zeros(3, dtype=torch.float64)
    far = torch.zeros(3, dtype=torch.float64)
    for name in names:
        rows = [row for row in run.lines(name) if not row["unsure"]]
        entries |= {row["exchanges"]: row for row in rows if row["committed"]}
        walked += torch.tensor(rows[-1]["walked"])
        far += torch.tensor(rows[-1]["walked"]).abs()
        owed += torch.tensor(rows[-1]["owed"])
    joined = [row for name in names for row in run.lines(name, "joined")]
    (first,) = {tuple(row["model"]) for row in joined if not row["exchanges"]}
    before = torch.tensor(first)
    assert sorted(entries) == list(range(1, len(entries) + 1))
    for number in sorted(entries):
        after = torch.tensor(entries[number]["model"])
        arrived += (before - after) * entries[number]["ranks"]
        before = after
    return float((walked - owed - arrived).abs().max() / far.max())


def test_mass_is_kept_where_ranks_come_and_leave_in_order(
    training: Callable[..., Training],
) -> None:
    run = training(
        mass=True, pause_s=0.02, given={**NEUTRAL, "sync_every": "manual"}, timeout_s=4
    )
    run.shine(least=2)
    a, b = run.start(0), run.start(1)
    run.wait(lambda: len(run.committed(a)) > 3)
    c = run.start(2, steps=24)  # and leaves
    run.wait(lambda: run.lines(c, "end"))
    d = run.start(3)
    run.wait(lambda: run.committed(d))
    run.signal(b, signal.SIGSTOP)
    before = run.committed(a)[-1]["exchanges"]
    run.wait(lambda: run.committed(a)[-1]["exchanges"] > before + 3)
    run.signal(b, signal.SIGCONT)
    run.wait(lambda: run.committed(b)[-1]["exchanges"] > before + 5)
    run.end()
    assert mass_lost(run, [a, b, c, d]) < 1e-6


@pytest.mark.parametrize("unsure", [(1,), (0, 1, 2)], ids=["one", "all"])
def test_who_is_not_sure_of_an_exchange_sends_nothing_twice(
    training: Callable[..., Training], unsure: tuple[int, ...]
) -> None:
    """One rank does not hear that the others count it; or nobody counts it."""
    run = training(mass=True, pause_s=0.02, given={**NEUTRAL, "sync_every": "manual"})
    run.shine(least=3)
    names = [
        run.start(number, fault="unsure of 5" if number in unsure else "")
        for number in range(3)
    ]
    run.wait(lambda: all(len(run.committed(name)) > 8 for name in names))
    run.end()
    for number, name in enumerate(names):
        assert run.lines(name)[4]["committed"] == (number not in unsure)
        assert run.lines(name)[-1]["failed"] == (number in unsure)
    assert run.check_alike() > 8
    assert mass_lost(run, names) < 1e-6


@pytest.mark.parametrize("last", [0, 2])
def test_what_a_killed_rank_takes_along_is_what_it_owed(
    training: Callable[..., Training], last: int
) -> None:
    """Any of the three may be the one that finds the two others at work."""
    run = training(mass=True, pause_s=0.02, given={**NEUTRAL, "sync_every": "manual"})
    run.shine(least=2)
    faults = "", "", "killed at 26"
    first = [number for number in range(3) if number != last]
    names = {number: run.start(number, fault=faults[number]) for number in first}
    run.wait(lambda: all(run.lines(name, "joined") for name in names.values()))
    names[last] = run.start(last, fault=faults[last])
    a, b, c = (names[number] for number in range(3))
    assert run.jobs[c].wait(60) == -signal.SIGKILL
    before = run.committed(a)[-1]["exchanges"]
    run.wait(lambda: run.committed(a)[-1]["exchanges"] > before + 3)
    run.jobs.pop(c).kill()
    run.end()
    assert run.committed(c)
    assert mass_lost(run, [a, b, c]) < 1e-6


def test_a_slow_rank_does_not_hold_up_the_others(
    training: Callable[..., Training],
) -> None:
    run = training(pause_s=0.1, quorum_s=30)
    run.shine(join_ms=150, least=2)
    a, b = run.start(0), run.start(1)
    run.wait(lambda: len(run.committed(a)) > 2)
    slow = run.start(2, pause_s=1.0)
    run.wait(lambda: len(run.committed(slow)) > 2)
    rows = {name: run.committed(name) for name in (a, b, slow)}
    run.end()
    since = [row for row in rows[a] if row["time"] > rows[slow][0]["time"]]
    steps = since[-1]["step"] - since[0]["step"]
    assert steps / (since[-1]["time"] - since[0]["time"]) > 5  # of 10 without it
    assert rows[slow][-1]["counted"] == rows[slow][-1]["trained"]
    assert run.check_alike() > 10


def test_ranks_of_any_speed_are_in_every_exchange_by_seconds(
    training: Callable[..., Training],
) -> None:
    run = training(pause_s=0.05, quorum_s=30, given={"sync_every_s": 3.0})
    run.shine(join_ms=3000, least=3)
    a, b, slow = run.start(0), run.start(1), run.start(2, pause_s=0.5)
    run.wait(lambda: len(run.committed(slow)) > 4, 100)
    rows = {name: run.committed(name)[:5] for name in (a, b, slow)}
    run.end()
    for some in rows.values():
        assert [row["exchanges"] for row in some] == [1, 2, 3, 4, 5]
        assert {row["world"] for row in some} == {3}
        assert some[-1]["time"] - some[0]["time"] == pytest.approx(12, abs=3)
    for name in (a, b):
        waited = max(row["seconds"] for row in rows[name][1:])
        assert waited < 1.5  # of 30 with as many steps
        steps = rows[name][-1]["step"] - rows[name][0]["step"]
        late = rows[slow][-1]["step"] - rows[slow][0]["step"]
        assert 4 < steps / late < 15
    assert run.check_alike() >= 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sync_every": 8, "sync_every_s": 2.0}, "both say when to exchange"),
        ({"sync_every_s": 0.0}, "a number of seconds above 0"),
        ({"sync_every_s": True}, "a number of seconds above 0"),
        ({"sync_every_s": 20.0}, "less than the manager's quorum_timeout, 20"),
        ({"hostname": ""}, "hostname='' must be the name"),
        ({"hostname": "node..1"}, "hostname='node..1' must be the name"),
        ({"bind": None}, "bind=None must be the name"),
        ({"fetch_timeout_s": 0}, "fetch_timeout_s=0 must be a number of seconds"),
        ({"fetch_timeout_s": "5"}, "fetch_timeout_s='5' must be a number of seconds"),
    ],
)
def test_what_ranks_cannot_keep_to_is_refused(
    given: dict[str, Any], message: str
) -> None:
    from torchft.manager import Manager, WorldSizeMode

    from lc3.hooks import torchft as hook

    manager = Manager.__new__(Manager)
    manager._use_async_quorum = False
    manager._group_world_size = 1
    manager._replica_world_size_mode = WorldSizeMode.DYNAMIC
    manager._quorum_timeout = timedelta(seconds=20)
    manager._timeout = timedelta(seconds=10)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ConfigError, match=message):
        hook.attach(model, optimizer, manager, **given)


def test_a_manager_has_one_state_and_then_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchft.manager import Manager

    from lc3.hooks import torchft as hook

    known: list[str] = []
    monkeypatch.setattr(
        Manager, "register_state_dict_fn", lambda _, key, *__: known.append(key)
    )
    manager = Manager.__new__(Manager)
    manager._replica_id = "r0"
    first = hook._Managed(manager)
    with pytest.raises(AttachError, match="has an lc3 state already; close that"):
        hook._Managed(manager)
    first.release()
    hook._Managed(manager).release()
    assert known == ["lc3"]


def launched(folder: Path, name: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start launch/torchft.sh as one of its two kinds."""
    beside = str(Path(sys.executable).parent)
    given = {"PATH": f"{beside}:{os.environ['PATH']}", "PYTHON": sys.executable}
    kind = "lighthouse" if name == "lighthouse" else "replica"
    with (folder / name).open("wb") as log:
        return subprocess.Popen(
            [str(ROOT / "launch/torchft.sh"), kind],
            env={**os.environ, **given, "OMP_NUM_THREADS": "1", **variables},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def processes(log: Path) -> list[int]:
    """Return the processes that a replica's script has had so far."""
    return [
        int(found) for found in re.findall(r"joined: process (\d+)", log.read_text())
    ]


def test_the_launcher_starts_a_lighthouse_and_replicas_anew(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    given = {"PORT": port, "TIMEOUT_S": "8", "EPOCHS": "20", "GRACE_MS": "500"}
    jobs = {name: launched(tmp_path, name, **given) for name in ("lighthouse",)}
    logs = {name: tmp_path / name for name in "ab"}

    def wait_for(ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 100
        while not ready():
            said = "".join(log.read_text()[-2000:] for log in logs.values())
            assert time.monotonic() < end, said
            time.sleep(0.1)

    try:
        for name in logs:
            jobs[name] = launched(tmp_path, name, REPLICA=name, **given)
        wait_for(lambda: all(map(processes, logs.values())))
        os.kill(processes(logs["b"])[0], signal.SIGKILL)
        wait_for(lambda: len(processes(logs["b"])) == 2)
        for name, log in logs.items():
            assert jobs[name].wait(100) == 0, log.read_text()[-3000:]
            assert re.search(r"accuracy 0\.\d+ after \d+ exchanges", log.read_text())
    finally:
        for job in jobs.values():
            job.terminate()  # torchrun ends its workers
        for job in jobs.values():
            with suppress(subprocess.TimeoutExpired):
                job.wait(20)
            job.kill()
            job.wait()


def test_a_short_churn(tmp_path: Path) -> None:
    given = {"sync_every": 4, "pause_s": 0.05, "timeout_s": 6.0, "quorum_s": 10.0}
    one = churn.Campaign(tmp_path, given, None, seed=3, every_s=(3.0, 7.0), away_s=6.0)
    one.run(45, churn=True)
    report = one.report()
    assert report["hangs"] == []
    assert report["models alike"], report
    assert report["models compared"] > 20
    assert sum(report["events"].values()) > churn.AT_FIRST + 3
    assert report["goodput"] > 0.9, report
    assert report["ends by itself"] == []
