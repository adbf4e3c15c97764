"""What the ranks of ``test_rivals`` do: train beside all ranks' shadows."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy.fft import dctn, idctn
from torch import Tensor, nn

from experiments.harness import rivals, rivals_each_step
from tests.ddp_cases import hash_of

EVERY, EXCHANGES = 3, 4


def net_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    net(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()


class Shadows:
    """All ranks' trainings, in this process, beside this rank's own."""

    def __init__(self, world: int) -> None:
        self.nets = [net_of(0) for _ in range(world)]
        self.optimizers = [torch.optim.SGD(s.parameters(), lr=0.1) for s in self.nets]
        self.base = [p.detach().clone() for p in self.nets[0].parameters()]
        self.velocity = [torch.zeros_like(p) for p in self.base]
        self.owed = [[torch.zeros_like(p) for p in self.base] for _ in self.nets]

    def train(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, exchange: int
    ) -> None:
        """Make the local steps before an exchange, on every rank alike."""
        for local in range(EVERY):
            number = 100 * (exchange * EVERY + local)
            step(net, optimizer, number + rank)
            for r, (shadow, theirs) in enumerate(
                zip(self.nets, self.optimizers, strict=True)
            ):
                step(shadow, theirs, number + r)

    def moved(self, rank: int, at: int) -> Tensor:
        """Return what a rank has moved of a parameter."""
        return self.base[at] - list(self.nets[rank].parameters())[at].detach()

    def nesterov(self, at: int, mean: Tensor, lr: float, momentum: float) -> None:
        """Make the outer step of a parameter."""
        self.velocity[at] = momentum * self.velocity[at] + mean
        self.base[at] = self.base[at] - lr * (mean + momentum * self.velocity[at])

    def go_on(self) -> None:
        """Let every rank begin from what is shared."""
        for shadow in self.nets:
            for p, value in zip(shadow.parameters(), self.base, strict=True):
                p.data.copy_(value)

    def apart(self, net: nn.Module) -> float:
        """Return how far a net is from what is shared."""
        pairs = zip(net.parameters(), self.base, strict=True)
        return max(float((p.detach() - value).abs().max()) for p, value in pairs)


def trains(rank: int, world: int, kind: str) -> tuple[float, bool, bool, bool]:
    """Return how far from the shadows; whether ranks, bytes, what is shared agree."""
    net = net_of(rank)  # rank 0's is everybody's
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    four = "E3M0" in kind
    outer: rivals.Outer
    if kind == "SparseLoCo":
        outer = rivals.SparseLoCo(net, [optimizer], EVERY, lr=0.7, decay=0.9)
    else:
        make = rivals.FourBits if four else rivals.DiLoCo
        outer = make(net, [optimizer], EVERY, 0.5, 0.9)

    shadows = Shadows(world)
    payload = 0
    for exchange in range(EXCHANGES):
        shadows.train(net, optimizer, rank, exchange)
        for at, old in enumerate(shadows.base):
            sent: list[Tensor] = []
            for r in range(world):
                moved = shadows.moved(r, at)
                if kind == "SparseLoCo":
                    moved = 0.9 * shadows.owed[r][at] + moved
                    coded = rivals.sparse(moved)
                    decoded = rivals.of_sparse(coded, moved)
                    shadows.owed[r][at] = moved - decoded
                    payload += coded.numel() * (r == rank)
                    moved = decoded
                elif four:
                    coded = rivals.e3m0(moved)
                    payload += coded.numel() * (r == rank)
                    moved = rivals.of_e3m0(coded, moved)
                sent.append(moved)
            mean = sum(sent, torch.zeros_like(old)) / world
            if kind == "SparseLoCo":
                shadows.base[at] = old - 0.7 * mean
            else:
                shadows.nesterov(at, mean, 0.5, 0.9)
        shadows.go_on()
    apart = shadows.apart(net)
    elements = sum(p.numel() for p in net.parameters())
    ring = EXCHANGES * (2 * (world - 1) * 4 * elements // world)
    expected = (world - 1) * payload if payload else ring
    digest = hash_of(net)
    step(net, optimizer, rank)
    with outer.shared_model():
        shared = hash_of(net) == digest
    shared = shared and hash_of(net) != digest
    outer.close()
    digests: list[str] = [""] * world
    dist.all_gather_object(digests, digest)
    return apart, len(set(digests)) == 1, outer.sent_bytes == expected, shared


Array = NDArray[Any]


def chunks_of(x: Array) -> list[tuple[slice, ...]]:
    """Return where the chunks of up to 64 × 64 of a matrix, or a vector, lie."""
    sides = [max(d for d in range(1, min(n, 64) + 1) if n % d == 0) for n in x.shape]
    places: list[tuple[slice, ...]] = [()]
    for size, side in zip(x.shape, sides, strict=True):
        places = [
            (*place, slice(at, at + side))
            for place in places
            for at in range(0, size, side)
        ]
    return places


class DeMoOracle:
    """DeMo of all ranks, chunk by chunk, with scipy's transform."""

    def __init__(self, shapes: list[tuple[int, ...]], world: int) -> None:
        self.momenta = [[np.zeros(s) for s in shapes] for _ in range(world)]

    def update(self, grads: list[list[Array]], lr: float, frozen: bool) -> list[Array]:
        """Return by how much each parameter changes."""
        changes = []
        for at, shape in enumerate(zip(*grads, strict=True)):
            total, senders = np.zeros(shape[0].shape), np.zeros(shape[0].shape)
            for momenta, of_rank in zip(self.momenta, grads, strict=True):
                momentum = momenta[at] = 0.999 * momenta[at] + lr * of_rank[at]
                for place in chunks_of(momentum):
                    found = dctn(momentum[place], norm="ortho")
                    flat = found.reshape(-1)
                    kept = np.argsort(-np.abs(flat), kind="stable")[:32]
                    sent = np.zeros_like(flat)
                    sent[kept] = flat[kept]
                    mask = np.zeros_like(flat)
                    mask[kept] = 1
                    total[place] += sent.reshape(found.shape)
                    senders[place] += mask.reshape(found.shape)
                    momentum[place] -= idctn(sent.reshape(found.shape), norm="ortho")
            mean = total / np.maximum(senders, 1)
            whole = np.zeros_like(mean)
            for place in chunks_of(mean):
                whole[place] = idctn(mean[place], norm="ortho")
            changes.append(-lr * np.sign(whole))
        return changes


class OneBitOracle:
    """1-bit Adam of all ranks; the caller says when second moments freeze."""

    def __init__(self, shapes: list[tuple[int, ...]], world: int) -> None:
        self.m, self.v = ([np.zeros(s) for s in shapes] for _ in "mv")
        self.lost = [[np.zeros(s) for s in shapes] for _ in range(world)]
        self.owed = [[np.zeros(len(p)) for p in self.split(m, world)] for m in self.m]
        self.steps, self.frozen_at, self.world = 0, 0, world

    @staticmethod
    def split(x: Array, world: int) -> list[Array]:
        return np.array_split(x.reshape(-1), world)

    @staticmethod
    def coded(x: Array) -> Array:
        return np.asarray(np.where(x >= 0, 1.0, -1.0) * np.sqrt((x**2).mean()))

    def update(self, grads: list[list[Array]], lr: float, frozen: bool) -> list[Array]:
        """Return by how much each parameter changes."""
        self.steps += 1
        self.frozen_at = self.frozen_at if frozen else self.steps
        changes = []
        for at, m in enumerate(self.m):
            if not frozen:
                mean = np.mean([g[at] for g in grads], axis=0)
                self.m[at] = 0.9 * m + 0.1 * mean
                self.v[at] = 0.99 * self.v[at] + 0.01 * mean**2
            else:
                sent = []
                for rank, lost in enumerate(self.lost):
                    whole = lost[at] + 0.9 * m + 0.1 * grads[rank][at]
                    sent.append(self.coded(whole))
                    lost[at] = whole - sent[-1]
                mean = np.mean(sent, axis=0)
                parts = self.split(mean, self.world)
                for owner, part in enumerate(parts):
                    if part.size:
                        whole = part + self.owed[at][owner]
                        parts[owner] = self.coded(whole)
                        self.owed[at][owner] = whole - parts[owner]
                self.m[at] = np.concatenate(parts).reshape(m.shape)
            size = np.sqrt(self.v[at] / (1 - 0.99**self.frozen_at)) + 1e-8
            changes.append(-lr * self.m[at] / (1 - 0.9**self.steps) / size)
        return changes


class Ef21Oracle:
    """EF21-Muon of all ranks; matrices that Muon has are those of ``spectral``."""

    def __init__(
        self, shapes: list[tuple[int, ...]], world: int, spectral: set[int]
    ) -> None:
        self.m, self.known = (
            [[np.zeros(s) for s in shapes] for _ in range(world)] for _ in "mk"
        )
        self.mean = [np.zeros(s) for s in shapes]
        self.steps, self.world, self.spectral = 0, world, spectral

    def update(self, grads: list[list[Array]], lr: float, frozen: bool) -> list[Array]:
        """Return by how much each parameter changes."""
        self.steps += 1
        changes = []
        for at in range(len(self.mean)):
            for rank, of_rank in enumerate(grads):
                m = self.m[rank][at] = 0.9 * self.m[rank][at] + 0.1 * of_rank[at]
                known = self.known[rank][at]
                change = (m - known).reshape(-1)
                if self.steps > 1:
                    kept = np.argsort(-np.abs(change))[: max(1, round(m.size / 10))]
                    power = np.zeros_like(change)
                    low = 2.0 ** np.floor(np.log2(np.abs(change[kept])))
                    up = np.abs(change[kept]) >= 1.5 * low
                    power[kept] = np.sign(change[kept]) * np.where(up, 2 * low, low)
                    change = power
                self.known[rank][at] = known + change.reshape(m.shape)
            self.mean[at] = np.mean([k[at] for k in self.known], axis=0)
            if at in self.spectral:
                whole = torch.from_numpy(self.mean[at])
                update = rivals_each_step.orthogonal(whole).numpy()
                update = update * np.sqrt(max(self.mean[at].shape))
            else:
                update = np.sign(self.mean[at])
            changes.append(-lr * 0.2 * update)
        return changes


def steps_together(rank: int, world: int, kind: str, steps: int) -> dict[str, object]:
    """Train beside an oracle that sees every rank's gradient.

    A sign that hangs on the last bit may differ, so that the oracle goes on from the
    ranks' parameters.
    """
    net, shadow = net_of(rank), net_of(0)
    lr = 1e-2
    params = list(net.parameters())
    if kind == "Ef21Muon":
        matrices = [p for p in params if p.ndim == 2]
        given: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0),
            torch.optim.SGD([p for p in params if p.ndim == 1], lr=lr),
        ]
    else:
        given = [torch.optim.Adam(params, lr=lr, betas=(0.9, 0.99))]
    optimizer: rivals_each_step.EveryStep = getattr(rivals_each_step, kind)(net, given)
    order = [p for group in optimizer.param_groups for p in group["params"]]
    at = [next(i for i, p in enumerate(params) if p is q) for q in order]
    shapes = [tuple(p.shape) for p in order]
    oracle: DeMoOracle | OneBitOracle | Ef21Oracle
    if kind == "DeMo":
        oracle = DeMoOracle(shapes, world)
    elif kind == "OneBitAdam":
        oracle = OneBitOracle(shapes, world)
    else:
        spectral = {i for i, s in enumerate(shapes) if len(s) == 2}
        oracle = Ef21Oracle(shapes, world, spectral)
    wrong, frozen_at = 0.0, None
    for number in range(steps):
        shadow.load_state_dict(net.state_dict())
        before = [p.detach().double().numpy().copy() for p in order]
        grads = []
        for r in range(world):
            torch.manual_seed(100 * number + r)
            shadow.zero_grad()
            shadow(torch.randn(8, 64)).square().mean().backward()
            own = [p.grad for p in shadow.parameters()]
            grads.append([own[i].double().numpy().copy() for i in at])  # type: ignore[union-attr]
        frozen = getattr(optimizer, "frozen_at", None) is not None
        expected = oracle.update(grads, lr, frozen)
        step(net, optimizer, 100 * number + rank)
        for old, change, parameter in zip(before, expected, order, strict=True):
            found = parameter.detach().double().numpy() - old
            far = np.abs(found - change) > 1e-3 * lr
            wrong = max(wrong, float(far.mean()))
    frozen_at = getattr(optimizer, "frozen_at", None)
    digests: list[str] = [""] * world
    dist.all_gather_object(digests, hash_of(net))
    report = {
        "wrong": wrong,
        "replicas": len(set(digests)) == 1,
        "frozen_at": frozen_at,
        "sent": optimizer.sent_bytes,
        "push": optimizer.push_bits,
        "pull": optimizer.pull_bits,
        "entropy": optimizer.entropy_bytes,
        "elements": sum(p.numel() for p in params),
    }
    optimizer.close()
    return report


def muloco(rank: int, world: int, bits: int) -> tuple[float, bool, bool]:
    """Return how far from a few lines; whether ranks and bytes agree."""
    net = net_of(rank)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    outer = rivals.MuLoCo(net, [optimizer], EVERY, bits, 0.5, 0.8, 0.9)
    shadows = Shadows(world)
    payload = 0
    for exchange in range(EXCHANGES):
        shadows.train(net, optimizer, rank, exchange)
        for at, old in enumerate(shadows.base):
            total = torch.zeros(old.numel())
            for r in range(world):
                whole = 0.9 * shadows.owed[r][at] + shadows.moved(r, at)
                sent = by_sigmas(whole.reshape(-1), bits).view_as(old)
                shadows.owed[r][at] = whole - sent
                total += sent.reshape(-1)
            parts = list((total / world).tensor_split(world))
            for r, part in enumerate(parts):
                if part.numel():
                    size = -(-part.numel() * bits // 8) + 4 * 2**bits
                    # To another owner once, its own mean to everybody else.
                    payload += size * (world - 1 if r == rank else 1)
                    parts[r] = by_sigmas(part, bits)
            shadows.nesterov(at, torch.cat(parts).view_as(old), 0.5, 0.8)
        shadows.go_on()
    apart = shadows.apart(net)
    outer.close()
    digests: list[str] = [""] * world
    dist.all_gather_object(digests, hash_of(net))
    framing = 2 * EXCHANGES * 8 * (world - 1)
    return apart, len(set(digests)) == 1, outer.sent_bytes == payload + framing


def by_sigmas(x: Tensor, bits: int) -> Tensor:
    """Return a vector as its codes say: each value the mean of those of its code."""
    levels = 2**bits
    centred = x - x.mean()
    sigma = float(centred.square().sum() / max(1, len(x) - 1)) ** 0.5
    scale = 6 * sigma / levels or 1.0
    codes = (centred / scale + levels // 2).round().clamp(0, levels - 1)
    found = torch.zeros_like(x)
    for code in range(levels):
        mine = codes == code
        if mine.any():
            found[mine] = centred[mine].mean() + x.mean()
    return found
