"""The bytes of lc3, format versions 1 and 2. This docstring is the specification.

All integers and floats are little-endian. "float32" is IEEE 754 binary32; arithmetic is
float32 with round-half-to-even, no fused multiply-add, no flush of subnormals.
``ceil(a / b)`` is exact.

Plan
====
Both ends know which values a message carries, so the bytes do not say it. Given the
ordered list of the trainable parameters (name, shape), the number of ranks ``W`` and
the configuration:

- A parameter of ``n`` ≥ 1 elements is flattened (in memory order) and cut into
  ``k = min(W, max(1, ceil(n / min_share)))`` consecutive slices; the first ``n mod k``
  have ``floor(n / k) + 1`` elements, the others ``floor(n / k)``. A parameter without
  elements has no slice.
- Slices get the owners 0, 1, …, W−1, 0, 1, … in turn, through the whole list: coded and
  raw ones each for themselves, since they often alternate.
- A *piece* is one slice, or, when ``block`` is set, each ``block`` consecutive elements
  of it (the last may be shorter). Every coded piece has a scale of its own.
- A parameter is *raw* (all its pieces are), or *coded*. The configuration decides.
- Plan fingerprint: CRC-32 (the one of zlib, gzip, PNG) of this UTF-8 text, each line
  ended by a line feed: ``lc3 plan 2``, ``world W``, ``block B`` (0 when there is none),
  ``min_numel M``, ``min_share S``, then for each parameter in order
  ``coded n name`` or ``raw n name``.

Frame: one coded piece of n values x, encoded with the sparsity multiplier s, 1 ≤ s < 2
========================================================================================
::

    scale   float32                         4 bytes
    body    zero-run-coded quartic bytes    0 to ceil(n / 5) bytes

1. ``scale = min(max|x| · float32(s), largest finite float32)``: one float32 product.
2. ``half = scale · 0.5``; ``digit[i] = (x[i] > half) − (x[i] < −half)``. This equals
   ``round_half_even(x[i] / scale)`` wherever ``half`` is exact (it is rounded only when
   it is subnormal). A value of exactly ``half`` is digit 0.
3. Decoded value: ``digit[i] · scale``. What stays with the sender, the residual, is
   ``x[i] − digit[i] · scale``. It is exact: ``decoded + residual == x``.
4. Quartic bytes: ``L = ceil(n / 5)``, ``d[i] = digit[i] + 1`` for ``i < n`` and 1 for
   ``n ≤ i < 5L``. Byte ``i``, 0 to 242, is
   ``81·d[i] + 27·d[L+i] + 9·d[2L+i] + 3·d[3L+i] + d[4L+i]``. Five zeros are the byte
   121.
5. Zero runs: going from left to right, a maximal run of bytes 121 is cut greedily into
   runs of 14 and one rest. A run of ``k`` from 2 to 14 becomes the byte
   ``243 + (k − 2)``; a single 121 stays.

The frame ends where L quartic bytes have been unfolded; it needs no length. A decoder
accepts any sequence of bytes that unfolds to exactly L; it refuses one that ends too
early, a run that crosses the end, and padding digits (``n ≤ i < 5L``) other than 1.

Special scales, all with an empty body:

- ``00 00 00 00`` (0.0): every value is 0. Written for all-zero x, and by a rank that
  has nothing to say about the piece this time (its residual then stays what it was).
- NaN (written as ``00 00 c0 7f``, any NaN is accepted): x was not finite somewhere. It
  decodes to NaN in all n values, and the sender's residual stays what it was.

Every other scale must be finite and > 0 (−0.0 and infinities are refused).

Decoding *adds*: where a digit is 0 the accumulator is not touched. For NaN it becomes
NaN.

Worked examples (hexadecimal)::

    x = [1, -1, 0.25, 0, 0.75], s = 1      scale 1.0, digits 1 -1 0 0 1, L = 1
                                           81·2 + 27·0 + 9·1 + 3·1 + 2 = 176
        frame    00 00 80 3f b0            residual [0, 0, 0.25, 0, -0.25]
    x = [3, 0, 0, 0, 0, 0], s = 1.5        scale 4.5, half 2.25, L = 2, padding 4
                                           byte 0 takes x[0] x[2] x[4], two of padding:
                                           81·2 + 27 + 9 + 3 + 1 = 202, byte 1 is 121
        frame    00 00 90 40 ca 79         residual [-1.5, 0, 0, 0, 0, 0]
    x = 150 values: 8, then 149 zeros      L = 30: byte 202, then 29 times 121, a run of
    s = 1                                  14 + 14 + 1; residual all zero
        frame    00 00 00 41 ca ff ff 79

Raw piece: n float32. No residual: it loses nothing.

Message: all pieces that one rank sends to one rank for one bucket, in one direction
====================================================================================
::

    offset  bytes  field
    0       4      magic: "3LC1" or "3LC2"; the last character is the format version
    4       4      flags: bit 0 entropy-coded body, bit 1 abort; all others 0
    8       8      step: synchronised backward passes so far, from 0
    16      4      bucket
    20      4      sender: rank in the group
    24      4      plan fingerprint
    28      8      length of the body in bytes
    36      4      CRC-32 (zlib) of bytes 0 to 35 followed by the body
    40      …      body

The body holds the pieces in plan order (parameter order, then position): of the
bucket's parameters, those pieces that the *receiver* owns when gradients are pushed,
those that the *sender* owns when means are pulled, and all where there are no owners
(W ranks of which each sends to all, see ``Tuning.topology``). It must be used up
exactly. With the abort flag the body is a UTF-8 reason, and the receiver stops.

Entropy-coded body (flag bit 0): one zstd frame (RFC 8878) whose content is all raw
pieces in plan order, then all frames in plan order; they stand apart so that each kind
gets code tables of its own. The zstd frame says its content size, uses no dictionary,
and its window is at most 2^19 bytes or the content size, whichever is larger. The CRC
is over the bytes as sent. A sender uses it where it makes the body smaller. A receiver
knows from the plan the exact size of the raw pieces and the largest of the frames, and
refuses a content size beyond their sum before it reserves memory.

Range-coded body: a message of version 2, whose flag bit 0 is set, has it instead. All
else is as in version 1, and a message whose body is not range-coded is of version 1. ::

    z       uint32                          only if the plan has raw pieces here
    raw     z bytes                         all of them in plan order, as they are if z
                                            is their size, else as a zstd frame as above
    heads   of each frame in plan order     its scale, and if a body follows its model:
                                            d, or 128 + d, a, b, each below 128
    state   6 bytes                         only if there is a body, as what follows is
    words   uint16 each                     to the end

State and words are one rANS stream of the bodies' folded bytes in plan order. What a
byte may be depends on the one before it in its frame: state A after a byte that is not
a zero run and at the start, state C after a run of 14, state B after a shorter run or a
single 121. Bytes are sorted into 19 classes: k = 1 to 5 digits that are not 0 (10, 40,
80, 80 and 32 bytes), then zero runs of 1 (the byte 121), 2, …, 14. All bytes of a class
are equally likely. In fixed point, with one = 2^30 and x * y = floor(x · y / one):

1. ``p(i) = floor(G[i mod 8] · 2^14 / 2^floor(i / 8))`` with G = 65536, 60097, 55109,
   50535, 46341, 42495, 38968, 35734: the density 2^(−i/8). Five zeros there have
   ``q = one − p(i), z(i) = (((q * q) * (q * q)) * q)``.
2. The model is d, a, b; of a model of one byte a = b = d. ``h = floor(p(d) / 2)``,
   ``c[k] = one * h * … * h * q * … * q`` from the left, k times h and 5 − k times
   q = one − p(d). ``t`` is the sum of c[k] times the size of the class.
3. ``y = z(a)`` in state A, z(b) in state C, 0 in state B. A byte of class k gets
   ``floor(((one − y) * c[k]) · 65280 / t)`` slots, a run of 1 to 13
   ``floor((r * (one − z(b))) · 65280 / one)``, where r is y for a run of 1 and
   ``r * z(b)`` of the run before for the others, and a run of 14
   ``floor(r · 65280 / one)``; each at least one slot.
4. Of the classes in order the first that has most slots in all gets, for each of its m
   bytes, floor(rest / m) more, where rest is what is left of 65536.
5. Slots are given out from 0 in the order of classes, and in a class of byte values.

A decoder begins with the state x, 2^32 ≤ x < 2^48. A byte is the one whose n slots from
f on hold ``x mod 65536``; then ``x = n · floor(x / 65536) + x mod 65536 − f``, and if
that is below 2^32 it becomes ``65536 · x + the next word``. A frame ends with its last
quartic byte. In the end x must be 2^32 and no word be left. An encoder goes backwards
from x = 2^32: if x ≥ 2^32 · n the word ``x mod 65536`` goes before those that it has,
and x becomes floor(x / 65536); then
``x = 65536 · floor(x / n) + x mod n + f``. Which models it chooses is its own affair.

A single frame with a transport of its own may travel as a zstd frame too. That begins
with ``28 b5 2f fd``, which is negative as a scale: no frame of this format does.

Worked example: a message with one raw piece of 100 values 0.0 and, before it in plan
order, the frame ``00 00 00 41 ca ff ff 79`` from above. The plain body has 408 bytes:
the frame, then 400 zero bytes. Entropy-coded, 30 by zstd 1.5.7 (others may differ)::

    28 b5 2f fd 60 98 00 4c 00 00 10 00 00 01 00 8b 2a c0 02   the 400 zero bytes
    41 00 00 00 00 00 41 ca ff ff 79                           the frame, as it was

Range-coded it is (encoders may choose another model)::

    00 00 00 41 3a c8 07 ae f6 9a 63    scale, model 58, state 0x639af6ae07c8

Buckets of a step count from 0. Numbers from ``ff ff ff f0`` on are not gradients':
``ff ff ff ff`` is what ``lc3.hooks.push_pull`` pulls, ``ff ff ff fe`` a norm,
``ff ff ff fd`` whatever belongs to no step, ``ff ff ff fc`` what ranks have sent.

A receiver checks length, magic, CRC, flags, abort, plan, sender, step and bucket, in
this order, before it decodes anything.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lc3.errors import FormatError, PeerError, PlanMismatch

MAGIC = b"3LC1"
MAGIC_RANGE_CODED = b"3LC2"
Coding = Literal["none", "zstd", "rans"]  # of a body
FLAG_ENTROPY_CODED = 1
FLAG_ABORT = 2
PULL_BUCKET, NORM_BUCKET = 0xFFFFFFFF, 0xFFFFFFFE
ASIDE_BUCKET, BUDGET_BUCKET = 0xFFFFFFFD, 0xFFFFFFFC
ZSTD_MAGIC = bytes.fromhex("28b52ffd")

SCALE_BYTES = 4
ZERO_BYTE = 121
RUN_BASE = 243
RUN_MIN = 2
RUN_MAX = 14
FLOAT32_MAX = 3.4028234663852886e38
NAN_SCALE = b"\x00\x00\xc0\x7f"
ZERO_SCALE = b"\x00\x00\x00\x00"

_HEADER = struct.Struct("<4sIQIIIQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size


def quartic_bytes(numel: int) -> int:
    """Return how many quartic bytes ``numel`` values make: L of the specification."""
    return -(-numel // 5)


def max_frame_bytes(numel: int) -> int:
    """Return the size of the largest frame of ``numel`` values."""
    return SCALE_BYTES + quartic_bytes(numel)


def has_body(data: bytes) -> bool:
    """Whether quartic bytes follow the scale of the frame at the start of ``data``.

    Raises:
        FormatError: there is no scale, or one that no frame has.
    """
    if len(data) < SCALE_BYTES:
        raise FormatError(
            f"{len(data)} bytes are too few for a frame's scale of 4 bytes"
        )
    (scale,) = struct.unpack_from("<f", data)
    if data[:SCALE_BYTES] == ZERO_SCALE or math.isnan(scale):
        return False
    if not (math.isfinite(scale) and scale > 0):
        raise FormatError(
            f"scale {scale} of a frame must be 0, NaN, or finite and positive"
        )
    return True


def is_nan_frame(data: Tensor) -> bool:
    """Whether a frame, uint8[*], decodes to NaN: it has no body then."""
    return data.numel() == SCALE_BYTES and math.isnan(scale_of(data))


def scale_of(frame: Tensor) -> float:
    """Return the largest magnitude that a frame, uint8[*], decodes to; may be NaN."""
    scale: float
    (scale,) = struct.unpack("<f", bytes(frame[:SCALE_BYTES].numpy()))
    return scale


@dataclass(frozen=True, slots=True)
class Tag:
    """What a message says besides its body: who sent it, when, under which plan."""

    sender: int
    step: int
    bucket: int
    plan: int

    def __str__(self) -> str:
        return f"rank {self.sender}, bucket {self.bucket}, step {self.step}"


def seal(message: Tensor, tag: Tag, flags: int = 0, magic: bytes = MAGIC) -> Tensor:
    """Write the header of ``message``, whose body is in place behind it, and return it.

    Args:
        message: uint8[HEADER_BYTES + body], contiguous, on the CPU. The first
            ``HEADER_BYTES`` are overwritten.
        tag: the tag of the header.
        flags: bits of the specification.
        magic: the format version.
    """
    data = _bytes_of(message)
    body = data[HEADER_BYTES:]
    _HEADER.pack_into(
        data, 0, magic, flags, tag.step, tag.bucket, tag.sender, tag.plan, len(body)
    )
    crc = zlib.crc32(body, zlib.crc32(data[: _HEADER.size]))
    _CRC.pack_into(data, _HEADER.size, crc)
    return message


def seal_abort(reason: str, tag: Tag) -> Tensor:
    """Return the message that tells every other rank to stop, and why.

    The reason is cut to 2 000 bytes.
    """
    body = reason.encode("utf-8", "replace")[:2000]
    message = torch.frombuffer(bytearray(HEADER_BYTES) + body, dtype=torch.uint8)
    return seal(message, tag, FLAG_ABORT)


def unseal(message: Tensor, expected: Tag) -> tuple[Tensor, Coding]:
    """Check ``message`` against what must arrive now and return what it carries.

    Args:
        message: uint8[*], contiguous, on the CPU.
        expected: the sender, step, bucket and plan that are due.

    Returns:
        The body, a view, and how it is entropy-coded.

    Raises:
        FormatError: it is damaged, of another format, or belongs to another exchange.
        PlanMismatch: it is whole, but its sender works by another plan.
        PeerError: it is whole and says that its sender stopped.
    """
    data = _bytes_of(message)
    if len(data) < HEADER_BYTES:
        raise FormatError(
            f"message from {expected}: {len(data)} bytes, but a header alone has "
            f"{HEADER_BYTES}; it was cut on the way"
        )
    magic, flags, step, bucket, sender, plan, body_bytes = _HEADER.unpack_from(data)
    if magic not in (MAGIC, MAGIC_RANGE_CODED):
        raise FormatError(
            f"message from {expected}: starts with {magic!r}, not {MAGIC!r} or "
            f"{MAGIC_RANGE_CODED!r}; is the sender an lc3 of the same format version?"
        )
    body = data[HEADER_BYTES:]
    if len(body) != body_bytes:
        raise FormatError(
            f"message from {expected}: the header announces {body_bytes} bytes of "
            f"body, {len(body)} came; it was cut or lengthened on the way"
        )
    (crc,) = _CRC.unpack_from(data, _HEADER.size)
    found = zlib.crc32(body, zlib.crc32(data[: _HEADER.size]))
    if crc != found:
        raise FormatError(
            f"message from {expected}: CRC-32 is {found:08x}, the header says "
            f"{crc:08x}; it was damaged in memory or on the way"
        )
    known = FLAG_ABORT | FLAG_ENTROPY_CODED
    if flags & ~known or (magic == MAGIC_RANGE_CODED and flags != FLAG_ENTROPY_CODED):
        raise FormatError(
            f"message from {expected}: flags {flags:#x} ask for a feature that this "
            "version does not have; use the same lc3 version on every rank"
        )
    if flags & FLAG_ABORT:
        raise PeerError(sender, bytes(body).decode("utf-8", "replace"))
    if plan != expected.plan:
        raise PlanMismatch(
            f"message from {expected}: made by plan {plan:08x}, this rank works by "
            f"{expected.plan:08x}; model, world size and Config must be the same "
            "everywhere"
        )
    if (sender, step, bucket) != (expected.sender, expected.step, expected.bucket):
        raise FormatError(
            f"expected the message from {expected}, got the one from rank {sender}, "
            f"bucket {bucket}, step {step}; ranks run different numbers of steps"
        )
    body_of = message[HEADER_BYTES:]
    if not flags & FLAG_ENTROPY_CODED:
        return body_of, "none"
    return body_of, "zstd" if magic == MAGIC else "rans"


def _bytes_of(message: Tensor) -> memoryview:
    return memoryview(message.numpy())  # type: ignore[arg-type]  # a buffer since 3.12
