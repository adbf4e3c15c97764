"""3LC in a training loop with Accelerate.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state = lc3.hooks.accelerate.attach(accelerator, model, optimizer)

Accelerate's own list of communication hooks is closed; what ``prepare`` returns is a
DistributedDataParallel that takes any.
"""

import copy
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lc3 import private
from lc3.checkpoint import load_checkpoint, save_checkpoint
from lc3.config import Config, Settings
from lc3.errors import AttachError
from lc3.hooks.frameworks import (
    Attach,
    FormName,
    attach_of,
    check_inside,
    check_sites,
    is_sharded,
    missing,
    require,
)
from lc3.session.groups import alone
from lc3.session.state import FormState

try:
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        save_fsdp_model,
        save_fsdp_optimizer,
    )
except ModuleNotFoundError as error:
    raise missing("accelerate", error) from error

log = logging.getLogger(__name__)

_LEAST = "0.30"
_ATTACHED: WeakKeyDictionary[Accelerator, int] = WeakKeyDictionary()


class _Inside:
    """What ``prepare`` asks for DistributedDataParallel's arguments.

    Args:
        given: its own.
        group: the ranks that share gradients.
    """

    def __init__(
        self, given: DistributedDataParallelKwargs, group: dist.ProcessGroup
    ) -> None:
        self._given, self._group = given, group

    def to_kwargs(self) -> dict[str, Any]:
        """See ``DistributedDataParallelKwargs``, which could not copy a group."""
        return {**self._given.to_kwargs(), "process_group": self._group}

    def register_comm_hook(self, model: nn.Module) -> None:
        """See ``DistributedDataParallelKwargs``."""
        self._given.register_comm_hook(model)


def inside(accelerator: Accelerator, mesh: DeviceMesh | None = None) -> None:
    """Let ``prepare`` share gradients and shards inside of a site, not across the job.

    Before ``prepare``, or before a Trainer trains, with ``trainer.accelerator``. Then
    ``attach=partial(lc3.hooks.local_sgd.attach, mesh=mesh, sync_every=8)`` lets sites
    make local steps.

    With FSDP2 the mesh is Accelerate's own, ``mesh=accelerator.torch_device_mesh``:
    ``ParallelismConfig(dp_replicate_size=sites, dp_shard_size=ranks_of_a_site)``.

    Args:
        accelerator: the Accelerator that will prepare the model. Changed.
        mesh: for DDP: two dimensions, between sites and inside of them.

    Raises:
        AttachError: a model is prepared already, there is no mesh, or FSDP2 has one of
            its own that has no sites.
    """
    if accelerator._optimizers:
        raise AttachError("call inside(accelerator) before accelerator.prepare")
    if getattr(accelerator, "is_fsdp2", False):
        config = copy.copy(accelerator.parallelism_config)
        if mesh is not None or config is None or not config.dp_replicate_enabled:
            raise AttachError(
                "with FSDP2 the sites are Accelerate's own: leave mesh out, and pass "
                "Accelerator(parallelism_config=ParallelismConfig(dp_replicate_size="
                "sites, dp_shard_size=ranks_of_a_site))"
            )
        shards = {"fsdp_dim_names": ["dp_shard_cp"]}  # not "dp_replicate"
        config.__class__ = type("Sites", (type(config),), shards)
        accelerator.state.parallelism_config = config
        return
    if mesh is None:
        raise AttachError("name the mesh of the sites: inside(accelerator, mesh)")
    given = accelerator.ddp_handler or DistributedDataParallelKwargs()
    accelerator.ddp_handler = _Inside(given, mesh.get_group(1))


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    config: Config | Settings | None = None,
    *,
    form: FormName | None = None,
    sync_every: int | None = None,
    attach: Attach | None = None,
) -> FormState:
    """Compress what a prepared model exchanges; collective.

    ``accelerator.clip_grad_norm_``, ``accelerator.accumulate`` and mixed precision work
    as without lc3.

    ``accelerator.save_state`` and ``load_state`` save and load what every rank has not
    sent yet, in ``lc3_0.pt``, ``lc3_1.pt`` and so on in the order of attaching: with as
    many ranks a run goes on bit for bit, with others it keeps the mean. Without the
    file, as from a run without lc3, nothing is owed. Local steps, in the place of
    Accelerate's own ``LocalSGD``, are brought together before they are saved; the first
    rank's optimizer is saved, and all ranks resume from that, so such a run does not go
    on bit for bit. Evaluate it ``with state.shared_model():``.

    One process, whose model ``prepare`` does not wrap, trains as without lc3.

    >>> from accelerate import Accelerator
    >>> accelerator = Accelerator(cpu=True)
    >>> model, optimizer = accelerator.prepare(model, optimizer)
    >>> state = lc3.hooks.accelerate.attach(accelerator, model, optimizer)
    >>> accelerator.backward(model(torch.ones(4, 8)).sum())
    >>> accelerator.clip_grad_norm_(model.parameters(), 1.0) > 0
    tensor(True)
    >>> optimizer.step()
    >>> state.close()

    Args:
        accelerator: the Accelerator that prepared it.
        model: the model that ``prepare`` returned.
        optimizer: as ``prepare`` returned it, see ``ddp.attach``. ``None``: those that
            this accelerator has prepared.
        config: see ``ddp.attach``.
        form: "ddp", which compresses gradients, or "local_sgd": every rank trains by
            itself, and ranks come together every so many steps. Default: "ddp".
        sync_every: steps between two exchanges of "local_sgd"; see its ``attach``.
        attach: ``attach`` of a form with more of its arguments, instead of both:
            ``functools.partial(lc3.hooks.local_sgd.attach, overlap=2)``. With its
            ``mesh`` sites make local steps; see ``inside``.

    Returns:
        What ``attach`` returns.

    Raises:
        ConfigError: ``form``, ``sync_every`` and ``attach`` contradict each other.
        AttachError: this Accelerate is too old, or the model is neither wrapped in
            DistributedDataParallel nor sharded by FSDP2; and what ``attach`` raises.
    """
    require("accelerate", version("accelerate"), _LEAST)
    make = attach_of(form, sync_every, attach)
    inner = private.uncompiled(model)
    sharded = is_sharded(inner) and not alone()
    if not (isinstance(inner, DistributedDataParallel) or sharded or alone()):
        raise AttachError(
            "lc3 needs a model that accelerator.prepare wrapped in "
            "DistributedDataParallel or sharded by FSDP2; with "
            f"{accelerator.num_processes} process(es) and "
            f"{accelerator.distributed_type} it is a {type(model).__name__}"
        )
    if optimizer is None:
        optimizer = list(accelerator._optimizers)  # there is no public list
    if sharded:
        check_inside(accelerator)
        check_sites(inner, make, "accelerator.torch_device_mesh")
    state = make(inner, optimizer, config)

    number = _ATTACHED[accelerator] = _ATTACHED.get(accelerator, -1) + 1
    file = f"lc3_{number}.pt"

    def save(models: list[nn.Module], _: object, folder: str) -> None:
        state.sync()
        if sharded:  # both were saved before this is called
            place, plugin = models.index(model), accelerator.state.fsdp_plugin
            own = accelerator._optimizers[place]
            save_fsdp_model(plugin, accelerator, model, folder, place)
            save_fsdp_optimizer(plugin, accelerator, own, model, folder, place)
        ranks = state.gather_state()
        if ranks:
            save_checkpoint(ranks, Path(folder) / file)

    def load(_: object, folder: str) -> None:
        path = Path(folder) / file
        if path.exists():
            state.load_gathered(load_checkpoint(path))
        else:
            log.warning(
                "lc3: %s is not there, as where lc3 was not attached; nothing is owed",
                path,
            )

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return state
