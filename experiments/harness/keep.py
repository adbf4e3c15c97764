"""Keeps the rows of experiments with those of their task: one result file for each.

    python -m experiments.harness.keep experiments/results/local/chars-long/results.csv

adds them to ``experiments/results/chars.csv`` as the experiment ``chars-long``, in
place of rows of that name. Columns say of every row what its method is. Of a folder
instead of a file, what has ended so far is added. With ``--add`` rows of trainings that
the new ones do not repeat stay.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.average import AVERAGED
from experiments.harness.methods import columns
from experiments.record import (
    EXPERIMENT,
    RESULTS,
    ResultError,
    provenance,
    read_csv,
    read_whole,
    write_csv,
)
from experiments.tables import COLUMNS, Row


def together(
    old: Sequence[Row], new: Sequence[Row], experiment: str, *, add: bool = False
) -> list[dict[str, object]]:
    """Return ``old`` rows with ``new`` ones as those of ``experiment``.

    Args:
        old: of a task, with their experiments.
        new: of one experiment.
        experiment: its name; rows of ``old`` that have it are left out.
        add: leave out only those of trainings that are among the new ones.
    """
    again = {_training(row) for row in new}
    rows: list[dict[str, object]] = [
        {**row}
        for row in old
        if row[EXPERIMENT] != experiment or (add and _training(row) not in again)
    ]
    for row in new:
        fields = columns(row["method"].removesuffix(AVERAGED))
        rows.append({EXPERIMENT: experiment, **row, **fields, **row})
    names = dict.fromkeys([*(name for row in rows for name in row), *provenance()])
    for name in provenance():  # at the end
        names[name] = names.pop(name)
    return [{name: row.get(name, "") for name in names} for row in rows]


def _training(row: Row) -> tuple[str, ...]:
    return row["method"], row["seed"], row.get("rate", "")


def _files(path: Path) -> list[Path]:
    """Return the result files that a path stands for."""
    if not path.is_dir():
        return [path]
    found = [f for f in path.glob("*.csv") if f.stem not in ("results", "running")]
    if not found:
        raise ResultError(f"{path} has no training that has ended")
    return sorted(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Add the rows of files to those of their tasks."""
    parser = argparse.ArgumentParser(
        prog="experiments.harness.keep", description=__doc__
    )
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        help="files of experiments.harness.train, or files or folders of .run",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="a file per task")
    parser.add_argument("--add", action="store_true", help="to trainings of the name")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    for path in options.results:
        experiment = path.parent.name if path.stem == "results" else path.stem
        try:
            new = [row for file in _files(path) for row in read_csv(file, COLUMNS)]
            out = options.out / f"{new[0]['task']}.csv"
            old = read_whole(out) if out.exists() else []
            write_csv(out, together(old, new, experiment, add=options.add))
        except ResultError as error:
            parser.error(str(error))
        console.print(f"{len(new)} rows of {experiment} are in {out}")


if __name__ == "__main__":
    main()
