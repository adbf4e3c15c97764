"""What codec and link cost here, measured; and when each form of a bucket arrives.

All ranks measure together and keep the slowest rank's figures, so that all of them
predict alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from lc3.codec import Codec
from lc3.config import Settings
from lc3.engines.exchange import Wire
from lc3.format import Tag
from lc3.plan import Piece
from lc3.transport.protocol import Transport
from lc3.wire.message import pack, unpack

_BITS = 0.8  # an element, push and pull: s = 1 with the entropy stage
_TRIED, _TRIES = 1 << 14, 24  # elements and steps, to see what a configuration sends
_DENSITY = 0.05
_ELEMENTS = 1 << 19
_FIRST_BYTES, _MOST_BYTES, _ENOUGH_S = 1 << 14, 1 << 22, 0.05
_REPEATS = 5
_CAST_S = 5e-4  # to call back into Python when the bytes are there, and cast


@dataclass(frozen=True)
class Costs:
    """What the slowest rank needs, seconds.

    Attributes:
        encode: time to encode an element, entropy stage included.
        decode: time to decode an element, entropy stage included.
        round: latency of an empty all-to-all.
        byte: time of a byte that a rank sends in an all-to-all.
        reduce: latency of an empty all-reduce.
        reduce_byte: time of a byte of the tensor in an all-reduce.
        cast: time to cast an element to bfloat16 and back.
        bits: bits that 3LC sends of an element, push and pull together.
    """

    encode: float
    decode: float
    round: float
    byte: float
    reduce: float
    reduce_byte: float
    cast: float = 0.0
    bits: float = _BITS

    def predict(self, elements: int, world: int, direct: bool) -> dict[Wire, float]:
        """Return the seconds of a bucket on its way, by form.

        Args:
            elements: of the bucket.
            world: number of ranks.
            direct: whether 3LC is exchanged without owners.
        """
        return {
            "float32": self.reduce + 4 * elements * self.reduce_byte,
            "bfloat16": self.reduce
            + _CAST_S
            + elements * (self.cast + 2 * self.reduce_byte),
            "3lc": self._coded(elements, world, direct)
            + self._sent(elements, world, direct) * self.byte,
        }

    def break_even(self, elements: int, world: int, direct: bool) -> float:
        """Return the link rate below which 3LC beats a float32 ring, bit/s."""
        ring = 2 * (world - 1) / world * 4 * elements
        saved = ring - self._sent(elements, world, direct)
        return 8 * saved / self._coded(elements, world, direct)

    def _coded(self, elements: int, world: int, direct: bool) -> float:
        """Return the seconds of 3LC but for its bytes.

        A push and its pull encode, an owner decodes W parts, everybody the means;
        without owners everybody encodes once and decodes W.
        """
        if direct:
            return self.round + elements * (self.encode + world * self.decode)
        coding = elements * ((1 + 1 / world) * self.encode + 2 * self.decode)
        return 2 * self.round + coding

    def _sent(self, elements: int, world: int, direct: bool) -> float:
        others = (world - 1) / 2 if direct else (world - 1) / world
        return others * elements * self.bits / 8


def codec_costs(
    codec: Codec, config: Settings, threads: int = 1
) -> tuple[float, float]:
    """Return seconds an element to encode into a message, and to check and add it."""
    generator = torch.Generator().manual_seed(0)
    x = 0.2 * torch.rand(_ELEMENTS, generator=generator, dtype=torch.float32)
    x[torch.rand(_ELEMENTS, generator=generator, dtype=torch.float32) < _DENSITY] = 1.0
    buffer = torch.empty(codec.max_frame_bytes(_ELEMENTS), dtype=torch.uint8)
    residual, values, work = torch.zeros_like(x), torch.zeros_like(x), x.clone()
    piece, tag = Piece("", 0, _ELEMENTS, 0, coded=True), Tag(0, 0, 0, 0)
    message = buffer[:0]

    def encode() -> None:
        nonlocal message
        used, _ = codec.encode(work, 1.0, buffer, residual)
        message = pack([piece], [buffer[:used]], tag, config.entropy).message

    def decode() -> None:
        (frame,) = unpack(message, tag, [piece], codec)
        codec.add(frame, values)

    encoding = []
    for _ in range(_REPEATS):
        work.copy_(x)
        encoding.append(_seconds(encode))
    decoding = [_seconds(decode) for _ in encoding]
    each = _ELEMENTS * threads
    return median(encoding) / each, median(decoding) / each


def sent_bits(codec: Codec, config: Settings) -> float:
    """Return bits of an element, push and pull, that a configuration sends.

    Of gradients with a normal distribution, after the residuals have settled.
    """
    generator = torch.Generator().manual_seed(0)
    piece, tag = Piece("", 0, _TRIED, 0, coded=True), Tag(0, 0, 0, 0)
    buffer = torch.empty(codec.max_frame_bytes(_TRIED), dtype=torch.uint8)
    sent = 0
    for sparsity in (config.sparsity, config.pull_sparsity or config.sparsity):
        residual = torch.zeros(_TRIED, dtype=torch.float32)
        for step in range(_TRIES):
            x = torch.randn(_TRIED, generator=generator, dtype=torch.float32)
            used, _ = codec.encode(x, sparsity, buffer, residual, config.density)
            if 2 * step >= _TRIES:
                packed = pack([piece], [buffer[:used]], tag, config.entropy)
                sent += 8 * packed.message.numel()
    return sent / (_TRIES // 2) / _TRIED


def cast_cost() -> float:
    """Return seconds an element to bfloat16, divided by the world size, and back."""
    x = torch.rand(_ELEMENTS, dtype=torch.float32)
    return (
        median(_seconds(lambda: x.copy_(x.bfloat16().div_(2))) for _ in range(_REPEATS))
        / _ELEMENTS
    )


def link_costs(transport: Transport) -> tuple[float, float, float, float]:
    """Return ``Costs``' round, byte, reduce and reduce_byte; collective."""
    others = transport.world - 1

    def gather(sent: int) -> None:
        transport.all_gather(torch.zeros(max(1, sent // others), dtype=torch.uint8))

    def reduce(size: int) -> None:
        transport.all_reduce(torch.zeros(max(1, size // 4), dtype=torch.float32))

    round_s, byte_s = _line(transport, gather)
    reduce_s, reduce_byte_s = _line(transport, reduce)
    return round_s, byte_s, reduce_s, reduce_byte_s


def measure(
    transport: Transport, codec: Codec, config: Settings, threads: int
) -> Costs:
    """Measure everything, the same on every rank; collective."""
    own = (*codec_costs(codec, config, threads), cast_cost(), sent_bits(codec, config))
    encode, decode, cast, bits = _slowest(transport, own)
    return Costs(encode, decode, *link_costs(transport), cast, bits)


def _line(transport: Transport, send: Callable[[int], None]) -> tuple[float, float]:
    """Return seconds of nothing and of a byte more; larger until it takes a while."""

    def timed(size: int) -> float:
        _slowest(transport, (0.0,))  # all ranks begin together
        return _slowest(transport, (_seconds(lambda: send(size)),))[0]

    timed(1)
    nothing = median(timed(1) for _ in range(_REPEATS))
    size = _FIRST_BYTES
    while (whole := min(timed(size), timed(size))) < _ENOUGH_S and size < _MOST_BYTES:
        size *= 4
    return nothing, max(whole - nothing, 0.0) / size


def _slowest(transport: Transport, seconds: tuple[float, ...]) -> list[float]:
    message = torch.tensor(seconds, dtype=torch.float64).view(torch.uint8)
    everybody = [d.clone().view(torch.float64) for d in transport.all_gather(message)]
    slowest: list[float] = torch.stack(everybody).amax(dim=0).tolist()
    return slowest


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
