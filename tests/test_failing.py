"""What fails on one rank is an error on all, at once and with its reason."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lc3
from lc3.config import Settings
from lc3.transport.handshake import agree
from lc3.transport.protocol import Transport
from tests import failing_cases
from tests.ranks import Ranks
from tests.test_engine import in_threads

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]
WRONG = {
    "ddp": "AttachError: optimizer is a str",
    "ddp, not wrapped": "AttachError: attach needs a DistributedDataParallel",
    "ddp, a word": "ConfigError: max_norm='1'",
    "push_pull": "ConfigError: max_norm=-1.0",
    "push_pull, later": "MemoryError: no memory left for moments",
    "local_sgd": "ConfigError: sync_every=0",
}


@pytest.mark.parametrize("form", WRONG)
def test_a_rank_that_attaches_wrongly_is_an_error_on_all(
    ranks: Pools, form: str
) -> None:
    said = ranks(3).run(failing_cases.attached_wrongly, form)
    own, _ = said[1]
    assert own.startswith(WRONG[form])
    reason = own.partition(": ")[2]
    for other, seconds in (said[0], said[2]):
        assert other.startswith("PeerError: rank 1 stopped: "), other
        assert reason in other
        assert seconds < 20


def test_a_reason_waits_for_ranks_that_come_late(ranks: Pools) -> None:
    said = ranks(3).run(failing_cases.comes_late)
    assert said[1] == "MemoryError: no memory left for frames"
    for other in (said[0], said[2]):
        assert other == (
            "PeerError: rank 1 stopped: MemoryError: no memory left for frames"
        )


def test_a_rank_that_fails_between_two_messages_is_an_error_on_all(
    ranks: Pools,
) -> None:
    said = ranks(3).run(failing_cases.fails_midway)
    reason = "MemoryError: no memory left for frames"
    assert said[1] == (reason, "soon")
    assert said[0] == said[2] == (f"PeerError: rank 1 stopped: {reason}", "soon")


def test_a_failed_attach_leaves_nothing_behind(ranks: Pools) -> None:
    for grown in ranks(2).run(failing_cases.failed_attaches, 5):
        assert grown == {"files": 0, "threads": 0}


def test_replicas_are_compared_every_so_many_steps(ranks: Pools) -> None:
    for said in ranks(3).run(failing_cases.replicas_compared, "ddp"):
        (once,) = said
        assert once.startswith("4: parameter 'bias' differs on rank 1 after 4 steps")
    assert ranks(2).run(failing_cases.replicas_compared, "push_pull") == [[], []]
    for said in ranks(2).run(failing_cases.check_every_refused, [0, 0]):
        assert said.startswith("check_every=0 must be an integer of at least 1")
    for said in ranks(2).run(failing_cases.check_every_refused, [2, 3]):
        assert said.startswith("ranks differ: check_every is 2 on rank 0 and 3 on rank")


def test_a_rank_that_attaches_alone_is_not_kept() -> None:
    pool = Ranks(2)  # one that no other case uses: rank 0 stays in a collective
    try:
        (said, took), _ = pool.run(failing_cases.refuses_alone)
    finally:
        pool.close()
    assert said.startswith("attach needs a DistributedDataParallel")
    assert 0.9 < took < 3


@pytest.mark.parametrize(
    "rubbish",
    [b"", b"\xff\xfe", b"[]", b"7", b"{}", b'{"error": null', b"[" * 200_000],
)
def test_rubbish_in_a_handshake_is_named(rubbish: bytes) -> None:
    def job(rank: int, transport: Transport) -> str:
        if rank == 0:
            for said in (b"x" * 32, rubbish):
                transport.all_gather(
                    torch.frombuffer(bytearray(said), dtype=torch.uint8)
                    if said
                    else torch.empty(0, dtype=torch.uint8)
                )
            return ""
        try:
            agree(transport, "0", Settings(), [("w", [3])], lambda: None)
        except lc3.FormatError as error:
            return str(error)
        return "agreed"

    said: Any = in_threads(2, job)
    assert said[1].startswith(f"rank 0 sent {len(rubbish)} bytes that are no handshake")


@pytest.mark.parametrize("kind", [1, None, [], {"a": 1}])
def test_what_is_said_of_strange_types_is_still_compared(kind: object) -> None:
    def job(rank: int, transport: Transport) -> str:
        if rank == 0:
            text = json.dumps({"error": kind, "lc3 version": kind}).encode()
            for said in (b"x" * 32, text):
                transport.all_gather(
                    torch.frombuffer(bytearray(said), dtype=torch.uint8)
                )
            return ""
        try:
            agree(transport, "0", Settings(), [("w", [3])], lambda: None)
        except lc3.Lc3Error as error:
            return type(error).__name__
        return "agreed"

    said: Any = in_threads(2, job)
    assert said[1] == ("PlanMismatch" if kind is None else "PeerError")
