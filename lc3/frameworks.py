"""Which versions of other frameworks lc3 knows how to use."""

import re

from lc3.errors import AttachError


def require(package: str, found: str, least: str) -> None:
    """Raise ``AttachError`` if a package is older than what lc3 knows how to use."""
    if _numbers(found) < _numbers(least):
        raise AttachError(
            f"lc3 needs {package} {least} or newer, {found} is installed; "
            f"pip install '{package}>={least}'"
        )


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"[0-9]+", version.partition("+")[0])[:3]]
