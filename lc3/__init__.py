"""lc3: 3LC gradient compression for PyTorch, for training over slow links."""

from lc3.checkpoint import PerRank, load_checkpoint, save_checkpoint
from lc3.checkpoint import merge as merge_states
from lc3.codec import decode, encode
from lc3.config import Config
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
    "__version__",
    "decode",
    "encode",
    "load_checkpoint",
    "merge_states",
    "save_checkpoint",
]
