"""What people do around training: the model in their hands is the model."""

from collections.abc import Callable

import pytest
import torch

from tests import given_cases
from tests.ranks import Ranks

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]


@pytest.mark.parametrize("how", ["copied", "assigned", "rebased"])
@pytest.mark.parametrize(
    ("world", "kind", "steps_before", "delay"),
    [(2, "adamw", 0, 0), (3, "adamw", 8, 0), (2, "sgd", 11, 0), (3, "sgd", 12, 5)],
)
def test_training_goes_on_from_weights_that_are_loaded(
    ranks: Pools, world: int, kind: str, steps_before: int, delay: int, how: str
) -> None:
    case = kind, steps_before, delay, how
    results = ranks(world).run(given_cases.weights_are_loaded, *case)
    assert len({end for _, _, end in results}) == 1
    for before, losses, _ in results:
        assert before < 0.03
        assert max(losses) < before + 0.005


@pytest.mark.parametrize("steps_before", [0, 5])
def test_memory_that_is_replaced_with_other_weights_is_seen(
    ranks: Pools, steps_before: int
) -> None:
    case = "adamw", steps_before, 0, "by data"
    for before, losses, _ in ranks(2).run(given_cases.weights_are_loaded, *case):
        assert max(losses) < before + 0.005


@pytest.mark.parametrize("steps_before", [0, 4, 6])
def test_weights_that_one_rank_loads_are_an_error_on_all(
    ranks: Pools, steps_before: int
) -> None:
    for said in ranks(2).run(given_cases.weights_are_loaded_by_one, steps_before):
        assert said.startswith("ReplicasDiffer: parameters of the ranks [1] were wri")
        assert "state.rebase()" in said


def test_clamping_is_a_part_of_the_step(ranks: Pools) -> None:
    for coded, alone, _ in ranks(2).run(given_cases.weights_are_clamped):
        assert coded < 1.15 * alone


@pytest.mark.parametrize("how", ["vector", "swap", "to"])
def test_memory_may_be_replaced(ranks: Pools, how: str) -> None:
    """With ``swap`` averaged weights come and go, as for an evaluation."""
    (plain, _), _ = ranks(2).run(given_cases.memory_is_replaced, "not at all")
    results = ranks(2).run(given_cases.memory_is_replaced, how)
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(plain, rel=1e-3)


def test_everything_is_copied_at_attach_and_compared(ranks: Pools) -> None:
    results = ranks(2).run(given_cases.all_is_copied)
    assert results[0][0] == results[1][0]
    for _, said in results:
        assert said.startswith("ReplicasDiffer: parameter 'net.0.weight' differs on")


def test_what_is_unfrozen_later_is_an_error(ranks: Pools) -> None:
    for said in ranks(2).run(given_cases.unfrozen_later):
        assert said.startswith("AttachError: parameter '0.weight' can be trained since")


@pytest.mark.parametrize(
    ("what", "steps"), [("once", 24), ("replaced", 24), ("inside", 24), ("failed", 24)]
)
def test_steps_of_every_optimizer_count(ranks: Pools, what: str, steps: int) -> None:
    results = ranks(2).run(given_cases.steps_are_counted, what)
    assert {found[:2] for found in results} == {(steps // 4 + 1, steps)}
    assert len({found[2] for found in results}) == 1


def test_what_cannot_be_attached_is_said(ranks: Pools) -> None:
    for twice, stranger, wide in ranks(2).run(given_cases.attached_wrongly):
        assert twice.startswith("AttachError: lc3 is already attached to this model")
        assert "steps no parameter of this model" in stranger
        assert wide.startswith("AttachError: parameter '0.weight' is float64")


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("kind", "delay"), [("adamw", 0), ("sgd", 0), ("adamw", 3)])
def test_a_bad_batch_stops_nobody(
    ranks: Pools, kind: str, delay: int, direct: bool
) -> None:
    results = ranks(3).run(given_cases.a_batch_is_bad, kind, delay, direct)
    assert len({end for _, end, _, _ in results}) == 1
    for rank, (loss, _, left_out, said) in enumerate(results):
        assert loss < 1.0
        assert bool(left_out) == (rank == 1)
        warned = [line for line in said if "is not finite" in line]
        assert len(warned) == left_out


def test_bad_batches_without_end_are_an_error(ranks: Pools) -> None:
    said = ranks(2).run(given_cases.every_batch_is_bad)
    assert said[1].startswith("DivergedError: after 20 steps what rank 1 has mov")
    assert said[0].startswith("PeerError: rank 1 stopped: DivergedError")


@pytest.mark.parametrize(("delay", "since"), [(0, 10), (4, 10), (4, 13), (7, 9)])
def test_a_run_is_taken_back(ranks: Pools, delay: int, since: int) -> None:
    for good, end in ranks(2).run(given_cases.taken_back, delay, since):
        assert end < 1.1 * good + 0.01


def test_one_rank_alone_hands_its_model_on(ranks: Pools) -> None:
    (saved,) = ranks(1).run(given_cases.alone)
    for before, after in ranks(2).run(given_cases.then_several, saved):
        assert after == pytest.approx(before, rel=0.05)


def test_one_rank_takes_what_two_had_not_sent(ranks: Pools) -> None:
    saved = ranks(2).run(given_cases.two_that_owe)
    for owed, apart in ranks(1).run(given_cases.then_one, saved):
        assert owed > 0.1
        assert apart < 1e-5 * owed


@pytest.mark.parametrize("delay", [0, 2])
def test_constant_buffers_stay_and_are_not_sent(ranks: Pools, delay: int) -> None:
    for changed, ratio in ranks(3).run(given_cases.buffers_stay, delay):
        assert changed == []
        assert ratio > 25  # sent at every exchange they would make it 1


@pytest.mark.parametrize("delay", [0, 1])
def test_buffers_that_change_are_averaged(ranks: Pools, delay: int) -> None:
    """Float64 in float64, and without a rank whose own are not finite."""
    for bad, expected in (
        (False, [6.0] * 3 + [1.5] * 2),
        (True, [4.0] * 3 + [1.0] * 2),
    ):
        for held in ranks(2).run(given_cases.buffers_are_averaged, delay, bad):
            assert held == expected


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("how", ["loaded", "by data"])
@pytest.mark.parametrize("steps_before", [0, 5])
def test_owners_go_on_from_weights_that_are_loaded(
    ranks: Pools, how: str, steps_before: int, bfloat16: bool
) -> None:
    case = how, steps_before, bfloat16
    results = ranks(2).run(given_cases.owners_take_over, *case)
    assert len({end for _, end, _ in results}) == 1
    for losses, _, said in results:
        assert said == "nothing"
        assert losses[0] < 0.05
        assert losses[1] < losses[0] + 0.005


def test_owners_keep_their_lead_where_weights_are_clamped_or_swapped(
    ranks: Pools,
) -> None:
    plain, swapped, clamped = (
        ranks(2).run(given_cases.owners_take_over, how, 5, False)
        for how in ("not at all", "swapped", "clamped")
    )
    assert swapped == plain
    assert len({end for _, end, _ in clamped}) == 1
    for losses, _, _ in clamped:
        assert losses[1] < losses[0]
        assert losses[2] < 0.13 < plain[0][0][2]  # masters are clamped, too


def test_weights_that_one_rank_gives_to_owners_are_an_error(ranks: Pools) -> None:
    for _, _, said in ranks(3).run(given_cases.owners_take_over, "by one", 5, False):
        assert said.startswith("ReplicasDiffer: parameters were changed outside of ste")
        assert "ranks [1] hold others" in said


def test_arguments_of_push_pull_are_compared(ranks: Pools) -> None:
    for said in ranks(2).run(given_cases.arguments_differ):
        for what, one in zip(("max_norm", "lr of group 0", "er"), said, strict=True):
            assert one.startswith("PlanMismatch: ranks differ: ")
            assert f"{what} is" in one


def test_ddp_says_what_it_does_not_exchange(ranks: Pools) -> None:
    for said, checked in ranks(2).run(given_cases.unfrozen_under_ddp):
        assert said.startswith("AttachError: parameter '0.weight' was frozen when")
        assert checked.startswith("ReplicasDiffer: parameter '0.weight' differs on")


@pytest.mark.parametrize("hook", ["ddp", "push_pull"])
def test_buffers_are_those_of_ddp_and_are_sent_if_they_change(
    ranks: Pools, hook: str
) -> None:
    plain = ranks(2).run(given_cases.ddp_sends_buffers_that_change, "none")
    coded = ranks(2).run(given_cases.ddp_sends_buffers_that_change, hook)
    for rank, (trained, evaluated, _, sent) in enumerate(coded):
        expected, at_evaluation = plain[rank][:2]
        assert torch.equal(trained["mean"], expected["mean"])
        assert torch.equal(evaluated["mean"], at_evaluation["mean"])
        assert torch.equal(evaluated["late"], at_evaluation["late"])
        for name in ("norm.running_mean", "norm.running_var"):
            # Training differs, so it is rank 0's, not that of the other run.
            assert torch.equal(evaluated[name], coded[0][0][name])
        # The mask before two passes; the mean before 21: DDP leaves the second of an
        # evaluation out; what changes late before the first two, from the tenth pass
        # on, and before the evaluation. Statistics once.
        mask, four, statistics = 256 * 256 * 4, 4 * 4, 2 * 16 * 4 + 8
        late = 2 + 11 + 1
        assert sent == (2 * mask + (21 + late) * four + statistics) // 2


def test_a_message_longer_than_any_is_refused(ranks: Pools) -> None:
    refused, sent = ranks(2).run(given_cases.a_long_message)
    assert refused.startswith("FormatError: rank 1 announces a message of 5000 bytes")
    assert sent == "nothing"


def test_large_float16_gradients_stay_finite(ranks: Pools) -> None:
    assert all(ranks(2).run(given_cases.large_halves))
