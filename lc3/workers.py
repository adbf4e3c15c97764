"""Threads that share out independent jobs: kernels that release the GIL."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

Job = Callable[[], None]

INLINE_WEIGHT = 1 << 16  # elements; below, waking a thread costs more than it saves


class Workers:
    """Runs jobs on ``threads`` threads, the caller's among them.

    Args:
        threads: at least 1; then everything runs on the caller's thread.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = (
            ThreadPoolExecutor(threads - 1, thread_name_prefix="lc3-codec")
            if threads > 1
            else None
        )

    def run(self, jobs: Sequence[tuple[int, Job]]) -> None:
        """Run all jobs, each with its weight in elements, and wait for them.

        Raises:
            What a job raised; the others have ended by then.
        """
        total = sum(weight for weight, _ in jobs)
        if self._pool is None or len(jobs) == 1 or total < INLINE_WEIGHT:
            _run(job for _, job in jobs)
            return
        mine, *others = balanced(jobs, self.threads)
        running = [self._pool.submit(_run, group) for group in others if group]
        try:
            _run(mine)
        finally:
            errors = [future.exception() for future in running]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        if self._pool is not None:
            self._pool.shutdown()


def balanced(jobs: Sequence[tuple[int, Job]], groups: int) -> list[list[Job]]:
    """Return the jobs in groups of about the same weight, the heaviest dealt first."""
    dealt: list[list[Job]] = [[] for _ in range(groups)]
    loads = [0] * groups
    for weight, job in sorted(jobs, key=lambda pair: -pair[0]):
        lightest = loads.index(min(loads))
        loads[lightest] += weight
        dealt[lightest].append(job)
    return dealt


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _run(jobs: Iterable[Job]) -> None:
    for job in jobs:
        job()
