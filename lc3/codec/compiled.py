"""How kernels are compiled, and where their machine code is kept.

Numba keeps an index and numbered files of code, and writes the index first. When the
ranks of a node start together after an upgrade of Numba or of lc3, one of them can find
the new index beside old code. Here each file's name says all that its code depends on,
and there is no index: what is found under a name is the right code.
"""

import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from types import CodeType
from typing import Any, Literal, TypeVar, cast

import numba
import numpy as np
from numba import njit
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("lc3")

# It reads a file, and writes one in one piece. A Numba without keeps its own way.
_Disk: Any = getattr(caching, "IndexDataCacheFile", None)
_NUMBA_IS_KNOWN = hasattr(_Disk, "_load_data") and hasattr(_Disk, "_save_data")

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
        if _NUMBA_IS_KNOWN and isinstance(made._cache._cache_file, _Disk):
            made._cache._cache_file = _Files(function, made._cache.cache_path)
        return cast(F, made)

    return compiled


@cache
def _say_uncached() -> None:
    log.warning(
        "lc3: machine code cannot be cached, so every start compiles for some seconds; "
        "set NUMBA_CACHE_DIR to a folder that can be written"
    )


class _Files:
    """The machine code of one kernel, a file for each of Numba's keys.

    A key is the types of the arguments, the processor and the kernel's byte code.
    """

    def __init__(self, function: Callable[..., Any], folder: str) -> None:
        self._function = function
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
        return "\n".join(_made_of(self._function))


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0


def _made_of(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the digests of the modules a kernel is made of, and of what it reads.

    Numba looks at the kernel's own file only, not at those of kernels that it calls.
    """
    todo: list[Any] = [function]
    seen = set()
    modules = {__name__}
    while todo:
        part = todo.pop()
        if part in seen:
            continue
        seen.add(part)
        modules.add(part.__module__)
        for name in sorted(_names(part.__code__)):
            value = part.__globals__.get(name)
            value = getattr(value, "__wrapped__", value)  # a kernel's or instruction's
            if hasattr(value, "__code__"):
                todo.append(value)
            elif isinstance(value, np.ndarray):
                yield f"{name} {value.dtype} {value.shape} {_digest(value.tobytes())}"
            elif isinstance(value, int | float | np.generic):
                yield f"{name} {value!r}"
    for module in sorted(modules):  # in a file, or in an archive of them
        yield _digest(inspect.getsource(sys.modules[module]).encode())


def _names(code: CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
