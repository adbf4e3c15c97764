"""Train the same network with and without 3LC on ranks of this machine."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from experiments.harness.train import add_run_options, at_least
from experiments.record import RESULTS, read_csv
from experiments.tables import plot, print_table


def main() -> int:
    """Run the comparison under torchrun, then print its table and draw its plot.

    Returns:
        The exit status: torchrun's.
    """
    parser = argparse.ArgumentParser(
        prog="experiments.harness.demo", description=__doc__
    )
    add_run_options(parser)
    parser.add_argument("--ranks", type=at_least(2), default=2)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "local", help="folder for CSV and PNG"
    )
    options = parser.parse_args()
    console = Console()
    path = options.out / f"{options.task}.csv"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(options.ranks), "-m", "experiments.harness.train"),
        *("--task", options.task, "--methods", *options.methods),
        *("--steps", str(options.steps), "--seeds", str(options.seeds)),
        *("--first-seed", str(options.first_seed), "--device", options.device),
        *("--warm-up", str(options.warm_up)),
        *("--out", str(path)),
        *(("--data-dir", str(options.data_dir)) if options.data_dir else ()),
        *(
            ("--evaluate-every", str(options.evaluate_every))
            if options.evaluate_every
            else ()
        ),
        *(("--averaged",) if options.averaged else ()),
    ]
    threads = max(1, (os.cpu_count() or 1) // options.ranks)
    console.print(
        f"Training {options.task} with {len(options.methods)} methods and "
        f"{options.seeds} seeds on {options.ranks} ranks of this machine"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        console.print(f"training failed with exit status {status}; see above")
        return status
    rows = read_csv(path)
    print_table(rows, console)
    plot(rows, path.with_suffix(".png"))
    console.print(f"Written: {path} and {path.with_suffix('.png')}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
