"""What the ranks of ``test_gpu`` do."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lc3.codec import codec_for
from lc3.config import Settings
from lc3.hooks import ddp, local_sgd, push_pull
from lc3.wire.coder import Coder
from tests.ddp_cases import CONFIG, hash_of

CALLS = 10


def device_of(rank: int, kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def trains(rank: int, world: int, hook: str, kind: str) -> list[float]:
    """Return some losses of a short training."""
    device = device_of(rank, kind)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10)).to(device)
    model: Any = net
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if hook == "local_sgd":
        state: Any = local_sgd.attach(net, optimizer, sync_every=4, overlap=1)
    else:
        model = DistributedDataParallel(net)
        if hook == "ddp":
            state = ddp.attach(model, config=CONFIG)
        else:
            optimizer = push_pull.attach(
                model, partial(torch.optim.SGD, lr=0.1, momentum=0.9), Settings()
            )
            state = optimizer
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for step in range(32):
        y = torch.randint(10, (32,), generator=generator)
        x = torch.randn(32, 64, generator=generator) + 2 * nn.functional.one_hot(y, 64)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        if step % 8 == 7:
            losses.append(loss.item())
    state.check_replicas() if hook != "local_sgd" else state.sync()
    state.close()
    return losses


def state_on_the_host(rank: int, world: int) -> tuple[bool, float]:
    """Return whether bits are the same, and bytes a parameter left on the GPU."""
    device = device_of(rank, "cuda")
    ends = []
    for where in (None, "cpu"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
        net.to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        before = torch.cuda.memory_allocated(device)
        given: Any = {"sync_every": 4, "overlap": 1, "state_device": where}
        state = local_sgd.attach(net, optimizer, **given)
        numel = sum(p.numel() for p in net.parameters())
        added = (torch.cuda.memory_allocated(device) - before) / numel
        generator = torch.Generator().manual_seed(rank)
        for _ in range(16):
            x = torch.randn(16, 256, generator=generator).to(device)
            optimizer.zero_grad()
            (net(x) - x).square().mean().backward()
            optimizer.step()
        state.sync()
        state.close()
        ends.append([p.detach().clone() for p in net.parameters()])
    return all(map(torch.equal, *ends)), added


def over_nccl(rank: int, world: int, own: bool) -> str:
    """Train a model whose group is NCCL; return a hash of it."""
    device = device_of(rank, "cuda")
    torch.cuda.set_device(device)
    nccl = dist.new_group(list(range(world)), backend="nccl")
    second = dist.new_group(list(range(world)), backend="nccl") if own else None
    torch.manual_seed(3)
    model = DistributedDataParallel(
        nn.Linear(200, 200).to(device), device_ids=[device], process_group=nccl
    )
    state = ddp.attach(model, config=CONFIG, group=second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(10):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, 200, device=device)).square().mean().backward()
        optimizer.step()
    state.check_replicas()
    state.close()
    return hash_of(model.module)


def encode_and_add() -> None:
    """Code a bucket of twenty pieces some times."""
    device = torch.device("cuda")
    coder = Coder(codec_for(device), device=device)
    bucket, owed = (
        torch.randn(200_000, device=device) ** 3,
        torch.zeros(200_000).to(device),
    )
    values, residuals = torch.split(bucket, 10_000), torch.split(owed, 10_000)
    sums = torch.split(torch.zeros_like(bucket), 10_000)
    for _ in range(CALLS):
        frames = coder.encode(values, list(residuals), 1.0, None)
        both = zip(sums, frames, strict=True)
        coder.add([(acc, [frame]) for acc, (frame, _) in both])
