"""A Bloomier filter over the positions of weights that are not zero: Weightless.

A table answers for every position: with the cluster of its weight where there is one,
exactly, and elsewhere with "zero", but for a share 2^(r−t) of false answers. It pays
only where the receiver reads weights in place; sent as a message it is larger than the
context coder, see ``break_even``. Source: Reagen and others, "Weightless", ICML 2018
(arXiv 1711.04686).

Cells of position i, with ``h(k) = mix(seed + (4i + k + 1) · 0x9E3779B97F4A7C15)``, mix
the output function of SplitMix64, the table in thirds of ``m / 3`` cells: cell k < 3
is ``k · m/3 + floor(high half of h(k) · m/3 / 2^32)``. The answer is the exclusive or
of the three cells and the lowest t bits of h(3).
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec.compiled import kernel
from lc3.errors import FormatError, InputError
from lc3.ship.format import Reader, varint
from lc3.ship.mixing import mixed

CELLS = 1.25  # for each key
_SEEDS = 16


class Filter(NamedTuple):
    """A table that answers for any position.

    Attributes:
        cells: uint32[m], of which t bits are used.
        r: bits of an answer that counts.
        t: bits of a cell.
        seed: of the hashes.
    """

    cells: NDArray[np.uint32]
    r: int
    t: int
    seed: int


def build(
    keys: NDArray[np.int64], values: NDArray[np.uint32], r: int, t: int, seed: int = 0
) -> Filter:
    """Return a filter that holds each value at its key, exactly.

    Args:
        keys: int64[n], different positions from 0 on, below 2^62.
        values: uint32[n], below 2^r.
        r: bits of a value.
        t: bits of a cell, r < t ≤ 32; others answer falsely with 2^(r−t).
        seed: the first that is tried.

    Raises:
        InputError: r and t do not fit, or none of 16 seeds works: keys are repeated.

    Example:
        >>> one = build(np.array([3, 70]), np.array([1, 2], np.uint32), 2, 8)
        >>> query(one, np.array([3, 70]))
        array([1, 2], dtype=uint32)
    """
    if not 0 < r < t <= 32:
        raise InputError(f"r={r} and t={t} must be such that 0 < r < t <= 32")
    third = max(2, math.ceil(CELLS * keys.size / 3) + 1)
    cells = np.zeros(3 * third, np.uint32)
    for tried in range(seed, seed + _SEEDS):
        if _build(keys, values, np.uint32((1 << t) - 1), np.uint64(tried), cells):
            return Filter(cells, r, t, tried)
    raise InputError(
        f"no filter holds these {keys.size} keys; is one of them repeated?"
    )


def query(table: Filter, positions: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return uint32[n], the answers for int64[n]; from 2^r on they mean "zero"."""
    out = np.empty(positions.size, np.uint32)
    mask = np.uint32((1 << table.t) - 1)
    _query(table.cells, positions, mask, np.uint64(table.seed), out)
    return out


def false_share(r: int, t: int) -> float:
    """Return which share of empty positions answers with a value: 2^(r−t)."""
    return float(2.0 ** (r - t))


def break_even(density: float, r: int, cells: float = CELLS) -> float:
    """Return from how many false weights for each true one a filter is smaller.

    Than an exact coder that sends independent positions, entropy H(p)/p for each
    weight, and r bits: the filter takes c·(r + log2((1−p)/(p·f))) bits for f false
    weights. Above 1 there are more false weights than true ones. Real positions are
    not independent, and a coder with contexts needs less, so it is worse than this.

    Args:
        density: share of weights that are not zero, 0 < density < 1.
        r: bits of a value.
        cells: of the filter for each weight.

    Example:
        >>> round(break_even(0.05, 4, 1.23), 2)
        1.26
    """
    p = density
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    bits = (r + entropy / p) / cells - r
    return float((1 - p) / p / 2.0**bits)


def section(table: Filter, values: NDArray[np.float32]) -> bytes:
    """Return the section of a filter and the float32 that each number stands for."""
    bits = ((table.cells[:, None] >> np.arange(table.t, dtype=np.uint32)) & 1).ravel()
    head = varint(values.size) + values.astype("<f4").tobytes()
    head += struct.pack("<BBQ", table.r, table.t, table.seed) + varint(table.cells.size)
    return head + np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def decode(data: bytes | memoryview, shape: tuple[int, ...], numel: int) -> Tensor:
    """Return float32[shape] of a section.

    Raises:
        FormatError: it is no section of a filter.
    """
    reader = Reader(data, "a section of a filter")
    count = reader.varint()
    if not 1 <= count <= len(data):
        raise FormatError(f"{count} values are more than a section holds")
    values = np.frombuffer(reader.bytes(4 * count), "<f4").astype(np.float32)
    r, t, seed, m = reader.byte(), reader.byte(), reader.uint("Q"), reader.varint()
    if not 0 < r < t <= 32 or count > 1 << r or m % 3 or m < 6:
        raise FormatError(f"a filter of r={r}, t={t}, {m} cells is none of format 1")
    packed = np.frombuffer(reader.bytes(-(-m * t // 8)), np.uint8)
    reader.ends()
    cells = np.empty(m, np.uint32)
    _unpack(packed, t, cells)
    table = Filter(cells, r, t, seed)
    out = np.zeros(numel, np.float32)
    for start in range(0, numel, 1 << 20):
        part = query(table, np.arange(start, min(numel, start + (1 << 20))))
        known = part < count
        out[start : start + part.size][known] = values[part[known]]
    return torch.from_numpy(out).reshape(shape)


@kernel()
def _unpack(packed: Any, t: int, cells: Any) -> None:
    """Write cells of t bits from bytes."""
    at = 0
    for i in range(cells.size):
        value = np.uint32(0)
        for k in range(t):
            bit = (packed[at >> 3] >> np.uint8(at & 7)) & np.uint8(1)
            value |= np.uint32(bit) << np.uint32(k)
            at += 1
        cells[i] = value


@kernel(inline="always")
def _hash(seed: np.uint64, position: int, which: int) -> np.uint64:
    """Return hash number ``which`` of a position."""
    return mixed(seed, np.uint64(position) * np.uint64(4) + np.uint64(which))


@kernel(inline="always")
def _cell(seed: np.uint64, position: int, which: int, third: int) -> Any:
    """Return one of the three cells of a position."""
    high = _hash(seed, position, which) >> np.uint64(32)
    return which * third + np.int64((high * np.uint64(third)) >> np.uint64(32))


@kernel()
def _query(cells: Any, positions: Any, mask: np.uint32, seed: Any, out: Any) -> None:
    """Write the answers for positions."""
    third = cells.size // 3
    for i in range(positions.size):
        answer = np.uint32(_hash(seed, positions[i], 3)) & mask
        for k in range(3):
            answer ^= cells[_cell(seed, positions[i], k, third)]
        out[i] = answer & mask


@kernel()
def _build(keys: Any, values: Any, mask: np.uint32, seed: Any, cells: Any) -> bool:
    """Fill the table by peeling cells of one key; say whether that worked."""
    third = cells.size // 3
    degree = np.zeros(cells.size, np.int32)
    which = np.zeros(cells.size, np.int64)  # exclusive or of the keys' places
    for i in range(keys.size):
        for k in range(3):
            cell = _cell(seed, keys[i], k, third)
            degree[cell] += 1
            which[cell] ^= i
    order = np.empty(keys.size, np.int64)
    own = np.empty(keys.size, np.int64)
    queue = np.empty(cells.size + 3 * keys.size, np.int64)
    end = 0
    for cell in range(cells.size):
        if degree[cell] == 1:
            queue[end] = cell
            end += 1
    at, found = 0, 0
    while at < end:
        cell = queue[at]
        at += 1
        if degree[cell] != 1:
            continue
        i = which[cell]
        order[found], own[found] = i, cell
        found += 1
        for k in range(3):
            other = _cell(seed, keys[i], k, third)
            degree[other] -= 1
            which[other] ^= i
            if degree[other] == 1:
                queue[end] = other
                end += 1
    if found < keys.size:
        return False
    cells[:] = 0
    for j in range(found - 1, -1, -1):
        i = order[j]
        value = values[i] ^ (np.uint32(_hash(seed, keys[i], 3)) & mask)
        for k in range(3):
            value ^= cells[_cell(seed, keys[i], k, third)]
        cells[own[j]] = value & mask
    return True
