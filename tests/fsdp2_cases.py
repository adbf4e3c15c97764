"""What the ranks of ``test_fsdp2`` do."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lc3
from lc3.config import Settings
from lc3.hooks import fsdp2
from lc3.transport.group import GroupTransport
from tests.given_cases import said_by
from tests.oracle import Oracle

CONFIG = Settings(sparsity=1.5, min_numel=64, min_shard=1000)


class Net(nn.Module):
    """Sizes that do not divide by the ranks of a site, so that shards are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 81)
        self.middle = nn.Linear(81, 97)
        self.last = nn.Linear(97, 10)
        self.spare = nn.Linear(32, 32)

    def forward(self, x: Tensor, use_spare: bool = True) -> Tensor:
        if use_spare:
            x = x + self.spare(x)
        x = torch.relu(self.middle(torch.relu(self.first(x))))
        return torch.as_tensor(self.last(x))


def sharded(mesh: DeviceMesh, dtype: torch.dtype | None = None) -> nn.Module:
    torch.manual_seed(7)
    model = Net()
    policy = MixedPrecisionPolicy(reduce_dtype=dtype)
    shard: Any = fully_shard
    for layer in (model.first, model.middle, model.last, model.spare):
        shard(layer, mesh=mesh["in"], mp_policy=policy)
    shard(model, mesh=mesh["in"], mp_policy=policy)
    return model


def mesh_of(world: int, per_site: int) -> DeviceMesh:
    shape = (world // per_site, per_site)
    return init_device_mesh("cpu", shape, mesh_dim_names=("between", "in"))


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 32, generator=generator)


def step_of(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    optimizer.zero_grad()
    model(batch(rank, step)).square().mean().backward()
    optimizer.step()


def locals_of(model: nn.Module) -> dict[str, Tensor]:
    parameters: Any = model.named_parameters()
    return {name: p.to_local().detach().clone() for name, p in parameters}


def equals_the_oracle(
    rank: int, world: int, per_site: int, steps: int, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Compare what every exchange gives with the oracle between this shard's ranks."""
    mesh = mesh_of(world, per_site)
    model = sharded(mesh, dtype)
    state = fsdp2.attach(model, mesh, CONFIG)
    peers = mesh.mesh[:, rank % per_site].tolist()
    assert isinstance(state.engine.transport, GroupTransport)
    assert dist.get_process_group_ranks(state.engine.transport._group) == peers
    numel = state.engine.plan.numel
    shapes = [(name, tuple(p.shape)) for p, name in state.session.names.items()]
    oracle = Oracle(shapes, len(peers), CONFIG)
    before: dict[str, Any] = {}
    reduced: dict[str, Tensor] = {}
    followed: list[bool] = []
    reduce = state.reduce

    def recorded(output: Tensor, names: Any, follows: bool) -> None:
        parts = torch.split(output, [numel[name] for name in names])
        for name, part in zip(names, parts, strict=True):
            before[name] = part.float().clone().numpy()
            reduced[name] = part
        followed.append(follows)
        reduce(output, names, follows)

    state.reduce = recorded  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        step_of(model, optimizer, rank, step)
        everybody: list[Any] = [None] * world
        dist.all_gather_object(everybody, before)
        expected = oracle.step([everybody[peer] for peer in peers])
        assert set(reduced) == set(numel)
        for name, part in reduced.items():
            found = part.float().numpy()
            value = torch.from_numpy(expected[name])
            rounded = value.to(dtype or torch.float32).float().numpy()
            np.testing.assert_array_equal(found, rounded, f"step {step}: {name}")
    everybody = [None] * world
    dist.all_gather_object(everybody, locals_of(model))
    for peer in peers:
        for name, value in locals_of(model).items():
            assert torch.equal(value, everybody[peer][name]), name
    report = {
        "sent": state.meter.sent_bytes,
        "dense": state.meter.dense_bytes,
        "steps": state.meter.steps,
        "buckets": state.meter.buckets,
        "elements": sum(numel.values()),
        "followed": sum(followed),
    }
    state.close()
    return report


def accumulates(rank: int, world: int) -> bool:
    """Two backward passes before a step: the second gradient is added to the first."""
    mesh = mesh_of(world, 2)
    found = []
    for together in (True, False):
        model = sharded(mesh)
        state = fsdp2.attach(model, mesh, Settings(exclude=("*",)))
        total: dict[str, Tensor] = {}
        for part in range(2):
            model(batch(rank, part)).square().mean().backward()
            if not together:
                parameters: Any = model.named_parameters()
                for name, p in parameters:
                    grad = p.grad.to_local().clone()
                    total[name] = total[name] + grad if name in total else grad
                    p.grad = None
        if together:
            parameters = model.named_parameters()
            total = {name: p.grad.to_local().clone() for name, p in parameters}
        found.append(total)
        state.close()
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def differs(rank: int, world: int) -> list[str]:
    """What check_replicas says before and after one rank's shard has changed."""
    mesh = mesh_of(world, 2)
    model = sharded(mesh)
    state = fsdp2.attach(model, mesh, CONFIG)
    step_of(model, torch.optim.SGD(model.parameters(), lr=0.05), rank, 0)
    said = [said_by(state.check_replicas)]
    if rank == world - 1:
        parameters: Any = model.named_parameters()
        with torch.no_grad():
            dict(parameters)["last.weight"].to_local()[0, 0] += 1
    said.append(said_by(state.check_replicas))
    state.close()
    return said


def resumes(rank: int, world: int) -> bool:
    """Ten steps; or five, saved, and five more of a new model."""
    mesh = mesh_of(world, 2)

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            step_of(model, optimizer, rank, step)

    def start() -> tuple[nn.Module, fsdp2.State, Any]:
        model = sharded(mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, fsdp2.attach(model, mesh, CONFIG), optimizer

    model, state, optimizer = start()
    train(model, optimizer, range(10))
    straight = locals_of(model)
    state.close()
    model, state, optimizer = start()
    train(model, optimizer, range(5))
    saved, kept = locals_of(model), state.state_dict()
    state.close()
    model, state, optimizer = start()
    with torch.no_grad():
        parameters: Any = model.named_parameters()
        for name, p in parameters:
            p.to_local().copy_(saved[name])
    state.load_state_dict(kept)
    train(model, optimizer, range(5, 10))
    state.close()
    return all(torch.equal(straight[n], v) for n, v in locals_of(model).items())


def refused(rank: int, world: int, what: str) -> str:
    """Return what is said to something that cannot work."""
    mesh = mesh_of(world, 2)
    config = Settings(mode="auto") if what == "auto" else CONFIG
    model: nn.Module = Net()
    given = mesh
    if what == "one dimension":
        model, given = sharded(mesh), init_device_mesh("cpu", (world,))
    elif what == "native HSDP":
        fully_shard(model, mesh=mesh)
    elif what != "not sharded":
        model = sharded(mesh)
    try:
        state = fsdp2.attach(model, given, config)
    except lc3.Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    state.close()
    return "attached"


def trains_with_a_module_unused(rank: int, world: int) -> int:
    """A module that no rank uses is not exchanged, and nothing hangs."""
    mesh = mesh_of(world, 2)
    model = sharded(mesh)
    state = fsdp2.attach(model, mesh, CONFIG)
    for step in range(4):
        model.zero_grad()
        out = model(batch(rank, step), use_spare=step % 2 == 0)
        out.square().mean().backward()
    steps = state.meter.steps
    state.close()
    return steps


class HalfUsed(nn.Module):
    """A layer one of whose parameters takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.randn(32, 8))
        self.unused = nn.Parameter(torch.randn(32, 8))
        self.frozen = nn.Parameter(torch.randn(32, 8), requires_grad=False)

    def forward(self, x: Tensor, all_of_it: bool = False) -> Tensor:
        weight = self.used + self.frozen
        return x @ (weight + self.unused if all_of_it else weight)


def a_parameter_without_gradient(rank: int, world: int, on: int | None) -> str:
    """``on``: the rank that leaves it out; ``None``: all do."""
    mesh = mesh_of(world, world // 2)
    model = HalfUsed()
    fully_shard(model, mesh=mesh["in"])
    state = fsdp2.attach(model, mesh, CONFIG)
    try:
        model(batch(rank, 0), on not in (None, rank)).sum().backward()
    except lc3.Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    finally:
        state.close()
    return "trained"


def unfrozen_later(rank: int, world: int) -> str:
    """Unfreeze a module that nobody exchanges."""
    mesh = mesh_of(world, 1)
    torch.manual_seed(7)
    model = Net()
    model.first.requires_grad_(False)
    shard: Any = fully_shard
    for layer in (model.first, model.middle, model.last, model.spare):
        shard(layer, mesh=mesh["in"])
    shard(model, mesh=mesh["in"])
    state = fsdp2.attach(model, mesh, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step_of(model, optimizer, rank, 0)
    model.first.requires_grad_(True)
    try:
        step_of(model, optimizer, rank, 1)
    except lc3.Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    finally:
        state.close()
    return "trained"
