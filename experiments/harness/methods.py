"""How gradients are averaged: what a user could choose, each with its bytes counted.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

import inspect
import math
import tomllib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
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

from experiments.harness.baselines import Int8, Largest, OneBit, StochasticTernary
from experiments.harness.rivals import DiLoCo, FourBits, MuLoCo, Outer, SparseLoCo
from experiments.harness.rivals_each_step import DeMo, Ef21Muon, EveryStep, OneBitAdam
from lc3.codec import Codec
from lc3.config import EntropyStage, Mode, Settings, Topology
from lc3.hooks import ddp, local_sgd, push_pull
from lc3.meter import Meter
from lc3.module.applied import kind_of_all
from lc3.wire.coder import Coder

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
        meter: meter of the hook's state.
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
        state.engine.messages.coder = Coder(codec)
    return Metered(state.meter, state.close, direct=state.engine.direct)


class Training(NamedTuple):
    """What to call instead of the module, what to step, what counts the traffic.

    ``shared`` is what to evaluate in: ranks then have the same parameters. After a
    multiple of ``every`` steps they have them anyway; a training ends at one. Where
    that is not so, ``end`` brings them together after the last step.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    traffic: Traffic
    shared: Callable[[], AbstractContextManager[None]] = nullcontext
    every: int = 1
    end: Callable[[], None] | None = None


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


@dataclass(frozen=True, kw_only=True)
class Fields:
    """One method, as ``methods.toml`` has it. What is ``None`` does not apply.

    Attributes:
        hook: name of what exchanges: one of ``_MAKERS``.
        sync_every: H, steps between two exchanges.
        sparsity: 3LC's s.
        density: part of the values that is sent.
        pull_sparsity: s of the way back.
        topology: see ``lc3.Tuning``.
        block_size: see ``lc3.Tuning``.
        entropy: see ``lc3.Config``.
        mode: see ``lc3.Tuning``.
        all_coded: whether biases and norms are, too.
        adam: whether the hook is given the optimizer, an Adam.
        max_update: see ``lc3.hooks.ddp.attach``. Default: Adam's own bound.
        residual_decay: see ``lc3.hooks.local_sgd.attach``.
        inner_momentum_scale: see there.
        outer_lr: see there.
        outer_momentum: see there.
        overlap: see there.
        fragments: see there.
        alpha: see there.
        dtype: dtype of what is sent.
        bits: bits of a value.
        rank: rank of the matrices that are sent.
        fraction: share of the values that are kept.
        bitmap: whether a bit a value says where they are.
    """

    hook: str
    sync_every: int | None = None
    sparsity: float | None = None
    density: float | None = None
    pull_sparsity: float | None = None
    topology: Topology | None = None
    block_size: int | None = None
    entropy: EntropyStage | None = None
    mode: Mode | None = None
    all_coded: bool = False
    adam: bool = False
    max_update: float | None = None
    residual_decay: float | None = None
    inner_momentum_scale: float | None = None
    outer_lr: float | None = None
    outer_momentum: float | None = None
    overlap: int | None = None
    fragments: int | None = None
    alpha: float | None = None
    dtype: str | None = None
    bits: int | None = None
    rank: int | None = None
    fraction: float | None = None
    bitmap: bool = False

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of some fields that apply."""
        return {n: v for n in names if (v := getattr(self, n)) is not None}

    @property
    def settings(self) -> Settings:
        """What lc3 compresses."""
        knobs = ("sparsity", "density", "pull_sparsity", "topology", "block_size")
        coded: dict[str, Any] = {}
        if self.all_coded:
            coded = {"min_ndim": 0, "min_numel": 1}
        return Settings(**self.given(*knobs, "entropy", "mode"), **coded)


def _all_reduce(
    hook: Callable[[dist.ProcessGroup, dist.GradBucket], Future], bits: int
) -> Method:
    def attach(model: DistributedDataParallel) -> Traffic:
        traffic = AllReduce(hook, bits, model.process_group)
        model.register_comm_hook(traffic, _counted)
        return traffic

    return _ddp(attach)


def _lc3(config: Settings) -> Method:
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
        apart = state.knobs.overlap or state.knobs.fragments > 1
        end = state.sync if apart else None
        return Training(module, optimizers, traffic, state.shared_model, every, end)

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
        elements: number of elements of the parameters.
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


def _preconditioned(fields: Fields) -> Method:
    """Return the form of every step that Adam gets, which it keeps."""
    config = replace(fields.settings, min_ndim=0, min_numel=1)

    def start(module: nn.Module, optimizers: Sequence[Optimizer]) -> Training:
        model = wrapped(module)
        most = fields.max_update
        if most is None and kind_of_all(optimizers) == "adam":
            most = math.inf
        state = ddp.attach(model, optimizers, config, max_update=most)
        traffic = Metered(state.meter, state.close, direct=state.engine.direct)
        return Training(model, optimizers, traffic)

    return start


_DTYPES = {"float32": "float32", "float16": "fp16", "bfloat16": "bf16"}
_USUAL_DENSITY = 0.1  # of local steps; a name says another


def label(fields: Fields) -> str:
    """Return the name of a method: what it is, and what of it is not usual."""
    every = fields.sync_every
    match fields.hook:
        case "all_reduce":
            return _DTYPES[str(fields.dtype)]
        case "ddp" if fields.mode == "auto":
            return "auto"
        case "ddp":
            head = "preconditioned " if fields.adam else "3LC "
            head += _percent(fields) or f"s={fields.sparsity:.2f}"
        case "push_pull":
            head = f"push-pull s={fields.sparsity:.2f}"
        case "local_sgd":
            head = f"local H={every}"
            if fields.density is None:
                head += ", uncoded"
            elif fields.density != _USUAL_DENSITY or fields.all_coded:
                head += f", {_percent(fields)}"
        case "largest":
            part = f"{100 * float(fields.fraction or 0):g}%"
            return f"{part} sparsification" if fields.bitmap else f"top-k {part}"
        case "power_sgd":
            return f"PowerSGD rank {fields.rank}"
        case "diloco":
            return f"DiLoCo {'E3M0 ' * (fields.dtype == 'e3m0')}H={every}"
        case "muloco":
            return f"MuLoCo {fields.bits} bit H={every}"
        case hook:
            return _NAMES[hook] + (f" H={every}" if every else "")
    unusual = {
        "block": fields.block_size,
        "pull": fields.pull_sparsity and f"s={fields.pull_sparsity:.2f}",
        "all coded": fields.all_coded and "",
        "direct": "" if fields.topology == "direct" else None,
        "updates": fields.max_update and f"≤ {fields.max_update:g}",
        "decay": fields.residual_decay,
        "rans": "" if fields.entropy == "rans" else None,
        "momentum": fields.inner_momentum_scale,
        "outer rate": fields.outer_lr and f"{fields.outer_lr:g}",
        "outer momentum": fields.outer_momentum,
        "overlap": fields.overlap,
        "fragments": fields.fragments,
        "alpha": fields.alpha,
    }
    said = [f"{k} {v}".strip() for k, v in unusual.items() if v not in (None, False)]
    return ", ".join([head, *said])


def _percent(fields: Fields) -> str:
    return "" if fields.density is None else f"density {100 * fields.density:g} %"


_NAMES = {
    "int8": "8-bit int",
    "stochastic_ternary": "Stoch 3-value + QE",
    "one_bit": "MQE 1-bit int",
    "sparseloco": "SparseLoCo",
    "demo": "DeMo",
    "one_bit_adam": "1-bit Adam",
    "ef21_muon": "EF21-Muon",
    "post_local_sgd": "post-local SGD",
}


def _every_step(fields: Fields) -> Method:
    return _preconditioned(fields) if fields.adam else _lc3(fields.settings)


def _local_steps(fields: Fields) -> Method:
    config = fields.settings
    if fields.density is None:
        config = Settings(exclude=("*",), entropy="none")
    knobs = fields.given("residual_decay", "inner_momentum_scale", "outer_lr")
    knobs |= fields.given("outer_momentum", "overlap", "fragments", "alpha")
    return _local(int(fields.sync_every or 0), config, **knobs)


_HOOKS = {
    "float32": (allreduce_hook, 32),
    "float16": (fp16_compress_hook, 16),
    "bfloat16": (bf16_compress_hook, 16),
}
_MAKERS: dict[str, Callable[[Fields], Method]] = {
    "all_reduce": lambda f: _all_reduce(*_HOOKS[str(f.dtype)]),
    "ddp": _every_step,
    "push_pull": lambda f: _push_pull(f.settings),
    "local_sgd": _local_steps,
    "int8": lambda _: _baseline(lambda _rank: Int8()),
    "stochastic_ternary": lambda _: _baseline(lambda r: StochasticTernary(seed=r)),
    "one_bit": lambda _: _baseline(lambda _rank: OneBit()),
    "largest": lambda f: _baseline(
        lambda _rank: Largest(float(f.fraction or 0), bitmap=f.bitmap)
    ),
    "power_sgd": lambda f: _power_sgd(int(f.rank or 0)),
    "diloco": lambda f: _rival(
        FourBits if f.dtype == "e3m0" else DiLoCo, int(f.sync_every or 0)
    ),
    "sparseloco": lambda f: _rival(SparseLoCo, int(f.sync_every or 0)),
    "muloco": lambda f: _rival(MuLoCo, int(f.sync_every or 0), **f.given("bits")),
    "demo": lambda _: _each_step(DeMo),
    "one_bit_adam": lambda _: _each_step(OneBitAdam),
    "ef21_muon": lambda _: _each_step(Ef21Muon),
    "post_local_sgd": lambda f: _post_local_sgd(int(f.sync_every or 0)),
}


def read(path: Path) -> dict[str, Fields]:
    """Return the methods of a TOML file by their names.

    Raises:
        ValueError: two have one name, or one has an unknown hook.
    """
    found: dict[str, Fields] = {}
    for table in tomllib.loads(path.read_text(encoding="utf-8"))["method"]:
        fields = Fields(**table)
        if fields.hook not in _MAKERS:
            raise ValueError(
                f"{path}: hook {fields.hook!r} is unknown; there are "
                f"{', '.join(_MAKERS)}"
            )
        name = label(fields)
        if name in found:
            raise ValueError(f"{path}: two methods are {name!r}")
        found[name] = fields
    return found


FIELDS = read(Path(__file__).with_suffix(".toml"))
METHODS = {name: _MAKERS[fields.hook](fields) for name, fields in FIELDS.items()}
AT_RATE = ", lr × "


def columns(name: str) -> dict[str, object]:
    """Return the fields of a method as columns of a result; what is not, is empty."""
    fields = FIELDS.get(name.partition(AT_RATE)[0], Fields(hook=""))
    return {k: "" if v in (None, False) else v for k, v in asdict(fields).items()}


def find(name: str) -> tuple[Method, float]:
    """Return a method, and what it multiplies the task's learning rate by.

    Args:
        name: a name of ``METHODS``, as it is or followed by ``, lr × 0.5``.

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
