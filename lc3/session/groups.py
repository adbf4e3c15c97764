"""Process groups for lc3 alone: a model's own carry other things at other times."""

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from lc3 import private
from lc3.errors import AttachError
from lc3.transport.group import GroupTransport
from lc3.transport.loopback import Loopback
from lc3.transport.protocol import Transport

_CPU = torch.device("cpu")


def alone() -> bool:
    """Return whether this process is the only one of its job."""
    if dist.is_initialized():
        return dist.get_world_size() == 1
    return os.environ.get("WORLD_SIZE", "1") == "1"


def nobody() -> tuple[Transport, Callable[[], None]]:
    """Return an exchange with no other rank, and how to leave it."""
    return Loopback(1).ranks[0], lambda: None


def world_group() -> dist.ProcessGroup:
    """Return the group of all ranks.

    Raises:
        AttachError: there is none yet.
    """
    if not dist.is_initialized() or dist.group.WORLD is None:
        raise AttachError("call torch.distributed.init_process_group first")
    return dist.group.WORLD


def connection(
    beside: dist.ProcessGroup, group: dist.ProcessGroup | None
) -> tuple[GroupTransport, Callable[[], None]]:
    """Return an exchange that nobody else uses, and how to leave it; collective.

    Args:
        beside: see ``session_beside``.
        group: see ``session_beside``.
    """
    own, is_mine = _group_for(beside, group)
    device = _CPU
    if dist.get_backend(own) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    transport = GroupTransport(own, device)
    return transport, partial(transport.leave, destroy=is_mine)


def _group_for(
    beside: dist.ProcessGroup, given: dist.ProcessGroup | None
) -> tuple[dist.ProcessGroup, bool]:
    """Return a process group that only lc3 uses, and whether it was made here.

    A model's own group carries buffers and the bitmap of unused parameters at times
    that differ between ranks; a second user would mix up the order of collectives.
    """
    ranks = dist.get_process_group_ranks(beside)
    if given is not None and not isinstance(given, dist.ProcessGroup):
        raise AttachError(
            f"group={given!r} must be a process group, from dist.new_group({ranks}) "
            "called on every rank, or None"
        )
    if given is not None:
        others = dist.get_process_group_ranks(given)
        if others != ranks or given is beside:
            raise AttachError(
                f"group has the ranks {others}, the model's process group {ranks}; "
                "lc3 needs a second group of the same ranks: "
                f"dist.new_group({ranks}), called on every rank of the job"
            )
        return given, False
    if len(ranks) == 1:
        return beside, False  # nothing will be sent
    if len(ranks) < dist.get_world_size():
        raise AttachError(
            f"the model is replicated on the ranks {ranks} only; call dist.new_group("
            f"{ranks}) on every rank of the job and attach(model, group=that)"
        )
    backend: str = dist.get_backend(beside)
    if backend not in ("gloo", "mpi", "ucc"):
        backend = "gloo"  # what lc3 sends is small, and on the host to be checked
    timeout = private.timeout_of(beside)
    own = dist.new_group(timeout=timeout, backend=backend, group_desc="lc3")
    assert isinstance(own, dist.ProcessGroup)
    return own, True
