"""What the ranks of ``test_sites`` do: sites of two ranks, and plain ranks for them.

Two plain ranks stand for two sites of two: each trains a model whose parameters are the
shards, on the mean of its site's gradients. FSDP2 does the same arithmetic, so both end
with the same bits.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._common_utils import TrainingState
from torch.nn import functional as F  # noqa: N812  # its usual name

from lc3 import Lc3Error
from lc3.config import Settings
from lc3.hooks import local_sgd
from lc3.model import local
from tests.given_cases import said_by

INSIDE = 2
CONFIG = Settings(density=0.1, min_numel=16, min_shard=64)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=5e-3),
}
SIZES = ((32, 24), (24, 16), (16, 8))


class Net(nn.Module):
    """Layers whose rows divide by the ranks of a site."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in SIZES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Shards(nn.Module):
    """The same function of parameters that are the shards of ``Net``'s."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.names = [name for name, _ in whole.named_parameters()]
        self.shards = nn.ParameterDict(
            {
                f"{name.replace('.', '-')}-{place}": nn.Parameter(part.detach().clone())
                for name, p in whole.named_parameters()
                for place, part in enumerate(p.chunk(INSIDE))
            }
        )

    def whole(self, name: str) -> Tensor:
        """Return a parameter of ``Net``."""
        key = name.replace(".", "-")
        return torch.cat([self.shards[f"{key}-{place}"] for place in range(INSIDE)])

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.names[::2], self.names[1::2], strict=True):
            x = torch.tanh(F.linear(x, self.whole(weight), self.whole(bias)))
        return x


class OldFSDP(FullyShardedDataParallel):
    """A model of FSDP's first version, which needs a GPU to be made."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = net()
        self.training_state = TrainingState.IDLE


def net() -> nn.Module:
    """Return the model, the same everywhere."""
    torch.manual_seed(7)
    return Net()


def batch(rank: int, step: int) -> Tensor:
    """Return what a rank of a site trains on."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 32, generator=generator)


def mesh_of(world: int) -> DeviceMesh:
    """Return sites of ``INSIDE`` ranks."""
    shape = (world // INSIDE, INSIDE)
    return init_device_mesh("cpu", shape, mesh_dim_names=("between", "inside"))


def sharded(mesh: DeviceMesh) -> nn.Module:
    """Return the model, sharded inside of a site."""
    model = net()
    shard: Any = fully_shard
    for layer in model.layers:  # type: ignore[union-attr]
        shard(layer, mesh=mesh["inside"])
    shard(model, mesh=mesh["inside"])
    return model


def step_of_site(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    """Make a step of FSDP2's."""
    optimizer.zero_grad()
    model(batch(rank, step)).square().mean().backward()
    optimizer.step()


def step_for_site(model: nn.Module, optimizer: Any, site: int, step: int) -> None:
    """Make a site's step on one rank: the mean of its ranks' gradients."""
    grads: list[list[Tensor]] = []
    for place in range(INSIDE):
        model.zero_grad()
        model(batch(site * INSIDE + place, step)).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for parameter, first, second in zip(model.parameters(), *grads, strict=True):
        parameter.grad = (first + second) / INSIDE
    optimizer.step()


def shards_of(model: nn.Module, place: int) -> dict[str, Tensor]:
    """Return what a rank of a site should hold of ``Shards``, by ``Net``'s names."""
    assert isinstance(model, Shards)
    return {
        name: model.shards[f"{name.replace('.', '-')}-{place}"].detach().clone()
        for name in model.names
    }


def locals_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what this rank holds of a sharded model."""
    parameters: Any = model.named_parameters()
    return {name: p.to_local().detach().clone() for name, p in parameters}


def for_sites(
    rank: int, world: int, kind: str, steps: int, knobs: dict[str, Any]
) -> tuple[list[list[dict[str, Tensor]]], int]:
    """Train a plain rank for each site; return what places hold after steps, bytes."""
    model = Shards(net())
    optimizer = OPTIMIZERS[kind](model.parameters())
    state = local_sgd.attach(model, optimizer, CONFIG, **knobs)
    found = []
    for step in range(steps):
        step_for_site(model, optimizer, rank, step)
        found.append([shards_of(model, place) for place in range(INSIDE)])
    sent = state.meter.sent_bytes
    state.sync()
    found.append([shards_of(model, place) for place in range(INSIDE)])
    state.close()
    return found, sent


def in_sites(
    rank: int, world: int, kind: str, steps: int, knobs: dict[str, Any]
) -> tuple[list[dict[str, Tensor]], int]:
    """Train sharded inside of sites; return what is held after steps, and bytes."""
    mesh = mesh_of(world)
    model = sharded(mesh)
    optimizer = OPTIMIZERS[kind](model.parameters())
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, **knobs)
    found = []
    for step in range(steps):
        step_of_site(model, optimizer, rank, step)
        found.append(locals_of(model))
    sent = state.meter.sent_bytes
    state.sync()
    state.check_replicas()
    found.append(locals_of(model))
    with state.shared_model():
        model(batch(0, 0))
    assert all(torch.equal(locals_of(model)[n], t) for n, t in found[-1].items())
    state.close()
    return found, sent


def resumes(rank: int, world: int, folder: str) -> bool:
    """Train twenty steps at once, and ten and ten from a file; compare the bits."""
    mesh = mesh_of(world)
    ends = []
    for stop in (None, 10):
        model = sharded(mesh)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=4)
        for step in range(20):
            if step == stop:
                kept = {
                    "model": locals_of(model),
                    "optimizer": [
                        {
                            k: v.to_local() if hasattr(v, "to_local") else v
                            for k, v in s.items()
                        }
                        for s in optimizer.state.values()
                    ],
                    "lc3": state.state_dict(),
                }
                path = Path(folder) / f"{rank}.pt"
                torch.save(kept, path)
                state.close()
                model, optimizer, state = _loaded(mesh, path)
            step_of_site(model, optimizer, rank, step)
        ends.append(locals_of(model))
        state.close()
    return all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def _loaded(mesh: DeviceMesh, path: Path) -> tuple[nn.Module, Any, Any]:
    saved = torch.load(path, weights_only=True)
    model = sharded(mesh)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step_of_site(model, optimizer, 0, 0)  # makes the optimizer's state
    parameters: Any = list(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters:
            p.to_local().copy_(saved["model"][name])
        for mine, theirs in zip(
            optimizer.state.values(), saved["optimizer"], strict=True
        ):
            for key, value in mine.items():
                held = value.to_local() if hasattr(value, "to_local") else value
                held.copy_(theirs[key])
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=4)
    with torch.no_grad():  # attach has copied the first site's
        for name, p in parameters:
            p.to_local().copy_(saved["model"][name])
    state.load_state_dict(saved["lc3"])
    return model, optimizer, state


def nan_in_a_shard(rank: int, world: int) -> dict[str, Any]:
    """Let one shard of one site be NaN once; return what becomes of it."""
    mesh = mesh_of(world)
    model = sharded(mesh)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=4)
    losses = []
    for step in range(60):
        step_of_site(model, optimizer, rank, step)
        if step == 9 and rank == 3:
            parameters: Any = list(model.parameters())
            with torch.no_grad():
                parameters[0].to_local()[0, 0] = math.nan
        with torch.no_grad():
            losses.append(float(model(batch(9, 9)).square().mean()))
    left_out = state.left_out
    state.sync()
    state.check_replicas()
    state.close()
    return {"first": losses[0], "last": losses[-1], "left_out": left_out}


def loaded_on_all(rank: int, world: int) -> bool:
    """Load other weights into every shard; return whether they hold."""
    mesh = mesh_of(world)
    model = sharded(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=2)
    for step in range(4):
        step_of_site(model, optimizer, rank, step)
    parameters: Any = list(model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.to_local().fill_(0.25)
    for step in range(4, 8):
        step_of_site(model, optimizer, rank, step)
    state.sync()
    state.close()
    return all(bool((t == 0.25).all()) for t in locals_of(model).values())


def refused(rank: int, world: int, what: str) -> str:
    """Attach what does not fit; return the error."""
    mesh = mesh_of(world)
    model: nn.Module = net() if what == "plain" else sharded(mesh)
    if what == "first version":
        model = OldFSDP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if what == "after an evaluation":  # the root holds whole parameters then
        with torch.no_grad():
            model(batch(0, 0))
    knobs: dict[str, Any] = {}
    if what == "other steps on one rank":
        knobs["sync_every"] = 4 + (rank == 3)
    if what == "a pattern on one rank" and rank == 2:
        knobs["config"] = Settings(exclude=("nothing*",))
    if what == "an error on one rank" and rank == 1:
        optimizer = "none"  # type: ignore[assignment]
    given: Any = {
        "no mesh": None,
        "number": 2,
        "flat": init_device_mesh("cpu", (world,)),
        "other ranks": DeviceMesh("cpu", [[0, 2], [1, 3]]),
    }.get(what, mesh)
    try:
        state = local_sgd.attach(
            model, optimizer, **{"config": CONFIG, "mesh": given, **knobs}
        )
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    for step in range(8):
        step_of_site(model, optimizer, rank, step)
    state.check_replicas()
    state.close()
    state.close()
    return "attached"


def others_state(rank: int, world: int) -> str:
    """Load the state of the other shard; return what is said."""
    mesh = mesh_of(world)
    model = sharded(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh)
    states: list[Any] = [None] * world
    dist.all_gather_object(states, state.state_dict())
    said = said_by(lambda: state.load_state_dict(states[rank ^ 1]))
    said += said_by(state.gather_state)
    state.close()
    return said


def a_replica_drifts(rank: int, world: int) -> str:
    """Change one shard of one site; return what every rank says."""
    mesh = mesh_of(world)
    model = sharded(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh)
    if rank == 3:
        with torch.no_grad():
            local(next(iter(model.parameters())))[0] += 1
    said = said_by(state.check_replicas)
    state.close()
    return said


def a_rank_fails(rank: int, world: int) -> str:
    """Let rank 3 fail before an exchange; return what is said."""
    mesh = mesh_of(world)
    model = sharded(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=2)
    if rank == 3:

        def broken(*_: Any, **__: Any) -> None:
            raise MemoryError("no memory left for frames")

        state.engine.messages.encode = broken  # type: ignore
    said = "nothing"
    try:
        for step in range(4):
            step_of_site(model, optimizer, rank, step)
    except Exception as error:  # noqa: BLE001  # it is the result
        said = f"{type(error).__name__}: {error}"
    state.close()
    dist.barrier()
    return said
