"""What every rank says of itself before local steps are exchanged.

One small round, so that all ranks treat this exchange alike: whose moves count, from
where they are counted, and which buffers come along.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lc3.errors import FormatError, ReplicasDiffer

_HEAD = struct.Struct("<BId")


@dataclass(frozen=True)
class Says:
    """What one rank says.

    Attributes:
        finite: whether what it has moved is.
        written: whether something else than an optimizer wrote to its parameters.
        far: whether that brought them far away.
        base: a checksum of what they held then; 0 if nothing was written.
        weight: weight of its moves in the mean.
        buffers_finite: whether its changed buffers are.
        buffers: for each of its float buffers, in order, whether it has changed.
    """

    finite: bool = True
    written: bool = False
    far: bool = False
    base: int = 0
    weight: float = 1.0
    buffers_finite: bool = True
    buffers: tuple[bool, ...] = ()

    def to_bytes(self) -> Tensor:
        """Return uint8[*]."""
        bits = [self.finite, self.written, self.far, self.buffers_finite]
        flags = sum(bit << i for i, bit in enumerate(bits))
        head = _HEAD.pack(flags, self.base, self.weight)
        packed = np.packbits(np.array(self.buffers, dtype=bool))
        return torch.frombuffer(bytearray(head + packed.tobytes()), dtype=torch.uint8)

    @classmethod
    def from_bytes(cls, data: Tensor, buffers: int) -> Self:
        """Return what a rank with as many buffers has said.

        Raises:
            FormatError: it is of another length, or the rank weighs less than nothing,
                or no finite number.
        """
        raw = data.clone().numpy()
        if raw.size != _HEAD.size + (buffers + 7) // 8:  # before there is room for it
            raise FormatError(
                f"a rank says {raw.size} bytes of itself and of {buffers} buffers"
            )
        bits, base, weight = _HEAD.unpack(raw[: _HEAD.size].tobytes())
        if not 0 <= weight < math.inf:
            raise FormatError(f"a rank says that it weighs {weight}")
        unpacked = np.unpackbits(raw[_HEAD.size :], count=buffers)
        finite, written, far, buffers_finite = (bool(bits >> i & 1) for i in range(4))
        changed = tuple(map(bool, unpacked))
        return cls(finite, written, far, base, weight, buffers_finite, changed)


def of_site(mine: Says, everybody: Sequence[Says]) -> Says:
    """Return what a site says, whose ranks have each said something of their shard."""
    bases = [said.base for said in everybody]
    written = any(said.written for said in everybody)
    return replace(
        mine,
        finite=all(said.finite for said in everybody),
        written=written,
        far=any(said.far for said in everybody),
        base=zlib.crc32(repr(bases).encode()) if written else 0,
        weight=sum(said.weight for said in everybody),
        buffers_finite=all(said.buffers_finite for said in everybody),
    )


def share_of(mine: Says, everybody: Sequence[Says]) -> float:
    """Return what a rank's moves are multiplied by, so that their mean is weighted.

    Of ranks that are finite; 1 where all weigh the same, or nobody anything.
    """
    weights = [said.weight for said in everybody if said.finite]
    total = sum(weights)
    return mine.weight * len(weights) / total if total else 1.0


def loaded_alike(everybody: Sequence[Says]) -> bool:
    """Return whether all ranks were given the same parameters.

    What some ranks only were given, or each its own, counts as what they have moved: a
    script may clamp weights after every step.

    Raises:
        ReplicasDiffer: it is too far for that.
    """
    bases = {said.base for said in everybody}
    if len(bases) == 1 and all(said.written for said in everybody):
        return True
    if far := [rank for rank, said in enumerate(everybody) if said.far]:
        raise ReplicasDiffer(
            f"parameters of the ranks {far} were written outside of optimizer.step(), "
            "and are far from what the ranks shared, and not the same on all ranks; "
            "load weights on every rank, or on one and call state.rebase() on all"
        )
    return False
