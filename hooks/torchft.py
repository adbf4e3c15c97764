"""Local steps of machines that come and go, on torchft's membership.

torchft's lighthouse says who is there, its manager connects them anew whenever that
changes; lc3 averages what they have moved, as ``local_sgd`` does in one hop. All ranks
then hold the same model, so whoever is left can give it to whoever joins. A rank's
residual, and what it has moved, change only when an exchange has succeeded. Sources:
torchft (https://github.com/meta-pytorch/torchft); what dies with a worker that pushes,
Decoupled DiLoCo.
"""

import json
import logging
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lc3.applied import unwrapped
from lc3.channel import Channel
from lc3.checkpoint import from_bytes, to_bytes
from lc3.config import Config, Settings, settle
from lc3.direct import Direct
from lc3.errors import (
    AttachError,
    ConfigError,
    ExchangeError,
    Lc3Error,
    PlanMismatch,
    StateError,
)
from lc3.format import ASIDE_BUCKET
from lc3.frameworks import missing, require
from lc3.handshake import alike
from lc3.hooks import local_sgd
from lc3.hooks.local_sgd import Choose
from lc3.knobs import FOR_TWO, PresetName, knobs_for, preset_of
from lc3.meeting import KEPT, Meeting, Present, meet
from lc3.model import together
from lc3.outer import Outer
from lc3.owners import Everybody, owners_of
from lc3.residual import Residuals
from lc3.says import Says, share_of
from lc3.seed import FACTS, Held, Seed, fetch
from lc3.session import Session, check_form, nobody
from lc3.steps import Written
from lc3.transport import Pairwise
from lc3.version import __version__

try:
    from importlib.metadata import version

    from torchft.manager import Manager, WorldSizeMode
except ModuleNotFoundError as error:
    raise missing("torchft", error) from error

log = logging.getLogger(__name__)

_LEAST = "0.2"
_TRIES = 5  # to join, or to end, before it is an error
_SLACK_S = 5.0
_NOBODY = -1
_KEY = "lc3"
_PAST = (Lc3Error, RuntimeError, TimeoutError, OSError)  # what an exchange may fail of


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    manager: Manager,
    config: Config | Settings | None = None,
    *,
    preset: PresetName | None = None,
    sync_every: int | Literal["manual"] | None = None,
    outer_lr: float | None = None,
    residual_decay: float | None = None,
    inner_momentum_scale: float | None = None,
    optimizer_state: Literal["own", "taken"] = "own",
    hostname: str | None = None,
    bind: str = "",
    fetch_timeout_s: float = 60.0,
) -> "State":
    """Let ranks that come and go train ``model`` by local steps.

    After every H-th step the ranks that torchft's quorum has brought together average
    what they have moved. Who is not there keeps what it has moved for the next time.
    The first ranks go on from what the lowest of them holds; who joins later gets the
    model, the steps and the buffers of one of them, while they go on. An exchange that
    fails is logged, and training goes on.

    Blocks until this rank holds the ranks' model. The training loop stays as it is;
    ``state.sync()`` ends the training.

    Args:
        model: a whole module, its parameters on one device. Those of a rank that joins
            are overwritten.
        optimizer: see ``lc3.hooks.local_sgd.attach``.
        manager: a ``torchft.Manager`` with ``use_async_quorum=False``, of a replica of
            one rank, and a process group of its own: ``ProcessGroupGloo``. Its timeouts
            are those of an exchange.
        config: see ``lc3.hooks.local_sgd.attach``; always ``topology="direct"``, where
            every rank holds all there is.
        preset: see ``lc3.hooks.local_sgd.attach``.
        sync_every: see ``lc3.hooks.local_sgd.attach``.
        outer_lr: see ``lc3.hooks.local_sgd.attach``.
        residual_decay: see ``lc3.hooks.local_sgd.attach``.
        inner_momentum_scale: see ``lc3.hooks.local_sgd.attach``.
        optimizer_state: for a rank that joins: "own", it begins anew; "taken", it gets
            that of the rank which gives it the model, two more models' bytes with Adam.
        hostname: name or address of this machine, that the others can reach. Default:
            the machine's name.
        bind: address to serve the model on to those that join. Default: all.
        fetch_timeout_s: how long a rank that sends or gets a model may be silent.

    Returns:
        The state.

    Raises:
        AttachError: the model cannot be compressed, or not with this manager.
        ConfigError: an argument is out of range.
        PlanMismatch: the others have another configuration; they go on.
        ExchangeError: this rank could not join.

    Example:
        >>> manager = torchft.Manager(
        ...     pg=torchft.ProcessGroupGloo(),
        ...     load_state_dict=None,
        ...     state_dict=None,
        ...     min_replica_size=1,
        ...     use_async_quorum=False,
        ... )
        >>> state = lc3.hooks.torchft.attach(model, optimizer, manager, sync_every=16)
    """
    require("torchft", version("torchft"), _LEAST)
    said = {
        "outer_lr": outer_lr,
        "residual_decay": residual_decay,
        "inner_momentum_scale": inner_momentum_scale,
    }
    given: dict[str, Any] = {k: v for k, v in said.items() if v is not None}
    if sync_every is not None:
        given["sync_every"] = None if sync_every == "manual" else sync_every
    if optimizer_state not in ("own", "taken"):
        raise ConfigError(
            f"optimizer_state={optimizer_state!r} must be 'own' or 'taken'"
        )
    _check_manager(manager)
    optimizers = unwrapped(optimizer)
    found = preset_of(preset)
    defaults = FOR_TWO if found is None else found.settings
    settings = settle(config, replace(defaults, topology="direct"))
    check_form(settings, "hooks.torchft")
    if settings.topology != "direct":
        raise ConfigError(
            "with owners a rank that dies takes its masters along, so hooks.torchft "
            "exchanges in one hop; leave topology and pull_sparsity out"
        )
    if settings.bytes_per_step is not None:
        raise ConfigError(
            f"bytes_per_step={settings.bytes_per_step!r} is steered by all ranks "
            "together, of which some may be missing; say a density"
        )
    choose = partial(knobs_for, settings=settings, given=given, preset=found)
    wants = optimizer_state == "taken"
    state = State(model, optimizers, settings, choose, manager, wants=wants)
    try:
        host = socket.gethostname() if hostname is None else hostname
        state.join(host, bind, fetch_timeout_s)
    except BaseException:
        state.close()
        raise
    return state


def _check_manager(manager: Manager) -> None:
    """Raise ``AttachError`` if a manager does not do what is needed of it."""
    if not isinstance(manager, Manager):
        raise AttachError(f"manager={manager!r} must be a torchft.Manager")
    if manager._use_async_quorum:
        raise AttachError(
            "the manager asks for its quorum while training goes on, and lc3 has to "
            "know who is there; make it with use_async_quorum=False"
        )
    if manager._group_world_size != 1:
        raise AttachError(
            f"the manager's replica has {manager._group_world_size} ranks, and lc3 "
            "exchanges whole models; make it with world_size=1 and rank=0"
        )
    if manager._replica_world_size_mode != WorldSizeMode.DYNAMIC:
        raise AttachError(
            "the manager keeps spare replicas; make it with WorldSizeMode.DYNAMIC"
        )


class _Managed(Pairwise):
    """A ``Transport`` over a manager's process group, as it is connected now."""

    def __init__(self, group: Any, members: Sequence[int], me: int) -> None:
        super().__init__(members, me)
        self._group = group

    def among(self, members: Sequence[int]) -> "_Managed":
        """See ``Divisible.among``."""
        ranks = [self._members[member] for member in members]
        return _Managed(self._group, ranks, self._members[self.rank])

    def _send(self, data: Tensor, peer: int) -> Any:
        return self._group.send([data], self._members[peer], 0)

    def _receive(self, buffer: Tensor, peer: int) -> Any:
        return self._group.recv([buffer], self._members[peer], 0)

    def all_reduce(self, tensor: Tensor) -> NoReturn:  # noqa: ARG002  # nothing asks
        """See ``Transport.all_reduce``: none."""
        raise ExchangeError("there is no dense all-reduce between ranks that come")

    def leave_word(self, reason: str) -> None:
        """See ``Transport.leave_word``: no place, and those that come go on."""


@dataclass(frozen=True)
class _Exchanged:
    """What ranks have sent each other, and nothing of it is applied yet.

    Attributes:
        meeting: who has met.
        rank: this rank's number there.
        taken: members whose moves count.
        finite: how many of these had finite moves.
        averaged: mean of the buffers, see ``Statistics.mean``.
    """

    meeting: Meeting
    rank: int
    taken: Sequence[int]
    finite: int
    averaged: Tensor


class State(local_sgd.State):
    """Everything lc3 keeps for one model on machines that come and go.

    See ``lc3.hooks.local_sgd.State``. There is no ``state_dict``: what a rank owes is
    kept as long as it lives, and the others have the model.

    Attributes:
        committed: whether the last exchange has succeeded, with this rank's moves.
        failed: exchanges that have not, so far.
        tokens: trained on since the last exchange that succeeded; for the loop to add
            to. The rank's weight in the mean; 0: its steps count.
        world: ranks in the last exchange.
        counted: those of them whose moves counted.
    """

    form = "torchft"

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        settings: Settings,
        choose: Choose,
        manager: Manager,
        *,
        wants: bool,
    ) -> None:
        self._manager = manager
        self._exchanged: _Exchanged | None = None
        super().__init__(model, optimizers, settings, choose, None)
        coder = self.session.flat_engine.messages.coder
        self._residuals = Residuals(self.engine.plan, _NOBODY, coder.device)
        self._residuals.hold()
        self._wants = wants
        self._seed: Seed | None = None
        self._connected: object = None
        self._history: list[int] = []
        self._joined = False
        self._open = 0  # the entry of an exchange that others may have ended well
        self._open_at: dict[str, Tensor] = {}
        self._from: dict[str, Tensor] = {}  # in place of the replica, if it is behind
        self._kept: dict[str, Tensor] = {}
        self._held: Held | None = None
        self._since, self._weight = 0, 0.0
        self.committed = False
        self.failed = self.world = self.counted = 0
        self.tokens: float = 0
        try:
            manager.register_state_dict_fn(_KEY, lambda _: None, dict)
        except AssertionError as error:
            self.close()
            raise AttachError(
                "this manager has an lc3 state already; make another manager for "
                "another model"
            ) from error

    def _session_of(
        self,
        trained: list[tuple[str, Tensor]],
        facts: dict[str, object],
        group: dist.ProcessGroup | None,  # noqa: ARG002  # the manager's
    ) -> Session:
        shapes = [(name, list(p.shape)) for name, p in trained]
        self._facts = alike(__version__, self.settings, shapes, facts)
        self._digest = sha256(json.dumps(self._facts).encode()).digest()[:8]
        return Session(trained, self.settings, *nobody(), facts=facts)

    @property
    def _never_exchanges(self) -> bool:
        return False

    @property
    def _rank(self) -> int:
        return 0 if self._exchanged is None else self._exchanged.rank

    def join(self, host: str, bind: str, timeout_s: float) -> None:
        """Meet the others, and take their model; once, by ``attach``.

        Raises:
            ExchangeError: it did not come to that.
            PlanMismatch: they have another configuration.
        """
        self._timeout_s = timeout_s
        self._seed = Seed(host, bind, timeout_s, self._facts)
        for _ in range(_TRIES):
            self._start()
            self._finish()
            if self._joined:
                return
        raise ExchangeError(
            f"this rank has tried {_TRIES} times to join, see the log for why it could "
            "not; is the lighthouse there, and can the machines reach each other?"
        )

    def _before(self, *, new: bool) -> None:
        """See ``local_sgd.State``: whatever changes parameters has moved them."""

    def _exchange_if_due(self, sync_every: int) -> None:
        self._since += 1
        if self._since >= sync_every:
            self._start()
            self._finish()

    def _start(
        self, *, with_buffers: bool = False, weight: float | None = None
    ) -> None:
        if weight is None and self.tokens:
            weight = self.tokens
        self._since = 0
        self._weight = 0.0 if weight is None else weight
        super()._start(with_buffers=with_buffers, weight=weight)

    def sync(self) -> None:
        """Exchange now, and go on from the model that all ranks share.

        For the end of training; ranks that come for it within the quorum's time share
        it.

        Raises:
            ExchangeError: no exchange has succeeded.
        """
        for _ in range(_TRIES):
            self._start(with_buffers=True)
            self._finish()
            if self.committed:
                return
        raise ExchangeError(
            f"no exchange has succeeded in {_TRIES} tries, see the log; the model is "
            "this rank's own"
        )

    def _exchange(self, mine: Says, written: Written) -> Tensor:  # noqa: ARG002  # see _before
        """Meet the others and exchange. Runs on the lane.

        What fails has changed nothing, and says so in the log.
        """
        self._exchanged = self._held = None
        self._kept = {}
        exchanged = None
        try:
            exchanged = self._met(mine)
        except _StopError as stop:
            raise stop.error from stop
        except _PAST as error:
            reason = f"{type(error).__name__}: {error}"
            log.warning(
                "lc3: an exchange has failed (%s); what this rank has moved is kept "
                "for the next one",
                reason,
            )
            self._manager.report_error(
                error if isinstance(error, Exception) else Exception(reason)
            )
        if not self._manager.should_commit() or exchanged is None:
            self.failed += 1
            self._connected = None
            if self._open:
                flats = self._model.flats().items()
                self._open_at = {name: flat.clone() for name, flat in flats}
            return torch.empty(0)
        self._commit(exchanged)
        self._exchanged = exchanged
        self.counted = exchanged.finite
        return exchanged.averaged

    def _ask_for_quorum(self) -> None:
        """Let the manager connect those that are there; it may hang in doing so.

        Raises:
            ExchangeError: it could not.
        """
        manager = self._manager
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                manager.start_quorum()
            except BaseException as error:  # noqa: BLE001  # it is raised below
                failed.append(error)

        asking = threading.Thread(target=ask, name="lc3-quorum", daemon=True)
        asking.start()
        limit = manager._quorum_timeout + 2 * manager._timeout
        asking.join(limit.total_seconds() + _SLACK_S)
        if asking.is_alive():
            error = ExchangeError(
                f"torchft's manager did not come back within {limit} (gloo waits for a "
                "rank that has died while it connected, pytorch/gloo#520); end this "
                "process, and let its launcher start it anew"
            )
            raise _StopError(error)
        if failed:
            manager._quorum_future = None  # or it raises the same for ever
            raise ExchangeError(f"there was no quorum ({failed[0]})") from failed[0]
        if (found := manager.errored()) is not None:
            raise ExchangeError(f"ranks could not connect ({found.original_exception})")

    def _met(self, mine: Says) -> _Exchanged:
        """Exchange with those that are there; nothing is applied yet."""
        self._ask_for_quorum()
        manager = self._manager
        rank, world = manager.participating_rank(), manager.num_participants()
        assert rank is not None
        everybody = _Managed(manager._pg, range(world), rank)
        meeting = self._meet(everybody, rank, mine)
        lead = meeting.present[meeting.lead]
        members = list(meeting.members)
        if self._open:  # was it counted?
            ended_well = self._open in lead.history
            self._residuals.settle_all(float(ended_well))
            if ended_well:
                self._outer.forget(self.knobs)
                self._from = self._open_at
            self._open, self._open_at = 0, {}
        self.world = len(members)
        if meeting.begins or len(members) == 1:
            nothing = torch.empty(0)
            return _Exchanged(meeting, rank, members, int(mine.finite), nothing)
        connected = manager._quorum_id, members
        if self._connected != connected:
            between = everybody.among(members)
            self.session.go_over_to(between, self._residuals)
            self.engine = self.session.engine
            self.owners = owners_of(self.session.flat_engine, self.owners.replica)
            self._outer = Outer(self.owners, self.knobs)
            self._statistics.channel = self.engine.channel
            self._connected = connected
        return self._sent(meeting, rank, lead.exchanges)

    def _meet(self, everybody: _Managed, rank: int, mine: Says) -> Meeting:
        """Say who this rank is, hear who the others are."""
        assert self._seed is not None
        replica = self.owners.replica if self._joined else self._model.tensors()
        hello = Present(
            name=str(self._manager._replica_id or f"rank {rank}"),
            address=self._seed.address,
            config=self._digest,
            exchanges=self.exchanges if self._joined else -1,
            held=together(replica),
            history=tuple(self._history),
            nonce=secrets.randbits(64),
            wants=self._wants and not self._joined,
            says=mine,
        )
        channel = Channel(everybody, self.meter, 0)
        tag = 0, ASIDE_BUCKET
        with channel.exchanging(0, *tag):
            meeting = meet(channel.all_gather_readable(hello.to_bytes(), *tag))
        for other, why in meeting.unheard.items():
            log.warning("lc3: rank %d is left out of this exchange: %s", other, why)
        for other in meeting.strangers:
            log.warning(
                "lc3: %s is left out: its configuration is another",
                meeting.present[other].name,
            )
        if rank in meeting.strangers:
            raise _StopError(self._mismatch(meeting.present[meeting.lead]))
        if rank in meeting.unheard:
            raise ExchangeError("nobody could read what this rank has said")
        return meeting

    def _mismatch(self, lead: Present) -> PlanMismatch:
        """Return how this rank's configuration differs from the others'."""
        try:
            theirs, _ = fetch(lead.address, FACTS, self._timeout_s)
        except Lc3Error as error:
            return PlanMismatch(f"this rank's configuration is another ({error})")
        mine = json.loads(json.dumps(self._facts))
        for key in [*theirs, *mine]:
            there, here = theirs.get(key, "missing"), mine.get(key, "missing")
            if there != here:
                return PlanMismatch(
                    f"ranks differ: {key} is {there!r} on {lead.name} and {here!r} on "
                    "this one, which is left out; start every rank with the same "
                    "model, Config, arguments and lc3 version"
                )
        return PlanMismatch("ranks list the same parameters in another order")

    def _sent(self, meeting: Meeting, rank: int, step: int) -> _Exchanged:
        """Send what this rank has moved, and agree whose moves could be read."""
        engine, owners, channel = self.engine, self.owners, self.engine.channel
        assert isinstance(engine, Direct)
        assert isinstance(owners, Everybody)
        members = meeting.members
        said = [_of_weight(meeting.present[m].says, meeting) for m in members]
        mine = _of_weight(meeting.present[rank].says, meeting)
        for name, flat in self._model.flats().items() if self._from else ():
            torch.sub(self._from[name], flat, out=self._moved[name])
        share = share_of(mine, said) if mine.finite else 0.0
        for moved in self._moved.values() if share != 1 else ():
            if share:
                moved.mul_(share)
            else:
                moved.zero_()  # says nothing, and keeps its residual
        elements = sum(moved.numel() for moved in self._moved.values())
        pieces = engine.pieces(self._moved)
        self.meter.buckets += 1
        with channel.exchanging(elements, step, 0):
            self._open = meeting.entry
            arrived = engine.exchanged(pieces, self._moved, step, 0)
            by_sender = engine.messages.readable(arrived, pieces[0], step, 0)
            lost = [isinstance(one, Lc3Error) for one in by_sender]
            lost = channel.any_rank(lost, step, 2)
            taken = [m for m, gone in zip(members, lost, strict=True) if not gone]
            heard = [
                one
                if member in taken
                else replace(one, finite=False, buffers_finite=False)
                for member, one in zip(members, said, strict=True)
            ]
            place = members.index(rank)
            averaged = self._statistics.mean(heard, heard[place], step)
            for member, one in zip(members, by_sender, strict=True):
                if member not in taken:
                    log.warning(
                        "lc3: %s is left out of this exchange: %s",
                        meeting.present[member].name,
                        one if isinstance(one, Lc3Error) else "others cannot read it",
                    )
        finite = sum(one.finite for one in heard)
        if not finite:
            raise ExchangeError("nobody's moves could be read, or were finite")
        with self.meter.stage("decode"):
            used = [
                one
                for member, one in zip(members, by_sender, strict=True)
                if member in taken and not isinstance(one, Lc3Error)
            ]
            engine.average(pieces, self._moved, used)
            owners.take(self._moved)
        self._count_dense(elements)
        return _Exchanged(meeting, rank, taken, finite, averaged)

    def _commit(self, exchanged: _Exchanged) -> None:
        """Apply an exchange, or fetch the model of those that could."""
        meeting, rank = exchanged.meeting, exchanged.rank
        lead = meeting.present[meeting.lead]
        counts = rank in exchanged.taken
        behind = rank in meeting.behind
        if not counts:  # what this rank has moved is moved still
            since = self._from or self.owners.replica
            for name, flat in self._model.flats().items():
                self._kept[name] = flat - since[name]
        self._residuals.settle_all(float(counts))
        self._open = 0
        history = [*lead.history, meeting.entry][-KEPT:]
        if not behind:
            self._advance(exchanged)
            self.exchanges = lead.exchanges + 1
            self._history, self._joined = history, True
            if rank == meeting.lead and meeting.behind:
                self._offer(meeting)
        elif (held := self._fetched(lead, meeting.entry)) is not None:
            self._held = held
        elif counts:  # it is counted up to here, and still behind
            flats = self._model.flats().items()
            self._from = {name: flat.clone() for name, flat in flats}
        if counts:
            self._outer.forget(self.knobs)

    def _advance(self, exchanged: _Exchanged) -> None:
        """Let the replica be what all have made of it."""
        meeting = exchanged.meeting
        if meeting.begins or len(meeting.members) == 1:
            for name, flat in self._model.flats().items():
                self.owners.replica[name].copy_(flat)
        else:
            world = len(meeting.members)
            self._outer.step(self.knobs, world / exchanged.finite)

    def _offer(self, meeting: Meeting) -> None:
        """Serve the model to those that are behind."""
        assert self._seed is not None
        fresh = [r for r in meeting.behind if meeting.present[r].exchanges < 0]
        held = {f"replica {n}": t for n, t in self.owners.replica.items()}
        if fresh:
            others = self._model.tensors().items()
            held |= {f"model {n}": t for n, t in others if n not in self.owners.replica}
        copies = {n: t.detach().to("cpu", copy=True) for n, t in held.items()}
        if any(meeting.present[r].wants for r in fresh):
            saved = [o.state_dict() for o in self._counting.optimizers]
            copies["optimizers"] = to_bytes({"all": saved})
        head = {
            "exchanges": self.exchanges,
            "history": self._history,
            "steps": self.steps,
            "budget": self.engine.budget.counters(),
        }
        self._seed.offer(meeting.entry, head, copies)

    def _fetched(self, lead: Present, entry: int) -> Held | None:
        """Return the ranks' model, if it can be had."""
        try:
            return fetch(lead.address, entry, self._timeout_s)
        except Lc3Error as error:
            log.warning("lc3: %s; this rank tries again at the next exchange", error)
            return None

    def _load(self, held: Held) -> None:
        """Go on from what another rank has offered."""
        head, tensors = held
        for name, flat in self.owners.replica.items():
            flat.copy_(tensors[f"replica {name}"].view(flat.shape))
        if not self._joined:
            self.steps = int(head["steps"])
            for name, tensor in self._model.tensors().items():
                if (found := tensors.get(f"model {name}")) is not None:
                    tensor.data.copy_(found)
            if self._wants and "optimizers" in tensors:
                saved = from_bytes(
                    tensors["optimizers"], "the rank that gave the model"
                )
                for one, state in zip(
                    self._counting.optimizers, saved["all"], strict=True
                ):
                    one.load_state_dict(state)
        self.engine.budget.load(head["budget"])
        self.exchanges = int(head["exchanges"])
        self._history = list(map(int, head["history"]))
        self._joined = True

    def _finish(self) -> None:
        """Take over what an exchange has brought, if it has brought something."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        with self.meter.stage("wait"):
            averaged = pending.wait()
        exchanged = self._exchanged
        self.committed = exchanged is not None and exchanged.rank in exchanged.taken
        if self.committed:
            self.tokens = max(0, self.tokens - self._weight)
        else:
            self._unsent += self._unsent_then
        if exchanged is None:
            return
        behind = exchanged.rank in exchanged.meeting.behind
        if self._held is not None:
            self._load(self._held)
        elif behind:
            self.committed = False
            return
        self._held, self._from = None, {}
        said = [exchanged.meeting.present[m].says for m in exchanged.meeting.members]
        mine = exchanged.meeting.present[exchanged.rank].says
        if averaged.numel() or any(mine.buffers):
            self._statistics.take(averaged, said, mine, late=False)
        self._copy_replica()
        for name, flat in self._model.flats().items() if self._kept else ():
            flat += self._kept[name].to(flat.dtype)
        self._kept = {}
        self._settle_down(finite=mine.finite)
        self._look_anew()

    def _tell(self, error: Exception) -> None:
        """See ``local_sgd.State``: the others go on."""

    def check_replicas(self) -> None:
        """Do nothing: ranks compare their models whenever they meet."""

    def state_dict(self) -> NoReturn:
        """Raise ``StateError``: other ranks have the model.

        For a training that ends on all of them, save the model, in ``shared_model``,
        and the optimizer; load both before ``attach``.
        """
        raise StateError(
            "hooks.torchft has no state_dict: save the model in state.shared_model(), "
            "and the optimizer; load both before attach"
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> NoReturn:  # noqa: ARG002
        """Raise ``StateError``; see ``state_dict``."""
        self.state_dict()

    def close(self) -> None:
        """See ``local_sgd.State.close``; the manager stays."""
        if self._seed is not None:
            self._seed.close()
            self._seed = None
        super().close()


def _of_weight(said: Says, meeting: Meeting) -> Says:
    """Return what a rank says; without weight, among others, it says no move.

    So that the others' moves are not made larger for its sake, and then their mean
    smaller: what is left of them would be too large.
    """
    if said.weight or not any(p.says.weight for p in meeting.present.values()):
        return said
    return replace(said, finite=False)


class _StopError(Exception):
    """What ends this rank, and not the others."""

    def __init__(self, error: Lc3Error) -> None:
        super().__init__(str(error))
        self.error = error
