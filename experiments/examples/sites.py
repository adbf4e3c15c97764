"""A transformer on sites of two ranks: FSDP2 inside, local steps between.

torchrun --nproc-per-node 4 -m experiments.examples.sites CHECKPOINTS STEPS
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states

import lc3
from experiments.harness.models import Transformer
from lc3.hooks import local_sgd

dist.init_process_group("gloo")
text = torch.tensor(list("".join(topics.values()).encode()))
names, world = ("between", "inside"), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=names)
folder, inside = Path(sys.argv[1]) / f"site-{mesh.get_local_rank(0)}", mesh.get_group(1)
model = Transformer(256, 64, width=32, depth=2, heads=2)
dist.fsdp.fully_shard(model, mesh=mesh["inside"])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
state = local_sgd.attach(model, optimizer, mesh=mesh, sync_every=8)


def loss_of(starts: torch.Tensor) -> torch.Tensor:  # noqa: D103
    windows = text[starts[:, None] + torch.arange(65)]
    logits = model(windows[:, :-1]).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())


done = [int(path.parent.name) for path in folder.glob("*/.metadata")]
everywhere: list[list[int]] = [[]] * world
dist.all_gather_object(everywhere, done)  # sites share no disk
if first := max(set.intersection(*map(set, everywhere)), default=0):
    weights, moments = states.get_state_dict(model, optimizer)
    kept = {"model": weights, "optimizer": moments, "lc3": lc3.PerRank(state)}
    dcp.load(kept, checkpoint_id=folder / str(first), process_group=inside)
    states.set_model_state_dict(model, weights)
    states.set_optimizer_state_dict(model, optimizer, moments)
for step in range(first, int(sys.argv[2])):
    torch.manual_seed(1000 * step + dist.get_rank())
    optimizer.zero_grad()
    loss_of(torch.randint(len(text) - 65, (8,))).backward()
    optimizer.step()
    if step % 16 == 15:
        weights, moments = states.get_state_dict(model, optimizer)
        kept = {"model": weights, "optimizer": moments, "lc3": lc3.PerRank(state)}
        dcp.save(kept, checkpoint_id=folder / str(step + 1), process_group=inside)
state.sync()
loss = loss_of(torch.arange(0, 6400, 100)).item()
if dist.get_rank() == 0:
    print(f"from step {first}: loss {loss:.4f}")
state.close()
dist.destroy_process_group()
