"""Which slice of which parameter goes to which rank, and which parameters stay raw."""

import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from types import MappingProxyType

from lc3.config import Settings
from lc3.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements ``start`` to ``stop`` of one flattened parameter: one owner."""

    name: str
    start: int
    stop: int
    owner: int
    coded: bool
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of one flattened parameter: one scale if coded.

    Attributes:
        offset: its first element in its slice.
    """

    name: str
    start: int
    stop: int
    offset: int
    coded: bool
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", self.stop - self.start)


Layout = tuple[tuple[Piece, ...], ...]  # of a bucket, by who gets the pieces
_MOST_LAYOUTS = 1024  # that are remembered


@dataclass(frozen=True)
class Plan:
    """The division of labour, made once from names, shapes, world and ``Settings``.

    It knows nothing of buckets, so that results do not depend on them. The rules are in
    ``lc3.format``.

    Attributes:
        world: number of ranks.
        block: elements under one scale, or ``None``.
        numel: elements by parameter name, in the order of the parameter list.
        position: place in that list by parameter name.
        coded: names of the parameters that are coded; the others travel raw.
        slices: slices by parameter name; empty for a parameter without elements.
        fingerprint: 32 bits that every message carries.
        extras: names of what is no parameter and travels raw with them.
    """

    world: int
    block: int | None
    numel: dict[str, int]
    position: dict[str, int]
    coded: frozenset[str]
    slices: dict[str, tuple[Slice, ...]]
    fingerprint: int
    extras: frozenset[str] = frozenset()
    _layouts: dict[tuple[tuple[str, ...], tuple[int, ...], bool], Layout] = field(
        default_factory=dict, compare=False, repr=False
    )

    def slices_of(self, names: Collection[str], owner: int) -> Iterator[Slice]:
        """Yield the slices of ``names`` that ``owner`` owns, in plan order."""
        for name in sorted(names, key=self.position.__getitem__):
            for slice_ in self.slices[name]:
                if slice_.owner == owner:
                    yield slice_

    def pieces_of(self, names: Collection[str], owner: int) -> Iterator[Piece]:
        """Yield the pieces of ``names`` that ``owner`` owns, in plan order."""
        for slice_ in self.slices_of(names, owner):
            step = self.block if slice_.coded and self.block else slice_.numel
            for start in range(slice_.start, slice_.stop, step):
                stop = min(start + step, slice_.stop)
                offset = start - slice_.start
                yield Piece(slice_.name, start, stop, offset, slice_.coded)

    def layout(
        self, names: Iterable[str], owners: Iterable[int], *, merged: bool = False
    ) -> Layout:
        """Return the pieces of some parameters by owner, in plan order.

        Remembered, since buckets come again in every step.

        Args:
            names: parameter names; those without elements have no piece.
            owners: the owners whose pieces are returned.
            merged: whether to return one list of all of them, in the parameters' order.
        """
        key = tuple(names), tuple(owners), merged
        if (found := self._layouts.get(key)) is not None:
            return found
        some = [name for name in key[0] if self.numel[name]]
        lists = [tuple(self.pieces_of(some, owner)) for owner in key[1]]
        if merged:
            place = self.position
            everything = chain.from_iterable(lists)
            order = sorted(everything, key=lambda p: (place[p.name], p.start))
            lists = [tuple(order)]
        if len(self._layouts) == _MOST_LAYOUTS:
            self._layouts.clear()
        found = self._layouts[key] = tuple(lists)
        return found


def make_plan(
    shapes: Sequence[tuple[str, Sequence[int]]],
    world: int,
    config: Settings,
    extras: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Return the plan for parameters ``shapes``, an ordered list of (name, shape).

    Args:
        shapes: shapes of the parameters.
        world: number of ranks.
        config: settings of what is coded.
        extras: elements, by name, of what is no parameter and travels raw with them.

    Raises:
        ConfigError: a pattern of ``config.exclude`` or ``config.include`` matches no
            name, or one name is matched by both.
    """
    numel = {name: math.prod(shape) for name, shape in shapes}
    ndim = {name: len(shape) for name, shape in shapes}
    forced_raw = _matching(config.exclude, "exclude", numel)
    forced_coded = _matching(config.include, "include", numel)
    if both := sorted(forced_raw & forced_coded):
        raise ConfigError(
            f"{both[0]!r} is matched by exclude and by include; narrow one of them"
        )

    def is_coded(name: str) -> bool:
        if name in forced_raw or name in forced_coded:
            return name in forced_coded
        return numel[name] >= config.min_numel and ndim[name] >= config.min_ndim

    coded = frozenset(name for name in numel if is_coded(name))
    numel |= extras
    slices: dict[str, tuple[Slice, ...]] = {}
    dealt = {True: 0, False: 0}  # of coded and raw ones, which often alternate
    for name, n in numel.items():
        kind = name in coded
        cuts = list(_cut(n, world, config.min_shard))
        slices[name] = tuple(
            Slice(name, start, stop, (dealt[kind] + index) % world, kind)
            for index, (start, stop) in enumerate(cuts)
        )
        dealt[kind] += len(cuts)
    lines = [
        "lc3 plan 2",
        f"world {world}",
        f"block {config.block_size or 0}",
        f"min_numel {config.min_numel}",
        f"min_share {config.min_shard}",
        *(
            f"{'coded' if name in coded else 'raw'} {n} {name}"
            for name, n in numel.items()
        ),
    ]
    fingerprint = zlib.crc32("".join(f"{line}\n" for line in lines).encode())
    position = {name: index for index, name in enumerate(numel)}
    return Plan(
        world,
        config.block_size,
        numel,
        position,
        coded,
        slices,
        fingerprint,
        frozenset(extras),
    )


def _cut(n: int, world: int, min_shard: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the nearly equal slices of ``n`` elements."""
    count = min(world, -(-n // min_shard))
    start = 0
    for index in range(count):
        stop = start + n // count + (index < n % count)
        yield start, stop
        start = stop


def _matching(patterns: Iterable[str], knob: str, names: Collection[str]) -> set[str]:
    found = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ConfigError(
                f"{knob} pattern {pattern!r} matches no trainable parameter; the first "
                f"names are {', '.join(list(names)[:5])}"
            )
        found |= matches
    return found
