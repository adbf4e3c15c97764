"""A file that appears whole or not at all; an earlier one stays until then."""

import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class Unfinished:
    """A file that is being written beside the one it will replace.

    Attributes:
        path: where it is for now.
        file: to write to.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Unfinished]:
    """Give a file to write, which takes ``path``'s place when the block ends well.

    It is on the disk before it does. A crash, a kill or a full disk on the way leaves
    an earlier file as it was.

    Raises:
        OSError: it cannot be written.
    """
    whole = Path(path)
    if not whole.parent.is_dir():
        reason = "no such folder, make it first"
        raise FileNotFoundError(errno.ENOENT, reason, str(whole.parent))
    _remove_left_overs(whole)
    name = f".{whole.name}.{host()}.{os.getpid()}.{secrets.token_hex(4)}"
    part = whole.with_name(name)
    try:
        with part.open("xb") as file:  # nobody else's, and no link
            yield Unfinished(part, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(whole)
    finally:
        part.unlink(missing_ok=True)


def host() -> str:
    """Return this machine's name, as unfinished files carry it."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def _remove_left_overs(whole: Path) -> None:
    """Remove what processes of this machine have left that were killed."""
    for path in whole.parent.glob(f".{whole.name}.{host()}.*.*"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and _is_dead(int(pid)):
            path.unlink(missing_ok=True)


def _is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
