"""Tables and plots from the rows of ``experiments.harness.train``."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Row = dict[str, str]
BASELINE = "float32"
COLUMNS = (  # that a report needs
    *("task", "method", "seed", "ranks", "steps", "step", "sent_bytes", "push_bits"),
    *("pull_bits", "frame_bits", "test_loss", "accuracy", "compute_ms", "codec_ms"),
)
LINKS_MBIT_S = {10: "10 Mbit/s", 100: "100 Mbit/s", 1_000: "1 Gbit/s"}
HEADERS = [
    "method",
    "bytes sent per rank and step",
    "fewer than float32",
    "fewer in coded tensors",
    "bits per element, push + pull",
    "bits before the entropy stage",
    "test loss",
    "test accuracy",
    *(f"step at {link}*" for link in LINKS_MBIT_S.values()),
]
TRAFFIC = slice(1, 6)  # columns of HEADERS; the others are what comes of it


@dataclass(frozen=True)
class Summary:
    """One method's results: means over seeds, at the last evaluation.

    Attributes:
        method: its name.
        bytes_per_step: sent from one rank to others.
        push_bits: per gradient element that the method codes, worker to owner.
        pull_bits: the same on the way back.
        frame_bits: both ways together, before the lossless entropy stage.
        test_loss: loss on the test data.
        accuracy: accuracy on the test data, 0 to 1.
        spread: largest minus smallest accuracy of a seed.
        seeds: how many.
        compute_ms: one step without communication.
        codec_ms: encoding and decoding of one step.
    """

    method: str
    bytes_per_step: float
    push_bits: float
    pull_bits: float
    frame_bits: float
    test_loss: float
    accuracy: float
    spread: float
    seeds: int
    compute_ms: float
    codec_ms: float

    def step_ms(self, mbit_s: float) -> float:
        """Return the milliseconds a step would take if each rank sent at ``mbit_s``.

        Nothing overlaps: computing, coding, then sending. The link is full duplex and
        has no latency.
        """
        send_ms = self.bytes_per_step * 8 / (mbit_s * 1e3)
        return self.compute_ms + self.codec_ms + send_ms


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Return one summary per method, in the order they were run."""

    def of(method: str) -> Summary:
        last = [r for r in rows if r["method"] == method and r["step"] == r["steps"]]

        def over_seeds(column: str) -> float:
            return mean(float(row[column]) for row in last)

        accuracies = [float(row["accuracy"]) for row in last]
        return Summary(
            method=method,
            bytes_per_step=over_seeds("sent_bytes") / int(last[0]["steps"]),
            push_bits=over_seeds("push_bits"),
            pull_bits=over_seeds("pull_bits"),
            frame_bits=over_seeds("frame_bits"),
            test_loss=over_seeds("test_loss"),
            accuracy=mean(accuracies),
            spread=max(accuracies) - min(accuracies),
            seeds=len(last),
            compute_ms=over_seeds("compute_ms"),
            codec_ms=over_seeds("codec_ms"),
        )

    return [of(method) for method in dict.fromkeys(row["method"] for row in rows)]


def cells(summaries: Sequence[Summary]) -> list[list[str]]:
    """Return the table's rows as text, one cell per header."""
    baseline = next((s for s in summaries if s.method == BASELINE), None)
    most = max(s.seeds for s in summaries)

    def of(s: Summary) -> list[str]:
        fewer = baseline.bytes_per_step / s.bytes_per_step if baseline else float("nan")
        return [
            partly(s.method, s.seeds, most),
            f"{s.bytes_per_step:,.0f}",
            f"{fewer:.1f} ×",
            f"{64 / (s.push_bits + s.pull_bits):.1f} ×",
            f"{s.push_bits:.3f} + {s.pull_bits:.3f}",
            f"{s.frame_bits:.3f}",
            f"{s.test_loss:.4f}",
            f"{100 * s.accuracy:.2f} %",
            *(f"{s.step_ms(mbit_s):,.1f} ms" for mbit_s in LINKS_MBIT_S),
        ]

    # What a method cannot tell: the coder inside PyTorch's hook, bits of a raw tensor.
    return [
        ["–" if "nan" in cell else cell for cell in of(summary)]
        for summary in summaries
    ]


def step_ms_by_link(rows: Sequence[Row]) -> tuple[dict[str, dict[str, float]], bool]:
    """Return milliseconds of a step by method and link, and whether they are measured.

    Measured across a lab's links where the rows have rates, else computed.
    """
    rates = list(dict.fromkeys(row.get("rate", "") for row in rows))
    if rates == [""]:
        return {
            s.method: {name: s.step_ms(m) for m, name in LINKS_MBIT_S.items()}
            for s in summarise(rows)
        }, False
    last = [row for row in rows if row["step"] == row["steps"]]
    times: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(row["method"] for row in last):
        for rate in rates:
            some = [
                float(row["step_ms"])
                for row in last
                if (row["method"], row.get("rate", "")) == (method, rate)
            ]
            if some:
                times.setdefault(method, {})[rate] = mean(some)
    return times, True


def partly(method: str, seeds: int, most: int) -> str:
    """Return the method's name, and how many of the seeds it has if not all."""
    return method if seeds == most else f"{method} ({seeds} of {most} seeds)"


def length(row: Row) -> str:
    """Return the steps of a row's training, and its warm-up if the row says it."""
    share = row.get("warm_up")
    rising = f", {100 * float(share):g} % of them warm-up" if share else ""
    return f"{row['steps']} steps{rising}"


def caption(rows: Sequence[Row], *, times: bool = True) -> str:
    """Return what the figures are of, and what was computed instead of measured.

    Args:
        rows: of one experiment.
        times: whether step times, which are computed, stand beside it.
    """
    row = rows[0]
    seeds = len({row["seed"] for row in rows})
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    machines = "; ".join(
        dict.fromkeys(f"{row['machine']}, {row['cores']} cores" for row in rows)
    )
    said = (
        f"Task {row['task']}: {row['ranks']} ranks on one machine, "
        f"{length(row)}, mean of {seeds} {'seed' if seeds == 1 else 'seeds'}; "
        f"the baseline is plain DDP in float32. {machines}; lc3 {row['lc3']} at commit "
        f"{commits}, torch {row['torch']}, "
        f"numpy {row['numpy']}, numba {row['numba']}, Python {row['python']}. "
        "Bytes are counted where they are sent (for the two all-reduces: a ring's "
        "bytes, 2 (W − 1) / W of the buffer)."
    )
    if times:
        said += (
            " *Computed, not measured: measured computing and coding time, plus bytes "
            "sent over the rate; no overlap, no latency."
        )
    return said


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print the comparison as two tables, which fit a terminal of 80 columns."""
    lines = cells(summarise(rows))
    for columns in (TRAFFIC, slice(TRAFFIC.stop, None)):
        table = Table()
        table.add_column(HEADERS[0])
        for header in HEADERS[columns]:
            table.add_column(header, justify="right")
        for line in lines:
            table.add_row(line[0], *line[columns])
        console.print(table)
    console.print(caption(rows), highlight=False)


def grid(
    titles: Sequence[str],
    lines: Iterable[Sequence[str]],
    words: Collection[int] = (0,),
) -> str:
    """Return a Markdown table without a last line break.

    Args:
        titles: titles of the columns.
        lines: a cell for each title.
        words: numbers of the columns that are set left; the others, numbers, right.
    """
    rule = ["---" if column in words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, rule, *lines))


def markdown(rows: Sequence[Row], *, times: bool = True) -> str:
    """Return the comparison as Markdown, with or without computed step times."""
    shown = len(HEADERS) - (0 if times else len(LINKS_MBIT_S))
    lines = [line[:shown] for line in cells(summarise(rows))]
    table = grid(HEADERS[:shown], lines)
    said = caption(rows, times=times)
    return f"{table}\n\n{said.replace('*', chr(92) + '*')}\n"


def links_markdown(rows: Sequence[Row]) -> str:
    """Return measured step times by method and rate, with bytes of the lowest rate."""
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    last = [row for row in rows if row["step"] == row["steps"]]
    titles = ["method", "bytes per step, interface", "bytes per step, counted by lc3"]
    titles += [f"step at {rate}" for rate in rates]
    lines = []
    times, _ = step_ms_by_link(rows)
    for method, by_rate in times.items():
        first = next(r for r in last if (r["method"], r["rate"]) == (method, rates[0]))
        per_step = [
            int(first[c]) / int(first["steps"]) for c in ("link_bytes", "sent_bytes")
        ]
        shown = [f"{by_rate[r]:,.1f} ms" if r in by_rate else "" for r in rates]
        lines.append([method, *(f"{b:,.0f}" for b in per_step), *shown])
    table = grid(titles, lines)
    row = rows[0]
    return (
        f"{table}\n\nTask {row['task']}, {row['ranks']} hosts of one rank each on one "
        f"machine of {row['cores']} cores, {length(row)}, one run. Measured, "
        "start-up and evaluation left out; an interface counts the headers of TCP, IP "
        f"and Ethernet too. lc3 {row['lc3']} at commit {row['commit']}, torch "
        f"{row['torch']}.\n"
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of test accuracy against bytes sent, the mean of the seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for summary in summarise(rows):
        mine = [row for row in rows if row["method"] == summary.method]
        steps = sorted({int(row["step"]) for row in mine})
        points = [[row for row in mine if int(row["step"]) == step] for step in steps]
        axes.plot(
            [mean(int(row["sent_bytes"]) for row in at) / 1e6 for at in points],
            [100 * mean(float(row["accuracy"]) for row in at) for at in points],
            marker="o",
            markersize=3,
            label=summary.method,
        )
    axes.set_xscale("log")
    axes.set_xlabel("megabytes sent per rank")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{rows[0]['task']}, {rows[0]['ranks']} ranks")
    axes.grid(visible=True, alpha=0.3)
    many = len(axes.lines) > 16
    axes.legend(ncols=1 + many, fontsize=5 if many else None)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def insert(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between the markers of ``name``.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"need one {begin.strip()} and one {end} to insert {name!r}")
    head, rest = text.split(begin)
    if end not in rest:
        raise ValueError(f"{end} stands before {begin.strip()}")
    return head + begin + content + end + rest.split(end)[1]
