"""What 3LC is compared with in its paper, and top-k: codecs with true bytes.

Each is an ``lc3.codec.Codec`` with a frame of its own, so that lc3's engine exchanges
them both ways, with error feedback where the method has it. A frame starts with a
float32; NaN says that the values were not finite, and nothing follows.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec import Encoded
from lc3.codec.reference import digits_from, quartic
from lc3.errors import FormatError
from lc3.format import SCALE_BYTES, quartic_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass
class Baseline(ABC):
    """What the codecs below share: special frames, feedback, lengths.

    Attributes:
        feedback: whether what a frame lacks goes into the next one.
    """

    feedback: bool = field(default=True, init=False)

    def encode(
        self,
        x: Tensor,
        sparsity: float,  # noqa: ARG002  # the protocol's
        out: Tensor,
        residual: Tensor | None = None,
        density: float | None = None,  # noqa: ARG002
        source: Tensor | None = None,
    ) -> Encoded:
        """See ``lc3.codec.Codec.encode``; ``sparsity`` means nothing here."""
        if source is not None:
            x.copy_(source)
        values = x.numpy()
        if residual is not None:
            nothing = not values.any()
            values += residual.numpy()
            if nothing:
                return self._special(0.0, out)
        if not np.isfinite(values).all():
            return self._special(math.nan, out)
        if not values.any():
            return self._special(0.0, out)
        frame = self.write(values)
        out.numpy()[: frame.size] = frame
        decoded = self.read(frame, values.size)
        values -= decoded
        if not self.feedback:
            values[:] = 0
        return Encoded(frame.size, int(np.count_nonzero(decoded)))

    def check(self, frame: Tensor, numel: int) -> int:
        """See ``lc3.codec.Codec.check``."""
        if frame.numel() < SCALE_BYTES:
            raise FormatError(f"{frame.numel()} bytes are too few for a frame")
        scale = float(frame[:SCALE_BYTES].clone().view(torch.float32))
        if scale == 0 or math.isnan(scale):
            return SCALE_BYTES
        size = self.frame_bytes(numel)
        if frame.numel() < size:
            raise FormatError(f"a frame of {size} bytes is due, {frame.numel()} came")
        return size

    def add(self, frame: Tensor, acc: Tensor) -> None:
        """See ``lc3.codec.Codec.add``."""
        if frame.numel() > SCALE_BYTES:
            acc.numpy()[:] += self.read(frame.numpy(), acc.numel())
        elif frame.clone().view(torch.float32).isnan():
            acc.fill_(math.nan)

    def max_frame_bytes(self, numel: int) -> int:
        """Return the size of the largest frame of ``numel`` values."""
        return self.frame_bytes(numel)

    @abstractmethod
    def frame_bytes(self, numel: int) -> int:
        """Return the size of every frame of ``numel`` values that is not special."""

    @abstractmethod
    def write(self, values: Floats) -> Bytes:
        """Return the frame of finite values, some of them not 0."""

    @abstractmethod
    def read(self, frame: Bytes, numel: int) -> Floats:
        """Return the values of such a frame."""

    def _special(self, scale: float, out: Tensor) -> Encoded:
        out[:SCALE_BYTES] = torch.tensor([scale]).view(torch.uint8)
        return Encoded(SCALE_BYTES, 0)


class Int8(Baseline):
    """8-bit integers: 255 equal steps to the largest magnitude, no feedback."""

    def __post_init__(self) -> None:
        self.feedback = False

    def frame_bytes(self, numel: int) -> int:
        """A scale, a byte a value."""
        return SCALE_BYTES + numel

    def write(self, values: Floats) -> Bytes:
        """See ``Baseline.write``."""
        step = np.abs(values).max() / np.float32(127)
        step = max(step, np.float32(np.finfo(np.float32).tiny))
        levels = np.rint(values / step).clip(-127, 127).astype(np.int8)
        return np.concatenate([_bytes(step), levels.view(np.uint8)])

    def read(self, frame: Bytes, numel: int) -> Floats:
        """See ``Baseline.read``."""
        levels = frame[SCALE_BYTES : SCALE_BYTES + numel].view(np.int8)
        values: Floats = np.multiply(levels, _floats(frame, 1)[0], dtype=np.float32)
        return values


@dataclass
class StochasticTernary(Baseline):
    """Three values chosen at random without bias (TernGrad), quartic, no feedback.

    Attributes:
        seed: differs between ranks, so that their errors average out.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        self.feedback = False
        self._random = np.random.default_rng(self.seed)

    def frame_bytes(self, numel: int) -> int:
        """A scale, a byte for five values."""
        return SCALE_BYTES + quartic_bytes(numel)

    def write(self, values: Floats) -> Bytes:
        """See ``Baseline.write``."""
        scale = np.abs(values).max()
        chance = self._random.random(values.size, np.float32)
        digits = np.where(chance * scale < np.abs(values), np.sign(values), 0)
        return np.concatenate([_bytes(scale), quartic(digits.astype(np.int8))])

    def read(self, frame: Bytes, numel: int) -> Floats:
        """See ``Baseline.read``."""
        digits = digits_from(frame[SCALE_BYTES : self.frame_bytes(numel)], numel)
        values: Floats = np.multiply(digits, _floats(frame, 1)[0], dtype=np.float32)
        return values


class OneBit(Baseline):
    """One bit a value: two levels of least squared error, with feedback (1-bit SGD)."""

    def frame_bytes(self, numel: int) -> int:
        """Two levels, a bit a value."""
        return 2 * SCALE_BYTES + -(-numel // 8)

    def write(self, values: Floats) -> Bytes:
        """See ``Baseline.write``."""
        positive = values > 0
        high = values[positive].mean() if positive.any() else np.float32(0)
        low = values[~positive].mean() if not positive.all() else np.float32(0)
        # The first float32 of a frame must not be 0; the bits say which level is which.
        if high == 0:
            positive, high, low = ~positive, low, high
        levels = _bytes(np.array([high, low], np.float32))
        return np.concatenate([levels, np.packbits(positive)])

    def read(self, frame: Bytes, numel: int) -> Floats:
        """See ``Baseline.read``."""
        high, low = _floats(frame, 2)
        bits = np.unpackbits(frame[2 * SCALE_BYTES :], count=numel).astype(bool)
        values: Floats = np.where(bits, high, low)
        return values


@dataclass
class Largest(Baseline):
    """The largest values as float32, where they are as a bitmap or as indices.

    Attributes:
        share: share of the values that are sent, at least one.
        bitmap: whether a bit a value says where they are, instead of int32 each.
    """

    share: float
    bitmap: bool

    def frame_bytes(self, numel: int) -> int:
        """A marker, the values, the places."""
        count = self._count(numel)
        places = -(-numel // 8) if self.bitmap else 4 * count
        return SCALE_BYTES + 4 * count + places

    def write(self, values: Floats) -> Bytes:
        """See ``Baseline.write``."""
        count = self._count(values.size)
        chosen = torch.topk(torch.from_numpy(np.abs(values)), count, sorted=False)
        places = np.sort(chosen.indices.numpy()).astype(np.int32)
        if self.bitmap:
            bits = np.zeros(values.size, bool)
            bits[places] = True
            where = np.packbits(bits)
        else:
            where = places.view(np.uint8)
        return np.concatenate([_bytes(np.float32(1)), _bytes(values[places]), where])

    def read(self, frame: Bytes, numel: int) -> Floats:
        """See ``Baseline.read``."""
        count = self._count(numel)
        sent = _floats(frame[SCALE_BYTES:], count)
        where = frame[SCALE_BYTES + 4 * count :]
        if self.bitmap:
            places = np.flatnonzero(np.unpackbits(where, count=numel))
        else:
            places = where[: 4 * count].copy().view(np.int32).astype(np.int64)
        values = np.zeros(numel, np.float32)
        values[places] = sent
        return values

    def _count(self, numel: int) -> int:
        return max(1, round(self.share * numel))


def _bytes(values: np.float32 | Floats) -> Bytes:
    return np.atleast_1d(np.asarray(values, np.float32)).view(np.uint8)


def _floats(frame: Bytes, count: int) -> Floats:
    return frame[: 4 * count].copy().view(np.float32)
