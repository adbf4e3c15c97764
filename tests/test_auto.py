"""Every rank chooses alike, nothing is lost when a choice changes, none is silly."""

import logging
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lc3
from lc3.codec import cpu
from lc3.config import Settings
from lc3.engines.auto import TRIAL_STEPS, AutoEngine, Choices
from lc3.engines.costs import Costs, measure
from lc3.engines.engine import Engine
from lc3.hooks import ddp, local_sgd, push_pull
from lc3.meter import Meter
from lc3.plan import make_plan
from lc3.transport.protocol import Transport
from lc3.wire.coder import Coder
from tests.ranks import Ranks
from tests.test_engine import SHAPES, SMALL, in_threads, random_gradients

Pools = Callable[[int], Ranks]


def costs(bit_s: float, round_s: float = 1e-4) -> Costs:
    """Of a link, with a codec of 2 GB/s."""
    byte = 8 / bit_s
    return Costs(2e-9, 5e-10, round_s, byte, 2 * round_s, byte)


@pytest.mark.parametrize(
    ("bit_s", "elements", "wire"),
    [
        (1e7, 1_000_000, "3lc"),
        (1e9, 1_000_000, "3lc"),
        (2e10, 1_000_000, "bfloat16"),
        (2e10, 100_000, "float32"),
        (1e12, 1_000_000, "float32"),
        (1e7, 1000, "3lc"),
    ],
)
def test_the_form_that_should_arrive_first_is_chosen(
    bit_s: float, elements: int, wire: str, caplog: pytest.LogCaptureFixture
) -> None:
    auto = Choices(costs(bit_s), 4, direct=False)
    with caplog.at_level(logging.INFO, logger="lc3.engines.auto"):
        for _ in range(3):
            assert auto.wire(("a",), elements) == wire
    (said,) = caplog.records
    assert f"{bit_s / 1e6:.0f} Mbit/s" in said.getMessage()
    assert ("will not help here" in said.getMessage()) == (wire != "3lc")


def test_two_ranks_are_predicted_one_round_and_as_many_bytes() -> None:
    """Both without owners and with them; one encodes for everybody, and once."""
    elements, priced = 1000, Costs(3e-3, 5e-3, 7.0, 0.0, 1e3, 0.0)
    owners = priced.predict(elements, 2, direct=False)["3lc"]
    assert owners == pytest.approx(2 * 7 + 1.5 * 3 + 2 * 5)
    assert priced.predict(elements, 2, direct=True)["3lc"] == pytest.approx(7 + 3 + 10)
    link = Costs(0.0, 0.0, 0.0, 1.0, 1e3, 0.0)
    sent = [link.predict(elements, 2, direct)["3lc"] for direct in (False, True)]
    assert sent[0] == sent[1] > 0
    assert link.predict(elements, 4, True)["3lc"] == pytest.approx(
        2 * link.predict(elements, 4, False)["3lc"]
    )


def test_measuring_gives_every_rank_the_same() -> None:
    def job(rank: int, transport: Transport) -> Costs:
        class Late:
            """Sleeps now and then, on every rank at other times."""

            chance = random.Random(rank)

            def __getattr__(self, name: str) -> Any:
                if self.chance.random() < 0.3:
                    time.sleep(0.002)
                return getattr(transport, name)

        return measure(Late(), cpu, Settings(), 1)

    first, *others = in_threads(3, job)
    assert isinstance(first, Costs)
    assert all(other == first for other in others)
    assert min(first.encode, first.decode, first.round, first.reduce) > 0


@pytest.mark.parametrize("overflow", [False, True])
def test_what_is_owed_comes_along_when_the_choice_changes(overflow: bool) -> None:
    """12 steps with 3LC, then it is found slow: the means are the gradients' in sum."""
    steps = TRIAL_STEPS + 4
    nobody = Costs(1e-12, 1e-12, 1e-9, 1e-12, 4e-9, 0)  # 3LC cannot be so fast

    def gradients(rank: int, step: int) -> dict[str, torch.Tensor]:
        some = random_gradients(rank, step)
        if overflow and step == TRIAL_STEPS and rank == 1:
            some["c"][7] = torch.inf
        return some

    def job(rank: int, transport: Transport) -> Any:
        plan = make_plan(SHAPES, transport.world, SMALL)
        inner = Engine(plan, SMALL, transport, Coder(cpu), Meter())
        engine = AutoEngine(inner, nobody)
        sums = {name: torch.zeros(n).double() for name, n in plan.numel.items()}
        for step in range(steps):
            grads = gradients(rank, step)
            coded = engine.choices.wire(tuple(grads), 1) == "3lc"
            assert coded == (step < TRIAL_STEPS)
            engine.all_reduce(grads, step, 0)
            for name, grad in grads.items():
                if grad.isfinite().all():
                    sums[name] += grad
        assert not engine.owing
        assert not any(buffer.any() for buffer in engine.residuals.buffers())
        return sums

    found = in_threads(3, job)
    assert not [error for error in found if isinstance(error, Exception)]
    for name in found[0]:
        assert all(torch.equal(found[0][name], other[name]) for other in found)
        expected = sum(
            (gradients(rank, step)[name].double() / 3)
            for step in range(steps)
            for rank in range(3)
            if not (overflow and step == TRIAL_STEPS and name == "c")
        )
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-3)


def train_auto(rank: int, world: int, seed: int) -> tuple[list[str], float]:
    """Train under mode="auto", ranks late at random; return choices and a checksum."""
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
    model = DistributedDataParallel(net, bucket_cap_mb=0.3)
    state = ddp.attach(model, config=Settings(mode="auto"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    chance = random.Random(seed * 100 + rank)
    for step in range(TRIAL_STEPS + 4):
        torch.manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0, 0.02))
        model(torch.randn(4, 300)).square().mean().backward()
        optimizer.step()
    state.check_replicas()
    assert isinstance(state.engine, AutoEngine)
    state.close()
    total = sum(float(p.detach().double().sum()) for p in net.parameters())
    return list(state.engine.choices.chosen.values()), total


@pytest.mark.parametrize("seed", range(3))
def test_ranks_choose_alike_under_noise(ranks: Pools, seed: int) -> None:
    first, *others = ranks(3).run(train_auto, seed)
    assert len(first[0]) >= 3
    assert all(other == first for other in others)


def refused(rank: int, world: int, hook: str) -> str:
    net = nn.Linear(40, 40)
    config = Settings(mode="auto")
    try:
        if hook == "push_pull":
            model = DistributedDataParallel(net)
            push_pull.attach(model, torch.optim.SGD, config)
        else:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            local_sgd.attach(net, optimizer, config)
    except lc3.ConfigError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("hook", ["push_pull", "local_sgd"])
def test_hooks_that_always_code_refuse_it(ranks: Pools, hook: str) -> None:
    for said in ranks(2).run(refused, hook):
        assert f"hooks.{hook} always sends 3LC" in said
    with pytest.raises(lc3.ConfigError, match="mode='fast' must be one of"):
        Settings(mode="fast")  # type: ignore[arg-type]


NEVER_CODED = Costs(1.0, 1.0, 1.0, 1.0, 1e-3, 0.0)
FOUND_SLOW = Costs(1e-12, 1e-12, 1e-9, 1e-12, 1e-6, 0)  # 3LC cannot be so fast


def train_beside_ddp(rank: int, world: int, costs: Costs, halves: bool) -> list[Any]:
    """Return by step: jobs on the lane, distance to plain DDP's gradients, bytes."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(100, 100) for _ in range(4)))
        net.to(torch.bfloat16 if halves else torch.float32)
        models.append(DistributedDataParallel(net, bucket_cap_mb=0.05))
    state = ddp.attach(models[0], config=Settings(mode="auto", min_numel=1))
    assert isinstance(state.engine, AutoEngine)
    state.engine.choices.costs = costs
    lane, submit = 0, state.session.lane.submit

    def counted(job: Callable[[], torch.Tensor]) -> torch.futures.Future[torch.Tensor]:
        nonlocal lane
        lane += 1
        return submit(job)

    state.session.lane.submit = counted  # type: ignore[method-assign]
    found = []
    for step in range(TRIAL_STEPS + 5):
        torch.manual_seed(1000 * step + rank)
        inputs = torch.randn(4, 100).to(torch.bfloat16 if halves else torch.float32)
        lane, sent = 0, state.meter.sent_bytes
        for model in models:
            model.zero_grad()
            model(inputs).square().mean().backward()
        ours, theirs = ([p.grad for p in model.parameters()] for model in models)
        apart = max(
            float((a - b).abs().max())
            for a, b in zip(ours, theirs, strict=True)
            if a is not None and b is not None
        )
        found.append((lane, apart, state.meter.sent_bytes - sent))
        assert state.meter.steps == step + 1
    state.check_replicas()
    state.close()
    return found


@pytest.mark.parametrize("halves", [False, True])
def test_uncoded_buckets_are_ddps_own(ranks: Pools, halves: bool) -> None:
    """Bit for bit, without the lane, and counted as what they send."""
    size = 2 if halves else 4
    for found in ranks(2).run(train_beside_ddp, NEVER_CODED, halves):
        assert found == [(0, 0.0, size * 4 * 10_100)] * len(found)


def test_a_bucket_found_slow_brings_its_residuals_and_leaves_the_lane(
    ranks: Pools,
) -> None:
    for found in ranks(2).run(train_beside_ddp, FOUND_SLOW, False):
        changes = TRIAL_STEPS + 1  # DDP makes other buckets after the first step
        with_3lc, (lane, _, sent), after = (
            found[:changes],
            found[changes],
            found[changes + 1 :],
        )
        assert all(lane >= 1 and apart > 0 for lane, apart, _ in with_3lc)
        assert lane >= 1
        assert sent == 4 * 4 * 10_100
        assert after == [(0, 0.0, sent)] * len(after)
