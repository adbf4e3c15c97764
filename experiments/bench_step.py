"""Step time and what of the exchange is exposed, every method beside the others.

    torchrun --nproc-per-node 2 -m experiments.bench_step
    sudo python -m launch.netlab --hosts 2 --rate 100mbit -- \
        -m experiments.bench_step --rate 100mbit

All methods are attached to models of their own and take turns, so that what else the
machine does meets all of them. PyTorch's no-op hook, which sends nothing, is the
yardstick: a method's step less its step is what that method exposes. Adds to
``step.csv``; ``--rate`` is only noted.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from experiments import models
from experiments.methods import METHODS
from experiments.record import RESULTS, read_csv, stamped, write_csv
from experiments.train import mean_over_ranks
from launch import ranks

NOOP = "no exchange"
COMPARED = ("float32", "fp16", "PowerSGD rank 1", "3LC s=1.00", "auto")
MODELS = {
    "CNN, 0.15 M": (models.small_cnn, (1, 8, 8)),
    "MLP, 2.1 M": (
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 1000),
            nn.ReLU(),
            nn.Linear(1000, 1000),
            nn.ReLU(),
            nn.Linear(1000, 1000),
            nn.ReLU(),
            nn.Linear(1000, 10),
        ),
        (1, 8, 8),
    ),
}
TURNS, STEPS, WARM_UP_TURNS = 20, 5, 4  # auto has decided after twelve steps


class Contender:
    """One method with a model and an optimizer of its own."""

    def __init__(self, model_name: str, method: str) -> None:
        make, self.shape = MODELS[model_name]
        torch.manual_seed(0)
        module = make()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        self.close: Any = lambda: None
        if method == NOOP:
            self.model: nn.Module = DistributedDataParallel(module)
            self.model.register_comm_hook(None, noop_hook)
            self.optimizers: Any = [optimizer]
        else:
            training = METHODS[method](module, [optimizer])
            self.model, self.optimizers = training.model, training.optimizers
            self.close = training.traffic.close
        self.seconds: list[float] = []

    def turn(self, number: int) -> None:
        """Train some steps."""
        for step in range(STEPS):
            torch.manual_seed(1000 * number + 10 * step + dist.get_rank())
            inputs = torch.randn(32, *self.shape)
            labels = torch.randint(10, (32,))
            start = time.perf_counter()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(inputs), labels).backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.seconds.append(time.perf_counter() - start)


def measure(model_name: str, rate: str) -> list[dict[str, object]]:
    """Let all methods take turns; collective."""
    methods = (NOOP, *COMPARED)
    contenders = {method: Contender(model_name, method) for method in methods}
    for turn in range(WARM_UP_TURNS + TURNS):
        for contender in contenders.values():
            if turn == WARM_UP_TURNS:
                contender.seconds.clear()
            dist.barrier()
            contender.turn(turn)
    steps = {}
    for method, contender in contenders.items():
        (steps[method],) = mean_over_ranks(median(contender.seconds))
        contender.close()
    return [
        {
            "model": model_name,
            "rate": rate,
            "ranks": dist.get_world_size(),
            "method": method,
            "step_ms": round(1e3 * seconds, 3),
            "exposed_ms": round(1e3 * (seconds - steps[NOOP]), 3),
            "to_float32": round(seconds / steps["float32"], 4),
        }
        for method, seconds in steps.items()
    ]


def table(path: Path) -> str:
    """Return step and exposed milliseconds by model, link and method, in Markdown."""
    rows = read_csv(path, ["model", "rate", "method", "step_ms", "exposed_ms"])
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [
        f"| model | ranks | link | {' | '.join(methods)} |",
        f"| --- | ---: | --- |{' ---: |' * len(methods)}",
    ]
    for model, ranks_, rate in dict.fromkeys(
        (row["model"], row["ranks"], row["rate"]) for row in rows
    ):
        cells = [
            f"{float(row['step_ms']):.1f} ({float(row['exposed_ms']):.1f})"
            for method in methods
            for row in rows
            if (row["model"], row["ranks"], row["rate"], row["method"])
            == (model, ranks_, rate, method)
        ]
        lines.append(f"| {model} | {ranks_} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure both models, and add what was found to the file on rank 0."""
    parser = argparse.ArgumentParser(prog="experiments.bench_step")
    parser.add_argument("--rate", default="loopback")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.csv")
    options = parser.parse_args()
    ranks.init()
    rows = [row for model in MODELS for row in measure(model, options.rate)]
    if dist.get_rank() == 0:
        before = read_csv(options.out) if options.out.exists() else []
        key = (options.rate, str(dist.get_world_size()))
        others = [row for row in before if (row["rate"], row["ranks"]) != key]
        write_csv(options.out, [*others, *stamped(rows)])
        print(table(options.out))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
