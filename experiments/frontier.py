"""What is best at a given number of bytes: validation loss against bytes and time.

    python -m experiments.frontier losses.csv --links links.csv --plot frontier.png

Losses are those of the first file's trainings. A link's rate does not change them, so
time is each method's step as the lab measured it across that link (the second file),
times the steps.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from experiments.average import AVERAGED
from experiments.methods import AT_RATE
from experiments.pages import Curve, curves
from experiments.record import ResultError, read_csv
from experiments.report import (
    BASELINE,
    COLUMNS,
    Row,
    grid,
    insert,
    length,
    step_ms_by_link,
)

_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Point:
    """One method: what it sent, and the best that came of it.

    Attributes:
        method: its name.
        bytes_per_step: sent from one rank to others, the mean over seeds.
        loss: on the test data, of the best evaluation: the mean over seeds of each
            one's best.
        low: of the luckiest seed.
        high: of the unluckiest.
        seeds: how many.
    """

    method: str
    bytes_per_step: float
    loss: float
    low: float
    high: float
    seeds: int


def points(rows: Sequence[Row]) -> list[Point]:
    """Return a point for every method, most bytes first."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        seeds = sorted({row["seed"] for row in mine})
        best = [
            min(float(row["test_loss"]) for row in mine if row["seed"] == seed)
            for seed in seeds
        ]
        last = [row for row in mine if row["step"] == row["steps"]]
        sent = sum(int(row["sent_bytes"]) for row in last) / len(last)
        found.append(
            Point(
                method,
                sent / int(last[0]["steps"]),
                sum(best) / len(best),
                min(best),
                max(best),
                len(seeds),
            )
        )
    return sorted(found, key=lambda p: -p.bytes_per_step)


def better(point: Point, others: Sequence[Point]) -> Point | None:
    """Return what ends lower with no more bytes, the lowest of them; or ``None``."""
    some = [
        p
        for p in others
        if p.bytes_per_step <= point.bytes_per_step and p.loss < point.loss
    ]
    return min(some, key=lambda p: p.loss, default=None)


def markdown(rows: Sequence[Row]) -> str:
    """Return every method with its distance from float32, and what is better.

    It is float32's at its best: of several learning rates, averaged or not.
    """
    found = points(rows)
    baselines = [
        p
        for p in found
        if p.method.removesuffix(AVERAGED).split(AT_RATE)[0] == BASELINE
    ]
    base = min(baselines, key=lambda p: p.loss, default=None)
    titles = ["method", "bytes per rank and step", "fewer than float32"]
    titles += ["best test loss", "above float32", "lower with no more bytes"]
    lines = []
    for point in found:
        spread = f" ({point.low:.4f} … {point.high:.4f})" if point.seeds > 1 else ""
        winner = better(point, found)
        fewer = above = "–"
        if base is not None:
            fewer = f"{base.bytes_per_step / point.bytes_per_step:,.1f} ×"
            above = f"{100 * (point.loss / base.loss - 1):+.2f} %"
        lines.append(
            [
                point.method,
                f"{point.bytes_per_step:,.0f}",
                fewer,
                f"{point.loss:.4f}{spread}",
                above,
                "**none**" if winner is None else winner.method,
            ]
        )
    row = rows[0]
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    table = grid(titles, lines, words=(0, 5))
    most = max(p.seeds for p in found)
    seeds = f"{most} {'seed' if most == 1 else 'seeds'}"
    return (
        f"{table}\n\nTask {row['task']}, {row['ranks']} ranks, {length(row)}, "
        f"up to {seeds} (mean, lowest and highest); "
        f"the best of {evaluations(rows)} evaluations. Bytes are all that a rank "
        f"sends, headers and raw tensors too. lc3 {row['lc3']} at commit {commits}.\n"
    )


def evaluations(rows: Sequence[Row]) -> str:
    """Return in how many evaluations of a training its best was looked for."""
    counts = Counter(
        (row["method"], row["seed"], row.get("rate")) for row in rows
    ).values()
    least, most = min(counts), max(counts)
    return f"{most}" if least == most else f"{least} to {most}"


def plot(rows: Sequence[Row], links: Sequence[Row] | None, path: Path) -> None:
    """Write a PNG: loss against bytes, and against the time of each measured link."""
    times = step_ms_by_link(links)[0] if links else {}
    rates = list(next(iter(times.values()))) if times else []
    figure = Figure(figsize=(6.5 * (1 + len(rates)) + 3, 5), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(rates), squeeze=False)[0]
    everything = curves(rows)
    _draw(first, everything, {c.method: c.sent_mb for c in everything})
    first.set_xlabel("MB sent per rank")
    first.set_title(f"{rows[0]['task']}, {rows[0]['ranks']} ranks")
    for axes, rate in zip(others, rates, strict=True):
        by_rate = {m: ms[rate] for m, ms in times.items() if rate in ms}
        seconds = {
            curve.method: [step * by_rate[curve.method] / 1e3 for step in curve.steps]
            for curve in everything
            if curve.method in by_rate
        }
        _draw(axes, everything, seconds)
        axes.set_xlabel("seconds of training")
        axes.set_title(f"links of {rate}")
    figure.legend(
        *first.get_legend_handles_labels(),
        loc="outside right upper",
        fontsize=7,
        handlelength=4,
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw(
    axes: Axes, everything: Sequence[Curve], places: Mapping[str, Sequence[float]]
) -> None:
    for index, curve in enumerate(everything):
        if curve.method in places:
            axes.plot(
                places[curve.method],
                curve.test_loss,
                _LINE_STYLES[index // 10 % len(_LINE_STYLES)],
                color=f"C{index % 10}",
                marker="o",
                markersize=3,
                label=curve.method,
            )
    ends = [curve.test_loss[-1] for curve in everything]
    least = min(min(curve.test_loss) for curve in everything)
    margin = 0.1 * (max(ends) - least)  # how a training begins is the same for all
    if margin > 0:
        axes.set_ylim(least - margin, max(ends) + 3 * margin)
    axes.set_xscale("log")
    axes.set_ylabel("test loss")
    axes.grid(visible=True, alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of a result file; write what is asked for beside it."""
    parser = argparse.ArgumentParser(
        prog="experiments.frontier",
        description="Loss against bytes, and against time.",
    )
    parser.add_argument("csv", type=Path, help="of experiments.run: the losses")
    parser.add_argument("--links", type=Path, help="the same task across a lab's links")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--docs", type=Path, help="Markdown file with markers")
    parser.add_argument("--marker", help="in it (default: the name of the file)")
    options = parser.parse_args(arguments)
    try:
        rows = read_csv(options.csv, [*COLUMNS, "step_ms"])
        links = options.links and read_csv(options.links, [*COLUMNS, "rate", "step_ms"])
    except ResultError as error:
        parser.error(str(error))
    if links and links[0]["task"] != rows[0]["task"]:
        parser.error(
            f"{options.links} is of task {links[0]['task']}, {options.csv} of "
            f"{rows[0]['task']}; measure the links with the same task"
        )
    text = markdown(rows)
    Console(highlight=False).print(text, soft_wrap=True)
    if options.plot:
        plot(rows, links, options.plot)
    if options.docs:
        old = options.docs.read_text()
        options.docs.write_text(insert(old, options.marker or options.csv.stem, text))


if __name__ == "__main__":
    main()
