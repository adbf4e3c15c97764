"""Threads that share out independent jobs: kernels that release the GIL."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE_WEIGHT = 1 << 16  # elements; below, waking a thread costs more than it saves


class Workers:
    """Runs jobs on ``threads`` threads, the caller's among them.

    Args:
        threads: number of threads; with 1, everything runs on the caller's thread.

    Attributes:
        threads: number of threads.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = (
            ThreadPoolExecutor(threads - 1, thread_name_prefix="lc3-codec")
            if threads > 1
            else None
        )

    def map(self, job: Callable[[int], T], weights: Sequence[int]) -> list[T]:
        """Return ``job(i)`` of every i, each with its weight in elements.

        Raises:
            What a job raised; the others have ended by then.
        """
        return self.share(lambda some: [job(index) for index in some], weights)

    def share(
        self, job: Callable[[Sequence[int]], list[T]], weights: Sequence[int]
    ) -> list[T]:
        """Return what ``job`` returns of every i, called with some of them a thread.

        Raises:
            See ``map``.
        """
        everything = range(len(weights))
        if self._pool is None or len(weights) == 1 or sum(weights) < INLINE_WEIGHT:
            return job(everything) if weights else []
        results: dict[int, T] = {}

        def work(some: Sequence[int]) -> None:
            results.update(zip(some, job(some), strict=True))

        mine, *others = balanced(weights, self.threads)
        running = [self._pool.submit(work, group) for group in others if group]
        try:
            work(mine)
        finally:
            errors = [future.exception() for future in running]
        for error in errors:
            if error is not None:
                raise error
        return [results[index] for index in everything]

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        if self._pool is not None:
            self._pool.shutdown()


def balanced(weights: Sequence[int], groups: int) -> list[list[int]]:
    """Return indices in groups of about the same weight, the heaviest dealt first."""
    dealt: list[list[int]] = [[] for _ in range(groups)]
    loads = [0] * groups
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = loads.index(min(loads))
        loads[lightest] += weights[index]
        dealt[lightest].append(index)
    return dealt


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
