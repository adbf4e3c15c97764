"""Ranks that meet agree whom they go on from; a model arrives whole or not at all."""

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments.lab import netlab
from lc3 import ExchangeError, FormatError
from lc3.local.meeting import Present, meet
from lc3.local.says import Says
from lc3.local.seed import FACTS, Seed, fetch

ONE = Present(
    name="a",
    address="host:1",
    config=b"alike   ",
    exchanges=3,
    held=5,
    history=(7, 8, 9),
    nonce=1,
    wants=False,
    says=Says(weight=4.0, buffers=(True, False, True)),
)


def bytes_of(*said: Present) -> list[Tensor]:
    return [one.to_bytes() for one in said]


@given(
    name=st.text(max_size=9),
    history=st.lists(st.integers(0, 2**64 - 1), max_size=64),
    exchanges=st.integers(-1, 2**62),
    buffers=st.lists(st.booleans(), max_size=20),
)
def test_what_a_rank_says_arrives(
    name: str, history: list[int], exchanges: int, buffers: list[bool]
) -> None:
    said = replace(
        *(ONE,),
        name=name,
        history=tuple(history),
        exchanges=exchanges,
        says=Says(weight=2.5, buffers=tuple(buffers)),
    )
    assert Present.from_bytes(said.to_bytes()) == said


@pytest.mark.parametrize("buffers", [9, 1 << 20, (1 << 32) - 1])
def test_buffers_that_are_announced_and_do_not_come_take_no_memory(
    buffers: int,
) -> None:
    data = Says(True, False, False, 0, 1.0, True, (True,) * 8).to_bytes()
    with pytest.raises(FormatError, match=f"of itself and of {buffers} buffers"):
        Says.from_bytes(data, buffers)


@given(data=st.binary(max_size=120))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    said = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    with pytest.raises(FormatError, match="are not what a rank says"):
        Present.from_bytes(said)


@pytest.mark.parametrize(
    ("said", "lead", "behind"),
    [
        ([ONE, ONE, ONE], 0, []),
        ([replace(ONE, exchanges=2, history=(7, 8)), ONE], 1, [0]),
        ([replace(ONE, exchanges=-1, history=()), ONE, ONE], 1, [0]),
        ([replace(ONE, history=(7, 8, 1)), ONE, ONE], 1, [0]),  # the most go on
        ([replace(ONE, held=6), ONE, ONE], 1, [0]),
        ([replace(ONE, exchanges=9, history=(1,)), ONE, ONE], 0, [1, 2]),
        ([replace(ONE, exchanges=-1, history=(), held=h) for h in (4, 5, 4)], 0, [1]),
    ],
)
def test_the_furthest_lead_then_the_most_then_the_lowest(
    said: list[Present], lead: int, behind: list[int]
) -> None:
    met = meet(bytes_of(*said))
    assert (met.lead, list(met.behind)) == (lead, behind)
    assert list(met.members) == list(range(len(said)))
    assert met.begins == all(one.exchanges < 0 for one in said)


def test_another_configuration_and_what_nobody_reads_stay_outside() -> None:
    other = replace(ONE, config=b"another ")
    met = meet([*bytes_of(other, ONE), FormatError("torn"), *bytes_of(ONE)])
    assert (list(met.members), list(met.strangers)) == ([1, 3], [0])
    assert met.unheard == {2: "torn"}
    alone = replace(other, exchanges=-1, history=())
    assert meet(bytes_of(alone, alone, alone, ONE)).strangers == [0, 1, 2]
    with pytest.raises(FormatError, match="nobody can be understood"):
        meet([FormatError("torn")])


def test_no_two_meetings_are_one_entry() -> None:
    entries = {meet(bytes_of(ONE, replace(ONE, nonce=n))).entry for n in range(9)}
    assert len(entries) == 9


def test_who_gives_a_model_stays_until_it_is_fetched() -> None:
    seed = Seed("127.0.0.1", "127.0.0.1", 20.0, {})
    seed.offer(5, {}, model(), takers=2)
    ended = threading.Thread(target=seed.close)
    ended.start()
    for left in (1, 0):
        ended.join(0.2)
        assert ended.is_alive(), left
        assert set(fetch(seed.address, 5, 5.0)[1]) == set(model())
    ended.join(5.0)
    assert not ended.is_alive()


def test_who_gives_a_model_waits_no_longer_than_the_timeout() -> None:
    seed = Seed("127.0.0.1", "127.0.0.1", 1.0, {})
    seed.offer(5, {}, model(), takers=1)
    seed.offer(6, {}, model(), takers=1)
    began = time.monotonic()
    seed.close()
    assert 0.9 < time.monotonic() - began < 1.9


@pytest.fixture
def seed() -> Iterator[Seed]:
    found = Seed("127.0.0.1", "127.0.0.1", 5.0, {"density": 0.1})
    yield found
    found.close()


def model() -> dict[str, Tensor]:
    return {
        "weight": torch.randn(300, 70),
        "half": torch.randn(9).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "angles": torch.polar(torch.ones(8, 4), torch.randn(8, 4)),
        "words": torch.tensor([1, 65535], dtype=torch.uint16),
    }


def test_a_model_is_fetched_bit_for_bit_and_shorter(seed: Seed) -> None:
    held = model()
    seed.offer(5, {"exchanges": 3}, held)
    head, tensors = fetch(seed.address, 5, 5.0)
    assert head == {"exchanges": 3}
    assert list(tensors) == list(held)
    for name, tensor in held.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert fetch(seed.address, FACTS, 5.0) == ({"density": 0.1}, {})


def test_an_offer_that_comes_a_little_later_is_waited_for(seed: Seed) -> None:
    later = threading.Timer(0.3, lambda: seed.offer(6, {}, model()))
    later.start()
    assert set(fetch(seed.address, 6, 5.0)[1]) == set(model())
    later.join()


def test_who_asks_waits_for_as_long_as_it_may_be_silent() -> None:
    seed = Seed("127.0.0.1", "127.0.0.1", 8.0, {})
    later = threading.Timer(5.5, lambda: seed.offer(6, {}, model()))
    later.start()
    assert set(fetch(seed.address, 6, 8.0)[1]) == set(model())
    later.join()
    seed.close()


def test_the_address_of_no_machine_is_an_error_that_names_it() -> None:
    with pytest.raises(ExchangeError, match=r"node\.\.1"):
        fetch("node..1:80", 1, 1.0)


def test_an_offer_goes_when_all_who_wait_for_it_have_it(seed: Seed) -> None:
    seed.offer(7, {}, model(), takers=2)
    for _ in range(2):
        assert set(fetch(seed.address, 7, 5.0)[1]) == set(model())
    seed.wait()
    with pytest.raises(ExchangeError, match="has closed the connection"):
        fetch(seed.address, 7, 5.0)


def test_silent_strangers_take_some_connections_and_for_a_while_only(
    seed: Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lc3.local.seed._KEY_S", 1.0)
    host, port = seed.address.rsplit(":", 1)
    before = threading.active_count()
    idle = [socket.create_connection((host, int(port)), 5.0) for _ in range(150)]
    time.sleep(0.5)
    assert threading.active_count() - before <= 64
    time.sleep(1.5)
    seed.offer(8, {}, model())
    assert set(fetch(seed.address, 8, 5.0)[1]) == set(model())
    for one in idle:
        one.close()


def test_the_last_two_offers_are_kept(seed: Seed) -> None:
    for key in (1, 2, 3):
        seed.offer(key, {"key": key}, {})
    assert [fetch(seed.address, key, 5.0)[0]["key"] for key in (2, 3)] == [2, 3]
    with pytest.raises(ExchangeError, match="has closed the connection"):
        fetch(seed.address, 1, 5.0)


def served(data: bytes) -> str:
    """Return the address of something that answers with these bytes, once."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listening, listening.accept()[0] as connection:
            connection.recv(8)
            connection.sendall(data)

    threading.Thread(target=answer, daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}"


def sections(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


HEAD = json.dumps({"head": {}, "tensors": [["w", "torch.float32", [4]]]}).encode()


@pytest.mark.parametrize(
    "data",
    [
        sections(b"{}"),
        sections(b"[1]"),
        sections(HEAD, b"x" * 20),
        sections(HEAD, b"x" * 5000),
        sections(HEAD.replace(b"float32", b"nothing"), b""),
        sections(HEAD.replace(b"[4]", b"[-4]"), b""),
        sections(json.dumps({"head": {}, "tensors": []}).encode()) + bytes(8),
        struct.pack("<Q", 1 << 33),
    ],
)
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"no model|section|checksum"):
        fetch(served(data), 1, 5.0)


def test_what_cannot_be_fetched_says_where_from(seed: Seed) -> None:
    with pytest.raises(ExchangeError, match=r"from 127\.0\.0\.1:1 .*hostname="):
        fetch("127.0.0.1:1", 1, 5.0)
    with pytest.raises(ExchangeError, match="has closed the connection"):
        fetch(served(sections(HEAD)), 1, 5.0)


@pytest.mark.skipif(netlab.missing() is not None, reason=str(netlab.missing()))
@pytest.mark.timeout(200)
def test_a_model_loads_sooner_than_float32_over_a_thin_link(tmp_path: Path) -> None:
    out = tmp_path / "join.json"
    command = [
        *(sys.executable, "-m", "experiments.lab.netlab", "--hosts", "2"),
        *("--rate", "10mbit", "--each", "--", sys.executable, "-m", "tests.join_lab"),
    ]
    subprocess.run([*command, "2000000", str(out)], check=True, timeout=180)
    said = json.loads(out.read_text())
    assert said["float32 s"] > 4
    assert said["share"] < 0.95  # of 10 million 0.83: what is not coding is less then
