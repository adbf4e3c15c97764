"""What a model's exchange offers to its hook, and what is asked of it seldom.

``engine``, ``direct``, ``two_levels`` and ``auto`` each have a class with what
``Exchange`` lists. What a checkpoint, ``flush`` or another number of ranks needs is
below, and works on any of them.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from lc3.budget import Budget
from lc3.config import Settings
from lc3.meter import Meter
from lc3.plan import Plan
from lc3.residual import Residuals
from lc3.transport.channel import Channel
from lc3.transport.protocol import Transport
from lc3.wire.messages import Messages

Wire = Literal["3lc", "bfloat16", "float32"]
NO_HALF_GRADS: Mapping[str, Tensor] = MappingProxyType({})  # of float32 gradients


class Exchange(Protocol):
    """Averages gradients over the ranks of a model.

    Not thread-safe, and every rank must make the same calls in the same order: a hook
    calls it from one worker lane.

    Attributes:
        plan: the same on every rank.
        config: the same on every rank.
        transport: moves the messages, between all ranks.
        channel: for what is no gradient: means, bytes, and a word of failure.
        messages: makes bytes of gradients; holds the coder.
        meter: is written to.
        residuals: what this rank still owes.
        budget: what is sent of each value; moved, if the configuration has a budget.
        me: the plan's number of this rank.
        direct: whether ranks average what they send each other, without owners.
        owing: names of parameters whose residuals may hold something; add those that
            were undone, or loaded.
    """

    plan: Plan
    config: Settings
    transport: Transport
    channel: Channel
    messages: Messages
    meter: Meter
    residuals: Residuals
    budget: Budget
    me: int
    direct: bool
    owing: set[str]

    @property
    def senders(self) -> int:
        """How many ranks' worker-side residuals there are of each element."""
        ...

    def all_reduce(
        self,
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """Replace every gradient by its mean over ranks, the same bits everywhere.

        Args:
            grads: by parameter name, float32[numel], contiguous; overwritten. The same
                names on every rank.
            step: synchronised backward passes before this one, the same on every rank.
            bucket: its number in this step, the same on every rank.
            half_grads: by the same names float16 or bfloat16[numel], contiguous:
                half-precision gradients. If given, ``grads`` is output storage only.

        Raises:
            FormatError, PlanMismatch: what arrived does not fit; every other rank is
                told.
            PeerError: another rank failed and said so.
            ExchangeError: the transport failed.
        """
        ...

    def native_form(self, names: Collection[str], elements: int) -> Wire | None:
        """Return the form of a bucket that DDP's own all-reduce can average as well.

        ``None``: it has to be coded, or residuals have to come along. The same on every
        rank.
        """
        ...

    def keep_own_part(self) -> None:
        """Forget worker-side residuals of what this rank does not push."""
        ...

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        ...


def gather(
    exchange: Exchange, shares: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """Return whole parameters from every rank's shares of them; collective.

    Args:
        exchange: of the model.
        shares: by parameter name float32[slice], of the slices that this rank owns.
        names: of the parameters, the same on every rank.

    Returns:
        By name float32[numel], the same on every rank.
    """
    plan, device = exchange.plan, exchange.messages.coder.device
    mine = plan.slices_of(names, exchange.me)
    parts = [shares[slice_.name].reshape(-1) for slice_ in mine]
    message = torch.cat([torch.empty(0, device=device, dtype=torch.float32), *parts])
    whole = {
        name: torch.zeros(plan.numel[name], device=device, dtype=torch.float32)
        for name in names
    }
    step, bucket = exchange.channel.aside()
    with exchange.channel.exchanging(0, step, bucket):
        everybody = exchange.channel.all_gather_bytes(message, step, bucket)
    for owner, data in enumerate(everybody):
        slices = list(plan.slices_of(names, owner))
        values = data.clone().view(torch.float32)
        split = torch.split(values, [slice_.numel for slice_ in slices])
        for slice_, part in zip(slices, split, strict=False):
            whole[slice_.name][slice_.start : slice_.stop] = part
    return whole


def pending(exchange: Exchange) -> dict[str, Tensor]:
    """Return what gradients still owe the parameters, as a mean; collective.

    By coded parameter float32[numel], the same on every rank: the mean over ranks of
    what their pushes did not carry yet, plus what pulls did not.
    """
    plan, channel = exchange.plan, exchange.channel
    names = [name for name in plan.numel if name in plan.coded]
    device = exchange.messages.coder.device
    nothing = {  # where masters' lead is what pulls did not carry
        slice_.name: torch.zeros(slice_.numel, device=device, dtype=torch.float32)
        for slice_ in plan.slices_of(names, exchange.me)
    }
    owed = gather(exchange, nothing | exchange.residuals.owned, names)
    if not names:
        return owed
    step, bucket = channel.aside()
    with channel.exchanging(0, step, bucket):
        sent = torch.cat([exchange.residuals.sent[name] for name in names])
        total = channel.mean(sent, step, bucket).mul_(exchange.transport.world)
    parts = total.div_(exchange.senders).split([plan.numel[name] for name in names])
    for name, part in zip(names, parts, strict=True):
        owed[name] += part
    return owed


def push_what_owners_owe(exchange: Exchange) -> None:
    """Let this rank's pushes carry what its pulls owed, if there are none any more.

    For a state of a run that had owners: residuals of means, times the senders that a
    push is averaged over.
    """
    if not exchange.direct:
        return
    residuals = exchange.residuals
    for slice_ in exchange.plan.slices_of(residuals.owned, exchange.me):
        owed = residuals.owned[slice_.name]
        sent = residuals.sent[slice_.name][slice_.start : slice_.stop]
        sent.add_(owed, alpha=exchange.senders)
        owed.zero_()


def widen(into: Mapping[str, Tensor], half_grads: Mapping[str, Tensor]) -> None:
    """Write half-precision gradients as float32."""
    for name, half in half_grads.items():
        into[name].copy_(half)
