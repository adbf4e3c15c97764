"""Ranks that are killed, stopped or told to end, without a launcher that restarts them.

For ``make soak``. Every trial is a training of three ranks; at a random moment, one of
them gets a signal. The others must end by an error of lc3 or of torch within
``NOTICED_S``, none may hang, and where the rank is only held up for a while, training
ends as if nothing had been.
Processes are forked from a server that has imported torch, so a trial takes seconds.
"""

import collections
import faulthandler
import hashlib
import os
import random
import signal
import tempfile
import time
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from rich.progress import track

from tests import forked
from tests.checkpoint_cases import Run
from tests.ranks import join

WORLD = 3
HOOKS = ("ddp", "push_pull", "local_sgd")
DEEDS = ("kill", "terminate", "interrupt", "stop", "hold up")
SIGNALS = {
    "kill": signal.SIGKILL,
    "terminate": signal.SIGTERM,
    "interrupt": signal.SIGINT,
    "stop": signal.SIGSTOP,
    "hold up": signal.SIGSTOP,
}
GROUP_TIMEOUT_S = 6
NOTICED_S = 30  # a stopped rank is noticed by the group's timeout, and told of after it
STEPS = 40  # of a training that is held up


def work(rank: int, folder: str, hook: str, steps: int, pipe: Connection) -> None:
    """Train, tell the parent of each step, and at the end how it ended."""
    said, digest = "", ""
    faulthandler.register(signal.SIGUSR1)  # for one that hangs
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs have none
    try:
        join(rank, WORLD, f"{folder}/store", GROUP_TIMEOUT_S)
        torch.manual_seed(0)
        run = Run(hook)
        for step in range(steps):
            run.train(rank, range(step, step + 1))
            pipe.send(step)
        if hook == "local_sgd":
            run.state.sync()
        found = torch.cat([p.detach().reshape(-1) for p in run.net.parameters()])
        digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
        run.state.close()
    except BaseException as error:  # noqa: BLE001  # it is what is asked about
        said = f"{type(error).__name__}: {error}"
    pipe.send((said, digest))


class Trial:
    """Three ranks in training, their pipes, and what they said at last."""

    def __init__(self, context: Any, hook: str, steps: int, folder: str) -> None:
        self.said: dict[int, tuple[str, str]] = {}
        self.steps = [-1] * WORLD
        self.ended_at: dict[int, float] = {}
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(
                target=work, args=(rank, folder, hook, steps, there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def listen(
        self, seconds: float, until: int | None = None, ends: int = WORLD
    ) -> None:
        """Hear the ranks for a time, until some have ended, or one made ``until``."""
        end = time.monotonic() + seconds
        while len(self.ended_at) < ends and time.monotonic() < end:
            open_ = [p for r, p in enumerate(self.pipes) if r not in self.ended_at]
            for pipe in wait(open_, timeout=max(0.0, end - time.monotonic())):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    found = self.pipes[rank].recv()
                except (EOFError, ConnectionError):
                    self.ended_at[rank] = time.monotonic()
                    continue
                if isinstance(found, tuple):
                    self.said[rank] = found
                    continue
                self.steps[rank] = found
                if until is not None and found >= until:
                    return

    def say_where(self) -> None:
        """Let every rank that is left print what its threads do."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGUSR1)
                time.sleep(0.5)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()


def trial(context: Any, hook: str, deed: str, dice: random.Random) -> dict[str, Any]:
    """Send one rank a signal; return how the ranks ended.

    Raises:
        AssertionError: one hangs, or ends without a word, or otherwise than it should.
    """
    steps = STEPS if deed == "hold up" else 10**6
    with tempfile.TemporaryDirectory() as folder:
        ranks = Trial(context, hook, steps, folder)
        try:
            ranks.listen(60, until=dice.randrange(8))
            assert not ranks.ended_at, ("before the signal", ranks.said)
            time.sleep(dice.uniform(0, 0.03))
            victim = dice.randrange(WORLD)
            os.kill(ranks.processes[victim].pid or 0, SIGNALS[deed])
            start = time.monotonic()
            if deed == "hold up":
                time.sleep(dice.uniform(0.1, 1.5))
                os.kill(ranks.processes[victim].pid or 0, signal.SIGCONT)
            elif deed == "stop":
                ranks.listen(NOTICED_S, ends=WORLD - 1)
                os.kill(ranks.processes[victim].pid or 0, signal.SIGKILL)
            ranks.listen(NOTICED_S)
            where = (hook, deed, victim, ranks.said)
            others = [rank for rank in range(WORLD) if rank != victim]
            if any(rank not in ranks.ended_at for rank in others):
                ranks.say_where()
                raise AssertionError(("hangs", *where, ranks.steps))
            assert all(rank in ranks.said for rank in others), ("no word", *where)
            if deed == "hold up":
                digests = {digest for _, digest in ranks.said.values()}
                assert len(digests) == 1, where
                assert all(not said for said, _ in ranks.said.values()), where
                return {"digest": digests.pop()}
            for rank in others:
                assert ranks.said[rank][0], ("an end as if nothing had been", *where)
            slowest = max(ranks.ended_at[rank] for rank in others) - start
            return {"said": [ranks.said[rank][0] for rank in others], "after": slowest}
        finally:
            ranks.close()


def campaign(count: int, seed: int) -> dict[str, Any]:
    """Run ``count`` trials; return how many of each deed, and the longest wait.

    Raises:
        AssertionError: as ``trial``; or a rank that was held up changed the result.
    """
    dice = random.Random(seed)
    context = forked.context()
    counted: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    digests: dict[str, str] = {}
    longest: dict[str, float] = {}
    for number in track(range(count), "signals", transient=True):
        deed, hook = DEEDS[number % len(DEEDS)], HOOKS[number % len(HOOKS)]
        found = trial(context, hook, deed, dice)
        counted[deed] += 1
        if "digest" in found:
            assert digests.setdefault(hook, found["digest"]) == found["digest"], hook
            continue
        kinds.update(said.split(":")[0] for said in found["said"])
        longest[deed] = max(longest.get(deed, 0.0), round(found["after"], 1))
    return {**counted, "errors": dict(kinds), "longest wait, s": longest}
