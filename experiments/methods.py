"""How gradients are averaged: what a user could choose, each with its bytes counted.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    fp16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel

import lc3
from lc3.hooks import ddp

Future = torch.futures.Future[torch.Tensor]


class Traffic(Protocol):
    """What one method sent from this rank so far.

    Attributes:
        sent_bytes: counted where they are given to the transport.
        push_bits: per gradient element that the method codes, worker to owner.
        pull_bits: the same on the way back.
        frame_bits: both ways together, before the lossless entropy stage.
        codec_seconds: wall-clock seconds of coding and decoding.
    """

    @property
    def sent_bytes(self) -> int: ...  # noqa: D102
    @property
    def push_bits(self) -> float: ...  # noqa: D102
    @property
    def pull_bits(self) -> float: ...  # noqa: D102
    @property
    def frame_bits(self) -> float: ...  # noqa: D102
    @property
    def codec_seconds(self) -> float: ...  # noqa: D102
    def close(self) -> None:
        """Free what the method holds; the model is not trained further."""
        ...


@dataclass
class AllReduce:
    """One of PyTorch's own hooks around an all-reduce, with its bytes counted."""

    hook: Callable[[dist.ProcessGroup, dist.GradBucket], Future]
    bits: int
    group: dist.ProcessGroup
    sent_bytes: int = 0
    codec_seconds: float = 0.0
    push_bits: float = field(init=False)
    pull_bits: float = field(init=False)
    frame_bits: float = field(init=False)

    def __post_init__(self) -> None:
        self.push_bits = self.pull_bits = float(self.bits)
        self.frame_bits = 2.0 * self.bits

    def close(self) -> None:
        """Nothing to free."""


def _counted(
    state: AllReduce, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Run ``state.hook``; a ring sends 2 (W − 1) / W of the buffer from each rank."""
    world = dist.get_world_size(state.group)
    payload = bucket.buffer().numel() * state.bits // 8
    state.sent_bytes += 2 * (world - 1) * payload // world
    return state.hook(state.group, bucket)


class Compressed:
    """3LC, as a user attaches it."""

    def __init__(self, model: DistributedDataParallel, config: lc3.Config) -> None:
        self._state = ddp.attach(model, config)
        self._meter = self._state.meter

    @property
    def sent_bytes(self) -> int:
        """See ``Traffic``."""
        return self._meter.sent_bytes

    @property
    def push_bits(self) -> float:
        """See ``Traffic``."""
        return self._meter.push.bits_per_element

    @property
    def pull_bits(self) -> float:
        """See ``Traffic``."""
        return self._meter.pull.bits_per_element

    @property
    def frame_bits(self) -> float:
        """See ``Traffic``."""
        meter = self._meter
        return meter.push.frame_bits_per_element + meter.pull.frame_bits_per_element

    @property
    def codec_seconds(self) -> float:
        """See ``Traffic``."""
        return self._meter.seconds["encode"] + self._meter.seconds["decode"]

    def close(self) -> None:
        """End the worker lane and its process group."""
        self._state.close()


Method = Callable[[DistributedDataParallel], Traffic]


def _all_reduce(
    hook: Callable[[dist.ProcessGroup, dist.GradBucket], Future], bits: int
) -> Method:
    def attach(model: DistributedDataParallel) -> Traffic:
        traffic = AllReduce(hook, bits, model.process_group)
        model.register_comm_hook(traffic, _counted)
        return traffic

    return attach


def _lc3(sparsity: float) -> Method:
    return lambda model: Compressed(model, lc3.Config(sparsity=sparsity))


METHODS: dict[str, Method] = {
    "float32": _all_reduce(allreduce_hook, 32),
    "fp16": _all_reduce(fp16_compress_hook, 16),
    "3LC s=1.00": _lc3(1.0),
    "3LC s=1.50": _lc3(1.5),
    "3LC s=1.75": _lc3(1.75),
    "3LC s=1.90": _lc3(1.9),
}
