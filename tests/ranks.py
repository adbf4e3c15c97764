"""Runs functions on N gloo ranks: N processes, started once, used for many cases."""

import faulthandler
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import forked

GROUP_TIMEOUT_S = 40


class RanksFailedError(Exception):
    """A case raised on some rank, or did not end in time."""


class Ranks:
    """``world`` processes with a gloo process group, waiting for functions to run."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.alive = True
        self._folder = tempfile.TemporaryDirectory()
        context: Any = forked.context()
        if torch.cuda.is_available():  # which does not survive a fork
            context = multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, store, there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 90
    ) -> list[Any]:
        """Return ``function(rank, world, *args)`` of every rank, in rank order.

        A case that raises or hangs ends all processes.
        """
        for pipe in self._pipes:
            pipe.send((function, args, timeout_s))
        results: list[Any] = []
        failures: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(timeout_s + 10 if not failures else 5):
                    failures.append(f"rank {rank}: no answer within {timeout_s} s")
                    continue
                ok, result = pipe.recv()
            except (EOFError, ConnectionError) as error:
                failures.append(f"rank {rank} died: {error!r}")
                continue
            if ok:
                results.append(result)
            else:
                failures.append(f"rank {rank}:\n{result}")
        if failures:
            self.close()
            raise RanksFailedError("\n".join(failures))
        return results

    def close(self) -> None:
        """End all processes, however they are."""
        self.alive = False
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def join(rank: int, world: int, store: str, timeout_s: float) -> None:
    """Make this process a gloo rank, on one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    join(rank, world, store, GROUP_TIMEOUT_S)
    while True:
        try:
            function, args, timeout_s = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout_s)
        try:
            answer = (True, function(rank, world, *args))
        except BaseException:  # noqa: BLE001  # it is reported to the test
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)
