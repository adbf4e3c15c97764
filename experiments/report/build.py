"""Prints the table of a result file, and writes a page, a plot, or a block of Markdown.

python -m experiments.report.build experiments/results/digits.csv --page report
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.record import ResultError, named, read_csv
from experiments.report import pages
from experiments.tables import (
    COLUMNS,
    insert,
    links_markdown,
    markdown,
    plot,
    print_table,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of a result file; write what is asked for beside it."""
    parser = argparse.ArgumentParser(
        prog="experiments.report.build", description="Report on one result file."
    )
    parser.add_argument(
        "csv",
        type=Path,
        help="of harness.train or harness.run; one of several in it: FILE:EXPERIMENT",
    )
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--page", type=Path, help="folder for index.html and report.md")
    parser.add_argument("--readme", type=Path, help="Markdown file with markers")
    parser.add_argument("--marker", help="in it (default: the name of the file)")
    parser.add_argument(
        "--table", choices=("all", "traffic", "links", "time"), default="all"
    )
    options = parser.parse_args(arguments)
    try:
        timed = (
            ["step_ms"] if options.page or options.table in ("links", "time") else []
        )
        rows = read_csv(options.csv, [*COLUMNS, *timed])
    except ResultError as error:
        parser.error(str(error))
    print_table(rows, Console())
    if options.plot:
        plot(rows, options.plot)
    if options.page:
        title = f"{rows[0]['task']}, {rows[0]['ranks']} ranks"
        parts = list(pages.sections(rows, options.page / "pictures"))
        (options.page / "index.html").write_text(pages.to_html(title, parts))
        text = pages.to_markdown(title, parts, options.page)
        (options.page / "report.md").write_text(text)
    if options.readme:
        content = {
            "all": markdown,
            "traffic": lambda rows: markdown(rows, times=False),
            "links": links_markdown,
            "time": pages.time_markdown,
        }[options.table](rows)
        marker = options.marker or named(options.csv)[1]
        old = options.readme.read_text()
        options.readme.write_text(insert(old, marker, content))


if __name__ == "__main__":
    main()
