"""Weights in files of other formats, read tensor by tensor and written whole.

``.safetensors``, alone or in shards that an index lists, ``.pt``, ``.pth`` and
``.bin`` of ``torch.save`` without running their code, and shipped models themselves.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lc3.checkpoint import save_checkpoint
from lc3.errors import FormatError, InputError, StateError
from lc3.files import whole_file
from lc3.ship.planes import bytes_of

TORCH = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".safetensors.index.json", *TORCH)
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for.

    Args:
        names: of the tensors.
        read: returns one.
        notes: what safetensors calls metadata.
    """

    def __init__(
        self,
        names: list[str],
        read: Callable[[str], Tensor],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._read = read
        self.notes = dict(notes or {})

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        """Return the names, in the order of the file."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._names)


@contextmanager
def opened(path: Path) -> Iterator[Mapping[str, Tensor]]:
    """Give the tensors of a file for as long as the block runs.

    Raises:
        FormatError: a safetensors file, or the index of one, is damaged.
        InputError: the suffix is of no kind that is known, or the file of ``torch``
            holds no mapping of names to tensors.
        StateError: the file of ``torch`` is damaged, or holds more than tensors.
        OSError: it cannot be read.
    """
    if not path.is_file():
        kind = "no regular file" if path.exists() else "not there"
        raise FileNotFoundError(f"{path} is {kind}")
    with ExitStack() as stack:
        if path.name.endswith(".safetensors.index.json"):
            yield _sharded(path, stack)
        elif path.suffix == ".safetensors":
            yield _safetensors(path, stack)
        elif path.suffix in TORCH:
            yield _of_torch(path)
        else:
            raise InputError(
                f"{path} is of no kind that lc3 ships: {', '.join(SUFFIXES)}"
            )


def _safetensors(path: Path, stack: ExitStack) -> Lazy:
    library = safetensors()
    _check_name(path)
    try:
        file = stack.enter_context(library.safe_open(path, framework="pt"))
        return Lazy(list(file.keys()), file.get_tensor, file.metadata())
    except library.SafetensorError as error:
        raise FormatError(f"{path} is no whole safetensors file: {error}") from error


def _sharded(path: Path, stack: ExitStack) -> Lazy:
    try:
        where = json.loads(path.read_text())["weight_map"]
        if not where or not all(isinstance(part, str) for part in where.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{path} is no index of shards: it has no weight_map of names to files"
        ) from error
    shards = {}
    for part in dict.fromkeys(where.values()):
        if Path(part).name != part:
            raise FormatError(f"{path} names the shard {part!r}, which is no file name")
        if not path.with_name(part).is_file():
            raise FileNotFoundError(f"{path} lists {part}, which is not beside it")
        shards[part] = _safetensors(path.with_name(part), stack)
    for name, part in where.items():
        if name not in shards[part]:
            raise FormatError(f"{path} says that {part} has {name!r}; it does not")
    notes = {key: value for one in shards.values() for key, value in one.notes.items()}
    return Lazy(list(where), lambda name: shards[where[name]][name], notes)


def _check_name(path: Path) -> None:
    """Raise ``InputError`` if libraries that want UTF-8 cannot open a file."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path!r} is no name that UTF-8 has; rename the file"
        ) from error


def _of_torch(path: Path) -> Mapping[str, Tensor]:
    _check_name(path)
    with path.open("rb") as file:  # what cannot be read is an OSError here
        file.read(1)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise StateError(
            f"{path} cannot be read without running code of it, is cut off or older "
            f"than zip files ({type(error).__name__}); save a state_dict() with "
            "torch.save"
        ) from error
    if not isinstance(found, Mapping):
        raise InputError(
            f"{path} holds a {type(found).__name__}, not the names and tensors of a "
            "state_dict()"
        )
    return found


def safetensors() -> Any:
    """Return the library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import safetensors
    except ImportError as error:
        raise InputError(
            "safetensors files need the package safetensors: pip install "
            "'torch-lc3[ship]'"
        ) from error
    return safetensors


def check_target(path: Path) -> None:
    """Raise ``InputError`` unless ``write`` knows a file of this name."""
    if path.suffix not in (".safetensors", *TORCH):
        raise InputError(
            f"{path} must end in .safetensors or {', '.join(TORCH)}; what is in it is "
            "told from that"
        )


def write(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    notes: Mapping[str, str],
    aliases: Mapping[str, str],
) -> None:
    """Write tensors to a file that appears whole or not at all.

    Safetensors are written one after the other, so that memory holds one at a time.

    Args:
        path: ends in ``.safetensors``, or in a suffix of torch.
        shapes: dtype and shape by name.
        read: returns one tensor.
        notes: for safetensors, its metadata.
        aliases: names that share the memory of others, in a file of torch; safetensors
            has them twice.

    Raises:
        InputError: the suffix is another one, or a dtype that safetensors has not.
        OSError: it cannot be written.
    """
    check_target(path)
    if path.suffix != ".safetensors":
        state: dict[str, Tensor] = {}
        for name in shapes:
            state[name] = state[aliases[name]] if name in aliases else read(name)
        save_checkpoint(state, path)
        return
    head: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    at = 0
    for name, (dtype, shape) in shapes.items():
        if name == "__metadata__":
            raise InputError(
                f"{name!r} is no name of a tensor in safetensors; rename it, or write "
                "a file of torch"
            )
        if dtype not in _NAMES:
            raise InputError(f"{name!r} is of {dtype}, which safetensors has not")
        end = at + math.prod(shape) * dtype.itemsize
        head[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as unfinished:
        unfinished.file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            tensor = read(aliases.get(name, name)).contiguous()
            unfinished.file.write(bytes_of(tensor).data)
