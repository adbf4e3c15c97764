"""Digits with FSDP2 inside of two sites, and 3LC between them.

torchrun --nproc-per-node 4 -m experiments.examples.with_fsdp2
"""

import os
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from experiments.examples.digits import accuracy, datasets
from experiments.harness.models import small_cnn
from lc3.hooks import fsdp2


def main() -> None:
    """Train, and print the accuracy."""
    per_site = int(os.environ["WORLD_SIZE"]) // 2
    mesh = init_device_mesh("cpu", (2, per_site), mesh_dim_names=("between", "in"))
    torch.manual_seed(0)
    net = small_cnn()
    for layer in net.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mesh=mesh["in"])
    model: FSDPModule = fully_shard(net, mesh=mesh["in"])
    state = fsdp2.attach(net, mesh)

    train, test = datasets()
    sampler: DistributedSampler[object] = DistributedSampler(train)
    loader = DataLoader(train, batch_size=16, sampler=sampler)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(12):
        sampler.set_epoch(epoch)
        for images, labels in islice(loader, len(loader) - 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()

    found = accuracy(net, test)  # all ranks: a forward pass gathers the shards
    if dist.get_rank() == 0:
        print(f"accuracy {found:.4f}, {state.meter.ratio:.0f} times fewer bytes")
    model.reshard()
    state.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
