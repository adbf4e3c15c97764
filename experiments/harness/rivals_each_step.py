"""What is compared with lc3's hook of every step: DeMo, 1-bit Adam, EF21-Muon.

Each takes the place of the optimizers, as in its paper. DeMo (arXiv 2411.19870) sends
the largest coefficients of a cosine transform of its momentum, and steps by signs.
1-bit Adam (arXiv 2102.02888) is Adam until its second moments are steady, and from
there on sends momentum in one bit, both ways, and keeps what is lost. EF21-Muon (arXiv
2510.00643) sends by how much its momentum has changed. Ranks hold the same parameters.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from experiments.harness.quantized import two_hops
from experiments.harness.rivals import chunked, joined, smaller
from lc3.transport.group import GroupTransport

_CHUNK_TOP = 32  # coefficients of a chunk that DeMo sends
_STEADY = 0.96  # 1-bit Adam's threshold, of norms of second moments
_RMS = 0.2  # of an update at rate 1, as torch's Muon matches AdamW's


class EveryStep(Optimizer):
    """An optimizer that brings ranks together itself; a ``Traffic``.

    Args:
        module: module of every rank; all begin with rank 0's parameters.
        optimizers: optimizers to take parameters, rates and weight decays from.

    Attributes:
        sent_bytes: bytes that this rank has sent so far.
        entropy_bytes: the same, had lc3's entropy stage come behind.
        codec_seconds: seconds of coding and sending so far.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        groups: list[dict[str, Any]] = [
            {
                "params": group["params"],
                "lr": group["lr"],
                "weight_decay": group.get("weight_decay", 0.0),
                "betas": group.get("betas", (0.9, 0.99)),
                "momentum": group.get("momentum", 0.9),
                "spectral": isinstance(optimizer, Muon),
            }
            for optimizer in optimizers
            for group in optimizer.param_groups
        ]
        super().__init__(groups, {"lr": groups[0]["lr"]})
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), 0)
        self._transport = GroupTransport(dist.new_group(), torch.device("cpu"))
        self.world = self._transport.world
        self._parameters = [p for g in self.param_groups for p in g["params"]]
        self._elements = sum(p.numel() for p in self._parameters)
        self.sent_bytes = self.entropy_bytes = self.steps = 0
        self.codec_seconds = 0.0
        self._pushed = self._pulled = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Exchange, and step; collective."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
        self.steps += 1
        self.update()

    @abstractmethod
    def update(self) -> None:
        """Exchange what the gradients say, and change the parameters."""

    def gather(self, payload: Tensor) -> list[Tensor]:
        """Return every rank's uint8[*]; counts it."""
        start = time.perf_counter()
        everybody = self._transport.all_gather(payload)
        self.codec_seconds += time.perf_counter() - start
        self.sent_bytes += (self.world - 1) * payload.numel()
        self.entropy_bytes += (self.world - 1) * smaller(payload)
        self._pushed += payload.numel()
        self._pulled += (self.world - 1) * payload.numel()
        return everybody

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means of float32 tensors; counts a ring's bytes."""
        flat = torch.cat([one.reshape(-1) for one in tensors])
        since = self._transport.sent_bytes
        self._transport.all_reduce(flat)
        self.sent_bytes += self._transport.sent_bytes - since
        self.entropy_bytes += self._transport.sent_bytes - since
        self._pushed += flat.nbytes
        self._pulled += flat.nbytes
        parts = flat.div_(self.world).split([one.numel() for one in tensors])
        return [part.view_as(one) for part, one in zip(parts, tensors, strict=True)]

    @property
    def push_bits(self) -> float:
        """See ``Traffic``."""
        return float(8 * self._pushed / self._elements / max(1, self.steps))

    @property
    def pull_bits(self) -> float:
        """See ``Traffic``."""
        return float(8 * self._pulled / self._elements / max(1, self.steps))

    @property
    def frame_bits(self) -> float:
        """See ``Traffic``."""
        return self.push_bits + self.pull_bits

    def close(self) -> None:
        """End the group that was made."""
        self._transport.leave(destroy=True)


class DeMo(EveryStep):
    """Decoupled momentum: what is sent leaves it, what is not stays.

    As in the authors' code (bloc97/DeMo, ``demo.py``). A place has 16 bits and a value
    32, as their ratio of 85 says; their code sends 64 and 32.

    Args:
        module: see ``EveryStep``.
        optimizers: see ``EveryStep``; ``lr`` is of a sign.
        decay: decay of the momentum.
        top: coefficients sent of a chunk of 64 × 64, or of 64.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        decay: float = 0.999,
        top: int = _CHUNK_TOP,
    ) -> None:
        super().__init__(module, optimizers)
        self._decay, self._top = decay, top
        self._momenta = [torch.zeros_like(p) for p in self._parameters]

    def update(self) -> None:
        """See ``EveryStep``."""
        start = time.perf_counter()
        messages, numbers = [], iter(self._momenta)
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = next(numbers)
                momentum.mul_(self._decay).add_(parameter.grad, alpha=group["lr"])
                places, values = largest(cosines(momentum), self._top)
                short = places.to(torch.uint16)
                messages += [p.view(torch.uint8).view(-1) for p in (short, values)]
                sent = spread([places], [values], momentum)
                momentum.sub_(of_cosines(sent, momentum))
        self.codec_seconds += time.perf_counter() - start
        arrived = [
            torch.split(said, [m.numel() for m in messages])
            for said in self.gather(torch.cat(messages))
        ]
        start = time.perf_counter()
        for index, parameter in enumerate(self._parameters):
            rows = len(chunked(parameter)[0])
            at = [
                said[2 * index].clone().view(torch.uint16).long().view(rows, -1)
                for said in arrived
            ]
            sizes = [
                said[2 * index + 1].clone().view(torch.float32).view(rows, -1)
                for said in arrived
            ]
            parameter.grad = of_cosines(spread(at, sizes, parameter), parameter)
        self.codec_seconds += time.perf_counter() - start
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def cosine_basis(size: int) -> Tensor:
    """Return the orthonormal DCT-II of ``size`` values, float32[place, frequency]."""
    at = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (at[:, None] + 0.5) * at) * math.sqrt(2 / size)
    basis[:, 0] /= math.sqrt(2)
    return basis.float()


def _bases(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bases of both sides of a tensor's chunks; of a vector's one is 1."""
    shape = chunked(like)[1]
    sides = (1, shape[0]) if len(shape) == 1 else (shape[1], shape[3])
    high, wide = (cosine_basis(side) for side in sides)
    return high, wide


def cosines(x: Tensor) -> Tensor:
    """Return the coefficients of a tensor's chunks, float32[chunk, coefficient]."""
    chunks, _ = chunked(x)
    high, wide = _bases(x)
    square = chunks.view(-1, len(high), len(wide))
    return (high.T @ square @ wide).reshape(chunks.shape)


def of_cosines(coefficients: Tensor, like: Tensor) -> Tensor:
    """Return the tensor that has these coefficients, in another's shape."""
    high, wide = _bases(like)
    square = coefficients.view(-1, len(high), len(wide))
    chunks = (high @ square @ wide.T).reshape(coefficients.shape)
    return joined(chunks, like, chunked(like)[1])


def largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return places and values of the largest magnitudes of every row."""
    places = rows.abs().topk(min(count, rows.shape[-1]), dim=-1).indices
    return places, rows.gather(-1, places)


def spread(places: Sequence[Tensor], values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return coefficients, each the mean of those ranks that have sent it."""
    total = torch.zeros_like(chunked(like)[0])
    senders = torch.zeros_like(total)
    for at, said in zip(places, values, strict=True):
        total.scatter_add_(-1, at, said)
        senders.scatter_add_(-1, at, torch.ones_like(said))
    return total / senders.clamp(min=1)


class OneBitAdam(EveryStep):
    """Adam until second moments are steady, then momentum in one bit.

    Steady, by the paper: the rate has ended to rise, and the second moments' norm is
    not less than 0.96 of what it is 1 / (1 - β₂) steps later. Then they stay.

    Args:
        module: see ``EveryStep``.
        optimizers: see ``EveryStep``; Adams, whose betas are taken over.

    Attributes:
        frozen_at: the step from which on one bit is sent; ``None``: not yet.
    """

    _EPS = 1e-8

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        super().__init__(module, optimizers)
        self._first = [torch.zeros_like(p) for p in self._parameters]
        self._second = [torch.zeros_like(p) for p in self._parameters]
        self._lost = [torch.zeros_like(p) for p in self._parameters]
        rank = dist.get_rank()
        self._owed = [
            torch.zeros_like(p.detach().reshape(-1).tensor_split(self.world)[rank])
            for p in self._parameters
        ]
        self._norms: list[float] = []
        self._rate = 0.0
        self.frozen_at: int | None = None

    def update(self) -> None:
        """See ``EveryStep``."""
        grads = [p.grad for p in self._parameters]
        beta1, beta2 = self.param_groups[0]["betas"]
        if self.frozen_at is None:
            means = self.all_reduce(grads)
            for first, second, mean in zip(
                self._first, self._second, means, strict=True
            ):
                first.mul_(beta1).add_(mean, alpha=1 - beta1)
                second.mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
            self._look(beta2)
        else:
            for first, lost, grad in zip(self._first, self._lost, grads, strict=True):
                lost.add_(first, alpha=beta1).add_(grad, alpha=1 - beta1)
            start, since = time.perf_counter(), self._transport.sent_bytes
            self._first, push, pull = two_hops(
                self._transport, self._lost, signs, self._owed
            )
            self.codec_seconds += time.perf_counter() - start
            self.sent_bytes += self._transport.sent_bytes - since
            self.entropy_bytes += self._transport.sent_bytes - since  # signs are noise
            self._pushed += sum(message.numel() for message in push)
            self._pulled += self.world * pull.numel()
        at = self.steps if self.frozen_at is None else self.frozen_at
        correct2 = 1 - beta2**at
        correct1 = 1 - beta1**self.steps
        numbers = zip(self._first, self._second, strict=True)
        for group in self.param_groups:
            for parameter in group["params"]:
                first, second = next(numbers)
                size = (second / correct2).sqrt_().add_(self._EPS)
                parameter.addcdiv_(first, size, value=-group["lr"] / correct1)

    def _look(self, beta2: float) -> None:
        """Freeze second moments if they are steady."""
        apart = round(1 / (1 - beta2))
        self._norms.append(sum(float(second.sum()) for second in self._second))
        rate = self.param_groups[0]["lr"]
        rises, self._rate = rate > self._rate, rate
        before = self._norms[-apart - 1] if len(self._norms) > apart else 0.0
        if not rises and before and before / self._norms[-1] >= _STEADY:
            self.frozen_at = self.steps


def signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return signs as codes, and - and + the root mean square of x."""
    size = x.norm() / math.sqrt(x.numel())
    return (x >= 0).long(), torch.stack([-size, size])


class Ef21Muon(EveryStep):
    """Muon whose momentum travels as what has changed of it, the largest tenth.

    Every rank sends the largest of momentum less what all have of it, as sign and
    exponent ("natural compression", 9 bits) and a place; all add it up. Parameters of
    Muon get an orthogonal update, all others a sign, both of root mean square 0.2.

    Args:
        module: see ``EveryStep``.
        optimizers: see ``EveryStep``.
        beta: decay of the momentum.
        top: the part of the values that is sent.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        beta: float = 0.9,
        top: float = 0.1,
    ) -> None:
        super().__init__(module, optimizers)
        self._beta, self._top = beta, top
        self._momenta = [torch.zeros_like(p) for p in self._parameters]
        self._known = [torch.zeros_like(p) for p in self._parameters]
        self._mean = [torch.zeros_like(p) for p in self._parameters]

    def update(self) -> None:
        """See ``EveryStep``."""
        for momentum, parameter in zip(self._momenta, self._parameters, strict=True):
            momentum.mul_(self._beta).add_(parameter.grad, alpha=1 - self._beta)
        if self.steps == 1:  # all begin with the whole
            self._known = [momentum.clone() for momentum in self._momenta]
            self._mean = self.all_reduce(self._known)
        else:
            self._exchange()
        numbers = iter(self._mean)
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = next(numbers)
                size = -group["lr"] * _RMS
                if group["spectral"]:
                    update = orthogonal(mean)
                    size *= math.sqrt(max(parameter.shape))
                else:
                    update = mean.sign()
                parameter.add_(update, alpha=size)

    def _exchange(self) -> None:
        start = time.perf_counter()
        messages = []
        for momentum, known in zip(self._momenta, self._known, strict=True):
            change = (momentum - known).reshape(1, -1)
            places, values = largest(change, self._count(change.numel()))
            coded = natural(values)
            known.view(-1).index_add_(0, places[0], of_natural(coded, places.numel()))
            messages += [places[0].to(torch.int32).view(torch.uint8), coded]
        self.codec_seconds += time.perf_counter() - start
        sizes = [message.numel() for message in messages]
        for said in self.gather(torch.cat(messages)):
            parts = torch.split(said, sizes)
            for index, mean in enumerate(self._mean):
                at = parts[2 * index].clone().view(torch.int32).long()
                change = of_natural(parts[2 * index + 1], at.numel())
                mean.view(-1).index_add_(0, at, change, alpha=1 / self.world)

    def _count(self, numel: int) -> int:
        return max(1, round(self._top * numel))


def natural(x: Tensor) -> Tensor:
    """Return sign and exponent of each value, uint8[ceil(9 n / 8)].

    To the nearest power of two, so that it contracts; the paper's rounds by chance.
    """
    bits = x.reshape(-1).contiguous().view(torch.int32)
    exponents = ((bits & 0x7FFFFFFF) + (1 << 22) >> 23).to(torch.uint8)
    negative = torch.nn.functional.pad((bits < 0).long(), (0, -bits.numel() % 8))
    packed = (negative.view(-1, 8) << torch.arange(8)).sum(1).byte()
    return torch.cat([exponents, packed])


def of_natural(data: Tensor, count: int) -> Tensor:
    """Return the values of what ``natural`` returned, float32[count]."""
    exponents, packed = data[:count].to(torch.int32), data[count:].long()
    values = (exponents << 23).view(torch.float32)
    negative = (packed[:, None] >> torch.arange(8) & 1).view(-1)[:count].bool()
    return torch.where(negative, -values, values)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest orthogonal matrix, about, by Muon's Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide: Tensor = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide
