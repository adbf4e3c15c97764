"""What every hook needs for one model: names, a group of its own, an engine, a lane."""

import atexit
import logging
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lc3 import private
from lc3.checkpoint import from_bytes, to_bytes
from lc3.codec import codec_for, warm_up
from lc3.config import Settings, check_count
from lc3.engines.auto import AutoEngine
from lc3.engines.costs import measure
from lc3.engines.direct import engine_for
from lc3.engines.engine import Engine
from lc3.engines.exchange import Exchange
from lc3.engines.two_levels import Nodes, TwoLevels, nodes_of
from lc3.errors import AttachError, ConfigError, ReplicasDiffer
from lc3.meter import Meter
from lc3.module.buffers import Buffers
from lc3.module.link import (
    Link,
    Run,
    buffers_are_free,
    check_unclaimed,
    fill,
    link_of,
    link_to,
)
from lc3.module.model import named_parameters
from lc3.plan import Plan, make_plan
from lc3.residual import Residuals
from lc3.transport.channel import Channel
from lc3.transport.group import GroupTransport
from lc3.transport.handshake import agree, refuse, threads_for
from lc3.transport.lane import Lane
from lc3.transport.loopback import Loopback
from lc3.transport.protocol import Divisible, Transport
from lc3.version import __version__
from lc3.wire import rans
from lc3.wire.coder import Coder

_CPU = torch.device("cpu")
_CLOSE_TIMEOUT_S, _EXIT_TIMEOUT_S, _REFUSE_S = 10.0, 2.0, 60.0
log = logging.getLogger(__name__)


_OPEN: "WeakSet[Session]" = WeakSet()


@atexit.register
def _close_all() -> None:
    for session in list(_OPEN):
        with suppress(Exception):
            session.close(_EXIT_TIMEOUT_S)


# Sessions that were made since ``attaching`` began.
_ATTACHING: ContextVar[list["Session"] | None] = ContextVar("attaching", default=None)


@contextmanager
def attaching(
    connect: Callable[[], tuple[Transport, Callable[[], None]]],
) -> Iterator[None]:
    """Tell the other ranks of any error in the block, wherever they wait by then.

    A rank that just left would be missed for the whole timeout of the process group. If
    every rank has the error, each raises its own at once.

    Args:
        connect: returns an exchange between the ranks, and how to leave it; for errors
            from before there is a session.
    """
    made: list[Session] = []
    token = _ATTACHING.set(made)
    try:
        yield
    except Exception as error:
        if made:
            made[-1].fail(error)
        elif dist.is_initialized():
            _tell(connect, error)
        raise
    finally:
        _ATTACHING.reset(token)


@contextmanager
def attaching_everywhere() -> Iterator[Transport]:
    """Lend an exchange between all ranks of the job, for as long as they attach.

    For groups that exchange for themselves later: in the end all ranks have attached,
    or none has.

    Raises:
        PeerError: another rank could not.
    """
    transport, leave = connection(world_group(), None)
    try:
        try:
            yield transport
        except Exception as error:
            _tell(lambda: (transport, lambda: None), error)
            raise
        threads_for(transport, Settings())
        agree(transport, __version__, Settings(), [], lambda: None)
    finally:
        leave()


def _tell(
    connect: Callable[[], tuple[Transport, Callable[[], None]]], error: Exception
) -> None:
    """Let ranks that are about to shake hands know of an error."""
    log.error("lc3: %s; the other ranks are told", error)
    telling = threading.Thread(
        target=_refuse, args=(connect, error), name="lc3-refuses", daemon=True
    )
    telling.start()
    telling.join(_REFUSE_S)  # nobody may ever attach


def _refuse(
    connect: Callable[[], tuple[Transport, Callable[[], None]]], error: Exception
) -> None:
    with suppress(Exception):
        transport, leave = connect()
        refuse(transport, __version__, error)
        leave()


class _Sealed:
    """Gathers messages that a rank which has failed can answer.

    Like the handshake before it, this is no part of training that a meter counts.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """See ``Transport.all_gather``."""
        tag = self._channel.aside()
        with self._channel.telling_others(*tag):
            return self._channel.all_gather_bytes(message, *tag)


# Works on a bucket: its flat buffer, its parameters' names, step, number; returns what
# the hook's future must hold.
BucketJob = Callable[[Tensor, list[str], int, int], Tensor]
Native = Callable[
    [dist.GradBucket, list[str], int], torch.futures.Future[Tensor] | None
]


class Session:
    """One model's connection to the other ranks. Making one is collective.

    Args:
        parameters: (name, parameter), the trainable ones, in the model's order.
        config: settings of what to compress, and how much.
        transport: between the ranks, that nobody else uses.
        leave: function to call when the session ends.
        mesh: device mesh for two levels, see ``lc3.engines.two_levels.nodes_of``.
        ranks: their numbers in the job, which a mesh has and errors say. Default: as
            the transport numbers them.
        facts: other values that must be the same on every rank, by name.
        extras: see ``make_plan``.

    Attributes:
        names: the name of each parameter.
        config: the configuration.
        meter: bytes and seconds so far, on this rank.
        engine: moves and codes; holds the plan and the residuals.
        lane: the thread that talks to other ranks.
        step: synchronised backward passes so far.

    Raises:
        AttachError: the model cannot be compressed.
        ConfigError: a pattern of the configuration matches no parameter.
        PlanMismatch: ranks differ in configuration, parameters or version.
        PeerError: one of these happened on another rank.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        config: Settings,
        transport: Transport,
        leave: Callable[[], None],
        mesh: DeviceMesh | int | None = None,
        ranks: Sequence[int] = (),
        facts: Mapping[str, object] | None = None,
        extras: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.names: dict[Tensor, str] = {p: name for name, p in parameters}
        self.config = config
        self.meter = Meter(log_every=None if transport.rank else config.log_every)
        self._leave = leave
        self._ranks = ranks or range(transport.world)
        self._link: Link | None = None
        self._compared: tuple[nn.Module, int] | None = None
        if (made := _ATTACHING.get()) is not None:
            made.append(self)
        shapes = self._shapes
        world = transport.world

        def build() -> tuple[Coder, Plan, Nodes]:
            private.check()
            device = _check_parameters(self.names, config)
            nodes = [[rank] for rank in range(world)]
            if mesh is not None:
                check_form(config, "hooks.ddp with a mesh")
                nodes = nodes_of(mesh, ranks)
                if len(nodes) == 1 and world > 1 and transport.rank == 0:
                    log.warning(
                        "lc3: the mesh puts all %d ranks into one node, so nothing is "
                        "compressed; leave mesh out where they should compress among "
                        "themselves",
                        world,
                    )
            coder = Coder(codec_for(device), threads, device)
            warm_up(coder.host)
            if config.entropy == "rans":
                rans.warm_up()
            if device != _CPU:
                warm_up(codec_for(device), device)
            return coder, make_plan(shapes, world, config, extras), nodes

        try:
            threads = threads_for(transport, config)
            table: object = mesh if isinstance(mesh, int | None) else repr(mesh)
            if isinstance(mesh, DeviceMesh):
                table = mesh.mesh.tolist()
            facts = {"mesh": table, **(facts or {})}
            coder, plan, nodes = agree(
                transport, __version__, config, shapes, build, facts
            )
            transport.most_bytes += _largest_bytes(plan)
            self.engine: Exchange
            if len(nodes) < world:
                assert isinstance(transport, Divisible)
                self.engine = TwoLevels(
                    plan, config, transport, nodes, coder, self.meter
                )
            else:
                flat = engine_for(plan, config, transport, coder, self.meter)
                self.engine = flat
                if config.mode == "auto" and world > 1:
                    costs = measure(transport, coder.host, config, threads)
                    self.engine = AutoEngine(flat, costs)
        except BaseException:
            leave()
            raise
        self.lane = Lane(f"lc3-rank{transport.rank}", coder.device)
        self.begin_step(0)
        _OPEN.add(self)

    @property
    def flat_engine(self) -> Engine:
        """The engine, where there is no mesh and no choice by bucket."""
        assert isinstance(self.engine, Engine)
        return self.engine

    def go_over_to(self, transport: Transport, residuals: Residuals) -> None:
        """Exchange over another transport from now on, on the lane.

        With other ranks, of whom each does so. What was counted and steered stays.

        Args:
            transport: between the ranks, that nobody else uses.
            residuals: what this rank owes.
        """
        before = self.flat_engine
        plan = make_plan(self._shapes, transport.world, self.config)
        transport.most_bytes += _largest_bytes(plan)
        self.engine = engine_for(
            *(plan, self.config, transport, before.messages.coder, self.meter),
            residuals=residuals,
            budget=before.budget,
        )

    def fail(self, error: Exception) -> None:
        """Tell the other ranks that this one stops, and close."""
        if self in _OPEN:
            self.engine.channel.tell(error, 0, 0)
            self.close()

    @property
    def _shapes(self) -> list[tuple[str, list[int]]]:
        return [(name, list(p.shape)) for p, name in self.names.items()]

    def on_bucket(
        self, bucket: dist.GradBucket, job: BucketJob, native: Native | None = None
    ) -> torch.futures.Future[Tensor]:
        """Run ``job`` on the lane for a bucket that DDP hands to its hook.

        Its error ends ``backward()`` as what it is, and the future.

        Args:
            bucket: the bucket that the hook was given.
            job: see ``BucketJob``.
            native: starts an exchange that needs no lane, or returns ``None``; the same
                on every rank.
        """
        buffer = bucket.buffer()
        names = [self._name_of(parameter) for parameter in bucket.parameters()]
        step, index = self.next_bucket(names)
        if self._compared is not None and index == 0 and step:
            module, every = self._compared
            if step % every == 0:
                self._wait_at_end(
                    self.lane.submit(self._comparison(alike_in(module), step))
                )
        if native is not None and (started := native(bucket, names, step)) is not None:
            return started
        future = self.lane.submit(lambda: job(buffer, names, step, index))
        self._wait_at_end(future)
        return future

    def _wait_at_end(self, future: torch.futures.Future[Tensor]) -> None:
        # DDP would cast an exception to a tensor. Waiting at the end of backward,
        # before DDP does, raises it. Outside of backward (Join) nobody but DDP can.
        with suppress(RuntimeError):
            private.at_end_of_backward(partial(self.wait, future))

    def agree_on(self, facts: Mapping[str, object]) -> None:
        """Compare what else has to be the same on every rank; collective.

        Raises:
            PlanMismatch: ranks differ; the same sentence on every rank.
        """
        sealed = _Sealed(self.engine.channel)
        agree(sealed, __version__, self.config, self._shapes, lambda: None, facts)

    def link_to(
        self,
        model: DistributedDataParallel,
        run: Run,
        check_every: int | None = None,
    ) -> None:
        """Let buckets of ``model`` go to ``run`` until this is closed.

        Args:
            model: the module that DDP wraps.
            run: gets the buckets.
            check_every: steps between two comparisons of all replicas; ``None``: none.

        Raises:
            ConfigError: ``check_every`` is less than 1, or no integer.
            PlanMismatch: it differs between ranks.
        """
        said = check_every if isinstance(check_every, int | None) else repr(check_every)
        self.agree_on({"check_every": said})
        if check_every is not None:
            check_count("check_every", check_every, 1)
            self._compared = model.module, check_every
        self._link = link_to(model, run, self._buffers_of(model))

    def adopt(self, model: DistributedDataParallel, run: Run) -> Link:
        """Return a link for a model whose hook the user has registered.

        Args:
            model: the module that DDP wraps.
            run: gets the buckets until this is closed.
        """
        self._link = Link(model.process_group)
        fill(self._link, model, run, self._buffers_of(model))
        return self._link

    def _buffers_of(self, model: DistributedDataParallel) -> Buffers | None:
        if self.engine.transport.world == 1 or not buffers_are_free(model):
            return None
        return Buffers(model, self.any_rank, self.count_buffers)

    def any_rank(self, mine: Sequence[bool]) -> list[bool]:
        """Return where some rank says yes; collective."""

        def ask() -> list[bool]:
            tag = self.engine.channel.aside()
            with self.engine.channel.exchanging(0, *tag):
                return self.engine.channel.any_rank(mine, *tag)

        return self.lane.call(ask)

    def count_buffers(self, sent_bytes: int) -> None:
        """Count what DDP sends of buffers."""
        self.meter.add(sent_bytes, 0.0, 1)

    def wait(self, future: torch.futures.Future[Tensor]) -> None:
        """Wait for a job of the lane, on the training's clock."""
        with self.meter.stage("wait"):
            future.wait()

    def check_replicas(
        self, held: Mapping[str, Tensor], step: int | None = None
    ) -> None:
        """Compare checksums of what must be alike over the ranks; collective.

        Four bytes a tensor travel. For every few hundred steps of a run whose code is
        not trusted to keep replicas alike: a parameter changed on one rank only, an
        optimizer that is not deterministic, broken memory.

        Args:
            held: the tensors by name; of a sharded one this rank's part is compared.
            step: the number of the last one. Default: this session's.

        Raises:
            ReplicasDiffer: the same on every rank; names the first tensor and the ranks
                that hold another than most.
        """
        at = self.step if step is None else step
        self.lane.call(self._comparison(held, at))

    def _comparison(self, kept: Mapping[str, Tensor], at: int) -> Callable[[], Tensor]:
        """Return a job for the lane that compares replicas after ``at`` steps."""

        def compare() -> Tensor:
            mine = [
                zlib.crc32(_bytes_of(tensor))  # type: ignore[arg-type]  # since 3.12
                for tensor in kept.values()
            ]
            names_here = zlib.crc32(",".join(kept).encode())
            sums_here = torch.tensor([names_here, *mine], dtype=torch.int64)
            tag = self.engine.channel.aside()
            with self.engine.channel.exchanging(0, *tag):
                shared = self.engine.channel.all_gather_bytes(sums_here, *tag)
            everybody = [data.clone().view(torch.int64).tolist() for data in shared]
            if len({sums[0] for sums in everybody}) > 1:
                raise ReplicasDiffer(
                    f"ranks hold parameters of different names after {at} steps; build "
                    "and change the model alike everywhere"
                )
            sums = zip(*everybody, strict=True)
            next(sums)
            for name, held in zip(kept, sums, strict=True):
                if len(set(held)) > 1:
                    usual = max(held, key=held.count)
                    others = [r for r, value in enumerate(held) if value != usual]
                    ranks = f"rank{'s' * (len(others) > 1)} "
                    ranks += ", ".join(str(self._ranks[r]) for r in others)
                    raise ReplicasDiffer(
                        f"{name} differs on {ranks} after {at} steps; load a "
                        "checkpoint from before, and look at what changes it on some "
                        "ranks only"
                    )
            return sums_here

        return compare

    def gather(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return every rank's ``state`` on rank 0, none elsewhere; collective."""
        data = to_bytes(state)
        saved = self.lane.call(lambda: self.engine.channel.collect(data))
        return [from_bytes(one, f"rank {rank}") for rank, one in enumerate(saved)]

    def begin_step(self, step: int) -> None:
        """Let the next bucket be the first of ``step``."""
        self.step = step
        self.buckets = 0
        self._due = set(self.names.values())

    def _name_of(self, parameter: Tensor) -> str:
        name = self.names.get(parameter)
        if name is None:
            raise AttachError(
                f"a bucket holds a parameter of shape {list(parameter.shape)} that was "
                "frozen when lc3 was attached; set requires_grad before wrapping the "
                "model"
            )
        return name

    def next_bucket(self, names: Sequence[str]) -> tuple[int, int]:
        """Return (step, bucket) for the bucket with the parameters ``names``.

        Counted here: under ``static_graph`` DDP gives every bucket of the first step
        the index 0. A step ends when every parameter was in a bucket, or when one comes
        again because a backward pass was cut short.
        """
        if not self._due.issuperset(names):
            self.begin_step(self.step + 1)
        tag = self.step, self.buckets
        self.buckets += 1
        self._due.difference_update(names)
        if not self._due:
            self.begin_step(self.step + 1)
        return tag

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """End the lane, the threads, and the group it made. Again: does nothing.

        A model that was linked exchanges its gradients as without lc3. Called at exit
        by itself: threads of a group that is still there then may abort the process.

        Args:
            timeout_s: limit on the lane's present job.
        """
        if self._link is not None:
            self._link.close()
            self._link = None
        _OPEN.discard(self)
        if self.lane.close(timeout_s):
            self.engine.close()
            self._leave()


def _largest_bytes(plan: Plan) -> int:
    """Return the bytes of a whole state: residuals, masters, an optimizer's."""
    return 64 * sum(plan.numel.values())


def session_beside(
    parameters: Iterable[tuple[str, Tensor]],
    config: Settings,
    beside: dist.ProcessGroup,
    group: dist.ProcessGroup | None,
    mesh: DeviceMesh | int | None = None,
    facts: Mapping[str, object] | None = None,
    extras: Mapping[str, int] = MappingProxyType({}),
) -> Session:
    """Return a session over a process group.

    Args:
        parameters: see ``Session``.
        config: see ``Session``.
        beside: the group whose ranks train the model; others use it too.
        group: a group of the same ranks that nobody else uses. Default: one is made.
        mesh: device mesh for two levels, see ``lc3.engines.two_levels.nodes_of``.
        facts: see ``Session``.
        extras: see ``make_plan``.

    Raises:
        AttachError: the group is no such group; and what ``Session`` raises.
    """
    transport, leave = connection(beside, group)
    ranks = dist.get_process_group_ranks(group or beside)
    return Session(parameters, config, transport, leave, mesh, ranks, facts, extras)


def alone() -> bool:
    """Return whether this process is the only one of its job."""
    if dist.is_initialized():
        return dist.get_world_size() == 1
    return os.environ.get("WORLD_SIZE", "1") == "1"


def nobody() -> tuple[Transport, Callable[[], None]]:
    """Return an exchange with no other rank, and how to leave it."""
    return Loopback(1).ranks[0], lambda: None


def world_group() -> dist.ProcessGroup:
    """Return the group of all ranks.

    Raises:
        AttachError: there is none yet.
    """
    if not dist.is_initialized() or dist.group.WORLD is None:
        raise AttachError("call torch.distributed.init_process_group first")
    return dist.group.WORLD


def connection(
    beside: dist.ProcessGroup, group: dist.ProcessGroup | None
) -> tuple[GroupTransport, Callable[[], None]]:
    """Return an exchange that nobody else uses, and how to leave it; collective.

    Args:
        beside: see ``session_beside``.
        group: see ``session_beside``.
    """
    own, is_mine = _group_for(beside, group)
    device = _CPU
    if dist.get_backend(own) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    transport = GroupTransport(own, device)
    return transport, partial(transport.leave, destroy=is_mine)


def attaching_to(
    model: nn.Module, group: dist.ProcessGroup | None
) -> AbstractContextManager[None]:
    """Return ``attaching`` for the ranks of a model, wrapped by DDP or not."""

    def connect() -> tuple[GroupTransport, Callable[[], None]]:
        beside = getattr(model, "process_group", None) or dist.group.WORLD
        assert isinstance(beside, dist.ProcessGroup)
        try:
            return connection(beside, group)
        except AttachError:
            return connection(beside, None)

    return attaching(connect)


def session_for(
    model: DistributedDataParallel,
    config: Settings,
    group: dist.ProcessGroup | None,
    mesh: DeviceMesh | int | None = None,
    facts: Mapping[str, object] | None = None,
    extras: Mapping[str, int] = MappingProxyType({}),
) -> Session:
    """Return the session of a model that DDP wraps; see ``session_beside``.

    Raises:
        AttachError: it is not wrapped, has a hook already, or gives hooks no buckets.
    """
    if not isinstance(model, DistributedDataParallel):
        raise AttachError(
            f"attach needs a DistributedDataParallel, got {type(model).__name__}; wrap "
            "the module first: model = DistributedDataParallel(model)"
        )
    if private.gives_no_buckets(model):
        raise AttachError(
            'with torch._dynamo.config.optimize_ddp = "python_reducer" DDP gives hooks '
            'no buckets; set it to "ddp_optimizer" before the model is wrapped'
        )
    link_of(model)
    check_unclaimed(model.module)
    trained = [
        (name, parameter)
        for name, parameter in named_parameters(model.module)
        if parameter.requires_grad and name not in model.parameters_to_ignore
    ]
    return session_beside(
        trained, config, model.process_group, group, mesh, facts, extras
    )


def check_module(model: object) -> None:
    """Raise ``AttachError`` unless this is a module."""
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"attach needs the model, a torch.nn.Module, got {type(model).__name__}"
        )


def check_norm(max_norm: object) -> None:
    """Raise ``ConfigError`` unless this is ``None`` or a norm to clip to."""
    if max_norm is None:
        return
    is_number = isinstance(max_norm, int | float) and not isinstance(max_norm, bool)
    if not is_number or not 0 < max_norm < math.inf:  # type: ignore[operator]
        raise ConfigError(
            f"max_norm={max_norm!r} must be a positive number, like 1.0, or None"
        )


def check_scaler(scaler: object) -> None:
    """Raise ``ConfigError`` unless this is ``None`` or a GradScaler."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise ConfigError(f"scaler={scaler!r} must be a torch.amp.GradScaler, or None")


def check_form(config: Settings, hook: str) -> None:
    """Raise ``ConfigError`` if a configuration asks for what only one hook does."""
    if config.mode != "3lc":
        raise ConfigError(
            f"mode={config.mode!r} lets a bucket of hooks.ddp without a mesh travel "
            f"uncoded; {hook} always sends 3LC: leave mode out"
        )


def check_owners(config: Settings, what: str) -> None:
    """Raise ``ConfigError`` if there are no owners for what lives on them."""
    if config.topology == "direct":
        raise ConfigError(
            f"{what} needs master weights on owner ranks, and topology='direct' has "
            "none; leave one of them out"
        )


def _check_parameters(names: Mapping[Tensor, str], config: Settings) -> torch.device:
    """Return the device that all parameters are on."""
    if not names:
        raise AttachError(
            "the model has no trainable parameter, so nothing to compress"
        )
    first, first_name = next(iter(names.items()))
    for parameter, name in names.items():
        if parameter.is_complex():
            raise AttachError(
                f"parameter {name!r} is {parameter.dtype}; lc3 compresses real "
                "gradients: keep complex parameters as two real ones "
                "(torch.view_as_real)"
            )
        if parameter.device != first.device:
            raise AttachError(
                f"parameter {first_name!r} is on {first.device}, {name!r} on "
                f"{parameter.device}; all parameters of a rank must be on one device"
            )
    if config.mode == "auto" and first.device != _CPU:
        raise ConfigError(
            f"mode='auto' compares 3LC with an all-reduce on the CPU, the model is on "
            f"{first.device}; python -m lc3 doctor says below which link rate 3LC "
            "wins: leave mode out, or do not attach"
        )
    return first.device


def alike_in(module: nn.Module) -> dict[str, Tensor]:
    """Return what replicas of a module must have alike, by what it is called.

    All parameters, frozen ones and those that were added since attach, too, and buffers
    of whole numbers and bits; those with statistics are each rank's own.
    """
    return {
        **{f"parameter {name!r}": p for name, p in named_parameters(module)},
        **{
            f"buffer {name!r}": b
            for name, b in module.named_buffers()
            if not b.is_floating_point() and not b.is_complex()
        },
    }


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    here: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = here.detach().contiguous().view(-1).view(torch.uint8)
    return flat.cpu().numpy()


def _group_for(
    beside: dist.ProcessGroup, given: dist.ProcessGroup | None
) -> tuple[dist.ProcessGroup, bool]:
    """Return a process group that only lc3 uses, and whether it was made here.

    A model's own group carries buffers and the bitmap of unused parameters at times
    that differ between ranks; a second user would mix up the order of collectives.
    """
    ranks = dist.get_process_group_ranks(beside)
    if given is not None and not isinstance(given, dist.ProcessGroup):
        raise AttachError(
            f"group={given!r} must be a process group, from dist.new_group({ranks}) "
            "called on every rank, or None"
        )
    if given is not None:
        others = dist.get_process_group_ranks(given)
        if others != ranks or given is beside:
            raise AttachError(
                f"group has the ranks {others}, the model's process group {ranks}; "
                "lc3 needs a second group of the same ranks: "
                f"dist.new_group({ranks}), called on every rank of the job"
            )
        return given, False
    if len(ranks) == 1:
        return beside, False  # nothing will be sent
    if len(ranks) < dist.get_world_size():
        raise AttachError(
            f"the model is replicated on the ranks {ranks} only; call dist.new_group("
            f"{ranks}) on every rank of the job and attach(model, group=that)"
        )
    backend: str = dist.get_backend(beside)
    if backend not in ("gloo", "mpi", "ucc"):
        backend = "gloo"  # what lc3 sends is small, and on the host to be checked
    timeout = private.timeout_of(beside)
    own = dist.new_group(timeout=timeout, backend=backend, group_desc="lc3")
    assert isinstance(own, dist.ProcessGroup)
    return own, True
