"""An Adam for 3LC that exchanges in every step: preconditioned first, then coded.

What fails when Adam follows 3LC is its second moment: of spikes that arrive now and
then it is large, and steps become small. Here nothing divides by what was decoded. Each
rank divides its gradient by the root of a second moment before it is coded; what
arrives is averaged over time, as Adam's first moment, and applied. The second moment of
a matrix is the outer product of its rows' and its columns' means (Adafactor, arXiv
1804.04235): few enough numbers to be shared exactly, every ``REFRESH`` steps.

It is not in lc3 yet. In one short training it ends lower than all else with no more
bytes (docs/results.md); local steps with a fraction of its bytes come near.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lc3.hooks import ddp

REFRESH = 5
DECAY = 0.95  # of the second moment, for each refresh
FIRST = 10  # steps that refresh it each
MOST = 10.0  # of an element once it is divided; Adam's, 1 / √(1 − β2) at β2 = 0.99


class Preconditioned:
    """State of the hook: second moments, around the state of lc3's hook.

    Attributes:
        inner: the state of lc3's hook.
        shared_bytes: that this rank sent of second moments; a ring's.
    """

    def __init__(self, inner: ddp.State) -> None:
        self.inner = inner
        self._group = dist.new_group()
        self._moments: dict[Tensor, Tensor] = {}
        self._factors: dict[Tensor, Tensor] = {}
        self._step = self._refreshes = 0
        self.shared_bytes = 0

    def divide(self, bucket: dist.GradBucket) -> None:
        """Divide each gradient of a bucket, in place, by the root of its moment."""
        parameters, gradients = bucket.parameters(), bucket.gradients()
        first = bucket.index() == 0
        self._step += first
        if self._step <= FIRST or self._step % REFRESH == 0:
            self._refreshes += first
            self._refresh(parameters, gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # An input seen for the first time has a moment of 0 until the next refresh.
            gradient.mul_(self._factors[parameter]).clamp_(-MOST, MOST)

    def _refresh(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Take this step's squares in, of all ranks; collective."""
        mine = [_moments(gradient.square()) for gradient in gradients]
        shared = torch.cat(mine)
        dist.all_reduce(shared, group=self._group)
        world = dist.get_world_size(self._group)
        shared /= world
        self.shared_bytes += 2 * (world - 1) * 4 * shared.numel() // world
        parts = shared.split([moments.numel() for moments in mine])
        for parameter, moments in zip(parameters, parts, strict=True):
            kept = self._moments.setdefault(parameter, torch.zeros_like(moments))
            kept.lerp_(moments, 1 - DECAY)
            mean = kept / (1 - DECAY**self._refreshes)
            self._factors[parameter] = 1 / (_outer(mean, parameter).sqrt() + 1e-8)


def _moments(squares: Tensor) -> Tensor:
    """Return the means of a matrix's rows and columns, or all of another tensor."""
    if squares.dim() != 2:
        return squares.flatten()
    return torch.cat([squares.mean(dim=1), squares.mean(dim=0)])


def _outer(moments: Tensor, like: Tensor) -> Tensor:
    """Return second moments in the shape of a parameter."""
    if like.dim() != 2:
        return moments.view(like.shape)
    rows, columns = moments.split(list(like.shape))
    outer: Tensor = rows[:, None] * columns / (rows.mean() + 1e-30)
    return outer


def hook(
    state: Preconditioned, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Divide the gradients of ``bucket``, then do as lc3's hook does."""
    state.divide(bucket)
    return ddp.lc3_hook(state.inner, bucket)
