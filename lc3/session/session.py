"""What every hook needs for one model: names, a group of its own, an engine, a lane."""

import atexit
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lc3 import private
from lc3.checkpoint import from_bytes, to_bytes
from lc3.codec import codec_for, warm_up
from lc3.config import Settings
from lc3.engines.auto import AutoEngine
from lc3.engines.costs import measure
from lc3.engines.direct import engine_for
from lc3.engines.engine import Engine
from lc3.engines.exchange import Exchange
from lc3.engines.two_levels import Nodes, TwoLevels, nodes_of
from lc3.errors import ReplicasDiffer
from lc3.meter import Meter
from lc3.plan import Plan, make_plan
from lc3.residual import Residuals
from lc3.session.attaching import note_made
from lc3.session.checks import check_form, check_parameters
from lc3.session.groups import connection
from lc3.transport.channel import Channel
from lc3.transport.handshake import agree, threads_for
from lc3.transport.lane import Lane
from lc3.transport.protocol import Divisible, Transport
from lc3.version import __version__
from lc3.wire import rans
from lc3.wire.coder import Coder

_CPU = torch.device("cpu")
CLOSE_TIMEOUT_S, _EXIT_TIMEOUT_S = 10.0, 2.0
log = logging.getLogger(__name__)


_OPEN: "WeakSet[Session]" = WeakSet()


@atexit.register
def _close_all() -> None:
    for session in list(_OPEN):
        with suppress(Exception):
            session.close(_EXIT_TIMEOUT_S)


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
        note_made(self)
        shapes = self._shapes
        world = transport.world

        def build() -> tuple[Coder, Plan, Nodes]:
            private.check()
            device = check_parameters(self.names, config)
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

    def agree_on(self, facts: Mapping[str, object]) -> None:
        """Compare what else has to be the same on every rank; collective.

        Raises:
            PlanMismatch: ranks differ; the same sentence on every rank.
        """
        sealed = _Sealed(self.engine.channel)
        agree(sealed, __version__, self.config, self._shapes, lambda: None, facts)

    def any_rank(self, mine: Sequence[bool]) -> list[bool]:
        """Return where some rank says yes; collective."""

        def ask() -> list[bool]:
            tag = self.engine.channel.aside()
            with self.engine.channel.exchanging(0, *tag):
                return self.engine.channel.any_rank(mine, *tag)

        return self.lane.call(ask)

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

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End the lane, the threads, and the group it made. Again: does nothing.

        Called at exit by itself: threads of a group that is still there then may abort
        the process.

        Args:
            timeout_s: limit on the lane's present job.
        """
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


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    here: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = here.detach().contiguous().view(-1).view(torch.uint8)
    return flat.cpu().numpy()
