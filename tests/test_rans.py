"""The range stage against its specification, written down again in whole numbers."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lc3
from lc3 import format as format_
from lc3.codec import cpu
from lc3.format import FLAG_ENTROPY_CODED, HEADER_BYTES, MAGIC_RANGE_CODED, Tag, seal
from lc3.plan import Piece
from lc3.wire import rans
from lc3.wire.message import unpack
from tests.test_format import data

GOLDEN = json.loads((Path(__file__).parent / "golden/range.json").read_text())
TAG = Tag(sender=1, step=7, bucket=2, plan=0xABCDEF01)

ONE = 2**30
GRID = (65536, 60097, 55109, 50535, 46341, 42495, 38968, 35734)


def nonzero_digits(byte: int) -> int:
    return len([k for k in range(5) if byte // 3**k % 3 != 1])


CLASSES = [[b for b in range(243) if nonzero_digits(b) == k] for k in range(1, 6)]
CLASSES += [[121], *([243 + k - 2] for k in range(2, 15))]


def times(*factors: int) -> int:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor // ONE
    return product


def density(index: int) -> int:
    return (GRID[index % 8] << 14) >> (index // 8)


def five_zeros(index: int) -> int:
    q = ONE - density(index)
    return times(times(times(q, q), times(q, q)), q)


def slots(model: Sequence[int], state: str) -> dict[int, tuple[int, int]]:
    """Return of every byte how many slots it has and where they begin."""
    d, a, b = model
    h, q = density(d) // 2, ONE - density(d)
    c = [times(ONE, *[h] * k, *[q] * (5 - k)) for k in range(1, 6)]
    t = sum(x * len(members) for x, members in zip(c, CLASSES, strict=False))
    y = {"A": five_zeros(a), "C": five_zeros(b), "B": 0}[state]
    each = [times(ONE - y, x) * 65280 // t for x in c]
    r = y
    for run in range(1, 15):
        ends = ONE - five_zeros(b) if run < 14 else ONE
        each.append(times(r, ends) * 65280 // ONE)
        r = times(r, five_zeros(b))
    each = [max(1, n) for n in each]
    totals = [n * len(members) for n, members in zip(each, CLASSES, strict=True)]
    most = totals.index(max(totals))
    each[most] += (65536 - sum(totals)) // len(CLASSES[most])
    table, at = {}, 0
    for n, members in zip(each, CLASSES, strict=True):
        for byte in members:
            table[byte] = n, at
            at += n
    assert at <= 65536
    return table


def following(byte: int) -> str:
    if byte == 255:
        return "C"
    return "B" if byte == 121 or byte >= 243 else "A"


def frames_of(stream: bytes, numels: Sequence[int]) -> list[bytes]:
    """Decode a stream as the specification says."""
    heads: list[bytes] = []
    models: list[list[int] | None] = []
    for _ in numels:
        scale, stream = stream[:4], stream[4:]
        heads.append(scale)
        models.append(None)
        if scale != bytes(4) and scale != format_.NAN_SCALE:
            if stream[0] < 128:
                models[-1], stream = [stream[0]] * 3, stream[1:]
            else:
                models[-1] = [stream[0] - 128, stream[1], stream[2]]
                stream = stream[3:]
    if not any(models):
        assert not stream
        return heads
    x, stream = int.from_bytes(stream[:6], "little"), stream[6:]
    for i, (numel, model) in enumerate(zip(numels, models, strict=True)):
        if model is None:
            continue
        left, state = -(-numel // 5), "A"
        tables = {s: slots(model, s) for s in "ABC"}
        while left:
            slot = x % 65536
            byte, (n, f) = next(
                (b, (n, f)) for b, (n, f) in tables[state].items() if f <= slot < f + n
            )
            heads[i] += bytes([byte])
            left -= byte - 243 + 2 if byte >= 243 else 1
            x = n * (x // 65536) + slot - f
            if x < 2**32:
                x = 65536 * x + int.from_bytes(stream[:2], "little")
                stream = stream[2:]
            state = following(byte)
    assert (x, stream) == (2**32, b"")
    return heads


def stream_of(body: bytes, model: Sequence[int], x: int = 2**32) -> bytes:
    """Encode one frame of scale 1 as the specification says, whatever its body."""
    words = b""
    tables = {s: slots(model, s) for s in "ABC"}
    for i in reversed(range(len(body))):
        n, f = tables[following(body[i - 1]) if i else "A"][body[i]]
        if x >= 2**32 * n:
            words = (x % 65536).to_bytes(2, "little") + words
            x //= 65536
        x = 65536 * (x // n) + x % n + f
    d, a, b = model
    said = bytes([d] if d == a == b else [128 + d, a, b])
    return b"\0\0\x80\x3f" + said + x.to_bytes(6, "little") + words


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def some_frames(seed: int) -> tuple[list[Tensor], list[int]]:
    """Frames of every kind: dense, sparse, clustered, of one value, 0, NaN."""
    drawn = torch.Generator().manual_seed(seed)
    frames, numels = [], []
    for n in (1, 4, 5, 70, 71, 350, 3000):
        x = torch.randn(n, generator=drawn)
        clustered = x * (torch.arange(n) < n // 10)
        for values, s in (
            *((x, 1.0), (x**5, 1.5), (clustered, 1.0), (x.sign(), 1.0)),
            *((torch.zeros(n), 1.0), (torch.full((n,), math.nan), 1.0)),
        ):
            frames.append(lc3.encode(values, s)[0])
            numels.append(n)
    return frames, numels


def test_the_specification_decodes_what_is_encoded() -> None:
    frames, numels = some_frames(0)
    stream = raw_bytes(rans.compress(frames, numels))
    assert frames_of(stream, numels) == [raw_bytes(frame) for frame in frames]


@pytest.mark.parametrize("model", [[40, 40, 40], [12, 30, 9], [0, 0, 0]])
def test_any_model_may_be_chosen(model: list[int]) -> None:
    """Also where frames are not what the model expects, and no encoder's own."""
    chance = random.Random(8)
    body = bytes(
        chance.choice([255, 121, 243, chance.randrange(243)]) for _ in "x" * 300
    )
    numel = 5 * sum(b - 243 + 2 if b >= 243 else 1 for b in body)
    stream = stream_of(body, model)
    assert frames_of(stream, [numel])[0][4:] == body
    assert raw_bytes(rans.decompress(data(stream), [numel]))[4:] == body


def test_an_encoder_writes_what_the_specification_says() -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(9)) ** 3
    frame, _ = lc3.encode(x)
    stream = raw_bytes(rans.compress([frame], [3000]))
    body = raw_bytes(frame)[4:]
    assert stream[4] < 128
    assert stream[5:] == stream_of(body, [stream[4]] * 3)[5:]


def damaged_streams() -> dict[str, tuple[bytes, int]]:
    """Return, by what is said about them, streams and how many values are due."""
    body = bytes([0, 121, 40, 255, 121, 200, 7, 243, 9, 9, 9, 9, 9, 9])
    numel = 5 * 28
    whole = stream_of(body, [8, 8, 8])
    assert raw_bytes(rans.decompress(data(whole), [numel]))[4:] == body
    ends = [max(map(sum, slots([m] * 3, "A").values())) for m in range(128)]
    free = next(m for m, end in enumerate(ends) if end < 65536)
    state = (2**32 + ends[free]).to_bytes(6, "little")
    nobody = b"\0\0\x80\x3f" + bytes([free]) + state
    return {
        "something is left behind": (whole + bytes(2), numel),
        "something is left behind its": (stream_of(body, [8] * 3, 2**32 + 1), numel),
        "it ends too early": (whole[:-2], numel),
        "crosses the end": (stream_of(bytes([0, 255]), [8, 8, 8]), 5 * 14),
        "stands for no byte": (nobody, 5),
    }


@pytest.mark.parametrize("words", damaged_streams())
def test_each_damage_is_told(words: str) -> None:
    stream, numel = damaged_streams()[words]
    with pytest.raises(lc3.FormatError, match=words):
        rans.decompress(data(stream), [numel])


@pytest.mark.parametrize("state", "ABC")
def test_every_byte_can_follow_every_other(state: str) -> None:
    for model in ([0] * 3, [127] * 3, [0, 127, 0], [127, 0, 127], [26, 20, 5]):
        table = slots(model, state)
        assert sorted(table) == sorted({*range(256)})
        given_ = sum(n for n, _ in table.values())
        assert 65536 - 80 < given_ <= 65536


def test_the_kernels_use_the_slots_of_the_specification() -> None:
    chance = random.Random(3)
    models = [[chance.randrange(128) for _ in range(3)] for _ in range(40)]
    freq = np.empty((3, 19), np.uint64)
    first = np.empty((3, 20), np.uint64)
    for model in [*models, [0] * 3, [127] * 3, [0, 127, 127]]:
        rans._tabulate(np.array(model, np.uint8), freq, first)
        for place, state in enumerate("ACB"):
            table = slots(model, state)
            expected = [table[members[0]] for members in CLASSES]
            assert [
                (int(n), int(f))
                for n, f in zip(freq[place], first[place], strict=False)
            ] == expected


values = st.one_of(
    st.just(0.0), st.just(1.0), st.just(-1.0), st.just(math.nan), st.floats(-2, 2)
)


@given(tensors=st.lists(st.lists(values, min_size=1, max_size=200), max_size=5))
def test_what_was_compressed_comes_back(tensors: list[list[float]]) -> None:
    frames = [lc3.encode(torch.tensor(x, dtype=torch.float32))[0] for x in tensors]
    numels = [len(x) for x in tensors]
    stream = rans.compress(frames, numels)
    content = b"".join(map(raw_bytes, frames))
    assert raw_bytes(rans.decompress(stream, numels)) == content


@pytest.mark.parametrize("share", [0.5, 0.2, 0.095, 0.02, 0.003, 0.0004])
def test_a_stream_is_as_small_as_its_digits_are_unlikely(share: float) -> None:
    n = 400_000
    drawn = torch.Generator().manual_seed(4)
    sign = torch.randint(0, 2, (n,), generator=drawn) * 2.0 - 1
    x = sign * (torch.rand(n, generator=drawn) < share)
    frame, _ = lc3.encode(x)
    found = int((x != 0).sum()) / n
    other = 1 - found
    limit = n * (-found * math.log2(found / 2) - other * math.log2(other)) / 8
    assert rans.compress([frame], [n]).numel() < 1.004 * limit + 16


def test_values_that_stand_together_cost_less() -> None:
    """Three numbers a frame: of 2 000 rows one in twenty has anything to say."""
    x = torch.zeros(2000, 100)
    drawn = torch.Generator().manual_seed(5)
    x[::20] = torch.randint(-1, 2, (100, 100), generator=drawn).float()
    frame, _ = lc3.encode(x)
    stream = rans.compress([frame], [x.numel()])
    mixed, _ = lc3.encode(x.view(-1)[torch.randperm(x.numel(), generator=drawn)])
    assert raw_bytes(stream)[4] >= 128
    apart = rans.compress([mixed], [x.numel()])
    assert raw_bytes(apart)[4] < 128
    assert stream.numel() < 0.75 * apart.numel()


def test_the_worked_example_of_the_specification_is_true() -> None:
    text = (format_.__doc__ or "").split("Range-coded it is")[1].split("::")[1]
    stream = bytes.fromhex(text.strip().splitlines()[0].split("   ")[0])
    frame = bytes.fromhex("00000041caffff79")
    assert frames_of(stream, [150]) == [frame]
    assert raw_bytes(rans.compress([data(frame)], [150])) == stream


def test_golden_messages_stay_readable() -> None:
    assert len(GOLDEN) == 4
    for case in GOLDEN:
        tag = Tag(case["sender"], case["step"], case["bucket"], case["plan"])
        message = data(bytes.fromhex(case["message"]))
        assert format_.unseal(message, tag)[1] == "rans"
        found = unpack(message, tag, pieces(case["raw"], case["coded"]), cpu)
        assert b"".join(map(raw_bytes, found)) == bytes.fromhex(case["content"])


def pieces(raw_numel: int, numel: int) -> list[Piece]:
    both = [
        Piece("b", 0, raw_numel, 0, coded=False),
        Piece("a", 0, numel, 0, coded=True),
    ]
    return [piece for piece in both if piece.numel]


def body_sealed(body: bytes) -> Tensor:
    message = data(bytes(HEADER_BYTES) + body)
    return seal(message, TAG, FLAG_ENTROPY_CODED, MAGIC_RANGE_CODED)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "0 bytes ends in a size"),
        (b"\x05\0\0\0abcd", "raw pieces of 5 bytes end after 4"),
        (b"\x04\0\0\0abcd", "0 bytes are too few for a frame's scale"),
        (b"\x03\0\0\0abc" + bytes(4), "do not start like one"),
        (b"\x04\0\0\0abcd" + bytes(4) + b"more", "4 bytes are left behind"),
        (b"\x04\0\0\0abcd\0\0\x80\x3f", "4 bytes ends in its models"),
        (b"\x04\0\0\0abcd\0\0\x80\x3f\x85\x01", "6 bytes ends in its models"),
        (b"\x04\0\0\0abcd\0\0\x80\x3f\x85\x80\x01", r"model \[5, 128, 1\]"),
        (b"\x04\0\0\0abcd\0\0\x80\x3f\x05" + bytes(5), "5 bytes from the state"),
        (b"\x04\0\0\0abcd\0\0\x80\x3f\x05" + bytes(6), "on, which is 0"),
        (b"\x04\0\0\0abcd\0\0\x80\x3f\x05" + bytes(4) + b"\1\0\0", "7 bytes from"),
        (b"\x04\0\0\0abcd\0\0\x80\x3f\x30" + bytes(4) + b"\1\0", "damaged: it ends"),
    ],
)
def test_a_body_that_does_not_fit_is_blamed_on_its_sender(
    body: bytes, words: str
) -> None:
    with pytest.raises(lc3.FormatError, match=words) as caught:
        unpack(body_sealed(body), TAG, pieces(1, 5000), cpu)
    assert "rank 1, bucket 2, step 7" in str(caught.value)


def test_nothing_compiles_in_a_step() -> None:
    """After ``warm_up`` every kernel knows its types."""
    code = (
        "import lc3, torch; from lc3.wire import rans; rans.warm_up();"
        "kernels = [k for k in vars(rans).values() if hasattr(k, 'signatures')];"
        "before = [len(k.signatures) for k in kernels]; assert len(kernels) > 7;"
        "frames = [lc3.encode(torch.randn(n) ** 3)[0] for n in (1, 70, 5000)];"
        "rans.decompress(rans.compress(frames, [1, 70, 5000]), [1, 70, 5000]);"
        "assert before == [len(k.signatures) for k in kernels], before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
