"""``save``, ``load``, ``unship`` and ``rows``: a state dict to a file and back."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor

from lc3.errors import ConfigError, InputError, StateError
from lc3.files import whole_file
from lc3.ship import centres, steps, weights
from lc3.ship.choose import Lossy, section_of
from lc3.ship.container import (
    Container,
    Writer,
    check_input,
    digest,
    host,
)
from lc3.ship.format import (
    BLOOMIER,
    CENTRES,
    PLANES,
    RELATIVE,
    TIED,
    Base,
    Entry,
    Reader,
)
from lc3.ship.rate import FINEST, float_values, is_sampled, step_for
from lc3.ship.steps import CODERS, LONGEST_AXIS, Coder

Named = Mapping[str, Tensor]
PathLike = str | os.PathLike[str]
Indices = Literal["exact", "bloomier"]
SUFFIX = ".lc3m"
RATE_WEIGHT = 0.05  # with bits; at 0.1 and one bit a value LeNets lose more points
_TRIES = 6
_MISJUDGED = 0.1  # of what was asked for

log = logging.getLogger("lc3")


class Row(NamedTuple):
    """What a file says of one tensor.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        shape: its dimensions.
        coding: how it is coded, in words.
        nbytes: of its elements.
        stored_bytes: of its section.
        step: the distance of two values; ``None``: it has no steps.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    coding: str
    nbytes: int
    stored_bytes: int
    step: float | None

    @property
    def bits(self) -> float:
        """How many bits an element takes."""
        return 8 * self.stored_bytes / max(1, self.numel)

    @property
    def numel(self) -> int:
        """How many elements the tensor has."""
        return self.nbytes // self.dtype.itemsize


def save(
    state: Named,
    path: PathLike,
    *,
    bits: float | None = None,
    error: float | None = None,
    step: float | None = None,
    lossless: bool = False,
    base: Named | PathLike | None = None,
    coder: Coder = "predictive",
    rate_weight: float | None = None,
    dither_seed: int | None = None,
    transform: bool = True,
    cluster: bool = True,
    spatial: Mapping[str, int] | None = None,
    indices: Indices = "exact",
    notes: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a state dict to a file that appears whole or not at all.

    Without ``bits``, ``error`` and ``step`` nothing is lost. With one of them floating
    tensors are quantized, weights (two dimensions and more) with one step for all of
    them; whole numbers, bools, and what is not finite stay exact.

    Args:
        state: tensors by name, of any device; strided, of a dtype that torch.save
            knows. Tensors that share their memory are stored once.
        path: of the file.
        bits: of the file for each value that may be quantized: the step is searched.
            Nothing is lost if that is enough for all.
        error: the largest absolute error of any value.
        step: the distance of two values of a weight.
        lossless: says that nothing may be lost, which is the default.
        base: what the receiver holds: a state dict, or a file. The file will only load
            with it.
        coder: of the numbers: ``"predictive"`` is smallest, ``"context"`` faster and
            larger where rows resemble each other, ``"zstd"`` fast.
        rate_weight: how much a bit of a weight counts, in squared steps. Above 0 a
            weight may get a number that is not the nearest one but costs fewer bits;
            its error may then be more than half a step. ``None``: 0.05 with ``bits``,
            else 0.
        dither_seed: for subtractive dither: the error is then independent of the
            weights. Each sender needs another one. ``None``: no dither.
        transform: whether the DCT is tried on kernels of convolutions.
        cluster: whether shared values are tried for vectors.
        spatial: by name, an axis that means a place, for the DCT: pixels, for example.
        indices: ``"bloomier"`` stores the positions of weights that are not zero as a
            filter, with false weights among the zeros (Weightless); with ``step``.
        notes: strings by name, kept as they are; what safetensors calls metadata.
        progress: called with how many bytes of tensors were written since the last.

    Returns:
        How many bytes the file has.

    Raises:
        ConfigError: an argument is out of range, or contradicts another one.
        InputError: a value of ``state`` is no tensor that a file can hold.
        OSError: the file cannot be written; an earlier one is as it was.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = mkdtemp() + "/model.lc3m"
        >>> save(model.state_dict(), path) == Path(path).stat().st_size
        True
        >>> model.load_state_dict(load(path))
        <All keys matched successfully>
    """
    asked = {"bits": bits, "error": error, "step": step}
    given = [name for name, value in asked.items() if value is not None]
    for name in state:
        check_input(name, state[name])
    _check_choices(given, asked, lossless, coder, indices, dither_seed, state, spatial)
    _check_weight(rate_weight, given, dither_seed)
    for key, value in (notes or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ConfigError(f"notes has {key!r}: {value!r}; both must be strings")
    if isinstance(base, str | os.PathLike) and _same_file(base, path):
        raise InputError(
            f"{path} is the base itself; the delta would take its place, and nothing "
            "could read it: write it to another file"
        )
    aliases = _aliases(state)
    lossy = None
    if given:
        lossy = Lossy(
            step=step or 1.0,
            coder=coder,
            dither_seed=dither_seed,
            transform=transform,
            cluster=cluster,
            spatial=spatial or {},
            filtered=indices == "bloomier",
            rate_weight=_weight(rate_weight, bits, dither_seed),
        )
    if lossy is not None and error is not None:
        lossy = replace(lossy, step=2 * error * (1 - 1e-6), largest_error=error)
    with opened_base(base) as (old, known), whole_file(path) as unfinished:
        written_of = state, aliases, old, known, dict(notes or {})
        job = _Job(*written_of, progress)
        if bits is None or lossy is None:
            return _write(unfinished.file, job, lossy)
        whole = bits * float_values(state) / 8
        written = _write(unfinished.file, _Job(*written_of, None), None)
        if written <= whole:  # nothing has to be lost
            return written
        target = whole - _index_bytes(job)
        sampled = is_sampled(state)
        for _ in range(_TRIES):
            step = step_for(state, old, target, lossy, sampled=sampled)
            lossy = replace(lossy, step=step)
            unfinished.file.seek(0)
            unfinished.file.truncate()
            written = _write(unfinished.file, job, lossy)
            if sampled and abs(written - whole) > _MISJUDGED * whole:
                sampled = False  # the rows that were looked at are not like the others
                continue
            if written <= whole:
                _say_if_far_below(written, whole, bits, step)
                return written
            target -= 1.1 * (written - whole)
        raise ConfigError(f"no step makes a file of at most {bits} bits a value")


def _say_if_far_below(written: int, whole: float, bits: float, step: float) -> None:
    if written < whole / 2 and step > FINEST:
        log.warning(
            "lc3: with bits=%g the file takes %.3g bits a value only, with a step of "
            "%.3g: some values are so much larger than others that no step is between; "
            "give step, error or lossless instead, or leave those values out",
            bits,
            bits * written / whole,
            step,
        )


class _Job(NamedTuple):
    """What is written, but for what may be lost."""

    state: Named
    aliases: Mapping[str, str]
    old: Named | None
    base: Base | None
    notes: Mapping[str, str]
    progress: Callable[[int], None] | None


def _check_choices(
    given: list[str],
    asked: Mapping[str, float | None],
    lossless: bool,
    coder: str,
    indices: str,
    dither_seed: int | None,
    state: Named,
    spatial: Mapping[str, int] | None,
) -> None:
    """Raise ``ConfigError`` for what is out of range, or contradicts something."""
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} both set the step; give one")
    for name in given:
        value = asked[name]
        if not isinstance(value, int | float) or not 1e-30 < value < 1e30:
            raise ConfigError(f"{name}={value!r} must be a number above 0, below 1e30")
    if lossless and given:
        raise ConfigError(f"lossless=True and {given[0]} contradict each other")
    if coder not in CODERS:
        raise ConfigError(f"coder={coder!r} must be one of {', '.join(CODERS)}")
    if coder != CODERS[-1] and not given:
        raise ConfigError(
            f"coder={coder!r} changes nothing where nothing is lost; say bits, error "
            "or step, too, or leave it out"
        )
    if indices not in ("exact", "bloomier"):
        raise ConfigError(f"indices={indices!r} must be 'exact' or 'bloomier'")
    if indices == "bloomier" and given != ["step"]:
        raise ConfigError("indices='bloomier' makes false weights; give a step with it")
    if dither_seed is not None:
        if not (isinstance(dither_seed, int) and 0 <= dither_seed < 1 << 64):
            raise ConfigError(f"dither_seed={dither_seed!r} is not from 0 to 2^64 - 1")
        if not given:
            raise ConfigError("dither_seed changes nothing where nothing is lost")
    for name, axis in (spatial or {}).items():
        is_axis = isinstance(axis, int) and name in state
        if not is_axis or not 0 <= axis < state[name].ndim:
            raise ConfigError(
                f"spatial names axis {axis} of {name!r}, which is not there"
            )
        if state[name].shape[axis] > LONGEST_AXIS:
            raise ConfigError(
                f"spatial names axis {axis} of {name!r}, which has "
                f"{state[name].shape[axis]} elements, more than {LONGEST_AXIS}; leave "
                "it out"
            )


def _check_weight(
    rate_weight: float | None, given: list[str], dither_seed: int | None
) -> None:
    """Raise ``ConfigError`` for a weight that is out of range, or of no use."""
    if rate_weight is None:
        return
    if not isinstance(rate_weight, int | float) or not 0 <= rate_weight <= 1:
        raise ConfigError(f"rate_weight={rate_weight!r} must be a number from 0 to 1")
    if rate_weight and given not in (["bits"], ["step"]):
        raise ConfigError(
            "rate_weight gives some weights a larger error than the nearest number "
            "has; give bits or step with it"
        )
    if rate_weight and dither_seed is not None:
        raise ConfigError("rate_weight would make the error depend on the weights")


def _weight(
    rate_weight: float | None, bits: float | None, dither_seed: int | None
) -> float:
    """Return the weight of a bit that a file is written with."""
    if rate_weight is not None:
        return float(rate_weight)
    return RATE_WEIGHT if bits is not None and dither_seed is None else 0.0


def _aliases(state: Named) -> dict[str, str]:
    """Return which names share the memory of earlier ones, and whose."""
    if isinstance(state, weights.Lazy):
        return {}
    seen: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in state.items():
        if tensor.numel():
            where = (tensor.device, tensor.data_ptr())
            bits = tensor.dtype, tensor.is_conj(), tensor.is_neg()
            key = (*where, *bits, tensor.shape, tensor.stride())
            first = seen.setdefault(key, name)
            if first != name:
                found[name] = first
    return found


def _same_file(one: PathLike, other: PathLike) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:  # one of them is not there
        return False


def _index_bytes(job: _Job) -> int:
    """Return about how many bytes of a file are no sections."""
    names = sum(len(name.encode()) + 16 for name in job.state)
    notes = sum(len(k.encode()) + len(v.encode()) + 4 for k, v in job.notes.items())
    return 40 + names + notes + (40 + len(job.base.name) if job.base else 0)


def _write(file: BinaryIO, job: _Job, lossy: Lossy | None) -> int:
    """Write the whole file; return its bytes."""
    writer = Writer(file, job.base, job.notes)
    for name in job.state:
        if name in job.aliases:
            writer.tie(name, job.aliases[name])
            continue
        tensor = host(job.state[name])
        old = _like(job.old, name, tensor)
        writer.add(name, tensor, section_of(name, tensor, old, lossy))
        if job.progress is not None:
            job.progress(tensor.nbytes)
        del tensor, old  # before the next is read
    return writer.finish()


def _like(base: Named | None, name: str, tensor: Tensor) -> Tensor | None:
    """Return the base's tensor, if it has one like this."""
    old = base.get(name) if base is not None else None
    if old is None or (old.dtype, old.shape) != (tensor.dtype, tensor.shape):
        return None
    return host(old)


@contextmanager
def opened_base(
    base: Named | PathLike | None,
) -> Iterator[tuple[Named | None, Base | None]]:
    """Give the tensors of a base, and what a file says of it."""
    if base is None:
        yield None, None
    elif isinstance(base, Mapping):
        for name in base:
            check_input(name, base[name])
        yield base, Base(digest(base), "a state dict")
    else:
        path = Path(base)
        with opened(path) as tensors:
            if not isinstance(tensors, weights.Lazy):  # those are of formats of tensors
                for name in tensors:
                    check_input(name, tensors[name])
            yield tensors, Base(digest(tensors), path.name)


@contextmanager
def opened(path: Path) -> Iterator[Named]:
    """Give the tensors of a file of weights, or of a shipped model that stands alone.

    Raises:
        FormatError, InputError, StateError, OSError: as ``weights.opened``; or the
            shipped model is a delta itself.
    """
    if path.suffix != SUFFIX:
        with weights.opened(path) as found:
            yield found
        return
    with Container(path) as file:
        if file.index.base is not None:
            raise StateError(
                f"{path} is a delta to {file.index.base.name!r} itself; unship it with "
                "that first"
            )
        names = [entry.name for entry in file.index.entries]
        yield weights.Lazy(names, file.tensor, file.index.notes)


def load(
    path: PathLike,
    *,
    base: Named | PathLike | None = None,
    names: Iterable[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the state dict of a file, on the CPU.

    Tensors that shared their memory share it again.

    Args:
        path: of the file.
        base: what a delta is relative to: a state dict, or a file.
        names: of the tensors that are wanted; nothing else is read. ``None``: all.
        progress: called with how many bytes of tensors were read since the last.

    Raises:
        FormatError: the file is damaged, cut off or of another kind.
        StateError: it is a delta, and the base is missing or another one.
        KeyError: there is no tensor of such a name.
        ConfigError: ``names`` is a string.
        OSError: it cannot be read.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = mkdtemp() + "/model.lc3m"
        >>> _ = save({"w": torch.tensor([1.0, -2.0])}, path)
        >>> load(path, names=["w"])
        {'w': tensor([ 1., -2.])}
    """
    if isinstance(names, str):
        raise ConfigError(f"names={names!r} is one name; give a list of them")
    with Container(Path(path)) as file, opened_base(base) as (old, known):
        check_base(file, known)
        wanted = (
            [entry.name for entry in file.index.entries] if names is None else names
        )
        found: dict[str, Tensor] = {}
        stored: dict[str, Tensor] = {}
        for name in wanted:
            if name not in file.places:
                raise KeyError(f"{path} has no tensor {name!r}")
            source = file.stored(name).name
            if source not in stored:
                stored[source] = file.tensor(source, old)
                if progress is not None:
                    progress(stored[source].nbytes)
            found[name] = stored[source]
        return found


def check_base(file: Container, known: Base | None) -> None:
    """Raise ``StateError`` unless a base is the one that a file is relative to."""
    needed = file.index.base
    if needed is None:
        if known is not None:
            raise StateError(
                f"{file.path} stands alone; load it without the base {known.name!r}"
            )
        return
    said = f"{file.path} is a delta to {needed.name!r} (SHA-256 {needed.digest.hex()})"
    if known is None:
        raise StateError(f"{said}; give it as base")
    if known.digest != needed.digest:
        raise StateError(
            f"{said}, but the base given, {known.name!r}, is {known.digest.hex()}"
        )


def unship(
    path: PathLike,
    target: PathLike,
    *,
    base: Named | PathLike | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the tensors of a file as ``.safetensors``, or as a file of torch.

    Args:
        path: of the file.
        target: of the new one, which appears whole or not at all.
        base: what a delta is relative to.
        progress: called with how many bytes of tensors were written since the last.

    Raises:
        FormatError, StateError, OSError: as ``load``.
        InputError: the target's suffix, or a dtype in safetensors, is not known.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = mkdtemp() + "/model.lc3m"
        >>> _ = save(model.state_dict(), path)
        >>> unship(path, path + ".pt")
        >>> sorted(torch.load(path + ".pt", weights_only=True))
        ['bias', 'weight']
    """
    with Container(Path(path)) as file, opened_base(base) as (old, known):
        check_base(file, known)
        entries = file.index.entries

        def read(name: str) -> Tensor:
            tensor = file.tensor(name, old)
            if progress is not None:
                progress(tensor.nbytes)
            return tensor

        weights.write(
            Path(target),
            {entry.name: (entry.dtype, entry.shape) for entry in entries},
            read,
            file.index.notes,
            {e.name: entries[e.start].name for e in entries if e.coding == TIED},
        )


def rows(path: PathLike) -> list[Row]:
    """Return what a file says of its tensors; none of them is decoded.

    Raises:
        FormatError: the file, or a section, is damaged.
        OSError: it cannot be read.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = mkdtemp() + "/model.lc3m"
        >>> _ = save(model.state_dict(), path, step=0.01)
        >>> [(row.name, row.shape) for row in rows(path)]
        [('weight', (2, 8)), ('bias', (2,))]
    """
    with Container(Path(path)) as file:
        return [_row(file, entry) for entry in file.index.entries]


def _row(file: Container, entry: Entry) -> Row:
    step, words = None, "exact"
    plain = entry.coding & ~RELATIVE
    if plain == TIED:
        words = f"tied to {file.index.entries[entry.start].name}"
    elif plain != PLANES:
        reader = Reader(file.section(entry), f"the section of {entry.name!r}")
        if plain == CENTRES:
            words = f"{centres.read_centres(reader).size} centres"
        elif plain == BLOOMIER:
            words = "Bloomier filter"
        else:
            how = steps.read_steps(reader)
            step = how.step
            words = f"steps, {how.coder}" + ", DCT" * bool(how.transform)
            words += ", dither" * (how.seed is not None)
    if entry.coding & RELATIVE:
        words += ", delta"
    return Row(
        *(entry.name, entry.dtype, entry.shape, words),
        *(entry.nbytes, entry.length, step),
    )
