"""What the ranks of ``test_two_levels`` do: each function runs on every rank."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import lc3
from lc3.config import Settings
from lc3.engines.two_levels import TwoLevels
from lc3.hooks import ddp
from lc3.wire.coder import Coder
from tests.ddp_cases import CONFIG, Broken, Deep, hash_of


def start(mesh: Any, attached: bool = True) -> tuple[Any, Any, Any]:
    """Return a wrapped model, its state, an optimizer."""
    torch.manual_seed(3)
    model = DistributedDataParallel(Deep(4), bucket_cap_mb=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = ddp.attach(model, config=CONFIG, mesh=mesh) if attached else None
    return model, state, optimizer


def train(rank: int, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()


def hash_with(rank: int, world: int, what: str) -> str:
    """Return the hash of a model trained in some way."""
    meshes = {
        "mesh=1": 1,
        "mesh=2": 2,
        "one node": world,
        "device mesh": init_device_mesh(
            "cpu", (2, world // 2), mesh_dim_names=("between", "inside")
        ),
    }
    model, state, optimizer = start(meshes.get(what), what != "plain DDP")
    train(rank, model, optimizer, range(6))
    if state is not None:
        state.check_replicas()
        assert isinstance(state.engine, TwoLevels) == (what not in ("flat", "mesh=1"))
        state.close()
    return hash_of(model.module)


def refused(rank: int, world: int, what: str) -> str:
    """Attach with a mesh that does not fit; return the error."""
    meshes: dict[str, Any] = {
        "3 in a node": 3,
        "0 in a node": 0,
        "true": True,
        "one dimension": init_device_mesh("cpu", (world,)),
        "differs": 2 if rank else None,
        "differs among meshes": 2 if rank else 1,
    }
    config = Settings(mode="auto") if what == "auto" else CONFIG
    model = DistributedDataParallel(nn.Linear(64, 64))
    try:
        ddp.attach(model, config=config, mesh=meshes.get(what, 2))
    except lc3.Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    return "attached"


def a_rank_fails(rank: int, world: int, failing: int) -> list[str]:
    """Let one rank fail in step 1; return what backward says, until the end."""
    model, state, _ = start(2)
    said = []
    for step in range(3):
        if rank == failing and step == 1:
            state.engine.messages.coder = Coder(Broken())
        try:
            model(torch.randn(4, 64)).square().mean().backward()
        except Exception as error:  # noqa: BLE001  # it is the result
            said.append(f"{type(error).__name__}: {error}")
    state.close()
    return said


def resumes_bit_for_bit(rank: int, world: int, folder: str) -> bool:
    """Ten steps; or five, everything saved, loaded into a new model, and five more."""
    model, state, optimizer = start(2)
    train(rank, model, optimizer, range(10))
    straight = hash_of(model.module)
    state.close()
    model, state, optimizer = start(2)
    train(rank, model, optimizer, range(5))
    path = Path(folder) / f"{rank}.pt"
    parts = {"m": model.state_dict(), "o": optimizer.state_dict()}
    torch.save({"lc3": state.state_dict(), **parts}, path)
    state.close()
    model, state, optimizer = start(2)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    state.load_state_dict(saved["lc3"])
    train(rank, model, optimizer, range(5, 10))
    state.close()
    return hash_of(model.module) == straight


def through_a_merge(rank: int, world: int, before: Any, after: Any) -> list[float]:
    """Save with one mesh, merge, load with another; return how far pending moved."""
    model, state, optimizer = start(before)
    train(rank, model, optimizer, range(5))
    owed: dict[str, Tensor] = state.pending()
    states: list[Any] = [None] * world
    dist.all_gather_object(states, state.state_dict())
    state.close()
    model, state, _ = start(after)
    said = ""
    if before != after:
        try:
            state.load_state_dict(states[rank])
        except lc3.StateError as error:
            said = str(error)
        assert "senders of each element" in said
    state.load_state_dict(lc3.merge_states(states))
    found = state.pending()
    state.flush()
    assert not any(tensor.any() for tensor in state.pending().values())
    state.close()
    return [float((found[n] - owed[n]).norm() / owed[n].norm()) for n in owed]


def with_a_scaler(rank: int, world: int, mesh: Any) -> tuple[str, float]:
    """Train in float16 units with a step that overflows on one rank."""
    torch.manual_seed(3)
    model = DistributedDataParallel(Deep(4), bucket_cap_mb=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    state = ddp.attach(model, config=CONFIG, mesh=mesh, scaler=scaler)
    for step in range(8):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        x = torch.randn(4, 64)
        if step == 5 and rank == 1:
            x[0, 0] = torch.inf
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    state.check_replicas()
    state.close()
    return hash_of(model.module), scaler.get_scale()


def bytes_of(rank: int, world: int, mesh: int | None) -> dict[str, int]:
    """Return what a rank sent in five steps."""
    model, state, optimizer = start(mesh)
    train(rank, model, optimizer, range(5))
    inside = state.engine.inside.meter.sent_bytes if mesh else 0
    sent = {"meter": state.meter.sent_bytes, "inside": inside}
    assert state.meter.steps == 5
    state.close()
    return sent
