"""The codec on a GPU: GB/s beside a copy on the device and what else one could do.

    make gpu-bench

Every codec is checked against the reference before it is timed. ``make gpu-bench`` runs
this. ``--device cpu`` only shows that it runs: with kernels only in numba's simulator,
which has no speed.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.record import RESULTS, Row, read_csv, stamped, write_csv
from experiments.tables import grid, insert
from lc3.codec import Codec, codec_for, reference, tensor
from lc3.wire.coder import Coder

SIZES = (1_000_000, 6_500_000, 64_000_000)
PIECES = 50  # of a bucket
DENSITIES = (0.5, 0.05, 0.01)
CHECKED = 200_000  # values that are compared with the reference, which is slow
REPEATS = 20


def values_of(numel: int, density: float, device: torch.device) -> Tensor:
    """Return values of which s = 1 sends about a share: one of them is the largest."""
    generator = torch.Generator(device).manual_seed(numel)
    noise = torch.randn(numel, generator=generator, device=device)
    sent = noise.abs().kthvalue(max(1, int(numel * (1 - density)))).values
    noise.clamp_(-2 * sent, 2 * sent)
    noise[0] = 2 * sent
    return noise


def check(codec: Codec, device: torch.device, density: float) -> None:
    """Compare frames, residuals and sums with the reference's.

    Raises:
        RuntimeError: they differ.
    """
    x = values_of(CHECKED, density, device)
    expected, out = x.cpu().clone(), torch.empty(CHECKED, dtype=torch.uint8)
    used, _ = reference.encode(expected, 1.0, out)
    coder = Coder(codec, device=device)
    ((frame, _),) = coder.encode([x], [None], 1.0, None)
    total = torch.zeros_like(x)
    coder.add([(total, [frame])])
    found = torch.zeros(CHECKED)
    reference.add(out[:used], found)
    same = torch.equal(frame, out[:used]) and torch.equal(total.cpu(), found)
    if not (same and torch.equal(x.cpu(), expected)):
        raise RuntimeError(f"{codec} differs from the reference at density {density}")


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median seconds of some work, all of it, waits of the host included."""
    found = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return median(found[2:])


def works(
    codecs: dict[str, Codec], x: Tensor
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield (what, stage, work) of everything that is compared on ``x``."""
    device = x.device
    out = torch.empty_like(x)
    yield "copy", "encode", lambda: out.copy_(x)
    half = torch.empty_like(x, dtype=torch.float16)
    yield "fp16 cast", "encode", lambda: half.copy_(x)
    side = int(x.numel() ** 0.5)
    matrix, q = x[: side * side].view(side, side), torch.randn(side, 4, device=device)
    yield "PowerSGD rank 4", "encode", lambda: torch.linalg.qr(matrix @ q)[0].T @ matrix
    sizes = [part.numel() for part in x.tensor_split(PIECES)]
    owed = [*torch.split(torch.zeros_like(x), sizes)]
    for name, codec in codecs.items():
        coder, work = Coder(codec, device=device), x.clone()
        parts = torch.split(work, sizes)

        def encode(
            coder: Coder = coder, work: Tensor = work, parts: Any = parts
        ) -> list[tuple[Tensor, int]]:
            work.copy_(x)
            return coder.encode(parts, owed, 1.0, None)

        yield name, "encode", encode
        frames = [frame.clone() for frame, _ in encode()]
        sums = torch.split(torch.zeros_like(x), sizes)
        both = [(acc, [frame]) for acc, frame in zip(sums, frames, strict=True)]
        yield name, "add", partial(coder.add, both)


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return milliseconds by size and density, beside a copy on the device."""
    sizes = sorted({int(row["numel"]) for row in rows})
    titles = ["", "", *(f"{size / 1e6:g} million values" for size in sizes)]
    lines = []
    for what, stage in dict.fromkeys((row["what"], row["stage"]) for row in rows):
        line = [what, stage]
        for size in sizes:
            taken = [
                float(row["seconds"])
                for row in rows
                if (row["what"], row["stage"]) == (what, stage)
                and int(row["numel"]) == size
            ]
            line.append(" / ".join(f"{1e3 * t:.2g}" for t in taken))
        lines.append(line)
    row = rows[0]
    shares = ", ".join(
        f"{100 * float(density):g}"
        for density in dict.fromkeys(r["density"] for r in rows)
    )
    return (
        f"{grid(titles, lines, words=(0, 1))}\n\nMilliseconds, waits of the host "
        f"included, where {shares} % of the values are sent, in {PIECES} pieces. "
        f"{row['card']}; lc3 {row['lc3']} at commit {row['commit']}, torch "
        f"{row['torch']}, numba {row['numba']}.\n"
    )


def main() -> None:
    """Check and time everything; print it, and write ``gpu.csv``."""
    parser = argparse.ArgumentParser(prog="experiments.bench.gpu")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="page with the markers of its table")
    options = parser.parse_args()
    device: torch.device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(
            2, "no GPU that torch can use; --device cpu only shows that it runs\n"
        )
    codecs: dict[str, Codec] = {"torch operators": tensor}
    if device.type == "cuda" and codec_for(device) is not tensor:
        codecs["kernels"] = codec_for(device)
    for codec in codecs.values():
        for density in DENSITIES:
            check(codec, device, density)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows: list[Row] = []
    for numel in options.sizes:
        for density in DENSITIES:
            x = values_of(numel, density, device)
            for what, stage, work in works(codecs, x):
                taken = seconds(work, device, options.repeats)
                rows.append(
                    {
                        "card": card,
                        "what": what,
                        "stage": stage,
                        "numel": numel,
                        "density": density,
                        "seconds": f"{taken:.3e}",
                        "gb_s": round(4e-9 * numel / taken, 3),
                    }
                )
    write_csv(options.out / "gpu.csv", stamped(rows))
    if options.docs:
        made = markdown(read_csv(options.out / "gpu.csv"))
        options.docs.write_text(insert(options.docs.read_text(), "gpu", made))
    table = Table("what", "stage", "values", "density", "GB/s", title=card)
    for row in rows:
        table.add_row(
            *(str(row[k]) for k in ("what", "stage", "numel", "density", "gb_s"))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
