"""How kernels are compiled, and where their machine code is kept.

Numba keeps an index and numbered files of code, and writes the index first. When the
ranks of a node start together after an upgrade of Numba or of lc3, one of them can find
the new index beside old code. Here each file's name says all that its code depends on,
and there is no index: what is found under a name is the right code.
"""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from types import CodeType
from typing import Any, Literal, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("lc3")

# A Numba without these keeps its own way.
_Disk: Any = getattr(caching, "IndexDataCacheFile", None)
_NumbasCache: Any = getattr(caching, "FunctionCache", object)
_NUMBA_IS_KNOWN = (
    hasattr(_Disk, "_load_data")
    and hasattr(_Disk, "_save_data")
    and hasattr(_NumbasCache, "save_overload")
)

_LIBRARIES = "numba", "llvmlite", "numpy", "math"  # of the version that Numba wants

FILES_KEPT = 16  # of one kernel: one for each choice of types, and versions before


def kernel(inline: Literal["never", "always"] = "never") -> Callable[[F], F]:
    """Compile a function at its first call, without the GIL, cached on disk if it can.

    What it reads from its module is a number, an array, a kernel or an instruction.

    Args:
        inline: whether it becomes part of each kernel that calls it.
    """

    def compiled(function: F) -> F:
        try:
            made: Any = njit(nogil=True, cache=True, inline=inline)(function)
        except RuntimeError:  # neither beside the file nor in the user's cache
            _say_uncached()
            return cast(F, njit(nogil=True, inline=inline)(function))
        if _NUMBA_IS_KNOWN and hasattr(made, "_cache"):  # not NUMBA_DISABLE_JIT
            made._cache = _Cache(made)
        return cast(F, made)

    return compiled


@cache
def _say_uncached() -> None:
    log.warning(
        "lc3: machine code cannot be cached, so every start compiles for some seconds; "
        "set NUMBA_CACHE_DIR to a folder that can be written"
    )


class _Cache(_NumbasCache):  # type: ignore[misc]
    """Numba's cache of a kernel, with other files. A full disk only costs time."""

    def __init__(self, made: Any) -> None:
        super().__init__(made.py_func)
        self._cache_file = _Files(made, self.cache_path)

    def save_overload(self, sig: object, data: object) -> None:
        """Keep one kernel of one choice of types, if the disk lets us."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _say_not_kept(str(error))


@cache
def _say_not_kept(why: str) -> None:
    log.warning(
        "lc3: machine code could not be kept (%s), so the next start compiles again; "
        "make room, or set NUMBA_CACHE_DIR to a folder that can be written",
        why,
    )


class _Files:
    """The machine code of one kernel, a file for each of Numba's keys.

    A key is the types of the arguments, the processor and the kernel's byte code.
    """

    def __init__(self, made: Any, folder: str) -> None:
        self._made = made
        function = made.py_func
        self._prefix = f"{function.__module__}.{function.__qualname__}-"
        self._folder = Path(folder)
        self._disk = _Disk(folder, self._prefix, None)

    def load(self, key: object) -> object | None:
        """Return what was saved, or None: nothing yet, or it is damaged."""
        try:
            return cast(object, self._disk._load_data(self._name(key)))
        except OSError:
            return None
        except Exception as error:  # noqa: BLE001  # whatever unpickling runs into
            log.warning(
                "lc3: %s is damaged and compiled anew: %r",
                self._folder / self._name(key),
                error,
            )
            return None

    def save(self, key: object, data: object) -> None:
        """Write one file, whole or not at all, and remove the oldest of many."""
        self._disk._save_data(self._name(key), data)
        for old in self._newest_first()[FILES_KEPT:]:
            old.unlink(missing_ok=True)

    def flush(self) -> None:
        """Remove all files of the kernel."""
        for file in self._newest_first():
            file.unlink(missing_ok=True)

    def _newest_first(self) -> list[Path]:
        files = self._folder.glob(f"{self._prefix}*.nbc")
        return sorted(files, key=_written, reverse=True)

    def _name(self, key: object) -> str:
        tools = f"{numba.__version__} {sys.implementation.cache_tag}"
        every = f"{tools}\n{key!r}\n{self._sources}"
        return f"{self._prefix}{hashlib.sha256(every.encode()).hexdigest()[:32]}.nbc"

    @cached_property
    def _sources(self) -> str:  # read at the first call, when all kernels are there
        return "\n".join(_made_of(self._made))


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0


def _made_of(made: Any) -> Iterator[str]:
    """Yield what a kernel is compiled of: code as it was imported, options, constants.

    Numba's key has the byte code of the kernel alone, without the numbers in it and
    without the kernels that it calls. Files may be newer than what was imported.
    """
    todo: list[Any] = [made]
    seen = set()
    while todo:
        part = todo.pop()
        yield repr(getattr(part, "targetoptions", None))  # a kernel's
        function = getattr(part, "__wrapped__", part)  # a kernel's or an instruction's
        if function in seen:
            continue
        seen.add(function)
        yield from _said_by(function.__code__)
        for name in sorted(_names(function.__code__)):
            value = function.__globals__.get(name)
            if hasattr(value, "__code__") or hasattr(value, "__wrapped__"):
                if getattr(value, "__module__", "").partition(".")[0] not in _LIBRARIES:
                    todo.append(value)
            elif isinstance(value, np.ndarray):
                yield f"{name} {value.dtype} {value.shape} {_digest(value.tobytes())}"
            elif isinstance(value, int | float | np.generic | ir.Type):
                yield f"{name} {value!r}"


def _said_by(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _said_by(constant)
        else:
            yield repr(constant)


def _names(code: CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
