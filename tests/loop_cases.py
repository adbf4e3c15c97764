"""Training loops as people write them, beside the same loop without lc3.

For ``test_loops``: each function runs on every rank of a group.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from lc3 import AttachError
from lc3.config import Settings
from lc3.hooks import ddp
from tests.ddp_cases import hash_of

STEPS, BATCH = 100, 32
RATE = 3e-3


class Net(nn.Module):
    """A perceptron with a norm, which learns what another one says."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Linear(64, 96), nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(x))


class Loop(NamedTuple):
    """What differs between two people's loops.

    Attributes:
        options: of AdamW.
        groups: whether biases and norms have a group without weight decay.
        schedule: makes one.
        scales: the loss is scaled for half precision.
        compiles: the wrapped model.
        frozen: the first layer.
        accumulate: backward passes a step.
        clip: global norm; none if 0.
        kind: of optimizer.
    """

    options: tuple[tuple[str, Any], ...] = ()
    groups: bool = False
    schedule: Callable[[Any], LRScheduler] | None = None
    scales: bool = False
    compiles: bool = False
    frozen: bool = False
    accumulate: int = 1
    clip: float = 0.0
    kind: Any = torch.optim.AdamW


def one_cycle(optimizer: Any) -> LRScheduler:
    return OneCycleLR(optimizer, 3 * RATE, total_steps=STEPS)


def cosine(optimizer: Any) -> LRScheduler:
    return CosineAnnealingLR(optimizer, STEPS)


LOOPS = {
    "fused": Loop((("fused", True),)),
    "foreach": Loop((("foreach", True),)),
    "amsgrad": Loop((("amsgrad", True),)),
    "groups": Loop((("weight_decay", 0.1),), groups=True),
    "one cycle": Loop(schedule=one_cycle),  # cycles beta1, too
    "cosine, clipping": Loop(schedule=cosine, clip=1.0),
    "scaler": Loop(scales=True, clip=1.0),
    "fused, scaler": Loop((("fused", True),), scales=True),
    "coupled decay": Loop((("weight_decay", 0.01),), kind=torch.optim.Adam),
    "maximize": Loop(
        (("weight_decay", 0.01), ("maximize", True)), kind=torch.optim.Adam
    ),
    "compiled": Loop(compiles=True),
    "frozen backbone": Loop(frozen=True),
    "accumulation, clipping": Loop(accumulate=3, clip=0.5),
}


def trained(
    rank: int, world: int, name: str, attach: bool
) -> tuple[float, str, list[float]]:
    """Return the loss at the end, a hash of the model, norms that a script sees."""
    loop = LOOPS[name]
    teacher, net = Net(1), Net(2)
    net.layers[0].requires_grad_(not loop.frozen)
    used = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for _, p in used]}]
    if loop.groups:
        groups = [
            {"params": [p for _, p in used if p.dim() > 1]},
            {"params": [p for _, p in used if p.dim() == 1], "weight_decay": 0.0},
        ]
    optimizer = loop.kind(groups, lr=RATE, **dict(loop.options))
    before = optimizer.state_dict()["param_groups"]
    model: Any = DistributedDataParallel(net)
    state = ddp.attach(model, optimizer) if attach else None
    assert optimizer.state_dict()["param_groups"] == before
    wrapped = model
    if loop.compiles:
        model = torch.compile(model, backend="eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=loop.scales)
    schedule = None if loop.schedule is None else loop.schedule(optimizer)
    generator = torch.Generator().manual_seed(rank)
    norms = []
    for step in range(STEPS):
        for part in range(loop.accumulate):
            last = part == loop.accumulate - 1
            with nullcontext() if last else wrapped.no_sync():
                x = torch.randn(BATCH, 64, generator=generator)
                loss = (model(x) - teacher(x).detach()).square().mean()
                loss = loss / loop.accumulate
                if dict(loop.options).get("maximize"):
                    loss = -loss
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer) if loop.clip and loop.scales else None
        if loop.clip:
            norm = nn.utils.clip_grad_norm_(net.parameters(), loop.clip)
            norms += [float(norm)] if step % 10 == 0 else []
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    if state is not None:
        assert state.meter.steps == STEPS
        state.close()
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        end = float((net(x) - teacher(x)).square().mean())
    return end, hash_of(net), norms


def another_optimizer(rank: int, world: int) -> str:
    """Step with an optimizer that attach was not given; what is said."""
    net = Net(2)
    model = DistributedDataParallel(net)
    state = ddp.attach(model, torch.optim.AdamW(net.parameters(), lr=RATE))
    other = torch.optim.AdamW(net.parameters(), lr=RATE)
    try:
        for _ in range(2):
            model(torch.randn(BATCH, 64)).square().mean().backward()
            other.step()
            other.zero_grad()
    except AttachError as error:
        return str(error)
    finally:
        state.close()
    return "nothing"


def max_norm_of_two(rank: int, world: int) -> tuple[float, float]:
    """How far two optimizers go with one max_norm, with and without lc3."""
    moved = []
    for attach in (False, True):
        net = Net(2)
        before = [p.detach().clone() for p in net.parameters()]
        halves = list(net.parameters())[:2], list(net.parameters())[2:]
        optimizers = [torch.optim.SGD(half, lr=1.0) for half in halves]
        model = DistributedDataParallel(net)
        config = Settings(exclude=("*",))
        state = None
        if attach:
            state = ddp.attach(model, optimizers, config, max_norm=0.1)
        model(torch.ones(4, 64)).square().sum().backward()
        if state is None:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.step()
        pairs = zip(net.parameters(), before, strict=True)
        moved.append(sum(float((p - old).norm()) ** 2 for p, old in pairs) ** 0.5)
        if state is not None:
            state.close()
    return moved[0], moved[1]


def gradients_of_gradients(rank: int, world: int) -> list[str]:
    """Ask for other gradients before the step, and add to them: what is said."""
    said = []
    for adds in (False, True):
        net = Net(2)
        model = DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
        state = ddp.attach(model, optimizer)
        x = torch.randn(BATCH, 64)
        model(x).square().mean().backward()
        try:
            if adds:
                model(x).square().mean().backward()
            else:
                torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
            optimizer.step()
            said.append("nothing")
        except AttachError as error:
            said.append(str(error))
        state.close()
    return said
