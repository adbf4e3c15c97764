"""The range stage: all frames of a message as one rANS stream, lossless.

The digits of a frame are nearly independent of each other, so one number, how many of
them are not zero, says how likely each folded byte is, and a coder that spends
fractions of a bit on a byte comes within a per cent of the digits' entropy. Where
zeros stand together, as in layers with inactive inputs, two more numbers say that. The
bytes are specified in ``lc3.format``. Source of the coder: Duda, asymmetric numeral
systems (arXiv 1311.2540), in the form that keeps the order of a range coder.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec.compiled import kernel
from lc3.errors import FormatError
from lc3.format import (
    RUN_BASE,
    RUN_MAX,
    RUN_MIN,
    SCALE_BYTES,
    ZERO_BYTE,
    has_body,
    quartic_bytes,
)

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Table = NDArray[np.uint64]

STATE_BYTES = 6
DENSITIES = 128  # of the grid
_THREE = 0x80  # in a model's first byte: two more follow
_GRID = np.array(
    [65536, 60097, 55109, 50535, 46341, 42495, 38968, 35734], np.uint64
)  # 2^(16 − i / 8)
_CLASSES = 5 + RUN_MAX  # bytes with 1 to 5 digits that are not 0, runs of 1 to 14
_STATES = 3  # before a byte: a nonzero byte or nothing, a run of 14, a shorter run
_ROOM = 256  # of 2^16 slots kept for bytes that are unlikelier than one slot
_COARSE = 256  # entries of the table that shortens the search for a class

_CODES = np.arange(256)
_DIGITS = (_CODES[:, None] // np.array([81, 27, 9, 3, 1]) % 3 != 1).sum(axis=1)
_IS_RUN = (_CODES >= RUN_BASE) | (_CODES == ZERO_BYTE)
_STEP = np.where(_CODES >= RUN_BASE, _CODES - RUN_BASE + RUN_MIN, 1).astype(np.int64)
_CLASS = np.where(_IS_RUN, 4 + _STEP, _DIGITS - 1).astype(np.uint8)
_NONZERO = np.where(_IS_RUN, 0, _DIGITS).astype(np.int64)
_AFTER = np.where(_IS_RUN, np.where(_STEP == RUN_MAX, 1, 2), 0).astype(np.uint8)
_MEMBERS = [np.flatnonzero(c == _CLASS) for c in range(_CLASSES)]
_MANY = np.array([len(members) for members in _MEMBERS], np.uint64)
_PLACE = np.zeros(256, np.uint64)  # of a byte in its class
_BYTE = np.zeros((_CLASSES, int(_MANY.max())), np.uint8)
for _class, _members in enumerate(_MEMBERS):
    _PLACE[_members] = np.arange(len(_members))
    _BYTE[_class, : len(_members)] = _members
_UNFOLDS = np.array([_STEP[members[0]] for members in _MEMBERS])
_NEXT = np.array([_AFTER[members[0]] for members in _MEMBERS])

_INDEX = np.arange(DENSITIES)
_P = 2.0 ** (-_INDEX / 8)
# Nonzero digits of a nonzero byte, on average: falls with the index.
_MEAN = 5 * _P / (1 - (1 - _P) ** 5)

_OK, _ENDS_EARLY, _NOT_USED_UP, _NO_BYTE, _RUN_CROSSES = range(5)
_DAMAGE = {
    _ENDS_EARLY: "it ends too early",
    _NOT_USED_UP: "something is left behind its last byte",
    _NO_BYTE: "a number in it stands for no byte",
    _RUN_CROSSES: "a run of zeros crosses the end of its piece",
}


def compress(frames: Sequence[Tensor], numels: Sequence[int]) -> Tensor:
    """Return frames as one stream: a new uint8[*], which ``decompress`` takes apart.

    Args:
        frames: uint8[*] each, contiguous, on the CPU: whole valid frames.
        numels: how many values each has.
    """
    whole = [frame.numpy() for frame in frames]
    bodies = [data[SCALE_BYTES:] for data in whole]
    full = [i for i, body in enumerate(bodies) if body.size]
    if not full:
        return torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *whole]))
    body = np.concatenate([bodies[i] for i in full])
    ends = np.cumsum([bodies[i].size for i in full])
    quartic = np.array([quartic_bytes(numels[i]) for i in full])
    models = np.empty((len(full), 3), np.uint8)
    words = np.empty(body.size + 1, np.uint16)
    state, first = _encode(body, ends, quartic, models, words)
    heads = [data[:SCALE_BYTES] for data in whole]
    for i, model in zip(full, models, strict=True):
        alike = model[0] == model[1] == model[2]
        said = model[:1] if alike else model | np.array([_THREE, 0, 0], np.uint8)
        heads[i] = np.concatenate([heads[i], said])
    number = np.frombuffer(int(state).to_bytes(STATE_BYTES, "little"), np.uint8)
    coded = words[int(first) :].astype("<u2", copy=False).view(np.uint8)
    return torch.from_numpy(np.concatenate([*heads, number, coded]))


def decompress(data: Tensor, numels: Sequence[int]) -> Tensor:
    """Return the frames of a stream, one after the other: uint8[*].

    No more memory is reserved than the largest frames of so many values need.

    Args:
        data: uint8[*], contiguous, on the CPU.
        numels: how many values each frame must have.

    Raises:
        FormatError: it is no stream of so many frames.
    """
    view = data.numpy()
    at = 0
    heads = np.zeros((len(numels), SCALE_BYTES), np.uint8)
    models = np.zeros((len(numels), 3), np.uint8)
    quartic = np.zeros(len(numels), np.int64)
    for i, numel in enumerate(numels):
        full = has_body(view[at : at + SCALE_BYTES].tobytes())
        heads[i] = view[at : at + SCALE_BYTES]
        at += SCALE_BYTES
        if not full:
            continue
        quartic[i] = quartic_bytes(numel)
        size = 3 if at < view.size and view[at] & _THREE else 1
        if view.size < at + size:
            raise FormatError(f"a coded stream of {view.size} bytes ends in its models")
        models[i] = view[at : at + size]  # one byte stands for all three
        models[i, 0] &= ~_THREE & 0xFF
        if models[i].max() >= DENSITIES:
            raise FormatError(
                f"a model {models[i].tolist()} is beyond {DENSITIES - 1}; is the "
                "sender an lc3 of the same format version?"
            )
        at += size
    out = np.empty(len(numels) * SCALE_BYTES + int(quartic.sum()), np.uint8)
    state, words = 1 << 32, np.empty(0, np.uint16)
    if quartic.any():
        state = int.from_bytes(view[at : at + STATE_BYTES].tobytes(), "little")
        rest = view[at + STATE_BYTES :]
        if view.size < at + STATE_BYTES or rest.size % 2 or state < 1 << 32:
            raise FormatError(
                f"the coded stream is damaged: {view.size - at} bytes from the state "
                f"on, which is {state}"
            )
        words = rest.copy().view("<u2").astype(np.uint16, copy=False)
    elif at != view.size:
        raise FormatError(f"{view.size - at} bytes are left behind the last scale")
    used, damage = _decode(np.uint64(state), words, heads, models, quartic, out)
    if damage != _OK:
        raise FormatError(f"the coded stream is damaged: {_DAMAGE[damage]}")
    return torch.from_numpy(out[: int(used)])


def warm_up() -> None:
    """Run every kernel once, so that nothing compiles during a step."""
    body = bytes([0] * 4 + [ZERO_BYTE, 0, RUN_BASE])
    frame = np.frombuffer(bytearray(b"\0\0\x80\x3f" + body), np.uint8)
    numels = [5 * (len(body) + 1)]
    decompress(compress([torch.from_numpy(frame)], numels), numels)


@kernel()
def _times(x: np.uint64, y: np.uint64) -> np.uint64:
    """Multiply two numbers of [0, 1] in units of 2^-30; what is smaller is cut off."""
    return (x * y) >> np.uint64(30)


@kernel()
def _grid(index: np.uint64) -> Any:
    """Return a density of the grid, in units of 2^-30."""
    return (_GRID[index % np.uint64(8)] << np.uint64(14)) >> (index // np.uint64(8))


@kernel()
def _zero_byte(index: np.uint64) -> np.uint64:
    """Return how likely five zeros are at a density of the grid."""
    other = (np.uint64(1) << np.uint64(30)) - _grid(index)
    square = _times(other, other)
    return _times(_times(square, square), other)


@kernel()
def _tabulate(model: Bytes, freq: Table, first: Table) -> None:
    """Write how many of 2^16 slots a byte of each class has, and where they begin.

    Args:
        model: uint8[3], indices of densities.
        freq: uint64[states, classes], of one byte.
        first: uint64[states, classes + 1], of the first byte of a class; then the end.
    """
    one = np.uint64(1) << np.uint64(30)
    p = _grid(np.uint64(model[0]))
    other = one - p
    likely = np.empty(5, np.uint64)  # of one byte with k + 1 digits that are not 0
    together = np.uint64(0)
    for k in range(5):
        x = one
        for _ in range(k + 1):
            x = _times(x, p >> np.uint64(1))
        for _ in range(4 - k):
            x = _times(x, other)
        likely[k] = x
        together += _MANY[k] * x
    again = _zero_byte(np.uint64(model[2]))
    slots = np.uint64(65536 - _ROOM)
    for state in range(_STATES):
        zero = _zero_byte(np.uint64(model[1])) if state == 0 else again
        if state == 2:
            zero = np.uint64(0)
        given = np.uint64(0)
        most, largest = 0, np.uint64(0)
        x = zero
        for c in range(_CLASSES):
            if c < 5:
                share = _times(one - zero, likely[c]) * slots // together
            elif c < _CLASSES - 1:
                share = (_times(x, one - again) * slots) >> np.uint64(30)
                x = _times(x, again)
            else:
                share = (x * slots) >> np.uint64(30)
            share = max(share, np.uint64(1))
            freq[state, c] = share
            given += share * _MANY[c]
            if share * _MANY[c] > largest:
                most, largest = c, share * _MANY[c]
        freq[state, most] += (np.uint64(65536) - given) // _MANY[most]
        at = np.uint64(0)
        for c in range(_CLASSES):
            first[state, c] = at
            at += freq[state, c] * _MANY[c]
        first[state, _CLASSES] = at


@kernel()
def _nearest(probability: float) -> int:
    """Return the index of the density of the grid that is nearest, as a ratio."""
    if probability <= 0:
        return DENSITIES - 1
    return min(max(round(-8 * math.log2(probability)), 0), DENSITIES - 1)


@kernel()
def _bits(events: float, of: float) -> float:
    """Return the entropy of so many events among so many chances, in bits."""
    if events <= 0 or events >= of:
        return 0.0
    share = events / of
    return -(events * math.log2(share) + (of - events) * math.log2(1 - share))


@kernel()
def _choose(body: Bytes, quartic: int, model: Bytes) -> None:
    """Write the model of one frame: one density, or three where they save more."""
    digits, nonzero, starts, last = 0, 0, 0, 0
    for byte in body:
        digits += _NONZERO[byte]
        if _NONZERO[byte]:
            nonzero += 1
        elif last != 1:
            starts += 1
        # After a run of 14 the same zeros may go on.
        last = 0 if _NONZERO[byte] else 1
    zeros = quartic - nonzero
    model[:] = _nearest(digits / (5 * quartic))
    if nonzero == 0 or zeros == 0:
        return
    chances = nonzero + 1 - (1 if last == 0 else 0)
    goes_on = zeros - (1 if last == 1 else 0)
    d = 0
    mean = digits / nonzero
    while d < DENSITIES - 1 and (_MEAN[d] + _MEAN[d + 1]) / 2 > mean:
        d += 1
    p = _P[d] if d else 1 - 1e-9
    inside = -(
        digits * math.log2(p)
        + (5 * nonzero - digits) * math.log2(1 - p)
        - nonzero * math.log2(1 - (1 - p) ** 5)
    )
    apart = inside + _bits(starts, chances) + _bits(zeros - starts, goes_on)
    if apart + 16 < _bits(digits, 5 * quartic):
        model[0] = d
        model[1] = _nearest(1 - (starts / chances) ** 0.2)
        stays = (zeros - starts) / goes_on if goes_on else 0.0
        model[2] = _nearest(1 - stays**0.2)


@kernel()
def _encode(
    body: Bytes,
    ends: NDArray[np.int64],
    quartic: NDArray[np.int64],
    models: Bytes,
    words: Words,
) -> tuple[np.uint64, int]:
    """Choose the models and write the words, from the last one to the first.

    Args:
        body: uint8[*], the folded bytes of all frames.
        ends: end of each frame in ``body``.
        quartic: bytes that each unfolds to.
        models: uint8[frames, 3], written.
        words: uint16[> body], written from its end.

    Returns:
        The state, and where the first word stands.
    """
    freq = np.empty((_STATES, _CLASSES), np.uint64)
    first = np.empty((_STATES, _CLASSES + 1), np.uint64)
    x = np.uint64(1) << np.uint64(32)
    at = words.size
    for f in range(ends.size - 1, -1, -1):
        begin = ends[f - 1] if f else 0
        frame = body[begin : ends[f]]
        _choose(frame, quartic[f], models[f])
        _tabulate(models[f], freq, first)
        for i in range(frame.size - 1, -1, -1):
            byte = frame[i]
            state = _AFTER[frame[i - 1]] if i else np.uint8(0)
            c = _CLASS[byte]
            share = freq[state, c]
            if x >= share << np.uint64(32):
                at -= 1
                words[at] = x & np.uint64(0xFFFF)
                x >>= np.uint64(16)
            quotient = x // share
            x = (
                (quotient << np.uint64(16))
                + (x - quotient * share)
                + first[state, c]
                + _PLACE[byte] * share
            )
    return x, at


@kernel()
def _decode(
    x: np.uint64,
    words: Words,
    heads: Bytes,
    models: Bytes,
    quartic: NDArray[np.int64],
    out: Bytes,
) -> tuple[int, int]:
    """Write all frames, scales too.

    Args:
        x: the state, from 2^32 up.
        words: uint16[*].
        heads: uint8[frames, 4], their scales.
        models: uint8[frames, 3].
        quartic: bytes that each frame unfolds to.
        out: uint8[≥ all scales and quartic bytes].

    Returns:
        How many bytes were written, and what is wrong.
    """
    freq = np.empty((_STATES, _CLASSES), np.uint64)
    first = np.empty((_STATES, _CLASSES + 1), np.uint64)
    coarse = np.empty((_STATES, _COARSE), np.uint8)
    at, taken = 0, 0
    for f in range(quartic.size):
        out[at : at + SCALE_BYTES] = heads[f]
        at += SCALE_BYTES
        left = quartic[f]
        if left == 0:
            continue
        _tabulate(models[f], freq, first)
        inverse = (np.uint64(1) << np.uint64(32)) // freq + np.uint64(1)
        for row in range(_STATES):
            place = 0
            for i in range(_COARSE):
                while place < _CLASSES - 1 and (
                    first[row, place + 1] <= np.uint64(i * (65536 // _COARSE))
                ):
                    place += 1
                coarse[row, i] = place
        state = np.uint8(0)
        while left > 0:
            slot = x & np.uint64(0xFFFF)
            if slot >= first[state, _CLASSES]:
                return at, _NO_BYTE
            c = coarse[state, slot >> np.uint64(8)]
            while first[state, c + np.uint8(1)] <= slot:
                c += np.uint8(1)
            share = freq[state, c]
            slot -= first[state, c]
            member = (slot * inverse[state, c]) >> np.uint64(32)  # slot // share
            x = share * (x >> np.uint64(16)) + slot - member * share
            out[at] = _BYTE[c, member]
            at += 1
            left -= _UNFOLDS[c]
            if left < 0:
                return at, _RUN_CROSSES
            state = _NEXT[c]
            if x < np.uint64(1) << np.uint64(32):
                if taken == words.size:
                    return at, _ENDS_EARLY
                x = (x << np.uint64(16)) | np.uint64(words[taken])
                taken += 1
    if taken != words.size or x != np.uint64(1) << np.uint64(32):
        return at, _NOT_USED_UP
    return at, _OK
