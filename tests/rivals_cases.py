"""What the ranks of ``test_rivals`` do: train beside all ranks' shadows."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments import rivals
from tests.ddp_cases import hash_of

EVERY, EXCHANGES = 3, 4


def net_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    net(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()


def trains(rank: int, world: int, kind: str) -> tuple[float, bool, bool, bool]:
    """Return how far from the shadows; whether ranks, bytes, what is shared agree."""
    net = net_of(rank)  # rank 0's is everybody's
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    four = "E3M0" in kind
    outer: rivals.Outer
    if kind == "SparseLoCo":
        outer = rivals.SparseLoCo(net, [optimizer], EVERY, lr=0.7, decay=0.9)
    else:
        make = rivals.FourBits if four else rivals.DiLoCo
        outer = make(net, [optimizer], EVERY, 0.5, 0.9)

    shadows = [net_of(0) for _ in range(world)]
    theirs = [torch.optim.SGD(s.parameters(), lr=0.1) for s in shadows]
    base = [p.detach().clone() for p in shadows[0].parameters()]
    velocity = [torch.zeros_like(p) for p in base]
    owed = [[torch.zeros_like(p) for p in base] for _ in range(world)]
    payload = 0
    for exchange in range(EXCHANGES):
        for local in range(EVERY):
            number = 100 * (exchange * EVERY + local)
            step(net, optimizer, number + rank)
            for r in range(world):
                step(shadows[r], theirs[r], number + r)
        for at, old in enumerate(base):
            sent: list[Tensor] = []
            for r in range(world):
                moved = old - list(shadows[r].parameters())[at].detach()
                if kind == "SparseLoCo":
                    moved = 0.9 * owed[r][at] + moved
                    coded = rivals.sparse(moved)
                    decoded = rivals.of_sparse(coded, moved)
                    owed[r][at] = moved - decoded
                    payload += coded.numel() * (r == rank)
                    moved = decoded
                elif four:
                    coded = rivals.e3m0(moved)
                    payload += coded.numel() * (r == rank)
                    moved = rivals.of_e3m0(coded, moved)
                sent.append(moved)
            mean = sum(sent, torch.zeros_like(old)) / world
            if kind == "SparseLoCo":
                base[at] = old - 0.7 * mean
                continue
            velocity[at] = 0.9 * velocity[at] + mean
            base[at] = old - 0.5 * (mean + 0.9 * velocity[at])
        for shadow in shadows:
            for p, value in zip(shadow.parameters(), base, strict=True):
                p.data.copy_(value)
    apart = max(
        float((p.detach() - value).abs().max())
        for p, value in zip(net.parameters(), base, strict=True)
    )
    elements = sum(p.numel() for p in net.parameters())
    ring = EXCHANGES * (2 * (world - 1) * 4 * elements // world)
    expected = (world - 1) * payload if payload else ring
    digest = hash_of(net)
    step(net, optimizer, rank)
    with outer.shared_model():
        shared = hash_of(net) == digest
    shared = shared and hash_of(net) != digest
    outer.close()
    digests: list[str] = [""] * world
    dist.all_gather_object(digests, digest)
    return apart, len(set(digests)) == 1, outer.sent_bytes == expected, shared
