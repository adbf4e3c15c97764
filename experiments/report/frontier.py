"""What is best at a given number of bytes: validation loss against bytes and time.

    python -m experiments.report.frontier chars.csv:chars-long --plot frontier.png
    python -m experiments.report.frontier chars.csv:chars-long --links chars.csv:links

with ``--within 1`` prints how long each method takes to come within 1 % of float32's
best loss.

Losses are those of the first file's trainings. A link's rate does not change them, so
time is each method's step as the lab measured it across that link (the second file),
times the steps.
"""

import argparse
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from experiments.average import AVERAGED
from experiments.harness.methods import AT_RATE
from experiments.record import ResultError, named, read_csv
from experiments.report.pages import Curve, curves
from experiments.tables import (
    BASELINE,
    COLUMNS,
    Row,
    grid,
    insert,
    length,
    partly,
    step_ms_by_link,
)

_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Point:
    """One method: what it sent, and the best that came of it.

    Attributes:
        method: its name.
        bytes_per_step: sent from one rank to others, the mean over seeds.
        losses: test loss of its best evaluation, by seed.
    """

    method: str
    bytes_per_step: float
    losses: Mapping[str, float]

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return self.over(self.losses)

    @property
    def low(self) -> float:
        """Of the luckiest seed."""
        return min(self.losses.values())

    @property
    def high(self) -> float:
        """Of the unluckiest."""
        return max(self.losses.values())

    def over(self, seeds: Collection[str]) -> float:
        """Return the mean loss of these seeds."""
        return sum(self.losses[seed] for seed in seeds) / len(seeds)


def points(rows: Sequence[Row]) -> list[Point]:
    """Return a point for every method, most bytes first."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        best: dict[str, float] = {}
        for row in mine:
            loss = float(row["test_loss"])
            best[row["seed"]] = min(loss, best.get(row["seed"], loss))
        last = [row for row in mine if row["step"] == row["steps"]]
        sent = sum(int(row["sent_bytes"]) for row in last) / len(last)
        found.append(
            Point(method, sent / int(last[0]["steps"]), dict(sorted(best.items())))
        )
    return sorted(found, key=lambda p: -p.bytes_per_step)


def shared(some: Sequence[Point]) -> set[str]:
    """Return the seeds that all of them were trained with."""
    return set.intersection(*(set(p.losses) for p in some)) if some else set()


def ratio(point: Point, base: Point) -> float:
    """Return its loss over the base's, of the seeds of both; NaN: there is none.

    Seeds can differ by more than forms do, so means over different ones say nothing.
    """
    seeds = shared([point, base])
    return point.over(seeds) / base.over(seeds) if seeds else math.nan


def better(point: Point, others: Sequence[Point]) -> Point | None:
    """Return what ends lower with no more bytes, the lowest of them; or ``None``."""
    some = [
        p
        for p in others
        if p.bytes_per_step <= point.bytes_per_step and ratio(p, point) < 1
    ]
    return min(some, key=lambda p: ratio(p, point), default=None)


def dense(found: Sequence[Point]) -> Point | None:
    """Return float32 at its best: of several learning rates, averaged or not.

    They are compared by the seeds that all of them were trained with, if there are.
    """
    return _lowest([p for p in found if _at_task_rate(p.method) == BASELINE])


def _lowest(some: Sequence[Point]) -> Point | None:
    seeds = shared(some)
    return min(some, key=lambda p: p.over(seeds or p.losses), default=None)


def _is_mean(method: str) -> bool:
    return method.endswith(AVERAGED)


def markdown(rows: Sequence[Row]) -> str:
    """Return every method with its distance from float32, and what is better.

    It is float32's at its best: of several learning rates, averaged or not.
    """
    found = points(rows)
    base, most = dense(found), max(p.seeds for p in found)
    titles = ["method", "bytes per rank and step", "fewer than float32"]
    titles += ["best test loss", "above float32", "lower with no more bytes"]
    lines = []
    for point in found:
        spread = f" ({point.low:.4f} … {point.high:.4f})" if point.seeds > 1 else ""
        winner = better(point, found)
        fewer = above = "–"
        if base is not None:
            fewer = f"{base.bytes_per_step / point.bytes_per_step:,.1f} ×"
            if not math.isnan(times := ratio(point, base)):
                above = f"{100 * (times - 1):+.2f} %"
        lines.append(
            [
                partly(point.method, point.seeds, most),
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
    seeds = "1 seed"
    if most > 1:
        seeds = f"{most} seeds (mean, lowest and highest; compared by seeds of both)"
    return (
        f"{table}\n\nTask {row['task']}, {row['ranks']} ranks, {length(row)}, "
        f"{seeds}; "
        f"the best of {evaluations(rows)} evaluations. Bytes are all that a rank "
        f"sends, headers and raw tensors too. lc3 {row['lc3']} at commit {commits}.\n"
    )


def waits(rows: Sequence[Row], links: Sequence[Row], percent: float) -> str:
    """Return how long methods train until they are near float32's best loss.

    A seed of a method is there when its loss, between evaluations interpolated, is no
    more than ``percent`` above the best that float32 has with that seed at the best of
    its learning rates. Its time is the steps until then, the mean over seeds, times
    those the lab measured; float32's is the shortest of its learning rates'.

    Args:
        rows: rows of trainings.
        links: rows of the lab; the methods that it did not measure are left out.
        percent: how near, 0 or more.

    Returns:
        Markdown.

    Raises:
        ResultError: float32 is missing in one of the two.
    """
    times, _ = step_ms_by_link(links)
    found = points(rows)
    base = dense(found)
    if base is None or BASELINE not in times:
        raise ResultError(f"no rows of {BASELINE}, so there is nothing to be near to")
    rates = list(times[BASELINE])
    measured = [p for p in found if _at_task_rate(p.method) in times]
    steps = {p.method: _steps_until(rows, p, base, 1 + percent / 100) for p in measured}
    dense_steps = [s for m, s in steps.items() if _at_task_rate(m) == BASELINE]
    most = max(p.seeds for p in found)
    lines = []
    for point in measured:
        mine, by_rate = steps[point.method], times[_at_task_rate(point.method)]
        until, whole = _mean(mine, mine), min(_mean(s, mine) for s in dense_steps)
        line = [partly(point.method, point.seeds, most)]
        never = "not reached" if mine else "–"  # without a seed of both nobody knows
        line.append(never if math.isinf(until) else f"{until:,.0f}")
        for rate in rates:
            if math.isinf(until) or rate not in by_rate:
                line.append("–")
                continue
            seconds = until * by_rate[rate] / 1e3
            sooner = whole * times[BASELINE][rate] / 1e3 / seconds
            line.append(f"{seconds / 60:,.1f} min ({sooner:,.1f} ×)")
        lines.append(line)
    near = f"{percent:g} % above float32's best"
    titles = ["method", f"steps until {near}", *rates]
    row = rows[0]
    return (
        f"{grid(titles, lines)}\n\nTask {row['task']}, {row['ranks']} ranks, "
        f"{length(row)}; steps until the test loss is no more than {near} of the same "
        f"seed, times the step measured across links of each rate (in brackets: how "
        f"many times sooner than float32 at the rate that is there first).\n"
    )


def _at_task_rate(method: str) -> str:
    """Return the method without a rate or an average: they take no time."""
    return method.removesuffix(AVERAGED).split(AT_RATE)[0]


def _steps_until(
    rows: Sequence[Row], point: Point, base: Point, times: float
) -> dict[str, float]:
    """Return the steps by seed, of the seeds of both; infinite: it never is there."""
    return {
        seed: _first_below(
            [r for r in rows if (r["method"], r["seed"]) == (point.method, seed)],
            times * base.losses[seed],
        )
        for seed in sorted(shared([point, base]))
    }


def _mean(steps: Mapping[str, float], seeds: Collection[str]) -> float:
    """Return the mean over these seeds; infinite: one is missing, or there are none."""
    if not seeds or not set(seeds) <= set(steps):
        return math.inf
    return sum(steps[seed] for seed in seeds) / len(seeds)


def _first_below(training: Sequence[Row], target: float) -> float:
    before = (0.0, math.inf)
    for row in training:
        step, loss = float(row["step"]), float(row["test_loss"])
        if loss <= target:
            start, high = before
            share = 1.0 if math.isinf(high) else (high - target) / (high - loss)
            return start + share * (step - start)
        before = (step, loss)
    return math.inf


def evaluations(rows: Sequence[Row]) -> str:
    """Return in how many evaluations of a training its best was looked for."""
    counts = Counter(
        (row["method"], row["seed"], row.get("rate")) for row in rows
    ).values()
    least, most = min(counts), max(counts)
    return f"{most}" if least == most else f"{least} to {most}"


def at_best_rate(rows: Sequence[Row]) -> list[str]:
    """Return the methods, each at the learning rate that ends lowest, averaged or not.

    Its rates are compared by the seeds that all of them were trained with.
    """
    forms: dict[str, list[Point]] = {}
    for point in points(rows):
        forms.setdefault(_at_task_rate(point.method), []).append(point)
    return [p.method for some in forms.values() if (p := _lowest(some)) is not None]


def plot(rows: Sequence[Row], links: Sequence[Row] | None, path: Path) -> None:
    """Write a PNG: loss against bytes, and against the time of each measured link.

    Each method is drawn at the best of its learning rates.
    """
    times = step_ms_by_link(links)[0] if links else {}
    rates = list(next(iter(times.values()))) if times else []
    columns = 2 if rates else 1
    lines = -(-(1 + len(rates)) // columns)
    figure = Figure(figsize=(6.5 * columns + 4, 5 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    first, *others = panels
    for unused in panels[1 + len(rates) :]:
        unused.set_axis_off()
    chosen = at_best_rate(rows)
    everything = [curve for curve in curves(rows) if curve.method in chosen]
    _draw(first, everything, {c.method: c.sent_mb for c in everything})
    first.set_xlabel("MB sent per rank")
    first.set_title(f"{rows[0]['task']}, {rows[0]['ranks']} ranks")
    for axes, rate in zip(others, rates, strict=False):
        by_rate = {m: ms[rate] for m, ms in times.items() if rate in ms}
        seconds = {
            curve.method: [
                step * by_rate[_at_task_rate(curve.method)] / 1e3
                for step in curve.steps
            ]
            for curve in everything
            if _at_task_rate(curve.method) in by_rate
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
    most = max(len(curve.seeds) for curve in everything)
    for index, curve in enumerate(everything):
        if curve.method in places:
            axes.plot(
                places[curve.method],
                curve.test_loss,
                _LINE_STYLES[index // 10 % len(_LINE_STYLES)],
                color=f"C{index % 10}",
                marker="o",
                markersize=3,
                label=partly(curve.method, len(curve.seeds), most),
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
        prog="experiments.report.frontier",
        description="Loss against bytes, and against time.",
    )
    parser.add_argument("csv", type=Path, help="the losses: FILE or FILE:EXPERIMENT")
    parser.add_argument("--links", type=Path, help="the same task across a lab's links")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument(
        "--within",
        type=float,
        metavar="PERCENT",
        help="print how long each method takes to come that near to float32's best",
    )
    parser.add_argument("--docs", type=Path, help="Markdown file with markers")
    parser.add_argument("--marker", help="in it (default: the name of the file)")
    options = parser.parse_args(arguments)
    try:
        if options.within is not None and not options.links:
            parser.error("--within needs --links: the lab's step times")
        if options.within is not None and not 0 <= options.within < math.inf:
            parser.error(f"--within {options.within} must be 0 or more, in percent")
        text = of_file(options, parser)
    except ResultError as error:
        parser.error(str(error))
    Console(highlight=False).print(text, soft_wrap=True)
    if options.docs:
        old, stem = options.docs.read_text(), named(options.csv)[1]
        stem += "" if options.within is None else "-times"
        marker = options.marker or stem
        options.docs.write_text(insert(old, marker, text))


def of_file(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Return the table of one result file, and draw it if that is asked for."""
    rows = read_csv(options.csv, [*COLUMNS, "step_ms"])
    links = options.links and read_csv(options.links, [*COLUMNS, "rate", "step_ms"])
    if links and links[0]["task"] != rows[0]["task"]:
        parser.error(
            f"{options.links} is of task {links[0]['task']}, {options.csv} of "
            f"{rows[0]['task']}; measure the links with the same task"
        )
    if options.plot:
        plot(rows, links, options.plot)
    if options.within is not None:
        return waits(rows, links, options.within)
    return markdown(rows)


if __name__ == "__main__":
    main()
