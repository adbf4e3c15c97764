"""What ranks say when they meet, and whom they go on from.

Where machines come and go, whoever meets for an exchange may have missed some: it has
joined, was late, or did not hear that the last one went well. Each exchange that
succeeds is an entry of a history. The ranks that are furthest go on; others give what
they have moved, and get the model from one of these.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lc3.errors import FormatError, Lc3Error
from lc3.local.says import Says

KEPT = 64  # entries of a history that ranks tell each other
_HEAD = struct.Struct("<8sqIIQB?HHH")


@dataclass(frozen=True)
class Present:
    """What one rank says of itself.

    Attributes:
        name: for logs: the replica's, as torchft has it.
        address: ``host:port`` where others may get the model from it.
        config: digest of all that must be alike.
        exchanges: that its model has seen; -1: it has only just begun.
        held: a checksum of the model that it holds since the last of these.
        history: their last entries, at most ``KEPT``.
        nonce: a number that it has never said before.
        wants: whether it would take an optimizer's state along, too.
        says: of what it has moved.
    """

    name: str
    address: str
    config: bytes
    exchanges: int
    held: int
    history: tuple[int, ...]
    nonce: int
    wants: bool
    says: Says

    def to_bytes(self) -> Tensor:
        """Return uint8[*]."""
        texts = [self.name.encode(), self.address.encode()]
        says = self.says.to_bytes().numpy().tobytes()
        recent = self.history[-KEPT:]
        buffers = len(self.says.buffers)
        head = _HEAD.pack(
            *(self.config, self.exchanges, self.held, buffers, self.nonce),
            *(len(recent), self.wants, *map(len, texts), len(says)),
        )
        entries = struct.pack(f"<{len(recent)}Q", *recent)
        data = b"".join([head, *texts, entries, says])
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @classmethod
    def from_bytes(cls, data: Tensor) -> Self:
        """Return what a rank has said.

        Raises:
            FormatError: it is none of this.
        """
        raw = data.clone().numpy().tobytes()
        try:
            config, exchanges, held, buffers, nonce, *rest = _HEAD.unpack_from(raw)
            count, wants, name, address, says = rest
            at = _HEAD.size
            texts = []
            for size in (name, address):
                texts.append(raw[at : at + size].decode())
                at += size
            history = struct.unpack_from(f"<{count}Q", raw, at)
            at += 8 * count
            if len(raw) != at + says or not says or exchanges < -1:
                raise FormatError("another length")
            told = Says.from_bytes(data[at:], buffers)
        except (struct.error, ValueError, FormatError) as error:
            raise FormatError(
                f"{len(raw)} bytes are not what a rank says when it comes ({error})"
            ) from error
        return cls(
            *(*texts, config, exchanges, held, history, nonce, wants, told),
        )


@dataclass(frozen=True)
class Meeting:
    """Who exchanges now, from which model.

    Attributes:
        present: what each member says, by its rank among all that have come.
        members: ranks among all that have come, in order.
        lead: the member that others go on from.
        behind: members whose model is another.
        strangers: ranks that came with another configuration.
        unheard: why nobody can read what a rank says, by rank.
        entry: the entry that this exchange will be in the history.
    """

    present: Mapping[int, Present]
    members: Sequence[int]
    lead: int
    behind: Sequence[int]
    strangers: Sequence[int]
    unheard: Mapping[int, str]
    entry: int

    @property
    def begins(self) -> bool:
        """Whether nobody has exchanged anything yet."""
        return self.present[self.lead].exchanges < 0


def meet(said: Sequence[Tensor | Lc3Error]) -> Meeting:
    """Return who exchanges, the same on every rank that has heard the same.

    Those agree on a configuration that some rank has exchanged most with; among equals
    the most ranks, then the lowest. Likewise whose model is gone on from.

    Args:
        said: what each rank has sent, uint8[*], or why it cannot be read.

    Raises:
        FormatError: nobody can be understood.
    """
    present: dict[int, Present] = {}
    unheard: dict[int, str] = {}
    for rank, data in enumerate(said):
        try:
            if isinstance(data, Lc3Error):
                raise data
            present[rank] = Present.from_bytes(data)
        except Lc3Error as error:
            unheard[rank] = str(error)
    if not present:
        raise FormatError(f"nobody can be understood: {unheard}")

    def first(of: Mapping[int, object]) -> int:
        """Return the rank that the others with the same go with."""
        furthest: dict[object, int] = {}
        for rank, value in of.items():
            furthest[value] = max(furthest.get(value, -1), present[rank].exchanges)
        alike = Counter(of.values())
        return min(of, key=lambda r: (-furthest[of[r]], -alike[of[r]], r))

    some = present[first({r: p.config for r, p in present.items()})].config
    members = {r: p for r, p in present.items() if p.config == some}
    models = {r: _model(p) for r, p in members.items()}
    lead = first(models)
    digest = hashlib.sha256()
    for rank, one in members.items():
        digest.update(struct.pack("<I", rank) + one.to_bytes().numpy().tobytes())
    return Meeting(
        present,
        list(members),
        lead,
        [rank for rank, model in models.items() if model != models[lead]],
        [rank for rank in present if rank not in members],
        unheard,
        int.from_bytes(digest.digest()[:8], "little"),
    )


def _model(one: Present) -> tuple[int, int, int]:
    """Return what tells a model from another."""
    return one.exchanges, one.history[-1] if one.history else 0, one.held
