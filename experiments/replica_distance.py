"""How far replicas are from the masters, step after step; ranks are compared each time.

    torchrun --nproc-per-node 4 -m experiments.replica_distance

Writes ``replica-distance.csv`` and its plot: |master − replica| / |master| over all
parameters, for push-pull after every step, for local steps after every exchange.
"""

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from torch import nn

from experiments.methods import local_state, push_pull_optimizer
from experiments.record import RESULTS, read_csv, stamped, write_csv
from experiments.tasks import TASKS
from experiments.train import batches, schedule, train_step
from launch import ranks
from lc3.config import Settings

FORMS = ("push-pull s=1.00", "push-pull s=1.75", "local H=8", "local H=16")


def measure(form: str, steps: int) -> list[dict[str, object]]:
    """Train once; collective.

    Raises:
        ReplicasDiffer: ranks do, after some exchange.
    """
    task = TASKS["digits"](None)
    torch.manual_seed(0)
    module = task.make_model()
    optimizers = task.make_optimizers(module)
    kind, _, value = form.partition("=")
    model: nn.Module = module
    state: Any
    if kind.startswith("push-pull"):
        config = Settings(sparsity=float(value))
        model, optimizer = push_pull_optimizer(module, optimizers, config)
        state, every, optimizers = optimizer, 1, [optimizer]
    else:
        every = int(value)
        state = local_state(module, optimizers, every, Settings(density=0.1))
    rates = [schedule(optimizer, steps) for optimizer in optimizers]
    rows: list[dict[str, object]] = []
    data = itertools.islice(batches(task, 0, steps), steps)
    for step, batch in enumerate(data, start=1):
        train_step(model, optimizers, batch)
        for rate in rates:
            rate.step()
        if step % every:
            continue
        state.check_replicas()
        masters = state.owners.export()
        apart = sum(
            float((master - state.owners.replica[name]).double().square().sum())
            for name, master in masters.items()
        )
        whole = sum(float(m.double().square().sum()) for m in masters.values())
        rows.append(
            {
                "form": form,
                "ranks": dist.get_world_size(),
                "steps": steps,
                "step": step,
                "distance": round((apart / whole) ** 0.5, 8),
            }
        )
    state.close()
    return rows


def table(path: Path) -> str:
    """Return the largest and last distance of every form, a Markdown table."""
    rows = read_csv(path, ["form", "step", "distance"])
    lines = [
        "| form | exchanges | largest distance | at step | at the end |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for form in dict.fromkeys(row["form"] for row in rows):
        mine = [row for row in rows if row["form"] == form]
        most = max(mine, key=lambda row: float(row["distance"]))
        lines.append(
            f"| {form} | {len(mine):,} | {float(most['distance']):.2%} | "
            f"{most['step']} | {float(mine[-1]['distance']):.3%} |"
        )
    return "\n".join(lines)


def plot(path: Path, picture: Path) -> None:
    """Draw distance against steps."""
    rows = read_csv(path, ["form", "step", "distance"])
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for form in dict.fromkeys(row["form"] for row in rows):
        mine = [row for row in rows if row["form"] == form]
        steps = [int(row["step"]) for row in mine]
        axes.plot(steps, [100 * float(row["distance"]) for row in mine], label=form)
    axes.set(xlabel="step", ylabel="|master − replica| / |master|, %", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Measure all forms, and write what was found on rank 0."""
    parser = argparse.ArgumentParser(prog="experiments.replica_distance")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "replica-distance.csv")
    options = parser.parse_args()
    ranks.init()
    rows = [row for form in FORMS for row in measure(form, options.steps)]
    if dist.get_rank() == 0:
        write_csv(options.out, stamped(rows))
        plot(options.out, options.out.with_suffix(".png"))
        print(table(options.out))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
