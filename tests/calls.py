"""What a step costs in Python: calls, calls between rooms, and those that go upward.

    python -m tests.calls

prints a line for every walk on two ranks: one bucket of hooks.ddp with SGD and with
AdamW, one exchange of hooks.local_sgd, one step of hooks.push_pull. A room is a module
of lc3; a call is upward if the room that is called imports, at last, the one it is
called from.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lc3.config import Settings
from lc3.hooks import ddp, local_sgd, push_pull
from tests.ranks import Ranks
from tests.rooms import WHOLE, floors

ROOT = Path(__file__).parents[1]
_FOLDERS = {str(ROOT / "lc3"): "lc3", str(ROOT / "hooks"): "hooks"}
_WARM_UP = 3  # steps that are not counted


def room_of(frame: FrameType | None) -> str | None:
    """Return the room that a frame's code is in; ``None``: it is not lc3's."""
    if frame is None:
        return None
    path = Path(frame.f_code.co_filename)
    for folder, top in _FOLDERS.items():
        if not path.is_relative_to(folder):
            continue
        package, *_ = path.relative_to(folder).parts
        if top == "hooks" or package == "hooks":
            return f"hooks.{path.stem}"
        return f"lc3.{package if package in WHOLE else path.stem}"
    return None


class Calls:
    """Counts calls of lc3's functions, on every thread that it profiles."""

    def __init__(self, floors: dict[str, int]) -> None:
        self.floors = floors
        self.calls = self.crossings = self.upward = 0
        self.rooms: Counter[tuple[str, str]] = Counter()
        self.counting = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not self.counting:
            return
        here = room_of(frame)
        if here is None:
            return
        self.calls += 1
        caller = frame.f_back
        while caller is not None and room_of(caller) is None:
            caller = caller.f_back
        there = room_of(caller)
        if there is None or there == here:
            return
        self.crossings += 1
        self.rooms[there, here] += 1
        self.upward += self.floors.get(here, 0) > self.floors.get(there, 0)


@contextmanager
def profiled(calls: Calls) -> Iterator[None]:
    """Count on this thread and on those that are started now."""
    threading.setprofile(calls)
    sys.setprofile(calls)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def walk(rank: int, world: int, form: str) -> dict[str, Any]:
    """Return what one step of a form takes, on this rank."""

    torch.manual_seed(0)
    module = nn.Linear(256, 64)
    calls = Calls(floors())
    with profiled(calls):
        optimizer: Any
        if form.startswith("ddp"):
            model: Any = DistributedDataParallel(module)
            kind = torch.optim.AdamW if "adamw" in form else torch.optim.SGD
            optimizer = kind(module.parameters(), lr=0.1)
            given = optimizer if "plain" not in form else None
            state: Any = ddp.attach(model, given, Settings(entropy="none"))
        elif form == "local_sgd":
            model = module
            optimizer = torch.optim.AdamW(module.parameters())
            state = local_sgd.attach(
                module, optimizer, Settings(density=0.1), sync_every=1
            )
        else:
            model = DistributedDataParallel(module)
            state = optimizer = push_pull.attach(
                model, partial(torch.optim.SGD, lr=0.1)
            )
        for step in range(_WARM_UP + 1):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 256)).square().mean()
            calls.counting = step == _WARM_UP
            loss.backward()
            optimizer.step()
            calls.counting = False
    state.close()
    return {
        "calls": calls.calls,
        "crossings": calls.crossings,
        "upward": calls.upward,
        "most": calls.rooms.most_common(8),
    }


FORMS = ("ddp, plain", "ddp, sgd", "ddp, adamw", "local_sgd", "push_pull")


def main() -> None:
    """Print every walk."""
    ranks = Ranks(2)
    for form in FORMS:
        found = ranks.run(walk, form)[0]
        most = ", ".join(f"{a} > {b} {n}" for (a, b), n in found.pop("most"))
        print(form, *(f"{key} {value}" for key, value in found.items()), most, sep="; ")
    ranks.close()


if __name__ == "__main__":
    main()
