"""The entropy stage loses nothing, and no zstd frame can do harm."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lc3
from lc3 import format as format_
from lc3.codec import cpu
from lc3.config import ENTROPY_STAGES, EntropyStage
from lc3.format import FLAG_ENTROPY_CODED, HEADER_BYTES, Tag, seal
from lc3.plan import Piece
from lc3.wire.entropy import compress, decompress
from lc3.wire.message import pack, unpack
from tests.test_format import damage, data

GOLDEN = json.loads((Path(__file__).parent / "golden/entropy.json").read_text())
TAG = Tag(sender=1, step=7, bucket=2, plan=0xABCDEF01)

parts = st.lists(st.lists(st.binary(max_size=300), max_size=4), min_size=1, max_size=3)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


@given(parts=parts, room=st.integers(0, 50))
def test_what_was_compressed_comes_back(parts: list[list[bytes]], room: int) -> None:
    whole, sizes = compress([[data(b) for b in part] for part in parts], room)
    content = b"".join(b for part in parts for b in part)
    assert whole.numel() == room + sum(sizes)
    assert not whole[:room].any()
    assert raw_bytes(decompress(whole[room:], len(content))) == content
    if content:
        with pytest.raises(lc3.FormatError, match=r"announces \d+ bytes, but at most"):
            decompress(whole[room:], len(content) - 1)


def test_golden_messages_stay_readable() -> None:
    assert len(GOLDEN) == 4
    for case in GOLDEN:
        tag = Tag(case["sender"], case["step"], case["bucket"], case["plan"])
        body, coding = format_.unseal(data(bytes.fromhex(case["message"])), tag)
        assert coding == "zstd"
        content = bytes.fromhex(case["content"])
        assert raw_bytes(decompress(body, len(content))) == content


def test_the_worked_example_of_the_specification_is_true() -> None:
    text = (format_.__doc__ or "").split("(others may differ)::")[1]
    lines = text.strip().splitlines()[:2]
    coded = bytes.fromhex(
        "".join(line.split("   ")[0] for line in map(str.strip, lines))
    )
    assert len(coded) == 30
    content = bytes(400) + bytes.fromhex("00000041caffff79")
    assert raw_bytes(decompress(data(coded), 408)) == content


def test_a_single_frame_may_be_entropy_coded() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1)) ** 3
    plain, residual = lc3.encode(x, 1.0)
    smaller, residual_too = lc3.encode(x, 1.0, entropy=True)
    assert smaller.numel() < 0.8 * plain.numel()
    assert torch.equal(residual, residual_too)
    assert torch.equal(lc3.decode(smaller, 5000), lc3.decode(plain, 5000))
    with pytest.raises(lc3.FormatError, match=r"announces \d+ bytes, but at most 24"):
        lc3.decode(smaller, 100)


def test_a_frame_that_does_not_shrink_stays_as_it_is() -> None:
    x = torch.tensor([1.0, -1.0, 0.25])
    assert torch.equal(lc3.encode(x, entropy=True)[0], lc3.encode(x)[0])


def bombs() -> dict[str, bytes]:
    """Return frames that hold, or say they hold, a gigabyte."""
    holding = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 30))
    unsized = zstandard.ZstdCompressor(level=1, write_content_size=False)
    header = bytes.fromhex("28b52ffd")
    return {
        "holds 1 GB": holding,
        "holds 1 GB and does not say so": unsized.compress(bytes(1 << 30)),
        "says 1 GB": header + b"\xa0" + (1 << 30).to_bytes(4, "little") + bytes(50),
        "says 2^63 bytes": header + b"\xe0" + (1 << 63).to_bytes(8, "little"),
        "says it does not know": header + b"\x00\x58" + bytes(50),
        "window of 2 GB": header + b"\x80\xa8" + (9).to_bytes(4, "little") + bytes(50),
        "skippable": bytes.fromhex("502a4d18") + (1 << 30).to_bytes(4, "little"),
        "ten bytes more": zstandard.ZstdCompressor().compress(bytes(1010)),
    }


def resident_kib(line: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0])


def test_bombs_are_refused_at_once_and_without_memory() -> None:
    for name, frame in bombs().items():
        message = data(frame)
        before_kib = resident_kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        start = time.perf_counter()
        with pytest.raises(lc3.FormatError):
            decompress(message, 1000)
        assert time.perf_counter() - start < 0.01, name
        assert resident_kib("VmHWM") - before_kib < 1024, name


def entropy_coded(content: list[list[bytes]]) -> Tensor:
    message, _ = compress([[data(b) for b in part] for part in content], HEADER_BYTES)
    return seal(message, TAG, FLAG_ENTROPY_CODED)


def pieces(raw_numel: int, numel: int) -> list[Piece]:
    coded = Piece("a", 0, numel, 0, coded=True)
    return [coded, Piece("b", 0, raw_numel, 0, coded=False)]


def read(message: Tensor, raw_numel: int, numel: int) -> tuple[bytes, bytes]:
    """Return the raw piece and the values of the frame of a message."""
    frame, raw = unpack(message, TAG, pieces(raw_numel, numel), cpu)
    values = torch.zeros(numel)
    cpu.add(frame, values)
    return raw_bytes(raw), raw_bytes(values)


def test_a_message_of_both_kinds_comes_back() -> None:
    frame, _ = lc3.encode(torch.randn(3000, generator=torch.Generator().manual_seed(2)))
    raw = torch.arange(200.0).view(torch.uint8)
    sizes = {}
    for stage in ENTROPY_STAGES:
        both = pieces(200, 3000)
        packed = pack(both, [frame, raw], TAG, stage)
        message = packed.message
        saved = packed.raw_saved_bytes + packed.coded_saved_bytes
        assert message.numel() == HEADER_BYTES + len(frame) + len(raw) - saved
        assert (saved > 0) == (stage != "none")
        sizes[stage] = message.numel()
        for found, given_ in zip(
            unpack(message, TAG, both, cpu), (frame, raw), strict=True
        ):
            assert torch.equal(found, given_)
    assert sizes["rans"] < sizes["zstd"] == sizes["auto"] < sizes["none"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([[b"abcd"], [b"x" * 2000]], "announces 2004 bytes, but at most 1008"),
        ([[b"ab"], []], "0 bytes are too few"),
        ([[b"abcd"], []], "0 bytes are too few"),
        ([[b"abcd"], [bytes(4), b"more"]], "4 bytes are left"),
    ],
)
def test_content_that_does_not_fit_is_blamed_on_its_sender(
    content: list[list[bytes]], words: str
) -> None:
    with pytest.raises(lc3.FormatError, match=words) as caught:
        read(entropy_coded(content), 1, 5000)
    assert "rank 1, bucket 2, step 7" in str(caught.value)


def test_a_plain_body_that_is_too_short_is_blamed_on_its_sender() -> None:
    message = seal(data(bytes(HEADER_BYTES + 4 + 3)), TAG)
    with pytest.raises(lc3.FormatError, match=r"step 7: it ends 1 bytes inside a raw"):
        read(message, 1, 10)


def test_a_body_that_is_no_zstd_frame_is_blamed_on_its_sender() -> None:
    message = seal(data(bytes(HEADER_BYTES + 60)), TAG, FLAG_ENTROPY_CODED)
    with pytest.raises(
        lc3.FormatError, match=r"rank 1, bucket 2, step 7.*do not start"
    ):
        read(message, 1, 10)


@pytest.mark.parametrize("stage", ["zstd", "rans"])
@pytest.mark.parametrize("with_valid_crc", [True, False])
def test_damaged_messages_are_refused_or_change_nothing(
    with_valid_crc: bool, stage: EntropyStage
) -> None:
    """20 000 mutations; also those that no CRC catches, as by a broken sender."""
    chance = random.Random(6)
    refused = unchanged = other = 0
    for seed in range(100):
        n = chance.randrange(200, 2000)
        x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) ** 5
        frame = lc3.encode(x, 1.0)[0]
        raw = np.arange(50, dtype=np.float32).tobytes()
        original = pack(pieces(50, n), [frame, data(raw)], TAG, stage).message
        assert format_.unseal(original, TAG)[1] == stage
        expected = read(original, 50, n)
        for _ in range(200):
            body = damage(bytearray(raw_bytes(original)[HEADER_BYTES:]), chance)
            message = data(raw_bytes(original)[:HEADER_BYTES] + body)
            if with_valid_crc:
                magic = raw_bytes(original)[:4]
                seal(message, TAG, FLAG_ENTROPY_CODED, magic)
            try:
                found = read(message, 50, n)
            except lc3.FormatError:
                refused += 1
                continue
            assert len(found[0]) == len(raw)
            unchanged += found == expected
            other += found != expected
    assert refused + unchanged + other == 20_000
    assert refused > 5_000
    assert with_valid_crc or other == 0
