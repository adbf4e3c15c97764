"""3LC between replicas of a model that FSDP2 shards: dense inside of a node or site.

    mesh = init_device_mesh("cuda", (sites, per_site), mesh_dim_names=("between", "in"))
    fully_shard(model, mesh=mesh["in"])               # and its layers, as always
    state = lc3.hooks.fsdp2.attach(model, mesh)

FSDP shards and gathers over the fast network; each rank then holds the mean gradient of
its shard over its own site, which lc3 averages with the same shard of the other sites.
So a rank sends 1/G of what it would in DDP, G being the ranks of a site, compressed.
Between all ranks of one sharded model lc3 would save little: two thirds of FSDP's bytes
are parameters.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lc3 import private
from lc3.config import Config, Settings, settle
from lc3.errors import AttachError
from lc3.local.site import peers_of
from lc3.module.model import Frozen, named_parameters
from lc3.session.attaching import attaching
from lc3.session.checks import alike_in, check_form
from lc3.session.session import Session
from lc3.session.state import FormState


def attach(
    model: nn.Module,
    mesh: DeviceMesh,
    config: Config | Settings | None = None,
) -> "State":
    """Average the shards' gradients over replicas of a sharded model by 3LC.

    Collective over all ranks of the job, after ``fully_shard`` and before the first
    backward. A module is exchanged where FSDP would run its own all-reduce between
    replicas, while backward goes on with the next one, and backward ends when all have
    been. Where FSDP works on a gradient in between (another dtype than the parameter's,
    gradients that pile up, offloading), it waits for each.

    Args:
        model: module that ``fully_shard`` sharded over the mesh's second dimension.
        mesh: mesh of all ranks, with two dimensions: between sites, and inside a site.
        config: settings of what to compress. A tensor is a shard of a parameter.

    Raises:
        AttachError: the model or the mesh is not of that kind.
        ConfigError: a pattern of the configuration matches no parameter.
        PlanMismatch: replicas differ in configuration, parameters or version.
        PeerError: one of these happened on another rank.
    """
    return State(model, mesh, config)


class State(FormState):
    """Everything lc3 keeps for one sharded model: made by ``attach``.

    See ``FormState``. What is gathered, or checked, is of the ranks that hold the same
    shard, one of each site. Another number of sites goes on from ``lc3.merge_states``
    of those, with shards of the same size.
    """

    form = "fsdp2"

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, config: Config | Settings | None
    ) -> None:
        self._model = model
        transport, peers = peers_of(mesh)
        leave = partial(transport.leave, destroy=True)
        with attaching(lambda: (transport, leave)):
            self.settings = settle(config, Settings())
            check_form(self.settings, "hooks.fsdp2")
            modules = _shards(model)
            named = [shard for shards in modules.values() for shard in shards]
            self._frozen = Frozen(named_parameters(model))
            self.session = Session(named, self.settings, transport, leave, ranks=peers)
            self.meter = self.session.meter
            self.engine = self.session.engine
            for module, shards in modules.items():
                names = [name for name, _ in shards]
                (group,) = private.shard_groups(module)
                module.set_all_reduce_hook(partial(_reduce, self, names, group))

    def reduce(self, output: Tensor, names: Sequence[str], follows: bool) -> None:
        """Make a module's reduced gradients their mean over replicas.

        Args:
            output: the shards' gradients in a row, flat and padded; overwritten.
            names: names of the module's parameters, in that order.
            follows: whether that may be any time until backward ends.
        """
        sizes = [self.engine.plan.numel[name] for name in names]
        if self.engine.transport.world == 1:
            return
        self._frozen.check("close the state, and attach again")
        step, bucket = self.session.next_bucket(names)
        self.meter.at_step(step + 1)

        def exchange() -> Tensor:
            if output.numel() != sum(sizes):
                error = AttachError(
                    f"FSDP reduced {output.numel()} elements of a module whose shards "
                    f"have {sum(sizes)}: one of {names[:3]} … had no gradient in this "
                    "step; lc3 needs all parameters of a module to be used, or none"
                )
                self.engine.channel.tell(error, step, bucket)
                raise error
            flat = output.float()
            parts = torch.split(flat, sizes)
            self.engine.all_reduce(dict(zip(names, parts, strict=True)), step, bucket)
            if flat is not output:
                output.copy_(flat)
            return output

        future = self.session.lane.submit(exchange)
        if follows:
            private.at_end_of_backward(partial(self.session.wait, future))
        else:
            self.session.wait(future)

    def check_replicas(self) -> None:
        """Raise ``ReplicasDiffer`` if sites hold other shards; collective.

        Before a step or after one: in between FSDP gathers what it has sharded.
        """
        self.session.check_replicas(alike_in(self._model))

    def close(self) -> None:
        """End the lane and the group it made. The model can no longer run backward."""
        self.session.close()


def _reduce(state: State, names: Sequence[str], group: Any, output: Tensor) -> None:
    state.reduce(output, names, private.takes_views(group, output))


def _shards(model: nn.Module) -> dict[FSDPModule, list[tuple[str, Tensor]]]:
    """Return for each sharded module, in order, its shards and their names.

    A shard is given as a tensor of its padded size, without memory of its own: what
    FSDP reduces a module to is these in a row.

    Raises:
        AttachError: no module is sharded, or one is over several dimensions.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[FSDPModule, list[tuple[str, Tensor]]] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        groups = private.shard_groups(module)
        several = [g for g in groups if g.mesh_info.mesh.ndim != 1]
        shards: list[tuple[Any, torch.Size]] = [
            (p.sharded_param, p.padded_sharded_param_size)
            for group in groups
            for p in group.fsdp_params
            if p.sharded_param.requires_grad
        ]
        if several:
            raise AttachError(
                "a module is sharded over a mesh of "
                f"{several[0].mesh_info.mesh.ndim} dimensions, so FSDP itself reduces "
                "between replicas; fully_shard(module, mesh=mesh['inside']), and let "
                "lc3 do the rest"
            )
        if len(groups) > 1:
            raise AttachError(
                "a module's parameters are sharded over several meshes, and FSDP does "
                "not say which one it reduces; shard them over one"
            )
        if shards:
            found[module] = [
                (names[id(p)], p.to_local().new_empty(1).expand(size))
                for p, size in shards
            ]
    if not found:
        raise AttachError(
            f"no module of this {type(model).__name__} is sharded; call fully_shard "
            "before attach, or lc3.hooks.ddp for DistributedDataParallel"
        )
    return found
