"""What the ranks of ``test_local_sgd`` do: each function runs on every rank."""

import dataclasses
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lc3 import Lc3Error
from lc3.config import Config, Settings
from lc3.hooks import local_sgd
from tests.ddp_cases import flat, hash_of
from tests.oracle import Servers

CODED = Settings(density=0.1, min_numel=64, min_shard=500)
NEUTRAL: dict[str, Any] = {
    "outer_lr": 1.0,
    "residual_decay": 1.0,
    "inner_momentum_scale": 1.0,
}
PLAIN = Settings(exclude=("*",))


class Net(nn.Module):
    """Convolutions, a batch norm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(
            self.head(torch.relu(self.norm(self.conv(x))).flatten(1))
        )


def make_net(seed: int, channels_last: bool = False) -> Net:
    torch.manual_seed(seed)
    net = Net()
    if channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def make_optimizer(net: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.01)
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def train_step(
    net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int
) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(4, 3, 6, 6, generator=generator)
    y = torch.randint(10, (4,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()


def take_off(_name: str, _piece: slice, master: Any, mean: Any) -> None:
    master -= mean


def forget(servers: Servers, decay: np.float32) -> None:
    """Multiply what was not sent yet, on both sides."""
    for residuals in servers.sent:
        for residual in residuals.values():
            residual *= decay
    for name, master in servers.masters.items():
        ahead = master - servers.replica[name]
        master[:] = servers.replica[name] + decay * ahead


def halve_first_moments(
    optimizer: torch.optim.Optimizer, some: Sequence[Tensor]
) -> None:
    for state in [optimizer.state[parameter] for parameter in some]:
        for moment in ("exp_avg", "momentum_buffer"):
            if moment in state:
                state[moment] /= 2


def equals_the_servers(
    rank: int,
    world: int,
    every: int,
    delay: int,
    kind: str,
    channels_last: bool,
    decay: float = 1.0,
    halves: bool = False,
    groups: Sequence[Sequence[str]] = (("conv", "norm", "head"),),
    alpha: float | None = None,
    state_device: Any = None,
) -> dict[str, Any]:
    """Train; in each process also all ranks' shadows; compare after every step."""
    net = make_net(rank, channels_last)  # attach makes all ranks start like rank 0
    optimizer = make_optimizer(net, kind)
    # With owners on three ranks, without them on two.
    config = dataclasses.replace(CODED, topology="direct") if world == 2 else CODED
    state = local_sgd.attach(
        net,
        optimizer,
        config,
        sync_every=every,
        overlap=delay,
        outer_lr=1,
        residual_decay=decay,
        inner_momentum_scale=0.5 if halves else 1.0,
        fragments=len(groups),
        alpha=alpha,
        state_device=state_device,
    )
    shadows = [make_net(0, channels_last) for _ in range(world)]
    theirs = [make_optimizer(shadow, kind) for shadow in shadows]
    names = [name for name, _ in net.named_parameters()]

    def values(shadow: nn.Module) -> dict[str, Any]:
        return {n: flat(p, p.detach()).copy() for n, p in shadow.named_parameters()}

    shapes = [(name, tuple(p.shape)) for name, p in net.named_parameters()]
    of_groups = []
    for group in groups:
        some = [(n, shape) for n, shape in shapes if n.partition(".")[0] in group]
        start = values(shadows[0])
        mine_only = {name: start[name] for name, _ in some}
        of_groups.append(Servers(some, world, config, mine_only))
    seen: dict[int, tuple[int, list[dict[str, Any]]]] = {}

    def write(shadow: nn.Module, wanted: dict[str, Any]) -> None:
        for name, parameter in shadow.named_parameters():
            if name in wanted:
                target = parameter.data.as_strided((parameter.numel(),), (1,))
                target.copy_(torch.from_numpy(wanted[name]))

    def halve(servers: Servers) -> None:
        for shadow, one in zip(shadows, theirs, strict=True):
            of_group = [p for n, p in shadow.named_parameters() if n in servers.masters]
            if halves:
                halve_first_moments(one, of_group)

    for step in range(4 * every + delay + 1):
        train_step(net, optimizer, rank, step)
        for other, shadow in enumerate(shadows):
            train_step(shadow, theirs[other], other, step)
        done = step + 1
        for number, servers in enumerate(of_groups):
            if seen.get(number, (0,))[0] == done:
                _, olds = seen.pop(number)
                for shadow, old in zip(shadows, olds, strict=True):
                    now, new = values(shadow), servers.replica
                    if alpha is None:
                        moved = {n: now[n] + (new[n] - old[n]) for n in new}
                    else:
                        rest = np.float32(1 - alpha)
                        moved = {n: now[n] + (new[n] - now[n]) * rest for n in new}
                    write(shadow, moved)
                halve(servers)
        for number, servers in enumerate(of_groups):
            if done % every != (number + 1) * every // len(groups) % every:
                continue
            now_all = [values(shadow) for shadow in shadows]
            servers.exchange(
                [
                    {n: v - now[n] for n, v in servers.replica.items()}
                    for now in now_all
                ],
                take_off,
            )
            if decay < 1:
                forget(servers, np.float32(decay))
            if delay:
                seen[number] = done + delay, now_all
                continue
            for shadow in shadows:
                write(shadow, servers.replica)
            halve(servers)
            for buffers in zip(*(s.buffers() for s in shadows), strict=True):
                if buffers[0].is_floating_point():
                    mean = torch.stack(buffers).mean(0)
                    for buffer in buffers:
                        buffer.copy_(mean)
        mine, wanted = values(net), values(shadows[rank])
        for name in names:
            np.testing.assert_array_equal(mine[name], wanted[name], f"{step}: {name}")
    state.sync()
    report = {
        "hash": hash_of(net),
        "exchanges": state.exchanges,
        "ratio": state.meter.ratio,
    }
    state.close()
    return report


def moments_of_two_optimizers(rank: int, world: int, decay: float) -> list[Tensor]:
    """What two optimizers of one model keep right after an exchange."""
    net = make_net(0)
    optimizers = [
        torch.optim.SGD([*net.conv.parameters(), *net.norm.parameters()], 0.05, 0.9),
        torch.optim.AdamW(net.head.parameters(), lr=0.01),
    ]
    state = local_sgd.attach(
        net,
        optimizers,
        CODED,
        sync_every=2,
        **{**NEUTRAL, "inner_momentum_scale": decay},
    )
    for step in range(2):
        train_step(net, optimizers[0], rank, step)
        optimizers[1].step()
        optimizers[1].zero_grad()
    state.close()
    keys = ("momentum_buffer", "exp_avg")
    return [
        kept[key].clone()
        for optimizer, key in zip(optimizers, keys, strict=True)
        for kept in optimizer.state.values()
    ]


def decays_without_data(rank: int, world: int) -> str:
    """A rank that made no step has no first moment, and that is no error."""
    net = make_net(0)
    optimizer = make_optimizer(net, "adamw")
    state = local_sgd.attach(
        net,
        optimizer,
        CODED,
        sync_every="manual",
        **{**NEUTRAL, "inner_momentum_scale": 0.5},
    )
    if rank == 0:
        train_step(net, optimizer, rank, 0)
    state.exchange()
    state.sync()
    state.close()
    return hash_of(net)


def no_first_moment(rank: int, world: int) -> str:
    """What an optimizer without momentum meets at its first exchange."""
    net = make_net(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    state = local_sgd.attach(
        net, optimizer, CODED, sync_every=2, inner_momentum_scale=0.5
    )
    train_step(net, optimizer, rank, 0)
    try:
        train_step(net, optimizer, rank, 1)
    except Lc3Error as error:
        return str(error)
    finally:
        state.close()
    return "decayed"


def plain_averaging_is_ddp(rank: int, world: int) -> float:
    """With coding off, H = 1 and SGD equal DDP up to rounding; return the distance."""
    nets = [make_net(3), make_net(3)]
    for net in nets:
        net.norm = nn.Identity()  # type: ignore[assignment]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in nets]
    wrapped = DistributedDataParallel(nets[0])
    state = local_sgd.attach(nets[1], optimizers[1], PLAIN, sync_every=1)
    for step in range(20):
        train_step(wrapped, optimizers[0], rank, step)
        train_step(nets[1], optimizers[1], rank, step)
    state.close()
    return max(
        float((a - b).detach().abs().max())
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    )


def resumes(
    rank: int, world: int, folder: str, budget: int | None, at: int = 12
) -> bool:
    """Ten exchanges, or four, a checkpoint, and six more: the same bits.

    At a step between two exchanges ranks save models that differ.
    """
    config = dataclasses.replace(CODED, bytes_per_step=budget)

    def fresh() -> tuple[Net, torch.optim.Optimizer, local_sgd.State]:
        net = make_net(5)
        optimizer = make_optimizer(net, "adamw")
        return net, optimizer, local_sgd.attach(net, optimizer, config, sync_every=3)

    path = Path(f"{folder}-{rank}")
    net, optimizer, state = fresh()
    for step in range(30):
        if step == at:
            saved = [net.state_dict(), optimizer.state_dict(), state.state_dict()]
            torch.save(saved, path)
        train_step(net, optimizer, rank, step)
    straight = hash_of(net)
    state.close()
    net, optimizer, state = fresh()
    loaded = torch.load(path, weights_only=True)
    targets = zip((net, optimizer, state), loaded, strict=True)
    for target, part in targets if at % 2 else reversed(list(targets)):
        target.load_state_dict(part)  # type: ignore[union-attr]
    for step in range(at, 30):
        train_step(net, optimizer, rank, step)
    state.close()
    return hash_of(net) == straight


def a_delay_hides_a_slow_exchange(rank: int, world: int) -> tuple[float, float]:
    """Return how long 40 steps stood still for exchanges slowed by hand, over compute.

    Each exchange takes two to three steps; waited for, and with a delay of three.
    """
    shares = []
    for delay in (0, 3):
        net = make_net(1)
        optimizer = make_optimizer(net, "sgd")
        state = local_sgd.attach(net, optimizer, CODED, sync_every=8, overlap=delay)
        transport = state.engine.transport
        send = transport.all_to_all

        def slow(*given: Any, send: Any = send, **named: Any) -> Any:
            time.sleep(0.03)
            return send(*given, **named)

        transport.all_to_all = slow  # type: ignore[method-assign]
        dist.barrier()
        start = time.perf_counter()
        for step in range(40):
            train_step(net, optimizer, rank, step)
            time.sleep(0.05)  # a step's compute that leaves the processor alone
        whole = time.perf_counter() - start
        wait = state.meter.seconds["wait"]
        shares.append(wait / (whole - wait))
        state.sync()
        state.close()
    return shares[0], shares[1]


def shared_model(rank: int, world: int, delay: int) -> tuple[str, bool, str]:
    """Between exchanges: the hash shared, own parameters kept, the end's hash."""
    ends = []
    for evaluates in (False, True):
        net = make_net(0)
        optimizer = make_optimizer(net, "adamw")
        state = local_sgd.attach(net, optimizer, CODED, sync_every=4, overlap=delay)
        for step in range(10):
            train_step(net, optimizer, rank, step)
            if evaluates:
                own = [p.detach().clone() for p in net.parameters()]
                with state.shared_model():
                    shared = hash_of(net)
                kept = all(
                    torch.equal(a, b)
                    for a, b in zip(own, net.parameters(), strict=True)
                )
                differs = hash_of(net) != shared
        state.sync()
        ends.append(hash_of(net))
        state.close()
    assert ends[0] == ends[1]
    return shared, kept and differs, ends[0]


def chooses(rank: int, world: int) -> list[tuple[float, float, float]]:
    """Return what was chosen where one knob is given."""
    found = []
    cases: list[tuple[str, dict[str, Any]]] = [
        ("adamw", {}),
        ("adamw", {"inner_momentum_scale": 0.4}),
        ("adamw", {"outer_momentum": 0.5}),
        ("adamw", {"sync_every": 7}),
        ("adamw", {"overlap": 1}),
        ("adamw", {"outer_lr": 1.5}),
        ("adamw", {"config": Config(density=0.1, log_every=7)}),
        ("adamw", {"preset": "muon", "residual_decay": 0.9}),
        ("sgd", {}),
    ]
    for kind, given in cases:
        net = make_net(0)
        optimizer = make_optimizer(net, kind)
        state = local_sgd.attach(net, optimizer, **{"config": CODED, **given})
        knobs = state.knobs
        found.append((knobs.outer_lr, knobs.residual_decay, knobs.inner_momentum_scale))
        state.close()
    return found


def refused(rank: int, world: int, what: str) -> str:
    net: nn.Module = make_net(0)
    optimizer = make_optimizer(net, "sgd")
    given: dict[str, Any] = {}
    if what == "ddp":
        net = DistributedDataParallel(net)
        net.register_comm_hook(None, allreduce_hook)
    if what == "state_device":
        given = {"state_device": "cuda"}
    if what == "alpha":
        given = {"alpha": 0.5}
    if what == "fragments":
        given = {"fragments": 4}
    if what == "too many fragments":
        given = {"fragments": 9, "sync_every": 8}
    if what == "manual fragments":
        given = {"fragments": 2, "sync_every": "manual"}
    numbers = ("outer_lr", "residual_decay", "inner_momentum_scale")
    if what in ("sync_every", "overlap", "a word", *numbers):
        cases: dict[str, dict[str, Any]] = {
            "sync_every": {"sync_every": 0},
            "overlap": {"sync_every": 4, "overlap": 4},
            "a word": {"outer_lr": "2"},
        }
        given = cases.get(what, {what: 3.0})
    if what == "strides":
        net = nn.Linear(300, 10)
        net.weight = nn.Parameter(torch.zeros(10, 600)[:, ::2])
    if what == "differ":
        given = {"config": Settings(density=0.1 + 0.1 * rank)}
    if what == "every differs":
        given = {"sync_every": 4 + 4 * rank}
    optimizers = [] if what == "no optimizer" else [optimizer]
    try:
        local_sgd.attach(net, optimizers, **given)
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    return "attached"


def non_finite_rank(rank: int, world: int) -> tuple[str, bool]:
    """One rank's parameters turn NaN: the round never was, and training goes on."""
    net = make_net(0)
    optimizer = make_optimizer(net, "sgd")
    state = local_sgd.attach(net, optimizer, CODED, sync_every=2)
    for step in range(8):
        if step == 3 and rank == 1:
            net.head.weight.data[0, 0] = torch.nan
        train_step(net, optimizer, rank, step)
        if step == 3 and rank == 1:
            for group in optimizer.state.values():
                group.clear()
    finite = all(bool(p.isfinite().all()) for p in net.parameters())
    state.sync()
    result = hash_of(net)
    state.close()
    return result, finite


def small_moves_of_one(rank: int, world: int) -> list[float]:
    """One rank's moves, of a bit of bfloat16 each: what all hold, the model, and it."""
    net = nn.Linear(4, 4).to(torch.bfloat16)
    with torch.no_grad():
        net.weight.fill_(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    uncoded = Settings(min_numel=10**9)
    state = local_sgd.attach(net, optimizer, uncoded, sync_every=1, outer_lr=1.0)
    for _ in range(24):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(
                parameter, -(2.0**-7) if rank == 1 else 0.0
            )
        optimizer.step()
    found = [float(state.owners.replica["weight"][0]), float(net.weight[0, 0])]
    state.close()
    return found


def wrapped(rank: int, world: int, compiled: bool) -> tuple[str, str, bool, bool]:
    """Train a module, and one in DDP: hashes, and when gradients are shared."""

    def shares_gradients() -> bool:
        mine = torch.cat(
            [p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]
        )
        both = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(both, mine)
        return torch.equal(both[0], both[1])

    ends = []
    for wraps in (False, True):
        net = make_net(rank if wraps else 0)
        optimizer = make_optimizer(net, "adamw")
        model: Any = DistributedDataParallel(net) if wraps else net
        ddp = model
        if wraps and compiled:
            model = torch.compile(model, backend="eager")
        state = local_sgd.attach(model, optimizer, CODED, sync_every=4)
        for step in range(10):
            train_step(model, optimizer, rank, step)
        shared = shares_gradients()
        state.sync()
        ends.append(hash_of(net))
        state.close()
    train_step(ddp, optimizer, rank, 10)
    return ends[0], ends[1], shared, shares_gradients()


def gathers(rank: int, world: int) -> bool:
    """Rank 0's checkpoint is loaded by all, and training goes on bit for bit."""

    def fresh() -> tuple[Net, torch.optim.Optimizer, local_sgd.State]:
        net = make_net(5)
        optimizer = make_optimizer(net, "sgd")
        return net, optimizer, local_sgd.attach(net, optimizer, CODED, sync_every=3)

    net, optimizer, state = fresh()
    for step in range(7):
        train_step(net, optimizer, rank, step)
    state.sync()
    saved: list[Any] = [[deepcopy(net.state_dict()), state.gather_state()]]
    assert bool(saved[0][1]) == (rank == 0)
    moments = deepcopy(optimizer.state_dict())
    dist.broadcast_object_list(saved)
    for step in range(7, 13):
        train_step(net, optimizer, rank, step)
    straight = hash_of(net)
    state.close()
    net, optimizer, state = fresh()
    net.load_state_dict(saved[0][0])
    optimizer.load_state_dict(moments)
    state.load_gathered(saved[0][1])
    for step in range(7, 13):
        train_step(net, optimizer, rank, step)
    state.close()
    return hash_of(net) == straight


def statistics_recover(rank: int, world: int) -> list[bool]:
    """Return whether statistics are finite, after each step; one has NaN everywhere."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    state = local_sgd.attach(net, optimizer, CODED, sync_every=2)
    finite = []
    for step in range(6):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        net(x * (torch.nan if step == 2 else 1.0)).square().mean().backward()
        optimizer.step()
        finite.append(
            all(b.isfinite().all() for b in net.buffers() if b.is_floating_point())
        )
    state.close()
    return finite
