"""How near to a budget a training stays, and how many rounds its buckets take.

    torchrun --nproc-per-node 2 -m experiments.budget

A thousand steps of the demo's network on the digits for each budget, and without one.
Writes ``budget.csv``.
"""

import argparse
import os
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from experiments.examples.digits import accuracy, datasets
from experiments.models import small_cnn
from experiments.record import RESULTS, Row, stamped, write_csv
from experiments.train import mean_over_ranks
from launch import ranks
from lc3.config import Settings
from lc3.hooks import ddp

STEPS = 1000
BUDGETS = (None, 4500, 5000, 6000)


def train(budget: int | None) -> Row:
    """Train once; return what was sent. Collective."""
    torch.manual_seed(0)
    net = small_cnn()
    model = DistributedDataParallel(net, bucket_cap_mb=0.3)
    state = ddp.attach(model, config=Settings(bytes_per_step=budget))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9)
    data, test = datasets()
    images, labels = data.tensors
    chance = torch.Generator().manual_seed(dist.get_rank())
    seen = [(0, 0)]
    for _ in range(STEPS):
        some = torch.randint(len(images), (32,), generator=chance)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[some]), labels[some]).backward()
        optimizer.step()
        seen.append((state.meter.rounds, state.meter.buckets))
    within = [r - q <= 2 * (b - a) for (q, a), (r, b) in pairwise(seen)]
    (sent,) = mean_over_ranks(state.meter.sent_bytes / STEPS)
    row: Row = {
        "budget": budget or "",
        "sent_bytes": round(sent, 1),
        "buckets": state.meter.buckets,
        "rounds": state.meter.rounds,
        "steps_of_2_rounds": sum(within) / STEPS,
        "residual_ratio": round(state.meter.residual_ratio, 3),
        "accuracy": round(accuracy(net, test), 4),
    }
    state.close()
    return row


def main() -> None:
    """Train with every budget, and write what was found on rank 0."""
    parser = argparse.ArgumentParser(prog="experiments.budget")
    parser.add_argument("--out", type=Path, default=RESULTS / "budget.csv")
    options = parser.parse_args()
    ranks.init()
    rows = [train(budget) for budget in BUDGETS]
    if dist.get_rank() == 0:
        write_csv(options.out, stamped(rows))
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
