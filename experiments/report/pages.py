"""A report of one experiment, as HTML with its pictures inside and as Markdown."""

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.tables import (
    BASELINE,
    HEADERS,
    TRAFFIC,
    Row,
    caption,
    cells,
    grid,
    partly,
    step_ms_by_link,
    summarise,
)

TARGET = 0.99  # of the baseline's final accuracy
_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark }
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .25em .7em; border-bottom: 1px solid #8888; text-align: right }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; background: #fff }
</style></head><body><h1>{{ title }}</h1>
{% for section in sections %}<h2>{{ section.title }}</h2>
<p>{{ section.text }}</p>
{% if section.lines %}<div class="wide" tabindex="0"><table><thead><tr>
{% for cell in section.headers %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for line in section.lines %}<tr>
{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if section.picture %}<img alt="{{ section.title }}"
 src="data:image/png;base64,{{ section.encoded() }}">{% endif %}
{% endfor %}</body></html>
"""


@dataclass(frozen=True)
class Section:
    """A headed part of a report: some words, then a table, a picture, or both."""

    title: str
    text: str
    headers: Sequence[str] = ()
    lines: Sequence[Sequence[str]] = field(default_factory=list)
    picture: Path | None = None

    def encoded(self) -> str:
        """Return the picture in base64."""
        assert self.picture is not None
        return base64.b64encode(self.picture.read_bytes()).decode()


@dataclass(frozen=True)
class Curve:
    """How one method went at one rate, the mean of its seeds at every evaluation."""

    method: str
    rate: str
    seeds: frozenset[str]
    steps: list[int]
    test_loss: list[float]
    accuracy: list[float]
    sent_mb: list[float]
    seconds: list[float]
    push_bits: list[float]
    pull_bits: list[float]


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Return a curve for every method and rate, in the order they were run."""
    keys = dict.fromkeys((row["method"], row.get("rate", "")) for row in rows)
    return [_curve(rows, method, rate) for method, rate in keys]


def _curve(rows: Sequence[Row], method: str, rate: str) -> Curve:
    mine = [r for r in rows if (r["method"], r.get("rate", "")) == (method, rate)]
    steps = sorted({int(row["step"]) for row in mine})
    at = [[row for row in mine if int(row["step"]) == step] for step in steps]

    def over_seeds(column: str, scale: float = 1.0) -> list[float]:
        return [scale * mean(float(row[column]) for row in some) for some in at]

    step_s = over_seeds("step_ms", 1e-3)
    return Curve(
        method,
        rate,
        frozenset(row["seed"] for row in mine),
        steps,
        over_seeds("test_loss"),
        over_seeds("accuracy", 100),
        over_seeds("sent_bytes", 1e-6),
        [step * s for step, s in zip(steps, step_s, strict=True)],
        _since_the_last(over_seeds("push_bits"), steps),
        _since_the_last(over_seeds("pull_bits"), steps),
    )


def _since_the_last(means: Sequence[float], steps: Sequence[int]) -> list[float]:
    """Return means over each interval, from means since the start."""
    sums = [m * step for m, step in zip(means, steps, strict=True)]
    before = [(0.0, 0), *zip(sums, steps, strict=True)]
    return [
        (total - earlier) / (step - since)
        for (earlier, since), total, step in zip(before, sums, steps, strict=False)
    ]


def reached(curve: Curve, accuracy: float) -> float | None:
    """Return the seconds until an accuracy in %, between evaluations interpolated."""
    before = (0.0, 0.0)
    for seconds, got in zip(curve.seconds, curve.accuracy, strict=True):
        if got >= accuracy:
            start, low = before
            share = (accuracy - low) / (got - low) if got > low else 1.0
            return start + share * (seconds - start)
        before = (seconds, got)
    return None


def sections(rows: Sequence[Row], folder: Path) -> Iterator[Section]:
    """Yield the parts of a report; pictures are written into ``folder``."""
    everything = curves(rows)
    yield _comparison(rows)
    yield _steps(rows)
    if any(curve.rate for curve in everything):
        yield _time_to_accuracy(rows)
    yield _picture(
        "Accuracy against bytes",
        "Test accuracy against what each rank sent, the mean of the seeds.",
        folder / "bytes.png",
        lambda axes: _accuracy(axes, _one_rate(everything), "sent_mb"),
    )
    for rate in dict.fromkeys(curve.rate for curve in everything):
        if rate:
            some = [curve for curve in everything if curve.rate == rate]
            yield _picture(
                f"Accuracy against time at {rate}",
                f"Measured seconds of training across links of {rate}.",
                folder / f"time-{rate}.png",
                lambda axes, some=some: _accuracy(axes, some, "seconds"),  # type: ignore[misc]
            )
    yield _picture(
        "Bits per element over training",
        "Sent per coded element and step, push solid and pull dashed.",
        folder / "bits.png",
        lambda axes: _bits(axes, _one_rate(everything)),
    )
    yield _picture(
        "Speed-up",
        "Step time of float32 over the method's, at each link rate.",
        folder / "speedup.png",
        lambda axes: _bars(axes, rows),
    )


def _comparison(rows: Sequence[Row]) -> Section:
    first = [row for row in rows if row.get("rate", "") == rows[0].get("rate", "")]
    lines = [line[: TRAFFIC.stop + 2] for line in cells(summarise(first))]
    said = caption(first, times=False)
    return Section("Comparison", said, HEADERS[: TRAFFIC.stop + 2], lines)


def _steps(rows: Sequence[Row]) -> Section:
    times, measured = step_ms_by_link(rows)
    links = list(next(iter(times.values())))
    lines = []
    for method, by_link in times.items():
        line = [method]
        for link in links:
            base = times.get(BASELINE, {}).get(link)
            speed = f" ({base / by_link[link]:.2f} ×)" if base else ""
            line.append(f"{by_link[link]:,.1f} ms{speed}")
        lines.append(line)
    how = (
        "Measured across rate-limited links."
        if measured
        else "Computed: measured computing and coding time, plus bytes over the rate."
    )
    text = f"{how} In brackets: how many times faster than {BASELINE}."
    return Section("Time of a step", text, ["method", *links], lines)


def _time_to_accuracy(rows: Sequence[Row]) -> Section:
    """Compare every method with the baseline's same seeds."""
    base = [r for r in rows if r["method"] == BASELINE and r["step"] == r["steps"]]
    if not base:
        return Section("Time to accuracy", f"There is no {BASELINE} to compare with.")
    rates = list(dict.fromkeys(row.get("rate", "") for row in rows))
    most = len({row["seed"] for row in rows})
    lines, targets = [], set()
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        seeds = {row["seed"] for row in mine} & {row["seed"] for row in base}
        line = [partly(method, len({row["seed"] for row in mine}), most)]
        lines.append(line)
        if not seeds:
            line += ["–"] * len(rates)
            continue
        target = _target(row for row in base if row["seed"] in seeds)
        targets.add(f"{target:.2f}")
        found = {c.rate: c for c in curves([r for r in mine if r["seed"] in seeds])}
        for rate in rates:
            if rate not in found:
                line.append("–")
                continue
            seconds = reached(found[rate], target)
            line.append("not reached" if seconds is None else f"{seconds:,.2f} s")
    same = ", with the same seeds" if len(targets) > 1 else ""
    text = (
        f"Measured seconds of training until a test accuracy of {_target(base):.2f} %, "
        f"{100 * TARGET:.0f} % of what {BASELINE} ends with{same}."
    )
    return Section("Time to accuracy", text, ["method", *rates], lines)


def _target(ends: Iterable[Row]) -> float:
    return TARGET * mean(100 * float(row["accuracy"]) for row in ends)


def _one_rate(everything: Sequence[Curve]) -> list[Curve]:
    return [curve for curve in everything if curve.rate == everything[0].rate]


def _picture(
    title: str, text: str, path: Path, draw: Callable[[Axes], None]
) -> Section:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return Section(title, text, picture=path)


def _accuracy(axes: Axes, some: Sequence[Curve], against: str) -> None:
    most = max(len(curve.seeds) for curve in some)
    for curve in some:
        axes.plot(
            getattr(curve, against),
            curve.accuracy,
            marker="o",
            markersize=3,
            label=partly(curve.method, len(curve.seeds), most),
        )
    axes.set_xscale("log")
    axes.set_xlabel("MB sent per rank" if against == "sent_mb" else "seconds")
    axes.set_ylabel("test accuracy, %")


def _bits(axes: Axes, some: Sequence[Curve]) -> None:
    for index, curve in enumerate(some):
        for bits, line in ((curve.push_bits, "-"), (curve.pull_bits, "--")):
            label = curve.method if line == "-" else None
            axes.plot(curve.steps, bits, line, color=f"C{index % 10}", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per element and step")


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    times, _ = step_ms_by_link(rows)
    base = times.get(BASELINE)
    if base is None:
        return
    links = list(base)
    width = 0.8 / len(links)
    for index, link in enumerate(links):
        axes.barh(
            [place + index * width for place in range(len(times))],
            [base[link] / by_link[link] for by_link in times.values()],
            height=width,
            label=link,
        )
    axes.set_yticks([place + 0.4 - width / 2 for place in range(len(times))], times)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times faster than {BASELINE}")
    axes.invert_yaxis()


def time_markdown(rows: Sequence[Row]) -> str:
    """Return measured time to accuracy by method and rate, as Markdown."""
    part = _time_to_accuracy(rows)
    return f"{grid(part.headers, part.lines)}\n\n{part.text}\n"


def to_html(title: str, parts: Sequence[Section]) -> str:
    """Return one HTML page that needs no other file."""
    template = Environment(autoescape=True).from_string(_HTML)
    return template.render(title=title, sections=parts)


def to_markdown(title: str, parts: Sequence[Section], beside: Path) -> str:
    """Return Markdown for a file in the folder ``beside``."""
    text = [f"# {title}\n"]
    for part in parts:
        text.append(f"## {part.title}\n\n{part.text}\n".replace("*", "\\*"))
        if part.lines:
            text += [grid(part.headers, part.lines), ""]
        if part.picture:
            where = part.picture.relative_to(beside)
            text.append(f"![{part.title}]({where.as_posix()})\n")
    return "\n".join(text)
