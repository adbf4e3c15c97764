"""The same bytes as ``reference``, from Numba, at the speed of memory.

Encoding takes two passes over the values: the largest magnitude, then block by block
compare and pack, fold the zero runs, and take what was sent off the block while the
cache holds it. Decoding costs by content: a sparse frame is read byte by byte and its
zero runs skipped, a dense one is unfolded and added block by block.

Loops over floats are left to LLVM to vectorise; what it does not see by itself (64
bytes compared at once) is said in ``instructions``. Kernels release the GIL; their
machine code is cached on disk. A place in an array that depends on content is
unsigned, and loops run over slices from 0: a signed place that the compiler does not
know to be positive is tested at each use, and keeps a loop from being vectorised. No
fast-math: every float operation is the float32 operation of the specification.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec import Encoded
from lc3.codec.compiled import kernel
from lc3.codec.density import choose, sample_stride
from lc3.codec.instructions import (
    LANES,
    bits_of,
    bytes_at,
    float_of,
    floats_at,
    halves_at,
    lowest_bit,
    nonzero_bytes,
    prefetch,
    write_word,
)
from lc3.errors import FormatError, InputError
from lc3.format import (
    FLOAT32_MAX,
    NAN_SCALE,
    RUN_BASE,
    RUN_MAX,
    RUN_MIN,
    SCALE_BYTES,
    ZERO_BYTE,
    has_body,
    max_frame_bytes,
    quartic_bytes,
)

__all__ = [
    "add",
    "add_all",
    "check",
    "check_all",
    "encode",
    "encode_all",
    "max_frame_bytes",
]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Halves = NDArray[np.uint16]  # the bits of float16 or bfloat16

# Quartic bytes at a time. Five partitions of a block are 5 KiB, so that what is read
# once stays in the first cache until it is written, whatever else is on its way there.
_BLOCK = 256
_DENSE_BYTES = 8  # of a block that are not 0: from there on all of it is touched
_STRIDE = 256  # folded bytes that are checked at once
_LOOK_AHEAD = 256  # folded bytes between calling for memory and using it
# Folded bytes per quartic byte from which a frame is unfolded and added block by block;
# of tensors that no cache holds, whose lines each cost a way to memory.
_DENSE_SHARE, _LARGE_DENSE_SHARE, _LARGE = 0.24, 0.14, 3 << 20
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign
_NAN_SCALE = np.frombuffer(NAN_SCALE, np.uint8)
_POWERS = np.array([81, 27, 9, 3, 1])
_DIGITS = (np.arange(243)[:, None] // _POWERS % 3 - 1).astype(np.int8)

# By byte of a frame's body: how many quartic bytes it stands for, the one it is or is a
# run of, the partition and value of its first digit that is not 0, whether more follow.
_CODES = np.arange(256)
_STEP = np.where(_CODES < RUN_BASE, 1, _CODES - RUN_BASE + RUN_MIN).astype(np.uint64)
_LITERAL = np.where(_CODES < RUN_BASE, _CODES, ZERO_BYTE).astype(np.uint8)
_FIRST = np.argmax(_DIGITS[_LITERAL] != 0, axis=1)
_FIRST_DIGIT = _DIGITS[_LITERAL, _FIRST]
_DIGIT_COUNT = (_DIGITS[_LITERAL] != 0).sum(axis=1)
_HAS_DIGIT = np.minimum(_DIGIT_COUNT, 1)
_HAS_MORE = _DIGIT_COUNT > 1

# By length of a zero run: its bytes, up to eight in a little-endian word; their number.
_WORD_RUN = 8 * RUN_MAX
_RUN_BYTES = [
    [RUN_BASE + RUN_MAX - RUN_MIN] * (run // RUN_MAX)
    + [[], [ZERO_BYTE], *([RUN_BASE + k] for k in range(RUN_MAX - RUN_MIN))][
        run % RUN_MAX
    ]
    for run in range(_WORD_RUN + 1)
]
_RUN_SIZE = np.array([len(run) for run in _RUN_BYTES], np.uint64)
_RUN_WORD = np.array(
    [int.from_bytes(bytes(run), "little") for run in _RUN_BYTES], np.uint64
)

_OK = 0
_ENDS_EARLY = 1
_RUN_CROSSES = 2
_PADDING = 3


def encode(
    x: Tensor,
    sparsity: float,
    out: Tensor,
    residual: Tensor | None = None,
    density: float | None = None,
    source: Tensor | None = None,
) -> Encoded:
    """See ``lc3.codec.Codec.encode``."""
    values, frame = x.numpy(), out.numpy()
    bits = np.int32(_prepare(x, residual, source))  # Numba gives Python's numbers
    if density is None:
        used, digits = _encode(values, bits, np.float32(sparsity), frame)
        return Encoded(int(used), digits)
    largest = bits.view(np.float32)
    if largest == 0 or not np.isfinite(largest):
        return Encoded(int(_write_special(largest, frame)), 0)
    sample = np.abs(values[:: sample_stride(values.size)])
    threshold, scale = choose(sample, density, largest)
    frame[:SCALE_BYTES].view(np.float32)[0] = scale
    used, digits = _pack(values, scale, threshold, frame[SCALE_BYTES:])
    return Encoded(SCALE_BYTES + int(used), digits)


def _prepare(x: Tensor, residual: Tensor | None, source: Tensor | None) -> np.int32:
    """Make ``x`` the sum to encode; return the bits of its largest magnitude.

    0 where there is nothing to say. Infinity and NaN have the patterns from 0x7f800000
    on, so one integer maximum is both the finiteness check and the maximum.
    """
    values = x.numpy()
    if residual is not None and source is not None and source.dtype == torch.bfloat16:
        halves = source.view(torch.uint16).numpy()
        return _add_to_bfloat16(values, halves, residual.numpy())
    read = values
    if source is not None and residual is not None and source.dtype == torch.float32:
        read = source.numpy()
    elif source is not None:
        x.copy_(source)
    if residual is None:
        return _max_magnitude_bits(values)
    return _add_residual(values, read, residual.numpy())


def check(frame: Tensor, numel: int) -> int:
    """See ``lc3.codec.Codec.check``."""
    data = frame.numpy()
    if not has_body(data[:SCALE_BYTES].tobytes()):
        return SCALE_BYTES
    problem, used, unfolded = _check(data[SCALE_BYTES:], numel)
    if problem == _ENDS_EARLY:
        raise FormatError(
            f"frame ends after {unfolded} of {quartic_bytes(numel)} quartic bytes; was "
            "it cut?"
        )
    if problem == _RUN_CROSSES:
        raise FormatError(
            f"a zero run crosses the end of a frame of {quartic_bytes(numel)} quartic "
            "bytes; do both ranks use the same plan?"
        )
    if problem == _PADDING:
        raise FormatError(
            f"padding behind the {numel} values of a frame is not zero; do both ranks "
            "use the same plan?"
        )
    return SCALE_BYTES + int(used)


def add(frame: Tensor, acc: Tensor) -> None:
    """See ``lc3.codec.Codec.add``."""
    data, values = frame.numpy(), acc.numpy()
    _add_frame(data, values)


# What a bucket's kernels are told of each piece, or frame: addresses and sizes.
_VALUES, _NUMEL, _RESIDUAL, _SOURCE, _HALF, _OUT, _PIECE_COLUMNS = range(7)
_ACC, _ELEMENTS, _FRAME, _BYTES, _FIRST_OF_SUM, _FRAME_COLUMNS = range(6)
_NOTHING = 0  # no address


def encode_all(
    values: Sequence[Tensor],
    sparsity: float,
    outs: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    sources: Sequence[Tensor | None],
) -> list[Encoded]:
    """Encode some pieces, each as ``encode`` does without a density, by one call.

    Raises:
        InputError: values of a piece are not contiguous.
    """
    rows = []
    for x, out, r, s in zip(values, outs, residuals, sources, strict=True):
        if not x.is_contiguous():
            raise InputError(_not_contiguous(x))
        owed, read, half = _NOTHING if r is None else r.data_ptr(), _NOTHING, False
        if s is not None:
            half = s.dtype == torch.bfloat16
            if r is not None and (half or s.dtype == torch.float32):
                read = s.data_ptr()
            else:
                x.copy_(s)
        rows.append((x.data_ptr(), x.numel(), owed, read, half, out.data_ptr()))
    table = np.array(rows, np.int64).reshape(-1, _PIECE_COLUMNS)
    found = np.empty((len(rows), 2), np.int64)
    _encode_all(table, np.float32(sparsity), found)
    return [Encoded(used, digits) for used, digits in found.tolist()]


def check_all(
    data: Tensor, numels: Sequence[int], coded: Sequence[bool]
) -> list[int] | None:
    """Return the sizes of pieces in a row; ``None``: one of them is not whole.

    Args:
        data: uint8[*], contiguous: for a coded piece a frame, else its float32 values.
        numels: of the pieces.
        coded: which of them are frames.
    """
    sizes = np.empty(len(numels), np.int64)
    table = np.array([numels, coded], np.int64)
    return sizes.tolist() if _check_all(data.numpy(), table, sizes) else None


def add_all(sums: Sequence[tuple[Tensor, Sequence[Tensor]]], *, anew: bool) -> None:
    """Add frames to some values, each as ``add`` does, by one call.

    Args:
        sums: values, float32[n], with their frames.
        anew: set the values to 0 before.

    Raises:
        InputError: some values are not contiguous.
    """
    rows = []
    for acc, frames in sums:
        if not acc.is_contiguous():
            raise InputError(_not_contiguous(acc))
        at, elements, first = acc.data_ptr(), acc.numel(), anew
        for frame in frames:
            known = frame.data_ptr(), frame.numel()
            rows.append((at, elements, *known, first))
            first = False
    _add_all(np.array(rows, np.int64).reshape(-1, _FRAME_COLUMNS))


def _not_contiguous(x: Tensor) -> str:
    return f"{x.numel()} values with strides {x.stride()} must be contiguous"


@kernel()
def _encode(
    x: Floats, largest_bits: np.int32, sparsity: np.float32, frame: Bytes
) -> tuple[np.int64, int]:
    """Write the frame of ``x``, whose largest magnitude has some bits.

    Returns:
        The number of bytes, and of digits that are not 0.
    """
    largest = float_of(largest_bits)
    if largest == 0 or not np.isfinite(largest):
        return _write_special(largest, frame), 0
    scale = min(np.float32(largest * sparsity), np.float32(FLOAT32_MAX))
    frame[:SCALE_BYTES].view(np.float32)[0] = scale
    threshold = np.float32(scale * np.float32(0.5))
    used, digits = _pack(x, scale, threshold, frame[SCALE_BYTES:])
    return SCALE_BYTES + used, digits


@kernel()
def _encode_all(pieces: Integers, sparsity: np.float32, found: Integers) -> None:
    """Encode every piece of a table, in its order."""
    for k in range(pieces.shape[0]):
        row = pieces[k]
        n = row[_NUMEL]
        x = carray(floats_at(row[_VALUES]), (n,))
        if row[_RESIDUAL] == _NOTHING:
            bits = _max_magnitude_bits(x)
        elif row[_SOURCE] == _NOTHING:
            bits = _add_residual(x, x, carray(floats_at(row[_RESIDUAL]), (n,)))
        elif row[_HALF]:
            residual = carray(floats_at(row[_RESIDUAL]), (n,))
            halves = carray(halves_at(row[_SOURCE]), (n,))
            bits = _add_to_bfloat16(x, halves, residual)
        else:
            residual = carray(floats_at(row[_RESIDUAL]), (n,))
            bits = _add_residual(x, carray(floats_at(row[_SOURCE]), (n,)), residual)
        frame = carray(bytes_at(row[_OUT]), (SCALE_BYTES + (n + 4) // 5,))
        found[k] = _encode(x, bits, sparsity, frame)


@kernel()
def _write_special(largest: np.float32, frame: Bytes) -> np.int64:
    """Write the frame of values that are all zero, or not all finite."""
    frame[:SCALE_BYTES] = 0
    if largest != 0:
        frame[:SCALE_BYTES] = _NAN_SCALE
    return np.int64(SCALE_BYTES)


@kernel()
def _max_magnitude_bits(x: Floats) -> np.int32:
    """Return the largest bit pattern without its sign: ordered like the magnitudes."""
    largest = np.int32(0)
    for i in range(x.size):
        largest = max(largest, bits_of(x[i]) & _MAGNITUDE)
    return largest


@kernel()
def _add_residual(x: Floats, source: Floats, residual: Floats) -> np.int32:
    """Make ``x`` the sum of both, and return the largest bit pattern in it.

    0 if ``source`` was all zero: then there is nothing to say, whatever the residual
    is. ``source`` may be ``x``.
    """
    any_bits, largest = np.int32(0), np.int32(0)
    for i in range(x.size):
        any_bits |= bits_of(source[i])
        x[i] = source[i] + residual[i]
        largest = max(largest, bits_of(x[i]) & _MAGNITUDE)
    return largest if any_bits & _MAGNITUDE != 0 else np.int32(0)


@kernel()
def _add_to_bfloat16(x: Floats, halves: Halves, residual: Floats) -> np.int32:
    """Do what ``_add_residual`` does, with bfloat16 values in place of those of ``x``.

    They are the upper halves of float32 values.
    """
    any_bits, largest = np.int32(0), np.int32(0)
    for i in range(x.size):
        bits = np.int32(halves[i]) << np.int32(16)
        any_bits |= bits
        x[i] = float_of(bits) + residual[i]
        largest = max(largest, bits_of(x[i]) & _MAGNITUDE)
    return largest if any_bits & _MAGNITUDE != 0 else np.int32(0)


@kernel()
def _pack(
    x: Floats, scale: np.float32, half: np.float32, body: Bytes
) -> tuple[np.int64, int]:
    """Write the folded quartic bytes of ``x`` and take what they send off x.

    Args:
        x: float32[n].
        scale: the value of a digit 1.
        half: the magnitude above which a value is sent: half of the scale, as a rule.
        body: uint8[≥ n / 5].

    Returns:
        The number of bytes, and of digits that are not 0.
    """
    n = x.size
    length = (n + 4) // 5
    full = max(0, n - 4 * length)  # bytes below this index have no padding
    quartic = np.empty(_BLOCK, np.uint8)
    room = np.uint64(body.size)
    used = np.uint64(0)
    digits = 0
    following = np.uint64(0)  # behind the last byte that is not five zeros
    for start in range(0, length, _BLOCK):
        count = min(_BLOCK, length - start)
        whole = max(0, min(start + count, full) - start)
        _compare(x, start, whole, half, quartic)
        for k in range(whole, count):
            byte = 0
            for partition in range(5):
                i = partition * length + start + k
                digit = 0
                if i < n:
                    digit = (x[i] > half) - (x[i] < -half)
                byte = 3 * byte + digit + 1
            quartic[k] = byte
        quartic[count:] = ZERO_BYTE
        nonzero = 0
        for base in range(0, _BLOCK, LANES):
            bits = nonzero_bytes(quartic, base)
            while bits != np.uint64(0):
                j = np.uint64(base) + lowest_bit(bits)
                bits &= bits - np.uint64(1)
                place = np.uint64(start) + j
                run = place - following
                following = place + np.uint64(1)
                if run <= np.uint64(_WORD_RUN) and used + np.uint64(8) < room:
                    write_word(body, used, _RUN_WORD[run])
                    used += _RUN_SIZE[run]
                else:
                    used = _write_run(body, used, run)
                body[used] = quartic[j]
                used += np.uint64(1)
                nonzero += 1
                digits += _DIGIT_COUNT[quartic[j]]
        if nonzero > _DENSE_BYTES and whole == _BLOCK:
            for partition in range(5):
                at = partition * length + start
                _take_off(x[at : at + _BLOCK], half, scale)
        elif nonzero > 0:
            _take_off_digits(x, start, quartic, scale)
    used = _write_run(body, used, np.uint64(length) - following)
    return np.int64(used), digits


@kernel()
def _compare(
    x: Floats, start: int, count: int, half: np.float32, quartic: Bytes
) -> None:
    """Write ``count`` quartic bytes from index ``start`` on, none with padding."""
    length = (x.size + 4) // 5
    x0 = x[start : start + count]
    x1 = x[length + start : length + start + count]
    x2 = x[2 * length + start : 2 * length + start + count]
    x3 = x[3 * length + start : 3 * length + start + count]
    x4 = x[4 * length + start : 4 * length + start + count]
    for j in range(count):
        quartic[j] = (
            121
            + 81 * ((x0[j] > half) - (x0[j] < -half))
            + 27 * ((x1[j] > half) - (x1[j] < -half))
            + 9 * ((x2[j] > half) - (x2[j] < -half))
            + 3 * ((x3[j] > half) - (x3[j] < -half))
            + ((x4[j] > half) - (x4[j] < -half))
        )


@kernel()
def _take_off(values: Floats, half: np.float32, scale: np.float32) -> None:
    """Take what is sent off ``values``. x − 0 is x, so zeros may take part."""
    nothing = np.float32(0)
    for j in range(values.size):
        x = values[j]
        values[j] = x - (scale if x > half else (-scale if x < -half else nothing))


@kernel()
def _take_off_digits(x: Floats, start: int, quartic: Bytes, scale: np.float32) -> None:
    """Take what a block of quartic bytes sends off x, where a digit is not 0."""
    length = (x.size + 4) // 5
    for base in range(0, _BLOCK, LANES):
        bits = nonzero_bytes(quartic, base)
        while bits != np.uint64(0):
            j = base + lowest_bit(bits)
            bits &= bits - np.uint64(1)
            for partition in range(5):
                digit = _DIGITS[quartic[j], partition]
                if digit != 0:
                    x[partition * length + start + j] -= np.float32(digit) * scale


@kernel()
def _write_run(body: Bytes, used: np.uint64, run: np.uint64) -> np.uint64:
    """Write a zero run of any length; return where the next byte goes."""
    one, longest = np.uint64(1), np.uint64(RUN_MAX)
    while run >= longest:
        body[used] = RUN_BASE + RUN_MAX - RUN_MIN
        used += one
        run -= longest
    if run > np.uint64(0):
        code = np.uint64(RUN_BASE - RUN_MIN) + run
        body[used] = np.uint64(ZERO_BYTE) if run == one else code
        used += one
    return used


@kernel()
def _check(body: Bytes, n: int) -> tuple[int, int, int]:
    """Return (problem, bytes used, quartic bytes unfolded) of the body of n values."""
    length = (n + 4) // 5
    full = max(0, n - 4 * length)
    used = 0
    at = 0
    # Far from the end nothing can be wrong.
    while used + _STRIDE <= body.size and at + RUN_MAX * _STRIDE <= full:
        at += _STRIDE + int(_more(body[used : used + _STRIDE]))
        used += _STRIDE
    while at < length:
        if used == body.size:
            return _ENDS_EARLY, used, at
        byte = body[used]
        used += 1
        if byte >= RUN_BASE:
            at += byte - RUN_BASE + RUN_MIN
            continue
        if at >= full:
            for partition in range(5):
                if partition * length + at >= n and _DIGITS[byte, partition] != 0:
                    return _PADDING, used, at
        at += 1
    if at > length:
        return _RUN_CROSSES, used, at
    return _OK, used, at


@kernel(inline="always")
def _more(folded: Bytes) -> np.uint16:
    """Return how many quartic bytes some folded ones are more than their number."""
    literal = np.uint8(RUN_BASE - 1)
    more = np.uint16(0)
    for j in range(folded.size):
        more = np.uint16(more + np.uint16(max(folded[j], literal) - literal))
    return more


@kernel()
def _check_all(data: Bytes, pieces: Integers, sizes: Integers) -> bool:
    """Find the sizes of pieces in a row; return whether all are whole."""
    at = 0
    for k in range(sizes.size):
        n = pieces[0, k]
        if not pieces[1, k]:
            sizes[k] = 4 * n
        else:
            if data.size - at < SCALE_BYTES:
                return False
            scale = data[at : at + SCALE_BYTES].view(np.float32)[0]
            sizes[k] = SCALE_BYTES
            if bits_of(scale) != 0 and not np.isnan(scale):
                if not (np.isfinite(scale) and scale > 0):
                    return False
                problem, used, _ = _check(data[at + SCALE_BYTES :], n)
                if problem != _OK:
                    return False
                sizes[k] += used
        at += sizes[k]
        if at > data.size:
            return False
    return True


@kernel()
def _add_all(frames: Integers) -> None:
    """Add every frame of a table, in its order."""
    for k in range(frames.shape[0]):
        row = frames[k]
        values = carray(floats_at(row[_ACC]), (row[_ELEMENTS],))
        if row[_FIRST_OF_SUM]:
            values[:] = 0
        _add_frame(carray(bytes_at(row[_FRAME]), (row[_BYTES],)), values)


@kernel()
def _add_frame(frame: Bytes, values: Floats) -> None:
    """Add a frame to values: the way that is the shorter for its content."""
    scale = frame[:SCALE_BYTES].view(np.float32)[0]
    body = frame[SCALE_BYTES:]
    share = _DENSE_SHARE if values.size < _LARGE else _LARGE_DENSE_SHARE
    if np.isnan(scale):
        values[:] = np.nan
    elif body.size > share * ((values.size + 4) // 5):
        _add_dense(body, scale, values)
    elif body.size > 0:
        _add(body, scale, values)


@kernel()
def _add(body: Bytes, scale: np.float32, acc: Floats) -> None:
    """Add a checked frame body to ``acc``; zero runs are skipped, not walked.

    Piece by piece: find the bytes with digits, without a branch for each; call for the
    memory they go to; add.
    """
    length = np.uint64((acc.size + 4) // 5)
    offset = np.empty(256, np.uint64)
    value = np.empty(256, np.float32)
    for byte in range(256):
        offset[byte] = np.uint64(_FIRST[byte]) * length
        value[byte] = np.float32(_FIRST_DIGIT[byte]) * scale
    places = np.empty(_LOOK_AHEAD + 1, np.uint64)
    literals = np.empty(_LOOK_AHEAD + 1, np.uint8)
    at = np.uint64(0)
    for start in range(0, body.size, _LOOK_AHEAD):
        found = 0
        for used in range(start, min(start + _LOOK_AHEAD, body.size)):
            byte = body[used]
            places[found] = at
            literals[found] = byte
            found += _HAS_DIGIT[byte]
            at += _STEP[byte]
        for k in range(found):
            prefetch(acc, offset[literals[k]] + places[k])
        for k in range(found):
            byte = literals[k]
            acc[offset[byte] + places[k]] += value[byte]
            if _HAS_MORE[byte]:
                for partition in range(_FIRST[byte] + 1, 5):
                    digit = _DIGITS[byte, partition]
                    if digit != 0:
                        place = np.uint64(partition) * length + places[k]
                        acc[place] += np.float32(digit) * scale


@kernel()
def _add_dense(body: Bytes, scale: np.float32, acc: Floats) -> None:
    """Add a checked frame body to ``acc``: unfold a block, then add all of it."""
    length = (acc.size + 4) // 5
    quartic = np.full(_BLOCK, ZERO_BYTE, np.uint8)
    owed = np.empty(_BLOCK, np.int8)
    used = np.uint64(0)
    filled = np.uint64(0)
    for start in range(0, length, _BLOCK):
        count = min(_BLOCK, length - start)
        while filled < np.uint64(count):
            byte = body[used]
            used += np.uint64(1)
            quartic[filled] = byte  # a run in the place of its first zero
            filled += _STEP[byte]
        filled -= np.uint64(count)  # a run may reach into the next block
        for j in range(_BLOCK):
            quartic[j] = ZERO_BYTE if quartic[j] >= RUN_BASE else quartic[j]
        for partition in range(5):
            at = partition * length + start
            values = acc[at : max(at, min(at + count, acc.size))]
            _peel(quartic, np.uint8(_POWERS[partition]), owed)
            _subtract(values, owed, scale)
        quartic[:] = ZERO_BYTE


@kernel(inline="always")
def _peel(quartic: Bytes, power: np.uint8, owed: NDArray[np.int8]) -> None:
    """Take the first digit off quartic bytes, and write what it is less than 0."""
    twice = np.uint8(2 * power)
    for j in range(quartic.size):
        byte = quartic[j]
        once = power if byte >= power else np.uint8(0)
        again = power if byte >= twice else np.uint8(0)
        owed[j] = np.int8(byte < power) - np.int8(byte >= twice)
        quartic[j] = np.uint8(np.uint8(byte - once) - again)


@kernel(inline="always")
def _subtract(values: Floats, owed: NDArray[np.int8], scale: np.float32) -> None:
    """Take ``owed`` times ``scale`` off ``values``: x − 0.0 is x, for −0.0 too."""
    for j in range(values.size):
        values[j] -= np.float32(owed[j]) * scale
