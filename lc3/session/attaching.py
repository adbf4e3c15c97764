"""While ranks attach: an error of one is told to the others, wherever they wait."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol

import torch.distributed as dist
from torch import nn

from lc3.config import Settings
from lc3.errors import AttachError
from lc3.session.groups import connection, world_group
from lc3.transport.group import GroupTransport
from lc3.transport.handshake import agree, refuse, threads_for
from lc3.transport.protocol import Transport
from lc3.version import __version__

_REFUSE_S = 60.0
log = logging.getLogger(__name__)


class Fails(Protocol):
    """What has been made while attaching."""

    def fail(self, error: Exception) -> None:
        """Tell the other ranks that this one stops, and close."""


# Sessions that were made since ``attaching`` began.
_ATTACHING: ContextVar[list["Fails"] | None] = ContextVar("attaching", default=None)


@contextmanager
def attaching(
    connect: Callable[[], tuple[Transport, Callable[[], None]]],
) -> Iterator[None]:
    """Tell the other ranks of any error in the block, wherever they wait by then.

    A rank that just left would be missed for the whole timeout of the process group. If
    every rank has the error, each raises its own at once.

    Args:
        connect: returns an exchange between the ranks, and how to leave it; for errors
            from before there is a session.
    """
    made: list[Fails] = []
    token = _ATTACHING.set(made)
    try:
        yield
    except Exception as error:
        if made:
            made[-1].fail(error)
        elif dist.is_initialized():
            _tell(connect, error)
        raise
    finally:
        _ATTACHING.reset(token)


@contextmanager
def attaching_everywhere() -> Iterator[Transport]:
    """Lend an exchange between all ranks of the job, for as long as they attach.

    For groups that exchange for themselves later: in the end all ranks have attached,
    or none has.

    Raises:
        PeerError: another rank could not.
    """
    transport, leave = connection(world_group(), None)
    try:
        try:
            yield transport
        except Exception as error:
            _tell(lambda: (transport, lambda: None), error)
            raise
        threads_for(transport, Settings())
        agree(transport, __version__, Settings(), [], lambda: None)
    finally:
        leave()


def _tell(
    connect: Callable[[], tuple[Transport, Callable[[], None]]], error: Exception
) -> None:
    """Let ranks that are about to shake hands know of an error."""
    log.error("lc3: %s; the other ranks are told", error)
    telling = threading.Thread(
        target=_refuse, args=(connect, error), name="lc3-refuses", daemon=True
    )
    telling.start()
    telling.join(_REFUSE_S)  # nobody may ever attach


def _refuse(
    connect: Callable[[], tuple[Transport, Callable[[], None]]], error: Exception
) -> None:
    with suppress(Exception):
        transport, leave = connect()
        refuse(transport, __version__, error)
        leave()


def note_made(one: Fails) -> None:
    """Note what has been made: it tells the other ranks of an error from now on."""
    if (noted := _ATTACHING.get()) is not None:
        noted.append(one)


def attaching_to(
    model: nn.Module, group: dist.ProcessGroup | None
) -> AbstractContextManager[None]:
    """Return ``attaching`` for the ranks of a model, wrapped by DDP or not."""

    def connect() -> tuple[GroupTransport, Callable[[], None]]:
        beside = getattr(model, "process_group", None) or dist.group.WORLD
        assert isinstance(beside, dist.ProcessGroup)
        try:
            return connection(beside, group)
        except AttachError:
            return connection(beside, None)

    return attaching(connect)
