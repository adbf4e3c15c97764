"""Damages frames and messages by the million: refused, or decoded within their bounds.

``make fuzz``. Mutations start from a corpus that is in git (``tests/golden``), from
frames of random inputs, and from plain noise. Behind every buffer stands a page that
nobody may touch: a byte beyond the end is a segmentation fault, not luck.
"""

import argparse
import ctypes
import json
import mmap
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from lc3.codec import cpu, reference
from lc3.errors import FormatError, PeerError, PlanMismatch
from lc3.format import (
    FLAG_ENTROPY_CODED,
    HEADER_BYTES,
    MAGIC,
    MAGIC_RANGE_CODED,
    Tag,
    max_frame_bytes,
    seal,
)
from lc3.plan import Piece
from lc3.wire.message import unpack

GOLDEN = Path(__file__).parent / "golden"
TAG = Tag(sender=2, step=9, bucket=1, plan=0xCAFED00D)
LARGEST = 2000
BATCH = 1000


class Guarded:
    """Memory that ends, to the byte, where a page begins that faults when touched."""

    def __init__(self, size: int) -> None:
        pages = -(-size // mmap.PAGESIZE) + 1
        self._map = mmap.mmap(-1, pages * mmap.PAGESIZE)
        whole = np.frombuffer(self._map, np.uint8)
        self._end = (pages - 1) * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(whole.ctypes.data + self._end)
        if libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._bytes = torch.from_numpy(whole)

    def last(self, size: int) -> torch.Tensor:
        """Return the last ``size`` bytes, uint8[size]."""
        return self._bytes[self._end - size : self._end]


def mutate(data: bytearray, chance: random.Random, corpus: list[bytes]) -> None:
    """Change ``data`` in one to four places, in ways that a parser trips over."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        kind = chance.randrange(8)
        at = chance.randrange(len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = chance.choice((0, 121, 242, 243, 254, 255))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + chance.randrange(1, 9)]
        elif kind == 4:
            data[at:at] = chance.randbytes(chance.randrange(1, 17))
        elif kind == 5:
            data[at:at] = bytes([chance.choice((121, 243, 255))]) * chance.randrange(
                1, 99
            )
        elif kind == 6:
            other = chance.choice(corpus)
            data[at:] = other[min(at, len(other)) :]
        else:
            data[at : at + 4] = chance.randbytes(4)


def frame_corpus(chance: random.Random) -> list[tuple[bytes, int]]:
    """Return frames with the number of their values."""
    cases = json.loads((GOLDEN / "frames.json").read_text())
    corpus = [(bytes.fromhex(c["frame"]), len(c["input"]) // 8) for c in cases]
    for seed in range(200):
        n = chance.randrange(1, LARGEST)
        x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        out = torch.empty(max_frame_bytes(n), dtype=torch.uint8)
        used, _ = cpu.encode(x ** chance.choice((1, 3, 7)), 1.0, out)
        corpus.append((out[:used].numpy().tobytes(), n))
    return corpus


def fuzz_frames(
    count: int, chance: random.Random, progress: Progress
) -> dict[str, int]:
    """Decode mutated frames; one in a thousand is compared with the reference."""
    corpus = frame_corpus(chance)
    frames = [frame for frame, _ in corpus]
    source, target = Guarded(1 << 16), Guarded(4 * LARGEST)
    said = {"refused": 0, "decoded": 0}
    bar = progress.add_task("frames", total=count)
    for done in range(count):
        frame, n = chance.choice(corpus)
        data = bytearray(frame)
        mutate(data, chance, frames)
        given = source.last(len(data))
        given.numpy()[:] = data
        acc = target.last(4 * n).view(torch.float32)
        acc.numpy().fill(0)
        try:
            used = cpu.check(given, n)
        except FormatError:
            said["refused"] += 1
            used = 0
        else:
            said["decoded"] += 1
            cpu.add(given[:used], acc)
        if done % 1000 == 0:
            compare(given, n, used, acc)
        if done % BATCH == 0:
            progress.update(bar, completed=done)
    return said


def compare(given: torch.Tensor, n: int, used: int, acc: torch.Tensor) -> None:
    """Let the reference decode the same bytes; both must say the same."""
    expected = torch.zeros(n)
    try:
        size = reference.check(given, n)
        reference.add(given[:size], expected)
    except FormatError:
        size = 0
    assert size == used
    assert np.array_equal(acc.numpy(), expected.numpy(), equal_nan=True)


def fuzz_messages(
    count: int, chance: random.Random, progress: Progress
) -> dict[str, int]:
    """Read mutated messages, their CRC made right in half of the cases."""
    n, raw = 1400, 25
    pieces = [Piece("raw", 0, raw, 0, coded=False), Piece("coded", 0, n, 0, coded=True)]
    names = ("entropy.json", "range.json")
    cases = [c for name in names for c in json.loads((GOLDEN / name).read_text())]
    corpus = [bytes.fromhex(c["message"]) for c in cases]
    x = torch.randn(n, generator=torch.Generator().manual_seed(1)) ** 5
    out = torch.empty(max_frame_bytes(n), dtype=torch.uint8)
    used, _ = cpu.encode(x, 1.0, out)
    plain = torch.cat(
        [torch.zeros(HEADER_BYTES + 4 * raw, dtype=torch.uint8), out[:used]]
    )
    corpus.append(seal(plain, TAG).numpy().tobytes())
    source, target = Guarded(1 << 16), Guarded(4 * n)
    said = {"refused": 0, "read": 0}
    bar = progress.add_task("messages", total=count)
    for done in range(count):
        data = bytearray(chance.choice(corpus))
        mutate(data, chance, corpus)
        given = source.last(len(data))
        given.numpy()[:] = data
        if chance.random() < 0.5 and len(data) >= HEADER_BYTES:
            flags, magic = chance.choice(
                [
                    (0, MAGIC),
                    (FLAG_ENTROPY_CODED, MAGIC),
                    (FLAG_ENTROPY_CODED, MAGIC_RANGE_CODED),
                ]
            )
            seal(given, TAG, flags, magic)
        try:
            _, frame = unpack(given, TAG, pieces, cpu)
        except (FormatError, PeerError, PlanMismatch):
            said["refused"] += 1
        else:
            said["read"] += 1
            acc = target.last(4 * n).view(torch.float32)
            acc.zero_()
            cpu.add(frame, acc)
        if done % BATCH == 0:
            progress.update(bar, completed=done)
    return said


def campaign(mutations: int, seed: int) -> dict[str, dict[str, int]]:
    """Run both kinds, four frames for each message; return what became of them."""
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        chance = random.Random(seed)
        messages = mutations // 5
        return {
            "frames": fuzz_frames(mutations - messages, chance, progress),
            "messages": fuzz_messages(messages, chance, progress),
        }


def main() -> None:
    """Run a campaign and print its counts."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    for kind, said in campaign(options.mutations, options.seed).items():
        print(f"{kind}: {sum(said.values()):,} mutations, {said}")
    print(f"no crash, no write out of bounds; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
