"""How the ranks of a site hold a model: which part each has, and its share of that.

A part that several ranks of a site hold alike, as under DistributedDataParallel, in
HSDP's replicas, or where tensor parallelism leaves a parameter whole, is cut into as
many shares. Each rank exchanges its own share with the other sites, and the ranks bring
their shares together inside, where the network is fast.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lc3 import private
from lc3.errors import AttachError, ReplicasDiffer
from lc3.local.site import Site
from lc3.module.model import checksums, local, named_parameters, reshard
from lc3.transport.handshake import gather_bytes
from lc3.transport.protocol import Transport

_WHOLE = "the whole"


def inside_of(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """Return the module that is trained, and what DDP wraps around it."""
    inner = private.uncompiled(model)
    if not isinstance(inner, DistributedDataParallel):
        return model, None
    return inner.module, inner


def check_readable(model: nn.Module) -> None:
    """Raise ``AttachError`` if a model is held by what lc3 cannot look into."""
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise AttachError(
            "the model is sharded by FSDP's first version, whose parameters lc3 cannot "
            "read; use torch.distributed.fsdp.fully_shard, and mesh=mesh"
        )
    if type(model).__module__.partition(".")[0] == "deepspeed":
        raise AttachError(
            f"the model is DeepSpeed's {type(model).__name__}, which holds parameters "
            "and optimizer itself, where lc3 cannot read them; use torch.distributed."
            "fsdp.fully_shard, and mesh=mesh"
        )


def check_whole(model: nn.Module) -> None:
    """Raise ``AttachError`` unless each rank holds all of a model."""
    check_readable(model)
    sharded = any(isinstance(part, FSDPModule) for part in model.modules())
    if sharded or any(isinstance(p, DTensor) for p in model.parameters()):
        raise AttachError(
            "the model is sharded; give the mesh, too, of two dimensions, between "
            "sites and inside of them: attach(model, optimizer, mesh=mesh)"
        )


class Parts(NamedTuple):
    """What a rank holds of a model.

    Attributes:
        held: by parameter name, described the same way for the same part.
        trains_with: ranks that it shares gradients or shards with, itself among them.
    """

    held: Mapping[str, str]
    trains_with: Collection[int]


def parts_of(
    model: nn.Module, sites: Sequence[Sequence[int]]
) -> tuple[dict[str, list[int]], Parts]:
    """Return whole shapes of what a model trains, and which parts this rank holds.

    Args:
        model: the model, wrapped or not.
        sites: ranks of each site.

    Returns:
        Shapes by parameter name, and the parts.

    Raises:
        AttachError: the ranks of this rank's site do not hold one model between them.
    """
    check_readable(model)
    model, wrapper = inside_of(model)
    reshard(model)
    site = next(ranks for ranks in sites if dist.get_rank() in ranks)
    trained = {n: p for n, p in named_parameters(model) if p.requires_grad}
    divided = [isinstance(p, DTensor) for p in trained.values()]
    alike = any(divided)
    trains_with = {dist.get_rank()}
    if wrapper is not None:
        over = dist.get_process_group_ranks(wrapper.process_group)
        if set(over) != set(site) and not (alike and set(over) < set(site)):
            raise AttachError(
                f"DistributedDataParallel averages gradients over the ranks {over}, "
                f"and this rank's site has the ranks {list(site)}; wrap the module "
                "with process_group=mesh.get_group(...) of the dimension inside"
            )
        trains_with |= set(over)
    elif any(isinstance(part, FSDPModule) for part in model.modules()):
        alike = False
    parts = {}
    for name, parameter in trained.items():
        if isinstance(parameter, DTensor):
            parts[name] = _part_of(name, parameter, sites, site)
            trains_with |= set(parameter.device_mesh.mesh.flatten().tolist())
        elif alike or wrapper is not None or len(site) == 1:
            parts[name] = _WHOLE
        else:
            raise AttachError(
                f"mesh has sites of {len(site)} ranks, and parameter {name!r} of this "
                f"{type(model).__name__} is not sharded over them, nor averaged by "
                "DistributedDataParallel; fully_shard(model, mesh=mesh[...]) over the "
                "dimension inside first, or wrap the model in DistributedDataParallel "
                "with process_group=mesh.get_group(...), or leave mesh out for a model "
                "on each rank"
            )
    shapes = {name: list(p.shape) for name, p in trained.items()}
    return shapes, Parts(parts, sorted(trains_with))


def _part_of(
    name: str,
    parameter: DTensor,
    sites: Sequence[Sequence[int]],
    site: Sequence[int],
) -> str:
    mesh = parameter.device_mesh
    over = mesh.mesh.flatten().tolist()
    if not set(over) <= set(site):
        raise AttachError(
            f"parameter {name!r} is sharded over the ranks {over}, which are in no "
            f"site of the mesh: {[list(ranks) for ranks in sites]}; shard over the "
            "dimensions after the mesh's first"
        )
    at = mesh.get_coordinate()
    assert at is not None
    cuts = [
        f"{placement} {here} of {size}"
        for placement, here, size in zip(
            parameter.placements, at, mesh.shape, strict=True
        )
        if not placement.is_replicate()
    ]
    return ", ".join(cuts) or _WHOLE


def holders_of(
    parts: Parts,
    sites: Sequence[Sequence[int]],
    transport: Transport,
) -> dict[str, list[int]]:
    """Return who in this rank's site holds the same part as it; collective.

    Args:
        parts: from ``parts_of``, the same names on every rank.
        sites: ranks of each site.
        transport: between all ranks of the job.

    Returns:
        By parameter name places in the site.

    Raises:
        AttachError: sites hold the model in different ways, or the ranks of one do
            not all train together; the same on every rank.
    """
    said = gather_bytes(transport, json.dumps(parts).encode())
    gathered = [Parts(*json.loads(one)) for one in said]
    everybody = [one.held for one in gathered]
    for ranks in sites:
        _check_trains_together(ranks, gathered)
    for ranks in sites[1:]:
        for first, rank in zip(sites[0], ranks, strict=True):
            for name, part in everybody[first].items():
                if everybody[rank].get(name) != part:
                    raise AttachError(
                        f"of parameter {name!r} rank {first} holds {part}, and rank "
                        f"{rank}, which has its place in another site, "
                        f"{everybody[rank].get(name)}; shard the model alike in every "
                        "site"
                    )
    site = next(ranks for ranks in sites if transport.rank in ranks)
    return {
        name: [p for p, rank in enumerate(site) if everybody[rank][name] == part]
        for name, part in parts.held.items()
    }


def _check_trains_together(site: Sequence[int], everybody: Sequence[Parts]) -> None:
    """Raise ``AttachError`` if some of a site neither average nor share with others."""
    reached, new = set[int](), {site[0]}
    while new:
        reached |= new
        new = {peer for rank in new for peer in everybody[rank].trains_with} - reached
    if apart := sorted(set(site) - reached):
        raise AttachError(
            f"the ranks {list(site)} are a site, and of these {sorted(reached)} do not "
            f"train together with {apart}: they share neither shards nor averages of "
            "gradients; shard over all dimensions inside of a site, "
            "fully_shard(model, mesh=mesh[...]), or name smaller sites in mesh"
        )


class Shares:
    """What a rank exchanges of the parts that others in its site hold, too.

    Args:
        site: its site.
        holders: by parameter name places in the site that hold the same part, this
            rank's among them.

    Attributes:
        any: whether there is something that several ranks hold.
    """

    def __init__(self, site: Site, holders: Mapping[str, Sequence[int]]) -> None:
        self._site = site
        self._holders = holders
        self.any = any(len(places) > 1 for places in holders.values())

    def slices_of(self, parameters: Mapping[str, Tensor]) -> dict[str, slice]:
        """Return which elements of parameters are this rank's, where not all it holds.

        Args:
            parameters: by name, whole or sharded.
        """
        held = {n: local(p) for n, p in parameters.items() if len(self._holders[n]) > 1}
        self._site.expect(2 * sum(tensor.nbytes for tensor in held.values()))
        return {
            n: self._slice_at(n, t.numel(), self._site.place) for n, t in held.items()
        }

    def _slice_at(self, name: str, numel: int, place: int) -> slice:
        holders = self._holders[name]
        at, count = holders.index(place), len(holders)
        return slice(at * numel // count, (at + 1) * numel // count)

    def together(self, wholes: Mapping[str, Tensor]) -> None:
        """Bring this rank's shares to the others, and theirs here; collective in site.

        Args:
            wholes: by name what this rank holds, [numel], flat: all but its own share
                is overwritten.
        """
        sizes = {name: flat.numel() for name, flat in wholes.items()}
        me = self._site.place
        mine = {n: flat[self._slice_at(n, sizes[n], me)] for n, flat in wholes.items()}
        for place, data in self._swapped(mine, lambda _: True):
            at = 0
            for name in self._with(wholes, place):
                view = wholes[name][self._slice_at(name, sizes[name], place)]
                at = _read(data, at, view)

    def from_first(self, wholes: Mapping[str, Tensor]) -> None:
        """Give all what the first holder of each part has; collective in the site."""
        me = self._site.place
        for place, data in self._swapped(wholes, lambda n: self._holders[n][0] == me):
            at = 0
            for name in self._with(wholes, place):
                if self._holders[name][0] == place:
                    at = _read(data, at, wholes[name])

    def check(self, wholes: Mapping[str, Tensor]) -> None:
        """Raise ``ReplicasDiffer`` if ranks differ in what they hold; collective."""
        everybody = self._site.everybody(checksums(wholes.values()))
        sums = [said.clone().view(torch.int64).tolist() for said in everybody]
        for index, name in enumerate(wholes):
            holders = self._holders[name]
            if len({sums[place][index] for place in holders}) > 1:
                ranks = [self._site.ranks[place] for place in holders]
                raise ReplicasDiffer(
                    f"parameter {name!r} differs between the ranks {ranks} of a site; "
                    "make the ranks of a site alike before attach, as "
                    "DistributedDataParallel does when it wraps"
                )

    def _with(self, names: Mapping[str, Tensor], place: int) -> list[str]:
        """Return the parameters of which another place holds the same part."""
        return [name for name in names if place in self._holders[name]]

    def _swapped(
        self, values: Mapping[str, Tensor], says: Callable[[str], bool]
    ) -> Iterator[tuple[int, Tensor]]:
        """Send others values of parts that they hold, too; yield what places sent."""
        me = self._site.place
        messages = []
        for place in range(self._site.size):
            names = [n for n in self._with(values, place) if says(n) and place != me]
            bytes_of = [values[name].view(torch.uint8).cpu() for name in names]
            messages.append(torch.cat([torch.empty(0, dtype=torch.uint8), *bytes_of]))
        for place, data in enumerate(self._site.swap(messages)):
            if place != me:
                yield place, data


def _read(data: Tensor, at: int, into: Tensor) -> int:
    """Copy bytes from ``at`` on into a flat tensor; return where they end."""
    end = at + into.nbytes
    into.copy_(data[at:end].clone().view(into.dtype))
    return end
