"""Trains one model: the script that every file in launch/ starts.

    torchrun --nproc-per-node 2 -m launch.train --task digits --method 3lc

With ``--checkpoints`` it saves every so many steps, whole or not at all, and goes on
from the last one, on the same number of ranks bit for bit, or on any other.
"""

import argparse
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import lc3
from experiments.harness.tasks import TASKS
from experiments.harness.train import (
    average_buffers,
    batches,
    evaluate,
    schedule,
    train_step,
)
from experiments.lab import ranks
from lc3.hooks import ddp, local_sgd, push_pull

# What is called instead of the module, what is stepped, what keeps lc3's state.
Parts = tuple[nn.Module, list[Optimizer], Any]


def plain(module: nn.Module, optimizers: list[Optimizer]) -> Parts:
    """Train with DDP alone."""
    return DistributedDataParallel(module), optimizers, None


def coded(module: nn.Module, optimizers: list[Optimizer]) -> Parts:
    """Two lines more."""
    model = DistributedDataParallel(module)
    return model, optimizers, ddp.attach(model, optimizers)


def pushed(module: nn.Module, optimizers: list[Optimizer]) -> Parts:
    """Let owners step the optimizer; everybody pulls model deltas."""
    (given,) = optimizers
    make: Callable[..., Optimizer] = type(given)
    if isinstance(given, torch.optim.SGD):
        keys = ("lr", "momentum", "weight_decay", "nesterov")
    else:
        keys = ("lr", "betas", "eps", "weight_decay")
    make = partial(make, **{key: given.defaults[key] for key in keys})
    model = DistributedDataParallel(module)
    optimizer = push_pull.attach(model, make, params=given.param_groups)
    return model, [optimizer], optimizer


def local(module: nn.Module, optimizers: list[Optimizer]) -> Parts:
    """Train alone, and meet every eighth step."""
    return module, optimizers, local_sgd.attach(module, optimizers, sync_every=8)


METHODS = {"float32": plain, "3lc": coded, "push-pull": pushed, "local": local}


def save(folder: Path, step: int, module: nn.Module, kept: Sequence[Any]) -> None:
    """Save every rank's part of a checkpoint; it appears when all of them are there."""
    rank, world = dist.get_rank(), dist.get_world_size()
    unfinished = folder / f"unfinished-{step}"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    parts = [part.state_dict() for part in kept]
    file = unfinished / f"{rank}-of-{world}.pt"
    lc3.save_checkpoint({"model": module.state_dict(), "kept": parts}, file)
    dist.barrier()
    if rank == 0:
        older = list(folder.glob("step-*"))
        unfinished.replace(folder / f"step-{step}")
        for path in older:
            shutil.rmtree(path)


def load(folder: Path, module: nn.Module, kept: Sequence[Any], state: Any) -> int:
    """Load the last checkpoint, if there is one; return its step, or 0."""
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]))
    if not found:
        return 0
    rank, world = dist.get_rank(), dist.get_world_size()
    files = sorted(found[-1].glob("*-of-*.pt"), key=lambda p: int(p.name.split("-")[0]))
    if files and not files[0].name.endswith(f"-of-{len(files)}.pt"):
        raise SystemExit(f"launch.train: {found[-1]} is not whole: {len(files)} files")
    saved = [lc3.load_checkpoint(file) for file in files]
    mine = saved[rank if len(saved) == world else 0]
    module.load_state_dict(mine["model"])
    for index, part in enumerate(kept):
        given = mine["kept"][index]
        if part is state and len(saved) != world:
            given = lc3.merge_states([other["kept"][index] for other in saved])
        part.load_state_dict(given)
    return int(found[-1].name[5:])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="launch.train", description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--method", choices=METHODS, default="3lc")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, help="a folder all ranks share")
    parser.add_argument("--save-every", type=int, default=100)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and say on rank 0 how well."""
    options = parse(arguments)
    try:
        launcher = ranks.init()
    except ranks.LaunchError as error:
        raise SystemExit(f"launch.train: {error}") from error
    first = dist.get_rank() == 0
    task = TASKS[options.task](options.data_dir)
    torch.manual_seed(options.seed)
    module = task.make_model()
    given = task.make_optimizers(module)
    with ranks.connecting():
        model, optimizers, state = METHODS[options.method](module, given)
    rates = [schedule(optimizer, options.steps) for optimizer in optimizers]
    kept = [*dict.fromkeys([*optimizers, *rates, *([state] if state else [])])]
    start = load(options.checkpoints, module, kept, state) if options.checkpoints else 0
    if first:
        print(
            f"{launcher}: {dist.get_world_size()} ranks, from step {start}", flush=True
        )
    data = batches(task, options.seed, options.steps)
    for step, batch in enumerate(itertools.islice(data, start, None), start=start + 1):
        train_step(model, optimizers, batch)
        for rate in rates:
            rate.step()
        if options.checkpoints and step % options.save_every == 0:
            save(options.checkpoints, step, module, kept)
    average_buffers(module)
    _, accuracy = evaluate(module, task.test)
    if first:
        flat = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
        digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]
        saved = state is not None and dist.get_world_size() > 1
        sent = f"{state.meter.ratio:.0f} times fewer bytes, " if saved else ""
        print(f"test accuracy {100 * accuracy:.2f} %, {sent}parameters {digest}")
    if state:
        state.close()
    if launcher != "ray":  # which leaves the group itself
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
