"""``subprocess`` for Python programs and torchrun's jobs that start at once.

Processes are forked from a server that has imported torch and lc3 already, which takes
a new interpreter five seconds and more. What a clean interpreter or a launcher does
itself is for ``subprocess``.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def context() -> ForkServerContext:
    """Return the context of processes that are forked from the server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.warm"])
    return found


class Job:
    """One process of a Python command, or those of a torchrun command; like ``Popen``.

    Args:
        command: Python, then ``-m`` and a module, ``-c`` and code, or a script; before
            that, ``-m torch.distributed.run --standalone --nproc-per-node`` and a
            number. A rank that fails ends the others.
        cwd: where the command runs.
        env: all of its environment.
        stdout: an open file.
        stderr: another, or ``subprocess.STDOUT``.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any],
        stderr: IO[Any] | int = subprocess.STDOUT,
    ) -> None:
        assert command[0] == sys.executable, command
        program = list(command[1:])
        variables = dict(os.environ if env is None else env)
        variables_of = [variables]
        if program[: len(_TORCHRUN)] == _TORCHRUN:
            world = int(program[len(_TORCHRUN)])
            program = program[len(_TORCHRUN) + 1 :]
            self._store = dist.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False
            )
            variables_of = [
                {**variables, **_variables(rank, world, self._store.port)}
                for rank in range(world)
            ]
        self.returncode: int | None = None
        first, second = stdout, stdout if isinstance(stderr, int) else stderr
        self._files = [os.fdopen(os.dup(f.fileno()), "wb") for f in (first, second)]
        files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self._files]
        self._processes = [
            context().Process(
                target=_main, args=(program, str(cwd or Path.cwd()), one, files)
            )
            for one in variables_of
        ]
        for process in self._processes:
            process.start()

    def poll(self) -> int | None:
        """Return the exit status if all processes have ended; end the rest of a job."""
        codes = [process.exitcode for process in self._processes]
        failed = next((code for code in codes if code), None)
        if failed is not None or None not in codes:
            self.kill()
            self.returncode = failed or 0
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status when all processes have ended.

        Raises:
            subprocess.TimeoutExpired: they have not within ``timeout`` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("a forked job", timeout or 0)
            wait([p.sentinel for p in self._processes if p.exitcode is None], left)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to every process that there is."""
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid or 0, number)

    def terminate(self) -> None:
        """Ask the processes to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the processes, however they are."""
        for process in self._processes:
            process.kill()
            process.join()
        for file in self._files:
            file.close()


def run(
    command: Sequence[str],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    capture_output: bool = True,
    text: bool = True,
    timeout: float = 200,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Return how a job ended and what it wrote, as ``subprocess.run`` does."""
    assert capture_output
    assert text
    with ExitStack() as stack:
        out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        job = Job(command, cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            job.wait(timeout)
        finally:
            job.kill()
        for file in (out, err):
            file.seek(0)
        done = subprocess.CompletedProcess(
            list(command), job.returncode or 0, out.read(), err.read()
        )
    if check:
        done.check_returncode()
    return done


def _variables(rank: int, world: int, port: int) -> dict[str, str]:
    """Return what torchrun says to a rank of a job on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "forked",
    }


def _main(
    program: list[str], cwd: str, variables: dict[str, str], files: Sequence[str]
) -> None:
    for number, path in enumerate(files, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", "1")))
    kind, *arguments = program
    if kind == "-m":
        module, *arguments = arguments
        sys.modules.pop(module, None)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *arguments = arguments
        sys.argv = ["-c", *arguments]
        exec(code, {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")
