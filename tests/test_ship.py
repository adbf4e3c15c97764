"""Models in files: exact where it is said, within the error elsewhere, whole or not."""

import io
import json
import math
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lc3
from lc3 import __main__ as command
from lc3 import ship
from lc3.errors import ConfigError, FormatError, InputError, StateError
from lc3.ship import (
    bloomier,
    centres,
    contexts,
    model,
    planes,
    rounding,
    static,
    steps,
)
from lc3.ship import format as layout
from lc3.ship.choose import Lossy, section_of
from lc3.ship.container import digest
from tests.ship_fuzz import campaign, same_bits

DTYPES = layout.DTYPES


def of_dtype(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return a tensor of any bits that its dtype has."""
    numel = math.prod(shape)
    if not numel:
        return torch.empty(shape, dtype=dtype)
    random = np.random.default_rng(seed)
    data = torch.from_numpy(random.integers(0, 256, numel * dtype.itemsize, np.uint8))
    return (data & 1 if dtype == torch.bool else data).view(dtype).reshape(shape)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 20)]
    net = nn.Sequential(*layers)
    for _ in range(3):
        net(torch.randn(8, 1, 8, 8))
    return net


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 4, 3)])
def test_any_bits_come_back_alone_and_relative(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "m.lc3m"
    state = {"x": of_dtype(dtype, shape)}
    base = {"x": of_dtype(dtype, shape, seed=1)}
    for old in (None, base):
        ship.save(state, path, base=old)
        assert same_bits(ship.load(path, base=old)["x"], state["x"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_change_is_a_small_delta(tmp_path: Path, dtype: torch.dtype) -> None:
    numel = 4000
    old = (
        torch.arange(1, numel + 1).remainder(2).to(dtype)
        if dtype == torch.bool
        else (torch.arange(1, numel + 1).remainder(100).to(dtype))
    )
    new = old.clone()
    new.view(torch.uint8)[:: 50 * dtype.itemsize] ^= 1
    base, state = {"x": old}, {"x": new}
    small = ship.save(state, tmp_path / "delta.lc3m", base=base)
    assert small < ship.save(state, tmp_path / "whole.lc3m") or small < 300
    assert same_bits(ship.load(tmp_path / "delta.lc3m", base=base)["x"], new)


@given(
    counts=st.lists(st.integers(0, 255), min_size=2, max_size=300),
    repeat=st.integers(1, 60),
)
@settings(max_examples=60)
def test_the_static_coder_returns_its_bytes(counts: list[int], repeat: int) -> None:
    data = np.array([*counts, counts[0] ^ 1] * repeat, np.uint8)
    code = static.encode(data)
    assert (static.decode(memoryview(code), data.size) == data).all()
    expected = static.expected_bytes(np.bincount(data, minlength=256))
    assert len(code) <= 1.02 * expected + 8


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    scale=st.sampled_from([0.0, 0.3, 3.0, 1e3, 1e7]),
    seed=st.integers(0, 99),
    predicts=st.booleans(),
)
@settings(max_examples=120)
def test_the_context_coder_returns_its_numbers(
    rows: int, columns: int, scale: float, seed: int, predicts: bool
) -> None:
    random = np.random.default_rng(seed)
    numbers = np.rint(random.laplace(size=rows * columns) * scale)
    numbers = numbers.clip(-contexts.LARGEST, contexts.LARGEST).astype(np.int32)
    code = contexts.encode(numbers, rows, predicts=predicts)
    decode = partial(contexts.decode, rows=rows, predicts=predicts)
    assert (decode(memoryview(code), numbers.size) == numbers).all()
    with pytest.raises(FormatError, match=" are there"):
        decode(memoryview(code + b"\0"), numbers.size)


def test_quiet_rows_and_columns_cost_little() -> None:
    """What order 0 cannot see: activity of rows times that of columns."""
    random = np.random.default_rng(0)
    rows, columns = random.exponential(size=(80, 1)), random.exponential(size=(1, 200))
    x = np.rint(random.laplace(size=(80, 200)) * rows**2 * columns**2)
    numbers = x.astype(np.int32).reshape(-1)
    _, counts = np.unique(numbers, return_counts=True)
    order_0 = float((counts * np.log2(numbers.size / counts)).sum()) / 8
    assert len(contexts.encode(numbers, 80)) < 0.85 * order_0
    plain = np.rint(random.laplace(size=16000) * 2).astype(np.int32)
    _, counts = np.unique(plain, return_counts=True)
    order_0 = float((counts * np.log2(plain.size / counts)).sum()) / 8
    assert len(contexts.encode(plain, 80)) < 1.03 * order_0


def test_rows_that_are_combinations_of_others_cost_little() -> None:
    """As those of a gradient of a small batch; rows of noise cost no more."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 16)) @ random.normal(size=(16, 300)) * 2
    for rows, most in ((x, 0.7), (random.normal(size=x.shape) * 8, 1.01)):
        numbers = np.rint(rows).astype(np.int32).reshape(-1)
        plain = len(contexts.encode(numbers, 200))
        code = contexts.encode(numbers, 200, predicts=True)
        assert len(code) < most * plain
        found = contexts.decode(memoryview(code), numbers.size, 200, predicts=True)
        assert (found == numbers).all()
    assert contexts.encode(numbers, 1, predicts=True) == contexts.encode(numbers, 1)


@pytest.mark.parametrize("largest", [3, 40_000, contexts.LARGEST])
def test_the_filter_is_that_of_the_format(largest: int) -> None:
    """Written out with Python's integers, of 70 rows, so that places are reused."""
    random = np.random.default_rng(largest)
    matrix = random.integers(-largest, largest + 1, (70, 5)).tolist()
    filtered = contexts._Filter(np.zeros((5, 64), np.int16), np.zeros(64, np.int32))
    for r, row in enumerate(matrix):
        weights = [0] * 64
        filtered.weights[:] = 0
        for c, number in enumerate(row):
            before: list[int] = [matrix[b][c] for b in range(max(0, r - 64), r)]
            seen = [min(max(x, -32767), 32767) for x in before]
            at = [b % 64 for b in range(max(0, r - 64), r)]
            total = sum(weights[k] * x for k, x in zip(at, seen, strict=True)) // 2**8
            expected = min(max(total, -(2**23)), 2**23)
            energy = 4 + sum(x * x for x in seen)
            assert contexts._expected(filtered, c) == (expected, energy)
            error = 256 * min(max(number, -32767), 32767) - expected
            gain = 15360 * error // energy
            for k, x in zip(at, seen, strict=True):
                weights[k] = (weights[k] + gain * x // 2**8 + 2**31) % 2**32 - 2**31
            off = contexts._learn(filtered, c, r, number, expected, energy)
            assert off == abs(error)
            assert filtered.weights.tolist() == weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_value_is_off_by_more_than_the_error(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {
        n: t.to(dtype) if t.is_floating_point() else t
        for n, t in network().state_dict().items()
    }
    for error in (1e-1, 1e-3, 1e-7):
        ship.save(state, tmp_path / "m.lc3m", error=error)
        found = ship.load(tmp_path / "m.lc3m")
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype
            off = (found[name].double() - tensor.double()).abs().max()
            assert off <= error, name
            if not tensor.is_floating_point():
                assert same_bits(found[name], tensor)


def test_what_is_not_finite_stays_exact_and_variances_stay_positive(
    tmp_path: Path,
) -> None:
    state = {
        "w": torch.tensor([[1.0, math.inf], [math.nan, -2.0]]),
        "running_var": torch.tensor([1e-4, 3.0, 50.0]),
        "zero": torch.zeros(5),
        "zeros": torch.zeros(50, 40),
    }
    ship.save(state, tmp_path / "m.lc3m", step=0.5)
    found = ship.load(tmp_path / "m.lc3m")
    assert same_bits(found["w"], state["w"])
    assert same_bits(found["zero"], state["zero"])
    assert same_bits(found["zeros"], state["zeros"])
    ratio = found["running_var"] / state["running_var"]
    assert 0.9 < ratio.min() <= ratio.max() < 1.1


@pytest.mark.parametrize("bits", [1.0, 3.0, 8.0])
def test_a_file_has_the_bits_that_were_asked_for(tmp_path: Path, bits: float) -> None:
    torch.manual_seed(0)
    state = {"a": torch.randn(60, 300), "b": 0.3 * torch.randn(90, 90)}
    numel = 60 * 300 + 90 * 90
    written = ship.save(state, tmp_path / "m.lc3m", bits=bits)
    assert written == (tmp_path / "m.lc3m").stat().st_size
    assert 0.98 * bits < 8 * written / numel <= bits


def quiet_rows(rows: int, columns: int) -> np.ndarray:
    random = np.random.default_rng(0)
    active = random.exponential(size=(rows, 1)) * random.exponential(size=(1, columns))
    return np.asarray(random.laplace(size=(rows, columns)) * active)


@given(seed=st.integers(0, 99), step=st.sampled_from([0.3, 1.0, 4.0]))
@settings(max_examples=30)
def test_without_a_weight_each_value_gets_the_nearest_number(
    seed: int, step: float
) -> None:
    x = np.random.default_rng(seed).laplace(size=(7, 30)).reshape(-1)
    found = rounding.cheapest(x, 7, step, 0.0)
    assert (found == np.rint(x / step)).all()
    cheap = rounding.cheapest(x, 7, step, 0.2)
    near = np.minimum(abs(x / step - cheap), abs(x / step))
    assert ((near <= 2) & (abs(cheap) <= abs(found) + 1)).all()
    assert (cheap * x >= 0).all()


def test_a_number_is_the_cheapest_of_all_by_the_bits_that_were_counted() -> None:
    """The chosen numbers are those of a search of every number, in Python."""
    x, step, weight = np.array([0.0, 0.4, 0.6, -1.4, 1.6, -2.4, 30.0]), 1.0, 0.2
    bits = np.random.default_rng(0).random((24, 16)) * 6
    numbers, counts = np.empty(x.size, np.int32), np.zeros((24, 16))
    rounding.choose(
        x, np.zeros(1), np.full(x.size, 3.0), step, weight, bits, numbers, counts
    )

    def cost(value: float, number: int) -> float:
        rate = bits[3, min(number, 15)] + 2 * max(0.0, math.log2(max(number, 1) / 15))
        return float((abs(value) / step - number) ** 2 + weight * rate)

    for value, number in zip(x, numbers, strict=True):
        around = {0, *range(max(0, int(abs(value)) - 1), int(abs(value)) + 2)}
        assert abs(number) == min(around, key=lambda k: cost(value, k))
    assert counts[3].sum() == x.size
    assert counts.sum() == x.size


def test_cheap_numbers_have_less_error_in_a_file_of_as_many_bits(
    tmp_path: Path,
) -> None:
    state = {"w": torch.from_numpy(quiet_rows(200, 300)).float()}
    off = {}
    for weight in (0.0, 0.05, 0.1, None):
        ship.save(state, tmp_path / "m.lc3m", bits=1.0, rate_weight=weight)
        found = ship.load(tmp_path / "m.lc3m")["w"]
        off[weight] = float((found - state["w"]).square().sum())
    assert off[None] == off[0.05] < 0.95 * off[0.0]
    assert off[0.1] < off[0.05]
    ship.save(state, tmp_path / "m.lc3m", step=1.0)
    found = ship.load(tmp_path / "m.lc3m")["w"]
    assert (found - state["w"]).abs().max() <= 0.5001  # step alone: the nearest


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.randn(50, 40)
    state = {"a": weight, "b": weight, "view": weight.t()}
    ship.save(state, tmp_path / "m.lc3m")
    found = ship.load(tmp_path / "m.lc3m")
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert found["view"].data_ptr() != found["a"].data_ptr()
    assert all(torch.equal(found[name], state[name]) for name in state)
    (tied,) = [r for r in ship.rows(tmp_path / "m.lc3m") if r.stored_bytes == 0]
    assert tied.coding == "tied to a"
    assert torch.equal(ship.load(tmp_path / "m.lc3m", names=["b"])["b"], weight)


def test_one_tensor_is_read_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "m.lc3m"
    ship.save({"a": torch.randn(30, 30), "b": torch.arange(7)}, path)
    data = bytearray(path.read_bytes())
    data[layout.HEADER.size + 5] ^= 1  # in the section of a
    path.write_bytes(data)
    assert ship.load(path, names=["b"])["b"].tolist() == list(range(7))
    with pytest.raises(FormatError, match=r"section of 'a' in .* is damaged"):
        ship.load(path)
    with pytest.raises(KeyError, match="has no tensor 'c'"):
        ship.load(path, names=["c"])


def test_a_delta_needs_its_own_base(tmp_path: Path) -> None:
    old, new = {"w": torch.randn(40, 40)}, {"w": torch.randn(40, 40)}
    torch.save(old, tmp_path / "old.pt")
    torch.save(new, tmp_path / "new.pt")
    patch = tmp_path / "patch.lc3m"
    ship.save(new, patch, base=tmp_path / "old.pt", step=0.1)
    with pytest.raises(StateError, match=r"is a delta to 'old.pt' .*; give it as base"):
        ship.load(patch)
    with pytest.raises(StateError, match=r"delta to 'old.pt'.* given, 'new.pt', is"):
        ship.load(patch, base=tmp_path / "new.pt")
    found = ship.load(patch, base=old)["w"]
    assert (found - new["w"]).abs().max() < 0.051
    ship.save(new, tmp_path / "whole.lc3m")
    with pytest.raises(StateError, match="stands alone; load it without the base"):
        ship.load(tmp_path / "whole.lc3m", base=old)
    with pytest.raises(StateError, match=r"is a delta to 'old.pt' itself"):
        ship.save(new, tmp_path / "x.lc3m", base=patch)


def test_a_hundred_deltas_do_not_drift(tmp_path: Path) -> None:
    """The sender goes on from what the receiver has decoded."""
    torch.manual_seed(0)
    exact = {
        "w": torch.randn(8, 6),
        "conv": torch.randn(4, 2, 3, 3),
        "n": torch.ones(3),
    }
    path = tmp_path / "delta.lc3m"
    sender = {name: torch.zeros_like(t) for name, t in exact.items()}
    receiver = sender
    for _ in range(100):
        exact = {n: t + 0.05 * torch.randn_like(t) for n, t in exact.items()}
        ship.save(exact, path, base=sender, step=0.05)
        sender = ship.load(path, base=sender)
        receiver = ship.load(path, base=receiver)
        assert all(same_bits(sender[n], receiver[n]) for n in exact)
    assert max((sender[n] - exact[n]).abs().max().item() for n in exact) < 0.1


def test_the_digest_is_of_names_shapes_and_bits() -> None:
    one = digest({"a": torch.zeros(2, 3), "b": torch.ones(2)})
    assert one == digest({"b": torch.ones(2), "a": torch.zeros(2, 3)})
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3).to(torch.int32), "b": torch.ones(2)},
        {"a": -torch.zeros(2, 3), "b": torch.ones(2)},
    ]
    assert len({one, *map(digest, others)}) == 5


def test_dither_is_uniform_and_independent_of_what_is_coded() -> None:
    """Error variance Δ²/12 within 1 %, correlation below 0.01, for any source."""
    random = np.random.default_rng(0)
    n = 100_000
    sources = {
        "constant": np.full(n, 0.3),
        "laplace": random.laplace(size=n),
        "sparse": random.standard_normal(n) * (random.random(n) < 0.05),
    }
    for name, x in sources.items():
        for width in (0.25, 1.0, 4.0):
            how = steps.Steps(width, seed=1234)
            numbers = steps.quantize(x, how)
            assert numbers is not None
            error = steps.dequantize(numbers, x.shape, how).numpy() - x
            assert abs(error.var() * 12 / width**2 - 1) < 0.01, name
            if x.std():
                assert abs(np.corrcoef(error, x)[0, 1]) < 0.01, name


def test_the_errors_of_sixteen_senders_average_out_unless_they_share_a_seed() -> None:
    x = np.random.default_rng(0).standard_normal(50_000)

    def error(seeds: list[int]) -> float:
        decoded = []
        for seed in seeds:
            how = steps.Steps(1.0, seed=seed)
            numbers = steps.quantize(x, how)
            assert numbers is not None
            decoded.append(steps.dequantize(numbers, x.shape, how).numpy())
        return float(np.square(np.mean(decoded, axis=0) - x).mean() * 12)

    assert error(list(range(16))) == pytest.approx(1 / 16, rel=0.05)
    assert error([3] * 16) == pytest.approx(1, rel=0.05)


def test_dither_is_what_the_specification_says() -> None:
    def one(seed: int, i: int) -> float:
        mask = (1 << 64) - 1
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 32) / 2**32 + 0.5 / 2**32 - 0.5

    found = steps.dither(2**63 + 5, 50)
    assert found.tolist() == [one(2**63 + 5, i) for i in range(50)]


def section_bytes(x: Tensor, **how: Any) -> int:
    lossy = Lossy(step=0.5, **how)
    return len(section_of("x", x, None, lossy).data)


def test_the_dct_is_taken_where_it_saves_and_costs_nothing_elsewhere() -> None:
    torch.manual_seed(0)
    smooth = torch.randn(30, 8, 1, 1) + 0.1 * torch.randn(30, 8, 5, 5)
    rough = torch.randn(30, 8, 5, 5)
    saved = section_bytes(smooth, transform=False) - section_bytes(smooth)
    assert 8 * saved / smooth.numel() > 0.4
    assert section_bytes(rough) <= section_bytes(rough, transform=False)
    wave = torch.randn(40, 1) * torch.cos(torch.arange(64) / 9)
    wave = wave + 0.05 * torch.randn(40, 64)
    assert section_bytes(wave, spatial={"x": 1}) < 0.8 * section_bytes(wave)


def test_centres_are_taken_where_values_are_shared() -> None:
    x = torch.tensor([0.1, 0.7, -0.3])[torch.arange(900) * 7 % 3]
    section = section_of("x", x, None, Lossy(step=1.0))
    assert section.coding == layout.CENTRES
    assert torch.equal(section.decoded, x)
    assert len(section.data) < section_bytes(x, cluster=False)
    values, numbers = centres.cluster(x.double().numpy(), 256)
    assert values.size == 3
    assert (values[numbers] == x.numpy()).all()


@pytest.mark.parametrize("more", range(1, 7))
def test_a_filter_is_exact_where_it_holds_and_false_as_often_as_said(more: int) -> None:
    random = np.random.default_rng(more)
    for n in (1, 1000, 30_000):
        keys = random.choice(10 * n, n, replace=False).astype(np.int64)
        values = random.integers(0, 16, n).astype(np.uint32)
        table = bloomier.build(keys, values, 4, 4 + more)
        assert table.seed < 3
        assert (bloomier.query(table, keys) == values).all()
    others = np.arange(10 * n, 50 * n)
    share = (bloomier.query(table, others) < 16).mean()
    assert share == pytest.approx(bloomier.false_share(4, 4 + more), rel=0.05)


def test_pruned_weights_in_a_filter_survive_and_take_more_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randint(1, 15, (300, 200)).float()
    weight *= torch.rand(300, 200) < 0.05
    path = tmp_path / "m.lc3m"
    filtered = ship.save({"w": weight}, path, step=1.0, indices="bloomier")
    found = ship.load(path)["w"]
    kept = weight != 0
    assert torch.equal(found[kept], weight[kept])
    assert (found[~kept] != 0).double().mean().item() == pytest.approx(
        14 / 512, rel=0.1
    )
    assert filtered > ship.save({"w": weight}, path, step=1.0)
    assert bloomier.break_even(0.05, 4) > 1  # more false weights than true ones


def test_the_worked_example_is_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "m.lc3m"
    ship.save({"w": torch.tensor([1.0, -2.0])}, path)
    text = layout.__doc__ or ""
    lines = text.partition("Worked example:")[2].splitlines()
    found = path.read_bytes()
    said = []
    for line in lines[2:]:
        for word in line.split():
            if len(word) != 2 or not set(word) <= set("0123456789abcdefx"):
                break
            said.append(None if word == "xx" else int(word, 16))
    assert len(said) == len(found) - 8
    pairs = zip(said, found, strict=False)
    assert all(byte is None or byte == real for byte, real in pairs)
    assert found.endswith(b"M3CL")


GOLDEN = [Path(__file__).parent / f"golden/{n}.json" for n in ("ship", "predictive")]


@pytest.mark.parametrize(
    "case",
    [case for path in GOLDEN for case in json.loads(path.read_text())],
    ids=lambda c: c["name"],
)
def test_golden_files_load_as_they_did(tmp_path: Path, case: dict[str, Any]) -> None:
    from tests.golden.__main__ import ship_base

    path = tmp_path / "m.lc3m"
    path.write_bytes(bytes.fromhex(case["file"]))
    base = ship_base() if case["delta"] else None
    found = ship.load(path, base=base)
    assert sorted(found) == sorted(case["tensors"])
    for name, data in case["tensors"].items():
        flat = found[name].contiguous().reshape(-1).view(torch.uint8)
        assert flat.numpy().tobytes().hex() == data, name


def test_files_of_torch_and_safetensors_and_shards(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = {**network().state_dict(), "half": torch.randn(3, 5).to(torch.bfloat16)}
    torch.save(state, tmp_path / "m.pt")
    notes = {"format": "pt", "by": "a test"}
    safetensors.save_file(state, tmp_path / "m.safetensors", metadata=notes)
    names = sorted(state)
    for part, chosen in (("one", names[:4]), ("two", names[4:])):
        some = {name: state[name] for name in chosen}
        safetensors.save_file(some, tmp_path / f"{part}.safetensors")
    where = {
        n: "one.safetensors" if n in names[:4] else "two.safetensors" for n in names
    }
    index = tmp_path / "s.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for source in ("m.pt", "m.safetensors", index.name):
        shipped = tmp_path / "m.lc3m"
        assert command.main(["ship", str(tmp_path / source), "-o", str(shipped)]) == 0
        for target in ("out.safetensors", "out.pt"):
            out = tmp_path / target
            assert command.main(["unship", str(shipped), "-o", str(out)]) == 0
            found = (
                safetensors.load_file(out)
                if out.suffix == ".safetensors"
                else torch.load(out, weights_only=True)
            )
            assert sorted(found) == names
            assert all(same_bits(found[name], state[name]) for name in names)
        if source == "m.safetensors":
            with model.opened(shipped) as again:
                assert again.notes == notes  # type: ignore[attr-defined]
    where[names[0]] = "three.safetensors"
    index.write_text(json.dumps({"weight_map": where}))
    assert command.main(["ship", str(index), "-o", str(tmp_path / "x.lc3m")]) == 2
    index.write_text(json.dumps({"weight_map": {"w": "../m.safetensors"}}))
    assert command.main(["ship", str(index), "-o", str(tmp_path / "x.lc3m")]) == 2
    assert not (tmp_path / "x.lc3m").exists()


def test_the_commands_ship_a_delta_and_show_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = network().state_dict(), network().state_dict()
    new["0.weight"] += 0.01
    torch.save(old, tmp_path / "old.pt")
    torch.save(new, tmp_path / "new.pt")
    patch, out = tmp_path / "patch.lc3m", tmp_path / "out.pt"
    base = ["--base", str(tmp_path / "old.pt")]
    ship_it = ["ship", str(tmp_path / "new.pt"), *base, "-o", str(patch)]
    assert command.main([*ship_it, "--error", "1e-3"]) == 0
    assert command.main(["inspect", str(patch)]) == 0
    said = capsys.readouterr().out
    assert "0.weight" in said
    assert "4×1×3×3" in said
    assert "delta" in said
    assert command.main(["unship", str(patch), *base, "-o", str(out)]) == 0
    found = torch.load(out, weights_only=True)
    assert all((found[n] - new[n]).abs().max() <= 1e-3 for n in new)
    assert command.main(["unship", str(patch), "-o", str(out)]) == 2
    assert "is a delta to 'old.pt'" in capsys.readouterr().err


def _bad(**choices: Any) -> Callable[[Path], object]:
    return lambda path: ship.save({"w": torch.ones(3, 3)}, path, **choices)


@pytest.mark.parametrize(
    ("job", "kind", "words"),
    [
        (_bad(bits=1, error=1), ConfigError, "bits and error both set the step"),
        (_bad(step=0.0), ConfigError, r"step=0\.0 must be a number above 0"),
        (_bad(step=math.nan), ConfigError, "step=nan must be a number above 0"),
        (_bad(lossless=True, step=1.0), ConfigError, "lossless=True and step contra"),
        (_bad(rate_weight=2, bits=8), ConfigError, "rate_weight=2 must be a number fr"),
        (_bad(rate_weight=0.1, error=1), ConfigError, "give bits or step with it"),
        (
            _bad(rate_weight=0.1, step=1.0, dither_seed=1),
            ConfigError,
            "make the error depend on the weights",
        ),
        (_bad(coder="lzma"), ConfigError, "coder='lzma' must be one of context, zstd"),
        (_bad(indices="x"), ConfigError, "indices='x' must be 'exact' or 'bloomier'"),
        (_bad(indices="bloomier"), ConfigError, "give a step with it"),
        (_bad(dither_seed=-1, step=1.0), ConfigError, "dither_seed=-1 is not from 0"),
        (_bad(dither_seed=1), ConfigError, "dither_seed changes nothing"),
        (_bad(spatial={"w": 2}, step=1.0), ConfigError, "names axis 2 of 'w'"),
        (_bad(bits=0.01), ConfigError, "more than the .* ask for more bits"),
        (lambda p: ship.save({"w": 3}, p), InputError, "'w' is of int, not a tensor"),  # type: ignore[dict-item]
        (lambda p: ship.save({"m": {}}, p), InputError, "ship the state_dict in it"),  # type: ignore[dict-item]
        (
            lambda p: ship.save({"w": torch.eye(2).to_sparse()}, p),
            InputError,
            "torch.sparse_coo .* convert it first",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_leaves_the_old_file(
    tmp_path: Path, job: Any, kind: type[Exception], words: str
) -> None:
    path = tmp_path / "m.lc3m"
    path.write_bytes(b"old")
    with pytest.raises(kind, match=words):
        job(path)
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["m.lc3m"]


def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.lc3m"
    state = {"a": torch.randn(100), "b": torch.randn(100)}
    ship.save({"a": torch.ones(1)}, path)

    def full(self: Any, name: str, *_: Any) -> Any:
        if name == "b":
            raise OSError(28, "No space left on device")
        return real(self, name, *_)

    real: Any = model.Writer.add
    monkeypatch.setattr(model.Writer, "add", full)
    with pytest.raises(OSError, match="No space left"):
        ship.save(state, path)
    assert ship.load(path)["a"].tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 1


def sealed(sections: bytes, index: bytes, flags: int = 0) -> bytes:
    """Return a file whose checksums are right."""
    head = struct.pack("<4sBBH", b"LC3M", 1, flags, 0)
    end = layout.trailer(head, index, 8 + len(sections))
    return head + sections + index + end


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes are too few for a shipped model"),
        (b"x" * 100, "does not end as a shipped model does"),
        (sealed(b"", b"\0\0")[:-1], "does not end as a shipped model"),
        (sealed(b"", b"\0\0", 2), "flags 0x2 and 0x0 are not of format 1"),
        (sealed(b"", b"\0\1"), "ends where 1 more are due"),
        (sealed(b"", b"\0\0\0"), "1 bytes are left behind the index"),
        (sealed(b"x", b"\0\0"), "sections end at 8, but the index begins at 9"),
        (sealed(b"", b"\0\x80\0"), "a number that is longer than need be"),
        (sealed(b"", b"\0\1\1\xff\0\0\1\0" + bytes(4)), "a name that is no UTF-8"),
        (sealed(b"", b"\0\1\1a\x63\0\1\0" + bytes(4)), "dtype 99"),
        (sealed(b"", b"\0\1\1a\0\x21"), "33 dimensions, more than 32"),
        (sealed(b"", b"\0\1\1a\0\0\x09"), "coding 9, which is none of format 1"),
        (sealed(b"", b"\0\1\1a\0\0\x81"), "coding 129, which is none of format 1"),
        (sealed(b"", b"\0\1\1a\0\0\0\0"), "tied to entry 0, which stores nothing"),
        (
            sealed(b"", b"\0\1\1a\0\1\x80\x80\x80\x80\x08\1\0" + bytes(4)),
            "takes 8,589,934,592 bytes, more than 65,536 for each of the 0",
        ),
    ],
)
def test_a_hostile_file_is_a_format_error(
    tmp_path: Path, data: bytes, words: str
) -> None:
    path = tmp_path / "m.lc3m"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words):
        ship.load(path)


def test_ship_is_there_without_an_import() -> None:
    assert lc3.ship.save is ship.save


def test_planes_refuse_what_they_do_not_write() -> None:
    for data, words in {
        b"\x09\0": "mode 9 and 0 bytes does not hold 2",
        b"\0\1a": "mode 0 and 1 bytes does not hold 2",
        b"\1\1a": "a zstd frame is damaged",
        b"\2\1\2": "a bool of a section is neither 0 nor 1",
        b"\2\1\1\1": "1 bytes are left behind",
        b"\3\1a": "ends where 32 more are due",
    }.items():
        with pytest.raises(FormatError, match=words):
            planes.decode(data, torch.bool, (2,), None)


def test_a_short_campaign_of_damaged_files() -> None:
    """``make fuzz`` tries a hundred thousand."""
    said = campaign(1500, seed=1)
    assert said["file"]["refused"] > 400
    for kind in ("index", "section"):
        assert min(said[kind].values()) > 0, said


@pytest.mark.parametrize("size", [0, 1025, 1 << 20])
def test_a_transform_over_no_axis_or_a_long_one_is_refused(size: int) -> None:
    """Its matrix would have no element, or as many as the square of the axis."""
    with pytest.raises(FormatError, match=rf"over axes of \[{size}\] elements"):
        steps.axes_of(2, (size, 3))


def test_long_axes_are_shipped_without_a_transform(tmp_path: Path) -> None:
    state = {"w": torch.randn(1, 1, 2000), "empty": torch.zeros(0, 3)}
    ship.save(state, tmp_path / "m.lc3m", error=0.01, spatial={"empty": 0})
    found = ship.load(tmp_path / "m.lc3m")
    assert float((found["w"] - state["w"]).abs().max()) <= 0.01
    with pytest.raises(ConfigError, match="2000 elements, more than 1024"):
        ship.save(state, tmp_path / "m.lc3m", error=0.01, spatial={"w": 2})


def large_values(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(5)
    state = {"w": torch.randn(300, 300) * 0.02}
    if kind == "outlier":
        state["w"][7, 7] = 1e3
    elif kind == "constant":
        state["w"] = torch.full((300, 300), 0.3)
    elif kind == "tiny":
        state["w"] = state["w"].double() * 1e-200
    else:
        state["mask"] = torch.full((64, 64), float(kind)).triu(1)
    return state


@pytest.mark.parametrize("kind", ["-3.4028e38", "-1e9", "-1e4", "outlier"])
def test_a_few_large_values_do_not_take_the_bits_of_the_others(
    tmp_path: Path, kind: str
) -> None:
    state = large_values(kind)
    path = tmp_path / "m.lc3m"
    written = ship.save(state, path, bits=4)
    values = sum(t.numel() for t in state.values())
    assert 0.9 * 4 * values / 8 < written <= 4 * values / 8
    error = (ship.load(path)["w"] - state["w"]).abs()
    assert error.mean() < 0.15 * state["w"].abs().median()


@pytest.mark.parametrize(("kind", "bits"), [("constant", 2), ("tiny", 60)])
def test_where_bits_are_left_nothing_is_lost(
    tmp_path: Path, kind: str, bits: float
) -> None:
    state = large_values(kind)
    ship.save(state, tmp_path / "m.lc3m", bits=bits)
    assert torch.equal(ship.load(tmp_path / "m.lc3m")["w"], state["w"])


@pytest.mark.parametrize("bits", [16, 20])
def test_many_bits_are_given_too(tmp_path: Path, bits: float) -> None:
    written = ship.save(large_values("0"), tmp_path / "m.lc3m", bits=bits)
    assert 0.95 * bits < 8 * written / (300 * 300 + 64 * 64) <= bits


def test_where_no_step_is_between_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = large_values("0")
    state["w"][7, 7] = 1e30
    ship.save(state, tmp_path / "m.lc3m", bits=4)
    assert "some values are so much larger" in caplog.text


@pytest.mark.parametrize("quiet", ["inner", "outer"])
def test_rows_that_are_not_like_the_others_do_not_set_the_step(
    tmp_path: Path, quiet: str
) -> None:
    w = torch.randn(6000, 100) * 0.02
    if quiet == "inner":
        w[1500:4500] = 0
    else:
        w[:2000] = w[4000:] = 0
    written = ship.save({"w": w}, tmp_path / "m.lc3m", bits=2)
    assert 0.95 * 2 < 8 * written / w.numel() <= 2


def test_a_model_with_a_mask_is_fitted() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(40, 40))
    net.register_buffer("mask", torch.full((16, 16), -1e9).triu(1))
    x = torch.randn(64, 40)
    y = net(x).detach()
    plan = ship.fit(net, lambda n: -float((n(x) - y).abs().mean()), drop=0.05)
    assert plan.score >= -0.05
    assert plan.bits < 12


def test_conjugates_and_negatives_are_stored_as_they_are(tmp_path: Path) -> None:
    x = torch.randn(3, 3, dtype=torch.complex64)
    state = {"a": x, "b": x.conj(), "c": x.imag, "d": x.conj().imag, "e": x}
    ship.save(state, tmp_path / "m.lc3m")
    found = ship.load(tmp_path / "m.lc3m")
    assert all(torch.equal(found[name], state[name]) for name in state)
    ship.save({"b": x.conj()}, tmp_path / "m.lc3m")
    assert torch.equal(ship.load(tmp_path / "m.lc3m")["b"], x.conj())


def test_a_delta_does_not_take_the_place_of_its_base(tmp_path: Path) -> None:
    path = tmp_path / "m.lc3m"
    ship.save({"w": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="is the base itself"):
        ship.save({"w": torch.zeros(3)}, path, base=path)
    assert path.read_bytes() == before


def test_a_file_is_as_long_as_when_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "m.lc3m", tmp_path / "n.lc3m"
    ship.save({"w": torch.ones(3)}, path)
    ship.save({"w": torch.randn(300)}, other)
    opened: Any = Path.open

    def replaced(self: Path, mode: str = "r") -> Any:
        file = opened(self, mode)
        if self == path:
            other.rename(path)
        return file

    monkeypatch.setattr(Path, "open", replaced)
    assert torch.equal(ship.load(path)["w"], torch.ones(3))


class Wrapped(Tensor):
    @classmethod
    def __torch_dispatch__(cls, f: Any, _: Any, a: Any = (), k: Any = None) -> Any:
        return f(*a, **(k or {}))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({0: torch.ones(1)}, "a tensor is named 0; names must be strings"),
        ({"\ud800": torch.ones(1)}, "no name that UTF-8 has; rename it"),
        (torch.nn.LazyLinear(3).state_dict(), "has no shape yet"),
        ({"w": torch.ones(2).as_subclass(Wrapped)}, "'w' is a Wrapped, which says"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_named(
    tmp_path: Path, state: Any, words: str
) -> None:
    path = tmp_path / "m.lc3m"
    with pytest.raises(InputError, match=words):
        ship.save(state, path)
    with pytest.raises(InputError, match=words):
        ship.save({"w": torch.ones(1)}, path, base=state)
    assert not path.exists()


def test_files_that_cannot_be_read_or_written_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        assert command.main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    whole, cut, out = tmp_path / "m.pt", tmp_path / "cut.pt", tmp_path / "m.lc3m"
    torch.save({"w": torch.randn(300, 300)}, whole)
    cut.write_bytes(whole.read_bytes()[:50_000])
    assert f"{cut} cannot be read without" in said("ship", cut, "-o", out)
    torch.save({"w": torch.eye(3).to_sparse()}, whole)
    assert "convert it first" in said("ship", whole, "-o", out)
    torch.save({0: torch.ones(3)}, cut)
    torch.save({"w": torch.ones(3)}, whole)
    assert "names must be strings" in said("ship", whole, "--base", cut, "-o", out)
    torch.save({"__metadata__": torch.ones(3)}, whole)
    assert command.main(["ship", str(whole), "-o", str(out)]) == 0
    target = tmp_path / "m.safetensors"
    assert "no name of a tensor in safetensors" in said("unship", out, "-o", target)
    assert not target.exists()
    torch.save({"w": torch.ones(3)}, tmp_path / "bad\udcff.pt")
    assert "rename the file" in said("ship", tmp_path / "bad\udcff.pt", "-o", out)
    with pytest.raises(ConfigError, match="give a list"):
        ship.load(out, names="w")
    with pytest.raises(ConfigError, match="both must be strings"):
        ship.save({"w": torch.ones(1)}, out, notes={"a": 3})  # type: ignore[dict-item]
    x = torch.full((1, 9), math.nan)
    with pytest.raises(ConfigError, match="'w' has values that are not finite"):
        ship.save({"w": torch.cat([torch.randn(99, 9), x])}, out, bits=0.1)


def test_a_table_has_what_the_terminal_can_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.lc3m"
    ship.save({"a\x1b[1m\nb": torch.ones(2, 2)}, path)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert command.main(["inspect", str(path)]) == 0
    out.seek(0)
    assert r"a\x1b[1m\nb" in out.read()
