"""What is compared with lc3's local steps: DiLoCo, MuLoCo, SparseLoCo, by their papers.

Ranks train alone; after every H-th step what each has moved is averaged, and an outer
optimizer steps the parameters that all share. DiLoCo (arXiv 2311.08105) averages in
float32 and steps by Nesterov's momentum; Streaming DiLoCo (arXiv 2501.18512) sends
E3M0 floats of four bits. SparseLoCo (arXiv 2508.15706) keeps what it has not sent,
sends 64 of 64 × 64 values in two bits each, and has no outer momentum. MuLoCo (arXiv
2505.23725) is DiLoCo around Muon; what it sends is quantized, by a reduce-scatter and
an all-gather, and what is lost is kept. Bytes are those that their authors would send;
beside them stands what lc3's entropy stage would make of them.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from experiments.harness.quantized import packed, statistical, two_hops, unpacked
from lc3.transport.group import GroupTransport
from lc3.wire import entropy

FLOAT_BITS = 32
_E3M0_LEVELS = 8  # zero, and 2⁻⁶ … 2⁰ of the largest magnitude
SIDE, KEPT = 64, 64  # of a chunk, and values sent of it
INDEX_BITS, CODE_BITS = 12, 2


class Outer(ABC):
    """Counts an optimizer's steps, and brings ranks together; a ``Traffic``.

    Args:
        module: module that every rank trains alone; all begin with rank 0's parameters.
        optimizers: this rank's optimizers; the last one counts the steps.
        every: H, steps between two exchanges.
        lr: learning rate of the outer optimizer.
        momentum: Nesterov momentum of the outer optimizer; 0: none.

    Attributes:
        sent_bytes: bytes that this rank has sent so far.
        entropy_bytes: the same, had lc3's entropy stage come behind.
        codec_seconds: seconds of coding so far.
        exchanges: so far.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        every: int,
        lr: float,
        momentum: float = 0.0,
    ) -> None:
        self.every, self.world = every, dist.get_world_size()
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        for parameter in self._parameters:
            dist.broadcast(parameter.detach(), 0)
        self._shared = [nn.Parameter(p.detach().clone()) for p in self._parameters]
        self._outer = SGD(self._shared, lr, momentum, nesterov=momentum > 0)
        self._elements = sum(p.numel() for p in self._parameters)
        self.sent_bytes = self.entropy_bytes = self.exchanges = self._steps = 0
        self.codec_seconds = 0.0
        self._hook = optimizers[-1].register_step_post_hook(self._after)

    def _after(self, *_: Any) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Average what the ranks have moved, and step; collective."""
        pairs = list(zip(self._shared, self._parameters, strict=True))
        for (shared, _), mean in zip(
            pairs, self.average([s - p for s, p in pairs]), strict=True
        ):
            shared.grad = mean
        self._outer.step()
        for shared, parameter in pairs:
            parameter.copy_(shared)
        self.exchanges += 1

    @abstractmethod
    def average(self, moved: list[Tensor]) -> list[Tensor]:
        """Return the means over ranks of outer gradients; counts their bytes."""

    @contextmanager
    def shared_model(self) -> Iterator[None]:
        """Lend the parameters that all ranks share."""
        own = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for parameter, shared in zip(self._parameters, self._shared, strict=True):
                parameter.copy_(shared)
            yield
            for parameter, kept in zip(self._parameters, own, strict=True):
                parameter.copy_(kept)

    @property
    @abstractmethod
    def push_bits(self) -> float:
        """See ``Traffic``."""

    @property
    @abstractmethod
    def pull_bits(self) -> float:
        """See ``Traffic``."""

    @property
    def frame_bits(self) -> float:
        """See ``Traffic``."""
        return self.push_bits + self.pull_bits

    def close(self) -> None:
        """Count no more."""
        self._hook.remove()


class DiLoCo(Outer):
    """Averages in float32, as an all-reduce, by a ring's bytes."""

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        every: int,
        lr: float = 0.7,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(module, optimizers, every, lr, momentum)

    def average(self, moved: list[Tensor]) -> list[Tensor]:
        """See ``Outer``."""
        whole = torch.cat([one.reshape(-1) for one in moved])
        dist.all_reduce(whole)
        self.sent_bytes += 2 * (self.world - 1) * 4 * whole.numel() // self.world
        self.entropy_bytes = self.sent_bytes
        parts = torch.split(whole.div_(self.world), [one.numel() for one in moved])
        return [part.view_as(one) for part, one in zip(parts, moved, strict=True)]

    @property
    def push_bits(self) -> float:
        """See ``Traffic``."""
        return FLOAT_BITS / self.every

    pull_bits = push_bits


class Gathered(Outer):
    """What every rank codes is sent to every other; all add it up in rank order."""

    @abstractmethod
    def encode(self, moved: list[Tensor]) -> list[Tensor]:
        """Return the bytes of every outer gradient, as many on every rank."""

    @abstractmethod
    def decode(self, data: Tensor, like: Tensor) -> Tensor:
        """Return the values of what ``encode`` returned, in a tensor's shape."""

    def average(self, moved: list[Tensor]) -> list[Tensor]:
        """See ``Outer``."""
        start = time.perf_counter()
        coded = self.encode(moved)
        payload = torch.cat(coded)
        self.codec_seconds += time.perf_counter() - start
        everybody = [torch.empty_like(payload) for _ in range(self.world)]
        dist.all_gather(everybody, payload)
        self.sent_bytes += (self.world - 1) * payload.numel()
        self.entropy_bytes += (self.world - 1) * smaller(payload)
        start = time.perf_counter()
        sums = [torch.zeros_like(one) for one in moved]
        for said in everybody:
            parts = torch.split(said, [one.numel() for one in coded])
            for part, total in zip(parts, sums, strict=True):
                total += self.decode(part, total)
        self.codec_seconds += time.perf_counter() - start
        return [total.div_(self.world) for total in sums]

    @property
    def push_bits(self) -> float:
        """See ``Traffic``."""
        elements = self._elements * self.every * max(1, self.exchanges)
        return 8 * self.sent_bytes / (self.world - 1) / elements

    @property
    def pull_bits(self) -> float:
        """See ``Traffic``: what all the others have sent."""
        return (self.world - 1) * self.push_bits


class FourBits(Gathered):
    """DiLoCo whose outer gradients travel in E3M0, as an all-gather.

    As in Streaming DiLoCo, without its fragments. A mean of such floats is none, so
    that everybody gets everybody's; each tensor has a float32 for its largest value.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        every: int,
        lr: float = 0.7,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(module, optimizers, every, lr, momentum)

    def encode(self, moved: list[Tensor]) -> list[Tensor]:
        """See ``Gathered``."""
        return [e3m0(one) for one in moved]

    def decode(self, data: Tensor, like: Tensor) -> Tensor:
        """See ``Gathered``."""
        return of_e3m0(data, like)


def _levels(largest: Tensor) -> Tensor:
    steps = torch.arange(_E3M0_LEVELS - 1, dtype=torch.float32)
    return torch.cat([torch.zeros(1), largest * 2 ** (steps - steps[-1])])


class MuLoCo(Outer):
    """DiLoCo around Muon, quantized both ways.

    As in the authors' code (facebookresearch/MuLoCo, ``quantized_outer_sgd.py``): what
    was lost waits, times a decay; codes are by σ of a tensor, and stand for the mean of
    their values. There the reduce-scatter is simulated; here it is one, so that every
    owner quantizes its own part of a mean.

    Args:
        module: see ``Outer``.
        optimizers: see ``Outer``; Muon among them, in the paper.
        every: see ``Outer``.
        bits: bits of a value, 2 or 4.
        lr: see ``Outer``.
        momentum: see ``Outer``.
        decay: factor of what was lost, at every exchange.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        every: int,
        bits: int = 2,
        lr: float = 0.7,
        momentum: float = 0.9,
        decay: float = 0.9,
    ) -> None:
        super().__init__(module, optimizers, every, lr, momentum)
        self._bits, self._decay = bits, decay
        self._owed = [torch.zeros_like(p) for p in self._shared]
        self._transport = GroupTransport(dist.new_group(), torch.device("cpu"))
        self._pushed = self._pulled = 0

    def average(self, moved: list[Tensor]) -> list[Tensor]:
        """See ``Outer``; what is lost waits."""
        for owed, one in zip(self._owed, moved, strict=True):
            owed.mul_(self._decay).add_(one)
        start, since = time.perf_counter(), self._transport.sent_bytes
        means, push, pull = two_hops(self._transport, self._owed, self._quantize)
        self.codec_seconds += time.perf_counter() - start
        self.sent_bytes += self._transport.sent_bytes - since
        self._pushed += sum(message.numel() for message in push)
        self._pulled += self.world * pull.numel()
        others = [m for r, m in enumerate(push) if r != dist.get_rank()]
        self.entropy_bytes += sum(map(smaller, others))
        self.entropy_bytes += (self.world - 1) * smaller(pull)
        return means

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, table, shift = statistical(x, self._bits)
        return codes, table + shift

    @property
    def push_bits(self) -> float:
        """See ``Traffic``."""
        return 8 * self._pushed / self._elements / self.every / max(1, self.exchanges)

    @property
    def pull_bits(self) -> float:
        """See ``Traffic``."""
        return 8 * self._pulled / self._elements / self.every / max(1, self.exchanges)

    def close(self) -> None:
        """See ``Outer``; the group that was made ends."""
        super().close()
        self._transport.leave(destroy=True)


def smaller(message: Tensor) -> int:
    """Return the bytes of a message behind lc3's entropy stage, which may leave it."""
    if not message.numel():
        return 0
    return min(message.numel(), entropy.compress([[message]], 0)[0].numel())


def e3m0(x: Tensor) -> Tensor:
    """Return the bytes of a tensor in four bits a value.

    A value is zero, or ± the largest magnitude times 2⁻⁶ … 2⁰, whichever is nearest.

    Args:
        x: float32[*].

    Returns:
        uint8[ceil(n / 2) + 4]: a value in each half, then a float32, the largest.
    """
    flat = x.reshape(-1)
    largest = flat.abs().max()
    levels = _levels(largest)
    codes = torch.bucketize(flat.abs(), (levels[1:] + levels[:-1]) / 2)
    codes += _E3M0_LEVELS * (flat < 0)
    return torch.cat([packed(codes, 4), largest.reshape(1).view(torch.uint8)])


def of_e3m0(data: Tensor, like: Tensor) -> Tensor:
    """Return the values of what ``e3m0`` returned, in a tensor's shape."""
    found = unpacked(data[:-4], 4, like.numel())
    levels = _levels(data[-4:].clone().view(torch.float32))
    both = torch.cat([levels, -levels])
    return both[found].reshape(like.shape)


class SparseLoCo(Gathered):
    """Sends the largest values of every chunk, in two bits; an all-gather's bytes.

    Args:
        module: see ``Outer``.
        optimizers: see ``Outer``.
        every: see ``Outer``.
        lr: see ``Outer``.
        decay: factor of what was not sent, at every exchange.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        every: int,
        lr: float = 1.0,
        decay: float = 0.95,
    ) -> None:
        super().__init__(module, optimizers, every, lr)
        self._decay = decay
        self._owed = [torch.zeros_like(p) for p in self._shared]

    def encode(self, moved: list[Tensor]) -> list[Tensor]:
        """See ``Gathered``; what is not sent waits."""
        coded = []
        for owed, one in zip(self._owed, moved, strict=True):
            owed.mul_(self._decay).add_(one)
            coded.append(sparse(owed))
            owed.sub_(of_sparse(coded[-1], owed))
        return coded

    def decode(self, data: Tensor, like: Tensor) -> Tensor:
        """See ``Gathered``."""
        return of_sparse(data, like)


def sparse(x: Tensor) -> Tensor:
    """Return the bytes of the largest values of each chunk, in two bits each.

    Chunks are of 64 × 64 values, or of the largest divisors of its two sizes up to 64;
    a vector's are of up to 64. Codes are of all kept values of the tensor: by how many
    σ a value is from their mean; a code stands for the mean of its values. As in the
    authors' code (one-covenant/templar, ``tplr/compress.py``), which the test's vectors
    come from.

    Args:
        x: float32[*].

    Returns:
        uint8[*]: places of 12 bits, codes of 2, a float32 for each code and their mean.
    """
    chunks, _ = chunked(x)
    places = chunks.abs().topk(_kept(chunks), dim=-1).indices
    found = chunks.gather(-1, places)
    codes, table, shift = statistical(found, CODE_BITS)
    floats = torch.cat([table, shift.reshape(1)]).view(torch.uint8)
    return torch.cat([packed(places, INDEX_BITS), packed(codes, CODE_BITS), floats])


def of_sparse(data: Tensor, like: Tensor) -> Tensor:
    """Return the values of what ``sparse`` returned, in a tensor's shape."""
    chunks, shape = chunked(like)
    kept = _kept(chunks)
    count = kept * len(chunks)
    sizes = [-(-count * bits // 8) for bits in (INDEX_BITS, CODE_BITS)]
    first, second, floats = torch.split(data, [*sizes, data.numel() - sum(sizes)])
    places = unpacked(first, INDEX_BITS, count).view(-1, kept)
    codes = unpacked(second, CODE_BITS, count).view(-1, kept)
    table = floats.clone().view(torch.float32)
    values = table[codes] + table[-1]
    decoded = torch.zeros_like(chunks).scatter_(-1, places, values)
    return joined(decoded, like, shape)


def _kept(chunks: Tensor) -> int:
    """Return how many values of a chunk are sent: an even number, or all of it."""
    size = chunks.shape[-1]
    return min(size, max(2, min(KEPT, size) // 2 * 2))


def _divisor(size: int) -> int:
    """Return the largest divisor of a size up to 64."""
    return max(d for d in range(1, min(size, SIDE) + 1) if size % d == 0)


def chunked(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return a tensor's chunks, one a row, and how they lie in it."""
    if x.ndim < 2:
        flat = x.reshape(-1)
        side = _divisor(flat.numel())
        return flat.reshape(-1, side).clone(), (side,)
    rows, columns = x.shape[0], x.numel() // x.shape[0]
    high, wide = _divisor(rows), _divisor(columns)
    shape = (rows // high, high, columns // wide, wide)
    chunks = x.reshape(shape).transpose(1, 2).reshape(-1, high * wide)
    return chunks.clone(), shape


def joined(chunks: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return chunks as the tensor that they were cut from."""
    if len(shape) == 1:
        return chunks.reshape(like.shape)
    up, high, across, wide = shape
    laid = chunks.reshape(up, across, high, wide).transpose(1, 2)
    return laid.reshape(like.shape)
