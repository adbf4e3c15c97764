"""Jobs are shared out evenly, all of them run, and an error comes back."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lc3.workers import INLINE_WEIGHT, Workers, balanced


@given(weights=st.lists(st.integers(1, 1000), max_size=40), groups=st.integers(1, 9))
def test_jobs_are_balanced(weights: list[int], groups: int) -> None:
    done: list[int] = []
    jobs = [(weight, lambda w=weight: done.append(w)) for weight in weights]
    loads = []
    for group in balanced(jobs, groups):
        for job in group:
            job()
        loads.append(sum(done))
        done.clear()
    assert len(loads) == groups
    assert sum(loads) == sum(weights)
    assert max(loads) - min(loads) <= max(weights, default=0)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_heavy_jobs_run_on_all_threads(threads: int) -> None:
    meet = threading.Barrier(threads, timeout=10)
    names: set[str] = set()

    def job() -> None:
        names.add(threading.current_thread().name)
        meet.wait()

    workers = Workers(threads)
    workers.run([(INLINE_WEIGHT, job)] * threads)
    workers.close()
    workers.close()
    assert len(names) == threads
    assert threading.current_thread().name in names


def test_light_jobs_stay_on_the_callers_thread() -> None:
    names = []
    workers = Workers(3)
    workers.run([(1, lambda: names.append(threading.current_thread().name))] * 5)
    workers.close()
    assert set(names) == {threading.current_thread().name}


def test_an_error_comes_back_when_all_have_ended() -> None:
    done = []

    def fail() -> None:
        raise MemoryError("no room")

    workers = Workers(2)
    with pytest.raises(MemoryError, match="no room"):
        workers.run([(INLINE_WEIGHT, fail), (INLINE_WEIGHT, lambda: done.append(1))])
    workers.close()
    assert done
