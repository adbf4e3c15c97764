"""When ranks that come and go exchange, on a clock of the tests; how they count."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lc3.config import Settings
from lc3.errors import ExchangeError
from lc3.hooks import come_and_go
from lc3.hooks.come_and_go import Quorum, said_of
from lc3.knobs import knobs_for
from lc3.local.meeting import Meeting, Present, meet
from lc3.local.says import Says

T_S = 3.0


class Alone:
    """A ``Membership`` of this rank; ``failing`` meetings fail, after some seconds."""

    name = "alone"

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock, self.failing = clock, 0

    def meet(self) -> Quorum:
        if self.failing:
            self.failing -= 1
            self.clock.now += 1.0
            raise ExchangeError("nobody came")
        group: Any = None
        return Quorum(group, 0, 1, 1)

    def commit(self, error: Exception | None) -> bool:
        return error is None


class Loop:
    """A training whose steps take as long as a test says."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock = clock
        self.membership = Alone(clock)
        self.model = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        settings = Settings(topology="direct")
        choose = partial(knobs_for, settings=settings, given={"sync_every": None})
        self.state = come_and_go.State(
            self.model,
            [self.optimizer],
            settings,
            choose,
            self.membership,
            wants=False,
            every_s=T_S,
        )
        self.state.join("127.0.0.1", "127.0.0.1", 5.0)

    def exchanges_after(self, *seconds: float) -> list[int]:
        """Make a step of each of so many seconds; return those that end with one."""
        found = []
        for number, one in enumerate(seconds, start=1):
            before = self.state.exchanges, self.state.failed
            self.clock.now += one
            self.model(torch.ones(1, 2)).sum().backward()
            self.optimizer.step()
            if (self.state.exchanges, self.state.failed) != before:
                found.append(number)
        return found


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    clock = SimpleNamespace(now=100.0)

    def monotonic() -> float:
        return float(clock.now)

    monkeypatch.setattr(come_and_go, "time", SimpleNamespace(monotonic=monotonic))
    one = Loop(clock)
    yield one
    one.state.close()


def test_a_rank_exchanges_before_the_step_that_would_make_it_late(loop: Loop) -> None:
    assert loop.exchanges_after(*[0.7] * 12) == [4, 8, 12]
    assert loop.exchanges_after(*[0.5] * 12) == [6, 12]


def test_the_longest_step_since_the_last_exchange_says_how_long_another_takes(
    loop: Loop,
) -> None:
    assert loop.exchanges_after(1.0, 0.25, 0.5, 0.5, 0.25) == [4]
    assert loop.exchanges_after(*[0.25] * 11) == [11]  # and the one before


def test_a_rank_that_steps_slower_than_that_exchanges_after_every_step(
    loop: Loop,
) -> None:
    assert loop.exchanges_after(*[3.5] * 4) == [1, 2, 3, 4]


def test_who_could_not_meet_or_was_away_stays_in_time_with_the_others(
    loop: Loop,
) -> None:
    loop.membership.failing = 1
    assert loop.exchanges_after(*[0.5] * 6) == [6]  # at 3 s, fails at 4 s
    assert loop.state.failed == 1
    assert loop.exchanges_after(*[0.5] * 4) == [4]  # the others met at 3 s, and at 6 s
    assert loop.exchanges_after(*[0.5] * 6) == [6]


def meeting(**ranks: tuple[int, float]) -> Meeting:
    """Return a meeting of ranks that have seen so many exchanges, of such weights."""
    said = []
    for name, (exchanges, weight) in ranks.items():
        history = tuple(range(1, exchanges + 1))
        says = Says(weight=weight)
        one = Present(name, "", b"8 bytes.", exchanges, 0, history, 0, False, says)
        said.append(one.to_bytes())
    return meet(said)


def weights(found: Meeting) -> list[float]:
    said = [said_of(member, found) for member in found.members]
    return [one.weight * one.finite for one in said]


def test_who_is_behind_moves_the_others_by_no_more_steps_than_the_heaviest_made() -> (
    None
):
    assert weights(meeting(a=(5, 8), b=(5, 8), c=(2, 64))) == [8, 8, 1]
    assert weights(meeting(a=(5, 8), b=(5, 32), c=(2, 64))) == [8, 32, 16]
    assert weights(meeting(a=(2, 64), b=(5, 8), c=(2, 3))) == [1, 8, 3]
    assert weights(meeting(a=(5, 8), b=(5, 64))) == [8, 64]  # in time, and faster


def test_an_optimizers_state_that_cannot_be_sent_is_left_out_of_an_offer(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = loop.optimizer.state[loop.model.weight]
    offered: list[dict[str, torch.Tensor]] = []
    seed = SimpleNamespace(offer=lambda *given: offered.append(given[2]), close=int)
    monkeypatch.setattr(loop.state, "_seed", seed)
    joins = SimpleNamespace(exchanges=-1, wants=True)
    meeting: Any = SimpleNamespace(behind=[0], present=[joins], entry=1)
    for what in (torch.ones(1), lambda: 0):
        held["kept"] = what
        loop.state._offer(meeting)
    assert "optimizers" in offered[0]
    assert "optimizers" not in offered[1]
    assert offered[0].keys() - offered[1].keys() == {"optimizers"}


def test_who_is_behind_keeps_its_weight_where_the_others_made_no_step() -> None:
    assert weights(meeting(a=(5, 0), b=(2, 64))) == [0, 64]
    assert weights(meeting(a=(5, 0), b=(5, 8), c=(2, 64))) == [0, 8, 1]


def test_where_nobody_made_a_step_all_count() -> None:
    found = meeting(a=(5, 0), b=(5, 0))
    assert all(said_of(member, found).finite for member in found.members)


def test_who_lacks_the_model_and_is_alone_at_the_end_says_so(loop: Loop) -> None:
    loop.state.sync()
    loop.state._lacks = True  # it was behind, and could not fetch
    with pytest.raises(ExchangeError, match="have left before this one could fetch it"):
        loop.state.sync()


def test_who_ends_waits_for_those_that_fetch_its_model(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(loop.state._seed, "wait", lambda: waits.append(1))
    loop.state.sync()
    assert waits == [1]
    loop.state.close()
    assert waits == [1, 1]
