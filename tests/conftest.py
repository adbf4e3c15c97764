"""Fixtures and settings that more than one test file needs."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.ranks import Ranks

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "thorough", parent=settings.get_profile("default"), max_examples=5_000
)
settings.load_profile("default")


def pytest_report_header() -> str:
    """Say which backends the codec's tests run with: none is skipped silently."""
    from tests.test_codec import BACKENDS

    return f"codec backends: {', '.join(codec.__name__ for codec in BACKENDS)}"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Give ``ranks(world)``: processes, started at first use, shared by a file's tests.

    Groups that frameworks leave open end with them: each has threads that look for
    messages a hundred times a second.
    """
    running: dict[int, Ranks] = {}

    def of_world(world: int) -> Ranks:
        if world not in running or not running[world].alive:
            running[world] = Ranks(world)
        return running[world]

    yield of_world
    for pool in running.values():
        if pool.alive:
            pool.close()
