"""The bytes of a shipped model, container format 1. This docstring specifies them.

All integers are little-endian. A *varint* is an unsigned integer of 7 bits a byte, the
lowest first, bit 7 set in all bytes but the last; at most 9 bytes, and no longer than
needed. A *text* is a varint, how many bytes follow, and those: UTF-8.

File
====
::

    header    8 bytes     "LC3M", version 1, flags (bit 0: a delta), two bytes 0
    sections  …           one for each stored tensor, in the order of the index
    index     …
    trailer   24 bytes    uint64 where the index begins, uint64 its length,
                          uint32 CRC-32 (zlib) of header, index and these 16 bytes,
                          "M3CL"

A reader takes the trailer, then the index, then the sections that it wants. Sections
stand back to back from byte 8 on, so lengths say where they are.

Index
=====
::

    base      only of a delta: 32 bytes SHA-256, text: a name for people
    notes     varint count, then two texts each: what safetensors calls metadata
    entries   varint count, then each

    entry     text name, uint8 dtype, varint number of dimensions ≤ 32, a varint each,
              uint8 coding; then of a tied tensor (coding 0) a varint, which earlier
              entry it shares its memory with (same dtype and shape, not tied itself);
              of others a varint, the length of the section, and its CRC-32, uint32

Names are different from each other. dtype: 0 float32, 1 float16, 2 bfloat16, 3 float64,
4 int8, 5 int16, 6 int32, 7 int64, 8 uint8, 9 bool, 10 float8_e4m3fn, 11 float8_e5m2,
12 uint16, 13 uint32, 14 uint64, 15 complex64, 16 complex128. Elements are in row-major
order. A dimension is below 2^40. A tensor takes at most 65536 bytes for each byte of
its section: a writer whose section is shorter appends bytes 0. So a file says with its
size how much memory it may take.

The SHA-256 of a base is that of its tensors, sorted by the UTF-8 bytes of their names:
for each the text name, uint8 dtype, varint number of dimensions, a varint each, and the
elements. Codings 1, 2 and 3 may be *relative*: 128 is added, the file is a delta,
and the base has a tensor of this name, dtype and shape.

Section of coding 1, planes: exact
==================================
Each element's w bytes are an unsigned integer u. Of floating dtypes (of complex ones
each of two halves) it is rotated left by one bit, so that the exponent comes first
and the sign last. If relative, both u and the base's are put in the order of the
numbers they mean first (of signed integers and floats: if the highest bit is set, all
bits are turned, else that bit), the base's is taken off modulo 2^8w, and the difference
d becomes 2d, or 2^8w − 1 − 2d where its highest bit is set (all modulo 2^8w); there is
no rotation then. Plane k holds byte k of each element. Elements are cut into chunks of
2^17 (the last may be shorter); of each chunk the planes follow, that of the lowest
bytes first: ::

    uint8 mode, varint length, bytes     mode 0: as they are; 1: a zstd frame (RFC
                                         8878), its content size said; 2: one byte, for
                                         all; 3: a rANS code

    rANS      32 bytes: bit b says whether byte b is in the chunk; then of each that is,
              in order, uint16, its share of 4096 slots; four states, uint32; uint16
              words to the end

Shares are at least 1, of at least two bytes, and add up to 4096; slots are given out
from 0 in the order of bytes. Byte i of the chunk is read from state i mod 4: it is the
one whose n slots from f on hold ``x mod 4096``; then ``x = n · floor(x / 4096) +
x mod 4096 − f``, and if that is below 2^16 it becomes ``65536 · x + the next word``. In
the end each state is 2^16 and no word is left.

Section of coding 2, steps
==========================
::

    uint8     transform: 0 none, 1 DCT over the axes from the third on, 2 + a: over axis
              a; of axes of 1 to 1024 elements
    uint8     coder: 0 context coder, 1 zstd, 2 predictive coder
    float32   step, finite and > 0
    uint8     dither: 0 none, 1 subtractive, then a uint64 seed
    varint    length of the numbers' code, and the code

An element is ``float32(number · step)``, computed in float64; with dither
``float32((number − u) · step)``; plus the base's if relative, in float32; then
rounded to its dtype. u of element i is ``(m + 0.5) / 2^32 − 0.5``, where m is the high
half of mix(seed + (i + 1) · 0x9E3779B97F4A7C15 mod 2^64), the output function of
SplitMix64: ``z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27;
z *= 0x94D049BB133111EB; z ^= z >> 31``. The transform is the orthonormal DCT-II, in
float64, of the elements; a decoder inverts it. Numbers are of magnitude below 2^24.

Numbers form a matrix: rows are the first dimension, columns the product of the others;
of fewer than two dimensions there is one row. zstd: uint8 w of 1, 2 or 4, then a frame
whose content is the numbers as signed integers of w bytes.

The context coder's model
-------------------------
``lc3.ship.contexts`` says which questions are asked of a number, and which contexts
answer. Each context keeps for each question a probability that the answer is yes, 22
bits of fraction, from 1/2 on, and how often it was asked, n ≤ 127; after an answer the
probability moves by 1/(n + 2) of what it was off, in units of 2^-16 rounded down. Its
logit in units of 1/256 is read from a table of the logistic function, which is linear
between multiples of 1/8. Two sets of weights, one chosen by the question and one by the
class of the expected magnitude, add logits up; the mean of both sums, as a probability
between 24/65536 and its complement, codes the answer, and each set learns from its own
error. The code is carry-less: with bounds ``low ≤ high`` of 32 bits, ``yes`` keeps
``low … low + floor((high − low) · p / 65536)``; equal leading bytes are sent. At the
end the leading byte of ``high`` is sent, and a reader takes 0 for what is missing.

The predictive coder of a matrix of several rows asks the same, of two contexts more:
what a filter expects of a number, and how far it has been off in this row. With
``t = min(64, rows − 1)`` taps, it weighs the numbers x_k of its column in the t rows
before, limited to ±32767 and 0 where there is none: it expects ``p = floor(sum of
w_k · x_k / 2^8)`` in units of 1/256, limited to ±2^23. With ``e = 256 · number − p``,
the number limited, too, and ``g = floor(15360 · e / (4 + sum of x_k²))``, w_k then
grows by ``floor(g · x_k / 2^8)``, as an int32 that wraps around. Every row begins with
weights of 0. Of one row the code is the context coder's.

Section of coding 3, centres
============================
::

    varint    n ≥ 1 centres, at most 256; float32 each
    varint    length of the numbers' code, and the code, by the context coder

Each element is the centre that its number, 0 ≤ number < n, names; plus the base's if
relative, as in coding 2.

Section of coding 4, a Bloomier filter over the positions that are not 0
========================================================================
::

    varint    n centres, 1 ≤ n ≤ 2^r; float32 each
    uint8     r, uint8 t: bits of an index and of a cell, r < t ≤ 32
    uint64    seed, varint cells m
    bytes     m cells of t bits, one after the other, the lowest bit first

``lc3.ship.bloomier`` says which cells a position has. An element is 0 where the filter
says n or more.

Worked example: one float32 tensor "w" of two elements, 1.0 and −2.0, exact::

    4c 43 33 4d 01 00 00 00       header
    00 02 00 01                   plane 0: both signs: 1.0 is 0x3f800000 and −2.0 is
    02 01 00                      0xc0000000, rotated 0x7f000000 and 0x80000001
    02 01 00  00 02 7f 80         planes 1 and 2 are all 0, plane 3 as it is
    00 01                         index: no notes, one entry
    01 77 00 01 02 01 0e          "w", float32, one dimension of 2, planes, 14 bytes
    xx xx xx xx                   CRC of the section
    16 00 00 00 00 00 00 00       the index is at 22
    0d 00 00 00 00 00 00 00  …    13 bytes; CRC; "M3CL"
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from lc3.errors import FormatError

MAGIC, END = b"LC3M", b"M3CL"
VERSION = 1
DELTA = 1
TIED, PLANES, STEPS, CENTRES, BLOOMIER = range(5)
RELATIVE = 128
EXPANSION = 65536  # bytes of a tensor for each of its section
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
)
MOST_DIMENSIONS, LARGEST_DIMENSION = 32, 1 << 40

HEADER = struct.Struct("<4sBBH")
TRAILER = struct.Struct("<QQI4s")


@dataclass(frozen=True, slots=True)
class Base:
    """What a delta is relative to.

    Attributes:
        digest: SHA-256 of its tensors, 32 bytes.
        name: for people: of the file that it was read from.
    """

    digest: bytes
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index says of one tensor.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        shape: its dimensions.
        coding: how its section is written; ``TIED``: it has none.
        start: where its section begins in the file, or the entry that it is tied to.
        length: of the section in bytes.
        crc: CRC-32 of the section.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    coding: int
    start: int
    length: int = 0
    crc: int = 0

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes its elements take."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Index:
    """What a file holds.

    Attributes:
        entries: one for each tensor, in the order of the file.
        base: of a delta.
        notes: what safetensors calls metadata.
    """

    entries: list[Entry]
    base: Base | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


def varint(value: int) -> bytes:
    """Return a number from 0 to 2^63 − 1 in as few bytes as it takes."""
    assert 0 <= value < 1 << 63
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def text(value: str) -> bytes:
    """Return a string with its length before it."""
    data = value.encode()
    return varint(len(data)) + data


class Reader:
    """Takes numbers and bytes from the front of a buffer, and never reads behind it.

    Args:
        data: what is read.
        what: for errors.
    """

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data = memoryview(data)
        self._what = what
        self.at = 0

    def bytes(self, count: int) -> memoryview:
        """Return the next bytes.

        Raises:
            FormatError: there are fewer.
        """
        if count > len(self._data) - self.at:
            raise FormatError(
                f"{self._what} of {len(self._data)} bytes ends where {count} more are "
                "due; is the file whole?"
            )
        self.at += count
        return self._data[self.at - count : self.at]

    def unpack(self, form: str) -> tuple[int | float, ...]:
        """Return what ``struct`` reads there, little-endian."""
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form)))

    def byte(self) -> int:
        """Return the next byte."""
        return self.bytes(1)[0]

    def uint(self, form: str) -> int:
        """Return an unsigned integer: ``I`` of 4 bytes or ``Q`` of 8."""
        return int(self.unpack(form)[0])

    def float32(self) -> float:
        """Return a float32."""
        return float(self.unpack("f")[0])

    def varint(self) -> int:
        """Return a varint.

        Raises:
            FormatError: it is longer than it need be, or than 9 bytes.
        """
        value = 0
        for place in range(9):
            byte = self.byte()
            value |= (byte & 127) << 7 * place
            if byte < 128:
                if byte == 0 and place:
                    break
                return value
        raise FormatError(f"{self._what} has a number that is longer than need be")

    def text(self) -> str:
        """Return a string."""
        try:
            return str(self.bytes(self.varint()), "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._what} has a name that is no UTF-8") from error

    def ends(self) -> None:
        """Raise ``FormatError`` if something but zeros is left."""
        rest = self._data[self.at :]
        if bytes(rest).strip(b"\0"):
            raise FormatError(f"{len(rest)} bytes are left behind {self._what}")


def header(delta: bool) -> bytes:
    """Return the first bytes of a file."""
    return HEADER.pack(MAGIC, VERSION, DELTA if delta else 0, 0)


def description(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """Return what an entry, and the digest of a base, say of a tensor."""
    sizes = b"".join(map(varint, shape))
    return text(name) + bytes([DTYPES.index(dtype)]) + varint(len(shape)) + sizes


def index_bytes(index: Index) -> bytes:
    """Return the index as it stands in a file."""
    parts = []
    if index.base is not None:
        parts += [index.base.digest, text(index.base.name)]
    parts.append(varint(len(index.notes)))
    parts += [text(part) for note in index.notes.items() for part in note]
    parts.append(varint(len(index.entries)))
    for entry in index.entries:
        parts.append(description(entry.name, entry.dtype, entry.shape))
        parts.append(bytes([entry.coding]))
        if entry.coding == TIED:
            parts.append(varint(entry.start))
        else:
            parts += [varint(entry.length), struct.pack("<I", entry.crc)]
    return b"".join(parts)


def trailer(head: bytes, index: bytes, start: int) -> bytes:
    """Return the last bytes of a file whose index begins at ``start``."""
    where = struct.pack("<QQ", start, len(index))
    return where + struct.pack("<I", zlib.crc32(where, zlib.crc32(head + index))) + END


def read_trailer(data: bytes, file_bytes: int) -> tuple[int, int, int]:
    """Return where the index begins, its length, and the CRC that is due.

    Args:
        data: the last 24 bytes of a file.
        file_bytes: how large it is.

    Raises:
        FormatError: it is no whole file of this format.
    """
    if file_bytes < HEADER.size + TRAILER.size or len(data) != TRAILER.size:
        raise FormatError(
            f"{file_bytes} bytes are too few for a shipped model; is the file whole?"
        )
    start, length, crc, end = TRAILER.unpack(data)
    if end != END:
        raise FormatError(
            "the file does not end as a shipped model does; was it cut off, or is it "
            "of another kind?"
        )
    if start < HEADER.size or start + length != file_bytes - TRAILER.size:
        raise FormatError(
            f"an index of {length} bytes at {start} does not end before the trailer "
            f"of a file of {file_bytes} bytes"
        )
    return start, length, crc


def read_index(head: bytes, data: bytes, start: int, crc: int) -> Index:
    """Return what the index says.

    Args:
        head: the first 8 bytes of the file.
        data: the index.
        start: where it begins in the file: sections end there.
        crc: that the trailer says.

    Raises:
        FormatError: it is damaged, of another version, or contradicts itself.
    """
    magic, version, flags, reserved = HEADER.unpack(head)
    if magic != MAGIC:
        raise FormatError(
            f"the file begins with {magic!r}, not {MAGIC!r}: it is no shipped model"
        )
    if version != VERSION:
        raise FormatError(
            f"the file is of container format {version}, this lc3 reads {VERSION}; "
            "update lc3"
        )
    where = struct.pack("<QQ", start, len(data))
    found = zlib.crc32(where, zlib.crc32(head + data))
    if found != crc:
        raise FormatError(
            f"the index has CRC {found:08x}, not {crc:08x}: the file is damaged; fetch "
            "it again"
        )
    if flags & ~DELTA or reserved:
        raise FormatError(f"flags {flags:#x} and {reserved:#x} are not of format 1")
    reader = Reader(data, "the index")
    base = None
    if flags & DELTA:
        base = Base(bytes(reader.bytes(32)), reader.text())
    notes = {}
    for _ in range(reader.varint()):
        key = reader.text()
        notes[key] = reader.text()
    entries: list[Entry] = []
    names: set[str] = set()
    at = HEADER.size
    for _ in range(reader.varint()):
        entry = _read_entry(reader, entries, at, base is not None)
        if entry.name in names:
            raise FormatError(f"the index has {entry.name!r} twice")
        names.add(entry.name)
        entries.append(entry)
        at += entry.length
    if reader.at != len(data):
        raise FormatError(f"{len(data) - reader.at} bytes are left behind the index")
    if at != start:
        raise FormatError(f"sections end at {at}, but the index begins at {start}")
    return Index(entries, base, notes)


def _read_entry(reader: Reader, before: list[Entry], at: int, delta: bool) -> Entry:
    name = reader.text()
    code = reader.byte()
    if code >= len(DTYPES):
        raise FormatError(f"{name!r} has dtype {code}, which is none of format 1")
    dimensions = reader.varint()
    if dimensions > MOST_DIMENSIONS:
        raise FormatError(f"{name!r} has {dimensions} dimensions, more than 32")
    shape = tuple(reader.varint() for _ in range(dimensions))
    if max(shape, default=0) >= LARGEST_DIMENSION:
        raise FormatError(f"{name!r} has the shape {list(shape)}, beyond 2^40")
    coding = reader.byte()
    if coding == TIED:
        other = reader.varint()
        if other >= len(before) or before[other].coding == TIED:
            raise FormatError(
                f"{name!r} is tied to entry {other}, which stores nothing"
            )
        if (before[other].dtype, before[other].shape) != (DTYPES[code], shape):
            raise FormatError(f"{name!r} is tied to a tensor that is not like it")
        return Entry(name, DTYPES[code], shape, TIED, other)
    plain = coding & ~RELATIVE
    relative = plain != coding
    if not PLANES <= plain <= BLOOMIER or (
        relative and not (delta and plain in (PLANES, STEPS, CENTRES))
    ):
        raise FormatError(f"{name!r} has coding {coding}, which is none of format 1")
    length, crc = reader.varint(), reader.uint("I")
    entry = Entry(name, DTYPES[code], shape, coding, at, length, crc)
    if entry.nbytes > EXPANSION * length:
        raise FormatError(
            f"{name!r} takes {entry.nbytes:,} bytes, more than {EXPANSION:,} for each "
            f"of the {length} of its section; the file is damaged, or made to harm"
        )
    return entry
