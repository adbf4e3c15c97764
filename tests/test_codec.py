"""Every backend writes the same bytes and keeps the same residual, for every input."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import lc3
from experiments.bench.gradients import Recorded, recorded
from lc3.codec import cpu, decode_add, reference, tensor
from lc3.format import max_frame_bytes
from tests.oracle import quantize

BACKENDS = [reference, cpu, tensor]
EXAMPLES = settings().max_examples  # of the profile: 100, or 5 000 in make fuzz
SPARSITIES = [1.0, 1.25, 1.5, 1.75, 1.9, 1.984375]
FLOAT32_MAX = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

backends = pytest.mark.parametrize("codec", BACKENDS, ids=lambda c: c.__name__)
any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 400), elements=any_float32),
    hnp.arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.499, SMALLEST]),
        fill=st.just(np.float32(0)),
    ),
    hnp.arrays(np.float32, st.integers(1, 90), elements=st.floats(width=32)),
)


def encoded(codec: ModuleType, x: Tensor, sparsity: float) -> tuple[bytes, Tensor]:
    """Return (frame, residual), and check that nothing behind the frame was written."""
    residual = x.clone()
    out = torch.full((max_frame_bytes(x.numel()) + 8,), 0xA5, dtype=torch.uint8)
    used, digits = codec.encode(residual, sparsity, out[:-8])
    assert digits == int((residual.view(torch.int32) != x.view(torch.int32)).sum())
    assert (out[-8:] == 0xA5).all()
    return bytes(out[:used].numpy()), residual


def decoded(codec: ModuleType, frame: bytes, numel: int) -> Tensor:
    """Return the values of a frame, and check that only they were written."""
    guarded = torch.zeros(numel + 16)
    guarded[:8] = guarded[-8:] = 7.0
    data = torch.frombuffer(bytearray(frame + b"\x55"), dtype=torch.uint8)[: len(frame)]
    try:
        assert decode_add(codec, data, guarded[8:-8]) == len(frame)
    finally:
        assert (guarded[:8] == 7).all()
        assert (guarded[-8:] == 7).all()
    return guarded[8:-8]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def check_all_agree(x: Tensor, sparsity: float) -> None:
    """All backends: one frame, one residual, and together they are the input."""
    frame, residual = encoded(reference, x, sparsity)
    assert len(frame) <= max_frame_bytes(x.numel())
    for codec in BACKENDS[1:]:
        frame_too, residual_too = encoded(codec, x, sparsity)
        assert frame_too == frame
        assert same_bits(residual_too, residual)
    for codec in BACKENDS:
        values = decoded(codec, frame, x.numel())
        if x.isfinite().all():
            assert np.array_equal((values + residual).numpy(), x.numpy())
        else:
            assert values.isnan().all()
            assert same_bits(residual, x)


@settings(max_examples=25 * EXAMPLES)
@given(x=vectors, s=st.sampled_from(SPARSITIES) | st.floats(1.0, 1.984375, width=32))
def test_frame_plus_residual_is_the_input_bit_for_bit(x: np.ndarray, s: float) -> None:
    check_all_agree(torch.from_numpy(x), s)


@settings(max_examples=5 * EXAMPLES)
@given(x=vectors, s=st.sampled_from(SPARSITIES), data=st.data())
def test_a_residual_is_added_first(
    x: np.ndarray, s: float, data: st.DataObject
) -> None:
    """As if added before; but an all-zero input says nothing and changes nothing."""
    values = torch.from_numpy(x)
    shift = data.draw(st.integers(0, x.size))
    residual = values.roll(shift) * 0.5
    if data.draw(st.booleans()):
        values = values * 0.0 if values.isfinite().all() else torch.zeros(x.size)
    for codec in BACKENDS:
        left = values.clone()
        out = torch.empty(max_frame_bytes(x.size), dtype=torch.uint8)
        used, digits = codec.encode(left, s, out, residual)
        if values.any():
            frame, expected = encoded(codec, values + residual, s)
            assert bytes(out[:used].numpy()) == frame
        else:
            expected = residual + values
            assert out[:used].tolist() == [0, 0, 0, 0]
            assert digits == 0
        assert np.array_equal(left.numpy(), expected.numpy(), equal_nan=True)


HALVES = [torch.float16, torch.bfloat16]
SOURCES = [torch.float32, *HALVES]


@backends
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_value_is_widened_exactly(
    codec: ModuleType, dtype: torch.dtype
) -> None:
    every = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(dtype)
    finite = every[every.isfinite()]
    for source in (finite, finite[:5], *every[~every.isfinite()][::97].split(3)):
        frame, expected = encoded(reference, source.float(), 1.75)
        for owed in (None, torch.zeros(source.numel())):  # backends may fuse the sum
            left = torch.full((source.numel(),), 7.0)  # what was there does not count
            out = torch.empty(max_frame_bytes(source.numel()), dtype=torch.uint8)
            used, _ = codec.encode(left, 1.75, out, owed, None, source)
            assert bytes(out[:used].numpy()) == frame
            assert np.array_equal(left.numpy(), expected.numpy(), equal_nan=True)


@settings(max_examples=3 * EXAMPLES)
@given(
    x=vectors,
    dtype=st.sampled_from(SOURCES),
    density=st.sampled_from([None, 0.1, 0.5]),
    owing=st.booleans(),
)
def test_a_source_is_coded_in_place_of_the_values(
    x: np.ndarray, dtype: torch.dtype, density: float | None, owing: bool
) -> None:
    source = torch.from_numpy(x).to(dtype)
    residual = torch.from_numpy(x).roll(1) * 0.25 if owing else None
    room = max_frame_bytes(x.size)
    expected, out = source.float().clone(), torch.empty(room, dtype=torch.uint8)
    size, digits = reference.encode(expected, 1.0, out, residual, density)
    for codec in BACKENDS:
        left, frame = torch.ones(x.size), torch.empty(room, dtype=torch.uint8)
        assert codec.encode(left, 1.0, frame, residual, density, source) == (
            size,
            digits,
        )
        assert torch.equal(frame[:size], out[:size])
        assert np.array_equal(left.numpy(), expected.numpy(), equal_nan=True)


@pytest.mark.parametrize("owing", [False, True])
@pytest.mark.parametrize("dtype", [None, *SOURCES], ids=str)
def test_many_pieces_at_once_are_as_one_by_one(
    dtype: torch.dtype | None, owing: bool
) -> None:
    xs = [x for n in (1, 4, 1281, 5000) for x in special_inputs(n).values()]
    numels = [x.numel() for x in xs]
    residuals = [x.roll(1) * 0.25 if owing else None for x in reversed(xs)]
    residuals = [
        r[:1].expand(n).clone() if r is not None else None
        for r, n in zip(residuals, numels, strict=True)
    ]
    sources = [None if dtype is None else x.to(dtype) for x in xs]
    each = [x.clone() if dtype is None else torch.ones_like(x) for x in xs]
    outs = [torch.zeros(max_frame_bytes(n), dtype=torch.uint8) for n in numels]
    several, several_outs = [x.clone() for x in each], [out.clone() for out in outs]
    one_by_one = [
        reference.encode(x, 1.5, out, r, None, s)
        for x, out, r, s in zip(each, outs, residuals, sources, strict=True)
    ]
    found = cpu.encode_all(several, 1.5, several_outs, residuals, sources)
    assert found == one_by_one
    frames = [out[:used] for out, (used, _) in zip(outs, found, strict=True)]
    for x, y in zip(each, several, strict=True):
        assert np.array_equal(x.numpy(), y.numpy(), equal_nan=True)
    for frame, out in zip(frames, several_outs, strict=True):
        assert torch.equal(frame, out[: frame.numel()])

    sizes = [used for used, _ in found]
    row = torch.cat([torch.zeros(8, dtype=torch.uint8), *frames])
    assert cpu.check_all(row, [2, *numels], [False] + [True] * len(xs)) == [8, *sizes]
    assert cpu.check_all(row[:-1], [2, *numels], [False] + [True] * len(xs)) is None
    assert cpu.check_all(row, [3, *numels], [False] + [True] * len(xs)) is None
    for anew in (False, True):
        sums = [torch.full((n,), 0.5) for n in numels]
        at_once = [total.clone() for total in sums]
        for frame, total in zip(frames, sums, strict=True):
            if anew:
                total.zero_()
            with np.errstate(over="ignore"):
                decode_add(reference, frame, total)
                decode_add(reference, frame, total)
        both = zip(at_once, frames, strict=True)
        cpu.add_all([(total, [frame] * 2) for total, frame in both], anew=anew)
        for a, b in zip(sums, at_once, strict=True):
            assert np.array_equal(a.numpy(), b.numpy(), equal_nan=True)


def test_values_that_are_not_in_a_row_are_refused() -> None:
    x, out = torch.zeros(8)[::2], torch.zeros(9, dtype=torch.uint8)
    with pytest.raises(lc3.InputError, match=r"4 values with strides .* contiguous"):
        cpu.encode_all([x], 1.0, [out], [None], [None])
    with pytest.raises(lc3.InputError, match=r"4 values with strides .* contiguous"):
        cpu.add_all([(x, [out])], anew=False)


@settings(max_examples=25 * EXAMPLES)
@given(x=vectors, density=st.floats(0.001, 0.999))
# The mean's sum is rounded to a double before it is divided; else this rounds up.
@example(x=np.array([1, 1, 4, *[4.0266577e15] * 19], np.float32), density=0.5)
def test_all_backends_agree_on_a_density(x: np.ndarray, density: float) -> None:
    check_density(torch.from_numpy(x), density)


def check_density(x: Tensor, density: float) -> int:
    """Compare all backends with the oracle; return how many values are sent."""
    expected, left = quantize(x.numpy(), 1.0, density)
    frames = set()
    for codec in BACKENDS:
        values, out = (
            x.clone(),
            torch.empty(max_frame_bytes(x.numel()), dtype=torch.uint8),
        )
        used, digits = codec.encode(values, 1.0, out, None, density)
        frames.add(bytes(out[:used].numpy()))
        found = decoded(codec, bytes(out[:used].numpy()), x.numel())
        assert np.array_equal(found.numpy(), expected, equal_nan=True)
        assert np.array_equal(values.numpy(), left, equal_nan=True)
        sent = int(np.count_nonzero(expected)) if x.isfinite().all() else 0
        assert digits == sent
    assert len(frames) == 1
    return sent


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_about_the_density_is_sent(density: float) -> None:
    for n in (5000, 100_000, 1_000_003):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n))
        assert check_density(x, density) == pytest.approx(density * n, rel=0.35)


def special_inputs(n: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(n)
    noise = torch.randn(n, generator=g)
    spike = torch.zeros(n)
    spike[n // 2] = -3.0
    ties = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25])[
        torch.randint(5, (n,), generator=g)
    ]
    signed_zeros = torch.zeros(n) * noise.sign()
    infinite, nan = noise.clone(), noise.clone()
    infinite[n - 1], nan[0] = -torch.inf, torch.nan
    return {
        "noise": noise,
        "heavy tails": noise**5,
        "all zero": torch.zeros(n),
        "signed zeros": signed_zeros,
        "single spike": spike,
        "all equal": torch.full((n,), 0.1),
        "subnormal": (noise * 8).round() * SMALLEST,
        "near the maximum": torch.clamp(noise, -1, 1) * FLOAT32_MAX,
        "ties at half the scale": ties,
        "infinite": infinite,
        "nan": nan,
    }


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_all_backends_agree_on_every_length_and_special_input(sparsity: float) -> None:
    assert lc3.encode(torch.zeros(0), sparsity)[0].tolist() == [0, 0, 0, 0]
    for n in range(1, 401):
        for x in special_inputs(n).values():
            check_all_agree(x, sparsity)


@pytest.mark.parametrize("n", [4096 * 5 - 1, 4096 * 5, 4096 * 5 + 1, 65_537, 1_048_579])
def test_all_backends_agree_around_block_boundaries(n: int) -> None:
    inputs = special_inputs(n)
    for name in ("noise", "heavy tails", "single spike", "nan"):
        check_all_agree(inputs[name], 1.25)


def test_ties_at_exactly_half_the_scale_are_zero() -> None:
    frame, residual = lc3.encode(torch.tensor([1.0, 0.5, -0.5, 0.50001, -0.50001]))
    assert lc3.decode(frame, 5).tolist() == [1, 0, 0, 1, -1]
    assert residual[1:3].tolist() == [0.5, -0.5]


def test_scale_is_capped_at_the_largest_float() -> None:
    frame, residual = lc3.encode(torch.tensor([FLOAT32_MAX, -1.0]), 1.75)
    assert lc3.decode(frame, 2).tolist() == [FLOAT32_MAX, 0.0]
    assert residual.tolist() == [0.0, -1.0]


@backends
@pytest.mark.parametrize("run", [0, 1, 2, 13, 14, 15, 27, 28, 29, 30, 42, 43, 1000])
@pytest.mark.parametrize("ends", [(1, 1), (0, 1), (1, 0)])
def test_zero_runs_of_all_kinds_of_length(
    codec: ModuleType, run: int, ends: tuple[int, int]
) -> None:
    before, after = ends
    length = before + run + after
    x = torch.zeros(5, length)
    x[0, :before] = 1
    x[0, length - after :] = 1
    frame, _ = encoded(codec, x.view(-1), 1.0)
    rest = run % 14
    folded = [255] * (run // 14) + (
        [121] if rest == 1 else [241 + rest] if rest else []
    )
    assert list(frame[4:]) == [202] * before + folded + [202] * after
    assert same_bits(decoded(codec, frame, x.numel()), x.view(-1))


@backends
@pytest.mark.parametrize("n", [70, 350, 700, 1400, 2100])
def test_a_spike_costs_the_least_the_format_allows(codec: ModuleType, n: int) -> None:
    x = torch.zeros(n)
    x[0] = 1
    frame, _ = encoded(codec, x, 1.0)
    zeros = n // 5 - 1
    assert len(frame) == 4 + 1 + zeros // 14 + (zeros % 14 > 0)


@backends
def test_decode_adds(codec: ModuleType) -> None:
    frame, _ = lc3.encode(torch.tensor([2.0, 0.0, -2.0]))
    acc = torch.tensor([1.0, -0.0, 1.0])
    assert decode_add(codec, frame, acc) == len(frame)
    assert acc.tolist() == [3.0, 0.0, -1.0]
    assert acc[1].signbit()  # where the digit is 0 nothing is added, not even a zero


@backends
def test_bytes_behind_a_frame_are_left_alone(codec: ModuleType) -> None:
    frame, _ = lc3.encode(torch.randn(333))
    more = torch.cat([frame, torch.arange(50, dtype=torch.uint8)])
    assert decode_add(codec, more, torch.zeros(333)) == len(frame)


@backends
@pytest.mark.parametrize(
    ("frame", "numel", "words"),
    [
        ("", 5, "too few"),
        ("0000", 5, "too few"),
        ("0000803f", 5, "ends after 0 of 1"),
        ("0000803f79", 6, "ends after 1 of 2"),
        ("0000803ff3", 5, "crosses the end"),
        ("0000803fff", 65, "crosses the end"),
        ("0000803f00", 1, "padding"),
        ("0000803f7900", 6, "padding"),
        ("00000080", 5, "scale -0.0"),
        ("0000807f", 5, "scale inf"),
        ("000080ff", 5, "scale -inf"),
        ("000080bf79", 5, "scale -1.0"),
    ],
)
def test_a_bad_frame_is_refused_and_nothing_is_added(
    codec: ModuleType, frame: str, numel: int, words: str
) -> None:
    acc = torch.ones(numel)
    data = torch.frombuffer(bytearray.fromhex(frame) + b"\0", dtype=torch.uint8)[:-1]
    with pytest.raises(lc3.FormatError, match=words):
        decode_add(codec, data, acc)
    assert (acc == 1).all()


def outcome(codec: ModuleType, frame: bytes, numel: int) -> object:
    try:
        data = torch.frombuffer(bytearray(frame) + b"\0", dtype=torch.uint8)[:-1]
        guarded = torch.zeros(numel + 16)
        used = decode_add(codec, data, guarded[8:-8])
    except lc3.FormatError:
        return "refused"
    assert not guarded[:8].any()
    assert not guarded[-8:].any()
    return used, guarded.numpy().tobytes()


@settings(max_examples=25 * EXAMPLES)
@given(data=st.data(), x=vectors, s=st.sampled_from(SPARSITIES))
def test_backends_agree_on_damaged_frames(
    data: st.DataObject, x: np.ndarray, s: float
) -> None:
    frame = bytearray(lc3.encode(torch.from_numpy(x), s)[0].numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        at = data.draw(st.integers(0, len(frame)))
        if kind == "cut":
            del frame[at:]
        elif kind == "insert":
            frame.insert(at, data.draw(st.integers(0, 255)))
        elif at < len(frame):
            frame[at] = data.draw(st.integers(0, 255))
    expected = outcome(reference, bytes(frame), x.size)
    for codec in BACKENDS[1:]:
        assert outcome(codec, bytes(frame), x.size) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4, 5)])
def test_encode_takes_any_float_dtype_and_shape(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = x.clone()
    frame, residual = lc3.encode(x, 1.5)
    assert torch.equal(x, before)
    assert residual.shape == x.shape
    assert residual.dtype == torch.float32
    assert torch.equal(lc3.decode(frame, x.numel()).view(shape) + residual, x.float())


def test_encode_takes_strided_and_differentiable_tensors() -> None:
    x = torch.randn(6, 8, requires_grad=True).t()[::2]
    frame, residual = lc3.encode(x)
    assert residual.is_contiguous()
    assert torch.equal(lc3.decode(frame, x.numel()).view(x.shape) + residual, x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lc3.encode(torch.zeros(3), 2.0), lc3.ConfigError, r"2\.0 is outside"),
        (lambda: lc3.encode(torch.zeros(3), 0.99), lc3.ConfigError, "outside"),
        (lambda: lc3.encode(torch.zeros(3), 1.99999999), lc3.ConfigError, "as float32"),
        (lambda: lc3.encode(torch.zeros(3), float("nan")), lc3.ConfigError, "outside"),
        (lambda: lc3.encode(torch.zeros(3), True), lc3.ConfigError, "must be a number"),
        (
            lambda: lc3.encode(torch.zeros(3, dtype=torch.cfloat)),
            lc3.InputError,
            "complex",
        ),
        (
            lambda: lc3.encode(torch.zeros(3, dtype=torch.int32)),
            lc3.InputError,
            "int32",
        ),
        (lambda: lc3.encode(torch.eye(3).to_sparse()), lc3.InputError, "sparse"),
        (lambda: lc3.decode(torch.zeros(4), 3), lc3.InputError, "uint8 vector"),
        (lambda: lc3.decode(lc3.encode(torch.ones(9))[0], -1), lc3.InputError, "-1"),
        (
            lambda: lc3.decode(lc3.encode(torch.ones(10))[0], 5),
            lc3.FormatError,
            "ends after",
        ),
        (lambda: lc3.decode(lc3.encode(torch.ones(9))[0], 20), lc3.FormatError, "cut"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], words: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=words):
        call()


def test_importing_lc3_does_not_import_numba() -> None:
    code = "import sys, lc3; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def frames_of_all_densities() -> Iterator[tuple[Tensor, float]]:
    """Values of several blocks: dense and sparse blocks, runs of any length."""
    generator = torch.Generator().manual_seed(9)
    for n in (5 * 1024 - 3, 5 * 1024, 5 * 4096 + 7, 61_441, 300_000):
        for density in (0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.005, 0.0002):
            x = (torch.rand(n, generator=generator) - 0.5) * 0.9
            large = torch.rand(n, generator=generator) < density
            x[large] = 1 - 2 * (torch.rand(n, generator=generator)[large] < 0.5).float()
            yield x, 1.0
        x[: n // 2] *= 0.1  # half of the blocks without a digit
        yield x, 1.5


def test_all_backends_agree_at_every_density() -> None:
    """Dense and sparse paths of both directions: the same bits, −0.0 kept."""
    for x, sparsity in frames_of_all_densities():
        check_all_agree(x, sparsity)
        frame = data_of(encoded(reference, x, sparsity)[0])
        expected = torch.full((x.numel(),), -0.0)
        expected[::7] = 0.3
        found = expected.clone()
        decode_add(reference, frame, expected)
        for codec in BACKENDS[1:]:
            acc = found.clone()
            decode_add(codec, frame, acc)
            assert same_bits(acc, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_backends_agree_on_recorded_gradients(dtype: torch.dtype) -> None:
    """Of every task, sparsity and moment; the largest tensor of each in full."""
    largest: dict[tuple[str, float, str], Recorded] = {}
    for item in recorded():
        key = (item.task, item.sparsity, item.moment)
        if key not in largest or largest[key].x.numel() < item.x.numel():
            largest[key] = item
    tasks = {task for task, _, _ in largest}
    assert "digits" in tasks
    assert len(largest) == 6 * len(tasks)  # two sparsities at three moments
    for item in largest.values():
        check_all_agree(item.x.to(dtype).float(), item.sparsity)


def data_of(frame: bytes) -> Tensor:
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def test_a_missing_cache_only_costs_time() -> None:
    """Numba finds no folder for its cache: one notice, and the same bytes."""
    code = (
        "from numba.core.caching import CacheImpl; CacheImpl._locator_classes = [];"
        "import torch, lc3; x = torch.arange(50.0); f, r = lc3.encode(x);"
        "assert torch.equal(lc3.decode(f, 50) + r, x)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert done.stderr.count("machine code cannot be cached") == 1
    assert "NUMBA_CACHE_DIR" in done.stderr


def test_nothing_compiles_in_a_step() -> None:
    """After ``warm_up`` every kernel knows its types."""
    code = (
        "import torch; from lc3.codec import cpu, decode_add, warm_up; warm_up(cpu);"
        "kernels = [k for k in vars(cpu).values() if hasattr(k, 'signatures')];"
        "before = [len(k.signatures) for k in kernels]; assert len(kernels) > 8;"
        "x = torch.randn(100_000) ** 3; out = torch.empty(30_000, dtype=torch.uint8);"
        "\nfor s in (1.0, 1.9):\n"
        "  for r in (None, x * 0.1):\n"
        "    for d in (None, 0.02):\n"
        "      for g in (None, x * 1, x.half(), x.bfloat16()):\n"
        "        used, _ = cpu.encode(x.clone(), s, out, r, d, g)\n"
        "        decode_add(cpu, out[:used], x.clone())\n"
        "        cpu.encode_all([x.clone()] * 2, s, [out] * 2, [r] * 2, [g] * 2)\n"
        "        (used,) = cpu.check_all(out, [x.numel()], [True])\n"
        "        cpu.add_all([(x.clone(), [out[:used]])], anew=False)\n"
        "assert before == [len(k.signatures) for k in kernels]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


# Of torch's own imports, at inductor's first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_operators_compiled_by_torch_write_the_same_bytes(backend: str) -> None:
    """``torch.compile`` may fuse them; it may not change a bit."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    compiled = torch.compile(tensor.encode, backend=backend)
    try:
        for numel in (70, 333):
            generator = torch.Generator().manual_seed(numel)
            x = torch.randn(numel, generator=generator) ** 3
            owed = torch.randn(numel, generator=generator)
            ours, theirs = x.clone(), x.clone()
            out, expected = torch.zeros(2, numel, dtype=torch.uint8)
            used = reference.encode(theirs, 1.75, expected, owed)
            assert compiled(ours, 1.75, out, owed) == used
            assert torch.equal(out, expected)
            assert same_bits(ours, theirs)
    finally:
        torch._dynamo.reset()
