"""Local steps: every rank trains by itself, and 3LC brings the ranks together again.

After every H-th step of the optimizer the ranks push what their parameters have moved,
the owners average it into float32 masters, and everybody pulls 3LC of what the masters
have moved (with ``Tuning(topology="direct")`` everybody averages). Sources: local SGD
(Stich, arXiv 1805.09767), DiLoCo (arXiv 2311.08105), and for masters with error
feedback EF21-P (arXiv 2209.15218); residuals that decay, SparseLoCo (arXiv 2508.15706);
fragments, and ``alpha``, Streaming DiLoCo (arXiv 2501.18512).
That first moments matter in an exchange: DES-LOC (arXiv 2505.22549), which sends them.
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
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lc3.applied import unwrapped
from lc3.checkpoint import UNSENT, Parts, from_bytes, to_bytes
from lc3.config import Config, Settings, settle
from lc3.errors import (
    AttachError,
    ConfigError,
    DivergedError,
    PeerError,
    StateError,
)
from lc3.fragments import UnderWay, fragments_of, turns
from lc3.handshake import agree, threads_for
from lc3.held import Shares, check_whole, holders_of, inside_of, parts_of
from lc3.knobs import ALONE, DEFAULT, FOR_TWO, Knobs, PresetName, knobs_for, preset_of
from lc3.link import check_unclaimed, claim, keep_apart, link_of, release
from lc3.model import Model, like, local, named_parameters, together
from lc3.outer import Outer
from lc3.owners import owners_of
from lc3.residual import arena_like
from lc3.says import Says, loaded_alike, share_of
from lc3.session import (
    Session,
    alike_in,
    alone,
    attaching,
    attaching_everywhere,
    attaching_to,
    check_form,
    check_module,
    check_owners,
    nobody,
    session_beside,
    world_group,
)
from lc3.site import Sites, ranks_of_sites, sites_of
from lc3.state import FormState
from lc3.statistics import Statistics
from lc3.steps import Counting, Watch, Written
from lc3.version import __version__

log = logging.getLogger(__name__)

# Where PyTorch's optimizers keep a first moment.
MOMENTA = ("exp_avg", "momentum_buffer")

_MOST_IN_A_ROW = 10  # exchanges that go on without a rank
_LARGEST_WEIGHT = 1e18  # beyond all tokens there are
Choose = Callable[[Sequence[Optimizer]], tuple[Knobs, str]]


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    config: Config | Settings | None = None,
    *,
    preset: PresetName | None = None,
    sync_every: int | Literal["manual"] | None = None,
    overlap: int | None = None,
    outer_lr: float | None = None,
    outer_momentum: float | None = None,
    residual_decay: float | None = None,
    inner_momentum_scale: float | None = None,
    fragments: int | None = None,
    alpha: float | None = None,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | int | None = None,
    state_device: Literal["cpu"] | None = None,
) -> "State":
    """Let every rank train ``model`` by itself, and average every so many steps.

    A knob that is not given is the preset's, or is chosen by the optimizer; giving one
    changes that one only. What was chosen is logged once (``lc3.show_choices``) and is
    in the state's ``repr``.

    Collective: every rank calls it with the same arguments. Parameters and buffers of
    rank 0 are copied to all ranks. The training loop stays as it is, and
    ``state.sync()`` ends the training. Every rank must make the same number of steps;
    where it cannot (a rank without data, a GradScaler that skips a step on one rank),
    say ``sync_every="manual"`` and call ``state.exchange()`` on every rank. One process
    without a process group, or one site, trains as without lc3, unless ``outer_lr`` or
    ``outer_momentum`` is given: then it makes outer steps, with nothing to send, and
    nothing is chosen that suits compression.

    Args:
        model: a module, its parameters on one device. One that is wrapped in
            DistributedDataParallel stays so, under its ``no_sync()`` until ``close``:
            gradients and buffers are no longer exchanged.
        optimizer: that trains it, or several that are stepped one after the other; the
            last one counts the steps. Their state stays local; ``inner_momentum_scale``
            changes it.
        config: what to compress; a density suits what local steps change. What it
            leaves open is the preset's, or as in ``FOR_TWO`` between two ranks and in
            ``DEFAULT`` between more.
        preset: of ``lc3.knobs.PRESETS``: "adamw", "muon" or "fewest-bytes".
        sync_every: H, local steps between two exchanges; default 8. "manual": none by
            itself.
        overlap: steps that go on while an exchange is under way; 0, the default, waits
            for it. Less than ``sync_every``. Each result is then applied so many steps
            later.
        outer_lr: rate of the outer optimizer: how far masters go along the mean of what
            ranks moved. 1: averaging; up to 2, which suits moments that are halved.
            With ``outer_momentum``, what is chosen is multiplied by 1 − that.
        outer_momentum: Nesterov momentum of the outer optimizer, as in DiLoCo; default
            0. Use it only without compression: error feedback already acts like
            momentum. Not with ``Tuning(topology="direct")``.
        residual_decay: what multiplies, after every exchange, what was not sent yet: a
            rank's residuals, and how far masters are ahead of the replicas. 1 forgets
            nothing. Local steps derive a long-delayed residual anew in every interval,
            so sending it in full overshoots: the more, the fewer exchanges there are
            and the larger ``outer_lr`` is. 0.8 goes with 2.
        inner_momentum_scale: what multiplies the optimizers' first moments
            (``exp_avg``, ``momentum_buffer``) whenever an exchange has changed the
            parameters. They hold this rank's own noise, and carry it into the next
            interval. 1 keeps them. Less than 1 suits AdamW and Muon; SGD with momentum
            ends worse.
        fragments: P, groups of consecutive layers that take turns; default 1. Each is
            exchanged once in ``sync_every`` steps, at other steps than the others, so
            the peak of traffic is that of the largest of them. At most ``sync_every``.
            A budget (``bytes_per_step``) is then of one fragment's exchange.
            With Adam ``outer_lr`` 1 is chosen then.
        alpha: with ``overlap``, the weight, in [0, 1), of a rank's own parameters
            beside those that arrive, as in Streaming DiLoCo. Default: what a rank has
            trained while the exchange was under way is added to what arrives.
        group: a process group that nobody else uses. Default: lc3 makes one.
        mesh: for sites of several ranks: a mesh of all ranks of the job, whose first
            dimension is between sites and the others inside of them; or the number of
            ranks in every site. Inside, ``model`` is sharded by FSDP2's ``fully_shard``
            or by tensor parallelism, or wrapped in DistributedDataParallel over the
            site's ranks, or both, and the optimizer steps it as there. Each rank
            exchanges its own shard with the same shard of the other sites; of what G
            ranks of a site hold alike, each 1/G, which they then bring together inside.
            So a rank sends 1/G of what one rank for each site would.
        state_device: "cpu" holds what lc3 keeps of the model (replica, masters,
            residuals) in host memory, pinned for a model on a GPU, and codes there:
            slower, and nothing stays on the model's device between exchanges. The bits
            are the same. Default: where the model is.

    Returns:
        The state: its ``meter``, ``sync()``, ``state_dict()``, ``close()``.

    Raises:
        AttachError: the model cannot be compressed.
        ConfigError: an argument is out of range.
        PlanMismatch: ranks differ in configuration, arguments, parameters or version.
        PeerError: one of these happened on another rank.

    Example:
        >>> model = torch.nn.Linear(8, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with attach(model, optimizer, sync_every=16) as state:
        ...     loss = model(torch.ones(4, 8)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     state.sync()
        ...     state.steps
        1
    """
    said = {
        "overlap": overlap,
        "outer_lr": outer_lr,
        "outer_momentum": outer_momentum,
        "residual_decay": residual_decay,
        "inner_momentum_scale": inner_momentum_scale,
        "fragments": fragments,
        "alpha": alpha,
    }
    given: dict[str, Any] = {k: v for k, v in said.items() if v is not None}
    if sync_every is not None:
        given["sync_every"] = None if sync_every == "manual" else sync_every

    steps_alone = not given.keys().isdisjoint(("outer_lr", "outer_momentum"))

    def chosen() -> tuple[list[Optimizer], Settings, Choose]:
        optimizers = unwrapped(optimizer)
        found = preset_of(preset)
        sites = dist.get_world_size(group) if dist.is_initialized() else 1
        if mesh is not None:
            sites = len(ranks_of_sites(mesh))
        if sites == 1 and steps_alone:
            given.update({**ALONE, **given})
        defaults = FOR_TWO if sites == 2 and not outer_momentum else DEFAULT
        if found is not None:
            defaults = found.settings
        settings = settle(config, defaults)
        check_form(settings, "hooks.local_sgd")
        if outer_momentum:
            check_owners(settings, "outer_momentum")
        choose = partial(knobs_for, settings=settings, given=given, preset=found)
        return optimizers, settings, choose

    own: dict[str, Any] = {"steps_alone": steps_alone, "state_device": state_device}
    if mesh is None:
        with nullcontext() if alone() else attaching_to(model, group):
            return State(model, *chosen(), group, **own)
    if group is not None:
        raise ConfigError("mesh makes groups of its own; leave group out")
    state: State | None = None
    try:
        with attaching_everywhere() as everybody:
            optimizers, settings, choose = chosen()
            knobs, _ = choose(optimizers)
            check_module(model)
            ranks = ranks_of_sites(mesh)
            shapes, parts = parts_of(model, ranks)
            facts = {"mesh": ranks, "parameters": shapes, **knobs.said()}
            threads = threads_for(everybody, settings)
            agree(everybody, __version__, settings, [], lambda: None, facts)
            holders = holders_of(parts, ranks, everybody)
            sites = sites_of(mesh)
            with attaching(lambda: (sites.between, sites.leave)):
                logs = settings.log_every if dist.get_rank() == 0 else None
                settings = replace(settings, threads=threads, log_every=logs)
                shares = Shares(sites.site, holders)
                state = State(
                    *(model, optimizers, settings, choose, None, sites, shares), **own
                )
    except BaseException:
        if state is not None:
            state.close()
        raise
    return state


class State(FormState):
    """Everything lc3 keeps for one model that is trained by local steps.

    See ``FormState``. The meter's dense bytes are those of a float32 all-reduce of
    every step's gradient.

    Attributes:
        owners: the masters of this rank's share.
        knobs: of local steps, as given to ``attach`` or chosen by it.
        steps: of the optimizer so far.
        exchanges: so far.
        left_out: exchanges so far without this rank, or its site, since what it had
            moved was not finite.
    """

    form = "local_sgd"

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        settings: Settings,
        choose: Choose,
        group: dist.ProcessGroup | None,
        sites: Sites | None = None,
        shares: Shares | None = None,
        *,
        steps_alone: bool = False,
        state_device: Literal["cpu"] | None = None,
    ) -> None:
        if not optimizers:
            raise AttachError("no optimizer was given, so there are no steps to count")
        self._choose = choose
        self.knobs, why = choose(optimizers)
        check_module(model)
        if sites is None:
            check_whole(model)
        model, wrapper = inside_of(model)
        if wrapper is not None and sites is None:
            link_of(wrapper)
        _check_dtypes(model)
        check_unclaimed(model)
        parameters = {n: p for n, p in named_parameters(model) if p.requires_grad}
        self._shares = shares
        mine = {} if shares is None else shares.slices_of(parameters)
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
        self._sites = sites
        if sites is not None:
            self.form = f"local_sgd, {sites.shard}"
        self.session = self._session_of(trained, facts, group)
        self.meter = self.session.meter
        self.engine = self.session.engine
        self._idle = self.engine.transport.world == 1 and not steps_alone
        if why and self._rank == 0:
            log.info("lc3: local steps with %s; %s", settings, why)
        self._model = Model(model, list(parameters), mine)
        sizes = {name: p.numel() for name, p in parameters.items()}
        self._fragments = fragments_of(sizes, self.knobs.fragments)
        self._turns = turns(self.knobs.sync_every or 1, self.knobs.fragments)
        flats = self._model.flats()
        if shares is not None:
            shares.check(self._model.wholes())
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
        self._loaded = False
        self._counting = Counting(optimizers, self._model, self._before, self._after)
        claim(model)
        self._wrapped = ExitStack()
        if wrapper is not None and sites is None:
            self._wrapped.enter_context(wrapper.no_sync())
            self._wrapped.callback(keep_apart(wrapper).close)
        self._statistics = Statistics(self._model, self.engine.channel)
        self._look_anew()

    def _session_of(
        self,
        trained: list[tuple[str, Tensor]],
        facts: dict[str, object],
        group: dist.ProcessGroup | None,
    ) -> Session:
        """Return the connection to the ranks that this one exchanges with."""
        if self._sites is not None:
            return Session(
                *(trained, self.settings, self._sites.between, self._sites.leave),
                ranks=self._sites.peers,
                facts=facts,
            )
        if alone():
            return Session(trained, self.settings, *nobody(), facts=facts)
        return session_beside(trained, self.settings, world_group(), group, facts=facts)

    def _before(self, *, new: bool) -> None:
        """Look at the parameters that an optimizer is about to step."""
        if self._loaded:  # this rank's own model, before or after the state
            self._loaded = False
            self._model.parameters()
            if self.engine.transport.world == 1:
                self._apply_owed()
            self._model.mark()
            self._fresh = ()
        elif not self._idle:
            self._watch.look(self.owners.replica, fresh=self._fresh, new=new)

    def _apply_owed(self) -> None:
        """Apply what several ranks had not sent: one rank has nobody to send it to."""
        flats = self._model.flats()
        for name, owed in self.engine.residuals.sent.items():
            flats[name].sub_(owed.to(flats[name]), alpha=self.knobs.outer_lr)
            owed.zero_()

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

    def _exchange_if_due(self, every: int) -> None:
        """Begin an exchange, or end some, if it is time to."""
        self._finish_all(self.steps)
        if (since := self.steps % every) in self._turns:
            self._start([self._turns[since]])
            if self.knobs.overlap == 0:
                self._finish()

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
            weight = _checked(weight)
        if self._idle:
            return
        self._before(new=True)
        self._finish_all()
        self._start(weight=weight)
        if self.knobs.overlap == 0:
            self._finish()

    def rebase(self) -> None:
        """Go on from what rank 0's model holds now, and owe nothing; collective.

        For weights that were loaded, or changed in any other way, on one rank only.
        What all ranks load alike is noticed without it.
        """
        self._drain()
        with self._heard_in_site():
            self._model.copy_from_first(self.engine.transport)
            if self._shares is not None:
                wholes = self._model.wholes()
                self.session.lane.call(partial(self._shares.from_first, wholes))
        self._outer.rebase(self._model.flats(), forget=True)
        self._unsent = [0] * len(self._fragments)
        self._look_anew()

    def sync(self) -> None:
        """Exchange now and make every replica equal to the masters, exactly.

        Collective. At the end of training, or before an evaluation or a checkpoint that
        all ranks share. What ranks moved and did not send yet stays in the residuals.
        """
        if self._idle:
            return
        self._before(new=True)
        self._finish_all()
        self._start(with_buffers=True)
        self._finish()
        with self._heard_in_site():
            self.session.lane.call(self.owners.flush)
        self._copy_replica()
        self._look_anew()

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

    def gather_state(self) -> list[dict[str, Any]]:
        """See ``FormState.gather_state``.

        Of sites the states of all ranks, site after site, come to the first rank of the
        mesh; their shards pass through the first site.
        """
        mine = super().gather_state()
        if self._sites is None:
            return mine
        site, call = self._sites.site, self.session.lane.call
        data = to_bytes({"sites": mine})  # this shard's, in the first site
        sizes = call(lambda: site.everybody(torch.tensor([data.numel()])))
        site.expect(max(int(one.clone().view(torch.int64)) for one in sizes))
        parts = [data, *(data[:0] for _ in range(1, site.size))]
        came = call(lambda: site.swap(parts))
        if site.place:
            return []
        shards = [
            from_bytes(one, f"rank {rank}")["sites"]
            for one, rank in zip(came, site.ranks, strict=True)
        ]
        return [state for of_site in zip(*shards, strict=True) for state in of_site]

    def load_gathered(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See ``FormState.load_gathered``; sites need ranks as many as they had each.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        if self._sites is not None:
            site = self._sites.site
            if len(states) % site.size:
                raise StateError(
                    f"the states of {len(states)} ranks are not of sites of "
                    f"{site.size}; give each site as many ranks as it had"
                )
            states = states[site.place :: site.size]
        super().load_gathered(states)

    def check_replicas(self) -> None:
        """Raise ``ReplicasDiffer`` if ranks do, after an exchange; collective."""
        with self._heard_in_site():
            self.session.check_replicas(alike_in(self._model.module), self.steps)

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
            if replica.device == flats[name].device:
                torch.sub(replica, flats[name], out=moved)
            else:
                moved.copy_(flats[name]).neg_().add_(replica)
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
        one.future = self.session.lane.submit(
            partial(self._exchange, one, mine, written)
        )
        self._under_way.append(one)

    def _finish_all(self, step: int | None = None) -> None:
        """Take over what exchanges have brought: all, or those due after a step."""
        while self._under_way and (step is None or self._under_way[0].due <= step):
            self._finish()

    def _finish(self) -> None:
        """Take over what the first exchange has brought that is under way."""
        one = self._under_way.popleft()
        with self.meter.stage("wait"):
            averaged = one.future.wait()
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
            self._model.mark()

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
        self._bring_together()

    def _drain(self) -> None:
        """Wait for exchanges that are under way, and take over nothing."""
        while self._under_way:
            self._under_way.popleft().future.wait()

    def _recover(self) -> None:
        """Forget what a rank with values that are not finite has in its optimizers."""
        self.left_out += 1
        self._left_out_in_a_row += 1
        self._statistics.restore()
        repaired = 0
        for optimizer in self._counting.optimizers:
            states = list(optimizer.state.items())
            held = [[v for v in s.values() if isinstance(v, Tensor)] for _, s in states]
            lost = self._any_of_site([not _has_norm(map(local, some)) for some in held])
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

    def _tell(self, error: Exception) -> None:
        """Let the other ranks know why this one stops."""
        tell = self.engine.channel.tell
        self.session.lane.call(lambda: tell(error, self.exchanges, 0))

    def _any_of_site(self, mine: Sequence[bool]) -> list[bool]:
        if self._sites is None:
            return list(mine)
        site = self._sites.site
        return self.session.lane.call(lambda: site.any_rank(mine))

    def _copy_replica(self, names: Collection[str] | None = None) -> None:
        for name, flat in self._model.flats().items():
            if names is None or name in names:
                flat.copy_(self.owners.replica[name])
        self._bring_together()

    def _bring_together(self) -> None:
        """Let ranks of a site that hold the same have all that each has written."""
        if self._shares is not None and self._shares.any:
            wholes = self._model.wholes()
            with self._telling_sites():
                self.session.lane.call(partial(self._shares.together, wholes))
        self._model.mark()

    def _look_anew(self) -> None:
        """Begin to look anew at what is done to parameters."""
        idle = not self._under_way and self.knobs.overlap == 0
        self._fresh = self.owners.replica.keys() if idle else ()
        self._model.mark()
        self._watch.take(self.owners.replica)

    def _exchange(self, one: UnderWay, mine: Says, written: Written) -> Tensor:
        """Exchange with the other ranks, or sites. Runs on the lane.

        Returns:
            The mean of the buffers that have changed: see ``Statistics.mean``.
        """
        if self._sites is None:
            return self._push_and_pull(one, mine, written)
        site = self._sites.site
        with self._telling_sites():
            mine = site.agree(mine)
        with site.telling(), self._telling_sites():
            if mine.written and not written.base:  # another shard was
                replica = self.owners.replica
                base = {name: replica[name].clone() for name in one.names}
                written = replace(written, base=base)
            try:
                averaged = self._push_and_pull(one, mine, written)
            except PeerError as error:  # numbered as the job does
                rank = self._sites.peers[error.rank]
                raise PeerError(rank, error.reason) from error
        with self._telling_sites():
            site.confirm()
        return averaged

    def _push_and_pull(self, one: UnderWay, mine: Says, written: Written) -> Tensor:
        """Push what was moved, change the masters, pull; see ``_exchange``."""
        owners, step, transport = self.owners, one.number, self.engine.transport
        self.meter.buckets += 1
        some = {n: moved for n, moved in self._moved.items() if n in one.names}
        elements = sum(map(Tensor.numel, some.values()))
        with self.engine.channel.exchanging(elements, step, 0):
            said = self.engine.channel.all_gather_bytes(mine.to_bytes(), step, 2)
            count = len(mine.buffers)
            everybody = one.said = [Says.from_bytes(data, count) for data in said]
            alike = loaded_alike(everybody)
            self._watch.told(written, alike=alike)
            if alike:
                self._go_on_from_written(written, far=mine.far)
            counted = sum([said.finite for said in everybody])
            share = share_of(mine, everybody) if mine.finite else 0.0
            for moved in some.values() if share != 1 else ():
                if share:
                    moved.mul_(share)
                else:
                    moved.zero_()  # says nothing, and keeps its residual
            if counted:
                nobody_else = transport.world == 1
                push = owners.push_here if nobody_else else owners.push
                push(some, step, 0)
                self._outer.step(self.knobs, transport.world / counted, some)
                pull = owners.pull_here if nobody_else else owners.pull
                pull(some, step, 0)
                self._outer.forget(self.knobs, some)
            averaged = self._statistics.mean(everybody, mine, step)
        self._count_dense(one)
        return averaged

    def _count_dense(self, one: UnderWay) -> None:
        """Count what an all-reduce of every step but one would have sent."""
        world = self.engine.transport.world  # ``exchanging`` has counted one
        for name in one.names:
            others = (one.steps[name] - 1) * self._moved[name].numel()
            self.meter.dense_bytes += 8 * others * (world - 1) / world

    @contextmanager
    def _telling_sites(self) -> Iterator[None]:
        """Tell the other sites if this one has failed."""
        try:
            yield
        except BaseException as error:
            self.engine.channel.tell(error, self.exchanges, 0)
            raise

    @contextmanager
    def _heard_in_site(self) -> Iterator[None]:
        """Let this rank's whole site fail if it fails in the block."""
        if self._sites is None:
            yield
            return
        with self._sites.site.telling():
            yield
        with self._telling_sites():
            self.session.lane.call(self._sites.site.confirm)

    @property
    def _rank(self) -> int:
        """Number of this rank in the job."""
        transport = self.engine.transport
        return transport.rank if self._sites is None else dist.get_rank()

    def _go_on_from_written(self, written: Written, *, far: bool) -> None:
        """Let what all ranks were given be what they have moved from."""
        for name, flat in written.base.items():
            self._moved[name].add_(flat - self.owners.replica[name])
            if name in written.late:
                self._moved[name].add_(written.late[name])
        self._outer.rebase(written.base, forget=written.whole or far)
        log.info("lc3: all ranks were given other parameters; they go on from these")

    def _decay_momenta(self, one: UnderWay) -> None:
        if self.knobs.inner_momentum_scale == 1:
            return
        others = set()
        for name, parameter in self._model.last_seen.items():
            if name not in one.names:
                others.add(id(parameter))
        states = []
        for optimizer in self._counting.optimizers:
            for stepped, held in optimizer.state.items():
                if id(stepped) not in others:
                    states.append(held)
        kept = [state[key] for state in states for key in MOMENTA if key in state]
        momenta = [moment for moment in kept if isinstance(moment, Tensor)]
        if not momenta and any(one.steps.values()):  # a rank without data has none yet
            raise ConfigError(
                f"inner_momentum_scale={self.knobs.inner_momentum_scale!r} has nothing "
                "to multiply: the optimizer's state has no "
                f"{' and no '.join(MOMENTA)}; leave it 1"
            )
        for moment in momenta:
            moment.mul_(self.knobs.inner_momentum_scale)

    def state_dict(self) -> dict[str, Any]:
        """See ``FormState.state_dict``.

        Every rank saves its own model and optimizer beside it: between two exchanges
        they differ. Right after ``sync`` one rank's model is all ranks'.

        Raises:
            StateError: an exchange is under way.
        """
        if self._under_way:
            raise StateError("an exchange is under way; call state.sync() first")
        return super().state_dict()

    def _parts(self) -> Parts:
        if self._idle:  # its model is what others go on from
            self._outer.rebase(self._model.flats(), forget=False)
        slices: dict[str, dict[str, Tensor]] = {"masters": self.owners.masters}
        if self._outer.velocity:
            slices["velocity"] = self._outer.velocity
        return Parts(
            {
                "steps": self.steps,
                "exchanges": self.exchanges,
                **dict(zip(self._counters(), self._unsent, strict=True)),
                **self.engine.budget.counters(),
            },
            self.engine.residuals.sent,
            slices,
            {"replica": dict(self.owners.replica)},
        )

    def _counters(self) -> list[str]:
        """Return what the steps since each fragment's last exchange are saved as."""
        return [
            f"{UNSENT}_{index}" if index else UNSENT
            for index in range(len(self._fragments))
        ]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``FormState.load_state_dict``.

        The model is loaded after ``attach``, before this or after it: on every rank its
        own, or, after ``sync``, on other numbers of ranks any of them. The optimizer
        inside is each rank's own affair.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        self._drain()
        mine = self._parts()
        found = self._found(state, mine)
        mine.copy_from(found)
        self.owners.take_lead(found.slices["masters"], self.knobs.outer_lr)
        self.steps = int(found.counters["steps"])
        self.exchanges = int(found.counters["exchanges"])
        self.engine.budget.load(found.counters)
        merged = state["rank"] is None
        self._unsent = [
            0 if merged else int(found.counters[name]) for name in self._counters()
        ]
        self._look_anew()
        self._loaded = True

    def _knobs(self) -> dict[str, object]:
        return self.knobs.said()

    def close(self) -> None:
        """Stop counting steps; end the lane and the group it made.

        A model that DistributedDataParallel wraps exchanges its gradients again.
        """
        self._counting.close()
        release(self._model.module)
        self._wrapped.close()
        self.session.close()


def _checked(weight: object) -> float:
    """Return a weight as a number.

    Raises:
        ConfigError: it is none.
    """
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan if isinstance(weight, bool | str) else float(weight)  # type: ignore[arg-type]
        if 0 <= number <= _LARGEST_WEIGHT:
            return number
    raise ConfigError(
        f"weight={weight!r} must be a number from 0 to {_LARGEST_WEIGHT:g}, like the "
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
