"""What the CUDA kernels become for each GPU, without one: registers, memory, spills.

    python -m experiments.bench.cuda_kernels --docs docs/explanation/codec.md

Compiles every kernel to PTX and, by NVIDIA's own assembler, to machine code. Needs the
extra ``cuda`` and the packages nvidia-cuda-nvcc-cu12 and nvidia-cuda-nvrtc-cu12.
"""

import argparse
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from experiments.report import build as report

TARGETS = ((7, 0), (8, 0), (9, 0), (10, 0))
ENCODING = ("_find_peaks", "_quantize", "_carry", "_count", "_place", "_emit")
KERNELS = (*ENCODING, "_measure", "_begin", "_add")

# Bytes of memory for each value, read or written, by kernel: of what grows with the
# values. A quartic byte stands for five; at 5 % density 23 % of those are not zero.
TRAFFIC = {
    "_find_peaks": "12: a value and its residual read, their sum written",
    "_quantize": "4.2 and 8 where it sends: a value read, a quartic byte written",
    "_carry": "0",
    "_count": "0.4: a quartic byte read twice",
    "_place": "0",
    "_emit": "0.4, and the frame: a quartic byte read twice",
    "_measure": "the frame",
    "_begin": "0",
    "_add": "the frame, and 8 where it adds",
}


def signatures() -> dict[str, tuple[Any, ...]]:
    """Return what each kernel is called with."""
    from numba import types

    floats, ints, longs = types.float32[::1], types.int32[::1], types.int64[::1]
    table, bytes_ = types.int64[:, ::1], types.uint8[::1]
    tables = table, table
    found = {
        "_find_peaks": (floats, floats, *tables, floats, ints),
        "_quantize": (
            *(floats, *tables, floats, ints, types.float32, floats, floats),
            *(bytes_, ints, ints),
        ),
        "_carry": (table, ints, ints),
        "_count": (*tables, floats, bytes_, ints, ints),
        "_place": (table, ints, ints, ints, longs),
        "_emit": (*tables, floats, bytes_, ints, ints, bytes_),
        "_measure": (table, types.int64, bytes_, ints),
        "_begin": (table, ints),
        "_add": (floats, *tables, types.int64, table, floats, ints, bytes_),
    }
    assert tuple(found) == KERNELS
    return found


def assembler() -> Path:
    """Return NVIDIA's assembler.

    Raises:
        FileNotFoundError: the package nvidia-cuda-nvcc-cu12 is not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        for found in Path(place).rglob("ptxas"):
            return found
    raise FileNotFoundError("no ptxas; pip install nvidia-cuda-nvcc-cu12")


def compiled(target: tuple[int, int]) -> list[dict[str, Any]]:
    """Return a row for each kernel: registers, shared memory, stack and spills."""
    import numba.cuda
    from numba.cuda import dispatcher

    from lc3.codec import cuda

    # Device functions are compiled for the current device; there is none.
    device = SimpleNamespace(compute_capability=target)
    dispatcher.get_current_device = lambda: device
    for name in (
        "_sum_until",
        "_largest_until",
        "_speaks",
        "_steps_of",
        "_last_before",
    ):
        getattr(cuda, name).overloads.clear()
    compile_ptx: Any = numba.cuda.compile_ptx
    architecture = f"sm_{target[0]}{target[1]}"
    rows = []
    for name, signature in signatures().items():
        function = getattr(cuda, name).py_func
        ptx, _ = compile_ptx(function, signature, cc=target)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(ptx)
            said = subprocess.run(
                [
                    *(assembler(), "-v", f"-arch={architecture}", source),
                    *("-o", source.with_suffix(".cubin")),
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stderr
        stack, stores, loads = map(
            int,
            re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said),
        )
        registers = re.search(r"Used (\d+) registers", said)
        shared = re.search(r"(\d+) bytes smem", said)
        rows.append(
            {
                "kernel": name,
                "target": architecture,
                "registers": int(registers[1]) if registers else 0,
                "shared": int(shared[1]) if shared else 0,
                "stack": stack,
                "spills": stores + loads,
                "fused": len(re.findall(r"\bfma\.rn\.f32", ptx)),
            }
        )
    return rows


def table() -> str:
    """Return all targets as a Markdown table."""
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for target in TARGETS:
        for row in compiled(target):
            by_kernel.setdefault(row["kernel"], []).append(row)
    lines = [
        "| kernel | registers, sm_70 / 80 / 90 / 100 | shared memory | stack, spills | "
        "bytes of memory a value |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for name, rows in by_kernel.items():
        registers = " / ".join(str(row["registers"]) for row in rows)
        spilled = sum(row["stack"] + row["spills"] for row in rows)
        lines.append(
            f"| `{name.lstrip('_')}` | {registers} | {rows[0]['shared']:,} | {spilled} "
            f"| {TRAFFIC[name]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and put it into a page."""
    parser = argparse.ArgumentParser(prog="experiments.bench.cuda_kernels")
    parser.add_argument("--docs", type=Path, help="page with the markers of this table")
    options = parser.parse_args()
    made = table()
    print(made)
    if options.docs:
        text = report.insert(options.docs.read_text(), "cuda-kernels", made + "\n")
        options.docs.write_text(text)


if __name__ == "__main__":
    main()
