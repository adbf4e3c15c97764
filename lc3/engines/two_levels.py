"""Two levels: dense inside of a node or site, 3LC between them.

With G ranks in each of N nodes, the ranks of a node first average among themselves,
each its part (reduce-scatter). Then ranks of the same place in every node exchange
their part by 3LC, and all parts are handed round inside again (all-gather). A rank
sends 1/G of the gradient between nodes, so a node sends what one rank of a flat
exchange would. Nothing is coded twice, and slices, owners and residuals are those of
the plan for all ranks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lc3.config import Settings
from lc3.engines.direct import engine_for
from lc3.engines.exchange import NO_HALF_GRADS, Wire, widen
from lc3.errors import AttachError, PeerError
from lc3.meter import Meter
from lc3.plan import Piece, Plan, make_plan
from lc3.residual import Residuals
from lc3.transport.channel import Channel
from lc3.transport.protocol import Divisible, Transport
from lc3.wire.coder import Coder

Nodes = list[list[int]]  # the ranks of each node


def nodes_of(mesh: DeviceMesh | int, ranks: Sequence[int]) -> Nodes:
    """Return the ranks of every node.

    Args:
        mesh: ranks in a node, numbered as torchrun numbers them; or a mesh of two
            dimensions, between nodes and inside of them.
        ranks: the group's ranks, numbered as in the job.

    Returns:
        By node the ranks in the group, as many in each.

    Raises:
        AttachError: the group cannot be divided so.
    """
    world = len(ranks)
    if isinstance(mesh, int):
        if isinstance(mesh, bool) or mesh < 1 or world % mesh:
            raise AttachError(
                f"mesh={mesh!r}: {world} ranks cannot be divided into nodes of that "
                "many; give the number of ranks in every node, LOCAL_WORLD_SIZE under "
                "torchrun"
            )
        return [list(range(at, at + mesh)) for at in range(0, world, mesh)]
    if not hasattr(mesh, "mesh"):
        raise AttachError(
            f"mesh={mesh!r} must be the number of ranks in every node, or a DeviceMesh "
            "of two dimensions"
        )
    table = mesh.mesh.tolist()
    flat = mesh.mesh.flatten().tolist()
    if mesh.mesh.dim() != 2 or sorted(flat) != sorted(ranks):
        raise AttachError(
            f"mesh has the shape {list(mesh.mesh.shape)} and the ranks {table}; lc3 "
            f"needs two dimensions, between nodes and inside, over the ranks "
            f"{list(ranks)}"
        )
    return [[ranks.index(rank) for rank in node] for node in table]


class TwoLevels:
    """An ``Exchange`` that is dense inside of nodes, 3LC between them.

    What is rare (``pending``, ``pass_through``) goes over ``channel``, flat.

    Args:
        plan: the plan of all ranks.
        config: the same on every rank.
        transport: between all ranks.
        nodes: the ranks of each node.
        coder: the coder for the device of the gradients.
        meter: counts the bytes between nodes; mutated.

    Attributes:
        inside: the channel of this node; its ``meter`` counts what stays in it.
        between: the engine of this place.
    """

    def __init__(
        self,
        plan: Plan,
        config: Settings,
        transport: Divisible,
        nodes: Nodes,
        coder: Coder,
        meter: Meter,
    ) -> None:
        self.plan = plan
        self.config = config
        self.transport: Transport = transport
        self.meter = meter
        self.me = transport.rank
        self.owing: set[str] = set()
        self.residuals = Residuals(plan, self.me, coder.device)
        self._node = next(node for node in nodes if transport.rank in node)
        self._places = [list(place) for place in zip(*nodes, strict=True)]
        place = self._places[self._node.index(transport.rank)]
        nothing = make_plan([], len(self._node), Settings())
        within = transport.among(self._node)
        self.inside = Channel(within, Meter(), nothing.fingerprint)
        self.between = engine_for(
            plan,
            config,
            transport.among(place),
            coder,
            meter,
            owners=place,
            residuals=self.residuals,
        )
        self.messages, self.budget = self.between.messages, self.between.budget
        self.direct = self.between.direct
        self.channel = Channel(transport, meter, plan.fingerprint)

    def all_reduce(
        self,
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """See ``Exchange.all_reduce``: the 3LC mean over nodes of the nodes' means."""
        widen(grads, half_grads)
        parts = [self._part(grads, place) for place in self._places]
        mine = parts[self.inside.transport.rank]
        if not any(parts):
            self.meter.buckets += 1
            return
        try:
            with self._in_job(self._node):
                sent = [_cut(grads, part) for part in parts]
                with (
                    self.meter.stage("inside"),
                    self.inside.exchanging(0, step, bucket),
                ):
                    _paste(grads, mine, self.inside.mean_here(sent, step, bucket))
            with self._in_job(self.between.owners):
                self.between.all_reduce(grads, step, bucket)
            with self._in_job(self._node):
                with (
                    self.meter.stage("inside"),
                    self.inside.exchanging(0, step, bucket),
                ):
                    cut = _cut(grads, mine)
                    everybody = self.inside.all_gather_bytes(cut, step, bucket)
                for part, data in zip(parts, everybody, strict=True):
                    _paste(grads, part, data.clone().view(torch.float32))
        except BaseException as error:
            self.channel.failure = error
            for level in (self.inside, self.between.channel):
                level.tell(error, step, bucket)  # whichever does not know it yet
            raise

    def native_form(self, names: Collection[str], elements: int) -> Wire | None:  # noqa: ARG002  # the same for all
        """See ``Exchange.native_form``: with one node only there is nothing to code."""
        return "float32" if self.between.transport.world == 1 else None

    @property
    def senders(self) -> int:
        """See ``Exchange.senders``: one rank of each node."""
        return self.between.transport.world

    def keep_own_part(self) -> None:
        """Forget worker-side residuals of what other ranks of this node exchange."""
        mine = self._part(self.residuals.sent, self.between.owners)
        for name, sent in self.residuals.sent.items():
            kept = sent.clone()
            sent.zero_()
            for piece in mine:
                if piece.name == name:
                    sent[piece.start : piece.stop] = kept[piece.start : piece.stop]

    def close(self) -> None:
        """See ``Exchange.close``."""
        self.between.close()

    def _part(self, names: Mapping[str, Tensor], place: Sequence[int]) -> list[Piece]:
        return list(chain.from_iterable(self.plan.layout(names, place)))

    @contextmanager
    def _in_job(self, ranks: Sequence[int]) -> Iterator[None]:
        """Map the rank that failed to its global rank."""
        try:
            yield
        except PeerError as error:
            raise PeerError(ranks[error.rank], error.reason) from error


def _cut(values: Mapping[str, Tensor], part: Sequence[Piece]) -> Tensor:
    """Return the values of some pieces in a row, float32[*]."""
    cuts = [values[piece.name][piece.start : piece.stop] for piece in part]
    device = next(iter(values.values())).device
    return torch.cat([torch.empty(0, device=device, dtype=torch.float32), *cuts])


def _paste(values: Mapping[str, Tensor], part: Sequence[Piece], row: Tensor) -> None:
    """Undo ``_cut``."""
    cuts = torch.split(row, [piece.numel for piece in part])
    for piece, cut in zip(part, cuts, strict=True):
        values[piece.name][piece.start : piece.stop] = cut
