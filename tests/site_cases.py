"""What the ranks of ``test_sites`` do: sites of two ranks, and plain ranks for them.

Two plain ranks stand for two sites of two: each trains a model whose parameters are the
shards, on the mean of its site's gradients. FSDP2 and DDP do the same arithmetic, so
all end with the same bits. Muon needs whole matrices: ``OfWhole`` steps these.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._common_utils import TrainingState
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F  # noqa: N812  # its usual name
from torch.nn.parallel import DistributedDataParallel

from lc3 import Lc3Error, merge_states
from lc3.config import Settings
from lc3.hooks import local_sgd
from lc3.module.model import local
from tests.given_cases import said_by

INSIDE = 2
CONFIG = Settings(density=0.1, min_numel=16, min_shard=64)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=5e-3),
}
OTHER_KNOBS: dict[str, Any] = {"sync_every": 4, "outer_lr": 1.5, "fragments": 2}
# Ranks of a site that hold the same, and shards, of HSDP.
HSDP = {"hsdp of replicas": (2, 1), "hsdp of shards": (1, 2)}
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
        self.shards = nn.ModuleDict()
        for name, parameter in whole.named_parameters():
            layer, _, kind = name.replace("layers.", "").partition(".")
            if layer not in self.shards:
                self.shards[layer] = nn.ParameterDict()
            for place, part in enumerate(parameter.chunk(INSIDE)):
                self.of(layer)[f"{kind}-{place}"] = nn.Parameter(part.detach().clone())

    def of(self, layer: str) -> nn.ParameterDict:
        """Return the shards of a layer."""
        found = self.shards[layer]
        assert isinstance(found, nn.ParameterDict)
        return found

    def parts(self, name: str) -> list[nn.Parameter]:
        """Return the shards of a parameter of ``Net``."""
        layer, _, kind = name.replace("layers.", "").partition(".")
        return [self.of(layer)[f"{kind}-{place}"] for place in range(INSIDE)]

    def whole(self, name: str) -> Tensor:
        """Return a parameter of ``Net``."""
        return torch.cat([*self.parts(name)])

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.names[::2], self.names[1::2], strict=True):
            x = torch.tanh(F.linear(x, self.whole(weight), self.whole(bias)))
        return x


class Several:
    """Muon for matrices, AdamW for what else there is, stepped one after the other."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        given = list(parameters)
        self.all = [
            torch.optim.Muon([p for p in given if p.ndim == 2], lr=0.02),
            torch.optim.AdamW([p for p in given if p.ndim != 2], lr=5e-3),
        ]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for one in self.all:
            one.zero_grad()

    def step(self) -> None:
        """Step all."""
        for one in self.all:
            one.step()


class OfWhole(torch.optim.Optimizer):
    """Steps shards by optimizers of the whole parameters, which it brings together.

    torch's own Muon multiplies shards of FSDP2 in another order, to other bits.

    Args:
        model: has the shards: ``Shards``, or a model of FSDP2.
        make: makes the optimizer of whole parameters.
    """

    def __init__(self, model: nn.Module, make: Callable[..., Any]) -> None:
        super().__init__(model.parameters(), {})
        self.model = model
        self.whole = [nn.Parameter(value) for value, _, _ in self._now(grads=False)]
        self.inner = make(self.whole)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step what the shards are of."""
        assert closure is None
        now = list(self._now(grads=True))
        for whole, (value, grad, _) in zip(self.whole, now, strict=True):
            whole.copy_(value)
            whole.grad = grad
        self.inner.step()
        for whole, (_, _, shards) in zip(self.whole, now, strict=True):
            for place, shard in shards.items():
                shard.copy_(whole.chunk(INSIDE)[place])

    @torch.no_grad()
    def _now(self, *, grads: bool) -> Iterator[tuple[Tensor, Any, dict[int, Tensor]]]:
        """Yield whole parameters, gradients, and this rank's shards by place."""
        if not isinstance(self.model, Shards):
            parameters: Any = self.model.parameters()
            for p in parameters:
                grad = p.grad.full_tensor() if grads else None
                place = p.device_mesh.get_local_rank()
                yield p.full_tensor(), grad, {place: p.to_local()}
            return
        for name in self.model.names:
            mine: dict[int, Tensor] = dict(enumerate(self.model.parts(name)))
            held: Any = [p.grad for p in mine.values()]
            grad = torch.cat(held) if grads else None
            yield self.model.whole(name).detach().clone(), grad, mine


def make_optimizer(kind: str, model: nn.Module) -> tuple[Any, Any]:
    """Return what is stepped, and what is given to ``attach``."""
    if kind == "muon" and not isinstance(model, DistributedDataParallel):
        both: Any = OfWhole(model, Several)
        return both, both
    if kind == "muon":
        several = Several(model.parameters())
        return several, several.all
    made = OPTIMIZERS[kind](model.parameters())
    return made, made


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


def wrapped(mesh: DeviceMesh) -> nn.Module:
    """Return the model in DDP over the ranks of a site."""
    return DistributedDataParallel(net(), process_group=mesh.get_group("inside"))


def held(world: int, form: str) -> tuple[nn.Module, DeviceMesh]:
    """Return the model as a form holds it inside of a site, and the mesh."""
    mesh = mesh_of(world)
    if form in HSDP:
        shape = (world // INSIDE, *HSDP[form])
        names = ("between", "replicate", "shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        model = net()
        shard: Any = fully_shard
        shard(model, mesh=mesh["replicate", "shard"])
        return model, mesh
    if form == "tensor parallel":  # a layer's columns, the next one's rows, one whole
        styles = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
        return parallelize_module(net(), mesh["inside"], styles), mesh
    return sharded(mesh) if form == "fsdp2" else wrapped(mesh), mesh


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
    return {name: model.parts(name)[place].detach().clone() for name in model.names}


def locals_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what this rank holds of a model."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return {name: local(p).clone() for name, p in model.named_parameters()}


def for_sites(
    rank: int, world: int, kind: str, steps: int, knobs: dict[str, Any]
) -> tuple[list[list[dict[str, Tensor]]], int]:
    """Train a plain rank for each site; return what places hold after steps, bytes."""
    model = Shards(net())
    optimizer, given = make_optimizer(kind, model)
    state = local_sgd.attach(model, given, CONFIG, **knobs)
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
    rank: int, world: int, form: str, kind: str, steps: int, knobs: dict[str, Any]
) -> tuple[list[dict[str, Tensor]], int]:
    """Train inside of sites; return what is held after steps, and bytes."""
    model, mesh = held(world, form)
    optimizer, given = make_optimizer(kind, model)
    state = local_sgd.attach(model, given, CONFIG, mesh=mesh, **knobs)
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


class Replay(torch.optim.Optimizer):
    """Steps ``Shards`` to what ranks of a site held after theirs.

    Args:
        model: the model.
        recorded: shards by name, of each place, after each step.
    """

    def __init__(
        self, model: Shards, recorded: Sequence[Sequence[dict[str, Tensor]]]
    ) -> None:
        super().__init__(model.parameters(), {})
        self.model, self.recorded = model, iter(recorded)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step to what comes next."""
        assert closure is None
        for place, shards in enumerate(next(self.recorded)):
            for name, values in shards.items():
                self.model.parts(name)[place].copy_(values)


def torchs_muon_in_sites(
    rank: int, world: int, steps: int, knobs: dict[str, Any]
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Train by torch's own Muon on FSDP2's shards.

    Returns:
        What this rank holds after each step of the optimizers, and after lc3's.
    """
    mesh = mesh_of(world)
    model = sharded(mesh)
    several = Several(model.parameters())
    stepped: list[dict[str, Tensor]] = []
    several.all[-1].register_step_post_hook(lambda *_: stepped.append(locals_of(model)))
    state = local_sgd.attach(model, several.all, CONFIG, mesh=mesh, **knobs)
    found = []
    for step in range(steps):
        step_of_site(model, several, rank, step)
        found.append(locals_of(model))
    state.sync()
    state.check_replicas()
    state.close()
    return list(zip(stepped, found, strict=True))


def replayed_for_sites(
    rank: int,
    world: int,
    recorded: Sequence[Sequence[Sequence[dict[str, Tensor]]]],
    knobs: dict[str, Any],
) -> list[list[dict[str, Tensor]]]:
    """Exchange what each site held after its steps; return what places hold then."""
    model = Shards(net())
    optimizer = Replay(model, recorded[rank])
    state = local_sgd.attach(model, optimizer, CONFIG, **knobs)
    found = []
    for _ in recorded[rank]:
        optimizer.step()
        found.append([shards_of(model, place) for place in range(INSIDE)])
    state.close()
    return found


def muon_of_whole(rank: int, world: int) -> list[list[dict[str, Tensor]]]:
    """Let Muon of whole matrices make a site's first step.

    Returns:
        What places hold before, and after it.
    """
    model = Shards(net())
    optimizer, _ = make_optimizer("muon", model)
    found = [[shards_of(model, place) for place in range(INSIDE)]]
    step_for_site(model, optimizer, rank, 0)
    found.append([shards_of(model, place) for place in range(INSIDE)])
    return found


def resumes(rank: int, world: int, form: str, folder: str) -> bool:
    """Train twenty steps at once, and ten and ten from a file; compare the bits."""
    ends = []
    for stop in (None, 10):
        model, mesh = held(world, form)
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
                model, optimizer, state = _loaded(world, form, path)
            step_of_site(model, optimizer, rank, step)
        ends.append(locals_of(model))
        state.close()
    return all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def saved_between_exchanges(rank: int, world: int, form: str, folder: str) -> Any:
    """Train and save every rank's state; return the masters of this rank's shard."""
    model, mesh = held(world, form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, **OTHER_KNOBS)
    for step in range(10):
        step_of_site(model, optimizer, rank, step)
    torch.save(state.state_dict(), Path(folder) / f"{form}-{rank}.pt")
    masters = state.session.lane.call(state.owners.export)
    state.close()
    return masters


def other_sites(rank: int, world: int, form: str, folder: str, before: int) -> Any:
    """Go on with other sites than have saved; return masters, and whether all agree.

    Args:
        before: how many sites there were.
    """
    model, mesh = held(world, form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, **OTHER_KNOBS)
    ranks = [site * INSIDE + rank % INSIDE for site in range(before)]
    states = [
        torch.load(Path(folder) / f"{form}-{one}.pt", weights_only=True)
        for one in ranks
    ]
    state.load_state_dict(merge_states(states))
    masters = state.session.lane.call(state.owners.export)
    for step in range(10, 16):
        step_of_site(model, optimizer, rank, step)
    state.sync()
    state.check_replicas()
    state.close()
    return masters


def _loaded(world: int, form: str, path: Path) -> tuple[nn.Module, Any, Any]:
    saved = torch.load(path, weights_only=True)
    model, mesh = held(world, form)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step_of_site(model, optimizer, 0, 0)  # makes the optimizer's state
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = {name: local(p) for name, p in inner.named_parameters()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved["model"][name])
        for mine, theirs in zip(
            optimizer.state.values(), saved["optimizer"], strict=True
        ):
            for key, value in mine.items():
                local(value).copy_(theirs[key])
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=4)
    with torch.no_grad():  # attach has copied the first site's
        for name, p in parameters.items():
            p.copy_(saved["model"][name])
    state.load_state_dict(saved["lc3"])
    return model, optimizer, state


def nan_in_a_shard(rank: int, world: int, form: str) -> dict[str, Any]:
    """Let one shard of one site be NaN once; return what becomes of it."""
    model, mesh = held(world, form)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=4)
    losses = []
    for step in range(60):
        step_of_site(model, optimizer, rank, step)
        if step == 9 and rank == 3:
            parameters: Any = list(model.parameters())
            with torch.no_grad():
                local(parameters[0])[0, 0] = math.nan
        with torch.no_grad():
            losses.append(float(model(batch(9, 9)).square().mean()))
    left_out = state.left_out
    state.sync()
    state.check_replicas()
    state.close()
    return {"first": losses[0], "last": losses[-1], "left_out": left_out}


def loaded(rank: int, world: int, form: str, on_one: bool) -> bool:
    """Load other weights everywhere, or on rank 0 only; return whether they hold."""
    model, mesh = held(world, form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=2)
    for step in range(4):
        step_of_site(model, optimizer, rank, step)
    parameters: Any = list(model.parameters())
    with torch.no_grad():
        for parameter in parameters if rank == 0 or not on_one else ():
            local(parameter).fill_(0.25)
    if on_one:
        state.rebase()
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
    if what == "deepspeed":
        model = type("DeepSpeedEngine", (Net,), {"__module__": "deepspeed.engine"})()
    if what == "shards of another dimension in one site" and rank > 1:
        model = net()
        columns: Any = fully_shard
        columns(model, mesh=mesh["inside"], shard_placement_fn=_columns)
    if what == "two halves of a site":
        half = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
        shard: Any = fully_shard
        model = net()
        shard(model, mesh=half["b"])
    if what == "averaged over all ranks":
        model = DistributedDataParallel(net())
    if what == "other values on one rank":
        model = wrapped(mesh)
        with torch.no_grad():
            next(model.parameters())[0, 0] += rank == 3
    if what == "other shapes on one rank" and rank == 1:
        model.extra = nn.Linear(2, 2)
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
        "number": 3,
        "a word": "2",
        "flat": init_device_mesh("cpu", (world,)),
        "other ranks": DeviceMesh("cpu", [[0, 2], [1, 3]]),
        "two halves of a site": world,
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


def _columns(parameter: nn.Parameter) -> Shard:
    return Shard(parameter.ndim - 1)


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    """Train a model of columns, rows and whole parameters; return what it comes to."""
    model, mesh = held(world, "tensor parallel")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=4)
    losses = []
    for step in range(20):  # ranks of a site have the same batches
        step_of_site(model, optimizer, rank // INSIDE, step)
        losses.append(float(model(batch(9, 9)).square().mean().detach()))
    state.sync()
    state.check_replicas()
    found = {
        "first": losses[0],
        "last": losses[-1],
        "numel": sum(state.engine.plan.numel.values()),
        "whole": {n: t for n, t in locals_of(model).items() if "layers.2" in n},
    }
    state.close()
    return found


def unused(rank: int, world: int, form: str) -> bool:
    """Train a model of which one parameter is not used; return whether it stays."""
    mesh = mesh_of(world)
    model = net()
    model.extra = nn.Parameter(torch.ones(6, 4))
    inside = mesh.get_group("inside")
    if form == "ddp":
        model = DistributedDataParallel(
            model, process_group=inside, find_unused_parameters=True
        )
    else:
        shard: Any = fully_shard
        shard(model, mesh=mesh["inside"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh, sync_every=2)
    for step in range(6):
        step_of_site(model, optimizer, rank, step)
    state.sync()
    state.close()
    return bool((locals_of(model)["extra"] == 1).all())


def odd_shapes(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Train sites under DDP with a number among the parameters, and a lone element."""
    mesh = mesh_of(world)
    model = net()
    model.scale = nn.Parameter(torch.tensor(1.5))
    model.shift = nn.Parameter(torch.tensor([0.5]))
    forward = model.forward
    model.forward = lambda x: forward(x) * model.scale + model.shift
    wrapper = DistributedDataParallel(model, process_group=mesh.get_group("inside"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    state = local_sgd.attach(wrapper, optimizer, CONFIG, mesh=mesh, sync_every=3)
    saved = []
    for step in range(8):
        step_of_site(wrapper, optimizer, rank, step)
        if step == 4:
            saved = state.gather_state()
    state.sync()
    state.check_replicas()
    assert saved or rank
    state.close()
    found = locals_of(model)
    return [{name: found[name] for name in ("scale", "shift")}]


def unused_fragment(rank: int, world: int) -> bool:
    """Exchange a fragment that gets no gradient, with the knobs that lc3 chooses."""
    mesh = mesh_of(world)
    model = net()
    model.extra = nn.Linear(6, 4)  # the last fragment
    shard: Any = fully_shard
    shard(model, mesh=mesh["inside"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    state = local_sgd.attach(
        model, optimizer, CONFIG, mesh=mesh, sync_every=4, fragments=4
    )
    before = locals_of(model)["extra.weight"].clone()
    for step in range(8):
        step_of_site(model, optimizer, rank, step)
    state.sync()
    assert state.knobs.inner_momentum_scale != 1
    state.close()
    return torch.equal(before, locals_of(model)["extra.weight"])


def states_of_all(world: int) -> tuple[local_sgd.State, list[Any]]:
    """Return the state of a sharded model, and what every rank saves of its own."""
    mesh = mesh_of(world)
    model = sharded(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = local_sgd.attach(model, optimizer, CONFIG, mesh=mesh)
    states: list[Any] = [None] * world
    dist.all_gather_object(states, state.state_dict())
    return state, states


def merged(rank: int, world: int) -> list[str]:
    """Merge states of sites that do not belong together; return what is said."""
    state, states = states_of_all(world)
    some = states, states[::3]
    said = [said_by(partial(merge_states, of_places)) for of_places in some]
    merge_states(states[::2])
    state.close()
    return said


def others_state(rank: int, world: int) -> str:
    """Load the state of the other shard; return what is said."""
    state, states = states_of_all(world)
    said = said_by(lambda: state.load_state_dict(states[rank ^ 1]))
    gathered: list[Any] = [state.gather_state()]
    dist.broadcast_object_list(gathered)
    said += said_by(lambda: state.load_gathered(gathered[0][:3]))
    state.load_gathered(gathered[0])
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
