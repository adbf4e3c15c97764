"""A transformer on two sites of two ranks: FSDP2 inside, local steps between.

torchrun --nproc-per-node 4 -m experiments.examples.sites CHECKPOINTS [STEPS]
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lc3
from experiments.models import Transformer
from lc3.hooks import local_sgd

folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 64
text = torch.frombuffer(bytearray("".join(topics.values()), "utf-8"), dtype=torch.uint8)
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "inside"))
site, group = f"site-{mesh.get_local_rank('between')}", mesh.get_group("inside")
torch.manual_seed(0)
model = Transformer(256, 64, width=32, depth=2, heads=2)
fully_shard(model, mesh=mesh["inside"])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
state = local_sgd.attach(model, optimizer, mesh=mesh, sync_every=8)


def parts() -> dict[str, Any]:
    """Return all that goes on: of a site the model and optimizer, of a rank lc3's."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "lc3": lc3.PerRank(state)}


def place(step: int) -> dict[str, Any]:
    """Return where a site's checkpoint of a step is, and whose it is."""
    return {"checkpoint_id": folder / f"{step}/{site}", "process_group": group}


done = [int(path.parent.parent.name) for path in folder.glob(f"*/{site}/.metadata")]
everywhere: list[Any] = [None] * dist.get_world_size()
dist.all_gather_object(everywhere, done)  # sites share no disk
first = max(set.intersection(*map(set, everywhere)), default=0)
if first:
    dcp.load(saved := parts(), **place(first))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
    )
for step in range(first, steps):
    torch.manual_seed(1000 * step + dist.get_rank())
    windows = text[torch.randint(len(text) - 65, (8, 1)) + torch.arange(65)].long()
    logits = model(windows[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 16 == 15:
        dcp.save(
            parts(), checkpoint_id=folder / f"{step + 1}/{site}", process_group=group
        )
state.sync()
with torch.no_grad():
    windows = text[torch.arange(0, 6400, 100)[:, None] + torch.arange(65)].long()
    logits = model(windows[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
if dist.get_rank() == 0:
    ratio = state.meter.ratio
    print(f"from step {first}: loss {loss:.4f}, {ratio:.0f} times fewer bytes")
state.close()
dist.destroy_process_group()
