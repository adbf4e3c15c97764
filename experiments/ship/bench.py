"""What each way to ship a model brings: bytes beside score, speed beside memcpy.

``make ship-bench``. Every file is loaded and compared, or its score measured, before a
figure is written. Rivals run in the same process: zstd 3, NNCodec (ISO/IEC 15938-17)
and ZipNN where they are installed; where not, their rows say so.
"""

import argparse
import importlib
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from rich.console import Console
from torch import Tensor, nn

from experiments.record import read_csv, stamped, write_csv
from experiments.ship import huffman, nncodec
from experiments.ship import memory as ship_memory
from experiments.ship import works as ship_works
from experiments.ship.equal import equal_rows
from experiments.ship.information import information_rows
from experiments.ship.kfac import kfac_rows
from experiments.ship.models import MAKERS, Data, data_of, prepared, train
from experiments.ship.tables import (
    TITLES,
    Named,
    Row,
    deviation,
    matrices,
    order_0,
    page,
    row,
)
from experiments.tables import insert
from lc3 import ship
from lc3.errors import ConfigError
from lc3.ship import (
    bloomier,
    centres,
    choose,
    contexts,
    planes,
    ranks,
    steps,
    transform,
)
from lc3.ship.choose import Lossy, section_of
from lc3.ship.model import opened
from lc3.ship.steps import Steps

STEP_SIZES = (1.0, 2.0)  # in deviations of all values
BITS = (3.0, 2.0, 1.5, 1.0)
QPS = (-24, -20, -16)
RANK_BUDGETS = (0.02, 0.05, 0.1, 0.2)  # of the cost of all ranks
MEMORY_WAYS = ("exact", "steps, zstd")
DENSITIES = (0.05, 0.02)
FINE_TUNING = 400  # steps


def sources_of(kept: dict[str, Named]) -> dict[str, Named]:
    """Return what a codec meets, by name."""
    later, middle = kept["ten steps later"], kept["middle"]
    delta = {n: later[n] - middle[n] for n in middle}
    found = {name: kept[name] for name in ("gradient", "momentum")}
    return {**found, "delta of ten steps": delta, "weights": kept["weights"]}


def coder_rows(network: str, kept: dict[str, Named]) -> Iterator[Row]:
    """Yield real bits a value beside order-0 entropy and zstd 3."""
    for name, named in sources_of(kept).items():
        for size in STEP_SIZES:
            step = Steps(size * deviation(named))
            ours = without = zstd = entropy = 0.0
            values = 0
            for tensor in matrices(named).values():
                numbers = steps.quantize(tensor.double().numpy(), step)
                assert numbers is not None
                rows = len(tensor)
                code = contexts.encode(numbers, rows, predicts=True)
                again = contexts.decode(
                    memoryview(code), numbers.size, rows, predicts=True
                )
                assert (again == numbers).all()
                without += 8 * len(contexts.encode(numbers, rows))
                ours += 8 * len(steps.section(numbers, tuple(tensor.shape), step))
                zstd += 8 * len(
                    planes.compressed(numbers.astype(np.int8).view(np.uint8))
                )
                entropy += order_0(numbers)
                values += numbers.size
            yield row(
                *("coder", network, f"{name}, step {size:g} σ"),
                bits=ours / values,
                rival_bits=entropy / values,
                ratio=ours / entropy,
                note=f"without prediction {without / values:.4f}, zstd 3 "
                f"{zstd / values:.4f} bits",
            )


def dct_rows(network: str, kept: dict[str, Named]) -> Iterator[Row]:
    """Yield bits a value that the gate of the DCT saves, by tensor, at equal error.

    ``drop`` is what it saves a coder that knows nothing but how frequent each number is
    at each place of a kernel: a difference of order-0 entropies.
    """
    for name, named in sources_of(kept).items():
        lossy = Lossy(step=deviation(named))
        for key, tensor in matrices(named).items():
            if tensor.ndim < 3:
                continue
            sizes = []
            for by_gate in (True, False):
                plan = Lossy(lossy.step, transform=by_gate)
                section = section_of(key, tensor.contiguous(), None, plan)
                sizes.append(8 * len(section.data) / tensor.numel())
            assert sizes[0] <= sizes[1]
            there, here = (by_place(x, lossy.step) for x in both_ways(tensor))
            yield row(
                *("dct", network, f"{name}, {key}"),
                bits=sizes[0],
                rival_bits=sizes[1],
                drop=here - there,
                note="taken" if sizes[0] < sizes[1] else "declined",
            )


def both_ways(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return a kernel's coefficients and itself, float64 of its shape."""
    x = tensor.double().numpy()
    return transform.forward(x, tuple(range(2, x.ndim))), x


def by_place(x: np.ndarray, step: float) -> float:
    """Return bits a value, of entropies of order 0 at each place of a kernel."""
    numbers = steps.quantize(x, Steps(step))
    assert numbers is not None
    places = numbers.reshape(x.shape[0] * x.shape[1], -1).T
    return sum(map(order_0, places)) / numbers.size


def scored(model: nn.Module, data: Data, state: Named) -> float:
    """Return a model's score with other weights."""
    model.load_state_dict(state)
    return data.score(model)


def predicted(model: nn.Module, data: Data, state: Named) -> Tensor:
    """Return what a model predicts with other weights."""
    model.load_state_dict(state)
    return data.predicted(model)


def file_rows(network: str, kept: dict[str, Named], data: Data) -> Iterator[Row]:
    """Yield whole files: bytes, and the score of what is loaded from them."""
    model, weights = MAKERS[network](), kept["weights"]
    full = scored(model, data, weights)
    raw = sum(t.nbytes for t in weights.values())
    values = sum(t.numel() for t in weights.values())
    yield row("file", network, "float32", bytes=raw, bits=32.0, ratio=1.0, score=full)

    def of(what: str, size: int, state: Named) -> Row:
        score = scored(model, data, state)
        return row(
            *("file", network, what),
            bytes=size,
            bits=8 * size / values,
            ratio=raw / size,
            score=score,
            drop=full - score,
        )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.lc3m"
        for bits in BITS:
            size = ship.save(weights, path, bits=bits)
            yield of(f"lc3, {bits:g} bits", size, ship.load(path))
        for bits in BITS[1:3]:
            size, state = per_layer(weights, bits)
            yield of(f"steps by each layer's deviation, {bits:g} bits", size, state)
        size = ship.save(weights, path, bits=2.0, coder="zstd")
        yield of("lc3, zstd, 2 bits", size, ship.load(path))
        size = ship.save(weights, path, bits=2.0, dither_seed=1)
        yield of("lc3, dither, 2 bits", size, ship.load(path))
    yield from nncodec_rows(weights, of)


def per_layer(weights: Named, bits: float) -> tuple[int, Named]:
    """Return bytes and decoded weights of steps in units of each layer's deviation."""
    low, high = 0.01, 20.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        size, state = 0, {}
        for name, tensor in weights.items():
            lossy = Lossy(middle * max(float(tensor.std()), 1e-12))
            section = section_of(name, tensor.contiguous(), None, lossy)
            size += len(section.data)
            state[name] = section.decoded
        if 8 * size > bits * sum(t.numel() for t in weights.values()):
            low = middle
        else:
            high = middle
    return size, state


def nncodec_rows(weights: Named, of: Callable[[str, int, Named], Row]) -> Iterator[Row]:
    """Yield NNCodec's bytes and scores; none where it is not installed."""
    version = nncodec.installed()
    for qp in QPS if version else ():
        stream = nncodec.encode(weights, qp)
        found = nncodec.decode(stream, weights)
        yield of(f"NNCodec {version}, qp {qp}", len(stream), found)


def pruned_rows(network: str, kept: dict[str, Named], data: Data) -> Iterator[Row]:
    """Yield files of pruned, fine-tuned networks, beside Huffman and a filter."""
    raw = sum(t.nbytes for t in kept["weights"].values())
    model = MAKERS[network]()
    full = scored(model, data, kept["weights"])
    for density in DENSITIES:
        model.load_state_dict(kept["weights"])
        masks = ship.prune(model, [], density)
        before = data.score(model)

        def again(_step: int, _optimizer: object, masks: Any = masks) -> None:
            masks.apply()

        train(model, data, FINE_TUNING, seed=1, lr=0.03, after=again)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        tuned = data.score(model)
        yield row(
            *("pruned", network, f"{density:.0%} of the weights, float32"),
            score=tuned,
            drop=full - tuned,
            note=f"before fine-tuning {before:.2f}",
        )
        size = deviation({n: t[t != 0] for n, t in matrices(state).items()})
        step = size / 4
        huffman_bytes, coder_bytes, filter_bytes = 0, 0, 0
        for tensor in matrices(state).values():
            numbers = steps.quantize(tensor.double().numpy(), Steps(step))
            assert numbers is not None
            huffman_bytes += huffman.nbytes(numbers)
            coder_bytes += len(contexts.encode(numbers, len(tensor), predicts=True))
            flat = tensor.double().numpy().reshape(-1)
            keys = np.flatnonzero(flat)
            values, which = centres.cluster(flat[keys], 16)
            table = bloomier.build(keys, which.astype(np.uint32), 4, 9)
            filter_bytes += len(bloomier.section(table, values))
        kept_values = int(sum((t != 0).sum() for t in matrices(state).values()))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.lc3m"
            nbytes = ship.save(state, path, step=step)
            score = scored(model, data, ship.load(path))
        yield row(
            *("pruned", network, f"{density:.0%}, shipped"),
            bytes=nbytes,
            ratio=raw / nbytes,
            score=score,
            drop=full - score,
            note=f"weights alone: Huffman {huffman_bytes}, lc3 {coder_bytes}, filter "
            f"{filter_bytes} bytes",
        )
        for what, number in (
            ("context coder", coder_bytes),
            ("Huffman of values and gaps", huffman_bytes),
            ("Bloomier filter, r = 4, t = 9", filter_bytes),
        ):
            yield row(
                *("non-zero", network, f"{density:.0%}, {what}"),
                bytes=number,
                bits=8 * number / kept_values,
            )


def exact_rows(network: str, weights: Named) -> Iterator[Row]:
    """Yield lossless ratios and speeds beside zstd 3 and ZipNN."""
    for dtype in (torch.float32, torch.bfloat16):
        many = torch.cat([t.flatten() for t in weights.values()]).to(dtype)
        times = max(1, (32 << 20) // many.nbytes)
        code, enter = clocked(partial(planes.encode, many, None), times)
        shape = tuple(many.shape)
        found, leave = clocked(partial(planes.decode, code, dtype, shape, None), times)
        assert torch.equal(found.view(torch.uint8), many.view(torch.uint8))
        data = planes.bytes_of(many).tobytes()
        name = str(dtype).removeprefix("torch.")
        yield row(
            *("exact", network, f"{name}, lc3"),
            bytes=len(code),
            ratio=len(data) / len(code),
            mb_s_in=len(data) / enter / 1e6,
            mb_s_out=len(data) / leave / 1e6,
        )
        squeezed, enter = clocked(
            partial(zstandard.ZstdCompressor(level=3).compress, data), times
        )
        plain, leave = clocked(
            partial(zstandard.ZstdDecompressor().decompress, squeezed), times
        )
        assert plain == data
        yield row(
            *("exact", network, f"{name}, zstd 3"),
            bytes=len(squeezed),
            ratio=len(data) / len(squeezed),
            mb_s_in=len(data) / enter / 1e6,
            mb_s_out=len(data) / leave / 1e6,
        )
        yield zipnn_row(network, name, data, times)


def zipnn_row(network: str, name: str, data: bytes, times: int) -> Row:
    """Return ZipNN's figures, or a row that says it is not there."""
    if importlib.util.find_spec("zipnn") is None:
        return row("exact", network, f"{name}, ZipNN", note="not installed: no figure")
    zipnn: Any = importlib.import_module("zipnn")
    codec = zipnn.ZipNN(bytearray_dtype=name, threads=1)
    code, enter = clocked(lambda: codec.compress(bytearray(data)), times)
    plain, leave = clocked(lambda: codec.decompress(bytearray(code)), times)
    assert bytes(plain) == data
    return row(
        *("exact", network, f"{name}, ZipNN"),
        bytes=len(code),
        ratio=len(data) / len(code),
        mb_s_in=len(data) / enter / 1e6,
        mb_s_out=len(data) / leave / 1e6,
    )


def speed_rows(network: str, weights: Named) -> Iterator[Row]:
    """Yield speeds of coders on float32, beside a memcpy of the same tensor."""
    tensor = max(weights.values(), key=lambda t: t.numel())
    data = tensor.numpy()
    other = np.empty_like(data)
    _, copied = clocked(lambda: np.copyto(other, data), 50)
    yield row("speed", network, "memcpy", mb_s_in=tensor.nbytes / copied / 1e6)
    bits = 0.0
    for coder in steps.CODERS:
        lossy = Lossy(deviation(weights), coder=coder, transform=False)
        section, enter = clocked(
            partial(choose.section_of, "w", tensor, None, lossy), 3
        )
        shape = tuple(tensor.shape)
        found, leave = clocked(partial(steps.decode, section.data, shape), 3)
        assert torch.equal(found, section.decoded)
        found_bits = 8 * len(section.data) / tensor.numel()
        bits = bits or found_bits
        yield row(
            *("speed", network, f"steps of 1 σ, {coder}"),
            bits=found_bits,
            mb_s_in=tensor.nbytes / enter / 1e6,
            mb_s_out=tensor.nbytes / leave / 1e6,
        )
    yield from nncodec_speed_rows(network, tensor, bits)


def rank_rows(network: str, kept: dict[str, Named]) -> Iterator[Row]:
    """Yield energy that low ranks lose at a budget, each rule beside uniform rank."""
    for name, named in sources_of(kept).items():
        layers = []
        for tensor in matrices(named).values():
            flat = tensor.flatten(1).double()
            spectrum = torch.linalg.svdvals(flat).square().numpy()
            layers.append(ranks.Layer(spectrum, float(sum(flat.shape))))
        whole = sum(layer.cost * layer.largest for layer in layers)
        for budget in RANK_BUDGETS:
            lost = {}
            for rule in (ranks.uniform, ranks.greedy, ranks.enc_map):
                try:
                    found = rule(layers, budget)
                except ConfigError:
                    continue  # less than rank 1 of each layer takes
                spent = sum(a.cost * r for a, r in zip(layers, found, strict=True))
                if spent > 1.01 * budget * whole:
                    continue  # ENC-Map goes to no less than a tenth of a layer's ranks
                lost[rule.__name__] = ranks.energy_lost(layers, found)
            for rule_name in ("greedy", "enc_map") if "uniform" in lost else ():
                if rule_name in lost:
                    yield row(
                        *("ranks", network, f"{name}, {budget:.0%}, {rule_name}"),
                        ratio=lost[rule_name] / lost["uniform"],
                        note=f"{lost[rule_name]:.2%} of the energy",
                    )


def memory_rows(megabytes: int) -> Iterator[Row]:
    """Yield peak memory and speed of shipping a large file, and of unshipping it."""
    tensors = 16
    with tempfile.TemporaryDirectory() as folder:
        source, shipped = Path(folder) / "m.safetensors", Path(folder) / "shipped.lc3m"
        ship_memory.write(source, megabytes, tensors)
        size = source.stat().st_size
        for way in MEMORY_WAYS:
            there = ship_memory.measured(source, way)
            back = ship_memory.measured(shipped, way, back=True)
            promised = 1 + 2 / tensors
            for what, found in (("ship", there), ("unship", back)):
                speed = size / found["seconds"] / 1e6
                yield row(
                    *("memory", f"{megabytes} MB, {tensors} tensors", f"{way}, {what}"),
                    bytes=int(found["peak_bytes"]),
                    ratio=found["peak_bytes"] / size,
                    mb_s_in=speed if found is there else "",
                    mb_s_out=speed if found is back else "",
                    note=f"promised {promised:.3f}",
                )


def nncodec_speed_rows(network: str, tensor: Tensor, bits: float) -> Iterator[Row]:
    """Yield NNCodec's speed on the same tensor, where its bits are next to ours."""
    version = nncodec.installed()
    if not version:
        return
    state = {"w": tensor}

    def off(qp: int) -> float:
        return abs(8 * len(nncodec.encode(state, qp)) / tensor.numel() - bits)

    qp = min(range(-28, -7, 4), key=off)
    stream, enter = clocked(partial(nncodec.encode, state, qp), 3)
    found, leave = clocked(partial(nncodec.decode, stream, state), 3)
    assert (found["w"] - tensor).square().sum() < tensor.square().sum()
    yield row(
        *("speed", network, f"NNCodec {version}, qp {qp}"),
        bits=8 * len(stream) / tensor.numel(),
        mb_s_in=tensor.nbytes / enter / 1e6,
        mb_s_out=tensor.nbytes / leave / 1e6,
    )


def clocked(job: Callable[[], Any], times: int) -> tuple[Any, float]:
    """Return what a job returns, and the least seconds of this process that it took."""
    found, best = job(), math.inf
    for _ in range(min(times, 20)):
        start = time.process_time()
        found = job()
        best = min(best, time.process_time() - start)
    return found, max(best, 1e-9)


def _family(name: str) -> str:
    """Return which part of the benchmark makes a table."""
    return "pruned" if name == "non-zero" else name


def main() -> None:
    """Measure, write the result file, and put its tables into the page."""
    parser = argparse.ArgumentParser(prog="experiments.ship.bench", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True, help="trained networks")
    parser.add_argument("--networks", nargs="*", choices=MAKERS, default=list(MAKERS))
    parser.add_argument(
        "--weights", nargs="*", type=Path, default=[], help="files to ship, too"
    )
    parser.add_argument("--seeds", type=int, default=5, help="of the K-FAC rows")
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="of the file of the memory rows"
    )
    parser.add_argument("--tables", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="result file; rows of other networks and tables in it stay",
    )
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    console = Console()
    for network in options.networks:
        kept = prepared(options.models, network, options.data_dir)
        data = data_of(network, options.data_dir)
        model = MAKERS[network]()
        makers: dict[str, Callable[[], Iterator[Row]]] = {
            "coder": partial(coder_rows, network, kept),
            "dct": partial(dct_rows, network, kept),
            "file": partial(file_rows, network, kept, data),
            "equal": partial(
                equal_rows,
                network,
                kept["weights"],
                partial(predicted, model, data),
                data.answers,
            ),
            "pruned": partial(pruned_rows, network, kept, data),
            "kfac": partial(kfac_rows, network, data, options.seeds, console.print),
            "ranks": partial(rank_rows, network, kept),
            "information": partial(information_rows, network, kept["weights"], data),
            "exact": partial(exact_rows, network, kept["weights"]),
            "speed": partial(speed_rows, network, kept["weights"]),
        }
        for name, make in makers.items():
            if name in options.tables:
                for found in make():
                    console.print(
                        " ".join(f"{v}" for v in found.values() if v != ""),
                        highlight=False,
                    )
                    rows.append(found)
    if "memory" in options.tables:
        rows += memory_rows(options.megabytes)
    for path in options.weights:
        with opened(path) as tensors:
            floats = {n: t for n, t in tensors.items() if t.is_floating_point()}
            named = {n: t.float() for n, t in floats.items()}
            rows += exact_rows(path.name, named)
            rows += equal_rows(path.name, named, None, None)
    measured = {(r["network"], _family(str(r["table"]))) for r in rows}
    old = read_csv(options.out) if options.out.exists() else []
    others = [r for r in old if (r["network"], _family(r["table"])) not in measured]
    write_csv(options.out, [*others, *stamped(rows)])
    if options.docs:
        text = options.docs.read_text()
        whole = read_csv(options.out)
        text = insert(text, "works", ship_works.table(whole))
        text = insert(text, "ship", page(whole))
        options.docs.write_text(text)


if __name__ == "__main__":
    main()
