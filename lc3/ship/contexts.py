"""The context coder: whole numbers of a matrix as an adaptive binary range code.

A number is a few yes-or-no questions: has its size more than 0, 1, 2, … binary digits;
is it negative; what are the digits below the highest, the first two of them with a
model. Each answer is coded with a probability that both ends learn on the way. What is
known so far of the row and of the column, how active they were and which sign they had,
says most in gradients and deltas, whose quiet rows and columns an order-0 coder cannot
see. Six such contexts give an opinion each, and an online mixture in the logistic
domain weighs them.

The predictive coder has two contexts more, of what a filter expects here: rows of a
gradient, or of a sum of a few, are nearly combinations of each other, and the filter
learns along a row which combination of the rows before it is.

All arithmetic is in integers, so any machine decodes the same numbers. With the bytes
in ``lc3.ship.format`` this module is the specification.

Sources: universal coding with nothing sent beforehand, Choi, El-Khamy, Lee, arXiv
1802.02271; mixing of contexts, Mahoney, PAQ (Florida Tech. CS-2005-16); normalized
least mean squares, Widrow and Stearns, Adaptive Signal Processing, 1985.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lc3.codec.compiled import kernel
from lc3.errors import FormatError

Numbers = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

LARGEST = (1 << 24) - 1  # magnitude of a number
_LOGISTIC = [  # of 0, 1/8, …, 8, in units of 2^-16
    *(32768, 34813, 36843, 38841, 40793, 42687, 44511, 46254, 47911, 49474, 50941),
    *(52310, 53581, 54754, 55834, 56822, 57724, 58544, 59287, 59959, 60565, 61109),
    *(61598, 62036, 62428, 62778, 63090, 63368, 63615, 63835, 64030, 64203, 64357),
    *(64494, 64614, 64721, 64816, 64900, 64974, 65039, 65097, 65149, 65194, 65234),
    *(65269, 65300, 65328, 65352, 65374, 65393, 65410, 65425, 65438, 65449, 65459),
    *(65468, 65476, 65483, 65489, 65495, 65500, 65504, 65508, 65511, 65514),
]


def _tabulate() -> tuple[Integers, Integers]:
    """Return the logistic function of −2048 … 2047, units 1/256, and its inverse."""
    logistic = np.array([*_LOGISTIC, _LOGISTIC[-1]], np.int64)
    at = np.arange(4096) - 2048
    low, part = abs(at) >> 5, abs(at) & 31
    upper = (logistic[low] * (32 - part) + logistic[low + 1] * part) >> 5
    table = np.where(at >= 0, upper, 65536 - upper)
    inverse = np.searchsorted(table, np.arange(4096) * 16 + 8).clip(1, 4095) - 2048
    return table, inverse


_SQUASH, _STRETCH = _tabulate()  # the inverse of probabilities in units of 2^-12
_RATE = np.array([65536 // (n + 2) for n in range(128)], np.int64)
_LEAST = 24  # of 65536: no answer is likelier than all but this

_DIGITS = 24
_SIGN = 25  # questions 0 to 23 are those of how many digits there are
_FIRST, _SECOND = 26, 64  # of the digits below the highest, by how many there are
_QUESTIONS = 128
_CLASSES = 24  # of a mean magnitude, two for each octave
_SETS = _CLASSES + 3  # of weights: by class, for signs, for first and second digits
_CONTEXTS, _PREDICTING = 6, 8  # without and with what the filter expects
_VALUES = 24 * 24  # of a context
_TAPS = 64  # rows that the filter looks back, or as many as there are
_MOST = (1 << 15) - 1  # that it sees of a magnitude
_SPEED = 60 << 8  # of its learning, in units of 2^-16
_CALM = 4  # squared magnitude below which it learns no faster

_LOW, _HIGH, _CODE, _PLACE = range(4)


class _Model(NamedTuple):
    """What is learned on the way.

    Attributes:
        likely: int32[contexts, values · questions], probabilities, 22 bits.
        asked: uint8 of the same shape, how often.
        by_question: int64[questions, contexts], weights in units of 2^-16.
        by_class: int64[sets, contexts], the other weights.
        logits: int64[contexts], of the question that is being asked.
        places: int64[contexts], of its probabilities.
    """

    likely: Numbers
    asked: Bytes
    by_question: Integers
    by_class: Integers
    logits: Integers
    places: Integers


class _Filter(NamedTuple):
    """What expects numbers; without taps of a coder that does not predict.

    Attributes:
        history: int16[columns, taps], the rows before, row r in place r mod taps.
        weights: int32[taps], of each of them, units of 2^-16.
    """

    history: NDArray[np.int16]
    weights: Numbers


def _model(count: int) -> _Model:
    size = (count, _VALUES * _QUESTIONS)
    share = 65536 * 3 // 10 * _CONTEXTS // count
    return _Model(
        np.full(size, 1 << 21, np.int32),
        np.zeros(size, np.uint8),
        np.full((_QUESTIONS, count), share, np.int64),
        np.full((_SETS, count), share, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
    )


def _fresh(numel: int, rows: int, predicts: bool) -> tuple[_Model, _Filter]:
    """Return what a coder begins with."""
    taps = min(_TAPS, rows - 1) if predicts else 0
    history = np.zeros((numel // rows, taps), np.int16)
    count = _PREDICTING if taps else _CONTEXTS
    return _model(count), _Filter(history, np.zeros(taps, np.int32))


def encode(numbers: Numbers, rows: int, *, predicts: bool = False) -> bytes:
    """Return the code of a matrix.

    Args:
        numbers: int32[rows · columns], magnitudes at most ``LARGEST``.
        rows: of the matrix.
        predicts: by the predictive coder. Of one row its code is the same.
    """
    if numbers.size == 0:
        return b""
    room = 2 * numbers.size + 1024
    while True:
        data = np.empty(room, np.uint8)
        model, filtered = _fresh(numbers.size, rows, predicts)
        used = _code(numbers, rows, data, False, model, filtered)
        if used <= room:
            return data[:used].tobytes()
        room *= 4


def decode(
    data: memoryview, numel: int, rows: int, *, predicts: bool = False
) -> Numbers:
    """Return int32[numel] of a code, of ``rows`` rows, by the coder that wrote it.

    Raises:
        FormatError: the code is longer or shorter than such a matrix takes.
    """
    numbers = np.zeros(numel, np.int32)
    if numel == 0:
        return numbers
    code = np.frombuffer(data, np.uint8).copy()
    model, filtered = _fresh(numel, rows, predicts)
    used = _code(numbers, rows, code, True, model, filtered)
    if used - 3 != len(data):
        raise FormatError(f"a code takes {used - 3} bytes, but {len(data)} are there")
    return numbers


@kernel(inline="always")
def _class_of(mean: int) -> int:
    """Return the class of a mean magnitude in units of 1/256."""
    if mean < 4:
        return 0
    digits = 0
    while mean > 3:
        mean >>= 1
        digits += 1
    return min(2 * digits + (mean & 1) - 1, _CLASSES - 1)


@kernel()
def _narrow(bounds: Any, data: Bytes, decoding: bool, bit: int, p: int) -> int:
    """Code one answer of which "yes" has the probability p / 65536; return it."""
    low, high = bounds[_LOW], bounds[_HIGH]
    width, likely = high - low, np.uint64(p)
    middle = low + (width >> np.uint64(16)) * likely
    middle += ((width & np.uint64(0xFFFF)) * likely) >> np.uint64(16)
    if decoding:
        bit = 1 if bounds[_CODE] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + np.uint64(1)
    while (low ^ high) < np.uint64(1 << 24):
        place = np.int64(bounds[_PLACE])
        if decoding:
            byte = np.uint64(data[place] if place < data.size else 0)
            code = bounds[_CODE] & np.uint64(0xFFFFFF)
            bounds[_CODE] = (code << np.uint64(8)) | byte
        elif place < data.size:
            data[place] = np.uint8(high >> np.uint64(24))
        bounds[_PLACE] += np.uint64(1)
        low = (low & np.uint64(0xFFFFFF)) << np.uint64(8)
        high = ((high & np.uint64(0xFFFFFF)) << np.uint64(8)) | np.uint64(255)
    bounds[_LOW], bounds[_HIGH] = low, high
    return bit


@kernel()
def _ask(
    model: _Model,
    contexts: Integers,
    question: int,
    chosen: int,
    bounds: Any,
    data: Bytes,
    decoding: bool,
    bit: int,
) -> int:
    """Code one answer with what the model knows, and let it learn; return it."""
    one, other = 0, 0
    for k in range(model.logits.size):
        place = contexts[k] * _QUESTIONS + question
        logit = _STRETCH[model.likely[k, place] >> 10]
        model.places[k], model.logits[k] = place, logit
        one += model.by_question[question, k] * logit
        other += model.by_class[chosen, k] * logit
    one = min(max(one >> 16, -2047), 2047)
    other = min(max(other >> 16, -2047), 2047)
    p = _SQUASH[((one + other) >> 1) + 2048]
    bit = _narrow(bounds, data, decoding, bit, min(max(p, _LEAST), 65536 - _LEAST))
    off_one = (bit << 16) - _SQUASH[one + 2048]
    off_other = (bit << 16) - _SQUASH[other + 2048]
    for k in range(model.logits.size):
        logit, place = model.logits[k], model.places[k]
        model.by_question[question, k] += (logit * off_one + 65536) >> 17
        model.by_class[chosen, k] += (logit * off_other + 65536) >> 17
        asked = model.asked[k, place]
        off = (bit << 22) - model.likely[k, place]
        model.likely[k, place] += (off * _RATE[asked]) >> 16
        if asked < 127:
            model.asked[k, place] = asked + 1
    return bit


@kernel(inline="always")
def _sign(number: int) -> int:
    """Return 0, 1 or 2: negative, zero or positive."""
    return 1 + (number > 0) - (number < 0)


@kernel()
def _expected(filtered: _Filter, c: int) -> Any:
    """Return what a column's next number should be, units 1/256, and how sure.

    As the sum of squares of what was looked at.
    """
    total: Any = 0
    energy: Any = _CALM
    for k in range(filtered.weights.size):
        seen = np.int64(filtered.history[c, k])
        total += np.int64(filtered.weights[k]) * seen
        energy += seen * seen
    return min(max(total >> 8, -(1 << 23)), 1 << 23), energy


@kernel()
def _learn(
    filtered: _Filter, c: int, r: int, number: int, expected: int, energy: int
) -> int:
    """Let the filter learn from what came, and keep it; return what it was off."""
    seen = min(max(number, -_MOST), _MOST)
    off = (seen << 8) - expected
    gain = (off * _SPEED) // energy
    for k in range(filtered.weights.size):
        step = (gain * np.int64(filtered.history[c, k])) >> 8
        filtered.weights[k] = np.int32(np.int64(filtered.weights[k]) + step)
    filtered.history[c, r % filtered.weights.size] = seen
    return abs(off)


@kernel()
def _code(
    numbers: Numbers,
    rows: int,
    data: Bytes,
    decoding: bool,
    model: _Model,
    filtered: _Filter,
) -> Any:
    """Code or decode a matrix; return how many bytes its code takes, or were read.

    Args:
        numbers: int32[rows · columns]; written when decoding.
        rows: of the matrix.
        data: uint8[*]: read, 0 behind its end, or written as far as it goes.
        decoding: which way.
        model: a fresh one, changed.
        filtered: a fresh one, changed.
    """
    columns = numbers.size // rows
    bounds = np.array([0, 0xFFFFFFFF, 0, 0], np.uint64)
    if decoding:
        for first in range(4):
            byte = np.uint64(data[first] if first < data.size else 0)
            bounds[_CODE] = (bounds[_CODE] << np.uint64(8)) | byte
        bounds[_PLACE] = np.uint64(4)
    predicts = filtered.weights.size > 0
    sizes, signs = np.zeros(_PREDICTING, np.int64), np.zeros(_PREDICTING, np.int64)
    above = np.zeros(columns + 1, np.int64)  # the row before, and a 0
    # Running means of magnitudes, units 1/256, and of signs, ±4096.
    column_mean = np.full(columns, 128, np.int64)
    column_sign = np.zeros(columns, np.int64)
    overall = 128
    for r in range(rows):
        row_mean, row_sign, left, before = overall, 0, 0, 0
        missed = overall
        filtered.weights[:] = 0
        for c in range(columns):
            if decoding and c & 255 == 0 and bounds[_PLACE] > data.size + 4:
                return np.int64(bounds[_PLACE])  # longer than its bytes: refused
            if r == 0:
                column_mean[c] = overall
            number: Any = (
                np.int64(0) if decoding else np.int64(numbers[r * columns + c])
            )
            magnitude = abs(number)
            row, column = _class_of(row_mean), _class_of(column_mean[c])
            expected = _class_of(row_mean * column_mean[c] // max(overall, 1))
            near, far = min(abs(left), 3), min(abs(before), 2)
            up, right = min(abs(above[c]), 3), min(abs(above[c + 1]), 2)
            sizes[1] = row * 24 + near
            sizes[2] = column * 24 + up
            sizes[3] = row * 24 + column
            sizes[4] = ((near * 3 + far) * 4 + up) * 3 + right
            sizes[5] = expected * 24 + min(near + far + up, 5)
            hoped: Any = 0
            energy: Any = _CALM
            wrong, hoped_sign = 0, 0
            if predicts:
                hoped, energy = _expected(filtered, c)
                wrong, close = _class_of(missed), _class_of(abs(hoped))
                sizes[6], sizes[7] = close * 24 + expected, close * 24 + wrong
                hoped_sign = min(close, 11) + (12 if hoped < 0 else 0)
            digits = 0
            while digits < _DIGITS:
                more = 1 if magnitude >> digits else 0
                if not _ask(
                    model, sizes, digits, expected, bounds, data, decoding, more
                ):
                    break
                digits += 1
            negative = 0
            if digits:
                by_row, by_column = (row_sign + 4096) >> 9, (column_sign[c] + 4096) >> 9
                beside = _sign(left) * 3 + _sign(above[c])
                signs[1] = by_row * 3 + _sign(left)
                signs[2] = by_column * 3 + _sign(above[c])
                signs[3] = by_row * 17 + by_column
                signs[4] = (beside * 3 + _sign(before)) * 3 + _sign(above[c + 1])
                signs[5] = beside * 3 + min(digits, 3) - 1
                signs[6] = hoped_sign * 24 + wrong
                signs[7] = hoped_sign * 3 + min(digits, 3) - 1
                bit = 1 if number < 0 else 0
                chosen = _CLASSES
                negative = _ask(
                    model, signs, _SIGN, chosen, bounds, data, decoding, bit
                )
            known: Any = 1 if digits else 0
            for below in range(digits - 2, -1, -1):
                bit = (magnitude >> below) & 1
                which = digits - 2 - below
                if which == 0:
                    question, chosen = _FIRST + digits, _CLASSES + 1
                else:
                    question, chosen = _SECOND + 2 * digits + (known & 1), _CLASSES + 2
                if which < 2:
                    bit = _ask(
                        model, sizes, question, chosen, bounds, data, decoding, bit
                    )
                else:
                    bit = _narrow(bounds, data, decoding, bit, 32768)
                known = 2 * known + bit
            number = -known if negative else known
            if decoding:
                numbers[r * columns + c] = number
            if predicts:
                off = _learn(filtered, c, r, number, hoped, energy)
                missed += (min(off, 255 << 8) - missed) >> 4
            size = min(known, 255) << 8
            row_mean += (size - row_mean) >> (4 if c > 8 else 3)
            column_mean[c] += (size - column_mean[c]) // min(r + 2, 20)
            overall += (size - overall) >> (10 if r > 0 or c > 1000 else 6)
            if known:
                towards = -4096 if negative else 4095
                row_sign += (towards - row_sign) >> 3
                column_sign[c] += (towards - column_sign[c]) >> 3
            left, before = number, left
            above[c] = number
    place: Any = np.int64(bounds[_PLACE])
    if not decoding:
        if place < data.size:
            data[place] = np.uint8(bounds[_HIGH] >> np.uint64(24))
        place += 1
    return place
