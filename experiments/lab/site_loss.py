"""What a transformer in two sites ends with, sharded inside or not.

    torchrun --nproc-per-node 2 -m experiments.lab.site_loss --seed 0
    torchrun --nproc-per-node 4 -m experiments.lab.site_loss --seed 0

Both train on the same batches of a site: one rank on all of a batch, or two ranks with
FSDP2 inside on half of it each. The first rank prints the test loss.
"""

import argparse
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from experiments.models import Transformer
from lc3.hooks import local_sgd

SITES, CONTEXT, BATCH, SYNC_EVERY = 2, 64, 8, 8


def main() -> None:
    """Train as one rank of a job."""
    parser = argparse.ArgumentParser(
        prog="experiments.lab.site_loss", description=__doc__
    )
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3, help="of AdamW")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    inside = dist.get_world_size() // SITES
    site, place = divmod(dist.get_rank(), inside)
    names = ("between", "inside")
    mesh = init_device_mesh("cpu", (SITES, inside), mesh_dim_names=names)
    text = torch.tensor(list("".join(topics.values()).encode()), dtype=torch.uint8)
    trained = len(text) * 9 // 10
    torch.manual_seed(options.seed)
    model = Transformer(256, CONTEXT, width=64, depth=3, heads=4)
    if inside > 1:
        shard: Any = fully_shard
        shard(model, mesh=mesh["inside"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    state = local_sgd.attach(model, optimizer, mesh=mesh, sync_every=SYNC_EVERY)

    def loss_of(at: Tensor) -> Tensor:
        windows = text[at + torch.arange(CONTEXT + 1)].long()
        logits = model(windows[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, windows[:, 1:].flatten())

    for step in range(options.steps):
        generator = torch.Generator().manual_seed(100_000 * options.seed + 2 * step)
        shape = SITES, BATCH, 1
        at = torch.randint(trained - CONTEXT - 1, shape, generator=generator)[site]
        optimizer.zero_grad()
        loss_of(at.chunk(inside)[place]).backward()
        optimizer.step()
    state.sync()
    with torch.no_grad():
        tested = torch.arange(trained, len(text) - CONTEXT - 1, CONTEXT + 1)
        loss = float(loss_of(tested[:, None]))
    if dist.get_rank() == 0:
        print(
            f"{SITES} sites of {inside}, seed {options.seed}, {options.steps} steps: "
            f"test loss {loss:.4f}"
        )
    state.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
