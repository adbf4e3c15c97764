"""The comparison's own parts: Huffman bytes, and tables from rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import bench_ship, huffman


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
        {k: str(v) for k, v in bench_ship.row("coder", "net", "x", bits=1.5).items()},
        {k: str(v) for k, v in bench_ship.row("file", "net", "y", bytes=2000).items()},
    ]
    assert bench_ship.table(rows, "coder") == (
        "| network | what | bits a value |\n| --- | --- | ---: |\n| net | x | 1.500 |\n"
    )
    assert "| net | y | 2,000 |" in bench_ship.table(rows, "file")
    with pytest.raises(AssertionError):
        bench_ship.row("coder", "net", "x", speed=3)
