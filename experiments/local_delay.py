"""What of a slow link is left to see when local steps go on during an exchange.

    sudo python -m launch.netlab --hosts 2 --rate 1mbit -- -m experiments.local_delay

Trains the character transformer, or any task, by local steps, H = 8, with one delay
after the other, and writes ``local-delay.csv``: for each the seconds training stood
still (``meter.seconds["wait"]``) over those it computed. ``--rate`` is only noted.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from experiments.methods import local_state
from experiments.record import RESULTS, read_csv, stamped, write_csv
from experiments.tasks import TASKS
from experiments.train import batches, mean_over_ranks, schedule, train_step
from launch import ranks
from lc3.config import Settings
from lc3.hooks import local_sgd

EVERY = 8
WARM_UP = 2 * EVERY


def measure(
    task_name: str, data_dir: Path | None, delay: int, steps: int, rate: str
) -> dict[str, object]:
    """Train for some steps after a warm-up; collective."""
    task = TASKS[task_name](data_dir)
    torch.manual_seed(0)
    module = task.make_model()
    optimizers = task.make_optimizers(module)
    config = Settings(density=0.1)
    state = local_state(module, optimizers, EVERY, config, overlap=delay)
    rates = [schedule(optimizer, WARM_UP + steps) for optimizer in optimizers]
    wait = exchange = start = 0.0
    data = batches(task, 0, WARM_UP + steps)
    for step, batch in enumerate(itertools.islice(data, WARM_UP + steps)):
        if step == WARM_UP:
            wait, exchange = state.meter.seconds["wait"], _under_way(state)
            start = time.perf_counter()
        train_step(module, optimizers, batch)
        for schedule_ in rates:
            schedule_.step()
    seconds = time.perf_counter() - start
    wait = state.meter.seconds["wait"] - wait
    exchange = _under_way(state) - exchange
    state.sync()
    state.check_replicas()
    state.close()
    seconds, wait, exchange = mean_over_ranks(seconds, wait, exchange)
    return {
        "task": task_name,
        "rate": rate,
        "ranks": dist.get_world_size(),
        "every": EVERY,
        "delay": delay,
        "steps": steps,
        "compute_ms": round(1e3 * (seconds - wait) / steps, 3),
        "exchange_ms": round(1e3 * exchange / steps * EVERY, 3),
        "wait_ms": round(1e3 * wait / steps, 3),
        "exposed": round(wait / (seconds - wait), 5),
    }


def _under_way(state: local_sgd.State) -> float:
    """Return the seconds that exchanges took on the lane."""
    seconds = state.meter.seconds
    return float(sum(seconds[stage] for stage in ("encode", "exchange", "decode")))


def table(path: Path) -> str:
    """Return what stood still, a Markdown table."""
    rows = read_csv(path, ["rate", "delay", "exposed"])
    lines = [
        "| link | delay, steps | a step's compute | an exchange | waited in a step | "
        "of compute |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['rate']} | {row['delay']} | {float(row['compute_ms']):.1f} ms | "
        f"{float(row['exchange_ms']):.0f} ms | {float(row['wait_ms']):.2f} ms | "
        f"{float(row['exposed']):.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure all delays and add what was found to the file on rank 0."""
    parser = argparse.ArgumentParser(prog="experiments.local_delay")
    parser.add_argument("--task", default="chars")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 2, 4, 7])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rate", default="unlimited")
    parser.add_argument("--out", type=Path, default=RESULTS / "local-delay.csv")
    options = parser.parse_args()
    ranks.init()
    rows = [
        measure(options.task, options.data_dir, delay, options.steps, options.rate)
        for delay in options.delays
    ]
    if dist.get_rank() == 0:
        before = read_csv(options.out) if options.out.exists() else []
        others = [row for row in before if row["rate"] != options.rate]
        write_csv(options.out, [*others, *stamped(rows)])
        print(table(options.out))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
