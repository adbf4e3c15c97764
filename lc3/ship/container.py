"""Writing and reading the container: one tensor at a time, by name, checked by CRC."""

import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lc3.errors import FormatError, InputError, StateError
from lc3.ship import bloomier, centres, planes, steps
from lc3.ship.choose import Section
from lc3.ship.format import (
    BLOOMIER,
    CENTRES,
    DTYPES,
    HEADER,
    LARGEST_DIMENSION,
    MOST_DIMENSIONS,
    PLANES,
    RELATIVE,
    TIED,
    TRAILER,
    Base,
    Entry,
    Index,
    description,
    header,
    index_bytes,
    read_index,
    read_trailer,
    trailer,
)


class Writer:
    """Writes one file, from its header on.

    Args:
        file: to write to, at its beginning.
        base: what the file is relative to; ``None``: it stands alone.
        notes: what safetensors calls metadata.
    """

    def __init__(
        self, file: BinaryIO, base: Base | None, notes: Mapping[str, str]
    ) -> None:
        self._file = file
        self._index = Index([], base, dict(notes))
        self._head = header(base is not None)
        self._places: dict[str, int] = {}
        self.at = file.write(self._head)

    def add(self, name: str, tensor: Tensor, section: Section) -> Entry:
        """Write the section of one tensor; return its entry."""
        shape = tuple(tensor.shape)
        data, crc = section.data, zlib.crc32(section.data)
        entry = Entry(
            name, tensor.dtype, shape, section.coding, self.at, len(data), crc
        )
        self._file.write(data)
        self.at += len(data)
        self._note(entry)
        return entry

    def tie(self, name: str, other: str) -> Entry:
        """Say that a tensor shares its memory with another one that was written."""
        place = self._places[other]
        like = self._index.entries[place]
        entry = Entry(name, like.dtype, like.shape, TIED, place)
        self._note(entry)
        return entry

    def _note(self, entry: Entry) -> None:
        self._places[entry.name] = len(self._index.entries)
        self._index.entries.append(entry)

    def finish(self) -> int:
        """Write index and trailer; return how many bytes the file has."""
        data = index_bytes(self._index)
        self._file.write(data)
        self._file.write(trailer(self._head, data, self.at))
        return self.at + len(data) + TRAILER.size


class Container:
    """An open file: its index, and each tensor when it is asked for.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        index: what it holds.
        file_bytes: how large it is.

    Raises:
        FormatError: it is no whole file of container format 1.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            kind = "no regular file" if path.exists() else "not there"
            raise FileNotFoundError(f"{path} is {kind}")
        self._file = path.open("rb")
        try:
            self.file_bytes = os.fstat(self._file.fileno()).st_size
            self.index = self._read_index()
        except BaseException:
            self._file.close()
            raise
        self.places = {entry.name: i for i, entry in enumerate(self.index.entries)}

    def _read_index(self) -> Index:
        head = self._file.read(HEADER.size)
        self._file.seek(max(0, self.file_bytes - TRAILER.size))
        tail = self._file.read(TRAILER.size)
        try:
            start, length, crc = read_trailer(tail, self.file_bytes)
            self._file.seek(start)
            return read_index(head, self._file.read(length), start, crc)
        except FormatError as error:
            raise FormatError(f"{self._file.name}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def stored(self, name: str) -> Entry:
        """Return the entry that stores a tensor: its own, or the one it is tied to.

        Raises:
            KeyError: there is no such tensor.
        """
        entry = self.index.entries[self.places[name]]
        return self.index.entries[entry.start] if entry.coding == TIED else entry

    def section(self, entry: Entry) -> bytes:
        """Return the bytes of a section that was written.

        Raises:
            FormatError: they are not those that the index says.
        """
        self._file.seek(entry.start)
        data = self._file.read(entry.length)
        if len(data) != entry.length or zlib.crc32(data) != entry.crc:
            raise FormatError(
                f"the section of {entry.name!r} in {self.path} is damaged; fetch the "
                "file again"
            )
        return data

    def tensor(self, name: str, base: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return one tensor; nothing else of the file is read.

        Args:
            name: of the tensor.
            base: tensors that a delta is relative to; the caller has checked them.

        Raises:
            KeyError: there is no such tensor.
            FormatError: its section is damaged.
        """
        entry = self.stored(name)
        old = None
        if entry.coding & RELATIVE:
            if base is None:
                raise StateError(
                    f"{self.path} is a delta to {self._base_name()}; give it as base"
                )
            old = comparable(base, entry)
        return decoded(self.section(entry), entry, old)

    def _base_name(self) -> str:
        return repr(self.index.base.name) if self.index.base else "nothing"


def comparable(base: Mapping[str, Tensor], entry: Entry) -> Tensor:
    """Return the tensor of a base that an entry is relative to.

    Raises:
        StateError: the base has none like it.
    """
    old = base.get(entry.name)
    if old is None or (old.dtype, tuple(old.shape)) != (entry.dtype, entry.shape):
        raise StateError(
            f"the base has no tensor {entry.name!r} of {entry.dtype} and the shape "
            f"{list(entry.shape)}"
        )
    return host(old)


def decoded(data: bytes, entry: Entry, base: Tensor | None) -> Tensor:
    """Return the tensor of a section.

    Args:
        data: the section.
        entry: that the index has for it.
        base: of the same dtype and shape, if the section is relative.

    Raises:
        FormatError: the section is not one of such a tensor.
    """
    coding = entry.coding & ~RELATIVE
    if coding == PLANES:
        return planes.decode(data, entry.dtype, entry.shape, base)
    if not entry.dtype.is_floating_point:
        raise FormatError(f"{entry.name!r} is of {entry.dtype}, and must be exact")
    if coding == CENTRES:
        values = centres.decode(data, entry.shape, entry.numel)
    elif coding == BLOOMIER:
        values = bloomier.decode(data, entry.shape, entry.numel)
    else:
        values = steps.decode(data, entry.shape)
    if base is not None:
        values = base.float() + values
    return values.to(entry.dtype)


def host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, contiguous, without its history."""
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def check_input(name: str, value: object) -> None:
    """Raise ``InputError`` unless a value is a tensor that a file can hold."""
    if not isinstance(name, str):
        raise InputError(f"a tensor is named {name!r}; names must be strings")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name!r} is no name that UTF-8 has; rename it") from error
    if not isinstance(value, Tensor):
        hint = (
            "ship the state_dict in it"
            if isinstance(value, Mapping)
            else "leave it out"
        )
        raise InputError(f"{name!r} is of {type(value).__name__}, not a tensor; {hint}")
    if is_lazy(value):
        raise InputError(f"{name!r} has no shape yet; run the model once before")
    kind = type(value)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise InputError(
            f"{name!r} is a {kind.__name__}, which says itself what its values are; "
            "make it a plain tensor first: full_tensor() of a DTensor, dequantize()"
        )
    if value.is_nested:
        raise InputError(f"{name!r} is a nested tensor; ship its parts by themselves")
    if value.layout != torch.strided or value.dtype not in DTYPES or value.is_meta:
        raise InputError(
            f"{name!r} is of {value.dtype} and {value.layout} on {value.device}, which "
            "container format 1 cannot hold; convert it first"
        )
    if value.ndim > MOST_DIMENSIONS or max(value.shape, default=0) >= LARGEST_DIMENSION:
        raise InputError(f"{name!r} has the shape {list(value.shape)}, beyond format 1")


def digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the SHA-256 of tensors, as container format 1 names a base: 32 bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors, key=str.encode):
        tensor = host(tensors[name])
        found.update(description(name, tensor.dtype, tuple(tensor.shape)))
        found.update(planes.bytes_of(tensor).data)
    return found.digest()
