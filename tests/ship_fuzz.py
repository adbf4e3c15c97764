"""Damages shipped models by the thousand: refused, or as they were where a CRC says so.

    python -m tests.ship_fuzz --mutations 100000

Three kinds of damage: any bytes of a file, which its checksums must find; the index,
and a section, each with its checksum made right again, so that parsers meet them.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from lc3 import ship
from lc3.errors import FormatError, StateError
from lc3.ship.format import (
    EXPANSION,
    HEADER,
    TIED,
    TRAILER,
    Index,
    index_bytes,
    read_index,
    read_trailer,
    trailer,
)
from tests.fuzz import mutate
from tests.golden.__main__ import ship_base

GOLDEN = [Path(__file__).parent / f"golden/{n}.json" for n in ("ship", "predictive")]
KINDS = ("file", "index", "section")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same to the bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(flat[0], flat[1])


class Case:
    """One whole file, its parts, and what it decodes to."""

    def __init__(self, data: bytes, delta: bool, path: Path) -> None:
        self.data = data
        self.base = ship_base() if delta else None
        path.write_bytes(data)
        self.tensors = ship.load(path, base=self.base)
        self.start, length, crc = read_trailer(data[-TRAILER.size :], len(data))
        self.head = data[: HEADER.size]
        self.packed = data[self.start : self.start + length]
        self.index = read_index(self.head, self.packed, self.start, crc)

    def sealed(self, sections: bytes, index: bytes) -> bytes:
        """Return a file of these parts whose index has the right checksum."""
        start = HEADER.size + len(sections)
        return self.head + sections + index + trailer(self.head, index, start)

    def with_section(self, place: int, data: bytes) -> bytes:
        """Return the file with one section replaced, and its checksum right."""
        parts, entries = [], []
        for i, entry in enumerate(self.index.entries):
            if entry.coding == TIED:
                entries.append(entry)
                continue
            part = self.data[entry.start : entry.start + entry.length]
            part = data if i == place else part
            parts.append(part)
            entries.append(replace(entry, length=len(part), crc=zlib.crc32(part)))
        index = index_bytes(Index(entries, self.index.base, self.index.notes))
        return self.sealed(b"".join(parts), index)


def damaged(case: Case, kind: str, chance: random.Random, corpus: list[bytes]) -> bytes:
    """Return the bytes of a case after one kind of damage."""
    if kind == "file":
        data = bytearray(case.data)
        mutate(data, chance, corpus)
        return bytes(data)
    if kind == "index":
        data = bytearray(case.packed)
        mutate(data, chance, corpus)
        return case.sealed(case.data[HEADER.size : case.start], bytes(data))
    place = chance.randrange(len(case.index.entries))
    entry = case.index.entries[place]
    data = bytearray(case.data[entry.start : entry.start + entry.length])
    mutate(data, chance, corpus)
    return case.with_section(place, bytes(data))


def campaign(mutations: int, seed: int) -> dict[str, dict[str, int]]:
    """Load that many damaged files; return what became of each kind."""
    chance = random.Random(seed)
    said = {kind: {"refused": 0, "loaded": 0} for kind in KINDS}
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        path = Path(folder) / "m.lc3m"
        cases = [
            Case(bytes.fromhex(case["file"]), case["delta"], path)
            for golden in GOLDEN
            for case in json.loads(golden.read_text())
        ]
        corpus = [case.data for case in cases]
        bar = progress.add_task("shipped models", total=mutations)
        for _ in range(mutations):
            case, kind = chance.choice(cases), chance.choice(KINDS)
            data = damaged(case, kind, chance, corpus)
            path.write_bytes(data)
            try:
                found = ship.load(path, base=case.base)
            except (FormatError, StateError):
                said[kind]["refused"] += 1
            else:
                said[kind]["loaded"] += 1
                check(case, kind, data, found, corpus)
            progress.advance(bar)
    return said


def check(
    case: Case, kind: str, data: bytes, found: dict[str, Tensor], corpus: list[bytes]
) -> None:
    """Fail if a file that was loaded is larger than it may be, or not what it was."""
    sizes = sum(t.nbytes for t in found.values())
    assert sizes <= EXPANSION * len(data)
    if kind == "file" and data not in corpus:
        assert sorted(found) == sorted(case.tensors)
        assert all(same_bits(found[n], case.tensors[n]) for n in found)


def main() -> None:
    """Run a campaign and print its counts."""
    parser = argparse.ArgumentParser(prog="tests.ship_fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    for kind, said in campaign(options.mutations, options.seed).items():
        print(f"{kind}: {sum(said.values()):,} mutations, {said}")
    print(f"no other error; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
