"""lc3: gradient compression for PyTorch, for data-parallel training over slow links.

Three forms, each attached by one line to a script that stays as it is:

- ``lc3.hooks.ddp``: DistributedDataParallel, 3LC in every step.
- ``lc3.hooks.local_sgd``: ranks train alone, and exchange every so many steps.
- ``lc3.hooks.push_pull``: the paper's form; owners run the optimizer.

In a DistributedDataParallel script, after the optimizer is made::

    import lc3
    state = lc3.hooks.ddp.attach(model, optimizer)

Where the link is slower still, in the same place; and ``state.sync()`` at the end::

    import lc3
    state = lc3.hooks.local_sgd.attach(model, optimizer)

``state.meter.ratio`` says how many times fewer bytes were sent than float32 takes.
``Config`` says what is compressed; ``show_choices`` shows what was chosen by itself.
"""

from importlib import import_module
from types import ModuleType

from lc3 import hooks
from lc3.checkpoint import PerRank, load_checkpoint, save_checkpoint
from lc3.checkpoint import merge as merge_states
from lc3.choices import show_choices
from lc3.config import Config, Tuning
from lc3.errors import (
    AttachError,
    ConfigError,
    DivergedError,
    ExchangeError,
    FormatError,
    InputError,
    Lc3Error,
    PeerError,
    PlanMismatch,
    ReplicasDiffer,
    StateError,
)
from lc3.version import __version__
from lc3.wire.frame import decode, encode

__all__ = [
    "AttachError",
    "Config",
    "ConfigError",
    "DivergedError",
    "ExchangeError",
    "FormatError",
    "InputError",
    "Lc3Error",
    "PeerError",
    "PerRank",
    "PlanMismatch",
    "ReplicasDiffer",
    "StateError",
    "Tuning",
    "__version__",
    "decode",
    "encode",
    "hooks",
    "load_checkpoint",
    "merge_states",
    "save_checkpoint",
    "show_choices",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("knobs", "monitor", "ship"):
        return import_module(f"lc3.{name}")
    raise AttributeError(f"module 'lc3' has no attribute {name!r}")
