"""Which side of an exchange this process is: one rank, or a site of several as one.

What the ranks of a site do between them stands here: they say one thing, fail
together, and bring together what each has written of what they hold alike.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lc3.checkpoint import from_bytes, to_bytes
from lc3.config import Settings
from lc3.errors import PeerError, StateError
from lc3.local.held import Shares, check_whole, inside_of
from lc3.local.says import Says
from lc3.local.site import Sites
from lc3.module.link import keep_apart, link_of
from lc3.module.model import Model
from lc3.module.steps import Written
from lc3.session.groups import alone, nobody, world_group
from lc3.session.session import Session, session_beside

Trained = Sequence[tuple[str, Tensor]]
State = dict[str, Any]  # what a rank keeps


class PushAndPull(Protocol):
    """Exchanges with the other sides; runs on the lane."""

    def __call__(self, mine: Says, written: Written) -> Tensor:
        """Return the mean of the buffers that have changed."""


class OneRank:
    """A side of one rank, which has nobody to agree with.

    Args:
        group: that its session uses. Default: one that it makes.

    Attributes:
        shard: what is held here, in the name of what is saved; empty: the model.
    """

    shard = ""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def check(self, model: nn.Module) -> None:
        """Raise ``AttachError`` where a model is not one that is held here."""
        check_whole(model)
        _, wrapper = inside_of(model)
        if wrapper is not None:
            link_of(wrapper)

    def apart(self, wrapper: DistributedDataParallel | None) -> ExitStack:
        """Keep DDP from averaging over the ranks, until the result is closed."""
        ending = ExitStack()
        if wrapper is not None:
            ending.enter_context(wrapper.no_sync())
            ending.callback(keep_apart(wrapper).close)
        return ending

    def session_of(
        self, trained: Trained, settings: Settings, facts: dict[str, object]
    ) -> Session:
        """Return the connection to the other sides."""
        if alone():
            return Session(list(trained), settings, *nobody(), facts=facts)
        return session_beside(
            list(trained), settings, world_group(), self._group, facts=facts
        )

    def connect(self, session: Session, tell: Callable[[BaseException], None]) -> None:
        """Use the lane of a session; ``tell`` lets the other sides know of an error."""
        self._session, self._tell = session, tell

    def slices_of(self, parameters: Mapping[str, Tensor]) -> dict[str, slice]:  # noqa: ARG002  # all
        """Return which elements this rank exchanges, of those it does not all of."""
        return {}

    @property
    def rank(self) -> int:
        """Number of this rank in the job."""
        return self._session.engine.transport.rank

    def check_alike(self, model: Model) -> None:
        """Raise ``ReplicasDiffer`` where ranks hold the same, and it differs."""

    def exchange(
        self,
        push_and_pull: PushAndPull,
        mine: Says,
        written: Written,
        replica: Mapping[str, Tensor],  # noqa: ARG002  # what is written is known
        names: Collection[str],  # noqa: ARG002
    ) -> Tensor:
        """Return what ``push_and_pull`` does; runs on the lane.

        Args:
            push_and_pull: see there.
            mine: what this rank says.
            written: what was written to its parameters.
            replica: of all parameters, by name.
            names: of those that are exchanged.
        """
        return push_and_pull(mine, written)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Let all ranks of the side fail if this one fails in the block."""
        yield

    def any_rank(self, mine: Sequence[bool]) -> list[bool]:
        """Return where some rank of the side says yes."""
        return list(mine)

    def together(self, model: Model) -> None:
        """Let ranks that hold the same have all that each of them has written.

        The model is marked: training goes on from what it holds then.
        """
        model.mark()

    def from_first(self, model: Model) -> None:
        """Let ranks that hold the same have what the first of them has."""

    def gathered(self, states: list[State]) -> list[State]:
        """Return what all ranks keep, on the first one.

        Args:
            states: of all sides, on the first one; elsewhere none.
        """
        return states

    def mine_of(self, states: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """Return those of all ranks' states that are of this shard."""
        return states


class InSite(OneRank):
    """A rank of a site of several.

    Args:
        sites: this one, and the ranks of others with the same shard.
        shares: which part each rank exchanges of what several hold.
    """

    def __init__(self, sites: Sites, shares: Shares) -> None:
        super().__init__()
        self._sites, self._site, self._shares = sites, sites.site, shares
        self.shard = sites.shard

    def check(self, model: nn.Module) -> None:
        """See ``OneRank.check``: a shard of it is."""

    def apart(self, wrapper: DistributedDataParallel | None) -> ExitStack:  # noqa: ARG002  # as it is
        """See ``OneRank.apart``: inside of a site DDP averages."""
        return ExitStack()

    def session_of(
        self, trained: Trained, settings: Settings, facts: dict[str, object]
    ) -> Session:
        """See ``OneRank.session_of``."""
        return Session(
            *(list(trained), settings, self._sites.between, self._sites.leave),
            ranks=self._sites.peers,
            facts=facts,
        )

    def slices_of(self, parameters: Mapping[str, Tensor]) -> dict[str, slice]:
        """See ``OneRank.slices_of``."""
        return self._shares.slices_of(parameters)

    @property
    def rank(self) -> int:
        """See ``OneRank.rank``."""
        return dist.get_rank()

    def check_alike(self, model: Model) -> None:
        """See ``OneRank.check_alike``."""
        self._shares.check(model.wholes())

    def exchange(
        self,
        push_and_pull: PushAndPull,
        mine: Says,
        written: Written,
        replica: Mapping[str, Tensor],
        names: Collection[str],
    ) -> Tensor:
        """See ``OneRank.exchange``: as one with its site."""
        site = self._site
        with self._telling_sites():
            mine = site.agree(mine)
        with site.telling(), self._telling_sites():
            if mine.written and not written.base:  # another shard was
                base = {name: replica[name].clone() for name in names}
                written = replace(written, base=base)
            try:
                averaged = push_and_pull(mine, written)
            except PeerError as error:  # numbered as the job does
                rank = self._sites.peers[error.rank]
                raise PeerError(rank, error.reason) from error
        with self._telling_sites():
            site.confirm()
        return averaged

    @contextmanager
    def heard(self) -> Iterator[None]:
        """See ``OneRank.heard``."""
        with self._site.telling():
            yield
        with self._telling_sites():
            self._session.lane.call(self._site.confirm)

    def any_rank(self, mine: Sequence[bool]) -> list[bool]:
        """See ``OneRank.any_rank``."""
        return self._session.lane.call(partial(self._site.any_rank, mine))

    def together(self, model: Model) -> None:
        """See ``OneRank.together``."""
        if self._shares.any:
            bring = partial(self._shares.together, model.wholes())
            with self._telling_sites():
                self._session.lane.call(bring)
        model.mark()

    def from_first(self, model: Model) -> None:
        """See ``OneRank.from_first``."""
        bring = partial(self._shares.from_first, model.wholes())
        self._session.lane.call(bring)

    def gathered(self, states: list[State]) -> list[State]:
        """See ``OneRank.gathered``."""
        site, call = self._site, self._session.lane.call
        data = to_bytes({"sites": states})  # this shard's, in the first site
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

    def mine_of(self, states: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """See ``OneRank.mine_of``.

        Raises:
            StateError: they are not of sites as large as this one.
        """
        size = self._site.size
        if len(states) % size:
            raise StateError(
                f"the states of {len(states)} ranks are not of sites of {size}; give "
                "each site as many ranks as it had"
            )
        return states[self._site.place :: size]

    @contextmanager
    def _telling_sites(self) -> Iterator[None]:
        """Tell the other sites if this one has failed."""
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise
