"""How the bytes of a rank grow with the number of ranks, for each way to exchange.

    python -m experiments.bench.growth --docs docs/explanation/related-work.md

Ranks are threads of one process, and exchange once what a million parameters have
moved: heavy-tailed values that differ between ranks and have a common part. lc3's
bytes are counted by its transport; those of an all-gather and of a ring follow from one
rank's payload.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from experiments.harness import models
from experiments.harness.rivals import sparse
from experiments.record import RESULTS, read_csv, stamped, write_csv
from experiments.tables import Row, grid, insert
from lc3.codec import codec_for
from lc3.config import Settings
from lc3.engines.direct import engine_for
from lc3.knobs import DEFAULT
from lc3.meter import Meter
from lc3.plan import make_plan
from lc3.transport.loopback import Loopback
from lc3.transport.protocol import Transport
from lc3.wire.coder import Coder

WORLDS = (2, 4, 8, 16, 32, 64)
_FLOAT_BYTES = 4


def moved(
    shapes: Sequence[tuple[str, tuple[int, ...]]], rank: int
) -> dict[str, Tensor]:
    """Return what a rank has moved, by parameter float32[numel]."""
    common = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(1 + rank)
    found = {}
    for name, shape in shapes:
        numel = torch.Size(shape).numel()
        both = torch.randn(numel, generator=common), torch.randn(numel, generator=own)
        found[name] = (both[0] + both[1]) ** 3
    return found


def sent(
    shapes: Sequence[tuple[str, tuple[int, ...]]], world: int, settings: Settings
) -> float:
    """Return the bytes that a rank sends in one exchange, the mean over ranks."""
    plan = make_plan(shapes, world, settings)
    codec = codec_for(torch.device("cpu"))

    def exchange(transport: Transport) -> int:
        engine = engine_for(plan, settings, transport, Coder(codec), Meter())
        engine.all_reduce(moved(shapes, transport.rank), 0, 0)
        engine.close()
        return transport.sent_bytes

    with ThreadPoolExecutor(world) as pool:
        counted = list(pool.map(exchange, Loopback(world, timeout_s=600).ranks))
    return sum(counted) / world


def rows(worlds: Sequence[int]) -> list[dict[str, object]]:
    """Return a row for every way and number of ranks."""
    model = models.Transformer(256, 256, 128, 5, 4)
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    elements = sum(p.numel() for p in model.parameters())
    payload = sum(
        sparse(one.view(torch.Size(shape))).numel()
        for one, (_, shape) in zip(moved(shapes, 0).values(), shapes, strict=True)
    )
    direct = Settings(
        density=DEFAULT.density,
        min_ndim=0,
        min_numel=1,
        entropy="rans",
        topology="direct",
    )
    found: list[dict[str, object]] = []
    for world in worlds:
        ways = {
            "lc3, owners": sent(shapes, world, DEFAULT),
            "lc3, direct": sent(shapes, world, direct),
            "SparseLoCo, all-gather": float((world - 1) * payload),
            "DiLoCo, ring": 2 * (world - 1) / world * _FLOAT_BYTES * elements,
        }
        found += [
            {
                "way": way,
                "ranks": world,
                "elements": elements,
                "up_bytes": round(bytes_),
                "down_bytes": round(bytes_),  # the mean: what some send others get
            }
            for way, bytes_ in ways.items()
        ]
    return found


def table(found: Sequence[Row]) -> str:
    """Return the rows as Markdown: bits of a parameter, up and as many down."""
    worlds = list(dict.fromkeys(row["ranks"] for row in found))
    lines = []
    for way in dict.fromkeys(row["way"] for row in found):
        mine = {row["ranks"]: row for row in found if row["way"] == way}
        bits = [8 * int(mine[w]["up_bytes"]) / int(mine[w]["elements"]) for w in worlds]
        lines.append([way, *(f"{one:.3g}" for one in bits)])
    return grid(["way", *(f"W = {w}" for w in worlds)], lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, write the result file, and bring a page up to date."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.growth", description=__doc__
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.csv")
    parser.add_argument("--docs", type=Path, help="Markdown file with markers")
    options = parser.parse_args(arguments)
    write_csv(options.out, stamped(rows(options.worlds)))
    text = table(read_csv(options.out))
    print(text)
    if options.docs:
        page = insert(options.docs.read_text(), "growth", text)
        options.docs.write_text(page)


if __name__ == "__main__":
    main()
