"""A fast order-0 coder for bytes: rANS with one table a chunk and four states in turn.

It comes within a hundredth of a bit of the entropy, where Huffman codes lose up to a
fifth of one on the exponents of weights. The bytes are specified in
``lc3.ship.format``. Source: Duda, asymmetric numeral systems (arXiv 1311.2540);
interleaving, Giesen (arXiv 1402.3392).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lc3.codec.compiled import kernel
from lc3.errors import FormatError
from lc3.ship.format import Reader

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Counts = NDArray[np.int64]

STATES = 4
_BITS = 12
_SLOTS = 1 << _BITS


def encode(data: Bytes, counts: Counts | None = None) -> bytes:
    """Return bytes, of at least two kinds, as a code of their own.

    Args:
        data: uint8[n].
        counts: of each byte, if they are known.
    """
    shares = _shares(histogram(data) if counts is None else counts)
    first = np.concatenate([[0], np.cumsum(shares)[:-1]]).astype(np.uint32)
    words = np.empty(data.size + 1, np.uint16)
    states = np.full(STATES, 1 << 16, np.uint32)
    at = _encode(data, shares, first, states, words)
    present = shares > 0
    table = np.packbits(present, bitorder="little").tobytes()
    table += shares[present].astype("<u2").tobytes()
    return table + states.astype("<u4").tobytes() + words[at:].astype("<u2").tobytes()


def histogram(data: Bytes) -> Counts:
    """Return int64[256]: how often each byte is in uint8[n].

    Example:
        >>> histogram(np.array([2, 0, 2], np.uint8))[:4].tolist()
        [1, 0, 2, 0]
    """
    counts = np.zeros((4, 256), np.int64)
    _count(data, counts)
    total: Counts = counts.sum(0)
    return total


@kernel()
def _count(data: Bytes, counts: Any) -> None:
    """Count in int64[4, 256]; four, since equal bytes in a row would wait in one."""
    whole = data.size // 4 * 4
    for i in range(0, whole, 4):
        counts[0, data[i]] += 1
        counts[1, data[i + 1]] += 1
        counts[2, data[i + 2]] += 1
        counts[3, data[i + 3]] += 1
    for i in range(whole, data.size):
        counts[0, data[i]] += 1


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


def expected_bytes(counts: Counts) -> float:
    """Return about how long the code of bytes with these counts is."""
    some = counts[counts > 0]
    bits = float((some * np.log2(some.sum() / some)).sum())
    return bits / 8 + 32 + 2 * some.size + 4 * STATES


def _shares(counts: Counts) -> NDArray[np.uint32]:
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


@kernel(inline="always")
def _push(
    x: np.uint32, share: np.uint32, shortly: float, first: np.uint32, word_due: bool
) -> Any:
    """Return the state before a byte, after a word has gone where one is due."""
    x = x >> np.uint32(16) if word_due else x
    quotient = np.uint32(np.int64(np.float64(x) * shortly))
    return (quotient << np.uint32(12)) + (x - quotient * share) + first


@kernel()
def _encode(data: Bytes, shares: Any, first: Any, states: Any, words: Words) -> Any:
    """Write words from the last to the first; return where the first one is.

    A word is stored each time and counted where it is due, since a jump that cannot be
    foreseen costs more.

    Args:
        data: uint8[n].
        shares: uint32[256], 0 < share < 4096 of each byte that is there.
        first: uint32[256], the first slot of each.
        states: uint32[4], of the end; changed.
        words: uint16[n + 1].
    """
    # Not below 1/share, so that a product's whole part is the quotient: it is off by
    # 2^-19 at most, and a quotient that is not whole is 2^-12 away from the next.
    shortly = np.zeros(256, np.float64)
    least = np.zeros(256, np.uint32)  # state that sends a word
    for byte in range(256):
        if shares[byte]:
            shortly[byte] = np.nextafter(1.0 / np.float64(shares[byte]), 2.0)
            least[byte] = shares[byte] << np.uint32(20)
    at = np.uint64(words.size - 1)
    whole = data.size // 4 * 4
    for i in range(data.size - 1, whole - 1, -1):
        x, byte = states[i & 3], data[i]
        words[at], due = x & np.uint32(0xFFFF), x >= least[byte]
        at -= np.uint64(due)
        states[i & 3] = _push(x, shares[byte], shortly[byte], first[byte], due)
    a, b, c, d = states[0], states[1], states[2], states[3]
    for i in range(whole - 4, -1, -4):
        byte = data[i + 3]
        words[at], due = d & np.uint32(0xFFFF), d >= least[byte]
        at -= np.uint64(due)
        d = _push(d, shares[byte], shortly[byte], first[byte], due)
        byte = data[i + 2]
        words[at], due = c & np.uint32(0xFFFF), c >= least[byte]
        at -= np.uint64(due)
        c = _push(c, shares[byte], shortly[byte], first[byte], due)
        byte = data[i + 1]
        words[at], due = b & np.uint32(0xFFFF), b >= least[byte]
        at -= np.uint64(due)
        b = _push(b, shares[byte], shortly[byte], first[byte], due)
        byte = data[i]
        words[at], due = a & np.uint32(0xFFFF), a >= least[byte]
        at -= np.uint64(due)
        a = _push(a, shares[byte], shortly[byte], first[byte], due)
    states[0], states[1], states[2], states[3] = a, b, c, d
    return np.int64(at) + 1


@kernel(inline="always")
def _step(x: np.uint32, entry: np.uint32) -> Any:
    """Return the state after a byte, before words are taken in."""
    share = (entry >> np.uint32(12)) & np.uint32(0xFFF)
    return share * (x >> np.uint32(12)) + (entry & np.uint32(0xFFF))


@kernel(inline="always")
def _fed(x: np.uint32, word: np.uint16, due: bool) -> Any:
    """Return a state that has taken in a word where one is due, without a jump."""
    return (x << np.uint32(16)) | np.uint32(word) if due else x


@kernel()
def _decode(
    symbols: Any, shares: Any, states: Any, words: Words, many: int, out: Bytes
) -> Any:
    """Write all bytes and the last states; return how many words were taken.

    Args:
        symbols: int64[*], the bytes that are there.
        shares: uint32 of the same shape.
        states: uint32[4], of the beginning; changed.
        words: uint16[many + 4], 0 behind the end.
        many: how many words there are.
        out: uint8[*].
    """
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
    at = np.uint64(0)
    end = np.uint64(many)
    whole = out.size // 4 * 4
    for i in range(0, whole, 4):
        if at > end:
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
        due = a < least
        a = _fed(a, words[at], due)
        at += np.uint64(due)
        due = b < least
        b = _fed(b, words[at], due)
        at += np.uint64(due)
        due = c < least
        c = _fed(c, words[at], due)
        at += np.uint64(due)
        due = d < least
        d = _fed(d, words[at], due)
        at += np.uint64(due)
    states[0], states[1], states[2], states[3] = a, b, c, d
    for i in range(whole, out.size):
        if at > end:
            return -1
        x = states[i & 3]
        e = table[x & slot]
        out[i] = e >> np.uint32(24)
        x = _step(x, e)
        due = x < least
        states[i & 3] = _fed(x, words[at], due)
        at += np.uint64(due)
    return np.int64(at)
