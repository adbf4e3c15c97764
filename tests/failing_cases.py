"""One rank fails before, in or after attach: what the others get, and when."""

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lc3
from lc3.codec import Encoded, cpu
from lc3.config import Settings
from lc3.hooks import ddp, local_sgd, push_pull
from lc3.session import attaching
from lc3.transport import channel
from lc3.wire.coder import Coder
from tests.ddp_cases import Broken, count_held

LATE_S = 1.5
SGD = partial(torch.optim.SGD, lr=0.1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 64)


def good(form: str) -> Callable[[], Any]:
    """Return what attaches a form rightly."""
    model: Any = net()
    optimizer = SGD(model.parameters())
    if form == "local_sgd":
        return lambda: local_sgd.attach(model, optimizer)
    wrapped = DistributedDataParallel(model)
    if form == "push_pull":
        return lambda: push_pull.attach(wrapped, SGD)
    return lambda: ddp.attach(wrapped, optimizer)


def wrong(form: str) -> Callable[[], Any]:
    """Return what attaches it wrongly, on one rank, before anything is exchanged."""
    model: Any = net()
    wrapped: Any = DistributedDataParallel(model)
    optimizer: Any = SGD(model.parameters())
    return {
        "ddp": lambda: ddp.attach(wrapped, "adam"),  # type: ignore[arg-type]
        "ddp, not wrapped": lambda: ddp.attach(model, optimizer),
        "ddp, a word": lambda: ddp.attach(wrapped, optimizer, max_norm="1"),  # type: ignore[arg-type]
        "push_pull": lambda: push_pull.attach(wrapped, SGD, max_norm=-1.0),
        "push_pull, later": lambda: push_pull.attach(wrapped, _broken),
        "local_sgd": lambda: local_sgd.attach(wrapped, optimizer, sync_every=0),
    }[form]


def _broken(_: Any) -> Any:
    raise MemoryError("no memory left for moments")


def attached_wrongly(rank: int, world: int, form: str) -> tuple[str, float]:
    """Attach wrongly on rank 1; what is said, and the seconds until then."""
    attach = wrong(form) if rank == 1 else good(form.partition(",")[0])
    if rank != 1 and form == "local_sgd":
        DistributedDataParallel(net())  # collective, as the other's
    began = time.monotonic()
    try:
        attach()
    except Exception as error:  # noqa: BLE001  # it is the result
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "attached", 0.0


def comes_late(rank: int, world: int) -> str:
    """Fail on rank 1 in backward; the others come when it has gone."""
    model = DistributedDataParallel(net())
    state = ddp.attach(model)
    channel._ABORT_TIMEOUT_S = 0.2
    if rank == 1:
        state.engine.messages.coder = Coder(Broken())
    else:
        time.sleep(LATE_S)
    try:
        model(torch.randn(4, 64)).square().mean().backward()
    except Exception as error:  # noqa: BLE001  # it is the result
        said = f"{type(error).__name__}: {error}"
    else:
        said = "trained"
    channel._ABORT_TIMEOUT_S = 5.0
    state.close()
    return said


class BrokenLater(Broken):
    """Memory for one message, and no more."""

    def __init__(self) -> None:
        self.left = 1

    def encode_all(self, *given: Any) -> list[Encoded]:
        """See ``lc3.codec.cpu.encode_all``."""
        if not self.left:
            raise MemoryError("no memory left for frames")
        self.left -= 1
        return cpu.encode_all(*given)


def fails_midway(rank: int, world: int) -> tuple[str, str]:
    """Fail on rank 1 when the message to one of the others has left already."""
    model = DistributedDataParallel(nn.Linear(600, 600))
    state = ddp.attach(model, config=Settings(topology="owners"))
    said = ""
    for step in range(2):  # norms are measured in the first: all are made at once
        if rank == 1 and step:
            state.engine.messages.coder = Coder(BrokenLater())
        try:
            model(torch.randn(4, 600)).square().mean().backward()
        except Exception as error:  # noqa: BLE001  # it is the result
            said = f"{type(error).__name__}: {error}"
    began = time.monotonic()
    state.close()
    return said, "late" if time.monotonic() - began > 5 else "soon"


def failed_attaches(rank: int, world: int, count: int) -> dict[str, int]:
    """Attach wrongly again and again; what is held more than after the first."""
    model = DistributedDataParallel(net())
    held: list[dict[str, int]] = []
    for number in range(count):
        wrongly: list[Callable[[], Any]] = [
            lambda: ddp.attach(model, config=Settings(exclude=("nothing",))),
            lambda: ddp.attach(model, "adam"),  # type: ignore[arg-type]
            lambda: push_pull.attach(model, _broken),
        ]
        for attach in wrongly:
            try:
                attach()
            except Exception:  # noqa: BLE001  # it is what is tried
                gc.collect()
        if number in (0, count - 1):
            held.append(count_held())
    return {what: held[-1][what] - held[0][what] for what in held[0]}


def refuses_alone(rank: int, world: int) -> tuple[str, float]:
    """Attach wrongly on rank 0 only, while the others never attach."""
    said, took, attaching._REFUSE_S = "", 0.0, 1.0
    if rank == 0:
        began = time.monotonic()
        try:
            ddp.attach(net())  # type: ignore[arg-type]
        except lc3.AttachError as error:
            said, took = str(error), time.monotonic() - began
    time.sleep(3.0)
    return said, took


def replicas_compared(rank: int, world: int, form: str) -> list[str]:
    """Change a parameter on one rank after three steps; what backward says."""
    model = DistributedDataParallel(net())
    state: Any
    optimizer: Any
    if form == "ddp":
        optimizer = SGD(model.parameters())
        state = ddp.attach(model, optimizer, check_every=2)
    else:
        optimizer = state = push_pull.attach(model, SGD, check_every=2)
    said = []
    for step in range(6):
        try:
            model(torch.randn(4, 64)).square().mean().backward()
        except lc3.ReplicasDiffer as error:
            said.append(f"{step}: {error}")
            break
        optimizer.step()
        optimizer.zero_grad()
        if step == 2 and rank == 1 and form == "ddp":
            with torch.no_grad():
                model.module.bias[3] += 1e-6
    state.close()
    return said


def check_every_refused(rank: int, world: int, value: Any) -> str:
    """Attach with an interval for each rank; what is said."""
    model = DistributedDataParallel(net())
    try:
        ddp.attach(model, check_every=value[rank])
    except lc3.Lc3Error as error:
        return str(error)
    return "attached"
