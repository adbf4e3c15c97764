"""The bytes stay what they are, and no damaged byte gets through."""

import json
import random
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lc3
from lc3 import format as format_
from lc3.codec import decode_add
from lc3.format import HEADER_BYTES, Tag, max_frame_bytes, seal, seal_abort, unseal
from tests.test_codec import BACKENDS, backends, same_bits

GOLDEN = Path(__file__).parent / "golden"
FRAMES = json.loads((GOLDEN / "frames.json").read_text())
MESSAGES = json.loads((GOLDEN / "messages.json").read_text())
TAG = Tag(sender=1, step=7, bucket=2, plan=0xABCDEF01)


def floats(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32)


def data(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw) + b"\0", dtype=torch.uint8)[:-1]


def sealed(body: bytes, tag: Tag = TAG) -> torch.Tensor:
    return seal(data(bytes(HEADER_BYTES) + body), tag)


@backends
def test_golden_frames(codec: ModuleType) -> None:
    assert len(FRAMES) == 220
    for case in FRAMES:
        x = floats(case["input"])
        out = torch.empty(max_frame_bytes(x.numel()), dtype=torch.uint8)
        used, _ = codec.encode(x, case["sparsity"], out)
        assert out[:used].numpy().tobytes().hex() == case["frame"]
        assert same_bits(x, floats(case["residual"]))


def test_golden_messages() -> None:
    assert len(MESSAGES) == 8
    for case in MESSAGES:
        tag = Tag(case["sender"], case["step"], case["bucket"], case["plan"])
        if "abort" in case:
            message = data(bytes.fromhex(case["abort"]))
            with pytest.raises(
                lc3.PeerError, match="disk full · Platte voll"
            ) as caught:
                unseal(message, tag)
            assert caught.value.rank == tag.sender
            remade = seal_abort("disk full · Platte voll", tag)
        else:
            message = data(bytes.fromhex(case["message"]))
            remade = seal(
                torch.cat(
                    [torch.zeros(40, dtype=torch.uint8), unseal(message, tag)[0]]
                ),
                tag,
            )
        assert torch.equal(remade, message)


def test_golden_files_are_the_committed_ones() -> None:
    found = {
        path.name: f"{zlib.crc32(path.read_bytes()):08x}"
        for path in GOLDEN.glob("*.json")
    }
    assert found == {
        "entropy.json": "4d6cb1b8",
        "frames.json": "b6294255",
        "messages.json": "1562c316",
        "predictive.json": "89aa53d9",
        "range.json": "695a9549",
        "ship.json": "6de65e40",
    }


def test_the_worked_examples_of_the_specification_are_true() -> None:
    examples = [
        ([1, -1, 0.25, 0, 0.75], 1.0, "00 00 80 3f b0", [0, 0, 0.25, 0, -0.25]),
        ([3, 0, 0, 0, 0, 0], 1.5, "00 00 90 40 ca 79", [-1.5, 0, 0, 0, 0, 0]),
        ([8] + [0] * 149, 1.0, "00 00 00 41 ca ff ff 79", [0] * 150),
    ]
    for x, s, frame, residual in examples:
        found, left = lc3.encode(torch.tensor(x, dtype=torch.float32), s)
        assert found.numpy().tobytes().hex(" ") == frame
        assert frame in (format_.__doc__ or "")
        assert left.tolist() == residual


def test_a_message_comes_back() -> None:
    body = bytes(range(256))
    found, coding = unseal(sealed(body), TAG)
    assert bytes(found.numpy()) == body
    assert coding == "none"
    assert unseal(sealed(b""), TAG)[0].numel() == 0
    assert unseal(seal(sealed(body), TAG, flags=1), TAG)[1] == "zstd"
    assert unseal(seal(sealed(body), TAG, 1, b"3LC2"), TAG)[1] == "rans"


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        (data(b""), lc3.FormatError, "0 bytes"),
        (sealed(b"abc")[:39], lc3.FormatError, "39 bytes"),
        (data(b"3LC3" + bytes(60)), lc3.FormatError, "same format version"),
        (seal(sealed(b"abc"), TAG, 0, b"3LC2"), lc3.FormatError, "flags 0x0"),
        (seal(sealed(b"abc"), TAG, 3, b"3LC2"), lc3.FormatError, "flags 0x3"),
        (sealed(b"abc")[:-1], lc3.FormatError, "announces 3 bytes of body, 2 came"),
        (seal(sealed(b"abc"), TAG, flags=4), lc3.FormatError, "flags 0x4"),
        (seal_abort("no space", TAG), lc3.PeerError, "rank 1 stopped: no space"),
        (sealed(b"abc", Tag(1, 7, 2, 5)), lc3.PlanMismatch, "made by plan 00000005"),
        (
            sealed(b"abc", Tag(0, 7, 2, TAG.plan)),
            lc3.FormatError,
            "the one from rank 0",
        ),
        (sealed(b"abc", Tag(1, 8, 2, TAG.plan)), lc3.FormatError, "bucket 2, step 8"),
        (sealed(b"abc", Tag(1, 7, 3, TAG.plan)), lc3.FormatError, "bucket 3, step 7"),
    ],
)
def test_an_unexpected_message_is_named(
    message: torch.Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        unseal(message, TAG)
    if error is lc3.FormatError:
        assert "rank 1, bucket 2, step 7" in str(caught.value)


def test_every_single_bit_flip_is_found() -> None:
    frame, _ = lc3.encode(torch.randn(60, generator=torch.Generator().manual_seed(0)))
    original = sealed(bytes(frame.numpy()))
    for bit in range(8 * original.numel()):
        damaged = original.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(lc3.FormatError):
            unseal(damaged, TAG)


@backends
def test_random_damage_is_refused_or_changes_nothing(codec: ModuleType) -> None:
    """20 000 messages a backend, bytes flipped, cut, inserted, appended, swapped."""
    chance = random.Random(5)
    generator = torch.Generator().manual_seed(5)
    refused = unchanged = 0
    for _ in range(200):
        x = torch.randn(chance.randrange(1, 300), generator=generator) ** 3
        frame = bytes(lc3.encode(x, 1.5)[0].numpy())
        original = bytes(sealed(frame).numpy())
        expected = lc3.decode(data(frame), x.numel())
        for _ in range(100):
            damaged = damage(bytearray(original), chance)
            try:
                body, _ = unseal(data(damaged), TAG)
            except lc3.FormatError:
                refused += 1
                continue
            values = torch.zeros(x.numel())
            assert decode_add(codec, body, values) == body.numel()
            assert torch.equal(values, expected)
            unchanged += 1
    assert refused + unchanged == 20_000
    assert refused > 15_000


def damage(message: bytearray, chance: random.Random) -> bytes:
    kind = chance.randrange(5)
    at = chance.randrange(len(message))
    if kind == 0:
        message[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del message[at:]
    elif kind == 2:
        message[at:at] = chance.randbytes(chance.randrange(1, 17))
    elif kind == 3:
        message += chance.randbytes(chance.randrange(1, 17))
    else:
        other = chance.randrange(len(message))
        message[at], message[other] = message[other], message[at]
    return bytes(message)


def test_the_suite_runs_every_backend() -> None:
    assert [codec.__name__ for codec in BACKENDS] == [
        "lc3.codec.reference",
        "lc3.codec.cpu",
        "lc3.codec.tensor",
    ]
