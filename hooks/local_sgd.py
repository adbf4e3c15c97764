"""Local steps: every rank trains by itself, and 3LC brings the ranks together again.

After every H-th step of the optimizer the ranks push what their parameters have moved,
the owners average it into float32 masters, and everybody pulls 3LC of what the masters
have moved (with ``Tuning(topology="direct")`` everybody averages). Sources: local SGD
(Stich, arXiv 1805.09767), DiLoCo (arXiv 2311.08105), and for masters with error
feedback EF21-P (arXiv 2209.15218); residuals that decay, SparseLoCo (arXiv 2508.15706);
fragments, and ``alpha``, Streaming DiLoCo (arXiv 2501.18512).
That first moments matter in an exchange: DES-LOC (arXiv 2505.22549), which sends them.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lc3.checkpoint import UNSENT, Parts
from lc3.config import Config, Settings, settle
from lc3.errors import ConfigError, StateError
from lc3.knobs import (
    ALONE,
    DEFAULT,
    FOR_TWO,
    PresetName,
    given_by,
    knobs_for,
    preset_of,
)
from lc3.local.ends import OneRank
from lc3.local.fragments import UnderWay
from lc3.local.joining import join_sites
from lc3.local.local_steps import Choose, LocalSteps
from lc3.local.says import Says, loaded_alike, share_of
from lc3.local.site import ranks_of_sites
from lc3.module.applied import unwrapped
from lc3.module.steps import Written
from lc3.session.attaching import attaching_to
from lc3.session.checks import alike_in, check_form, check_owners
from lc3.session.groups import alone


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
    given = given_by(
        sync_every,
        overlap=overlap,
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
        residual_decay=residual_decay,
        inner_momentum_scale=inner_momentum_scale,
        fragments=fragments,
        alpha=alpha,
    )
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
            return State(model, *chosen(), OneRank(group), **own)
    if group is not None:
        raise ConfigError("mesh makes groups of its own; leave group out")
    return join_sites(model, mesh, chosen, partial(State, **own))


class State(LocalSteps):
    """Everything lc3 keeps for one model that is trained by local steps.

    See ``LocalSteps``. The meter's dense bytes are those of a float32 all-reduce of
    every step's gradient.
    """

    form = "local_sgd"
    _loaded = False  # a state, and the model may be loaded after it

    def _before(self, *, new: bool) -> None:
        """Look at the parameters that an optimizer is about to step."""
        if self._loaded:  # this rank's own model, before or after the state
            self._loaded = False
            self._model.parameters()
            if self.engine.transport.world == 1:
                self._outer.apply_owed(self._model.flats(), self.knobs)
            self._model.mark()
            self._fresh = ()
        elif not self._idle:
            self._watch.look(self.owners.replica, fresh=self._fresh, new=new)

    def rebase(self) -> None:
        """Go on from what rank 0's model holds now, and owe nothing; collective.

        For weights that were loaded, or changed in any other way, on one rank only.
        What all ranks load alike is noticed without it.
        """
        self._drain()
        with self._end.heard():
            self._model.copy_from_first(self.engine.transport)
            self._end.from_first(self._model)
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
        with self._end.heard():
            self.session.lane.call(self.owners.flush)
        self._copy_replica()
        self._look_anew()

    def check_replicas(self) -> None:
        """Raise ``ReplicasDiffer`` if ranks do, after an exchange; collective."""
        with self._end.heard():
            self.session.check_replicas(alike_in(self._model.module), self.steps)

    def _push_and_pull(self, one: UnderWay, mine: Says, written: Written) -> Tensor:
        """Push what was moved, change the masters, pull."""
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
                self._outer.go_on_from(written, self._moved, far=mine.far)
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
            return self._statistics.mean(everybody, mine, step)

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
