"""Local steps equal 3LC servers bit for bit, hide their exchange, and resume."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lc3 import AttachError, knobs
from lc3.config import Settings
from lc3.hooks import local_sgd
from tests import local_cases
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]
CASES = [
    (1, 0, "sgd", False),
    (4, 0, "sgd", True),
    (4, 0, "adamw", False),
    (4, 1, "sgd", False),
    (4, 3, "adamw", True),
]


@pytest.mark.parametrize(
    ("world", "every", "delay", "kind", "channels_last"),
    [
        *((world, *case) for world in (2, 3) for case in CASES),
        (4, 4, 0, "adamw", False),
        (4, 4, 3, "sgd", False),
    ],
)
def test_local_steps_equal_the_servers(
    ranks: Pools, world: int, every: int, delay: int, kind: str, channels_last: bool
) -> None:
    reports = ranks(world).run(
        local_cases.equals_the_servers, every, delay, kind, channels_last
    )
    assert len({report["hash"] for report in reports}) == 1
    for report in reports:
        assert report["exchanges"] == (4 * every + delay + 1) // every + 1
        assert report["ratio"] > 2 * every


@pytest.mark.parametrize(("fragments", "overlap"), [(1, 0), (1, 2), (2, 0)])
def test_one_process_makes_outer_steps_when_it_is_asked(
    fragments: int, overlap: int
) -> None:
    """They are those of torch's SGD with Nesterov momentum, and survive a resume."""
    nets = [local_cases.make_net(0) for _ in range(2)]
    inner = [local_cases.make_optimizer(net, "adamw") for net in nets]
    given: dict[str, Any] = {"outer_lr": 0.7, "outer_momentum": 0.6}
    given |= {"sync_every": 4, "fragments": fragments, "overlap": overlap}
    state = local_sgd.attach(nets[0], inner[0], **given)
    assert state.knobs.inner_momentum_scale == state.knobs.residual_decay == 1
    mine = list(nets[1].parameters())
    shared = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    groups = [range(4), range(4, 6)] if fragments == 2 else [range(6)]
    outer = [
        torch.optim.SGD([shared[i] for i in some], 0.7, momentum=0.6, nesterov=True)
        for some in groups
    ]
    then: dict[int, Tensor] = {}
    for step in range(1, 18):
        for net, optimizer in zip(nets, inner, strict=True):
            local_cases.train_step(net, optimizer, 0, step)
        with torch.no_grad():
            for index in list(then) if overlap and step % 4 == overlap else ():
                mine[index].add_(shared[index] - then.pop(index))
            for some, optimizer in zip(groups, outer, strict=True):
                due = 4 if some[-1] == 5 else 2
                if step % 4 != due % 4:
                    continue
                for index in some:
                    shared[index].grad = shared[index] - mine[index]
                    then[index] = mine[index].detach().clone()
                optimizer.step()
                for index in some if not overlap else ():
                    mine[index].copy_(shared[index])
        if step == 10 and not overlap:
            state.close()
            kept = state.state_dict()
            state = local_sgd.attach(nets[0], inner[0], **given)
            state.load_state_dict(kept)
        for one, other in zip(nets[0].parameters(), mine, strict=True):
            assert torch.equal(one, other), step
    with state.shared_model():
        for index, one in enumerate(nets[0].parameters()):
            assert torch.equal(one, shared[index])
    state.sync()
    assert state.meter.sent_bytes == 0
    assert state.exchanges == 4 * fragments + 1
    state.close()


@pytest.mark.parametrize("world", [2, 3])
def test_residuals_decay_as_the_servers_do(ranks: Pools, world: int) -> None:
    case = (4, 3, "adamw", True, 0.7)
    reports = ranks(world).run(local_cases.equals_the_servers, *case)
    assert len({report["hash"] for report in reports}) == 1


@pytest.mark.parametrize(
    ("world", "every", "delay", "groups", "alpha"),
    [
        (2, 4, 0, [["conv", "norm"], ["head"]], None),
        (3, 4, 0, [["conv"], ["norm"], ["head"]], None),
        (2, 4, 3, [["conv"], ["norm"], ["head"]], None),  # several at once
        (3, 5, 2, [["conv", "norm"], ["head"]], 0.25),
        (2, 4, 1, [["conv", "norm", "head"]], 0.5),
    ],
)
def test_fragments_equal_servers_of_their_own(
    ranks: Pools,
    world: int,
    every: int,
    delay: int,
    groups: list[list[str]],
    alpha: float | None,
) -> None:
    case = (every, delay, "adamw", False, 0.7, True, groups, alpha)
    reports = ranks(world).run(local_cases.equals_the_servers, *case)
    assert len({report["hash"] for report in reports}) == 1


def test_a_state_in_host_memory_equals_the_servers(ranks: Pools) -> None:
    case = (4, 1, "adamw", False, 0.7, True, [["conv", "norm", "head"]], None, "cpu")
    reports = ranks(2).run(local_cases.equals_the_servers, *case)
    assert len({report["hash"] for report in reports}) == 1


@pytest.mark.parametrize(("delay", "kind"), [(0, "adamw"), (3, "adamw"), (0, "sgd")])
def test_first_moments_decay_after_an_exchange(
    ranks: Pools, delay: int, kind: str
) -> None:
    case = (4, delay, kind, False, 1.0, True)
    reports = ranks(3).run(local_cases.equals_the_servers, *case)
    assert len({report["hash"] for report in reports}) == 1


def test_first_moments_of_every_optimizer_decay(ranks: Pools) -> None:
    kept, halved = (
        ranks(2).run(local_cases.moments_of_two_optimizers, decay)
        for decay in (1.0, 0.5)
    )
    for before, after in zip(kept, halved, strict=True):
        assert len(before) == 6
        for whole, half in zip(before, after, strict=True):
            assert whole.abs().max() > 0
            assert torch.equal(half, whole / 2)


ADAM, NEUTRAL = (2.0, 0.8, 0.5), (1.0, 1.0, 1.0)


def test_a_knob_that_is_given_changes_that_one_only(ranks: Pools) -> None:
    for found in ranks(2).run(local_cases.chooses):
        assert found == [
            ADAM,
            (2.0, 0.8, 0.4),
            (1.0, 0.8, 0.5),  # as far in the long run
            *(ADAM, ADAM),
            (1.5, 0.8, 0.5),
            (1.5, 0.9, 0.8),  # by one hop, as where no configuration is given
            (2.0, 0.9, 0.5),
            NEUTRAL,
        ]


@pytest.mark.parametrize(
    ("kinds", "density", "chosen"),
    [
        (["AdamW"], 0.1, ADAM),
        (["Adam", "AdamW"], 0.3, ADAM),
        (["AdamW"], 0.31, NEUTRAL),
        (["AdamW"], None, NEUTRAL),
        (["AdamW", "SGD"], 0.1, NEUTRAL),
        (["Muon", "AdamW"], 0.1, NEUTRAL),
        ([], 0.1, NEUTRAL),
        (["SGD"], 0.1, NEUTRAL),
        (["AdamW", "direct"], 0.1, (1.5, 0.9, 0.8)),
        (["SGD", "direct"], 0.1, (1.25, 1.0, 1.0)),
        (["SGD", "momentum", "direct"], 0.1, NEUTRAL),
    ],
)
def test_what_is_chosen(
    kinds: list[str],
    density: float | None,
    chosen: tuple[float, ...],
) -> None:
    given = {"momentum": 0.9} if "momentum" in kinds else {}
    optimizers = [
        getattr(torch.optim, kind)(
            [torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, **given
        )
        for kind in kinds
        if kind not in ("momentum", "direct")
    ]
    topology: Any = "direct" if "direct" in kinds else "owners"
    config = Settings(density=density, topology=topology)
    found, why = knobs.chosen_for(optimizers, config)
    assert tuple(found.values()) == chosen
    assert ("plain" in why) == (chosen == NEUTRAL)


@pytest.mark.parametrize(
    ("topology", "chosen"), [("owners", (2.0, 0.8, 0.5)), ("direct", (1.5, 0.9, 0.8))]
)
def test_what_is_chosen_with_fragments(topology: Any, chosen: Any) -> None:
    adam = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, 2))])]
    config = Settings(density=0.1, topology=topology)
    given = {"fragments": 4, "sync_every": 8}
    found, why = knobs.knobs_for(adam, config, given)
    decays = found.residual_decay, found.inner_momentum_scale
    assert (found.outer_lr, *decays) == chosen
    assert why.endswith("AdamW, density 0.1")
    found, _ = knobs.knobs_for(adam, config, given, knobs.PRESETS["muon"])
    assert found.outer_lr == 2.0
    sgd = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1)]
    found, _ = knobs.knobs_for(sgd, config, given)
    assert found.outer_lr == 1.0


def test_a_rank_without_data_has_no_first_moment(ranks: Pools) -> None:
    assert len(set(ranks(2).run(local_cases.decays_without_data))) == 1


def test_inner_momentum_scale_needs_a_first_moment(ranks: Pools) -> None:
    for said in ranks(2).run(local_cases.no_first_moment):
        assert said == (
            "inner_momentum_scale=0.5 has nothing to multiply: the optimizer's state "
            "has no exp_avg and no momentum_buffer; leave it 1"
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapped_module_makes_local_steps(ranks: Pools, compiled: bool) -> None:
    results = ranks(2).run(local_cases.wrapped, compiled)
    for plain, wrapped, shared, shared_again in results:
        assert wrapped == plain == results[0][0]
        assert not shared
        assert shared_again


def test_one_rank_saves_and_all_load(ranks: Pools) -> None:
    assert all(ranks(2).run(local_cases.gathers))


@pytest.mark.parametrize("delay", [0, 3])
def test_ranks_share_a_model_between_exchanges(ranks: Pools, delay: int) -> None:
    results = ranks(2).run(local_cases.shared_model, delay)
    assert results[0] == results[1]
    assert results[0][1]


def test_uncoded_averaging_of_every_step_is_ddp(ranks: Pools) -> None:
    for distance in ranks(2).run(local_cases.plain_averaging_is_ddp):
        assert distance < 1e-6


@pytest.mark.parametrize(("budget", "at"), [(None, 12), (500, 12), (None, 13)])
def test_it_resumes_bit_for_bit(
    ranks: Pools, tmp_path: Path, budget: int | None, at: int
) -> None:
    path = str(tmp_path / "state")
    assert all(ranks(2).run(local_cases.resumes, path, budget, at))


def test_a_delay_hides_a_slow_exchange(ranks: Pools) -> None:
    """On a busy machine ranks wait for each other too, so one good run is enough."""
    tries = []
    for _ in range(4):
        results = ranks(2).run(local_cases.a_delay_hides_a_slow_exchange)
        assert all(waited > 0.15 for waited, _ in results)  # 0.5 s of 2 s
        tries.append(max(hidden for _, hidden in results))
        if tries[-1] <= 0.02:
            return
    raise AssertionError(f"exposed waits over compute: {tries}")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ddp", "AttachError: the model already has .* allreduce_hook; DDP takes"),
        ("no optimizer", "AttachError: no optimizer was given"),
        ("sync_every", "ConfigError: sync_every=0 must be an integer of at least 1"),
        ("overlap", "ConfigError: overlap=4 must be less than sync_every=4"),
        ("outer_lr", r"ConfigError: outer_lr=3\.0 must be a number in \(0, 2\]"),
        ("a word", r"ConfigError: outer_lr='2' must be a number in \(0, 2\]"),
        ("residual_decay", r"ConfigError: residual_decay=3\.0 must be .* in \[0, 1\]"),
        ("inner_momentum_scale", r"ConfigError: inner_momentum_scale=3\.0 must be a"),
        ("strides", r"AttachError: a parameter of shape \[10, 300\] has strides"),
        ("state_device", "ConfigError: state_device='cuda' must be 'cpu', or None"),
        ("alpha", r"ConfigError: alpha=0\.5 weighs .*; give an overlap"),
        ("fragments", "ConfigError: fragments=4 is more than the 3 layers of the"),
        ("too many fragments", "ConfigError: fragments=9 must be at most sync_every=8"),
        ("manual fragments", "ConfigError: fragments=2 take turns within sync_every"),
        ("differ", r"PlanMismatch: ranks differ: Config\.density is 0\.1 on rank 0"),
        (
            "every differs",
            r"PlanMismatch: ranks differ: sync_every is 4 on rank 0 and 8 on",
        ),
    ],
)
def test_attach_refuses(ranks: Pools, what: str, words: str) -> None:
    for said in ranks(2).run(local_cases.refused, what):
        assert re.match(words, said), said


def test_a_rank_that_diverges_is_brought_back(ranks: Pools) -> None:
    results = ranks(2).run(local_cases.non_finite_rank)
    assert results[0] == results[1]
    assert results[0][1]


def test_moves_smaller_than_a_parameters_last_bit_add_up(ranks: Pools) -> None:
    moved = 1 + 24 * 2.0**-7 / 4
    for shared, held in ranks(4).run(local_cases.small_moves_of_one):
        assert shared == pytest.approx(moved, abs=1e-6)
        assert held == pytest.approx(moved, abs=2.0**-8)


def test_statistics_that_nobody_has_finite_recover_with_the_exchange(
    ranks: Pools,
) -> None:
    for finite in ranks(2).run(local_cases.statistics_recover):
        assert finite == [True, True, False, True, True, True]


def test_a_state_that_was_not_closed_leaves_other_models_alone() -> None:
    old = torch.nn.Linear(4, 4)
    old.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    state = local_sgd.attach(old, optimizer, outer_lr=1.0)
    old.bias.requires_grad_(True)  # what that training ended with
    new = torch.nn.Linear(2, 2)
    another = torch.optim.SGD(new.parameters(), lr=0.1)
    new(torch.ones(1, 2)).sum().backward()
    another.step()
    old(torch.ones(1, 4)).sum().backward()
    with pytest.raises(AttachError, match="'bias' can be trained since attach"):
        torch.optim.SGD(old.parameters(), lr=0.1).step()
    state.close()
