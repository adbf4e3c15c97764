"""What the ranks of ``test_ddp`` do: each function runs on every rank of a group."""

import copy
import dataclasses
import gc
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lc3 import AttachError, Lc3Error
from lc3.checkpoint import merge
from lc3.codec import Encoded, cpu
from lc3.config import Settings
from lc3.engines.two_levels import nodes_of
from lc3.hooks import ddp
from lc3.module import applied
from lc3.module.model import flat_view
from lc3.module.moments import matrix_of
from lc3.session.averages import Averages
from lc3.session.buckets import FollowedBuckets
from lc3.transport.group import GroupTransport
from lc3.wire.coder import Coder
from tests.oracle import ForOptimizers, Oracle, TwoLevels

CONFIG = Settings(sparsity=1.5, min_numel=64, min_shard=5000)


@dataclass(frozen=True)
class Case:
    """One way of using DDP.

    Attributes:
        used: which rank uses the ``spare`` layer at which step: an expression of them.
        accumulate: backward passes per step, all but the last under ``no_sync``.
        options: of DistributedDataParallel.
        mesh: of attach; ranks in a node.
        adam: whether AdamW is the optimizer that attach is given.
        max_update: see ``ddp.attach``.
        device: of the model.
    """

    options: tuple[tuple[str, Any], ...] = ()
    used: str = "True"
    accumulate: int = 1
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    config: Settings = CONFIG
    steps: int = 20
    mesh: int | None = None
    device: str = "cpu"
    adam: bool = False
    max_update: float | None = None


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
    state = ddp.attach(wrapped, config=case.config, mesh=case.mesh)
    layouts = record_layouts(state)
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    if case.mesh is not None:
        nodes = nodes_of(case.mesh, range(world))
        oracle: Oracle = TwoLevels(shapes, nodes, case.config)
    else:
        oracle = Oracle(shapes, world, case.config)
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


def record_layouts(state: Any) -> list[tuple[int, list[str]]]:
    layouts: list[tuple[int, list[str]]] = []
    buckets = state._buckets
    reduce = buckets.reduce

    def recording(
        buffer: Tensor, names: list[str], step: int, bucket: int, last: bool
    ) -> Tensor:
        layouts.append((step, names))
        reduced: Tensor = reduce(buffer, names, step, bucket, last)
        return reduced

    buckets.reduce = recording
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
        state = ddp.attach(wrapped, config=CONFIG)
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
        config = Settings(sparsity=1.0 + 0.25 * (rank == 1))
    if what == "model differs":
        model.register_parameter("late", None)
        config = Settings(exclude=("weight",)) if rank else Settings()
    if what == "complex":
        model = nn.Linear(4, 4, dtype=torch.cfloat)
    if what == "pattern matches nothing":
        config = Settings(exclude=("wait.*",))
    if what == "pattern matches nothing on one rank":
        config = Settings(exclude=("wait.*",)) if rank == 1 else Settings()
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
        state = ddp.attach(model, config=config)  # type: ignore[arg-type]
        if what == "twice":
            try:
                ddp.attach(model, config=config)  # type: ignore[arg-type]
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
    state = ddp.attach(model, config=CONFIG)
    said = []
    if what == "frozen when attached":
        model.module[0].weight.requires_grad_(True)
    for step in range(3):
        if what == "encode fails" and step == 1 and rank == world - 1:
            state.engine.messages.coder = Coder(Broken())
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


def closes_and_goes_on(rank: int, world: int) -> tuple[bool, bool, int]:
    """Attach, close, go on as plain DDP, attach again; copy the model meanwhile.

    Whether gradients without lc3 are plain DDP's, and the copy is a model; how many
    steps the second state has seen.
    """
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    model, plain = map(DistributedDataParallel, nets)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank))

    def passes(wrapped: DistributedDataParallel) -> list[Tensor]:
        wrapped.zero_grad()
        wrapped(x).square().sum().backward()
        return [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]

    state = ddp.attach(model, config=CONFIG)
    passes(model)
    copied = copy.deepcopy(model)
    passes(plain)
    state.close()
    state.close()
    pairs = zip(passes(model), passes(plain), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    state = ddp.attach(model, config=CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        passes(model)
        optimizer.step()
    state.check_replicas()
    steps = state.meter.steps
    state.close()
    return same, isinstance(copied, DistributedDataParallel), steps


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
    logging.getLogger("lc3.session.buckets").addHandler(handler)

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
    logging.getLogger("lc3.session.buckets").removeHandler(handler)
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
    config = dataclasses.replace(CONFIG, bytes_per_step=budget)
    cap_mb = 0.02 if budget is None else 25

    def train(model: Any, state: Averages, optimizer: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            model(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()

    def start() -> tuple[Any, Averages, Any]:
        torch.manual_seed(3)
        model = DistributedDataParallel(Deep(4), bucket_cap_mb=cap_mb)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, ddp.attach(model, config=config), optimizer

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
    states = [ddp.attach(model, config=CONFIG) for model in models]
    if rank in (0, world - 1):
        models.append(DistributedDataParallel(Deep(2), process_group=some))
        for wrong in (None, some, dist.group.WORLD):
            with pytest.raises(AttachError, match=r"dist\.new_group\(\[0, 2\]\)"):
                ddp.attach(models[-1], config=CONFIG, group=wrong)
        states.append(ddp.attach(models[-1], config=CONFIG, group=for_lc3))
        assert states[-1].engine.transport.world == 2
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
        state = ddp.attach(model, config=CONFIG) if attached else None
        model(torch.randn(4, 64)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        if state is not None:
            assert state.meter.sent_bytes == 0
            state.close()
    return all(map(torch.equal, *grads))


CaseFunction = Callable[..., Any]


def messages_of_every_length(rank: int, world: int) -> int:
    """Messages around the buffer of a receive arrive whole; return how many went."""
    transport = GroupTransport(dist.new_group(), torch.device("cpu"))
    buffer = transport._buffers.shape[1] - 8
    lengths = [
        0,
        1,
        7,
        1000,
        buffer - 1,
        buffer,
        buffer + 1,
        2 * buffer,
        2 * buffer + 9,
    ]
    count = 0
    for shift in range(len(lengths)):
        mine = [
            torch.full((lengths[(shift + 3 * rank + peer) % len(lengths)],), 1 + rank)
            for peer in range(world)
        ]
        arrived = transport.all_to_all([m.to(torch.uint8) for m in mine])
        for peer, data in enumerate(arrived):
            n = lengths[(shift + 3 * peer + rank) % len(lengths)]
            assert data.tolist() == [1 + peer] * n
            count += 1
        one = torch.arange(lengths[(shift + rank) % len(lengths)]).to(torch.uint8)
        for peer, data in enumerate(transport.all_gather(one)):
            n = lengths[(shift + peer) % len(lengths)]
            assert torch.equal(data, torch.arange(n).to(torch.uint8))
    return count


THROWN_AWAY = 3, 8  # gradients of steps that no optimizer applies


def optimizers_equal_the_oracle(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Clip, skip and throw away; compare .grad before and after, and Adam's moments."""
    model, shadow = make_net(case), make_net(case)
    wrapped = DistributedDataParallel(model, **dict(case.options))
    optimizer: torch.optim.Optimizer
    if case.adam:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.9))
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    state = ddp.attach(wrapped, optimizer, case.config, max_update=case.max_update)
    assert isinstance(state._buckets, FollowedBuckets)
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    most = min(case.max_update or 3, 10**0.5)  # the default, or Adam's own bound
    oracle = ForOptimizers(shapes, world, case.config, most)
    named = {n: p for n, p in model.named_parameters() if p.numel()}
    errors = []
    before = clone_of_moments(state)
    for step in range(case.steps):
        batches = [batch(rank, step, 0, case)]
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, local_gradients(shadow, model, batches))
        if step - 1 not in THROWN_AWAY:  # then they are still those from before it
            before = clone_of_moments(state)
        optimizer.zero_grad()
        x, y, use_spare = batches[0]
        loss_of(wrapped(x, use_spare), y).backward()
        square = state._buckets.applied._squares[0]
        roots = roots_of(state)
        share = state._buckets.applied.expected
        check_moments(state, everyone, before, share, step)
        expected = oracle.hand_out(everyone, roots, share, square, applied._norms)
        errors.append(state.grad_norm / norm_of_mean(everyone) - 1)
        if step == 0:
            limit = state.grad_norm / 3
        known = state._buckets.applied.clips.limit  # it changes when an optimizer steps
        now = 1 if known is None else min(1, known / square**0.5)
        assert share == pytest.approx(now, rel=1e-12)
        for name, parameter in named.items():
            assert parameter.grad is not None
            assert_same(flat_view(parameter.grad), expected[name], f"{name} {step}")
        if step in THROWN_AWAY:
            oracle.settle(0.0)
            continue
        if step:  # the second time it is known
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        grads = {n: p.grad for n, p in named.items() if p.grad is not None}
        norms = applied._norms(grads.values())
        given = hypot(*(oracle.norms[name] for name in named))
        ratio = applied._snap(hypot(*norms) / given)
        clipped = {n: flat_view(grad).clone() for n, grad in grads.items()}
        factor = oracle.apply(ratio)
        targets = targets_of(state)
        optimizer.step()
        for name, parameter in named.items():
            by = factor if oracle.coded(name, tuple(parameter.shape)) else 1.0
            final = clipped[name].mul(by).numpy()
            assert_same(flat_view(grads[name]), final, f"{name} at step {step}")
        if case.adam:
            check_adam(targets, optimizer, named)
    assert state._buckets.applied.clips.limit == pytest.approx(limit, rel=1e-3)
    report = {"hash": hash_of(model), "errors": errors}
    state.close()
    return report


def norm_of_mean(everyone: list[Any]) -> float:
    means = [np.mean([one[name] for one in everyone], 0) for name in everyone[0]]
    return float(np.sqrt(sum(float((mean.astype(float) ** 2).sum()) for mean in means)))


def assert_same(found: Tensor, expected: Any, where: str) -> None:
    difference = (found - torch.from_numpy(np.asarray(expected))).abs().max()
    assert not difference, f"{where}: {float(difference)}"


def clone_of_moments(state: Averages) -> dict[str, Tensor]:
    if state._buckets.moments is None:
        return {}
    return {name: kept.clone() for name, kept in state._buckets.moments.kept.items()}


def roots_of(state: Averages) -> dict[str, list[Any]]:
    """Return what gradients were divided by, by name, of every element."""
    if state._buckets.moments is None:
        return {}
    found = {}
    for name in state._buckets.moments.kept:
        grid = state._buckets.moments._grids[name]
        roots = []
        for index in range(len(state._buckets.moments._roots(name))):
            by = [
                root if i == index else torch.ones_like(root)
                for i, root in enumerate(state._buckets.moments._roots(name))
            ]
            element = torch.ones(grid.numel)
            grid.scale(element, by)
            roots.append(element.numpy())
        found[name] = roots
    return found


def check_moments(
    state: Averages,
    everyone: list[Any],
    before: dict[str, Tensor],
    share: float,
    step: int,
) -> None:
    """Compare what moments have taken in with means over blocks, one by one."""
    for name, kept in clone_of_moments(state).items():
        assert state._buckets.moments is not None
        if not state._buckets.moments.due(step) or not kept.numel() > 1:
            continue
        squares = np.mean([np.square(one[name] * share) for one in everyone], 0)
        rows, columns = matrix_of(shape_of(state, name))
        if rows:
            matrix = squares.reshape(rows, columns)
            ends = [(i, i + 64) for i in range(0, max(rows, columns), 64)]
            of_rows = [
                [matrix[i, a:b].mean() for a, b in ends if a < columns]
                for i in range(rows)
            ]
            of_columns = [
                [matrix[a:b, j].mean() for j in range(columns)]
                for a, b in ends
                if a < rows
            ]
            squares = np.concatenate([np.ravel(of_rows), np.ravel(of_columns)])
        decay = 0.9**10
        expected = before[name][:-1] * decay + (1 - decay) * torch.from_numpy(squares)
        # They travel as bfloat16, with 8 bits.
        torch.testing.assert_close(kept[:-1], expected.float(), rtol=2**-7, atol=1e-12)


def shape_of(state: Averages, name: str) -> list[int]:
    return next(list(p.shape) for p, n in state.session.names.items() if n == name)


def targets_of(state: Averages) -> dict[str, Tensor]:
    """Return what Adam should divide by in this step, squared, by name."""
    buckets = state._buckets
    if buckets.moments is None or not isinstance(buckets, FollowedBuckets):
        return {}
    noise = buckets.applied.noise
    moments = buckets.moments
    return {n: moments.of_elements(n) * noise for n in moments.kept}


def check_adam(
    targets: dict[str, Tensor], optimizer: Any, named: Mapping[str, Tensor]
) -> None:
    """Adam's own second moment is what all ranks have alike, less its correction."""
    for name, target in targets.items():
        kept = optimizer.state[named[name]]
        steps = float(kept["step"])
        if steps > 1:
            found = flat_view(kept["exp_avg_sq"]) / (1 - 0.9**steps)
            torch.testing.assert_close(found, target, rtol=1e-3, atol=1e-12)


def adamw_run() -> Any:
    """Return a small model, its lc3 state, and the optimizer."""
    torch.manual_seed(3)
    model = DistributedDataParallel(Deep(3), bucket_cap_mb=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = dataclasses.replace(CONFIG, min_numel=1, min_ndim=0)
    return model, ddp.attach(model, optimizer, config), optimizer


def resumes_with_adam(rank: int, world: int, merged: bool) -> tuple[str, str]:
    """Train on, and go on from a state; return a hash of each."""
    run = adamw_run()

    def train(run: Any, steps: range) -> None:
        model, _, optimizer = run
        for step in steps:
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

    train(run, range(12))
    saved = copy.deepcopy([part.state_dict() for part in run])
    if merged:
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, saved[1])
        saved[1] = merge(everyone)
        run[1].load_state_dict(saved[1])
    train(run, range(12, 20))
    again = adamw_run()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    train(again, range(12, 20))
    run[1].close()
    again[1].close()
    return hash_of(run[0].module), hash_of(again[0].module)


def overflows_with_adam(rank: int, world: int) -> dict[str, Any]:
    """One rank's gradient overflows once, and the scaler changes its scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    model, state, optimizer = adamw_run()
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
    kept = [*state._buckets.moments.kept.values(), *state.engine.residuals.buffers()]
    finite = all(bool(moments.isfinite().all()) for moments in kept)
    state.close()
    return {"hashes": hashes, "losses": losses, "finite": finite}


def sparse_with_adam(rank: int, world: int) -> float:
    """Return how far a sparse gradient is from plain DDP's."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Embedding(40, 8, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters())
    state = ddp.attach(model, optimizer)
    model(torch.tensor([1, 2 + rank])).sum().backward()
    grad = model.module.weight.grad.to_dense()
    expected = torch.zeros(40, 8)
    for one in range(world):
        expected[1] += 1 / world
        expected[2 + one] += 1 / world
    optimizer.step()
    state.close()
    return float((grad - expected).abs().max())


def flushes_and_loads(rank: int, world: int) -> tuple[float, float, bool]:
    """Return how much of what was owed a flush lacks, for SGD and for Adam.

    And whether a state that is loaded after a backward pass is what was saved.
    """
    lacking = []
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        torch.manual_seed(3)
        model = DistributedDataParallel(Deep(3))
        optimizer = kind(model.parameters(), lr=0.0)
        state = ddp.attach(model, optimizer, CONFIG)
        total = {name: torch.zeros_like(p) for p, name in state.session.names.items()}
        true = copy.deepcopy(total)
        for step in range(6):
            torch.manual_seed(10 * step + rank)
            x = torch.randn(8, 64)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            mine = torch.autograd.grad(
                model.module(x).square().mean(), list(model.module.parameters())
            )
            for (name, tensor), grad in zip(true.items(), mine, strict=True):
                dist.all_reduce(grad)
                assert name in total
                tensor += grad / world
            loss.backward()
            if step == 5:
                state.flush()
            optimizer.step()
            for parameter, name in state.session.names.items():
                assert parameter.grad is not None
                total[name] += parameter.grad
        off = sum(float((total[n] - true[n]).square().sum()) for n in true) ** 0.5
        lacking.append(off / sum(float(t.square().sum()) for t in true.values()) ** 0.5)
        saved = state.state_dict()
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        state.load_state_dict(saved)
        optimizer.step()
        again = state.state_dict()["sent"]
        same = all(torch.equal(again[n], saved["sent"][n]) for n in again)
        state.close()
    return lacking[0], lacking[1], same


def throws_away(rank: int, world: int, what: str) -> list[float]:
    """Return a figure of plain DDP, and of lc3, in loops that look at gradients."""
    loop = {"gan": critic_loss, "spike": skipped_steps, "sam": moved_by_sam}[what]
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Deep(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
        state = ddp.attach(model, optimizer, CONFIG) if attached else None
        found.append(loop(model, optimizer, torch.Generator().manual_seed(rank)))
        if state is not None:
            state.close()
    return found


def loss_on(model: nn.Module, x: Tensor) -> Tensor:
    return torch.as_tensor((model(x) - x.roll(1, 1)).square().mean())


def critic_loss(model: nn.Module, optimizer: Any, generator: torch.Generator) -> float:
    """Every second backward pass is another model's: zero_grad throws it away."""
    losses = []
    for _ in range(120):
        x = torch.randn(16, 64, generator=generator)
        optimizer.zero_grad()
        loss = loss_on(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        (-3 * loss_on(model, x)).backward()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def skipped_steps(
    model: nn.Module, optimizer: Any, generator: torch.Generator
) -> float:
    """One rank's batch is a thousand times too large, once; return the last loss."""
    skipped, last = 0, 0.0
    for step in range(100):
        x = torch.randn(16, 64, generator=generator)
        x = 1000 * x if step == 6 and dist.get_rank() == 1 else x
        optimizer.zero_grad()
        loss = loss_on(model, x)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])  # type: ignore[misc]
        if norm > 50:
            skipped += 1
        else:
            optimizer.step()
        last = loss.item()
    assert skipped == 1
    return last


def moved_by_sam(model: nn.Module, optimizer: Any, generator: torch.Generator) -> float:
    """Two backward passes a step; the first only says where to look."""
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(60):
        x = torch.randn(16, 64, generator=generator)
        optimizer.zero_grad()
        loss_on(model, x).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        with torch.no_grad():
            torch._foreach_mul_(grads, 0.05 / norm)
            torch._foreach_add_(list(model.parameters()), grads)
        optimizer.zero_grad()
        loss_on(model, x).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), grads)
        optimizer.step()
    pairs = zip(model.parameters(), start, strict=True)
    return float(sum(float((p - q).square().sum()) for p, q in pairs) ** 0.5)
