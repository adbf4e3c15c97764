"""Peak memory and time of shipping a file of weights, measured in a process of its own.

    python -m experiments.ship.memory --megabytes 1024 --tensors 16

writes random float32 matrices as safetensors, ships them, and prints how far memory
rose above what the process held before, beside the promise: the input and two of its
largest tensors. Pages of the input that are mapped count, as they do for the system.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lc3 import ship
from lc3.ship.model import opened

MB = 1 << 20
COLUMNS = 1024
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "steps, zstd": {"step": 0.5, "coder": "zstd"},
    "steps, context": {"step": 0.5},
    "2 bits": {"bits": 2.0},
}


def write(path: Path, megabytes: int, tensors: int) -> None:
    """Write equal float32 matrices as safetensors, one after the other."""
    rows = megabytes * MB // tensors // 4 // COLUMNS
    torch.manual_seed(0)
    part = torch.randn(rows, COLUMNS)
    size = part.nbytes
    head = {
        f"w{i}": {
            "dtype": "F32",
            "shape": [rows, COLUMNS],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(tensors)
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(tensors):
            file.write(part.numpy().data)


def measured(source: Path, way: str, back: bool = False) -> dict[str, float]:
    """Return what a process of its own took to ship a file, or to unship it again.

    Args:
        source: weights; of a way back, a shipped model.
        way: one of ``WAYS``.
        back: whether the file is unshipped.

    Returns:
        ``peak_bytes`` above the start, ``seconds`` of the process, ``nbytes`` written.
    """
    command = [sys.executable, "-m", "experiments.ship.memory", "--inside", str(source)]
    done = subprocess.run(
        [*command, "--way", way, *(["--back"] if back else [])],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _peak() -> int:
    """Return the most bytes that this program has held, as Linux says it.

    ``ru_maxrss`` would begin with what the process held that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(found.split()[1])


def _inside(source: Path, way: str, back: bool) -> None:
    """Ship one file after kernels are compiled, and print what that took."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small, out = Path(folder) / "small.lc3m", Path(folder) / "out.lc3m"
        ship.save({"w": torch.randn(64, 64)}, small, **WAYS[way])
        ship.load(small)
        before, start = _peak(), time.process_time()
        if back:
            target = Path(folder) / "out.safetensors"
            ship.unship(source, target)
            nbytes = target.stat().st_size
        else:
            with opened(source) as state:
                nbytes = ship.save(state, out, **WAYS[way])
            (source.parent / "shipped.lc3m").write_bytes(out.read_bytes())
    seconds = time.process_time() - start
    found = {"peak_bytes": _peak() - before, "seconds": seconds, "nbytes": nbytes}
    print(json.dumps(found))


def main() -> None:
    """Print peaks beside the promise, or be the process that is measured."""
    parser = argparse.ArgumentParser(prog="experiments.ship.memory")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=16)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--inside", type=Path, help="file to ship here and now")
    parser.add_argument("--way", choices=WAYS, default="exact")
    parser.add_argument("--back", action="store_true")
    options = parser.parse_args()
    if options.inside:
        _inside(options.inside, options.way, options.back)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "m.safetensors"
        write(source, options.megabytes, options.tensors)
        promised = options.megabytes + 2 * options.megabytes / options.tensors
        for way in options.ways:
            for back in (False, True):
                path = Path(folder) / "shipped.lc3m" if back else source
                found = measured(path, way, back)
                print(
                    f"{way}, {'unship' if back else 'ship'}: peak "
                    f"{found['peak_bytes'] / MB:,.0f} MB of {promised:,.0f} promised, "
                    f"{found['seconds']:.1f} s, {found['nbytes']:,} bytes",
                    flush=True,
                )


if __name__ == "__main__":
    main()
