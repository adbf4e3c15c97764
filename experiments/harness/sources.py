"""A text of one pass: the Python sources of packages that constraints.txt pins.

    python -m experiments.harness.sources

prints what is installed, as ``sources.toml`` lists it. Every byte is fixed by the
versions: a package whose files are others is refused. Packages are trained on, or
tested on, as a whole.
"""

import hashlib
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LIST = Path(__file__).with_name("sources.toml")
TRAIN = ("torch", "sympy", "scipy", "numpy", "scikit-learn", "numba")
TEST = ("networkx",)
# What a build writes about itself.
_OF_THE_BUILD = {"version.py", "_version.py", "__config__.py"}


class SourcesError(Exception):
    """A package that is missing, or is another one than the list says."""


def files(package: str) -> list[Path]:
    """Return the Python files of an installed package, in the order of their names.

    Raises:
        SourcesError: it is not installed.
    """
    try:
        found = distribution(package)
    except PackageNotFoundError as error:
        raise SourcesError(
            f"{package} is not installed; pip install -c constraints.txt {package}"
        ) from error
    listed = sorted(
        str(path)
        for path in found.files or ()
        if path.suffix == ".py" and path.name not in _OF_THE_BUILD
    )
    return [Path(str(found.locate_file(path))) for path in listed]


def text_of(package: str) -> bytes:
    """Return a package's files, one after the other."""
    return b"\n".join(path.read_bytes() for path in files(package))


def described(package: str) -> dict[str, object]:
    """Return the line of the list that is true of what is installed."""
    data = text_of(package)
    return {
        "version": distribution(package).version.partition("+")[0],
        "files": len(files(package)),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def load(packages: Sequence[str]) -> NDArray[np.uint8]:
    """Return the bytes of some packages, in this order.

    Raises:
        SourcesError: one is missing, or its bytes are not those of the list.
    """
    known = tomllib.loads(LIST.read_text())
    parts = []
    for package in packages:
        data = text_of(package)
        expected = known[package]
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise SourcesError(
                f"{package}'s sources are {len(data):,} bytes of version "
                f"{distribution(package).version}, not the {expected['bytes']:,} of "
                f"{expected['version']} that {LIST.name} lists; pip install "
                f"--force-reinstall -c constraints.txt {package}"
            )
        parts.append(np.frombuffer(data, np.uint8))
    return np.concatenate(parts)


def main() -> None:
    """Print the list."""
    for package in (*TRAIN, *TEST):
        print(f"[{package}]")
        for key, value in described(package).items():
            print(
                f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
            )
        print()


if __name__ == "__main__":
    main()
