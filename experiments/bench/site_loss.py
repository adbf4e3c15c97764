"""What a transformer in two sites ends with, sharded inside or not.

    python -m experiments.bench.site_loss --seeds 0 1 2 --out sites.csv

For each seed two ranks train, and then two sites of two ranks with FSDP2 inside, on the
same batches of a site: one rank on all of a batch, or each of two on half of it. The
learning rate falls to nothing, as the harness's does, so that the end depends less on
the last batches. A row says the test loss of the model that all share at the end.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from experiments.harness.models import Transformer
from experiments.harness.train import schedule
from experiments.record import RESULTS, read_csv, stamped, write_csv
from experiments.tables import grid, insert
from lc3.hooks import local_sgd

SITES, CONTEXT, BATCH, SYNC_EVERY = 2, 64, 8, 8


def train(seed: int, steps: int, rate: float, out: Path) -> None:
    """Train as one rank of a job; the first writes the loss."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    inside = dist.get_world_size() // SITES
    site, place = divmod(dist.get_rank(), inside)
    names = ("between", "inside")
    mesh = init_device_mesh("cpu", (SITES, inside), mesh_dim_names=names)
    text = torch.tensor(list("".join(topics.values()).encode()), dtype=torch.uint8)
    trained = len(text) * 9 // 10
    torch.manual_seed(seed)
    model = Transformer(256, CONTEXT, width=64, depth=3, heads=4)
    if inside > 1:
        shard: Any = fully_shard
        shard(model, mesh=mesh["inside"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    rates = schedule(optimizer, steps)
    state = local_sgd.attach(model, optimizer, mesh=mesh, sync_every=SYNC_EVERY)

    def loss_of(at: Tensor) -> Tensor:
        windows = text[at + torch.arange(CONTEXT + 1)].long()
        logits = model(windows[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, windows[:, 1:].flatten())

    for step in range(steps):
        generator = torch.Generator().manual_seed(100_000 * seed + 2 * step)
        shape = SITES, BATCH, 1
        at = torch.randint(trained - CONTEXT - 1, shape, generator=generator)[site]
        optimizer.zero_grad()
        loss_of(at.chunk(inside)[place]).backward()
        optimizer.step()
        rates.step()
    state.sync()
    with torch.no_grad():
        tested = torch.arange(trained, len(text) - CONTEXT - 1, CONTEXT + 1)
        loss = float(loss_of(tested[:, None]))
    if dist.get_rank() == 0:
        out.write_text(repr(loss))
    state.close()
    dist.destroy_process_group()


def measure(inside: int, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """Return a row: what sites of so many ranks end with."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "loss")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(SITES * inside), "-m"]
        command += ["experiments.bench.site_loss", "--train", str(out)]
        command += ["--seeds", str(seed), "--steps", str(steps), "--rate", str(rate)]
        subprocess.run(command, check=True, timeout=1800)
        loss = float(out.read_text())
    said = {"sites": SITES, "inside": inside, "seed": seed, "steps": steps}
    return {**said, "rate": rate, "test_loss": round(loss, 6)}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the losses of each seed side by side, as Markdown, and their mean."""
    losses = {(r["inside"], r["seed"]): float(r["test_loss"]) for r in rows}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    pairs = [(losses["1", seed], losses["2", seed]) for seed in seeds]
    pairs.append(
        (statistics.mean(p[0] for p in pairs), statistics.mean(p[1] for p in pairs))
    )
    titles = ["seed", "2 ranks", "2 sites of 2 shards", "beside it"]
    cells = [
        [name, f"{one:.4f}", f"{two:.4f}", f"{100 * (two / one - 1):+.2f} %"]
        for name, (one, two) in zip([*seeds, "mean"], pairs, strict=True)
    ]
    steps = rows[0]["steps"]
    return grid(titles, cells) + f"\n\nTest loss after {steps} steps.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every seed in both ways, write rows, print the table."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.site_loss", description=__doc__
    )
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--out", type=Path, default=RESULTS / "sites.csv")
    parser.add_argument("--docs", type=Path, help="a page with a block for the table")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train is not None:
        train(options.seeds[0], options.steps, options.rate, options.train)
        return
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for inside in (1, 2):
            rows += stamped([measure(inside, seed, options.steps, options.rate)])
        write_csv(options.out, rows)
    said = table(read_csv(options.out))
    print(said)
    if options.docs is not None:
        page = options.docs.read_text()
        options.docs.write_text(insert(page, "sites", said))


if __name__ == "__main__":
    main()
