"""The gradient norm that nanoGPT logs with lc3, beside plain DDP's, every tenth step.

    torchrun --nproc-per-node 2 -m experiments.scripts.norms ddp --text TEXT

Plain DDP gets the same weights and the same batches: two trainings of their own are
soon at other weights, where norms differ for that reason.
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lc3.hooks.ddp
from experiments.scripts.gpt import Text
from experiments.scripts.nanogpt import BATCH, LENGTH, made, rate_at
from experiments.scripts.report import options


def main() -> None:
    """Train, and print the norms and the largest gap."""
    given = options(steps=300)
    dist.init_process_group("gloo")
    text = Text(given.text, LENGTH)
    torch.manual_seed(given.seed)
    raw_model, optimizer = made(text.symbols)
    plain = DistributedDataParallel(copy.deepcopy(raw_model))
    model = DistributedDataParallel(raw_model)
    state = lc3.hooks.ddp.attach(model, optimizer)
    generator = torch.Generator().manual_seed(1000 * given.seed + dist.get_rank())
    gaps = []
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        batch = text.batch(text.train, BATCH, generator)
        model(*batch).backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if step % 10 == 0:
            plain.module.load_state_dict(raw_model.state_dict())
            plain(*batch).backward()
            expected = float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
            plain.zero_grad()
            gaps.append(norm / expected - 1)
            if dist.get_rank() == 0:
                print(f"step {step}: {norm:.4f}, plain DDP {expected:.4f}", flush=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if dist.get_rank() == 0:
        print(f"largest gap {max(map(abs, gaps)):.1%} of {len(gaps)} steps", flush=True)
    state.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
