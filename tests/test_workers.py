"""Jobs are shared out evenly, all of them run, and an error comes back."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lc3.transport.workers import INLINE_WEIGHT, Workers, balanced


@given(weights=st.lists(st.integers(1, 1000), max_size=40), groups=st.integers(1, 9))
def test_jobs_are_balanced(weights: list[int], groups: int) -> None:
    dealt = balanced(weights, groups)
    loads = [sum(weights[index] for index in group) for group in dealt]
    assert len(loads) == groups
    assert sorted(index for group in dealt for index in group) == [*range(len(weights))]
    assert max(loads) - min(loads) <= max(weights, default=0)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_heavy_jobs_run_on_all_threads(threads: int) -> None:
    meet = threading.Barrier(threads, timeout=10)

    def job(index: int) -> tuple[int, str]:
        meet.wait()
        return index, threading.current_thread().name

    workers = Workers(threads)
    found = workers.map(job, [INLINE_WEIGHT] * threads)
    workers.close()
    workers.close()
    assert [index for index, _ in found] == [*range(threads)]
    names = {name for _, name in found}
    assert len(names) == threads
    assert threading.current_thread().name in names


def test_light_jobs_stay_on_the_callers_thread() -> None:
    workers = Workers(3)
    names = workers.map(lambda _: threading.current_thread().name, [1] * 5)
    workers.close()
    assert set(names) == {threading.current_thread().name}


def test_an_error_comes_back_when_all_have_ended() -> None:
    done = []

    def job(index: int) -> None:
        if index == 0:
            raise MemoryError("no room")
        done.append(index)

    workers = Workers(2)
    with pytest.raises(MemoryError, match="no room"):
        workers.map(job, [INLINE_WEIGHT, INLINE_WEIGHT])
    workers.close()
    assert done == [1]
