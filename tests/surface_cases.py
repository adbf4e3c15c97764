"""What the ranks of ``test_surface`` do: each function runs on every rank."""

import logging
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lc3 import Lc3Error
from lc3.hooks import ddp, local_sgd, push_pull
from tests.ddp_cases import hash_of
from tests.given_cases import Messages


class WithBuffers(nn.Module):
    """Two layers, and a mask that never changes."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(30, 40), nn.Linear(40, 8)
        self.register_buffer("mask", torch.ones(4000))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(self.first(x).tanh() * self.mask[:40]))


def train(model: nn.Module, optimizer: Any, rank: int, steps: int = 6) -> None:
    for step in range(steps):
        torch.manual_seed(100 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, 30)).square().mean().backward()
        optimizer.step()


def runs(rank: int, world: int, lines: str) -> tuple[set[str], float]:
    """Run lines of the documentation; return what they bind, and the ratio."""
    model = DistributedDataParallel(WithBuffers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "torch": torch,
        "partial": partial,
        "ddp": True,  # as nanoGPT has it
    }
    after = dict(before)
    lines, _, end = lines.partition("state.sync()")
    exec(lines, after)
    state: Any = after.get("state", after["optimizer"])
    train(after["model"], after["optimizer"], rank, 10)
    if end:
        state.sync()
    state.close()
    del after["__builtins__"]
    bound = {key for key, value in after.items() if before.get(key) is not value}
    return bound, state.meter.ratio


def registered(rank: int, world: int) -> dict[str, bool]:
    """Register the hook as torch's own are registered."""
    digests, found = [], {}
    for way in ("attach", "register"):
        model = DistributedDataParallel(WithBuffers())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if way == "attach":
            state = ddp.attach(model, optimizer)
        else:
            state = ddp.State(model, optimizer)
            model.register_comm_hook(state, ddp.hook)
        train(model, optimizer, rank)
        digests.append(hash_of(model))
        if way == "register":
            found["buffers are lc3's"] = hasattr(model, "buffer_hook")
        state.close()
        sent = state.meter.sent_bytes
        train(model, optimizer, rank, 1)
        found["closed is plain"] = sent > 0 and state.meter.sent_bytes == sent
    found["equal to attach"] = digests[0] == digests[1]
    return found


def forgotten(rank: int, world: int) -> dict[str, list[str]]:
    """Return what is logged while a state trains that is registered, or is not."""
    found: dict[str, list[str]] = {}
    for way in ("attach", "register", "neither"):
        model = DistributedDataParallel(nn.Linear(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if way == "attach":
            state = ddp.attach(model, optimizer)
        else:
            state = ddp.State(model, optimizer)
        if way == "register":
            model.register_comm_hook(state, ddp.hook)
        messages = Messages()
        for _ in range(6):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        found[way] = [one for one in messages.end() if "passes" in one]
        state.close()
    return found


def refused(rank: int, world: int) -> list[str]:
    """Return what is said to arguments of the wrong kind, on every rank alike."""
    said = []
    module = WithBuffers()
    model = DistributedDataParallel(module)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    make: Any = partial(torch.optim.SGD, lr=0.1)
    wrong: Any = "x"
    with local_sgd.attach(model, optimizer):
        said += [_said(lambda: ddp.attach(model, optimizer))]
        said += [_said(lambda: local_sgd.attach(module, optimizer))]
    with ddp.attach(model, optimizer):
        said += [_said(lambda: local_sgd.attach(module, optimizer))]
        said += [_said(lambda: local_sgd.attach(model, optimizer))]
    registered = DistributedDataParallel(WithBuffers())
    state = ddp.State(registered)
    registered.register_comm_hook(state, ddp.hook)
    state.close()
    said += [_said(lambda: ddp.attach(registered))]
    for attach in (
        lambda: ddp.attach(model, optimizer, max_norm=wrong),
        lambda: ddp.attach(model, optimizer, max_norm=True),
        lambda: ddp.attach(model, optimizer, max_update=wrong),
        lambda: ddp.attach(model, optimizer, max_update=0.0),
        lambda: ddp.attach(model, make(model.parameters()), max_update=3.0),
        lambda: ddp.attach(model, optimizer, scaler=wrong),
        lambda: ddp.attach(model, optimizer, group=wrong),
        lambda: ddp.attach(model, optimizer, mesh=wrong),
        lambda: ddp.attach(model, optimizer, check_every=True),
        lambda: ddp.attach(wrong, optimizer),
        lambda: local_sgd.attach(wrong, optimizer),
        lambda: local_sgd.attach(module, optimizer, preset=wrong),
        lambda: push_pull.attach(module, make),  # type: ignore[arg-type]
        lambda: push_pull.attach(model, optimizer),
        lambda: push_pull.attach(model, lambda _: wrong),
        lambda: push_pull.attach(model, make, params=wrong),
        lambda: push_pull.attach(model, make, params=[{"lr": 1}]),
    ):
        said.append(_said(attach))
    return said


def _said(attach: Any) -> str:
    try:
        attach().close()
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def toggled(rank: int, world: int) -> bool:
    """Train locally as nanoGPT's loop does; return whether gradients stay apart."""
    model = DistributedDataParallel(WithBuffers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with local_sgd.attach(model, optimizer, sync_every=8) as state:
        for step in range(4):
            for part in range(2):
                model.require_backward_grad_sync = part == 1
                torch.manual_seed(100 * step + 10 * part + rank)
                model(torch.randn(8, 30)).square().mean().backward()
            grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
            everybody = [torch.empty_like(grads) for _ in range(world)]
            dist.all_gather(everybody, grads)
            optimizer.step()
            optimizer.zero_grad()
        apart = not torch.equal(everybody[0], everybody[1])
        sent = state.meter.sent_bytes
    train(model, optimizer, rank, 1)
    return apart and sent < 2000


def taken_twice(rank: int, world: int) -> bool:
    """Load one state dict of push_pull twice, with steps between."""
    model = DistributedDataParallel(WithBuffers())
    make = partial(torch.optim.AdamW, lr=1e-3)
    digests = []
    with push_pull.attach(model, make) as state:
        train(model, state, rank, 3)
        net = {k: v.clone() for k, v in model.module.state_dict().items()}
        taken = state.state_dict()
        for _ in range(2):
            model.module.load_state_dict(net)
            state.load_state_dict(taken)
            train(model, state, rank, 3)
            digests.append(hash_of(model))
    return digests[0] == digests[1]


def shown(rank: int, world: int) -> dict[str, Any]:
    """Return what the states of all forms show of themselves."""
    found: dict[str, Any] = {}
    lines: list[str] = []
    log = logging.getLogger("lc3")
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    model = DistributedDataParallel(WithBuffers())
    optimizer: Any = torch.optim.AdamW(model.parameters())
    with ddp.attach(model, optimizer) as state:
        train(model, optimizer, rank)
        found["ddp"] = repr(state)
    model = DistributedDataParallel(WithBuffers())
    make = partial(torch.optim.SGD, lr=0.1)
    with push_pull.attach(model, make, max_norm=1.0) as stepped:
        train(model, stepped, rank)
        found["push_pull"] = repr(stepped)

    net = WithBuffers()
    optimizer = torch.optim.AdamW(net.parameters())
    with local_sgd.attach(net, optimizer, sync_every=16, outer_lr=1.2) as alone:
        train(net, optimizer, rank)
        found["local_sgd"] = repr(alone)
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    found["chosen"] = [line for line in lines if "chosen" in line]
    return found
