"""Result files: CSV rows that say which code, versions and machine they come from."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import lc3

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, object]


@cache
def provenance() -> dict[str, str]:
    """Return the columns that every row of every result file ends with."""
    return {
        "commit": _commit(),
        "lc3": lc3.__version__,
        **{name: version(name) for name in ("torch", "numpy", "numba")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
    }


def _commit() -> str:
    """Return the commit, marked when files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=RESULTS.parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write ``rows`` with their provenance; the file appears whole or not at all.

    Raises:
        ValueError: there is no row, or rows differ in their columns.
    """
    if not rows:
        raise ValueError(f"no rows to write to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *provenance()], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            if row.keys() != rows[0].keys():
                raise ValueError(f"columns {list(row)} differ from {list(rows[0])}")
            writer.writerow({**row, **provenance()})
    unfinished.replace(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a result file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
