"""Result files: CSV rows that say which code, versions and machine they come from."""

import csv
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import lc3

RESULTS = Path(__file__).parent / "results"
EXPERIMENT = "experiment"  # the column that tells experiments of one task apart
Row = Mapping[str, object]


class ResultError(ValueError):
    """A result file that cannot be read or written, and why."""


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


def stamped(rows: Sequence[Row], card: str = "") -> list[dict[str, object]]:
    """Return ``rows``, each ending with the provenance of this process.

    Args:
        rows: rows of a result file.
        card: the accelerator that computed, if one did.
    """
    known = provenance()
    if card:
        known = {**known, "machine": f"{known['machine']}, {card}"}
    return [{**row, **known} for row in rows]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write ``rows``; the file appears whole or not at all, an older one stays.

    Raises:
        ResultError: there is no row, rows differ in their columns, or the disk is full.
    """
    if not rows:
        raise ResultError(f"no rows to write to {path}")
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ResultError(f"columns {list(row)} differ from {list(rows[0])}")
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ResultError(
            f"{path} could not be written ({error}); make room or name another place; "
            "what was there before is as it was"
        ) from error


def read_whole(path: Path) -> list[dict[str, str]]:
    """Return all rows of a result file, of whatever experiments.

    Raises:
        ResultError: there is no such file, or it is no result file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ResultError(f"{path} is not a result file ({error})") from error
    if not rows or any(None in row or None in row.values() for row in rows):
        raise ResultError(f"{path} is empty, or was cut off; run it again")
    return rows


def named(path: Path) -> tuple[Path, str]:
    """Return a result file and the experiment in it that ``chars.csv:chars-long`` is.

    Of ``chars.csv`` alone the experiment is called like the file.
    """
    file, _, experiment = path.name.partition(":")
    return path.with_name(file), experiment or Path(file).stem


def read_csv(path: Path, columns: Collection[str] = ()) -> list[dict[str, str]]:
    """Return the rows of one experiment, with the columns that it recorded.

    Args:
        path: path of a result file, or ``chars.csv:chars-long``: an experiment of those
            that one file keeps (``experiments.harness.keep``).
        columns: columns that the caller needs.

    Raises:
        ResultError: there is no such file or experiment, it is no result file, or it is
            one of another version, which has not all of ``columns``.
    """
    file, experiment = named(path)
    rows = read_whole(file)
    if EXPERIMENT in rows[0]:
        names = list(dict.fromkeys(row[EXPERIMENT] for row in rows))
        rows = [row for row in rows if row[EXPERIMENT] == experiment]
        if not rows:
            raise ResultError(
                f"{file} has no experiment {experiment!r}; it holds "
                f"{', '.join(names)}: write {file.name}:{names[0]}"
            )
        recorded = [n for n in rows[0] if n != EXPERIMENT and any(r[n] for r in rows)]
        rows = [{name: row[name] for name in recorded} for row in rows]
    if missing := sorted(set(columns) - set(rows[0])):
        raise ResultError(
            f"{path} has no column {missing[0]!r}: it is of lc3 "
            f"{rows[0].get('lc3', 'unknown')}, this is {lc3.__version__}; run it again"
        )
    return rows
