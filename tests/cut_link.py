r"""Trains in a lab until rank 1 takes its own link down; each rank writes what it saw.

    python -m experiments.lab.netlab --hosts 2 --each -- \
        python -m tests.cut_link FOLDER HOOK

Each writes ``FOLDER/RANK.json``: the error, and the seconds from the cut to it.
"""

import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import lc3
from tests.checkpoint_cases import Run

TIMEOUT_S = 12.0


def main() -> None:
    """Train until the link is cut, then say so."""
    folder, hook = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["HOST"])
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{os.environ['HEAD']}:29511",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    cut = folder / "cut"
    run = Run(hook)
    error: BaseException | None = None
    try:
        for step in range(100_000):
            run.train(rank, range(step, step + 1))
            if rank == 1 and step == 20:
                subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
                cut.write_text(str(time.monotonic()))
    except lc3.Lc3Error as found:
        error = found
    seconds = time.monotonic() - float(cut.read_text())
    run.state.close()
    said = {
        "error": f"{type(error).__name__}: {error}",
        "seconds": seconds,
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("lc3")],
        "finite": all(bool(p.isfinite().all()) for p in run.net.parameters()),
    }
    (folder / f"{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
