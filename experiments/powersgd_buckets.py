"""Does PyTorch's PowerSGD hook get through with several buckets on gloo.

    timeout 60 torchrun --nproc-per-node 2 -m experiments.powersgd_buckets

It waits for a collective from the callback of another one, which gloo cannot serve
(pytorch/pytorch#48478). So the comparisons here give it one bucket. Prints a line a
step; the first two are not compressed yet.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

STEPS = 60


def main() -> None:
    """Train a stack of layers whose gradients fill a dozen buckets."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    model = DistributedDataParallel(layers, bucket_cap_mb=0.3)
    state = powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    for step in range(STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        model(torch.randn(8, 256)).square().mean().backward()
        if dist.get_rank() == 0:
            print(f"step {step} of {STEPS}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
