"""What people do to a model beside its training, on local steps. For ``test_given``."""

import copy
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lc3 import Lc3Error
from lc3.checkpoint import merge
from lc3.config import Settings
from lc3.hooks import ddp, local_sgd, push_pull
from lc3.transport.group import GroupTransport
from tests.ddp_cases import hash_of


class Messages(logging.Handler):
    """Keeps what is logged at ``lc3``."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        logging.getLogger("lc3").addHandler(self)
        logging.getLogger("lc3").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def end(self) -> list[str]:
        logging.getLogger("lc3").removeHandler(self)
        return self.said


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


def optimizer_of(module: nn.Module, kind: str) -> torch.optim.Optimizer:
    used = [p for p in module.parameters() if p.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(used, lr=1e-2)
    return torch.optim.SGD(used, lr=0.1, momentum=0.9)


def train(
    module: nn.Module, optimizer: Any, rank: int, steps: int, seed: int = 0
) -> None:
    """Learn to give back the first 16 inputs."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator)
        optimizer.zero_grad()
        (module(x) - x[:, :16]).square().mean().backward()
        optimizer.step()


def loss_of(module: nn.Module) -> float:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((module(x) - x[:, :16]).square().mean())


def said_by(function: Callable[[], object]) -> str:
    try:
        function()
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def pretrained() -> dict[str, Tensor]:
    module = net(5)
    train(module, optimizer_of(module, "adamw"), 0, 200)
    return copy.deepcopy(module.state_dict())


def weights_are_loaded(
    rank: int, world: int, kind: str, steps_before: int, delay: int, how: str
) -> tuple[float, list[float], str]:
    """Load weights after some steps; return the losses of the shared model then."""
    weights = pretrained()
    module = net()
    optimizer = optimizer_of(module, kind)
    for group in optimizer.param_groups:
        group["lr"] *= 0.01
    config = Settings(density=0.1, min_ndim=0, min_numel=1)
    state = local_sgd.attach(module, optimizer, config, sync_every=8, overlap=delay)
    train(module, optimizer, rank, steps_before)
    if how == "copied":
        module.load_state_dict(weights)
    elif how == "by data":
        for name, parameter in module.named_parameters():
            parameter.data = weights[name].clone()
    elif how == "assigned":
        module.load_state_dict({n: w.clone() for n, w in weights.items()}, assign=True)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    elif how == "rebased":
        if rank == 0:
            module.load_state_dict(weights)
        state.rebase()
    before, losses = loss_of(module), []
    messages = Messages()
    for seed in range(1, 5):
        train(module, optimizer, rank, 8, seed)
        with state.shared_model():
            losses.append(loss_of(module))
    state.sync()
    said = [line for line in messages.end() if "were given other parameters" in line]
    assert len(said) == (how != "rebased"), said
    state.check_replicas()
    state.close()
    return before, losses, hash_of(module)


def weights_are_loaded_by_one(rank: int, world: int, steps_before: int) -> str:
    weights = pretrained()
    module = net()
    optimizer = optimizer_of(module, "adamw")
    state = local_sgd.attach(module, optimizer, sync_every=4)
    train(module, optimizer, rank, steps_before)
    if rank == 1:
        module.load_state_dict(weights)
    said = said_by(lambda: train(module, optimizer, rank, 8))
    state.close()
    return said


def weights_are_clamped(rank: int, world: int) -> tuple[float, float, list[str]]:
    """Clamp after every step, as a critic's: losses with lc3 and of one rank alone."""
    losses = []
    messages = Messages()
    for attached in (True, False):
        module = net()
        optimizer = optimizer_of(module, "sgd")
        state = local_sgd.attach(module, optimizer, sync_every=4) if attached else None
        for step in range(120):
            train(module, optimizer, rank, 1, step)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.clamp_(-0.1, 0.1)
        if state is not None:
            state.sync()
            state.close()
        losses.append(loss_of(module))
    return losses[0], losses[1], messages.end()


def swap_in_and_out(module: nn.Module) -> None:
    """Let other weights take the place of the model's own for a while."""
    own = [p.data for p in module.parameters()]
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5
    for parameter, data in zip(module.parameters(), own, strict=True):
        parameter.data = data.clone()


def memory_is_replaced(rank: int, world: int, how: str) -> tuple[float, str]:
    """Move parameters' memory around, what they hold unchanged; the loss after it."""
    module = net()
    optimizer = optimizer_of(module, "adamw")
    state = local_sgd.attach(module, optimizer, sync_every=4)
    train(module, optimizer, rank, 6)
    if how == "vector":
        vector = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        nn.utils.vector_to_parameters(vector, module.parameters())
    elif how == "swap":
        swap_in_and_out(module)
    elif how == "to":
        module.double()
        module.float()
    train(module, optimizer, rank, 42, 1)
    state.sync()
    state.close()
    return loss_of(module), hash_of(module)


class Odd(nn.Module):
    """A frozen layer, a buffer of whole numbers and one of bits."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net = net(rank)
        self.net[0].requires_grad_(False)
        self.order: Tensor
        self.kept: Tensor
        self.register_buffer("order", torch.randperm(64))
        self.register_buffer("kept", torch.rand(64) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.net(x[:, self.order] * self.kept))


def all_is_copied(rank: int, world: int) -> tuple[list[float], str]:
    """What a model of every kind of tensor holds after attach, as numbers."""
    module = Odd(rank)
    state = local_sgd.attach(module, optimizer_of(module, "adamw"), sync_every=4)
    held = [float(t.double().sum()) for t in module.state_dict().values()]
    with torch.no_grad():
        next(module.parameters())[0, 0] += rank
    said = said_by(state.check_replicas)
    state.close()
    return held, said


def unfrozen_later(rank: int, world: int) -> str:
    module = net()
    module[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    state = local_sgd.attach(module, optimizer, sync_every=4)
    train(module, optimizer, rank, 4)
    module[0].requires_grad_(True)
    said = said_by(lambda: train(module, optimizer, rank, 8))
    state.close()
    return said


class Ascent(torch.optim.Optimizer):
    """SAM's two halves, of which only the optimizer inside makes a step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base.param_groups
        self.ascents: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self.ascents = [(p, 0.05 * p.grad) for p in params]
        for p, ascent in self.ascents:
            p.add_(ascent)

    @torch.no_grad()
    def second(self) -> None:
        for p, ascent in self.ascents:
            p.sub_(ascent)
        self.base.step()


def steps_are_counted(rank: int, world: int, what: str) -> tuple[int, int, str]:
    """Return exchanges, steps, and a hash at the end."""
    module = net()
    optimizer: Any = optimizer_of(module, "adamw")
    if what == "inside":
        optimizer = Ascent(module.parameters(), lr=0.1)
    state = local_sgd.attach(module, optimizer, sync_every=4)
    if what == "inside":
        generator = torch.Generator().manual_seed(rank)
        for _ in range(24):
            x = torch.randn(32, 64, generator=generator)
            for half in (optimizer.first, optimizer.second):
                optimizer.zero_grad()
                (module(x) - x[:, :16]).square().mean().backward()
                half()
    else:
        train(module, optimizer, rank, 8)
        if what == "replaced":
            optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        elif what == "failed":
            optimizer.register_step_pre_hook(_fail_once())
            with suppress(KeyError):
                train(module, optimizer, rank, 1)
        train(module, optimizer, rank, 16)
    state.sync()
    found = state.exchanges, state.steps, hash_of(module)
    state.close()
    return found


def _fail_once() -> Callable[..., None]:
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(0)
        if len(calls) == 1:
            raise KeyError("a hook of somebody else")

    return fail


def attached_wrongly(rank: int, world: int) -> list[str]:
    module, other = net(), net()
    optimizer = optimizer_of(module, "adamw")
    state = local_sgd.attach(module, optimizer)
    twice = said_by(lambda: local_sgd.attach(module, optimizer))
    state.close()
    state = local_sgd.attach(module, optimizer)  # closed, so attached anew
    state.close()
    stranger = said_by(lambda: local_sgd.attach(other, optimizer))
    double = net().double()
    wide = said_by(lambda: local_sgd.attach(double, optimizer_of(double, "sgd")))
    return [twice, stranger, wide]


def a_batch_is_bad(
    rank: int, world: int, kind: str, delay: int, direct: bool
) -> tuple[float, str, int, list[str]]:
    """One batch of NaN on one rank: the loss 200 steps later."""
    messages = Messages()
    module = nn.Sequential(net(), nn.BatchNorm1d(16))
    optimizer = optimizer_of(module, kind)
    config = Settings(
        density=0.1, min_numel=1, min_ndim=0, topology="direct" if direct else "owners"
    )
    state = local_sgd.attach(module, optimizer, config, sync_every=4, overlap=delay)
    train(module, optimizer, rank, 9)
    if rank == 1:
        optimizer.zero_grad()
        module(torch.full((32, 64), torch.nan)).sum().backward()
        optimizer.step()
    else:
        train(module, optimizer, rank, 1)
    train(module, optimizer, rank, 200, 1)
    state.sync()
    for tensor in module.state_dict().values():
        assert tensor.isfinite().all()
    left_out = state.left_out
    state.check_replicas()
    state.close()
    return loss_of(module), hash_of(module), left_out, messages.end()


def every_batch_is_bad(rank: int, world: int) -> str:
    module = net()
    optimizer = optimizer_of(module, "sgd")
    state = local_sgd.attach(module, optimizer, sync_every=2)

    def go_on() -> None:
        for step in range(40):
            train(module, optimizer, rank, 1, step)
            if rank == 1:
                with torch.no_grad():
                    next(module.parameters())[0, 0] = torch.nan

    said = said_by(go_on)
    state.close()
    return said


def taken_back(rank: int, world: int, delay: int, since: int) -> tuple[float, float]:
    """Diverge, load what was saved before it, train on: losses loaded and then."""
    module = net()
    optimizer = optimizer_of(module, "sgd")
    state = local_sgd.attach(module, optimizer, sync_every=8, overlap=delay)
    for seed in range(20):
        train(module, optimizer, rank, 8, seed)
    state.sync()
    parts: list[Any] = [module, optimizer, state]
    saved = copy.deepcopy([part.state_dict() for part in parts])
    good = loss_of(module)
    optimizer.param_groups[0]["lr"] = 1.5
    train(module, optimizer, rank, since, 50)
    for part, held in zip(parts, saved, strict=True):
        part.load_state_dict(held)
    optimizer.param_groups[0]["lr"] = 1e-3
    for seed in range(60, 63):
        train(module, optimizer, rank, 8, seed)
    state.close()
    return good, loss_of(module)


def alone(rank: int, world: int) -> dict[str, Any]:
    """What a run of one rank hands on: its model, and what lc3 merges of its state."""
    module = net()
    optimizer = optimizer_of(module, "adamw")
    state = local_sgd.attach(module, optimizer)
    train(module, optimizer, rank, 60)
    saved = {"model": module.state_dict(), "lc3": merge([state.state_dict()])}
    state.close()
    return copy.deepcopy(saved)


def two_that_owe(rank: int, world: int) -> dict[str, Any]:
    """What each of two ranks saves when it has not sent all that it has moved."""
    module = net()
    optimizer = optimizer_of(module, "sgd")
    state = local_sgd.attach(module, optimizer, sync_every=4)
    train(module, optimizer, rank, 24)
    state.sync()
    saved = {"model": module.state_dict(), "lc3": state.state_dict()}
    state.close()
    return copy.deepcopy(saved)


def then_one(rank: int, world: int, saved: list[dict[str, Any]]) -> tuple[float, float]:
    """Return what is owed, and how far from it the model of one rank has gone."""
    module = net(3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    state = local_sgd.attach(module, optimizer, outer_lr=1.2)
    module.load_state_dict(saved[0]["model"])
    state.load_state_dict(merge([one["lc3"] for one in saved]))
    flats = {name: p.detach().reshape(-1) for name, p in module.named_parameters()}
    owed = {name: v.clone() for name, v in state.engine.residuals.sent.items()}
    due = {name: flat.clone() for name, flat in flats.items()}
    for name, value in owed.items():
        due[name] -= 1.2 * value
    train(module, optimizer, rank, 4)
    apart = sum(float((flats[name] - due[name]).norm()) for name in due)
    left = sum(float(v.norm()) for v in state.engine.residuals.sent.values())
    state.close()
    return sum(float(value.norm()) for value in owed.values()), apart + left


def then_several(rank: int, world: int, saved: dict[str, Any]) -> tuple[float, float]:
    module = net(3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    state = local_sgd.attach(module, optimizer)
    module.load_state_dict(saved["model"])
    state.load_state_dict(saved["lc3"])
    before = loss_of(module)
    train(module, optimizer, rank, 32)
    state.close()
    return before, loss_of(module)


BUFFERS: dict[str, Callable[[], Tensor]] = {
    "infinite mask": lambda: torch.full((8, 8), -torch.inf).triu(1),
    "finite mask": lambda: torch.full((8, 8), torch.finfo(torch.float32).min).triu(1),
    "table": lambda: torch.rand(1000, generator=torch.Generator().manual_seed(0)),
    "clock": lambda: torch.tensor([1e9 + 1, 0.1], dtype=torch.float64),
    "transposed": lambda: torch.arange(64.0).view(8, 8).t(),
    "expanded": lambda: torch.zeros(1, 8).expand(8, 8),
}


def buffers_stay(rank: int, world: int, delay: int) -> tuple[list[str], float]:
    """Return which constant buffers have changed, and the ratio."""
    module = net()
    for name, make in BUFFERS.items():
        module.register_buffer(name.replace(" ", "_"), make())
    module.register_buffer("whole", torch.ones(256, 256))
    optimizer = optimizer_of(module, "adamw")
    state = local_sgd.attach(module, optimizer, sync_every=4, overlap=delay)
    train(module, optimizer, rank, 64)
    state.sync()
    buffers = dict(module.named_buffers())
    changed = [
        name
        for name, make in BUFFERS.items()
        if not torch.equal(buffers[name.replace(" ", "_")], make())
    ]
    ratio = state.meter.ratio
    state.close()
    return changed, ratio


def buffers_are_averaged(rank: int, world: int, delay: int, bad: bool) -> list[float]:
    """Return what ranks hold of buffers that each changes in its own way."""
    module = net()
    module.register_buffer("seen", torch.zeros(3))
    module.register_buffer("time", torch.full((2,), 1e9, dtype=torch.float64))
    buffers = dict(module.named_buffers())
    optimizer = optimizer_of(module, "sgd")
    state = local_sgd.attach(module, optimizer, sync_every=2, overlap=delay)
    for step in range(4):
        train(module, optimizer, rank, 1, step)
        buffers["seen"] += 1.0 + rank
        buffers["time"] += 0.25 * (1 + rank)
    if rank == 1 and bad:
        buffers["seen"][1] = torch.nan
    state.sync()
    state.close()
    return [*buffers["seen"].tolist(), *(buffers["time"] - 1e9).tolist()]


def push_pull_of(module: nn.Module) -> tuple[Any, Any]:
    model = DistributedDataParallel(module)
    sgd = partial(torch.optim.SGD, lr=0.1)
    return model, push_pull.attach(model, sgd, Settings(min_numel=1, min_ndim=0))


def owners_take_over(
    rank: int, world: int, how: str, steps_before: int, bfloat16: bool
) -> tuple[list[float], str, str]:
    """Change parameters that owners keep masters of: losses after it."""
    weights = pretrained()
    module = net()
    if bfloat16:
        module.bfloat16()
    model, optimizer = push_pull_of(module)

    def go_on(steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(32, 64).to(next(module.parameters()).dtype)
            optimizer.zero_grad()
            (model(x) - x[:, :16]).square().mean().backward()
            optimizer.step()
            if how == "clamped":
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.clamp_(-0.1, 0.1)

    torch.manual_seed(rank)
    go_on(steps_before)
    if how == "loaded":
        module.load_state_dict(weights)
    elif how == "by data":
        for name, parameter in module.named_parameters():
            parameter.data.copy_(weights[name])
    elif how == "swapped":
        swap_in_and_out(module)
    elif how == "by one" and rank == 1:
        module.load_state_dict(weights)
    losses = [loss_of(copy.deepcopy(module).float())]
    said = said_by(lambda: go_on(60))
    losses.append(loss_of(copy.deepcopy(module).float()))
    if said == "nothing":
        optimizer.check_replicas()
        masters = optimizer.export().values()
        losses.append(max(float(master.abs().max()) for master in masters))
    optimizer.close()
    return losses, hash_of(module), said


def arguments_differ(rank: int, world: int) -> list[str]:
    """What push_pull says where ranks give it other arguments."""
    said = []
    for differs in ("max_norm", "lr", "kind"):
        model = DistributedDataParallel(net())
        given: dict[str, Any] = {}
        if differs == "max_norm":
            given = {"max_norm": 1.0 + rank}
        kind = torch.optim.Adagrad if differs == "kind" and rank else torch.optim.SGD
        make = partial(kind, lr=0.1 * (1 + rank) if differs == "lr" else 0.1)
        said.append(said_by(lambda: push_pull.attach(model, make, **given)))  # noqa: B023
    return said


def unfrozen_under_ddp(rank: int, world: int) -> tuple[str, str]:
    """Unfreeze a layer that DDP does not know; what the hook and the check say."""
    module = net()
    module[0].requires_grad_(False)
    model = DistributedDataParallel(module)
    state = ddp.attach(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train(model, optimizer, rank, 2)
    module[0].requires_grad_(True)
    said = said_by(lambda: train(model, optimizer, rank, 2))
    with torch.no_grad():
        next(module.parameters())[0, 0] += rank
    checked = said_by(state.check_replicas)
    state.close()
    return said, checked


class Buffered(nn.Module):
    """A norm with statistics, a mask, and a counter of passes that moves a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.norm = nn.BatchNorm1d(16)
        self.passes = 0
        self.mask: Tensor
        self.mean: Tensor
        self.late: Tensor
        self.register_buffer("late", torch.zeros(4))
        self.register_buffer("mask", torch.ones(256, 256).tril())
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean += x.mean()
            self.passes += 1
            if self.passes > 5:  # after it was found that it does not change
                self.late += x.mean()
        return torch.as_tensor(self.norm(self.net(x)) + self.mean[0])


def ddp_sends_buffers_that_change(
    rank: int, world: int, hook: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], float, int]:
    """Return buffers after training and at the next evaluation, ratio, their bytes."""
    module = Buffered()
    model = DistributedDataParallel(module)
    optimizer: Any
    if hook == "push_pull":
        optimizer = push_pull.attach(model, partial(torch.optim.SGD, lr=0.1))
        state = optimizer
    else:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        state = ddp.attach(model) if hook == "ddp" else None
    train(model, optimizer, rank, 20)
    trained = {n: b.clone() for n, b in module.named_buffers()}
    module.eval()  # not the wrapper
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(2, 64))
    evaluated = {n: b.clone() for n, b in module.named_buffers()}
    if state is None:
        return trained, evaluated, 0.0, 0
    sent = model.buffer_hook.buffer_comm_hook_state.sent_bytes
    ratio = state.meter.ratio
    state.close()
    return trained, evaluated, ratio, sent


def a_long_message(rank: int, world: int) -> str:
    """Rank 1 sends more than rank 0 expects of anybody."""
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    transport = GroupTransport(group, torch.device("cpu"))
    if rank == 0:
        transport.most_bytes = 1000
    message = torch.zeros(5000 if rank else 10, dtype=torch.uint8)
    return said_by(lambda: transport.all_gather(message))


def large_halves(rank: int, world: int) -> bool:
    """float16 gradients near the largest, at s = 1.75: whether all stay finite."""
    model = DistributedDataParallel(nn.Linear(64, 64, bias=False).half())
    config = Settings(sparsity=1.75, min_numel=1, min_ndim=0)
    state = ddp.attach(model, config=config)
    weight = model.module.weight
    (model(torch.ones(1, 64).half()).float() * 60_000.0).sum().backward()
    state.close()
    assert weight.grad is not None
    return bool(weight.grad.isfinite().all())
