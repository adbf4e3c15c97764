"""Horovod's own all-reduce and 3LC over Horovod, as methods; needs Horovod.

In a job that horovodrun has started, with the other methods beside them:

    horovodrun --gloo -np 2 python -m experiments.harness.train --out horovod.csv \
        --methods float32 "3LC s=1.00" "Horovod float32" "Horovod 3LC s=1.00"
"""

from collections.abc import Sequence
from dataclasses import dataclass

import horovod.torch as hvd
from torch import nn
from torch.optim import Optimizer

from experiments.harness.methods import Metered, Method, Training
from lc3.config import Settings
from lc3.hooks import horovod as hook


@dataclass
class Ring:
    """The traffic of Horovod's all-reduce, counted as a ring sends it."""

    module: nn.Module
    steps: int = 0
    push_bits: float = 32.0
    pull_bits: float = 32.0
    frame_bits: float = 64.0
    codec_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, *_: object) -> None:
        self.steps += module.training

    @property
    def sent_bytes(self) -> int:
        """See ``Traffic``."""
        world: int = hvd.size()
        elements = sum(p.numel() for p in self.module.parameters())
        return self.steps * 2 * (world - 1) * 4 * elements // world

    def close(self) -> None:
        """Nothing to free."""


def _plain(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
    hvd.init()
    (given,) = optimizers
    optimizer = hvd.DistributedOptimizer(given, module.named_parameters())
    return Training(module, [optimizer], Ring(module))


def _coded(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
    hvd.init()
    (given,) = optimizers
    optimizer = hook.DistributedOptimizer(
        given, module.named_parameters(), Settings(sparsity=1.0)
    )
    traffic = Metered(optimizer.lc3.meter, optimizer.lc3.close)
    return Training(module, [optimizer], traffic)


METHODS: dict[str, Method] = {
    "Horovod float32": _plain,
    "Horovod 3LC s=1.00": _coded,
}
