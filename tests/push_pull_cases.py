"""What the ranks of ``test_push_pull`` do: each function runs on every rank."""

import dataclasses
import gc
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lc3 import AttachError, Lc3Error
from lc3.config import Settings
from lc3.hooks import push_pull
from tests.ddp_cases import Case, Net, batch, flat, hash_of, local_gradients, loss_of
from tests.ddp_cases import make_net as net_of
from tests.oracle import Servers

CODED = Settings(min_numel=64, min_shard=500)
KINDS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, foreach=False),
}


class ServerOptimizer:
    """A torch optimizer for each piece of the oracle's masters."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.optimizers: dict[tuple[str, int], Any] = {}

    def step(self, name: str, piece: slice, master: Any, mean: Any) -> None:
        key = (name, piece.start)
        if key not in self.optimizers:
            parameter = nn.Parameter(torch.from_numpy(master))
            self.optimizers[key] = (parameter, KINDS[self.kind]([parameter]))
        parameter, optimizer = self.optimizers[key]
        if mean.any():
            parameter.grad = torch.from_numpy(mean.copy())
            optimizer.step()


def equals_the_servers(
    rank: int, world: int, kind: str, case: Case, steps: int
) -> dict[str, Any]:
    """Train; compare every parameter after every step with the oracle's replica."""
    model, shadow = net_of(case), net_of(case)
    wrapped = DistributedDataParallel(model, **dict(case.options))
    optimizer = push_pull.attach(wrapped, KINDS[kind], case.config)
    named = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    start = {name: flat(p, p.detach()).copy() for name, p in model.named_parameters()}
    servers = Servers(named, world, case.config, start)
    theirs = ServerOptimizer(kind)
    distance = 0.0
    for step in range(steps):
        batches = [batch(rank, step, part, case) for part in range(case.accumulate)]
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, local_gradients(shadow, model, batches))
        servers.exchange(everyone, theirs.step)
        for part, (x, y, use_spare) in enumerate(batches):
            if part == len(batches) - 1:
                loss_of(wrapped(x, use_spare), y).backward()
            else:
                with wrapped.no_sync():
                    loss_of(wrapped(x, use_spare), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            wanted = torch.from_numpy(servers.replica[name]).to(parameter.dtype).float()
            found = flat(parameter, parameter.detach())
            np.testing.assert_array_equal(found, wanted.numpy(), f"{step}: {name}")
        distance = max(
            float(np.abs(servers.masters[n] - servers.replica[n]).max(initial=0))
            for n, _ in named
        )
    masters = optimizer.export()
    for name, parameter in model.named_parameters():
        found = flat(masters[name], masters[name])
        assert masters[name].shape == parameter.shape
        np.testing.assert_array_equal(found, servers.masters[name])
    optimizer.close()
    return {
        "hash": hash_of(model),
        "distance": distance,
        "ratio": optimizer.meter.ratio,
    }


def small_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 4))


def train_step(model: nn.Module, rank: int, step: int, bad: bool = False) -> None:
    torch.manual_seed(1000 * step + rank)
    x = torch.randn(8, 30)
    loss = model(x).square().mean()
    (loss * (torch.inf if bad else 1.0)).backward()


def uncoded_is_ddp(rank: int, world: int, kind: str) -> float:
    """With coding off, push-pull is DDP with its optimizer; return the distance."""
    nets = [small_net(), small_net()]
    wrapped = [DistributedDataParallel(net) for net in nets]
    plain = KINDS[kind](nets[0].parameters())
    ours = push_pull.attach(wrapped[1], KINDS[kind], Settings(exclude=("*",)))
    for step in range(30):
        for model, optimizer in zip(wrapped, (plain, ours), strict=True):
            train_step(model, rank, step)
            optimizer.step()
            optimizer.zero_grad()
    ours.close()
    return max(
        float((a - b).detach().abs().max())
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    )


def groups_schedule_and_clipping(rank: int, world: int) -> float:
    """Groups with their own options, a scheduler and clipping equal DDP's, uncoded."""
    nets = [small_net(), small_net()]
    wrapped = [DistributedDataParallel(net) for net in nets]

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        named = list(net.named_parameters())
        return [
            {"params": [p for n, p in named if "weight" in n], "weight_decay": 0.1},
            {"params": [p for n, p in named if "bias" in n], "lr": 0.02},
        ]

    plain = KINDS["sgd"](groups(nets[0]))
    ours = push_pull.attach(
        wrapped[1],
        KINDS["sgd"],
        Settings(exclude=("*",)),
        params=groups(nets[1]),
        max_norm=0.1,
    )
    schedules = [torch.optim.lr_scheduler.StepLR(o, 5, 0.5) for o in (plain, ours)]
    norms = []
    for step in range(20):
        train_step(wrapped[0], rank, step)
        norms.append(float(nn.utils.clip_grad_norm_(nets[0].parameters(), 0.1)))
        plain.step()
        plain.zero_grad()
        train_step(wrapped[1], rank, step)
        ours.step()
        assert abs(ours.grad_norm - norms[-1]) < 1e-4 * norms[-1]
        for schedule in schedules:
            schedule.step()
    assert max(norms) > 0.1
    ours.close()
    return max(
        float((a - b).detach().abs().max())
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    )


def skips_alike(rank: int, world: int) -> tuple[str, int]:
    """A step that overflows on one rank never was."""
    hashes = []
    for bad_step in (None, 3):
        net = small_net()
        wrapped = DistributedDataParallel(net)
        ours = push_pull.attach(wrapped, KINDS["adamw"], CODED)
        for step in range(8):
            if step == 3 and bad_step is None:
                continue
            train_step(wrapped, rank, step, bad=step == bad_step and rank == 1)
            ours.step()
        hashes.append(hash_of(net))
        skipped = ours.skipped
        ours.close()
    assert hashes[0] == hashes[1]
    return hashes[0], skipped


def resumes(rank: int, world: int, folder: str, dtype: torch.dtype) -> bool:
    """Twelve steps, or five, a checkpoint, and seven more: the same bits.

    With a budget, which steers after the eighth.
    """
    config = dataclasses.replace(CODED, bytes_per_step=600)

    def fresh() -> tuple[nn.Module, DistributedDataParallel, push_pull.PushPull]:
        net = small_net().to(dtype)
        wrapped = DistributedDataParallel(net)
        return net, wrapped, push_pull.attach(wrapped, KINDS["adamw"], config)

    def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(1000 * step + rank)
            model(torch.randn(8, 30).to(dtype)).float().square().mean().backward()
            optimizer.step()
            for group in optimizer.param_groups:  # as a scheduler does
                group["lr"] *= 0.9

    path = Path(f"{folder}-{rank}")
    net, wrapped, optimizer = fresh()
    train(wrapped, optimizer, 0, 5)
    torch.save([net.state_dict(), optimizer.state_dict()], path)
    train(wrapped, optimizer, 5, 12)
    straight = hash_of(net)
    optimizer.close()
    net, wrapped, optimizer = fresh()
    saved = torch.load(path, weights_only=True)
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(wrapped, optimizer, 5, 12)
    optimizer.close()
    return hash_of(net) == straight


def memory_of_the_share(rank: int, world: int) -> float:
    """Return this rank's elements of optimizer state over the whole model's."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
    wrapped = DistributedDataParallel(net)
    optimizer = push_pull.attach(wrapped, KINDS["adamw"])
    wrapped(torch.randn(4, 300)).square().mean().backward()
    optimizer.step()
    held = sum(s["exp_avg"].numel() for s in optimizer.inner.state.values())
    optimizer.close()
    return float(held / sum(p.numel() for p in net.parameters()))


def looks_before_the_step(rank: int, world: int, looks: bool) -> str:
    """Return a hash after steps; with passes forward between backward and step."""
    torch.manual_seed(0)
    net = small_net()
    wrapped = DistributedDataParallel(net, bucket_cap_mb=0.001)
    optimizer = push_pull.attach(wrapped, KINDS["adamw"], CODED)
    for step in range(6):
        inputs = torch.randn(4, 30, generator=torch.Generator().manual_seed(step))
        wrapped(inputs + rank).square().mean().backward()
        if looks:  # DDP makes other buckets at the first of these
            wrapped(inputs)
            with wrapped.no_sync():
                wrapped(inputs)
        optimizer.step()
    optimizer.close()
    return hash_of(net)


def bytes_beside_the_buckets(rank: int, world: int) -> float:
    """Return bytes a parameter of lc3's and the optimizer's tensors after a step."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(16)))
    parameters = sum(p.numel() for p in net.parameters())
    before = _bytes_of_tensors()
    wrapped = DistributedDataParallel(net, bucket_cap_mb=0.1)
    optimizer = push_pull.attach(wrapped, KINDS["adamw"])
    for _ in range(3):
        wrapped(torch.randn(4, 512)).square().mean().backward()
        optimizer.step()
    held = _bytes_of_tensors() - before
    optimizer.close()
    return held / parameters


def _bytes_of_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules' attributes are deprecated
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.is_cpu]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def muon_on_whole_matrices(rank: int, world: int) -> str:
    net = small_net()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    wrapped = DistributedDataParallel(net)
    make = partial(torch.optim.Muon, lr=0.02)
    config = Settings(min_numel=64, min_shard=2**40)
    optimizer = push_pull.attach(wrapped, make, config)
    before = hash_of(net)
    for step in range(4):
        train_step(wrapped, rank, step)
        optimizer.step()
    optimizer.close()
    after = hash_of(net)
    assert after != before
    return after


def one_rank_is_plain_training(rank: int, world: int) -> bool:
    alone = [dist.new_group([r]) for r in range(world)][rank]
    nets = [small_net(), small_net()]
    plain = KINDS["adamw"](nets[0].parameters())
    wrapped = DistributedDataParallel(nets[1], process_group=alone)
    ours = push_pull.attach(wrapped, KINDS["adamw"])
    for step in range(5):
        train_step(nets[0], rank, step)
        plain.step()
        plain.zero_grad()
        train_step(wrapped, rank, step)
        ours.step()
    ours.close()
    return hash_of(nets[0]) == hash_of(nets[1])


def misuse(rank: int, world: int, what: str) -> str:
    net = small_net()
    wrapped = DistributedDataParallel(net.double() if what == "float64" else net)
    given: dict[str, Any] = {}
    if what == "params":
        given = {"params": list(net.parameters())[:-1]}
    if what == "max_norm":
        given = {"max_norm": 0.0}
    try:
        optimizer = push_pull.attach(wrapped, KINDS["sgd"], CODED, **given)
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    try:
        if what == "no backward":
            optimizer.step()
        for _ in range(2):
            train_step(wrapped, rank, 0)
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    finally:
        optimizer.close()
    return "nothing"


LIMIT = 0.02  # a fraction of every norm
__all__ = ["Net"]


def beside_ddp(rank: int, world: int, what: str) -> tuple[float, list[float]]:
    """Train with and without lc3; return how far apart, and ratios of norms."""
    nets, norms = [], []
    for attached in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        )
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        if attached:
            make = partial(torch.optim.SGD, lr=0.5)
            optimizer = push_pull.attach(model, make, Settings(exclude=("*",)))
        for step in range(6):
            torch.manual_seed(10 * step + rank)
            x = torch.randn(32, 64)
            optimizer.zero_grad()
            loss = (model(x) - x[:, :16]).square().mean()
            (4 * loss if what == "scale" else loss).backward()
            parameters = list(model.parameters())
            limit = 0.1 if what == "clip" else 1e9
            norms.append(float(nn.utils.clip_grad_norm_(parameters, limit)))
            if what == "scale":
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad /= 4
            if what == "frozen":
                parameters[0].grad = None
            if what == "thrown away" and step % 2:
                continue
            optimizer.step()
        nets.append([p.detach().clone() for p in model.parameters()])
        if isinstance(optimizer, push_pull.PushPull):
            optimizer.close()
    far = max(float((a - b).abs().max()) for a, b in zip(*nets, strict=True))
    half = len(norms) // 2
    return far, [norms[half] / norms[0], norms[-1] / norms[half - 1]]


def clipped_beside_ddp(
    rank: int, world: int, by_script: bool
) -> tuple[float, list[float]]:
    """Clip what is coded; return how far it moves over DDP's way, ratios of norms."""
    moved, norms = [], []
    for attached in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        before = torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()])
        model = DistributedDataParallel(net)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if attached:
            make = partial(torch.optim.SGD, lr=0.1)
            optimizer = push_pull.attach(
                model, make, max_norm=None if by_script else LIMIT
            )
        for step in range(40):
            torch.manual_seed(10 * step + rank)
            x = torch.randn(32, 64)
            optimizer.zero_grad()
            (model(x) - x.roll(1)).square().mean().backward()
            if by_script or not attached:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
            else:
                norms.append(cast(push_pull.PushPull, optimizer).grad_norm)
            optimizer.step()
        after = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        moved.append(float((after - before).norm()))
        if isinstance(optimizer, push_pull.PushPull):
            optimizer.close()
    half = len(norms) // 2
    ratios = [ours / ddp for ddp, ours in zip(norms[:half], norms[half:], strict=True)]
    return moved[1] / moved[0], ratios


def refusals_at_step(rank: int, world: int) -> tuple[str, str]:
    """Return what is said of a masked element, and of a new group."""
    model = DistributedDataParallel(nn.Linear(64, 64))
    optimizer = push_pull.attach(model, partial(torch.optim.SGD, lr=0.5))
    said = []
    try:
        model(torch.randn(8, 64)).square().mean().backward()
        assert model.module.weight.grad is not None
        model.module.weight.grad[0] = 0
        optimizer.step()
    except AttachError as error:
        said.append(str(error))
    try:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    except AttachError as error:
        said.append(str(error))
    optimizer.close()
    return said[0], said[1]
