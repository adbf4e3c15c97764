"""When ranks that come and go exchange, on a clock of the tests; how they count."""

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lc3.config import Settings
from lc3.errors import AttachError, ConfigError, DivergedError, ExchangeError
from lc3.hooks import come_and_go
from lc3.hooks.come_and_go import Quorum, said_of
from lc3.knobs import knobs_for
from lc3.local.meeting import Meeting, Present, meet
from lc3.local.says import Says
from lc3.local.seed import Seed, fetch

T_S = 3.0
Boxes = defaultdict[tuple[int, int, int], "queue.Queue[Tensor]"]


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


class Group:
    """What connects the ranks of one quorum: queues between threads."""

    def __init__(self, boxes: Boxes, me: int) -> None:
        self.boxes, self.me = boxes, me

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> Any:
        self.boxes[self.me, dst_rank, tag].put(tensors[0].clone())
        return SimpleNamespace(wait=lambda: None)

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> Any:
        def wait() -> None:
            data = self.boxes[src_rank, self.me, tag].get(timeout=20)
            tensors[0][: data.numel()] = data

        return SimpleNamespace(wait=wait)


class World:
    """Brings together those that a test says."""

    def __init__(self) -> None:
        self.met, self.here, self.number = threading.Condition(), set[str](), 0
        self.expected: set[str] = set()
        self.quorums: dict[str, Quorum] = {}

    def meet(self, name: str) -> Quorum:
        with self.met:
            self.here.add(name)
            if self.here == self.expected:
                self.number += 1
                boxes: Boxes = defaultdict(queue.Queue)
                for rank, one in enumerate(sorted(self.here)):
                    group, world = Group(boxes, rank), len(self.here)
                    self.quorums[one] = Quorum(group, rank, world, self.number)
                self.here = set()
                self.met.notify_all()
            assert self.met.wait_for(lambda: name in self.quorums, 20)
            return self.quorums.pop(name)

    def run(self, **jobs: Callable[[], Any]) -> dict[str, Any]:
        """Run a job of each of some ranks, all in one meeting."""
        self.expected = set(jobs)
        found: dict[str, Any] = {}

        def work(name: str, job: Callable[[], Any]) -> None:
            try:
                found[name] = job()
            except Exception as error:  # noqa: BLE001  # it is the result
                found[name] = error

        threads = [threading.Thread(target=work, args=both) for both in jobs.items()]
        for one in threads:
            one.start()
        for one in threads:
            one.join(40)
            assert not one.is_alive()
        return found


UNCODED = Settings(min_ndim=0, min_numel=10**9, topology="direct")


class Rank:
    """A rank with the real state, and a membership of a ``World``."""

    def __init__(
        self,
        world: World,
        name: str,
        model: torch.nn.Module | None = None,
        settings: Settings = UNCODED,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        wants: bool = False,
        **knobs: Any,
    ) -> None:
        self.world, self.name, self.blind = world, name, 0
        self.model = torch.nn.Linear(4, 4) if model is None else model
        kind: Any = optimizer
        self.optimizer = kind(self.model.parameters(), lr=1.0)
        given = {"sync_every": None, "outer_lr": 1.0, **knobs}
        choose = partial(knobs_for, settings=settings, given=given)
        self.state = come_and_go.State(
            self.model, [self.optimizer], settings, choose, self, wants=wants
        )
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(1.0)

    def meet(self) -> Quorum:
        return self.world.meet(self.name)

    def commit(self, error: Exception | None) -> bool:
        self.blind -= 1
        return error is None and self.blind < 0

    def join(self) -> None:
        self.state.join("127.0.0.1", "127.0.0.1", 3.0)

    def walk(self, by: float) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, -by)
        self.optimizer.step()

    def exchange(self) -> None:
        self.state.exchange(weight=1)

    @property
    def shared(self) -> float:
        """An element of what all ranks hold, less what it was at first."""
        return float(self.state.owners.replica["weight"][0]) - 1


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[Rank]]]:
    made: list[Rank] = []

    def make(names: str, world: World | None = None, **given: Any) -> list[Rank]:
        world = world or World()
        new = [Rank(world, name, **given) for name in names]
        made.extend(new)
        world.run(**{one.name: one.join for one in new})
        return new

    yield make
    for one in made:
        one.state.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moves_smaller_than_a_parameters_last_bit_add_up(
    dtype: torch.dtype,
) -> None:
    world = World()
    some = [
        Rank(world, name, torch.nn.Linear(4, 4).to(dtype)) for name in ("a", "b", "c")
    ]
    world.run(**{one.name: one.join for one in some})
    for _ in range(24):  # a third of a bit of bfloat16 each time
        some[0].walk(2.0**-7)
        world.run(**{one.name: one.exchange for one in some})
    assert some[0].shared == pytest.approx(24 / 3 * 2.0**-7, rel=1e-3)
    for one in some:
        one.state.close()


def test_ranks_whose_moves_are_all_nan_take_the_model_back(
    ranks: Callable[..., list[Rank]],
) -> None:
    a, b = ranks("ab")
    a.walk(torch.nan)
    b.walk(torch.nan)
    a.world.run(a=a.exchange, b=b.exchange)
    assert a.state.left_out == b.state.left_out == 1
    assert all(p.eq(1).all() for p in [*a.model.parameters(), *b.model.parameters()])
    for _ in range(9):
        a.walk(torch.nan)
        b.walk(torch.nan)
        found = a.world.run(a=a.exchange, b=b.exchange)
    assert isinstance(found["a"], DivergedError)
    assert isinstance(found["b"], DivergedError)


def test_who_joins_a_rank_whose_moves_are_nan_gets_the_model(
    ranks: Callable[..., list[Rank]],
) -> None:
    (a,) = ranks("a")
    a.walk(2.0)
    a.world.run(a=a.exchange)
    a.walk(torch.nan)
    b = Rank(a.world, "b")
    assert a.world.run(a=a.exchange, b=b.join) == {"a": None, "b": None}
    assert all(p.eq(3).all() for p in [*a.model.parameters(), *b.model.parameters()])
    b.state.close()


def test_who_joins_leaves_the_others_statistics_alone() -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    world = World()
    a, b = (Rank(world, name, model()) for name in "ab")
    world.run(a=a.join)
    means = [dict(one.model.named_buffers())["1.running_mean"] for one in (a, b)]
    means[0].fill_(10.0)
    a.walk(0.5)
    world.run(a=a.state.sync, b=b.join)
    assert means[0].eq(10).all()
    assert means[1].eq(10).all()
    a.state.close()
    b.state.close()


def test_ranks_that_average_statistics_at_other_times_give_those_they_have() -> None:
    world = World()
    a, b = (
        Rank(world, name, torch.nn.Sequential(torch.nn.BatchNorm1d(4))) for name in "ab"
    )
    world.run(a=a.join, b=b.join)
    means = [dict(one.model.named_buffers())["0.running_mean"] for one in (a, b)]
    for mean in means:
        mean.fill_(1.0)
    world.run(a=a.state.sync, b=b.state.sync)
    means[0].fill_(12.0)
    means[1].fill_(10.0)
    world.run(a=a.state.sync, b=b.exchange)
    assert all(mean.eq(11).all() for mean in means)
    means[0].fill_(12.0)
    means[1].fill_(torch.nan)
    world.run(a=a.state.sync, b=b.exchange)
    assert means[0].eq(12).all()
    a.state.close()
    b.state.close()


def test_who_cannot_fetch_what_the_others_did_not_count_owes_its_moves(
    ranks: Callable[..., list[Rank]],
) -> None:
    a, b = ranks("ab")
    a.world.run(a=a.exchange)  # b is away
    b.walk(6.0)
    a.blind = 1
    a.world.run(a=a.exchange, b=b.exchange)
    assert not a.state.committed
    for _ in range(3):
        a.world.run(a=a.exchange, b=b.exchange)
    assert (a.shared, b.shared) == (3.0, 3.0)


def test_others_weigh_all_where_a_heavy_rank_cannot_be_read(
    ranks: Callable[..., list[Rank]],
) -> None:
    a, b, c = ranks("abc")
    go_over_to = c.state.session.go_over_to

    def damage(*given: Any) -> None:
        go_over_to(*given)
        messages: Any = c.state.session.engine.messages
        make = messages.make

        def made(*given: Any) -> list[Tensor]:
            sent: list[Tensor] = make(*given)
            for one in sent:
                one[-1] ^= 1
            return sent

        messages.make = made

    session: Any = c.state.session
    session.go_over_to = damage
    c.state._connected = None
    for one in (a, b, c):
        one.walk(1.0)
    heavy = partial(c.state.exchange, weight=98)
    a.world.run(a=a.exchange, b=b.exchange, c=heavy)
    assert a.state.committed
    assert not c.state.committed
    assert a.shared == b.shared == pytest.approx(1.0)


@pytest.mark.parametrize("away", [come_and_go.KEPT - 4, come_and_go.KEPT + 4])
def test_what_nobody_knows_to_have_counted_is_not_sent_again(
    ranks: Callable[..., list[Rank]], away: int
) -> None:
    a, b = ranks("ab")
    b.blind = 1  # it does not see the end of the next exchange
    b.walk(2.0)
    a.world.run(a=a.exchange, b=b.exchange)
    assert (a.shared, b.state.committed) == (1.0, False)
    for _ in range(away):
        a.world.run(a=a.exchange)
    a.world.run(a=a.exchange, b=b.exchange)
    assert (a.shared, b.shared) == (1.0, 1.0)


def test_who_is_alone_owes_what_it_owed() -> None:
    settings = Settings(density=0.1, min_ndim=0, min_numel=1, topology="direct")
    model = partial(torch.nn.Linear, 16, 16)
    world = World()
    a, b = (Rank(world, n, model(), settings, residual_decay=0.5) for n in "ab")
    world.run(a=a.join, b=b.join)
    with torch.no_grad():
        a.model.weight.add_(torch.randn(16, 16))  # type: ignore[operator]
    world.run(a=a.exchange, b=b.exchange)
    owed = a.state._residuals.sent["weight"].clone()
    assert owed.any()
    for _ in range(3):
        world.run(a=a.exchange)
    assert torch.equal(a.state._residuals.sent["weight"], owed)
    a.state.close()
    b.state.close()


@pytest.mark.parametrize("tokens", [torch.nan, -5, torch.inf, "many", 1e300])
def test_tokens_that_are_no_weight_are_refused(loop: Loop, tokens: Any) -> None:
    loop.state.tokens = tokens
    with pytest.raises(ConfigError, match="tokens="):
        loop.exchanges_after(*[1.0] * 4)


def test_an_address_of_another_machine_is_refused() -> None:
    one = Rank(World(), "a")
    with pytest.raises(AttachError, match=r"bind='192\.0\.2\.1'"):
        one.state.join("127.0.0.1", "192.0.2.1", 5.0)
    one.state.close()


def test_an_optimizer_of_another_kind_is_not_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    a = Rank(world, "a", optimizer=torch.optim.Adam)
    b = Rank(world, "b", wants=True)
    c = Rank(world, "c", optimizer=torch.optim.Adam, wants=True)
    world.run(a=a.join)
    a.walk(0.5)
    assert world.run(a=a.exchange, b=b.join, c=c.join)["b"] is None
    assert "'Adam'" in caplog.text
    assert "begins with its own" in caplog.text
    b.walk(0.5)
    assert not any(b.optimizer.state[p] for p in b.model.parameters())
    assert len(c.optimizer.state) == 2
    for one in (a, b, c):
        one.state.close()


def test_who_joins_gets_an_expanded_buffer() -> None:
    def model(value: float) -> torch.nn.Module:
        made = torch.nn.Linear(4, 4)
        made.register_buffer("one", torch.full((1,), value).expand(7))
        return made

    world = World()
    a, b = Rank(world, "a", model(3.0)), Rank(world, "b", model(4.0))
    world.run(a=a.join)
    assert world.run(a=a.exchange, b=b.join)["b"] is None
    assert dict(b.model.named_buffers())["one"].tolist() == [3.0] * 7
    a.state.close()
    b.state.close()


def test_first_ranks_whose_model_cannot_be_fetched_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def fails_once(*given: Any) -> Any:
        tried.append(given)
        if len(tried) == 1:
            raise ExchangeError("it cannot be reached")
        return fetch(*given)

    monkeypatch.setattr(come_and_go, "fetch", fails_once)
    world = World()
    a, b = Rank(world, "a"), Rank(world, "b")
    with torch.no_grad():
        b.model.weight.fill_(2.0)  # type: ignore[operator]
    world.run(a=lambda: meets(a), b=lambda: meets(b))
    assert (b.state._joined, b.state._open_at) == (False, {})
    world.run(a=a.exchange, b=b.exchange)
    assert b.shared == a.shared == 0.0
    assert b.model.weight.eq(1).all()  # type: ignore[operator]
    a.state.close()
    b.state.close()


def meets(rank: Rank) -> None:
    """Let a rank try to join once."""
    rank.state._timeout_s = 3.0
    rank.state._seed = Seed("127.0.0.1", "127.0.0.1", 3.0, rank.state._facts)
    rank.state._start()
    rank.state._finish()
