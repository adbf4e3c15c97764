"""A rank that trains by itself, and now and then has an exchange with others.

It counts its optimizers' steps, says what its parameters have moved since the last
exchange, and goes on from what comes. How ranks exchange is for the forms to say:
``hooks.local_sgd``, whose ranks are known, and ``hooks.come_and_go``.
"""

import logging
import math
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lc3.config import Settings
from lc3.errors import AttachError, ConfigError, DivergedError
from lc3.knobs import Knobs
from lc3.local.ends import OneRank
from lc3.local.fragments import UnderWay, fragments_of, turns
from lc3.local.held import inside_of
from lc3.local.outer import Outer
from lc3.local.says import Says
from lc3.local.statistics import Statistics
from lc3.masters.owners import Owners, owners_of
from lc3.module.link import check_unclaimed, claim, release
from lc3.module.model import Model, like, local, named_parameters, together
from lc3.module.steps import Counting, Watch, Written
from lc3.residual import arena_like
from lc3.session.checks import check_module
from lc3.session.session import Session
from lc3.session.state import FormState

log = logging.getLogger(__name__)

# Where PyTorch's optimizers keep a first moment.
MOMENTA = ("exp_avg", "momentum_buffer")

_MOST_IN_A_ROW = 10  # exchanges that go on without a rank
_LARGEST_WEIGHT = 1e18  # beyond all tokens there are
Choose = Callable[[Sequence[Optimizer]], tuple[Knobs, str]]


class LocalSteps(FormState):
    """What the states of all forms of local steps keep and do; see ``FormState``.

    Args:
        model: whole, or what this rank of a site holds of it.
        optimizers: that step it; the last one's steps count.
        settings: what is coded.
        choose: returns knobs for optimizers, and why.
        end: whether this is one rank, or a site's.
        steps_alone: whether to make outer steps with nobody else, too.
        state_device: see ``hooks.local_sgd.attach``.

    Attributes:
        owners: the masters of this rank's share.
        knobs: of local steps, as given to ``attach`` or chosen by it.
        steps: of the optimizer so far.
        exchanges: so far.
        left_out: exchanges so far without this rank, or its site, since what it had
            moved was not finite.
    """

    owners: Owners
    _outer: Outer

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        settings: Settings,
        choose: Choose,
        end: OneRank,
        *,
        steps_alone: bool = False,
        state_device: Literal["cpu"] | None = None,
    ) -> None:
        if not optimizers:
            raise AttachError("no optimizer was given, so there are no steps to count")
        self._choose, self._end = choose, end
        if end.shard:
            self.form = f"{self.form}, {end.shard}"
        self.knobs, why = choose(optimizers)
        check_module(model)
        end.check(model)
        model, wrapper = inside_of(model)
        _check_dtypes(model)
        check_unclaimed(model)
        parameters = {n: p for n, p in named_parameters(model) if p.requires_grad}
        mine = end.slices_of(parameters)
        if state_device not in (None, "cpu"):
            raise ConfigError(
                f"state_device={state_device!r} must be 'cpu', or None: where the "
                "model is"
            )
        trained = [
            (n, like(p, mine.get(n), state_device)) for n, p in parameters.items()
        ]
        buffers = [name for name, _ in model.named_buffers()]
        facts = {**self.knobs.said(), "buffers": buffers}
        self.settings = settings
        self.session = self._session_of(trained, facts)
        end.connect(self.session, self._tell_now)
        self.meter = self.session.meter
        self.engine = self.session.engine
        self._idle = self.engine.transport.world == 1 and not steps_alone
        if why and end.rank == 0:
            log.info("lc3: local steps with %s; %s", settings, why)
        self._model = Model(model, list(parameters), mine)
        sizes = {name: p.numel() for name, p in parameters.items()}
        self._fragments = fragments_of(sizes, self.knobs.fragments)
        self._turns = turns(self.knobs.sync_every or 1, self.knobs.fragments)
        flats = self._model.flats()
        end.check_alike(self._model)
        self._model.copy_from_first(self.engine.transport)
        replica = arena_like(flats, state_device)
        for name, flat in flats.items():
            replica[name].copy_(flat)
        self.owners = owners_of(self.session.flat_engine, replica)
        self._outer = Outer(self.owners, self.knobs)
        self._moved = arena_like(flats, state_device)
        self._seen = {
            name: flat.clone()
            for name, flat in replica.items()
            if self.knobs.overlap and self.knobs.alpha is None
        }
        self._under_way: deque[UnderWay] = deque()
        self.steps = self.exchanges = 0
        self._unsent = [0] * len(self._fragments)
        self.left_out = self._left_out_in_a_row = 0
        self._watch = Watch(self._model)
        self._fresh: Collection[str] = ()  # should hold what all ranks share
        self._counting = Counting(optimizers, self._model, self._before, self._after)
        claim(model)
        self._apart = end.apart(wrapper)
        self._statistics = Statistics(self._model, self.engine.channel)
        self._look_anew()

    def _session_of(
        self, trained: list[tuple[str, Tensor]], facts: dict[str, object]
    ) -> Session:
        """Return the connection to the ranks that this one exchanges with."""
        return self._end.session_of(trained, self.settings, facts)

    @property
    def _rank(self) -> int:
        """Number of this rank in the job."""
        return self._end.rank

    def _before(self, *, new: bool) -> None:
        """Look at the parameters that an optimizer is about to step."""

    def _push_and_pull(self, one: UnderWay, mine: Says, written: Written) -> Tensor:
        """Exchange with the other ranks. Runs on the lane.

        Returns:
            The mean of the buffers that have changed: see ``Statistics.mean``.
        """
        raise NotImplementedError

    def _tell(self, error: Exception) -> None:
        """Let the other ranks know why this one stops."""
        self.session.lane.call(partial(self._tell_now, error))

    def _tell_now(self, error: BaseException) -> None:
        """See ``_tell``: on the lane, or while nothing is there."""
        self.engine.channel.tell(error, self.exchanges, 0)

    def _after(self, *, counts: bool, replaced: bool) -> None:
        """Take in that an optimizer has stepped."""
        self._model.mark()
        self._fresh = ()
        if not counts:
            return
        if replaced:
            self.knobs, _ = self._choose(self._counting.optimizers)
        self.steps += 1
        self.meter.at_step(self.steps)
        for index in range(len(self._unsent)):
            self._unsent[index] += 1
        if not self._idle and self.knobs.sync_every is not None:
            self._exchange_if_due(self.knobs.sync_every)

    def exchange(self, weight: float | None = None) -> None:
        """Exchange now: average what the ranks have moved; collective.

        For loops that count themselves (``sync_every="manual"``): ranks may have made
        any number of steps since the last exchange, none too, as a rank without data or
        one whose GradScaler has skipped a step.

        Args:
            weight: weight of this rank in the mean: tokens or samples that it has
                trained on since the last exchange. Default: its steps since then. A
                rank that weighs nothing counts for nothing. Of the ranks of a site the
                sum counts.

        Raises:
            ConfigError: the weight is negative, beyond 1e18, or no number.
        """
        if weight is not None:
            weight = checked_weight(weight)
        if self._idle:
            return
        self._before(new=True)
        self._finish_all()
        self._start(weight=weight)
        if self.knobs.overlap == 0:
            self._finish()

    @contextmanager
    def shared_model(self) -> Iterator[None]:
        """Let the parameters be those that all ranks share, for an evaluation.

        ``with state.shared_model(): evaluate(model)``. Between two exchanges a rank's
        own have moved from these, and are worse on the whole. Nothing is sent between
        sites; where ranks of a site hold the same, all of them enter, and bring their
        shares together. Buffers stay this rank's. Afterwards this rank goes on from its
        own parameters.
        """
        for one in self._under_way:
            one.future.wait()
        own = {name: flat.clone() for name, flat in self._model.wholes().items()}
        if not self._idle:
            self._copy_replica()
        try:
            yield
        finally:
            for name, flat in self._model.wholes().items():
                flat.copy_(own[name])
            if not self._watch.written.base:
                self._model.mark()

    def _start(
        self,
        fragments: Sequence[int] | None = None,
        *,
        with_buffers: bool = False,
        weight: float | None = None,
    ) -> None:
        """Begin an exchange of what the parameters, and some buffers, hold now.

        Args:
            fragments: numbers of those that are exchanged. Default: all.
            with_buffers: whether to average buffers whatever the exchange's number is.
            weight: see ``exchange``.
        """
        count = len(self._fragments)
        some = range(count) if fragments is None else fragments
        names = list(chain.from_iterable(map(self._fragments.__getitem__, some)))
        for earlier in self._under_way:
            if not earlier.names.isdisjoint(names):
                self._finish_all()
                break
        flats = self._model.flats()
        for name in names:
            replica, moved = self.owners.replica[name], self._moved[name]
            if self._seen:
                self._seen[name].copy_(flats[name])
            flat = flats[name]
            if (replica.device, replica.dtype) == (flat.device, flat.dtype):
                torch.sub(replica, flat, out=moved)
            else:  # from what the parameter was given of the replica, rounded
                moved.copy_(flat).neg_().add_(replica.to(flat.dtype))
        with_last = count - 1 in some  # one of the exchanges that are ``count`` apart
        turn = self.exchanges // count if with_last else 0
        changed, finite = self._statistics.begin(turn, now=with_buffers)
        written = self._watch.take(names)
        unsent = max(map(self._unsent.__getitem__, some))
        mine = Says(
            finite=_has_norm(map(self._moved.__getitem__, names)),
            written=bool(written.base),
            far=written.far,
            base=together(written.base) if written.base else 0,
            weight=max(unsent, bool(written.base)) if weight is None else weight,
            buffers_finite=finite,
            buffers=changed,
        )
        steps: dict[str, int] = {}
        for index in some:
            steps.update(dict.fromkeys(self._fragments[index], self._unsent[index]))
            self._unsent[index] = 0
        due = self.steps + self.knobs.overlap
        one = UnderWay(self.exchanges, frozenset(names), due, steps)
        self.exchanges += 1
        job = partial(
            self._end.exchange,
            partial(self._push_and_pull, one),
            mine,
            written,
            self.owners.replica,
            one.names,
        )
        one.future = self.session.lane.submit(job)
        self._under_way.append(one)

    def _exchange_if_due(self, every: int) -> None:
        """Begin an exchange, or end some, if it is time to."""
        while self._under_way and self._under_way[0].due <= self.steps:
            self._finish()
        if (since := self.steps % every) in self._turns:
            self._start([self._turns[since]])
            if self.knobs.overlap == 0:
                self._finish()

    def _finish_all(self) -> None:
        """Take over what exchanges have brought."""
        while self._under_way:
            self._finish()

    def _finish(self) -> None:
        """Take over what the first exchange has brought that is under way."""
        one = self._under_way.popleft()
        with self.meter.stage("wait"):
            averaged = one.future.wait()
        self._count_dense(one)
        mine = one.said[self.engine.transport.rank]
        overlaps = self.knobs.overlap > 0
        if mine.buffers:
            self._statistics.take(averaged, one.said, mine, late=overlaps)
        if not mine.finite:  # nor will what follows from these parameters be
            self._drain()
            self._copy_replica()
        elif not overlaps:
            self._copy_replica(one.names)
        else:
            self._take_late(one.names)
        self._settle_down(one, finite=mine.finite)
        if not overlaps:
            self._fresh = one.names

    def _take_late(self, names: Collection[str]) -> None:
        """Take over what has come for parameters that have been trained meanwhile."""
        alpha = self.knobs.alpha
        for name, flat in self._model.flats().items():
            if name not in names:
                continue
            replica = self.owners.replica[name]
            if alpha is None:  # what this rank moved meanwhile is kept
                late = replica - self._seen[name]
            else:
                late = (replica - flat.to(replica.device)) * (1 - alpha)
            if name in self._watch.written.base:
                self._watch.written.late[name] = late
            flat += late.to(flat.device, flat.dtype)
        self._end.together(self._model)

    def _drain(self) -> None:
        """Wait for exchanges that are under way, and take over nothing."""
        while self._under_way:
            one = self._under_way.popleft()
            one.future.wait()
            self._count_dense(one)

    def _settle_down(self, one: UnderWay, *, finite: bool) -> None:
        """Do what follows when the ranks' model has reached this one.

        Args:
            one: the exchange that has brought it.
            finite: whether what this rank had moved was.
        """
        if finite:
            self._left_out_in_a_row = 0
            self._decay_momenta(one)
            self._statistics.keep()
        else:
            self._recover()

    def _recover(self) -> None:
        """Forget what a rank with values that are not finite has in its optimizers."""
        self.left_out += 1
        self._left_out_in_a_row += 1
        self._statistics.restore()
        repaired = 0
        for optimizer in self._counting.optimizers:
            states = list(optimizer.state.items())
            held = [[v for v in s.values() if isinstance(v, Tensor)] for _, s in states]
            lost = self._end.any_rank(
                [not _has_norm(map(local, some)) for some in held]
            )
            for (parameter, _), gone in zip(states, lost, strict=True):
                if gone:
                    optimizer.state.pop(parameter)
                    repaired += 1
        said = (
            f"after {self.steps} steps what rank {self._rank} has moved is not "
            "finite, or its norm is not; the others went on without it, it has their "
            "model now, "
            f"and the optimizer forgot its state of {repaired} parameters"
        )
        if self._left_out_in_a_row < _MOST_IN_A_ROW:
            log.warning("lc3: %s", said)
            return
        error = DivergedError(
            f"{said}; that was the {_MOST_IN_A_ROW}th exchange in a row: look at this "
            "rank's data and learning rate"
        )
        self._tell(error)
        raise error

    def _copy_replica(self, names: Collection[str] | None = None) -> None:
        for name, flat in self._model.flats().items():
            if names is None or name in names:
                flat.copy_(self.owners.replica[name])
        self._end.together(self._model)

    def _look_anew(self) -> None:
        """Begin to look anew at what is done to parameters."""
        idle = not self._under_way and self.knobs.overlap == 0
        self._fresh = self.owners.replica.keys() if idle else ()
        self._model.mark()
        self._watch.take(self.owners.replica)

    def _count_dense(self, one: UnderWay) -> None:
        """Count what an all-reduce of every step but one would have sent."""
        world = self.engine.transport.world  # ``exchanging`` has counted one
        for name in one.names:
            others = (one.steps[name] - 1) * self._moved[name].numel()
            self.meter.dense_bytes += 8 * others * (world - 1) / world

    def _decay_momenta(self, one: UnderWay) -> None:
        if self.knobs.inner_momentum_scale == 1:
            return
        others = set()
        for name, parameter in self._model.last_seen.items():
            if name not in one.names:
                others.add(id(parameter))
        momenta, somewhere = [], False
        for optimizer in self._counting.optimizers:
            for stepped, held in optimizer.state.items():
                kept = [
                    held[key] for key in MOMENTA if isinstance(held.get(key), Tensor)
                ]
                somewhere = somewhere or bool(kept)
                if id(stepped) not in others:
                    momenta += kept
        if not somewhere and any(one.steps.values()):  # a rank without data has none
            raise ConfigError(
                f"inner_momentum_scale={self.knobs.inner_momentum_scale!r} has nothing "
                "to multiply: the optimizer's state has no "
                f"{' and no '.join(MOMENTA)}; leave it 1"
            )
        for moment in momenta:
            moment.mul_(self.knobs.inner_momentum_scale)

    def _knobs(self) -> dict[str, object]:
        return self.knobs.said()

    def gather_state(self) -> list[dict[str, Any]]:
        """See ``FormState.gather_state``.

        Of sites the states of all ranks, site after site, come to the first rank of the
        mesh; their shards pass through the first site.
        """
        return self._end.gathered(super().gather_state())

    def load_gathered(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See ``FormState.load_gathered``; sites need ranks as many as they had each.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        super().load_gathered(self._end.mine_of(states))

    def close(self) -> None:
        """Stop counting steps; end the lane and the group it made.

        A model that DistributedDataParallel wraps exchanges its gradients again.
        """
        self._counting.close()
        release(self._model.module)
        self._apart.close()
        self.session.close()


def checked_weight(weight: object, name: str = "weight") -> float:
    """Return a rank's weight as a number.

    Raises:
        ConfigError: it is none.
    """
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan if isinstance(weight, bool | str) else float(weight)  # type: ignore[arg-type]
        if 0 <= number <= _LARGEST_WEIGHT:
            return number
    raise ConfigError(
        f"{name}={weight!r} must be a number from 0 to {_LARGEST_WEIGHT:g}, like the "
        "tokens since the last exchange, or None"
    )


def _has_norm(tensors: Iterable[Tensor]) -> bool:
    """Return whether squared norms are finite, each tensor's in float32.

    What has none is a training that has diverged, and of a scale beside which nothing
    else in a tensor can be coded.
    """
    found = [t.float().norm().square().cpu() for t in tensors if t.is_floating_point()]
    return not found or bool(torch.stack(found).isfinite().all())


def _check_dtypes(model: nn.Module) -> None:
    for name, parameter in named_parameters(model):
        if parameter.requires_grad and parameter.dtype == torch.float64:
            raise AttachError(
                f"parameter {name!r} is float64, and local steps keep float32 masters; "
                "use model.float(), or hooks.ddp, which passes float64 through"
            )
