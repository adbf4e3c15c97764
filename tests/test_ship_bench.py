"""The comparison's own parts: Huffman bytes, memory, and tables from rows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ship import bench as ship_bench
from experiments.ship import equal as ship_equal
from experiments.ship import huffman
from experiments.ship import memory as ship_memory
from experiments.ship import tables as ship_tables
from experiments.ship import works as ship_works


@given(st.lists(st.sampled_from([0] * 30 + [1, -2, 3]), min_size=1, max_size=900))
def test_gaps_and_values_are_the_numbers(numbers: list[int]) -> None:
    gaps, values = huffman.streams(np.array(numbers, np.int32))
    assert gaps.size == values.size
    assert (gaps <= huffman.LARGEST_GAP).all()
    found = np.zeros(len(numbers), np.int64)
    at = -1
    for gap, value in zip(gaps, values, strict=True):
        at += int(gap) + 1
        found[at] = value
    assert found.tolist() == numbers


def test_a_huffman_code_has_the_lengths_of_the_textbook() -> None:
    assert huffman.stream_bits(np.array([0, 0, 0, 1, 2])) == 3 * 1 + 2 + 2
    assert huffman.stream_bits(np.array([7, 7])) == 2
    equal = np.arange(64).repeat(3)
    assert huffman.stream_bits(equal) == equal.size * 6


def test_a_table_has_the_columns_that_its_rows_have() -> None:
    rows = [
        {k: str(v) for k, v in ship_tables.row("coder", "net", "x", bits=1.5).items()},
        {k: str(v) for k, v in ship_tables.row("file", "net", "y", bytes=2000).items()},
    ]
    assert ship_tables.table(rows, "coder") == (
        "| network | what | bits a value |\n| --- | --- | ---: |\n| net | x | 1.500 |\n"
    )
    assert "| net | y | 2,000 |" in ship_tables.table(rows, "file")
    with pytest.raises(AssertionError):
        ship_tables.row("coder", "net", "x", speed=3)


@pytest.mark.parametrize("way", ["exact", "steps, zstd"])
def test_a_file_streams_with_two_of_its_largest_tensors_beside_it(
    tmp_path: Path, way: str
) -> None:
    source, megabytes, tensors = tmp_path / "m.safetensors", 96, 6
    ship_memory.write(source, megabytes, tensors)
    promised = ship_memory.MB * (megabytes + 2 * megabytes / tensors)
    # Chunks, compiled code and what malloc keeps differ by some MB from run to run.
    buffers = 8 * ship_memory.MB
    assert ship_memory.measured(source, way)["peak_bytes"] <= promised + buffers
    shipped = tmp_path / "shipped.lc3m"
    back = ship_memory.measured(shipped, way, back=True)
    largest = ship_memory.MB * megabytes / tensors
    limit = shipped.stat().st_size + 2 * largest + buffers
    assert back["peak_bytes"] <= limit
    assert back["nbytes"] > ship_memory.MB * megabytes


def test_bytes_at_equal_loss_are_of_a_curve_made_monotone() -> None:
    points = [(100, 0.0), (80, 0.4), (64, 0.2), (50, 1.3), (40, 2.3)]
    curve = [ship_equal.Point(n, drop, 100 / n) for n, drop in points]
    # 80 and 64 bytes lose 0.3 both; half way to 1.3 is half way in the logarithm.
    assert ship_equal.at(curve, "drop", 0.8) == pytest.approx((64 * 50) ** 0.5)
    assert ship_equal.at(curve, "error", 100 / 80) == pytest.approx(80)
    assert np.isnan(ship_equal.at(curve, "drop", 2.4))
    assert np.isnan(ship_equal.at(curve, "error", 0.5))


def test_what_was_not_measured_is_said_to_be_so() -> None:
    assert ship_works.table([]).count(ship_works.NONE) == 12
    made = [
        ship_tables.row("coder", "n", "weights, step 1 σ", ratio=0.9),
        ship_tables.row("coder", "n", "gradient, step 1 σ", ratio=0.5),
        ship_tables.row("non-zero", "n", "5%, context coder", bytes=100),
        ship_tables.row("non-zero", "n", "5%, Bloomier filter", bytes=150),
        ship_tables.row("kfac", "n", "95% gone, K-FAC", drop=2.5),
    ]
    rows = [{key: str(value) for key, value in one.items()} for one in made]
    text = ship_works.table(rows)
    assert "deltas take 0.50, weights 0.90" in text
    assert "1.50 times the exact coder's bytes" in text
    assert "2.50 points above uniform" in text


def test_bits_by_place_are_entropies_of_each_place() -> None:
    kernels = np.zeros((4, 1, 2, 2))
    kernels[:, 0, 0, 1] = [0.0, 1.0, 2.0, 3.0]  # 2 bits here, none at other places
    assert ship_bench.by_place(kernels, 1.0) == 0.5
