"""One number of bytes spread over layers: the same s for all, or more where it tells.

    python -m experiments.allocation --out allocation.csv

On the recorded gradients (``experiments.gradients``). A tensor has a choice of s, each
with its bytes (a frame after zstd) and the energy it leaves unsent. The same s for all
is compared with the greedy allocation of as many bytes: from the fewest on, always the
step of the tensor that takes most energy for a byte. With a density instead of s, too.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import zstandard
from torch import Tensor

from experiments.gradients import recorded
from experiments.record import ResultError, read_csv, stamped, write_csv
from experiments.report import grid
from lc3 import entropy
from lc3.codec import cpu

S_CHOICES = tuple(1 + k / 20 for k in range(20))
DENSITIES = (0.003, 0.006, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
SHOWN_S = (1.0, 1.5, 1.75)
COLUMNS = ("one_s", "s_each", "one_density", "density_each")


class Choice(NamedTuple):
    """What one setting makes of one tensor.

    Attributes:
        size: bytes of the frame after zstd.
        left: energy (sum of squares) that is not sent.
    """

    size: int
    left: float


def coded(x: Tensor, sparsity: float, density: float | None) -> Choice:
    """Return what a setting makes of float32[*]."""
    rest = x.clone()
    out = torch.empty(cpu.max_frame_bytes(x.numel()), dtype=torch.uint8)
    used, _ = cpu.encode(rest, sparsity, out, None, density)
    frame = out[:used].numpy().tobytes()
    small = zstandard.ZstdCompressor(level=entropy.LEVEL).compress(frame)
    return Choice(min(used, len(small)), float(rest.double().square().sum()))


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices worth taking: each next one takes less energy for a byte."""
    kept: list[Choice] = []
    for choice in sorted(choices):  # of as many bytes, the one that leaves least first
        if kept and choice.left >= kept[-1].left:
            continue
        while len(kept) > 1 and _gain(*kept[-2:]) <= _gain(kept[-2], choice):
            kept.pop()
        kept.append(choice)
    return kept


def _gain(a: Choice, b: Choice) -> float:
    """Return the energy that each further byte takes, from a choice to a larger one."""
    return (a.left - b.left) / (b.size - a.size)


def allocate(tensors: Sequence[Sequence[Choice]], size: int) -> Choice:
    """Return the total of the greedy allocation of at most ``size`` bytes."""
    hulls = [hull(choices) for choices in tensors]
    steps = sorted(
        (
            (-_gain(one[k], one[k + 1]), index, k)
            for index, one in enumerate(hulls)
            for k in range(len(one) - 1)
        ),
    )
    at = [0] * len(hulls)
    total = sum(one[0].size for one in hulls)
    for _, index, k in steps:
        more = hulls[index][k + 1].size - hulls[index][k].size
        if at[index] == k and total + more <= size:
            at[index], total = k + 1, total + more
    return Choice(total, sum(h[k].left for h, k in zip(hulls, at, strict=True)))


def together(tensors: Sequence[Sequence[Choice]], index: int) -> Choice:
    """Return the total when every tensor takes the same choice."""
    return Choice(
        sum(one[index].size for one in tensors), sum(one[index].left for one in tensors)
    )


def at_size(tensors: Sequence[Sequence[Choice]], size: int) -> float:
    """Return the energy that the same choice for all leaves at ``size`` bytes.

    Between two choices interpolated.
    """
    totals = sorted(together(tensors, k) for k in range(len(tensors[0])))
    for before, after in pairwise(totals):
        if before.size <= size <= after.size:
            share = (size - before.size) / max(after.size - before.size, 1)
            return before.left + share * (after.left - before.left)
    return totals[0].left if size < totals[0].size else totals[-1].left


def measure() -> list[dict[str, object]]:
    """Return a row for every task and s: shares of the energy that are left unsent."""
    sets: dict[tuple[str, float, str], list[Tensor]] = defaultdict(list)
    for one in recorded():
        sets[one.task, one.sparsity, one.moment].append(one.x)
    found: dict[tuple[str, float], list[list[float]]] = defaultdict(list)
    for (task, _, _), tensors in sets.items():
        energy = sum(float(x.double().square().sum()) for x in tensors)
        by_s = [[coded(x, s, None) for s in S_CHOICES] for x in tensors]
        by_density = [[coded(x, 1.0, d) for d in DENSITIES] for x in tensors]
        for s in SHOWN_S:
            same = together(by_s, S_CHOICES.index(s))
            left = [
                same.left,
                allocate(by_s, same.size).left,
                at_size(by_density, same.size),
                allocate(by_density, same.size).left,
            ]
            found[task, s].append([share / energy for share in left])
    return [
        {
            "task": task,
            "sparsity": s,
            **{
                column: round(mean(shares), 4)
                for column, shares in zip(COLUMNS, zip(*rows, strict=True), strict=True)
            },
        }
        for (task, s), rows in sorted(found.items())
    ]


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return the comparison as Markdown."""
    titles = ["gradients of", "bytes of s =", "one s for all", "an s for each"]
    titles += ["one density for all", "a density for each"]
    lines = []
    for row in rows:
        shares = [f"{100 * float(row[column]):.1f} %" for column in COLUMNS]
        lines.append([row["task"], f"{float(row['sparsity']):.2f}", *shares])
    table = grid(titles, lines)
    return (
        f"{table}\n\nEnergy (sum of squares) that one encoding of gradient plus "
        "residual leaves unsent, in per cent of all; the mean of three moments of two "
        "trainings. All columns of a line have the bytes of the s it names. lc3 "
        f"{rows[0]['lc3']} at commit {rows[0]['commit']}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the rows, print the table."""
    parser = argparse.ArgumentParser(prog="experiments.allocation", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args(arguments)
    try:
        write_csv(options.out, stamped(measure()))
    except ResultError as error:
        parser.error(str(error))
    print(markdown(read_csv(options.out)))


if __name__ == "__main__":
    main()
