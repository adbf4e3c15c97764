"""Local steps of ranks that come and go, whoever says who is there.

In one hop (``Tuning(topology="direct")``) all ranks hold the same model, so whoever is
left can give it to whoever joins. An exchange has three rounds: who is there and what
it has, what everybody has moved, and whose moves all could read. Nothing is applied
before the last; then each rank does so by itself. One that is not sure whether the
others did keeps both outcomes, and takes the right one when they meet again. What the
framework is that brings ranks together: see ``Membership``, and ``hooks.torchft``.
"""

import json
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lc3.checkpoint import from_bytes, to_bytes
from lc3.config import Settings
from lc3.engines.direct import Direct
from lc3.errors import AttachError, ExchangeError, Lc3Error, PlanMismatch, StateError
from lc3.format import ASIDE_BUCKET
from lc3.local.ends import OneRank
from lc3.local.fragments import UnderWay
from lc3.local.local_steps import Choose, LocalSteps, checked_weight
from lc3.local.meeting import KEPT, Meeting, Present, meet
from lc3.local.outer import Outer
from lc3.local.says import Says, share_of
from lc3.local.seed import FACTS, Held, Seed, fetch
from lc3.masters.owners import Everybody, owners_of
from lc3.module.model import together
from lc3.module.steps import Written
from lc3.residual import Residuals
from lc3.session.groups import nobody
from lc3.session.session import Session
from lc3.transport.channel import Channel
from lc3.transport.group import Pairwise
from lc3.transport.handshake import alike
from lc3.version import __version__

log = logging.getLogger(__name__)

_TRIES = 5  # to join, or to end, before it is an error
_NOBODY = -1
_PAST = (Lc3Error, RuntimeError, TimeoutError, OSError)  # what an exchange may fail of


class SendsAndReceives(Protocol):
    """A process group, as far as it is needed: any that moves CPU tensors."""

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> Any:
        """Begin to send; the result has ``wait``."""

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> Any:
        """Begin to receive; the result has ``wait``."""


class Quorum(NamedTuple):
    """Those that are there for an exchange.

    Attributes:
        group: connects them, and nobody else uses it.
        rank: this rank's number.
        world: how many there are.
        number: another one whenever they were connected anew.
    """

    group: SendsAndReceives
    rank: int
    world: int
    number: int


class Membership(Protocol):
    """Says who is there.

    Attributes:
        name: of this rank, for the others' logs.
    """

    name: str

    def meet(self) -> Quorum:
        """Wait for the others, and connect to them.

        Raises:
            StopError: this process cannot go on.
            Exception: it has failed this time.
        """
        ...

    def commit(self, error: Exception | None) -> bool:
        """Return whether an exchange counts; once after each ``meet``.

        Args:
            error: why it has failed here; ranks have to be connected anew.
        """
        ...


class StopError(Exception):
    """What ends this rank, and not the others."""

    def __init__(self, error: Lc3Error) -> None:
        super().__init__(str(error))
        self.error = error


class _Between(Pairwise):
    """A ``Transport`` over what connects a quorum."""

    def __init__(
        self, group: SendsAndReceives, members: Sequence[int], me: int
    ) -> None:
        super().__init__(members, me)
        self._group = group

    def among(self, members: Sequence[int]) -> "_Between":
        """See ``Divisible.among``."""
        ranks = [self._members[member] for member in members]
        return _Between(self._group, ranks, self._members[self.rank])

    def _send(self, data: Tensor, peer: int, part: int) -> Any:
        return self._group.send([data], self._members[peer], part)

    def _receive(self, buffer: Tensor, peer: int, part: int) -> Any:
        return self._group.recv([buffer], self._members[peer], part)

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
        scale: factor of the mean that they have made; see ``_scale_of``.
        averaged: mean of the buffers, see ``Statistics.mean``.
    """

    meeting: Meeting
    rank: int
    taken: Sequence[int]
    finite: int
    scale: float
    averaged: Tensor


class State(LocalSteps):
    """Everything lc3 keeps for one model on machines that come and go.

    See ``LocalSteps``. There is no ``state_dict``: what a rank owes is kept as long as
    it lives, and the others have the model.

    Attributes:
        committed: whether the last exchange has succeeded, with this rank's moves.
        failed: exchanges that have not, so far.
        tokens: trained on since the last exchange that succeeded; for the loop to add
            to. The rank's weight in the mean; 0: its steps count.
        world: ranks in the last exchange.
        counted: those of them whose moves counted.
    """

    form = "come_and_go"

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        settings: Settings,
        choose: Choose,
        membership: Membership,
        *,
        wants: bool,
        every_s: float | None = None,
    ) -> None:
        self._membership = membership
        self._every_s = every_s
        self._exchanged: _Exchanged | None = None
        super().__init__(
            model, optimizers, settings, choose, OneRank(), steps_alone=True
        )
        self._statistics.in_step = False
        coder = self.session.flat_engine.messages.coder
        self._residuals = Residuals(self.engine.plan, _NOBODY, coder.device)
        self._residuals.hold()
        self._wants = wants
        self._seed: Seed | None = None
        self._connected: object = None
        self._history: list[int] = []
        self._joined = False
        self._open = 0  # the entry of an exchange that others may have ended well
        self._open_after = 0  # so many exchanges of the others
        self._open_at: dict[str, Tensor] = {}
        self._from: dict[str, Tensor] = {}  # in place of the replica, if it is behind
        self._kept: dict[str, Tensor] = {}
        self._held: Held | None = None
        self._lacks = False  # it is behind, and has not got the others' model
        self._since, self._weight = 0, 0.0
        self._met_at = self._stepped_at = time.monotonic()
        self._longest_step_s = 0.0
        self.committed = False
        self.failed = self.world = self.counted = 0
        self.tokens: float = 0

    def _session_of(
        self, trained: list[tuple[str, Tensor]], facts: dict[str, object]
    ) -> Session:
        shapes = [(name, list(p.shape)) for name, p in trained]
        if self._every_s is not None:
            facts = {**facts, "sync_every_s": float(self._every_s)}
        self._facts = alike(__version__, self.settings, shapes, facts)
        self._digest = sha256(json.dumps(self._facts).encode()).digest()[:8]
        return Session(trained, self.settings, *nobody(), facts=facts)

    @property
    def _rank(self) -> int:
        return 0 if self._exchanged is None else self._exchanged.rank

    def join(self, host: str, bind: str, timeout_s: float) -> None:
        """Meet the others, and take their model; once, by ``attach``.

        Raises:
            AttachError: nothing can be served on that address.
            ExchangeError: it did not come to that.
            PlanMismatch: they have another configuration.
        """
        self._timeout_s = timeout_s
        try:
            self._seed = Seed(host, bind, timeout_s, self._facts)
        except OSError as error:
            raise AttachError(
                f"the model cannot be served on bind={bind!r} ({error}); give an "
                "address of this machine, or leave it out"
            ) from error
        for _ in range(_TRIES):
            self._start()
            self._finish()
            if self._joined:
                return
        raise ExchangeError(
            f"this rank has tried {_TRIES} times to join, see the log for why it could "
            "not; can the machines reach each other, and are there as many replicas as "
            "the manager wants (min_replica_size)?"
        )

    def _after(self, *, counts: bool, replaced: bool) -> None:
        super()._after(counts=counts, replaced=replaced)
        if counts and self._every_s is not None:
            self._exchange_if_time(self._every_s)

    def _exchange_if_time(self, every_s: float) -> None:
        """Exchange if another step would end later than so long after the last one.

        Ranks count from when they met, so their clocks need not agree.
        """
        now = time.monotonic()
        self._longest_step_s = max(self._longest_step_s, now - self._stepped_at)
        self._stepped_at = now
        if now + self._longest_step_s > self._met_at + every_s:
            self._start()
            self._finish()

    def _exchange_if_due(self, every: int) -> None:
        self._since += 1
        if self._since >= every:
            self._start()
            self._finish()

    def _start(
        self,
        fragments: Sequence[int] | None = None,
        *,
        with_buffers: bool = False,
        weight: float | None = None,
    ) -> None:
        if weight is None and self.tokens:
            weight = checked_weight(self.tokens, "tokens")
        self._since = 0
        self._weight = 0.0 if weight is None else weight
        super()._start(fragments, with_buffers=with_buffers, weight=weight)

    def sync(self) -> None:
        """Exchange now, and go on from the model that all ranks share.

        For the end of training; ranks that come for it within the quorum's time share
        it. A rank that another one fetches the model from stays until it has it.

        Raises:
            ExchangeError: no exchange has succeeded, or those with the model have left.
        """
        for _ in range(_TRIES):
            lacked = self._lacks
            self._start(with_buffers=True)
            self._finish()
            if self.committed:
                if lacked and self.world == 1:
                    raise ExchangeError(
                        "the ranks that have the model have left before this one could "
                        "fetch it, see the log; the model is this rank's own"
                    )
                assert self._seed is not None
                self._seed.wait()
                return
        raise ExchangeError(
            f"no exchange has succeeded in {_TRIES} tries, see the log; the model is "
            "this rank's own"
        )

    def _push_and_pull(self, one: UnderWay, mine: Says, written: Written) -> Tensor:  # noqa: ARG002  # see _before
        """Meet the others and exchange. Runs on the lane.

        What fails has changed nothing, and says so in the log.
        """
        self._exchanged = self._held = None
        self._kept = {}
        self.exchanges = one.number  # until this one counts
        exchanged, failure = None, None
        try:
            exchanged = self._met(mine)
        except StopError as stop:
            raise stop.error from stop
        except _PAST as error:
            failure = error
            log.warning(
                "lc3: an exchange has failed (%s: %s); what this rank has moved is "
                "kept for the next one",
                type(error).__name__,
                error,
            )
        if not self._membership.commit(failure) or exchanged is None:
            if failure is None:
                log.warning(
                    "lc3: the manager does not count an exchange: fewer replicas were "
                    "there than it wants (min_replica_size), or another one failed"
                )
            self.failed += 1
            self._connected = None
            if self._open and not self._open_at:
                flats = self._model.flats().items()
                self._open_at = {name: flat.clone() for name, flat in flats}
            return torch.empty(0)
        self._commit(exchanged)
        self._exchanged = exchanged
        self.counted = exchanged.finite
        return exchanged.averaged

    def _met(self, mine: Says) -> _Exchanged:
        """Exchange with those that are there; nothing is applied yet."""
        quorum = self._membership.meet()
        rank = quorum.rank
        everybody = _Between(quorum.group, range(quorum.world), rank)
        meeting = self._meet(everybody, rank, mine)
        self._met_at = time.monotonic()
        lead = meeting.present[meeting.lead]
        members = list(meeting.members)
        if self._open:  # was it counted?
            ended_well = self._open in lead.history
            if not ended_well and self._open_after < lead.exchanges - KEPT:
                log.warning(
                    "lc3: this rank did not see the end of an exchange, and was away "
                    "for more than %d, so that nobody knows whether that one counted; "
                    "what it sent there is not sent again",
                    KEPT,
                )
                ended_well = True
            self._residuals.settle_all(float(ended_well))
            if ended_well:
                self._outer.forget(self.knobs, self._moved)
                self._from = self._open_at
            self._open, self._open_at = 0, {}
        self.world = len(members)
        if meeting.begins or len(members) == 1:
            nothing = torch.empty(0)
            return _Exchanged(meeting, rank, members, int(mine.finite), 1.0, nothing)
        connected = quorum.number, members
        if self._connected != connected:
            between = everybody.among(members)
            self.session.go_over_to(between, self._residuals)
            self.engine = self.session.engine
            self.owners = owners_of(self.session.flat_engine, self.owners.replica)
            self._outer = Outer(self.owners, self.knobs)
            self._statistics.channel = self.engine.channel
            self._connected = connected
        return self._sent(meeting, rank, lead.exchanges)

    def _meet(self, everybody: _Between, rank: int, mine: Says) -> Meeting:
        """Say who this rank is, hear who the others are."""
        assert self._seed is not None
        replica = self.owners.replica if self._joined else self._model.tensors()
        hello = Present(
            name=self._membership.name,
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
            raise StopError(self._mismatch(meeting.present[meeting.lead]))
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
        said = [said_of(member, meeting) for member in members]
        mine = said_of(rank, meeting)
        for name, flat in self._model.flats().items() if self._from else ():
            torch.sub(self._from[name].float(), flat, out=self._moved[name])
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
            self._open, self._open_after = meeting.entry, step
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
            counted = [  # who joins has no statistics of its own yet
                replace(one, buffers_finite=False)
                if meeting.present[member].exchanges < 0
                else one
                for member, one in zip(members, heard, strict=True)
            ]
            averaged = self._statistics.mean(counted, counted[place], step)
            for member, one in zip(members, by_sender, strict=True):
                if member not in taken:
                    log.warning(
                        "lc3: %s is left out of this exchange: %s",
                        meeting.present[member].name,
                        one if isinstance(one, Lc3Error) else "others cannot read it",
                    )
        if not taken:
            raise ExchangeError("nobody's moves could be read")
        with self.meter.stage("decode"):
            used = [
                one
                for member, one in zip(members, by_sender, strict=True)
                if member in taken and not isinstance(one, Lc3Error)
            ]
            engine.average(pieces, self._moved, used)
            owners.take(self._moved)
        finite = sum(one.finite for one in heard)
        scale = _scale_of(said, heard)
        return _Exchanged(meeting, rank, taken, finite, scale, averaged)

    def _commit(self, exchanged: _Exchanged) -> None:
        """Apply an exchange, or fetch the model of those that could."""
        meeting, rank = exchanged.meeting, exchanged.rank
        lead = meeting.present[meeting.lead]
        counts = rank in exchanged.taken
        behind = rank in meeting.behind
        held = self._fetched(lead, meeting.entry) if behind else None
        if behind and counts and held is None:
            flats = self._model.flats().items()
            here = {name: flat.clone() for name, flat in flats}
            if self._open:  # do the others count it?
                self._open_at = here
                return
            self._from = here  # nothing was sent
        if not counts:  # what this rank has moved is moved still
            since = self._from or self.owners.replica
            for name, flat in self._model.flats().items():
                self._kept[name] = flat.float() - since[name].to(flat.dtype)
        self._residuals.settle_all(float(counts))
        self._open = 0
        history = [*lead.history, meeting.entry][-KEPT:]
        if not behind:
            self._advance(exchanged)
            self.exchanges = lead.exchanges + 1
            self._history, self._joined = history, True
            if rank == meeting.lead and meeting.behind:
                self._offer(meeting)
        else:
            self._held = held
        if counts and len(meeting.members) > 1:
            self._outer.forget(self.knobs, self._moved)

    def _advance(self, exchanged: _Exchanged) -> None:
        """Let the replica be what all have made of it."""
        meeting = exchanged.meeting
        if not exchanged.finite:
            return
        if meeting.begins or len(meeting.members) == 1:
            for name, flat in self._model.flats().items():
                self.owners.replica[name].copy_(flat)
        else:
            self._outer.step(self.knobs, exchanged.scale, self._moved)

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
            try:
                kinds = self._kinds_of_optimizers()
                copies["optimizers"] = to_bytes({"all": saved, "kinds": kinds})
                from_bytes(copies["optimizers"], "this rank")
            except Exception as error:  # noqa: BLE001  # of whatever an optimizer keeps
                log.warning(
                    "lc3: the optimizer's state cannot be given to a rank that joins "
                    "(%s); that rank begins with its own",
                    error,
                )
                copies.pop("optimizers", None)
        head = {
            "exchanges": self.exchanges,
            "history": self._history,
            "steps": self.steps,
            "budget": self.engine.budget.counters(),
        }
        self._seed.offer(meeting.entry, head, copies, len(meeting.behind))

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
                    _write(tensor, found)
            if self._wants and "optimizers" in tensors:
                self._take_optimizers(tensors["optimizers"])
        self.engine.budget.load(head["budget"])
        self.exchanges = int(head["exchanges"])
        self._history = list(map(int, head["history"]))
        self._joined = True

    def _take_optimizers(self, data: Tensor) -> None:
        """Go on from the optimizers of another rank, if they are like this one's."""
        saved = from_bytes(data, "the rank that gave the model")
        mine, theirs = self._kinds_of_optimizers(), saved["kinds"]
        if theirs != mine:
            log.warning(
                "lc3: the rank that gives the model has the optimizers %s and this one "
                "%s (kind, parameters of each group); this rank begins with its own",
                theirs,
                mine,
            )
            return
        for one, state in zip(self._counting.optimizers, saved["all"], strict=True):
            one.load_state_dict(state)

    def _kinds_of_optimizers(self) -> list[list[Any]]:
        """Return of each its class's name, and how many parameters each group has."""
        return [
            [type(one).__name__, [len(group["params"]) for group in one.param_groups]]
            for one in self._counting.optimizers
        ]

    def _finish(self) -> None:
        """Take over what an exchange has brought, if it has brought something."""
        one = self._under_way.popleft()
        with self.meter.stage("wait"):
            averaged = one.future.wait()
        self._stepped_at, self._longest_step_s = time.monotonic(), 0.0
        if self._every_s is not None:  # who has missed meetings stays in time
            missed = (self._stepped_at - self._met_at) // self._every_s
            self._met_at += missed * self._every_s
        exchanged = self._exchanged
        self.committed = exchanged is not None and exchanged.rank in exchanged.taken
        if self.committed:
            self.tokens = max(0, self.tokens - self._weight)
        else:
            self._unsent[0] += max(one.steps.values())
        if exchanged is None:
            return
        self._count_dense(one)
        behind = exchanged.rank in exchanged.meeting.behind
        if self._held is not None:
            self._load(self._held)
        elif behind:
            self.committed, self._lacks = False, True
            return
        self._lacks = False
        self._held, self._from = None, {}
        said = [exchanged.meeting.present[m].says for m in exchanged.meeting.members]
        mine = exchanged.meeting.present[exchanged.rank].says
        if averaged.numel() or any(mine.buffers):
            self._statistics.take(averaged, said, mine, late=False)
        self._copy_replica()
        for name, flat in self._model.flats().items() if self._kept else ():
            flat += self._kept[name].to(flat.dtype)
        self._kept = {}
        self._settle_down(one, finite=mine.finite)
        self._look_anew()

    def _decay_momenta(self, one: UnderWay) -> None:
        """See ``LocalSteps``: nothing, if there was nobody to exchange with."""
        if self.world > 1:
            super()._decay_momenta(one)

    def _tell(self, error: Exception) -> None:
        """See ``LocalSteps``: the others go on."""

    def check_replicas(self) -> None:
        """Do nothing: ranks compare their models whenever they meet."""

    def rebase(self) -> NoReturn:
        """Raise ``StateError``: whoever joins takes the ranks' model, not they its."""
        raise StateError(
            f"hooks.{self.form} cannot go on from one rank's parameters while others "
            "come and go; load them before attach, on all"
        )

    def state_dict(self) -> NoReturn:
        """Raise ``StateError``: other ranks have the model.

        For a training that ends on all of them, save the model, in ``shared_model``,
        and the optimizer; load both before ``attach``.
        """
        raise StateError(
            f"hooks.{self.form} has no state_dict: save the model in "
            "state.shared_model(), and the optimizer; load both before attach"
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> NoReturn:  # noqa: ARG002
        """Raise ``StateError``; see ``state_dict``."""
        self.state_dict()

    def close(self) -> None:
        """See ``FormState.close``; the manager stays."""
        if self._seed is not None:
            self._seed.close()
            self._seed = None
        super().close()


def _scale_of(said: Sequence[Says], heard: Sequence[Says]) -> float:
    """Return the factor that makes a mean over all ranks one over those that count.

    Args:
        said: what ranks have multiplied their moves by: see ``share_of``.
        heard: the same, of which some could not be read.
    """
    asked, finite = (
        [one.weight for one in some if one.finite] for some in (said, heard)
    )
    if not finite:
        return 1.0
    if sum(asked) and not sum(finite):
        return 0.0
    lost = sum(asked) / sum(finite) if sum(asked) else len(asked) / len(finite)
    return len(said) / len(asked) * lost


def _write(tensor: Tensor, found: Tensor) -> None:
    """Write to a tensor of the model, which may be expanded."""
    into = tensor.data
    for dim, stride in enumerate(into.stride()):
        if not stride and into.shape[dim] > 1:
            into, found = into.narrow(dim, 0, 1), found.narrow(dim, 0, 1)
    into.copy_(found)


def said_of(member: int, meeting: Meeting) -> Says:
    """Return what a member says of its moves, as it counts among the others.

    One that is behind has moved from an older model, and often for long. What it has
    learned meanwhile the model has mostly learned, too, so its whole way on top of that
    would be too far. Its mean step counts as if it had made as many as the heaviest of
    those that are not behind: FedNova's normalisation (arXiv 2007.07481).

    One without weight, among others, says no move, so that theirs are not made larger
    for its sake, and then their mean smaller: what is left of them would be too large.
    """
    said = meeting.present[member].says
    weights = {one: meeting.present[one].says.weight for one in meeting.members}
    if not said.weight and any(weights.values()):
        return replace(said, finite=False)
    most = max(w for one, w in weights.items() if one not in meeting.behind)
    if member in meeting.behind and 0 < most < said.weight:
        return replace(said, weight=most * most / said.weight)
    return said
