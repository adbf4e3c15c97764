"""DDP's one communication hook, which leads to a state as long as it is attached.

DDP takes a hook once, for good. So the hook of a model is a link: closed, it leads to
the plain all-reduce that DDP does without a hook, and a new state may take it.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lc3 import private
from lc3.errors import AttachError
from lc3.module.buffers import Buffers, send_buffers

Run = Callable[[dist.GradBucket], torch.futures.Future[torch.Tensor]]
log = logging.getLogger(__name__)

_PASSES = 4  # that a State is not registered by: something is wrong
_CLAIMED: WeakSet[nn.Module] = WeakSet()  # modules that some form is attached to


def check_unclaimed(module: nn.Module) -> None:
    """Raise ``AttachError`` if a form is attached to a module."""
    if module in _CLAIMED:
        raise AttachError(
            "lc3 is already attached to this model; close() that state first"
        )


def claim(module: nn.Module) -> None:
    """Remember that a form is attached to a module."""
    _CLAIMED.add(module)


def release(module: nn.Module) -> None:
    """Forget what ``claim`` has remembered."""
    _CLAIMED.discard(module)


class Link:
    """Where a model's buckets and buffers go.

    A copy of the model has no hook, so that a copy of this leads nowhere either.

    Attributes:
        run: takes a bucket; ``None``: nobody is attached.
        buffers: decides which buffers are sent; ``None``: there are none to send.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.run: Run | None = None
        self.module: weakref.ref[nn.Module] | None = None
        self.buffers: Buffers | None = None
        self.group = group

    def close(self) -> None:
        """Let buckets and buffers travel as they do without lc3."""
        self.run = None
        if self.module is not None and (module := self.module()) is not None:
            release(module)
        if self.buffers is not None:
            self.buffers.sends_all = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Link":
        return Link(self.group)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a DistributedDataParallel with lc3 attached cannot be pickled; save "
            "model.module.state_dict()"
        )


def linked_hook(
    link: Link, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Do with a bucket what the attached state does, or what DDP does."""
    if link.run is None:
        return allreduce_hook(link.group, bucket)
    return link.run(bucket)


def link_of(model: DistributedDataParallel) -> Link | None:
    """Return the link that a closed state has left, if there is one.

    Raises:
        AttachError: the model has another hook, or lc3 is attached to it.
    """
    found = private.comm_hook(model)
    if found is None:
        return None
    hook, state = found
    if isinstance(state, Link) and state.run is None:
        return state
    if isinstance(state, Link):
        raise AttachError(
            "lc3 is already attached to this model; close() that state first"
        )
    raise AttachError(
        "a state of lc3 is registered as this model's communication hook, for which "
        "DDP takes one for good; wrap the module again, then attach"
        if type(state).__module__.startswith("lc3.")
        else f"the model already has the communication hook {hook.__name__}; "
        "DDP takes one only, so wrap the module again without it"
    )


def _link_on(model: DistributedDataParallel) -> Link:
    """Return a model's link: the one that a closed state has left, or a new one."""
    link = link_of(model)
    if link is None:
        link = Link(model.process_group)
        model.register_comm_hook(link, linked_hook)
    return link


def buffers_are_free(model: DistributedDataParallel) -> bool:
    """Return whether nobody else has a hook for a model's buffers."""
    state = private.buffer_state(model)
    return state is None or isinstance(state, Buffers)


def link_to(model: DistributedDataParallel, run: Run, buffers: Buffers | None) -> Link:
    """Let a model's buckets go to ``run``, and its buffers through ``buffers``."""
    link = _link_on(model)
    fill(link, model, run, buffers)
    return link


def fill(
    link: Link, model: DistributedDataParallel, run: Run, buffers: Buffers | None
) -> None:
    """Let a link lead to ``run``, and a model's buffers through ``buffers``."""
    check_unclaimed(model.module)
    claim(model.module)
    link.module = weakref.ref(model.module)
    link.run, link.buffers = run, buffers
    if buffers is not None:
        private.register_buffer_hook(model, buffers, send_buffers)


def keep_apart(model: DistributedDataParallel) -> Link:
    """Let a wrapped model exchange nothing until the link that is returned is closed.

    Whatever sets ``require_backward_grad_sync``, as nanoGPT's loop does in every step,
    would otherwise average gradients densely.
    """
    link = _link_on(model)
    link.run = _as_it_is
    if buffers_are_free(model):
        link.buffers = Buffers(model, list, lambda _: None)
        link.buffers.sends_none = True
        private.register_buffer_hook(model, link.buffers, send_buffers)
    return link


def _as_it_is(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class Unregistered:
    """Warns where a model makes passes, and no bucket comes to a state of it.

    Args:
        model: that a state was made for, and is not registered by yet.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._passes = 0
        self._watched = model.register_forward_pre_hook(
            partial(_look, weakref.ref(self))
        )

    def look(self, model: DistributedDataParallel) -> None:
        """Count a pass that would end in an exchange."""
        trains = model.training and torch.is_grad_enabled()
        self._passes += trains and model.require_backward_grad_sync
        if self._passes == _PASSES:
            self.close()
            log.warning(
                "lc3: %d passes and nothing was compressed: this State is not "
                "registered; model.register_comm_hook(state, lc3.hooks.ddp.hook), or "
                "lc3.hooks.ddp.attach(model, optimizer) in place of both",
                _PASSES - 1,
            )

    def close(self) -> None:
        """Count no more: buckets come, or nobody waits for any."""
        self._watched.remove()


def _look(
    unregistered: "weakref.ref[Unregistered]", model: DistributedDataParallel, _: object
) -> None:
    if (found := unregistered()) is not None:
        found.look(model)
