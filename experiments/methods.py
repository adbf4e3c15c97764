"""How gradients are averaged: what a user could choose, each with its bytes counted.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import (
    PeriodicModelAverager,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from experiments.baselines import Int8, Largest, OneBit, StochasticTernary
from experiments.rivals import DiLoCo, FourBits, MuLoCo, Outer, SparseLoCo
from experiments.rivals_each_step import DeMo, Ef21Muon, EveryStep, OneBitAdam
from lc3.codec import Codec
from lc3.coder import Coder
from lc3.config import EntropyStage, Settings, Topology
from lc3.hooks import ddp, local_sgd, push_pull
from lc3.meter import Meter

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


@dataclass
class Metered:
    """What one of lc3's hooks sent, from its meter.

    Attributes:
        meter: of the hook's state.
        close: ends the worker lane and its process group.
        every: steps between two exchanges; bits are per step.
        direct: without owners what others push is what a rank gets.
    """

    meter: Meter
    close: Callable[[], None]
    every: int = 1
    direct: bool = False

    @property
    def sent_bytes(self) -> int:
        """See ``Traffic``."""
        return self.meter.sent_bytes

    @property
    def push_bits(self) -> float:
        """See ``Traffic``."""
        return self.meter.push.bits_per_element / self.every

    @property
    def pull_bits(self) -> float:
        """See ``Traffic``."""
        if self.direct:
            return (dist.get_world_size() - 1) * self.push_bits
        return self.meter.pull.bits_per_element / self.every

    @property
    def frame_bits(self) -> float:
        """See ``Traffic``."""
        push = self.meter.push.frame_bits_per_element
        if self.direct:
            return dist.get_world_size() * push / self.every
        return (push + self.meter.pull.frame_bits_per_element) / self.every

    @property
    def codec_seconds(self) -> float:
        """See ``Traffic``."""
        return self.meter.seconds["encode"] + self.meter.seconds["decode"]


def _hooked(
    model: DistributedDataParallel, config: Settings, codec: Codec | None = None
) -> Metered:
    """Attach 3LC as a user does, or a codec of the same engine instead."""
    state = ddp.attach(model, config=config)
    if codec is not None:
        state.engine.coder = Coder(codec)
    return Metered(state.meter, state.close, direct=state.engine.direct)


class Training(NamedTuple):
    """What to call instead of the module, what to step, what counts the traffic.

    ``shared`` is what to evaluate in: ranks then have the same parameters. After a
    multiple of ``every`` steps they have them anyway; a training ends at one.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    traffic: Traffic
    shared: Callable[[], AbstractContextManager[None]] = nullcontext
    every: int = 1


# Makes ranks train one model, from the module and its optimizers.
Method = Callable[[nn.Module, Sequence[Optimizer]], Training]


def _ddp(
    attach: Callable[[DistributedDataParallel], Traffic],
    bucket_cap_mb: float | None = None,
) -> Method:
    """Return a method that is a communication hook of DDP."""

    def start(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
        model = wrapped(module, bucket_cap_mb)
        return Training(model, optimizers, attach(model))

    return start


def wrapped(
    module: nn.Module, bucket_cap_mb: float | None = None
) -> DistributedDataParallel:
    """Return a module in DDP; it may say how large its buckets are."""
    own = getattr(module, "bucket_cap_mb", None)
    model = DistributedDataParallel(module, bucket_cap_mb=bucket_cap_mb or own)
    # Statistics of batch norms are averaged where they are used, in evaluation, not
    # sent from rank 0 before every step.
    model.broadcast_buffers = model.forward_sync_buffers = False
    return model


def _all_reduce(
    hook: Callable[[dist.ProcessGroup, dist.GradBucket], Future], bits: int
) -> Method:
    def attach(model: DistributedDataParallel) -> Traffic:
        traffic = AllReduce(hook, bits, model.process_group)
        model.register_comm_hook(traffic, _counted)
        return traffic

    return _ddp(attach)


def _lc3(sparsity: float, **others: Any) -> Method:
    config = Settings(sparsity=sparsity, **others)
    return _ddp(lambda model: _hooked(model, config))


def _baseline(make_codec: Callable[[int], Codec]) -> Method:
    """Return a method of the paper's table, made for a rank; no entropy stage."""
    return _ddp(
        lambda model: _hooked(
            model, Settings(entropy="none"), make_codec(dist.get_rank())
        )
    )


class PowerSgd:
    """PyTorch's PowerSGD hook; its bytes as an all-reduce of what it says it sends."""

    codec_seconds = math.nan  # inside PyTorch's hook, not told apart from the exchange

    def __init__(self, model: DistributedDataParallel, rank: int) -> None:
        self._state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=2,
        )
        model.register_comm_hook(self._state, powerSGD_hook.powerSGD_hook)

    def _elements(self) -> tuple[float, float]:
        _, before, after = self._state.compression_stats()
        return before, after

    @property
    def sent_bytes(self) -> int:
        """See ``Traffic``."""
        world = dist.get_world_size()
        dense = min(self._state.iter, 2) * self._dense_elements()
        return int(2 * (world - 1) * 4 * (self._elements()[1] + dense) // world)

    def _dense_elements(self) -> float:
        coded_steps = self._state.iter - 2
        return self._elements()[0] / coded_steps if coded_steps > 0 else 0.0

    @property
    def push_bits(self) -> float:
        """See ``Traffic``."""
        before, after = self._elements()
        return 32 * after / before if before else math.nan

    pull_bits = push_bits

    @property
    def frame_bits(self) -> float:
        """See ``Traffic``."""
        return 2 * self.push_bits

    def close(self) -> None:
        """Nothing to free."""


def _power_sgd(rank: int) -> Method:
    # One bucket: with several its all-reduces of different sizes meet on gloo.
    return _ddp(lambda model: PowerSgd(model, rank), bucket_cap_mb=1e5)


# What ``local_sgd.attach`` chooses with AdamW; methods take it with every optimizer.
FOR_ADAM = {"outer_lr": 2.0, "residual_decay": 0.8, "inner_momentum_scale": 0.5}


def local_state(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    every: int,
    config: Settings,
    **given: Any,
) -> local_sgd.State:
    """Let a module train by local steps; of the knobs below what is not given is 1."""
    knobs = {"outer_lr": 1.0, "residual_decay": 1.0, "inner_momentum_scale": 1.0}
    return local_sgd.attach(
        module, optimizers, config, sync_every=every, **{**knobs, **given}
    )


def push_pull_optimizer(
    module: nn.Module, optimizers: Sequence[Optimizer], config: Settings
) -> tuple[DistributedDataParallel, push_pull.PushPull]:
    """Return the wrapped module and what steps it, in place of its one optimizer."""
    (given,) = optimizers  # one, element by element

    known = inspect.signature(type(given)).parameters
    options = {k: v for k, v in given.defaults.items() if k in known}

    def make(groups: list[dict[str, Any]]) -> Optimizer:
        return type(given)(groups, **options)

    model = wrapped(module)
    return model, push_pull.attach(model, make, config, params=given.param_groups)


def _local(every: int, config: Settings, **others: Any) -> Method:
    def start(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
        state = local_state(module, optimizers, every, config, **others)
        traffic = Metered(state.meter, state.close, every, state.engine.direct)
        return Training(module, optimizers, traffic, state.shared_model, every)

    return start


def _rival(make: Callable[..., Outer], every: int, **knobs: Any) -> Method:
    """Return another form of local steps, written from its paper."""

    def start(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
        outer = make(module, optimizers, every, **knobs)
        return Training(module, optimizers, outer, outer.shared_model, every)

    return start


def _each_step(
    make: Callable[[nn.Module, Sequence[Optimizer]], EveryStep],
) -> Method:
    """Return an optimizer that brings ranks together, written from its paper."""

    def start(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
        optimizer = make(module, optimizers)
        return Training(module, [optimizer], optimizer)

    return start


@dataclass
class Averaging:
    """PyTorch's post-local SGD: an all-reduce of the parameters, by a ring's bytes.

    Attributes:
        elements: of the parameters.
        every: steps between averages.
        averager: counts the steps, from 1 up.
    """

    elements: int
    every: int
    averager: PeriodicModelAverager
    codec_seconds: float = 0.0

    @property
    def sent_bytes(self) -> int:
        """See ``Traffic``."""
        world = dist.get_world_size()
        each = 2 * (world - 1) * 4 * self.elements // world
        return (self.averager.step - 1) // self.every * each

    @property
    def push_bits(self) -> float:
        """See ``Traffic``."""
        return 32 / self.every

    pull_bits = push_bits

    @property
    def frame_bits(self) -> float:
        """See ``Traffic``."""
        return 64 / self.every

    def close(self) -> None:
        """Nothing to free."""


def _post_local_sgd(every: int) -> Method:
    def start(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
        # Here, since it warns of what torch itself has deprecated.
        from torch.distributed.optim import PostLocalSGDOptimizer

        (given,) = optimizers
        alone, _ = dist.new_subgroups(1)
        model = wrapped(module)
        state = PostLocalSGDState(None, alone, start_localSGD_iter=0)
        model.register_comm_hook(state, post_localSGD_hook)
        averager = PeriodicModelAverager(every, warmup_steps=0)
        averager.step = 1  # so that it averages after every H-th step, not the next one
        elements = sum(p.numel() for p in module.parameters())
        traffic = Averaging(elements, every, averager)
        optimizer = PostLocalSGDOptimizer(given, averager)
        return Training(model, [optimizer], traffic, every=every)

    return start


def _push_pull(config: Settings) -> Method:
    def start(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
        model, optimizer = push_pull_optimizer(module, optimizers, config)
        return Training(model, [optimizer], Metered(optimizer.meter, optimizer.close))

    return start


def _preconditioned(
    sparsity: float, exchange: Topology = "owners", entropy: EntropyStage = "auto"
) -> Method:
    """Return the form of every step that Adam gets, which it keeps."""
    config = Settings(
        sparsity=sparsity,
        min_ndim=0,
        min_numel=1,
        entropy=entropy,
        topology=exchange,
    )

    def start(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
        model = wrapped(module)
        state = ddp.attach(model, optimizers, config)
        traffic = Metered(state.meter, state.close, direct=state.engine.direct)
        return Training(model, optimizers, traffic)

    return start


def all_coded(density: float, entropy: EntropyStage = "auto") -> Settings:
    """Return a configuration in which biases and norms do not travel raw."""
    return Settings(density=density, min_ndim=0, min_numel=1, entropy=entropy)


# Steps between exchanges, and the per cent of values sent.
ALL_CODED = (
    *((2, 30), (4, 3.6), (4, 4.7), (4, 10), (4, 30), (8, 9.5), (8, 10)),
    *((16, 4), (16, 9.5), (16, 30), (32, 10)),
)

# The same, and what multiplies residuals after each exchange.
DECAYING = ((8, 9.5, 0.8), (32, 10, 0.8))

# With the range stage, which leaves room for more values in as many bytes.
RANS = ((4, 4.6, 1.0), (8, 11.5, 1.0), (16, 11.5, 1.0), (32, 12.4, 0.8))

# Where first moments are halved after each exchange and masters go farther than the
# mean of what ranks moved: steps between exchanges, per cent sent, residuals' decay.
HALVED = ((8, 11.5, 1.0), (8, 11, 0.8), (8, 11.5, 0.8), (16, 11, 0.8), (32, 11.5, 0.8))

METHODS: dict[str, Method] = {
    "float32": _all_reduce(allreduce_hook, 32),
    "fp16": _all_reduce(fp16_compress_hook, 16),
    "3LC s=1.00": _lc3(1.0),
    "3LC s=1.50": _lc3(1.5),
    "3LC s=1.75": _lc3(1.75),
    "3LC s=1.90": _lc3(1.9),
    **{
        f"3LC s={s:.2f}, direct": _lc3(s, topology="direct")
        for s in (1.0, 1.5, 1.75, 1.9)
    },
    "3LC s=1.00, all coded": _lc3(1.0, min_ndim=0, min_numel=1),
    "s=1.00, block 1024": _lc3(1.0, block_size=1024),
    "s=1.75, block 1024": _lc3(1.75, block_size=1024),
    "s=1.75, pull s=1.00": _lc3(1.75, pull_sparsity=1.0),
    "density 5 %": _lc3(1.0, density=0.05),
    "auto": _ddp(lambda model: _hooked(model, Settings(mode="auto"))),
    "bf16": _all_reduce(bf16_compress_hook, 16),
    "8-bit int": _baseline(lambda _rank: Int8()),
    "Stoch 3-value + QE": _baseline(lambda rank: StochasticTernary(seed=rank)),
    "MQE 1-bit int": _baseline(lambda _rank: OneBit()),
    "25% sparsification": _baseline(lambda _rank: Largest(0.25, bitmap=True)),
    "5% sparsification": _baseline(lambda _rank: Largest(0.05, bitmap=True)),
    "top-k 1%": _baseline(lambda _rank: Largest(0.01, bitmap=False)),
    "top-k 0.1%": _baseline(lambda _rank: Largest(0.001, bitmap=False)),
    "PowerSGD rank 1": _power_sgd(1),
    "PowerSGD rank 2": _power_sgd(2),
    "PowerSGD rank 4": _power_sgd(4),
    "preconditioned s=1.00": _preconditioned(1.0),
    "preconditioned s=1.00, rans": _preconditioned(1.0, entropy="rans"),
    "preconditioned s=1.00, direct": _preconditioned(1.0, "direct"),
    "push-pull s=1.00": _push_pull(Settings(sparsity=1.0)),
    "2 local steps": _local(2, Settings(exclude=("*",), entropy="none")),
    **{
        f"local H={every}": _local(every, Settings(density=0.1))
        for every in (2, 8, 16, 32)
    },
    "local H=8, decay 0.8, momentum 0.5, outer rate 2": _local(
        8, Settings(density=0.1), **FOR_ADAM
    ),
    "local H=16, density 30 %": _local(16, Settings(density=0.3)),
    "local H=8, direct": _local(8, Settings(density=0.1, topology="direct")),
    "local H=8, density 5 %, direct": _local(
        8, Settings(density=0.05, topology="direct")
    ),
    **{
        f"local H={every}, density {percent} %, all coded": _local(
            every, all_coded(percent / 100)
        )
        for every, percent in ALL_CODED
    },
    **{
        f"local H={every}, density {percent} %, all coded, decay {decay}": _local(
            every, all_coded(percent / 100), residual_decay=decay
        )
        for every, percent, decay in DECAYING
    },
    **{
        f"local H={every}, density {percent} %, all coded, "
        + (f"decay {decay}, rans" if decay < 1 else "rans"): _local(
            every, all_coded(percent / 100, "rans"), residual_decay=decay
        )
        for every, percent, decay in RANS
    },
    **{
        f"local H={every}, density {percent} %, all coded, "
        + (f"decay {decay}, rans" if decay < 1 else "rans")
        + ", momentum 0.5, outer rate 2": _local(
            every,
            all_coded(percent / 100, "rans"),
            residual_decay=decay,
            inner_momentum_scale=0.5,
            outer_lr=2,
        )
        for every, percent, decay in HALVED
    },
    **{f"DiLoCo H={every}": _rival(DiLoCo, every) for every in (8, 32)},
    **{f"DiLoCo E3M0 H={every}": _rival(FourBits, every) for every in (8, 32)},
    **{f"SparseLoCo H={every}": _rival(SparseLoCo, every) for every in (8, 32)},
    **{
        f"MuLoCo {bits} bit H={every}": _rival(MuLoCo, every, bits=bits)
        for bits in (2, 4)
        for every in (8, 32)
    },
    "DeMo": _each_step(DeMo),
    "1-bit Adam": _each_step(OneBitAdam),
    "EF21-Muon": _each_step(Ef21Muon),
    **{f"post-local SGD H={every}": _post_local_sgd(every) for every in (8, 32)},
    "3LC s=1.00, rans": _lc3(1.0, entropy="rans"),
    "3LC s=1.75, rans": _lc3(1.75, entropy="rans"),
}
AT_RATE = ", lr × "


def find(name: str) -> tuple[Method, float]:
    """Return a method, and what it multiplies the task's learning rate by.

    Args:
        name: of ``METHODS``, as it is or followed by ``, lr × 0.5``.

    Raises:
        KeyError: there is none of that name; the message says what there is.
    """
    method, at_rate, factor = name.partition(AT_RATE)
    try:
        times = float(factor) if at_rate else 1.0
    except ValueError:
        times = math.nan
    if method not in METHODS or not 0 < times < math.inf:
        raise KeyError(
            f"method {name!r} is unknown; there are {', '.join(METHODS)}, each also "
            f"as '{next(iter(METHODS))}{AT_RATE}0.5', with half the learning rate"
        )
    return METHODS[method], times


DEMO = (
    *("float32", "fp16"),
    *(
        f"3LC s={s:.2f}{form}"
        for s in (1.0, 1.5, 1.75, 1.9)
        for form in (", direct", "")
    ),
)
