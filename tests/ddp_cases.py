"""What the ranks of ``test_ddp`` do: each function runs on every rank of a group."""

import copy
import dataclasses
import gc
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lc3 import AttachError, Config, Lc3Error
from lc3.checkpoint import merge
from lc3.codec import Encoded, cpu
from lc3.coder import Coder
from lc3.exchange import GroupExchange
from lc3.hooks import ddp
from lc3.two_levels import nodes_of
from tests.oracle import Divided, Oracle, TwoLevels

CONFIG = Config(sparsity=1.5, min_numel=64, min_share=5000)


@dataclass(frozen=True)
class Case:
    """One way of using DDP.

    Attributes:
        used: which rank uses the ``spare`` layer at which step: an expression of them.
        accumulate: backward passes per step, all but the last under ``no_sync``.
        options: of DistributedDataParallel.
        mesh: of attach; ranks in a node.
        device: of the model.
    """

    options: tuple[tuple[str, Any], ...] = ()
    used: str = "True"
    accumulate: int = 1
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    config: Config = CONFIG
    steps: int = 20
    mesh: int | None = None
    device: str = "cpu"


class Net(nn.Module):
    """Registered in another order than used, so that DDP's rebuilt buckets differ."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 10)
        self.spare = nn.Linear(40, 256)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Linear(256, 512)
        self.hidden = nn.Linear(512, 256)
        self.alone: nn.Parameter  # in its dtype; set by make_net

    def forward(self, x: Tensor, use_spare: bool) -> Tensor:
        h = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        h = h.flatten(1)[:, :512]
        h = torch.relu(self.hidden(h))
        h = torch.relu(self.hidden(torch.relu(self.wide(h))))
        if use_spare:
            h = h + self.spare(x.flatten(1)[:, :40])
        nothing = self.empty.sum() + self.alone.sum().to(h.dtype)
        return torch.as_tensor(self.head(h) + nothing)


def equals_the_oracle(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Train; compare every gradient of every step with the oracle's; report."""
    model = make_net(case)
    shadow = make_net(case)  # the same module without DDP gives the local gradients
    wrapped = DistributedDataParallel(model, **dict(case.options))
    state = ddp.attach(wrapped, case.config, mesh=case.mesh)
    layouts = record_layouts(state)
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    if case.mesh is not None:
        nodes = nodes_of(case.mesh, range(world))
        oracle: Oracle = TwoLevels(shapes, nodes, case.config)
    else:
        kind = Oracle if case.config.beta2 is None else Divided
        oracle = kind(shapes, world, case.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(case.steps):
        batches = [batch(rank, step, part, case) for part in range(case.accumulate)]
        local = local_gradients(shadow, model, batches)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, local)
        expected = oracle.step(everyone)

        optimizer.zero_grad()
        for part, (x, y, use_spare) in enumerate(batches):
            last = part == len(batches) - 1
            if last:
                loss_of(wrapped(x, use_spare), y).backward()
            else:
                with wrapped.no_sync():
                    loss_of(wrapped(x, use_spare), y).backward()
        check_gradients(model, expected, everyone, step)
        optimizer.step()
    report = {
        "hash": hash_of(model),
        "layouts": layouts,
        "buckets": state.meter.buckets,
        "steps": state.meter.steps,
        "residual": sum(float(r.norm()) for r in state.engine.residuals.sent.values()),
    }
    state.close()
    return report


def make_net(case: Case) -> Net:
    torch.manual_seed(7)
    net = Net().to(case.dtype)
    net.alone = nn.Parameter(torch.zeros(0, 4, dtype=alone_in_its_dtype(case)))
    net.to(case.device)
    if case.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def alone_in_its_dtype(case: Case) -> torch.dtype:
    """Return a dtype that no other parameter has: DDP makes a bucket of 0 elements."""
    return torch.float16 if case.dtype == torch.bfloat16 else torch.bfloat16


def batch(rank: int, step: int, part: int, case: Case) -> tuple[Tensor, Tensor, bool]:
    generator = torch.Generator().manual_seed(rank + 100 * step + 10_000 * part)
    x = torch.randn(4, 3, 8, 8, generator=generator).to(case.dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.to(case.device)
    use_spare = bool(eval(case.used, {"rank": rank, "step": step}))
    y = torch.randint(10, (4,), generator=generator)
    return x, y.to(case.device), use_spare


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.float(), y)


def local_gradients(
    shadow: Net, model: Net, batches: list[tuple[Tensor, Tensor, bool]]
) -> dict[str, Any]:
    """Return this rank's gradients, flat in memory order, zeros if there is none."""
    with torch.no_grad():
        for mine, its in zip(shadow.parameters(), model.parameters(), strict=True):
            mine.copy_(its)
    shadow.zero_grad()
    for x, y, use_spare in batches:
        loss_of(shadow(x, use_spare), y).backward()
    return {name: flat(p, p.grad) for name, p in shadow.named_parameters()}


def flat(parameter: Tensor, grad: Tensor | None) -> Any:
    """Return a gradient as float32[numel] in the memory order of its parameter."""
    like = torch.zeros_like(parameter)
    if grad is not None:
        like.copy_(grad)
    return like.as_strided((like.numel(),), (1,)).float().cpu().numpy()


def check_gradients(
    model: Net, expected: dict[str, Any], local: list[dict[str, Any]], step: int
) -> None:
    for name, parameter in model.named_parameters():
        if not any(gradients[name].any() for gradients in local):
            # Unused everywhere: DDP keeps what was there, which is nothing.
            grad = parameter.grad
            assert grad is None or not grad.any(), f"step {step}: {name}"
            continue
        rounded = torch.from_numpy(expected[name]).to(parameter.dtype).float().numpy()
        found = flat(parameter, parameter.grad)
        np.testing.assert_array_equal(found, rounded, f"step {step}: {name}")


def record_layouts(state: ddp.State) -> list[tuple[int, list[str]]]:
    layouts: list[tuple[int, list[str]]] = []
    reduce = state.reduce

    def recording(buffer: Tensor, names: list[str], step: int, bucket: int) -> Tensor:
        layouts.append((step, names))
        return reduce(buffer, names, step, bucket)

    state.reduce = recording  # type: ignore[method-assign]
    return layouts


def hash_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(flat(parameter, parameter.detach()).tobytes())
    return digest.hexdigest()


class Deep(nn.Module):
    """Many small layers: with a small cap, a bucket for each."""

    def __init__(self, layers: int = 24) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def many_buckets(rank: int, world: int, runs: int) -> dict[str, Any]:
    """Attach, train, close, ``runs`` times; report hashes and what was left behind."""
    hashes, buckets = [], 0
    for run in range(runs):
        torch.manual_seed(run)
        wrapped = DistributedDataParallel(Deep(), bucket_cap_mb=0.01)
        held = count_held()
        state = ddp.attach(wrapped, CONFIG)
        for step in range(4):
            torch.manual_seed(1000 * run + 10 * step + rank)
            wrapped(torch.randn(8, 64)).square().mean().backward()
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=0.1)
                    parameter.grad = None
        hashes.append(hash_of(wrapped.module))
        buckets = state.meter.buckets // state.meter.steps
        state.close()
        left = count_held()
        if run == 0:
            first = left
        del state, wrapped
        gc.collect()
    return {
        "hashes": hashes,
        "buckets": buckets,
        "left": {what: now - held[what] for what, now in left.items()},
        "grown": {what: now - first[what] for what, now in left.items()},
    }


def count_held() -> dict[str, int]:
    """Return how many files and threads, the backend's own too, this process holds."""
    held = {"files": "fd", "threads": "task"}
    return {
        what: len(list(Path("/proc/self", name).iterdir()))
        for what, name in held.items()
    }


def attach_outcome(rank: int, world: int, what: str) -> str:
    """Attach in some wrong way; return the error, as ``type: text``."""
    model: nn.Module = nn.Linear(40, 40)
    config = CONFIG
    if what == "config differs":
        config = Config(sparsity=1.0 + 0.25 * (rank == 1))
    if what == "model differs":
        model.register_parameter("late", None)
        config = Config(raw=("weight",)) if rank else Config()
    if what == "beta2 on a mesh":
        config = Config(beta2=0.99)
    if what == "complex":
        model = nn.Linear(4, 4, dtype=torch.cfloat)
    if what == "pattern matches nothing":
        config = Config(raw=("wait.*",))
    if what == "pattern matches nothing on one rank":
        config = Config(raw=("wait.*",)) if rank == 1 else Config()
    if what != "not ddp":
        model = DistributedDataParallel(model)
    if what == "nothing trainable":
        model.requires_grad_(False)
    if what == "other hook":
        hooks = __import__(
            "torch.distributed.algorithms.ddp_comm_hooks.default_hooks", fromlist=["x"]
        )
        model.register_comm_hook(None, hooks.fp16_compress_hook)  # type: ignore[operator]
    try:
        mesh = 1 if what == "beta2 on a mesh" else None
        state = ddp.attach(model, config, mesh=mesh)  # type: ignore[arg-type]
        if what == "twice":
            try:
                ddp.attach(model, config)  # type: ignore[arg-type]
            finally:
                state.close()
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    return "attached"


def backward_outcomes(rank: int, world: int, what: str) -> list[str]:
    """Break something after attach; return what backward says, twice."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    if what == "frozen when attached":
        net[0].requires_grad_(False)
    model = DistributedDataParallel(net)
    if what == "frozen when attached":
        model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64)))
        model.module[0].weight.requires_grad_(False)
    state = ddp.attach(model, CONFIG)
    said = []
    if what == "frozen when attached":
        model.module[0].weight.requires_grad_(True)
    if what == "closed":
        state.close()
        state.close()
    for step in range(3):
        if what == "encode fails" and step == 1 and rank == world - 1:
            state.engine.coder = Coder(Broken())
        if what == "another lc3 step" and step == 1 and rank == 0:
            state.session.step += 1
        try:
            model(torch.randn(4, 64)).square().mean().backward()
        except Exception as error:  # noqa: BLE001  # it is the result
            said.append(f"{type(error).__name__}: {error}")
            if what != "encode fails":
                break
    state.close()
    return said


class Broken:
    """A codec on a machine without memory."""

    def encode(self, x: Tensor, sparsity: float, out: Tensor, *rest: Any) -> Encoded:
        raise MemoryError("no memory left for frames")

    max_frame_bytes = staticmethod(cpu.max_frame_bytes)
    check = staticmethod(cpu.check)
    add = staticmethod(cpu.add)


def passes_through(rank: int, world: int, kind: str) -> dict[str, Any]:
    """Train with gradients that lc3 does not code; compare with plain DDP."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lc3.hooks.ddp").addHandler(handler)

    def train(attached: bool) -> list[Tensor]:
        torch.manual_seed(5)
        if kind == "sparse":
            net: nn.Module = nn.EmbeddingBag(50, 8, sparse=True)
        else:
            net = nn.Linear(40, 8, dtype=torch.float64)
        model = DistributedDataParallel(net)
        state = ddp.attach(model) if attached else None
        for step in range(3):
            torch.manual_seed(10 * step + rank)
            x = (
                torch.randint(50, (4, 6))
                if kind == "sparse"
                else torch.randn(4, 40, dtype=torch.float64)
            )
            model(x).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=0.1)
                    parameter.grad = None
        if state is not None:
            assert state.meter.passed_through_bytes == state.meter.sent_bytes > 0
            state.close()
        return [parameter.detach() for parameter in model.parameters()]

    plain, through = train(False), train(True)
    logging.getLogger("lc3.hooks.ddp").removeHandler(handler)
    return {
        "said": said,
        "equal": all(map(torch.equal, plain, through)),
        "difference": max(
            float((a - b).abs().max()) for a, b in zip(plain, through, strict=True)
        ),
    }


def resumes_bit_for_bit(
    rank: int, world: int, weights_file: str, budget: int | None, half: int
) -> bool:
    """Some steps; or half, everything saved, loaded into a new model, and the rest.

    A budget steers by true bytes, which depend on the buckets; a new DDP forms others
    in its first step, unless all fits into one.
    """
    config = dataclasses.replace(CONFIG, budget=budget)
    cap_mb = 0.02 if budget is None else 25

    def train(model: Any, state: ddp.State, optimizer: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            model(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()

    def start() -> tuple[Any, ddp.State, Any]:
        torch.manual_seed(3)
        model = DistributedDataParallel(Deep(4), bucket_cap_mb=cap_mb)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, ddp.attach(model, config), optimizer

    model, state, optimizer = start()
    train(model, state, optimizer, range(2 * half))
    straight = hash_of(model.module)
    state.close()

    model, state, optimizer = start()
    train(model, state, optimizer, range(half))
    path = f"{weights_file}.{rank}"
    torch.save(
        {
            "lc3": state.state_dict(),
            "m": model.state_dict(),
            "o": optimizer.state_dict(),
        },
        path,
    )
    state.close()
    model, state, optimizer = start()
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    state.load_state_dict(saved["lc3"])
    train(model, state, optimizer, range(half, 2 * half))
    moved = state.engine.budget.sparsity != config.sparsity
    state.close()
    return hash_of(model.module) == straight and moved == (budget is not None)


def two_models_and_a_subgroup(rank: int, world: int) -> str:
    """Two models side by side, and one on some of the ranks only; return a hash."""
    some, for_lc3 = (dist.new_group([0, world - 1]) for _ in range(2))
    torch.manual_seed(3)
    models = [DistributedDataParallel(Deep(2)) for _ in range(2)]
    states = [ddp.attach(model, CONFIG) for model in models]
    if rank in (0, world - 1):
        models.append(DistributedDataParallel(Deep(2), process_group=some))
        for wrong in (None, some, dist.group.WORLD):
            with pytest.raises(AttachError, match=r"dist\.new_group\(\[0, 2\]\)"):
                ddp.attach(models[-1], CONFIG, group=wrong)
        states.append(ddp.attach(models[-1], CONFIG, group=for_lc3))
        assert states[-1].engine.exchange.world == 2
    for step in range(3):
        for model in models:
            torch.manual_seed(10 * step + rank)
            model(torch.randn(4, 64)).square().mean().backward()
    for state in states:
        state.close()
    return " ".join(
        hashlib.sha256(flat(p, p.grad).tobytes()).hexdigest()[:8]
        for model in models[:2]
        for p in model.parameters()
    )


def in_a_group_of_one(rank: int, world: int) -> bool:
    """One rank: plain training, to the bit."""
    alone = [dist.new_group([r]) for r in range(world)][rank]
    grads = []
    for attached in (False, True):
        torch.manual_seed(3)
        model = DistributedDataParallel(Deep(2), process_group=alone)
        state = ddp.attach(model, CONFIG) if attached else None
        model(torch.randn(4, 64)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        if state is not None:
            assert state.meter.sent_bytes == 0
            state.close()
    return all(map(torch.equal, *grads))


CaseFunction = Callable[..., Any]


def messages_of_every_length(rank: int, world: int) -> int:
    """Messages around the room of a receive arrive whole; return how many went."""
    exchange = GroupExchange(dist.new_group(), torch.device("cpu"))
    room = exchange._rooms.shape[1] - 8
    lengths = [0, 1, 7, 1000, room - 1, room, room + 1, 2 * room, 2 * room + 9]
    count = 0
    for shift in range(len(lengths)):
        mine = [
            torch.full((lengths[(shift + 3 * rank + peer) % len(lengths)],), 1 + rank)
            for peer in range(world)
        ]
        arrived = exchange.all_to_all([m.to(torch.uint8) for m in mine])
        for peer, data in enumerate(arrived):
            n = lengths[(shift + 3 * peer + rank) % len(lengths)]
            assert data.tolist() == [1 + peer] * n
            count += 1
        one = torch.arange(lengths[(shift + rank) % len(lengths)]).to(torch.uint8)
        for peer, data in enumerate(exchange.all_gather(one)):
            n = lengths[(shift + peer) % len(lengths)]
            assert torch.equal(data, torch.arange(n).to(torch.uint8))
    return count


def adam_run(config: Config, scaler: torch.amp.GradScaler | None = None) -> Any:
    """Return a small model, its lc3 state, and the optimizer that completes Adam."""
    torch.manual_seed(3)
    model = DistributedDataParallel(Deep(3), bucket_cap_mb=0.01)
    state = ddp.attach(model, config, scaler=scaler)
    parameters = model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, dampening=0.9)
    return model, state, optimizer


def resumes_with_moments(rank: int, world: int, merged: bool) -> tuple[str, str]:
    """Train on, and go on from a state; return a hash of each."""
    config = dataclasses.replace(CONFIG, beta2=0.99)
    run = adam_run(config)

    def train(run: Any, steps: range) -> None:
        model, _, optimizer = run
        for step in steps:
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()

    train(run, range(12))
    saved = copy.deepcopy([part.state_dict() for part in run])
    if merged:
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, saved[1])
        saved[1] = merge(everyone)
        run[1].load_state_dict(saved[1])
    train(run, range(12, 20))
    again = adam_run(config)
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    train(again, range(12, 20))
    run[1].close()
    again[1].close()
    return hash_of(run[0].module), hash_of(again[0].module)


def overflows_with_moments(rank: int, world: int) -> dict[str, Any]:
    """One rank's gradient overflows once, and the scaler changes its scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    model, state, optimizer = adam_run(dataclasses.replace(CONFIG, beta2=0.99), scaler)
    layer = model.module.layers[1].weight
    spoiled = False
    layer.register_hook(lambda g: torch.full_like(g, torch.inf) if spoiled else g)
    hashes, losses = [], []
    for step in range(30):
        spoiled = step == 14 and rank == 1
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        loss = model(torch.randn(8, 64)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        hashes.append(hash_of(model.module))
        losses.append(loss.item())
    kept = state._moments.kept.values()
    finite = all(bool(moments.isfinite().all()) for moments in kept)
    state.close()
    return {"hashes": hashes, "losses": losses, "finite": finite}


def sparse_with_moments(rank: int, world: int) -> str:
    """Return what is said of a gradient that cannot be divided."""
    model = DistributedDataParallel(nn.Embedding(40, 8, sparse=True))
    state = ddp.attach(model, Config(beta2=0.99))
    try:
        model(torch.tensor([1, 2])).sum().backward()
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    finally:
        state.close()
    return "nothing"
