"""A fast order-0 coder for bytes: rANS with one table a chunk and four states in turn.

It comes within a hundredth of a bit of the entropy, where Huffman codes lose up to a
fifth of one on the exponents of weights. The bytes are specified in
``lc3.ship.format``. Source: Duda, asymmetric numeral systems (arXiv 1311.2540);
interleaving, Giesen (arXiv 1402.3392).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lc3.codec.instructions import kernel
from lc3.errors import FormatError
from lc3.ship.format import Reader

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]

STATES = 4
_BITS = 12
_SLOTS = 1 << _BITS


def encode(data: Bytes) -> bytes:
    """Return bytes, of at least two kinds, as a code of their own.

    Args:
        data: uint8[n].
    """
    counts = np.bincount(data, minlength=256)
    shares = _shares(counts)
    first = np.concatenate([[0], np.cumsum(shares)[:-1]]).astype(np.uint32)
    words = np.empty(data.size + 1, np.uint16)
    states = np.full(STATES, 1 << 16, np.uint32)
    at = _encode(data, shares, first, states, words)
    present = shares > 0
    table = np.packbits(present, bitorder="little").tobytes()
    table += shares[present].astype("<u2").tobytes()
    return table + states.astype("<u4").tobytes() + words[at:].astype("<u2").tobytes()


def decode(data: memoryview, size: int) -> Bytes:
    """Return uint8[size] of a code.

    Raises:
        FormatError: it is damaged, or of another size.
    """
    reader = Reader(data, "a code of bytes")
    mask = np.frombuffer(reader.bytes(32), np.uint8)
    symbols = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
    shares = np.frombuffer(reader.bytes(2 * symbols.size), "<u2").astype(np.uint32)
    if symbols.size < 2 or shares.min() < 1 or int(shares.sum()) != _SLOTS:
        raise FormatError(f"the {symbols.size} shares of a code do not add up to 4096")
    states = np.frombuffer(reader.bytes(4 * STATES), "<u4").astype(np.uint32)
    rest = data[reader.at :]
    words = np.zeros(len(rest) // 2 + STATES, np.uint16)
    words[: len(rest) // 2] = np.frombuffer(rest[: len(rest) // 2 * 2], "<u2")
    out = np.empty(size, np.uint8)
    used = _decode(symbols, shares, states, words, len(rest) // 2, out)
    if len(rest) % 2 or used != len(rest) // 2 or (states != 1 << 16).any():
        raise FormatError(f"a code of {len(data)} bytes is damaged")
    return out


def expected_bytes(counts: NDArray[np.int64]) -> float:
    """Return about how long the code of bytes with these counts is."""
    some = counts[counts > 0]
    bits = float((some * np.log2(some.sum() / some)).sum())
    return bits / 8 + 32 + 2 * some.size + 4 * STATES


def _shares(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return how many of 4096 slots each byte has: at least one if it is there."""
    ideal = counts * (_SLOTS / counts.sum())
    shares = np.where(counts > 0, np.maximum(np.floor(ideal), 1), 0).astype(np.int64)
    while (short := _SLOTS - int(shares.sum())) != 0:
        if short > 0:
            gains = np.where(shares > 0, counts / np.maximum(shares, 1), -1.0)
            shares[int(gains.argmax())] += 1
        else:
            losses = np.where(shares > 1, counts / np.maximum(shares, 1), np.inf)
            shares[int(losses.argmin())] -= 1
    return shares.astype(np.uint32)


@kernel()
def _encode(data: Bytes, shares: Any, first: Any, states: Any, words: Words) -> int:
    """Write words from the last to the first; return where the first one is."""
    at = words.size
    for i in range(data.size - 1, -1, -1):
        byte = data[i]
        x = states[i & 3]
        share = shares[byte]
        if np.uint64(x) >= np.uint64(share) << np.uint64(20):
            at -= 1
            words[at] = x & np.uint32(0xFFFF)
            x >>= np.uint32(16)
        quotient = x // share
        states[i & 3] = (
            (quotient << np.uint32(12)) + (x - quotient * share) + first[byte]
        )
    return at


@kernel(inline="always")
def _step(x: np.uint32, entry: np.uint32) -> Any:
    """Return the state after a byte, before words are taken in."""
    share = (entry >> np.uint32(12)) & np.uint32(0xFFF)
    return share * (x >> np.uint32(12)) + (entry & np.uint32(0xFFF))


@kernel()
def _decode(
    symbols: Any, shares: Any, states: Any, words: Words, many: int, out: Bytes
) -> int:
    """Write all bytes and the last states; return how many words were taken."""
    table = np.empty(_SLOTS, np.uint32)  # of each slot: byte, share, place in the share
    filled = 0
    for k in range(symbols.size):
        entry = (np.uint32(symbols[k]) << np.uint32(24)) | (shares[k] << np.uint32(12))
        for inside in range(shares[k]):
            table[filled] = entry | np.uint32(inside)
            filled += 1
    slot = np.uint32(0xFFF)
    least = np.uint32(1 << 16)
    a, b, c, d = states[0], states[1], states[2], states[3]
    at = 0
    whole = out.size // 4 * 4
    for i in range(0, whole, 4):
        if at > many:
            return -1
        e = table[a & slot]
        f = table[b & slot]
        g = table[c & slot]
        h = table[d & slot]
        out[i] = e >> np.uint32(24)
        out[i + 1] = f >> np.uint32(24)
        out[i + 2] = g >> np.uint32(24)
        out[i + 3] = h >> np.uint32(24)
        a, b, c, d = _step(a, e), _step(b, f), _step(c, g), _step(d, h)
        if a < least:
            a = (a << np.uint32(16)) | np.uint32(words[at])
            at += 1
        if b < least:
            b = (b << np.uint32(16)) | np.uint32(words[at])
            at += 1
        if c < least:
            c = (c << np.uint32(16)) | np.uint32(words[at])
            at += 1
        if d < least:
            d = (d << np.uint32(16)) | np.uint32(words[at])
            at += 1
    states[0], states[1], states[2], states[3] = a, b, c, d
    for i in range(whole, out.size):
        if at > many:
            return -1
        x = states[i & 3]
        e = table[x & slot]
        out[i] = e >> np.uint32(24)
        x = _step(x, e)
        if x < least:
            x = (x << np.uint32(16)) | np.uint32(words[at])
            at += 1
        states[i & 3] = x
    return at
