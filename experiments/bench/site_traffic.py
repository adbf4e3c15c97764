"""What passes between sites and inside of them, counted at the interfaces of a lab.

    sudo python -m experiments.bench.site_traffic

trains a transformer in two sites behind links of 10 Mbit/s: one rank in each, two ranks
with FSDP2 or DDP inside, with one fragment and with four, and FSDP2 and DDP alone. It
prints a line for each: bytes that left a site in all and at most within a second, and
what its hosts sent each other inside.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from experiments.harness.models import Transformer
from lc3.hooks import local_sgd

SYNC_EVERY, ROUNDS, CONTEXT = 32, 2, 32
LEAST_S = 0.25  # that a step takes, so that fragments are more than a second apart
PLAIN = "one rank"
CASES = (
    (PLAIN, 1),
    (PLAIN, 4),
    ("fsdp2", 0),
    ("fsdp2", 1),
    ("fsdp2", 4),
    ("ddp", 0),
    ("ddp", 1),
    ("ddp", 4),
)


def made(inside: str, mesh: DeviceMesh) -> nn.Module:
    """Return the transformer as a site holds it."""
    torch.manual_seed(0)
    model = Transformer(256, CONTEXT, width=256, depth=4, heads=4)
    if inside == "ddp":
        return DistributedDataParallel(model, process_group=mesh.get_group("inside"))
    if inside == "fsdp2":
        shard: Any = fully_shard
        shard(model, mesh=mesh["inside"])
    return model


def train(inside: str, fragments: int) -> None:
    """Train as one rank of a job; 0 fragments: nothing passes between sites."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    ranks = 1 if inside == PLAIN else 2
    mesh = init_device_mesh(
        "cpu", (world // ranks, ranks), mesh_dim_names=("between", "inside")
    )
    model = made(inside, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = None
    if fragments:
        state = local_sgd.attach(
            model, optimizer, mesh=mesh, sync_every=SYNC_EVERY, fragments=fragments
        )
    text = torch.tensor(list("".join(topics.values()).encode()), dtype=torch.uint8)
    for step in range(ROUNDS * SYNC_EVERY):
        start = time.monotonic()
        torch.manual_seed(1000 * step + dist.get_rank())
        at = torch.randint(len(text) - CONTEXT - 1, (2, 1))
        windows = text[at + torch.arange(CONTEXT + 1)].long()
        logits = model(windows[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(max(0.0, LEAST_S - (time.monotonic() - start)))
    if dist.get_rank() == 0:
        sent = 0 if state is None else state.meter.sent_bytes
        print(f"rank 0 says it sent {sent:,} bytes to other sites", file=sys.stderr)
    if state is not None:
        state.close()
    dist.barrier()
    dist.destroy_process_group()


def measure(inside: str, fragments: int, rate: str) -> dict[str, Any]:
    """Return the lab's report of a job."""
    ranks = "1" if inside == PLAIN else "2"
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        lab = [sys.executable, "-m", "experiments.lab.netlab", "--sites", "2"]
        lab += ["--ranks", ranks, "--rate", rate, "--report", str(report), "--"]
        job = ["-m", "experiments.bench.site_traffic", "--train", inside]
        subprocess.run([*lab, *job, "--fragments", str(fragments)], check=True)
        found: dict[str, Any] = json.loads(report.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.site_traffic", description=__doc__
    )
    parser.add_argument("--rate", default="10mbit", help="of each link between sites")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--fragments", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train:
        train(options.train, options.fragments)
        return
    print("| inside | fragments | left a site | most in a second | inside |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for number in options.cases:
        inside, fragments = CASES[number]
        found = measure(inside, fragments, options.rate)
        site, hosts = found["between"][0], found["hosts"]
        hosts = hosts[: len(hosts) // 2]
        within = sum(host["sent_bytes"] for host in hosts) - site["sent_bytes"]
        said = "none" if inside == PLAIN else f"{within:,}"
        print(
            f"| {inside} | {fragments or 'no lc3'} | {site['sent_bytes']:,} "
            f"| {site['most_in_a_second']:,} | {said} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
