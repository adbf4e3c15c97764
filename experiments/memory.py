"""Measures memory: bytes a parameter on each rank, beside plain DDP.

    python -m experiments.memory --ranks 2 --million 16

Every form trains the same stack of linear layers for a few steps in processes of its
own, and tells how much memory the process holds then, and at most, more than plain DDP
with the same optimizer does. Buckets and messages of a step are a part of the most.
"""

import argparse
import ctypes
import gc
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
from torch.nn.parallel import DistributedDataParallel

from experiments.record import RESULTS, stamped, write_csv
from experiments.tables import insert
from lc3.hooks import ddp, local_sgd, push_pull

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


def with_push_pull(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return DDP whose optimizer is at the owners."""
    model = DistributedDataParallel(net)
    optimizer = push_pull.attach(model, make)
    return model, optimizer, optimizer


def with_local_sgd(net: nn.Module, make: Callable[..., Any]) -> Made:
    """Return a module that makes local steps."""
    optimizer = make(net.parameters())
    return net, optimizer, local_sgd.attach(net, optimizer, sync_every=2)


FORMS = {
    "DDP": plain,
    "hooks.ddp": with_ddp,
    "hooks.push_pull": with_push_pull,
    "hooks.local_sgd": with_local_sgd,
}


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
        "| form | optimizer | ranks | bytes a parameter | beside DDP | at most "
        "| beside DDP |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        (base,) = (
            r
            for r in rows
            if (r["form"], r["optimizer"], r["ranks"])
            == ("DDP", row["optimizer"], row["ranks"])
        )
        figures = ""
        for column in ("held", "most"):
            value = float(row[column])
            figures += f"| {value:.1f} | {value - float(base[column]):+.1f} "
        lines.append(
            f"| {row['form']} | {row['optimizer']} | {row['ranks']} {figures}|"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every form, write rows, print the table."""
    parser = argparse.ArgumentParser(prog="experiments.memory", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="processes")
    parser.add_argument("--million", type=int, default=16, help="parameters")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.csv")
    parser.add_argument("--docs", type=Path, help="a page with a block for the table")
    options = parser.parse_args(arguments)
    layers = max(1, round(options.million * 1e6 / WIDTH**2))
    rows: list[dict[str, Any]] = []
    for world in options.ranks:
        for kind in ("SGD", "AdamW"):
            for form in options.forms:
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
