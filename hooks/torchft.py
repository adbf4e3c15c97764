"""Local steps of machines that come and go, on torchft's membership.

torchft's lighthouse says who is there, and its manager connects them anew whenever that
changes; ``come_and_go`` exchanges between them. Source: torchft
(https://github.com/meta-pytorch/torchft).
"""

import logging
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Literal
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from lc3.config import Config, Settings, settle
from lc3.errors import AttachError, ConfigError, ExchangeError
from lc3.hooks import come_and_go
from lc3.hooks.come_and_go import Quorum, StopError
from lc3.hooks.frameworks import missing, require
from lc3.knobs import FOR_TWO, PresetName, given_by, knobs_for, preset_of
from lc3.module.applied import unwrapped
from lc3.session.checks import check_form

try:
    from torchft.manager import Manager, WorldSizeMode
except ModuleNotFoundError as error:
    raise missing("torchft", error) from error

log = logging.getLogger(__name__)

_LEAST = "0.2"
_SLACK_S = 5.0
_LONGEST_S = 86400.0
_KEY = "lc3"
_REGISTERED: "WeakSet[Manager]" = WeakSet()  # these know lc3's key
_TAKEN: "WeakSet[Manager]" = WeakSet()  # and these have a state


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    manager: Manager,
    config: Config | Settings | None = None,
    *,
    preset: PresetName | None = None,
    sync_every: int | Literal["manual"] | None = None,
    sync_every_s: float | None = None,
    outer_lr: float | None = None,
    residual_decay: float | None = None,
    inner_momentum_scale: float | None = None,
    optimizer_state: Literal["own", "taken"] = "own",
    hostname: str | None = None,
    bind: str = "",
    fetch_timeout_s: float | None = None,
) -> "State":
    """Let ranks that come and go train ``model`` by local steps.

    After every H-th step the ranks that torchft's quorum has brought together average
    what they have moved. Who is not there keeps what it has moved for the next time.
    The first ranks go on from what most of them hold alike, or else from what the
    lowest of them holds; who joins later gets the model, the steps and the buffers of
    one of them, while they go on. An exchange that fails is logged, and training goes
    on.

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
        sync_every_s: seconds from one exchange to the next, in place of
            ``sync_every``: each rank makes the steps that it can until then, and is
            there in time. For ranks of different speeds; weights are the steps, or
            ``state.tokens``. Several steps of the slowest, and less than the manager's
            ``quorum_timeout``.
        outer_lr: see ``lc3.hooks.local_sgd.attach``.
        residual_decay: see ``lc3.hooks.local_sgd.attach``.
        inner_momentum_scale: see ``lc3.hooks.local_sgd.attach``.
        optimizer_state: for a rank that joins: "own", it begins anew; "taken", it gets
            that of the rank which gives it the model, two more models' bytes with Adam.
        hostname: name or address of this machine, that the others can reach. Default:
            the machine's name.
        bind: address to serve the model on to those that join. Default: all.
        fetch_timeout_s: how long a rank that sends or gets a model may be silent.
            Default: the manager's timeout.

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
    given = given_by(
        sync_every,
        outer_lr=outer_lr,
        residual_decay=residual_decay,
        inner_momentum_scale=inner_momentum_scale,
    )
    if sync_every_s is not None:
        if sync_every is not None:
            raise ConfigError(
                f"sync_every={sync_every!r} and sync_every_s={sync_every_s!r} both say "
                "when to exchange; leave one out"
            )
        given["sync_every"] = None
    if optimizer_state not in ("own", "taken"):
        raise ConfigError(
            f"optimizer_state={optimizer_state!r} must be 'own' or 'taken'"
        )
    _check_manager(manager)
    if sync_every_s is not None:
        _check_seconds(sync_every_s, manager._quorum_timeout.total_seconds())
    host = socket.gethostname() if hostname is None else hostname
    silent_s = fetch_timeout_s
    if silent_s is None:
        silent_s = manager._timeout.total_seconds()
    _check_served(host, bind, silent_s)
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
    managed = _Managed(manager)
    try:
        state = State(
            *(model, optimizers, settings, choose, managed),
            wants=optimizer_state == "taken",
            every_s=sync_every_s,
        )
    except BaseException:
        managed.release()
        raise
    state.managed = managed
    try:
        state.join(host, bind, silent_s)
    except BaseException:
        state.close()
        raise
    return state


def _check_seconds(every_s: object, quorum_s: float) -> None:
    """Raise ``ConfigError`` if ranks cannot exchange after so many seconds."""
    is_number = isinstance(every_s, int | float) and not isinstance(every_s, bool)
    if not is_number or not 0 < every_s < quorum_s:  # type: ignore[operator]
        raise ConfigError(
            f"sync_every_s={every_s!r} must be a number of seconds above 0 and less "
            f"than the manager's quorum_timeout, {quorum_s:g}: who has been away may "
            "wait that long for the others"
        )


def _check_served(host: object, bind: object, silent_s: object) -> None:
    """Raise ``ConfigError`` if a model cannot be served, or waited for, like that."""
    for name, value in (("hostname", host), ("bind", bind)):
        if not (isinstance(value, str) and (value or name == "bind") and _named(value)):
            raise ConfigError(
                f"{name}={value!r} must be the name or address of a machine"
            )
    is_number = isinstance(silent_s, int | float) and not isinstance(silent_s, bool)
    if not is_number or not 0 < silent_s <= _LONGEST_S:  # type: ignore[operator]
        raise ConfigError(
            f"fetch_timeout_s={silent_s!r} must be a number of seconds above 0, and at "
            f"most {_LONGEST_S:g}"
        )


def _named(host: str) -> bool:
    """Return whether a machine can have that name."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


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


class State(come_and_go.State):
    """See ``come_and_go.State``."""

    form = "torchft"
    managed: "_Managed"

    def close(self) -> None:
        """See ``come_and_go.State``; another state may then take the manager."""
        super().close()
        self.managed.release()


class _Managed:
    """A ``Membership`` of torchft's manager."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self.name = str(manager._replica_id or "a replica without a name")
        if manager in _TAKEN:
            raise AttachError(
                "this manager has an lc3 state already; close that, or make another "
                "manager for another model"
            )
        if manager not in _REGISTERED:
            # The manager wants something to give to those that are behind.
            manager.register_state_dict_fn(_KEY, lambda _: None, dict)
            _REGISTERED.add(manager)
        _TAKEN.add(manager)

    def release(self) -> None:
        """Let another state take the manager."""
        _TAKEN.discard(self._manager)

    def meet(self) -> Quorum:
        """See ``Membership``."""
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
            raise StopError(error)
        if failed:
            manager._quorum_future = None  # or it raises the same for ever
            raise ExchangeError(f"there was no quorum ({failed[0]})") from failed[0]
        if (found := manager.errored()) is not None:
            raise ExchangeError(f"ranks could not connect ({found.original_exception})")
        rank, world = manager.participating_rank(), manager.num_participants()
        assert rank is not None
        return Quorum(manager._pg, rank, world, manager._quorum_id)

    def commit(self, error: Exception | None) -> bool:
        """See ``Membership``."""
        if error is not None:
            self._manager.report_error(error)
        try:
            return bool(self._manager.should_commit())
        except TimeoutError as late:  # this process was stopped in the middle
            log.warning(
                "lc3: torchft did not say whether the exchange counts: %s", late
            )
            return False
