"""Machines that come and go: exchanges fail, training goes on, nothing is lost.

Real managers and a real lighthouse, each replica a process of its own.
"""

import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests import forked, torchft_cases
from tests.ranks import Ranks
from tests.torchft_cases import Replica

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
    found = ranks(4).run(torchft_cases.local_sgd_alone, 80, 4, {})
    for name in names:
        assert run.jobs[name].wait(120) == 0, run.log(name)[-3000:]
        assert [row["hash"] for row in run.committed(name)] == found[0]
    assert len(found[0]) == 20
    assert found[1:] == found[:-1]
