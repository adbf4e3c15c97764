"""Step time and what of the exchange is exposed, every method beside the others.

    torchrun --nproc-per-node 2 -m experiments.bench.step
    sudo python -m experiments.lab.netlab --hosts 2 --rate 100mbit -- \
        -m experiments.bench.step --rate 100mbit
    sudo python -m experiments.lab.netlab --hosts 2 --rate 100mbit --delay 10ms -- \
        -m experiments.bench.step --rate 100mbit --delay 10ms

All methods are attached to models of their own and take turns, so that what else the
machine does meets all of them. PyTorch's no-op hook, which sends nothing, is the
yardstick: a method's step less its step is what that method exposes. ``bound_ms`` is
what no exchange of as many bytes and rounds can beat: the longer of that step and the
wire. ``cpu_ms`` is what a rank's threads computed, in all. Adds to ``step.csv``.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

from experiments.harness import models
from experiments.harness.methods import METHODS, wrapped
from experiments.harness.train import mean_over_ranks
from experiments.lab import ranks
from experiments.record import RESULTS, read_csv, stamped, write_csv
from lc3.transport.group import GroupTransport

NOOP = "no exchange"
RATES = {"10mbit": 1e7, "100mbit": 1e8, "1gbit": 1e9}  # bit/s
COMPARED = ("float32", "fp16", "PowerSGD rank 1", "3LC s=1.00", "auto")
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "CNN, 0.15 M": (models.small_cnn, (32, 1, 8, 8)),
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
        (32, 1, 8, 8),
    ),
    "VGG, 6.9 M": (models.vgg, (8, 3, 32, 32)),
    "VGG's, computed elsewhere": (lambda: models.Elsewhere(0.2), (8, 3, 32, 32)),
}
PLACE = ("model", "ranks", "rate", "delay")
STEPS, WARM_UP_TURNS = 5, 4  # auto has decided after twelve steps


class Contender:
    """One method with a model and an optimizer of its own."""

    def __init__(self, model_name: str, method: str) -> None:
        make, self._shape = MODELS[model_name]
        torch.manual_seed(0)
        module = make()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        self.traffic: Any = None
        if method == NOOP:
            model = wrapped(module)
            model.register_comm_hook(None, noop_hook)
            self.model: nn.Module = model
            self.optimizers: Any = [optimizer]
        else:
            training = METHODS[method](module, [optimizer])
            self.model, self.optimizers = training.model, training.optimizers
            self.traffic = training.traffic
        self.seconds: list[float] = []
        self.cpu_s = 0.0

    def turn(self, number: int) -> None:
        """Train some steps."""
        cpu_start = time.process_time()
        for step in range(STEPS):
            torch.manual_seed(1000 * number + 10 * step + dist.get_rank())
            inputs = torch.randn(self._shape)
            labels = torch.randint(10, self._shape[:1])
            start = time.perf_counter()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(inputs), labels).backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.seconds.append(time.perf_counter() - start)
        self.cpu_s += time.process_time() - cpu_start


def seconds_of_a_round() -> float:
    """Return what an exchange of next to nothing takes; collective."""
    transport = GroupTransport(
        dist.distributed_c10d._get_default_group(), torch.device("cpu")
    )
    nothing, seconds = torch.zeros(48, dtype=torch.uint8), []
    for _ in range(30):
        start = time.perf_counter()
        transport.all_gather(nothing)
        seconds.append(time.perf_counter() - start)
    return mean_over_ranks(median(seconds))[0]


def measure(
    model_name: str, rate: str, delay: str, turns: int
) -> list[dict[str, object]]:
    """Let all methods take turns; collective."""
    contenders = {m: Contender(model_name, m) for m in (NOOP, *COMPARED)}
    sent = dict.fromkeys(contenders, 0)
    for turn in range(WARM_UP_TURNS + turns):
        for method, contender in contenders.items():
            if turn == WARM_UP_TURNS:
                contender.seconds.clear()
                contender.cpu_s = 0.0
                if contender.traffic is not None:
                    sent[method] = contender.traffic.sent_bytes
            dist.barrier()
            contender.turn(turn)
    steps = {m: mean_over_ranks(median(c.seconds))[0] for m, c in contenders.items()}
    round_s = seconds_of_a_round()
    rows = []
    for method, contender in contenders.items():
        row: dict[str, object] = {
            "model": model_name,
            "rate": rate,
            "delay": delay,
            "ranks": dist.get_world_size(),
            "method": method,
            "step_ms": round(1e3 * steps[method], 3),
            "exposed_ms": round(1e3 * (steps[method] - steps[NOOP]), 3),
            "cpu_ms": round(
                1e3 * mean_over_ranks(contender.cpu_s / (turns * STEPS))[0], 3
            ),
            "to_float32": round(steps[method] / steps["float32"], 4),
            "sent_bytes": "",
            "rounds": "",
            "bound_ms": "",
        }
        if contender.traffic is not None:
            sent_bytes = (contender.traffic.sent_bytes - sent[method]) // (
                turns * STEPS
            )
            row["sent_bytes"] = sent_bytes
            meter = getattr(contender.traffic, "meter", None)
            if meter is not None:
                row["rounds"] = round(meter.rounds / meter.buckets, 3)
                if rate in RATES:
                    rounds = meter.rounds / meter.steps
                    wire_s = 8 * sent_bytes / RATES[rate] + rounds * round_s
                    row["bound_ms"] = round(1e3 * max(steps[NOOP], wire_s), 3)
            contender.traffic.close()
        rows.append(row)
    return rows


def table(path: Path) -> str:
    """Return step and exposed milliseconds by model, link and method, in Markdown."""
    rows = read_csv(path, ["model", "rate", "delay", "method", "step_ms", "exposed_ms"])
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [
        f"| model | ranks | link | {' | '.join(methods)} |",
        f"| --- | ---: | --- |{' ---: |' * len(methods)}",
    ]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells.setdefault(tuple(row[c] for c in PLACE), {})[row["method"]] = (
            f"{float(row['step_ms']):.1f} ({float(row['exposed_ms']):.1f})"
        )
    for (model, ranks_, rate, delay), of in cells.items():
        link = f"{rate}, {delay}" if delay else rate
        measured = " | ".join(of.get(method, "") for method in methods)
        lines.append(f"| {model} | {ranks_} | {link} | {measured} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every model, and add what was found to the file on rank 0."""
    parser = argparse.ArgumentParser(prog="experiments.bench.step")
    parser.add_argument("--rate", default="loopback", choices=["loopback", *RATES])
    parser.add_argument("--delay", default="", help="of the lab's links, to be noted")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--turns", type=int, default=20, help="of 5 steps each")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.csv")
    options = parser.parse_args()
    ranks.init()
    rows = [
        row
        for model in options.models
        for row in measure(model, options.rate, options.delay, options.turns)
    ]
    if dist.get_rank() == 0:
        before = read_csv(options.out) if options.out.exists() else []
        new = {tuple(str(row[c]) for c in PLACE) for row in rows}
        blank = dict.fromkeys(rows[0], "")
        kept = [{**blank, **row} for row in before]
        others = [row for row in kept if tuple(row[c] for c in PLACE) not in new]
        write_csv(options.out, [*others, *stamped(rows)])
        print(table(options.out))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
