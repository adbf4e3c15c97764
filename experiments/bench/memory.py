"""Measures memory: bytes a parameter on each rank, beside plain DDP.

    python -m experiments.bench.memory --ranks 2 --million 16

FSDP2 and sites shard the model over two ranks: of four ranks there are two sites. Every
form trains the same stack of linear layers for a few steps in processes of its
own, and tells how much memory the process holds then, and at most, more than plain DDP
with the same optimizer does. Buckets and messages of a step are a part of the most.
"""

import argparse
import ctypes
import gc
import itertools
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from experiments.record import RESULTS, stamped, write_csv
from experiments.tables import insert
from lc3.hooks import ddp, fsdp2, local_sgd, push_pull

STEPS, WIDTH = 4, 1024
ADAMW = partial(torch.optim.AdamW, lr=1e-4)
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
COLUMNS = "form", "optimizer", "ranks", "parameters", "held", "most"
Made = tuple[nn.Module, Any, Any]  # model, optimizer, state


def plain(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return DDP without lc3."""
    return DistributedDataParallel(net), make(net.parameters()), None


def with_ddp(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return DDP with lc3's lines."""
    model, optimizer = DistributedDataParallel(net), make(net.parameters())
    return model, optimizer, ddp.attach(model, optimizer)


def with_ddp_alone(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return DDP with lc3's hook, which knows no optimizer."""
    model, optimizer = DistributedDataParallel(net), make(net.parameters())
    return model, optimizer, ddp.attach(model)


def with_ddp_and_scaler(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return DDP with lc3's hook, which can undo a step that a scaler skips."""
    model, optimizer = DistributedDataParallel(net), make(net.parameters())
    return model, optimizer, ddp.attach(model, scaler=GradScaler("cpu"))


def with_push_pull(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return DDP whose optimizer is at the owners."""
    model = DistributedDataParallel(net)
    optimizer = push_pull.attach(model, make)
    return model, optimizer, optimizer


def with_local_sgd(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return a module that makes local steps."""
    optimizer = make(net.parameters())
    return net, optimizer, local_sgd.attach(net, optimizer, sync_every=2)


def mesh_of() -> DeviceMesh:
    """Return sites of two ranks."""
    shape = dist.get_world_size() // 2, 2
    return init_device_mesh("cpu", shape, mesh_dim_names=("between", "inside"))


def sharded(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Return a module that FSDP2 shards inside of a site, layer by layer."""
    shard: Any = fully_shard
    for layer in net.children():
        shard(layer, mesh=mesh["inside"])
    shard(net, mesh=mesh["inside"])
    return net


def fsdp2_alone(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return FSDP2 without lc3."""
    model = sharded(net, mesh_of())
    return model, make(model.parameters()), None


def with_fsdp2(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return FSDP2 whose shards are averaged in every step."""
    mesh = mesh_of()
    model = sharded(net, mesh)
    return model, make(model.parameters()), fsdp2.attach(model, mesh)


def with_sites(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return FSDP2 inside of sites that make local steps."""
    mesh = mesh_of()
    model = sharded(net, mesh)
    optimizer = make(model.parameters())
    return model, optimizer, local_sgd.attach(model, optimizer, mesh=mesh, sync_every=2)


def with_sites_of_ddp(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return DDP inside of sites that make local steps."""
    mesh = mesh_of()
    model = DistributedDataParallel(net, process_group=mesh.get_group("inside"))
    optimizer = make(net.parameters())
    return model, optimizer, local_sgd.attach(model, optimizer, mesh=mesh, sync_every=2)


FORMS = {
    "DDP": plain,
    "hooks.ddp": with_ddp,
    "hooks.ddp, no optimizer given": with_ddp_alone,
    "hooks.ddp, a GradScaler given": with_ddp_and_scaler,
    "hooks.push_pull": with_push_pull,
    "hooks.local_sgd": with_local_sgd,
    "hooks.local_sgd, DDP inside": with_sites_of_ddp,
    "FSDP2": fsdp2_alone,
    "hooks.fsdp2": with_fsdp2,
    "hooks.local_sgd, FSDP2 inside": with_sites,
}
SHARDED = "FSDP2", "hooks.fsdp2", "hooks.local_sgd, FSDP2 inside"


def measure(
    rank: int, world: int, form: str, kind: str, layers: int, folder: str
) -> None:
    """Train, and write this rank's bytes beyond those before the model."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    torch.manual_seed(0)
    with trained(form, kind, 1, 64):  # what is compiled and loaded is no one's
        pass
    gc.collect()
    before = _held()
    with trained(form, kind, layers, WIDTH):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        gc.collect()
        Path(folder, f"{rank}").write_text(f"{_held() - before} {most - before}")
    dist.destroy_process_group()


@contextmanager
def trained(form: str, kind: str, layers: int, width: int) -> Iterator[None]:
    """Have trained a stack of layers for a few steps, until the end of the context."""
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    model, optimizer, state = FORMS[form](net, ADAMW if kind == "AdamW" else SGD)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(2, width)).square().mean().backward()
        optimizer.step()
    yield
    if state is not None:
        state.close()


def _held() -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is the system's again
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def of(form: str, kind: str, world: int, layers: int) -> tuple[float, float]:
    """Return bytes a parameter that a rank holds, and at most."""
    with TemporaryDirectory() as folder:
        mp.spawn(measure, (world, form, kind, layers, folder), nprocs=world, join=True)
        said = [Path(folder, f"{rank}").read_text().split() for rank in range(world)]
    parameters = layers * WIDTH * WIDTH
    held, most = (max(int(one[i]) for one in said) / parameters for i in range(2))
    return held, most


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return what rows say, as a Markdown table."""
    lines = [
        "| form | optimizer | ranks | million parameters | bytes a parameter "
        "| beside plain | at most | beside plain |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    keys = ("optimizer", "ranks", "parameters")
    for row in rows:
        plain_form = "FSDP2" if row["form"] in SHARDED else "DDP"
        (base,) = (
            r
            for r in rows
            if r["form"] == plain_form and all(str(r[k]) == str(row[k]) for k in keys)
        )
        figures = ""
        for column in ("held", "most"):
            value = float(row[column])
            figures += f"| {value:.1f} | {value - float(base[column]):+.1f} "
        lines.append(
            f"| {row['form']} | {row['optimizer']} | {row['ranks']} "
            f"| {int(row['parameters']) / 1e6:.0f} {figures}|"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every form, write rows, print the table."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.memory", description=__doc__
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="processes")
    parser.add_argument(
        "--million", type=int, nargs="+", default=[16], help="parameters"
    )
    parser.add_argument("--optimizers", nargs="+", default=["SGD", "AdamW"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.csv")
    parser.add_argument("--docs", type=Path, help="a page with a block for the table")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for million, world, kind, form in itertools.product(
        options.million, options.ranks, options.optimizers, options.forms
    ):
        layers = max(1, round(million * 1e6 / WIDTH**2))
        held, most = of(form, kind, world, layers)
        values = form, kind, world, layers * WIDTH**2, held, most
        rows += stamped([dict(zip(COLUMNS, values, strict=True))])
        write_csv(options.out, rows)
    print(table(rows))
    if options.docs is not None:
        page = options.docs.read_text()
        options.docs.write_text(insert(page, "memory", table(rows)))


if __name__ == "__main__":
    main()
