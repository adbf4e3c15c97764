"""How fast the codec is, beside a memcpy and what people use instead; what zstd takes.

``make bench``. Every codec is checked against the reference before it is timed, and
everything is timed in one run: ratios to the memcpy of the same tensor carry over to
other machines, milliseconds do not.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType
from typing import NamedTuple

import lz4.frame
import numpy as np
import torch
import zstandard
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from experiments.bench.gradients import recorded
from experiments.record import RESULTS, read_csv, stamped, write_csv
from experiments.tables import insert
from lc3.codec import cpu, reference, tensor
from lc3.format import SCALE_BYTES, max_frame_bytes
from lc3.transport.workers import Workers
from lc3.wire import rans
from lc3.wire.entropy import compress, decompress

Row = dict[str, object]
DENSITIES = (0.5, 0.1, 0.05, 0.01, 0.001)
SIZES = (10_000, 1_000_000, 6_500_000, 64_000_000)
MIN_SECONDS = 0.5
REPEATS = 20
PIECES = 64  # of the bucket that is encoded on several threads


def spiky(numel: int, density: float) -> Tensor:
    """Return float32[numel] of which a share ``density`` is sent at s = 1."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(numel, generator=generator) - 0.5) * 0.9
    large = torch.rand(numel, generator=generator) < density
    x[large] = torch.rand(int(large.sum()), generator=generator).round() * 2 - 1
    x[0] = 1
    return x


def timed(job: Callable[[], object], before: Callable[[], object] | None = None) -> Row:
    """Return p20, p50 and p80 of a job's milliseconds; ``before`` is not timed."""
    times: list[float] = []
    while len(times) < REPEATS or (sum(times) < MIN_SECONDS and len(times) < 1000):
        if before is not None:
            before()
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    p20, p50, p80 = (1e3 * quantiles(times, n=10)[i] for i in (1, 4, 7))
    return {"ms_p20": round(p20, 4), "ms_p50": round(p50, 4), "ms_p80": round(p80, 4)}


class Contender(NamedTuple):
    """What is timed, in turns with the others of the same tensor.

    Attributes:
        what: its name.
        direction: ``encode`` or ``decode_add``.
        job: function that is timed.
        before: function that is called before it, and not timed.
        threads: number of threads that it runs on.
    """

    what: str
    direction: str
    job: Callable[[], object]
    before: Callable[[], object] | None = None
    threads: int = 1


def in_turns(
    contenders: Sequence[Contender], numel: int, density: float
) -> Iterator[Row]:
    """Yield a line of the result file for each; the first is what others are ratios of.

    All take turns, so that what else the machine does meets all of them, and none
    finds in a cache what it left there.
    """
    times: list[list[float]] = [[] for _ in contenders]
    start = time.perf_counter()
    while len(times[0]) < REPEATS or (
        time.perf_counter() - start < MIN_SECONDS and len(times[0]) < 1000
    ):
        for mine, contender in zip(times, contenders, strict=True):
            if contender.before is not None:
                contender.before()
            began = time.perf_counter()
            contender.job()
            mine.append(1e3 * (time.perf_counter() - began))
    base = median(times[0])
    for mine, contender in zip(times, contenders, strict=True):
        p20, p50, p80 = (quantiles(mine, n=10)[i] for i in (1, 4, 7))
        yield {
            "what": contender.what,
            "direction": contender.direction,
            "numel": numel,
            "density": density,
            "threads": contender.threads,
            "ms_p20": round(p20, 4),
            "ms_p50": round(p50, 4),
            "ms_p80": round(p80, 4),
            "float32_gb_s": round(numel * 4 / p50 / 1e6, 3),
            "memcpies": round(p50 / base, 3),
        }


def backend(codec: ModuleType, x0: Tensor) -> Iterator[Contender]:
    """Yield one backend's both directions on one tensor.

    Raises:
        RuntimeError: it is wrong, so its speed means nothing.
    """
    numel = x0.numel()
    name = codec.__name__.rpartition(".")[2]
    x, out = x0.clone(), torch.empty(max_frame_bytes(numel), dtype=torch.uint8)
    used, _ = codec.encode(x, 1.0, out)
    frame, acc = out[:used].clone(), torch.zeros(numel)
    codec.add(frame, acc)
    if codec.check(frame, numel) != used or not torch.equal(acc + x, x0):
        raise RuntimeError(f"{name} is wrong at {numel} values")
    if numel <= SIZES[1]:
        expected, left = torch.empty_like(out), x0.clone()
        size, _ = reference.encode(left, 1.0, expected)
        if not torch.equal(expected[:size], frame) or not torch.equal(left, x):
            raise RuntimeError(f"{name} differs from the reference at {numel} values")
    yield Contender(
        name, "encode", lambda: codec.encode(x, 1.0, out), lambda: x.copy_(x0)
    )

    def decode_add() -> None:
        codec.add(frame[: codec.check(frame, numel)], acc)

    yield Contender(name, "decode_add", decode_add)


def with_residual(x0: Tensor) -> Iterator[Contender]:
    """Yield the encoder as hooks call it: a gradient of each type, and a residual.

    Raises:
        RuntimeError: it is wrong, so its speed means nothing.
    """
    n = x0.numel()
    residual, x = torch.zeros(n), x0.clone()
    out = torch.empty(max_frame_bytes(n), dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        given = x0.to(dtype)
        source = None if dtype == torch.float32 else given
        before = (lambda: x.copy_(x0)) if source is None else None

        def encode(source: Tensor | None = source) -> int:
            return cpu.encode(x, 1.0, out, residual, None, source).frame_bytes

        def widened(given: Tensor = given) -> None:
            x.copy_(given)
            cpu.encode(x, 1.0, out, residual)

        x.copy_(x0)
        frame, sent = out[: encode()], torch.zeros(n)
        cpu.add(frame, sent)
        if not torch.equal(sent + x, given.float()):
            raise RuntimeError(f"{name} is wrong at {n} values")
        yield Contender(f"cpu, {name} and residual", "encode", encode, before)
        if dtype == torch.bfloat16:
            what = f"cpu, {name} widened first, and residual"
            yield Contender(what, "encode", widened)


def limits(x: Tensor, workers: Workers) -> Iterator[Contender]:
    """Yield what only moves memory: nothing that does the same can take less."""
    values, one, target = x.clone().numpy(), np.float32(1), torch.empty_like(x)
    yield Contender(
        "adding a number in place",
        "decode_add",
        lambda: np.add(values, one, out=values),
    )
    parts = [torch.split(whole, 100_000) for whole in (x, target)]
    weights = [mine.numel() for mine in parts[0]]

    def copy(index: int) -> None:
        parts[1][index].copy_(parts[0][index])

    yield Contender(
        "memcpy in parts",
        "encode",
        lambda: workers.map(copy, weights),
        threads=workers.threads,
    )


def plain_torch(x0: Tensor) -> Contender:
    """Return torch operators that do the same without folding zero runs."""
    x = x0.clone()

    def encode() -> Tensor:
        scale = x.abs().max() * 1.0
        half = scale * 0.5
        digits = (x > half).to(torch.int8) - (x < -half).to(torch.int8)
        x.sub_(digits * scale)
        return tensor._quartic(digits)

    what = "torch operators, no zero runs"
    return Contender(what, "encode", encode, lambda: x.copy_(x0))


def others(x: Tensor) -> Iterator[Contender]:
    """Yield what people use instead, on the same tensor."""
    n = x.numel()
    half = torch.empty(n, dtype=torch.float16)
    yield Contender("fp16 cast", "encode", lambda: half.copy_(x))
    rows = 1 << (n.bit_length() // 2)
    matrix = x[: n // rows * rows].view(rows, -1)
    for rank in (1, 4):
        q = torch.randn(matrix.shape[1], rank)

        def power(q: Tensor = q) -> Tensor:
            p = torch.linalg.qr(matrix @ q).Q
            return torch.matmul(matrix.t(), p)

        yield Contender(f"PowerSGD rank {rank}", "encode", power)
    data = x.numpy().tobytes()
    if n <= SIZES[1]:
        squeezer = zstandard.ZstdCompressor(level=1)
        yield Contender(
            "zstd 1 on the floats", "encode", lambda: squeezer.compress(data)
        )
        yield Contender("lz4 on the floats", "encode", lambda: lz4.frame.compress(data))


def bucket(workers: Workers, x0: Tensor) -> Contender:
    """Return the encoding of a bucket of ``PIECES`` tensors on some threads."""
    x = x0.clone()
    values = torch.split(x, x.numel() // PIECES)
    rooms = [torch.empty(max_frame_bytes(v.numel()), dtype=torch.uint8) for v in values]

    weights = [v.numel() for v in values]

    def encode(index: int) -> None:
        cpu.encode(values[index], 1.0, rooms[index])

    return Contender(
        f"cpu, bucket of {PIECES}",
        "encode",
        lambda: workers.map(encode, weights),
        lambda: x.copy_(x0),
        workers.threads,
    )


def speed_rows(sizes: tuple[int, ...], console: Console) -> list[Row]:
    """Return all rows, each with its ratio to the memcpy of the same tensor."""
    rows: list[Row] = []
    for numel in sizes:
        source, target = torch.rand(numel), torch.empty(numel)
        for density in DENSITIES:
            console.print(f"{numel:>11,} values, density {density}")
            x0 = spiky(numel, density)
            copy = Contender("memcpy", "encode", partial(target.copy_, source))
            quick, slow = [copy, *backend(cpu, x0)], [copy, plain_torch(x0)]
            if numel >= SIZES[1]:
                quick += with_residual(x0)
            if numel <= SIZES[2]:
                slow += backend(tensor, x0)
            if numel <= SIZES[0]:
                slow += backend(reference, x0)
            if density == DENSITIES[0]:
                slow += others(x0)
            pools = [Workers(threads) for threads in (1, 2)]
            if numel == SIZES[2]:
                quick += [bucket(workers, x0) for workers in pools]
                quick += limits(x0, pools[1])
            rows += in_turns(quick, numel, density)
            rows += list(in_turns(slow, numel, density))[1:]  # its own memcpy: once
            for workers in pools:
                workers.close()
    return rows


def order0_bytes(data: np.ndarray) -> float:
    """Return the bytes that an ideal coder of independent symbols would take."""
    counts = np.unique(data, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def entropy_rows() -> Iterator[Row]:
    """Yield, by task, s and moment, what each entropy stage makes of real frames."""
    groups: dict[tuple[str, float, str], list[Tensor]] = {}
    for item in recorded():
        groups.setdefault((item.task, item.sparsity, item.moment), []).append(item.x)
    for (task, sparsity, moment), xs in groups.items():
        frames, digits = [], []
        encode_ms = decode_ms = 0.0
        for x in xs:
            out = torch.empty(max_frame_bytes(x.numel()), dtype=torch.uint8)
            left = x.clone()
            used, _ = cpu.encode(left, sparsity, out)
            frames.append(out[:used].clone())
            acc = torch.zeros(x.numel())
            ms = timed(lambda: cpu.encode(left, sparsity, out), lambda: left.copy_(x))  # noqa: B023
            encode_ms += float(str(ms["ms_p50"]))
            ms = timed(lambda: cpu.add(frames[-1], acc))  # noqa: B023
            decode_ms += float(str(ms["ms_p50"]))
            digits.append(np.sign((x - left).numpy()).astype(np.int8))
        numel = sum(x.numel() for x in xs)
        whole = torch.cat(frames)
        body = np.concatenate([frame[SCALE_BYTES:].numpy() for frame in frames])
        small, _ = compress([frames], 0)
        if not torch.equal(decompress(small, whole.numel()), whole):
            raise RuntimeError("the entropy stage loses bytes")
        in_ms = timed(lambda: compress([frames], 0))  # noqa: B023
        out_ms = timed(lambda: decompress(small, whole.numel()))  # noqa: B023
        stage = float(str(in_ms["ms_p50"])) + float(str(out_ms["ms_p50"]))
        sizes = [x.numel() for x in xs]
        ranged = rans.compress(frames, sizes)
        if not torch.equal(rans.decompress(ranged, sizes), whole):
            raise RuntimeError("the range stage loses bytes")
        ranged_in = timed(lambda: rans.compress(frames, sizes))  # noqa: B023
        ranged_out = timed(lambda: rans.decompress(ranged, sizes))  # noqa: B023
        rans_ms = [float(str(ms["ms_p50"])) for ms in (ranged_in, ranged_out)]
        all_digits = np.concatenate(digits)
        yield {
            "task": task,
            "sparsity": sparsity,
            "moment": moment,
            "numel": numel,
            "density": round(float((all_digits != 0).mean()), 5),
            "format1_bits": round(8 * whole.numel() / numel, 4),
            "digit_entropy_bits": round(8 * order0_bytes(all_digits) / numel, 4),
            "body_entropy_bits": round(8 * order0_bytes(body) / numel, 4),
            "zstd1_bits": round(8 * small.numel() / numel, 4),
            "lz4_bits": round(
                8 * len(lz4.frame.compress(whole.numpy().tobytes())) / numel, 4
            ),
            "zstd_encode_gb_s": round(numel * 4e-6 / float(str(in_ms["ms_p50"])), 2),
            "zstd_decode_gb_s": round(numel * 4e-6 / float(str(out_ms["ms_p50"])), 2),
            "codec_ms": round(encode_ms + decode_ms, 4),
            "stage_ms": round(stage, 4),
            "rans_bits": round(8 * ranged.numel() / numel, 4),
            "rans_encode_gb_s": round(numel * 4e-6 / rans_ms[0], 2),
            "rans_decode_gb_s": round(numel * 4e-6 / rans_ms[1], 2),
            "rans_ms": round(sum(rans_ms), 4),
        }


def speed_table(rows: list[dict[str, str]]) -> str:
    """Return times in memcpies of the same tensor: what a reader looks for first."""
    shown: dict[str, dict[str, str]] = {}
    for r in rows:
        if r["what"] == "memcpy":
            continue
        key = f"{r['what']}, {r['direction']}, {r['threads']} thread"
        column = f"{int(r['numel']):,} at {float(r['density']):g}"
        if float(r["density"]) in (0.5, 0.05, 0.01, 0.0) or "bucket" in r["what"]:
            shown.setdefault(key, {})[column] = r["memcpies"]
    columns = [f"{n:,} at {d:g}" for n in SIZES[1:] for d in (0.5, 0.05, 0.01)]
    lines = [
        f"| times a memcpy | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for key, cells in shown.items():
        plain = [
            cells.get(c, cells.get(c.split(" at")[0] + " at 0", "")) for c in columns
        ]
        if any(plain):
            lines.append(f"| {key} | {' | '.join(plain)} |")
    return "\n".join(lines) + "\n"


def entropy_table(rows: list[dict[str, str]]) -> str:
    """Return bits per element before and after the entropy stage."""
    columns = {
        "density": "density",
        "format1_bits": "format 1",
        "digit_entropy_bits": "digit entropy",
        "body_entropy_bits": "order-0 of the bytes",
        "zstd1_bits": "zstd 1",
        "lz4_bits": "lz4",
        "zstd_encode_gb_s": "zstd in, GB/s",
        "zstd_decode_gb_s": "zstd out, GB/s",
    }
    lines = [
        f"| recorded gradients | {' | '.join(columns.values())} | stage / codec time | "
        "pays below, Gbit/s |",
        "| --- |" + " ---: |" * (len(columns) + 2),
    ]
    for r in rows:
        stage_ms = float(r["stage_ms"])
        share = 100 * stage_ms / float(r["codec_ms"])
        saved = (float(r["format1_bits"]) - float(r["zstd1_bits"])) * int(r["numel"])
        cells = [r[column] for column in columns]
        cells += [f"{share:.0f} %", f"{saved / stage_ms / 1e6:.1f}"]
        name = f"{r['task']}, s = {r['sparsity']}, {r['moment']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def range_table(rows: list[dict[str, str]]) -> str:
    """Return what the range coder takes off beyond zstd, and in how much time."""
    columns = {
        "digit_entropy_bits": "digit entropy",
        "zstd1_bits": "zstd 1",
        "rans_bits": "rans",
    }
    times = {"rans_encode_gb_s": "in, GB/s", "rans_decode_gb_s": "out, GB/s"}
    lines = [
        f"| recorded gradients | {' | '.join(columns.values())} | less than zstd | "
        f"{' | '.join(times.values())} | pays below, Mbit/s |",
        "| --- |" + " ---: |" * (len(columns) + len(times) + 2),
    ]
    for r in rows:
        zstd, ranged = float(r["zstd1_bits"]), float(r["rans_bits"])
        longer = float(r["rans_ms"]) - float(r["stage_ms"])
        cells = [r[column] for column in columns]
        cells += [f"{100 * (1 - ranged / zstd):.0f} %", *(r[t] for t in times)]
        cells += [f"{(zstd - ranged) * int(r['numel']) / longer / 1e3:.0f}"]
        name = f"{r['task']}, s = {r['sparsity']}, {r['moment']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def caption(rows: list[dict[str, str]]) -> str:
    """Return which machine and versions the figures are of."""
    r = rows[0]
    return (
        f"\n{r['machine']}, {r['cores']} cores, one thread unless said; lc3 {r['lc3']} "
        f"at commit {r['commit']}, torch {r['torch']}, numba {r['numba']}.\n"
    )


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Write a PNG: times in memcpies against density, at the largest common size."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for what in ("cpu", "tensor", "torch operators, no zero runs"):
        for direction, style in (("encode", "-"), ("decode_add", "--")):
            mine = [
                (float(r["density"]), float(r["memcpies"]))
                for r in rows
                if (r["what"], r["direction"], int(r["numel"]))
                == (what, direction, SIZES[2])
            ]
            if mine:
                axes.plot(
                    *zip(*mine, strict=True),
                    style,
                    marker="o",
                    label=f"{what}, {direction}",
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("share of values sent")
    axes.set_ylabel("times a memcpy of the tensor")
    axes.set_title(f"{SIZES[2]:,} float32 values, one thread")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Measure, write the result files, and bring the page up to date."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.codec", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="small tensors only")
    parser.add_argument(
        "--stages", action="store_true", help="entropy stages only, not the codec"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "local")
    parser.add_argument("--docs", type=Path, help="Markdown file with markers")
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    write_csv(options.out / "entropy.csv", stamped(list(entropy_rows())))
    entropy = read_csv(options.out / "entropy.csv")
    tables = {
        "entropy": entropy_table(entropy) + caption(entropy),
        "range": range_table(entropy) + caption(entropy),
    }
    if not options.stages:
        sizes = SIZES[:2] if options.quick else SIZES
        write_csv(options.out / "codec.csv", stamped(speed_rows(sizes, console)))
        speed = read_csv(options.out / "codec.csv")
        tables["speed"] = speed_table(speed) + caption(speed)
    for content in tables.values():
        console.print(content, soft_wrap=True, highlight=False)
    if not (options.quick or options.stages):
        plot(speed, options.out / "codec.png")
    if options.docs:
        text = options.docs.read_text()
        for name, content in tables.items():
            text = insert(text, name, content)
        options.docs.write_text(text)


if __name__ == "__main__":
    main()
