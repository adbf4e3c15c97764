"""The ranks of one site, which hold one model between them, and the sites of a job.

Inside of a site the model is whatever people use: shards of FSDP2, replicas of DDP, or
one process. Each rank exchanges its own share with the ranks of the other sites that
have the same one, and a site of G ranks has G streams. What a site says, it says
as one: a shard that is not finite leaves out the whole site, not that shard.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lc3 import private
from lc3.errors import AttachError, PeerError
from lc3.local.says import Says, of_site
from lc3.meter import Meter
from lc3.transport.channel import Channel
from lc3.transport.group import GroupTransport

_CPU = torch.device("cpu")


class Site:
    """The ranks that hold one model, this one among them.

    Args:
        transport: exchange between them.
        ranks: ranks of the site, in the job.

    Attributes:
        place: number of this rank in the site.
        size: number of ranks in the site.
        ranks: see above.
    """

    def __init__(self, transport: GroupTransport, ranks: Sequence[int]) -> None:
        self.place, self.size = transport.rank, transport.world
        self._transport = transport
        self._channel = Channel(transport, Meter(), 0)
        self.ranks = ranks

    def agree(self, mine: Says) -> Says:
        """Return what the site says, the same on each of its ranks; collective in it.

        Buffers are each rank's own affair.
        """
        count = len(mine.buffers)
        said = self.everybody(mine.to_bytes())
        return of_site(mine, [Says.from_bytes(one, count) for one in said])

    def expect(self, most_bytes: int) -> None:
        """Let messages be longer by so many bytes."""
        self._transport.most_bytes += most_bytes

    def everybody(self, data: Tensor) -> list[Tensor]:
        """Return each rank's tensor as uint8[*], by place; collective in the site."""
        with self._telling() as at:
            return self._channel.all_gather_bytes(data, *at)

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send each place its own; return what came, uint8[*]; collective in it."""
        with self._telling() as at:
            return self._channel.all_to_all_bytes(parts, *at)

    def any_rank(self, mine: Sequence[bool]) -> list[bool]:
        """Return where some rank of the site says yes; collective in it."""
        with self._telling() as at:
            return self._channel.any_rank(mine, *at)

    def confirm(self) -> None:
        """Wait until the others have come as far; collective in the site.

        Raises:
            PeerError: one of them has failed, and said so.
        """
        self.any_rank([])

    @contextmanager
    def _telling(self) -> Iterator[tuple[int, int]]:
        """Lend a tag; ranks that fail are numbered as the job does."""
        at = self._channel.aside()
        try:
            with self._channel.telling_others(*at):
                yield at
        except PeerError as error:
            raise PeerError(self.ranks[error.rank], error.reason) from error

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Let the others of the site know if this rank fails in the block."""
        try:
            yield
        except BaseException as error:
            self._channel.tell(error, *self._channel.aside())
            raise

    def leave(self) -> None:
        """Leave the group that was made for it."""
        self._transport.leave(destroy=True)


def ranks_of_sites(mesh: DeviceMesh | int) -> list[list[int]]:
    """Return the ranks of each site.

    Args:
        mesh: its first dimension is between sites, the others are inside of them; or
            ranks in a site, numbered as torchrun numbers them.

    Raises:
        AttachError: the mesh has one dimension, or not all ranks of the job.
    """
    world = dist.get_world_size()
    if isinstance(mesh, int) and not isinstance(mesh, bool) and mesh > 0:
        if world % mesh == 0:
            return [list(range(at, at + mesh)) for at in range(0, world, mesh)]
        raise AttachError(
            f"mesh={mesh!r}: {world} ranks cannot be divided into sites of that many; "
            "give the number of ranks in every site"
        )
    if not isinstance(mesh, DeviceMesh):
        raise AttachError(
            f"mesh={mesh!r} must be a DeviceMesh of two dimensions, between sites and "
            "inside of them: init_device_mesh(device, (sites, ranks_per_site)); or the "
            "number of ranks in every site"
        )
    if mesh.ndim < 2 or mesh.size() != world:
        raise AttachError(
            f"the mesh has the shape {tuple(mesh.shape)}, the job "
            f"{world} ranks; lc3 needs a mesh of two dimensions, "
            "between sites and inside of them, of all ranks"
        )
    sites: list[list[int]] = mesh.mesh.flatten(1).tolist()
    return sites


class Sites(NamedTuple):
    """Place of this rank among the sites of a job.

    Attributes:
        between: exchange with the ranks that hold the same shard.
        peers: these ranks, in the job.
        site: its own.
    """

    between: GroupTransport
    peers: Sequence[int]
    site: Site

    @property
    def shard(self) -> str:
        """Which shard this rank holds, in words."""
        return f"shard {self.site.place} of {self.site.size}"

    def leave(self) -> None:
        """Leave the groups that were made for it."""
        self.between.leave(destroy=True)
        self.site.leave()


def group_of(
    teams: Sequence[Sequence[int]], what: str
) -> tuple[GroupTransport, Sequence[int]]:
    """Return an exchange in this rank's team, and the team; collective over all ranks.

    Args:
        teams: ranks of the job, each in one team.
        what: the purpose of the group.
    """
    world = dist.group.WORLD
    assert isinstance(world, dist.ProcessGroup)
    timeout = private.timeout_of(world)
    for ranks in teams:  # groups are made by everybody
        group = dist.new_group(
            list(ranks), timeout, "gloo", group_desc=what, sort_ranks=False
        )
        if dist.get_rank() in ranks:
            assert isinstance(group, dist.ProcessGroup)
            own, mine = group, ranks
    return GroupTransport(own, _CPU), mine


def peers_of(mesh: DeviceMesh | int) -> tuple[GroupTransport, Sequence[int]]:
    """Return an exchange with the ranks that hold the same shard, and these ranks.

    Raises:
        AttachError: see ``ranks_of_sites``.
    """
    return group_of(list(zip(*ranks_of_sites(mesh), strict=True)), "lc3")


def sites_of(mesh: DeviceMesh | int) -> Sites:
    """Return this rank's place among the sites; collective over all ranks."""
    between, peers = peers_of(mesh)
    return Sites(between, peers, Site(*group_of(ranks_of_sites(mesh), "lc3 inside")))
