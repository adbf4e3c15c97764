"""The whole exchange in one process, in plain NumPy, straight from the paper.

It shares no code with ``lc3`` but ``Settings``: digits come from a division and a
rounding, not from comparisons; there are no messages, owners or bytes. Every multi-rank
result must equal it bit for bit.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from math import ceil, hypot, prod, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.config import Settings

Floats = NDArray[np.float32]
Shapes = Sequence[tuple[str, Sequence[int]]]


def quantize(
    x: Floats, sparsity: float, density: float | None = None
) -> tuple[Floats, Floats]:
    """Return (decoded, residual); NaN everywhere and x if x is not finite."""
    if not np.isfinite(x).all():
        return np.full_like(x, np.nan), x
    with np.errstate(over="ignore"):
        scale = np.float32(np.abs(x).max()) * np.float32(sparsity)
    scale = min(scale, np.finfo(np.float32).max)
    if scale == 0:
        return np.zeros_like(x), x
    if density is not None:
        decoded = largest_share(x, density)
        return decoded, x - decoded
    digits = np.rint(x.astype(np.float64) / np.float64(scale)).astype(np.float32)
    decoded = digits * scale
    return decoded, x - decoded


def largest_share(x: Floats, density: float) -> Floats:
    """Return the largest values at their mean magnitude, judged by every n-th value."""
    step = len(x) // 4096
    sample = sorted(abs(v) for v in x[:: step + (step % 2 == 0)].tolist())[::-1]
    wanted = max(1, round(density * len(sample)))
    limit = sample[wanted] if wanted < len(sample) else 0.0
    if limit == sample[0]:
        limit = 0.0
    chosen = [v for v in sample if v > limit]
    if not chosen:
        largest = np.abs(x).max()
        return np.where(np.abs(x) > largest / np.float32(2), np.sign(x) * largest, 0)
    mean = np.float32(float(sum(map(Fraction, chosen))) / len(chosen))
    return np.where(np.abs(x) > np.float32(limit), np.sign(x) * mean, np.float32(0))


class Oracle:
    """3LC with error feedback on both sides, for ``world`` workers.

    Without owners nothing is pulled: the mean of what was pushed is what all have.
    """

    def __init__(self, shapes: Shapes, world: int, config: Settings) -> None:
        self.shapes, self.world, self.config = shapes, world, config
        self.direct = config.topology == "direct"
        self.sent = [
            {name: np.zeros(prod(shape), np.float32) for name, shape in shapes}
            for _ in range(world)
        ]
        self.owned = {name: np.zeros(prod(shape), np.float32) for name, shape in shapes}

    def step(self, grads: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
        """Return the mean every rank gets, by name, from every rank's gradients."""
        result = {}
        for name, shape in self.shapes:
            result[name] = np.zeros(prod(shape), np.float32)
            for piece in self.pieces(name, prod(shape)):
                parts = [grad[name][piece] for grad in grads]
                result[name][piece] = (
                    self.coded_mean(name, piece, parts)
                    if self.coded(name, shape)
                    else self.mean(parts)
                )
        return result

    def mean(self, parts: Sequence[Floats]) -> Floats:
        total = np.zeros_like(parts[0])
        for part in parts:
            total += part
        return total / np.float32(len(parts))

    def coded_mean(self, name: str, piece: slice, parts: Sequence[Floats]) -> Floats:
        pushed, left = [], []
        for rank, part in enumerate(parts):
            residual = self.sent[rank][name][piece]
            if part.any():
                value, rest = quantize(
                    part + residual, self.config.sparsity, self.config.density
                )
            else:
                value, rest = np.zeros_like(part), residual.copy()
            pushed.append(value)
            left.append(rest)
        pulled = np.zeros_like(parts[0])
        rest = self.owned[name][piece].copy()
        mean = self.mean(pushed)
        if self.direct:
            pulled = mean
        elif mean.any():
            pull_sparsity = self.config.pull_sparsity or self.config.sparsity
            pulled, rest = quantize(mean + rest, pull_sparsity, self.config.density)
        if not np.isnan(pulled).any():
            self.owned[name][piece] = rest
            for rank, rest in enumerate(left):
                self.sent[rank][name][piece] = rest
        return pulled

    def coded(self, name: str, shape: Sequence[int]) -> bool:
        config = self.config
        if any(fnmatchcase(name, pattern) for pattern in config.exclude):
            return False
        if any(fnmatchcase(name, pattern) for pattern in config.include):
            return True
        return prod(shape) >= config.min_numel and len(shape) >= config.min_ndim

    def pieces(self, name: str, n: int) -> Iterator[slice]:
        if n == 0:
            return
        shape = dict(self.shapes)[name]
        count = max(1, min(self.world, ceil(n / self.config.min_shard)))
        start = 0
        for size in [n // count + 1] * (n % count) + [n // count] * (count - n % count):
            step = (self.config.block_size or size) if self.coded(name, shape) else size
            for at in range(start, start + size, step):
                yield slice(at, min(at + step, start + size))
            start += size


class ForOptimizers(Oracle):
    """3LC of gradients that an optimizer may clip, apply, or not: what it then holds.

    Norms are given: what ranks estimate of the mean gradient's, and torch's own of what
    was decoded. With moments, by name the second moment of every element, gradients are
    divided by their roots before they are coded, and multiplied after.
    """

    def __init__(
        self, shapes: Shapes, world: int, config: Settings, most: float
    ) -> None:
        super().__init__(shapes, world, config)
        self.most = np.float32(most)
        self.expected = 1.0
        self.restore = 1.0

    def hand_out(
        self,
        grads: Sequence[Mapping[str, Floats]],
        roots: Mapping[str, Sequence[Floats]],
        expected: float,
        square: float,
        norms: Callable[[list[Tensor]], list[float]],
    ) -> dict[str, Floats]:
        """Return ``.grad`` of every parameter, and remember the rest for ``apply``."""
        self.expected = expected
        self.before = copy.deepcopy((self.sent, self.owned))
        scaled = [
            {
                name: self.divided(grad[name] * np.float32(self.expected), roots, name)
                if self.coded(name, shape)
                else grad[name]
                for name, shape in self.shapes
            }
            for grad in grads
        ]
        result = super().step(scaled)
        coded = [name for name, shape in self.shapes if self.coded(name, shape)]
        for name in coded:
            for root in roots.get(name, ()):
                result[name] = result[name] * root
        exact = [torch.from_numpy(v) for n, v in result.items() if n not in coded]
        decoded = [torch.from_numpy(result[name]) for name in coded]
        of_exact, of_decoded = norms(exact), norms(decoded)
        left = max(square - hypot(*of_exact) ** 2, 0.01 * square)
        factor = sqrt(left) / hypot(*of_decoded)
        others = [name for name in result if name not in coded]
        self.norms = dict(zip(others, of_exact, strict=True))
        self.norms |= {n: v * factor for n, v in zip(coded, of_decoded, strict=True)}
        for name in coded:
            result[name] = result[name] * np.float32(factor)
        self.restore = 1 / factor
        return result

    def divided(
        self, grad: Floats, roots: Mapping[str, Sequence[Floats]], name: str
    ) -> Floats:
        for root in roots.get(name, ()):
            grad = grad * (np.float32(1) / root)
        return np.clip(grad, -self.most, self.most) if name in roots else grad

    def settle(self, share: float) -> None:
        """Keep as much of what the last exchange changed as ``share`` says."""
        for now, before in (
            *zip(self.sent, self.before[0], strict=True),
            (self.owned, self.before[1]),
        ):
            for name, old in before.items():
                new = torch.from_numpy(now[name])
                if share != 1:
                    now[name] = torch.from_numpy(old).lerp(new, share).numpy()

    def apply(self, ratio: float) -> float:
        """Take in that .grad was multiplied by ``ratio``; return its factor now."""
        share = min(1.0, ratio / self.expected)
        share = 1.0 if share > 0.999 else share
        self.settle(share)
        return share * self.restore / ratio


class TwoLevels(Oracle):
    """A plain mean in each node first, then 3LC between nodes; cut as for all ranks."""

    def __init__(
        self, shapes: Shapes, nodes: Sequence[Sequence[int]], config: Settings
    ):
        super().__init__(shapes, sum(map(len, nodes)), config)
        self.nodes = nodes

    def step(self, grads: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
        means = [
            {name: self.mean([grads[r][name] for r in node]) for name in grads[0]}
            for node in self.nodes
        ]
        return means[0] if len(self.nodes) == 1 else super().step(means)


class Servers(Oracle):
    """3LC parameter servers with masters: push, the server's step, pull of deltas."""

    def __init__(
        self,
        shapes: Shapes,
        world: int,
        config: Settings,
        start: Mapping[str, Floats],
    ) -> None:
        super().__init__(shapes, world, config)
        self.masters = {name: value.copy() for name, value in start.items()}
        self.replica = {name: value.copy() for name, value in start.items()}

    def exchange(
        self,
        values: Sequence[Mapping[str, Floats]],
        server_step: Callable[[str, slice, Floats, Floats], None],
    ) -> None:
        """Move masters by ``server_step(name, piece, master, mean)``, then replicas."""
        sparsity = self.config.pull_sparsity or self.config.sparsity
        for name, shape in self.shapes:
            for piece in self.pieces(name, prod(shape)):
                parts = [value[name][piece] for value in values]
                master, replica = self.masters[name][piece], self.replica[name][piece]
                if not self.coded(name, shape):
                    server_step(name, piece, master, self.mean(parts))
                    replica[:] = master
                    continue
                pushed, left = [], []
                for rank, part in enumerate(parts):
                    residual = self.sent[rank][name][piece]
                    value, rest = np.zeros_like(part), residual.copy()
                    if part.any():
                        value, rest = quantize(
                            part + residual, self.config.sparsity, self.config.density
                        )
                    pushed.append(value)
                    left.append(rest)
                mean = self.mean(pushed)
                if np.isnan(mean).any():
                    continue
                server_step(name, piece, master, mean)
                lead = master - replica
                if not self.direct:
                    lead, _ = quantize(lead, sparsity, self.config.density)
                replica += lead
                for rank in range(self.world):
                    self.sent[rank][name][piece] = left[rank]
