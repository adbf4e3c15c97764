"""The page of results: for each task one table, from the committed result files.

    python -m experiments.report.summary docs/results.md README.md

writes the blocks that these pages have markers for. The rule of evidence is applied
here: figures are those of the end of a training, no best of several evaluations; two
methods are compared by the seeds that both have; a difference is called lower or higher
only where a paired t-test gives p < 0.05, and nothing is said of one seed.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from experiments.harness.methods import AT_RATE
from experiments.harness.run import at_rate
from experiments.record import RESULTS, ResultError, read_csv
from experiments.tables import BASELINE, Row, grid, insert
from lc3 import knobs

_SURE = 0.05  # p from which on nothing is claimed
_HALVED = "all coded, decay 0.8, rans, momentum 0.5, outer rate 2"
PICTURED = ":one-pass-quarter"  # the experiment with all rivals
COMMANDS = ("measure", "doctor", "ship", "unship", "inspect")


@dataclass(frozen=True)
class Task:
    """One table of the page.

    Attributes:
        title: title of the task.
        file: its result file and experiment.
        forms: a method's name in the table, by its name in the file.
        accuracy: whether the figure is an accuracy, not a loss.
    """

    title: str
    file: str
    forms: dict[str, str]
    accuracy: bool = False


TASKS = (
    Task(
        "Handwritten digits: CNN of 0.15 M, SGD, 2 ranks, 500 steps",
        "digits.csv:digits",
        {
            "float32": "float32",
            "fp16": "fp16 hook",
            "3LC s=1.00": "lc3 `ddp`, s = 1",
            "3LC s=1.50, direct": "lc3 `ddp`, s = 1.5, one hop",
        },
        accuracy=True,
    ),
    Task(
        "Fashion-MNIST: LeNet-5 of 0.43 M, SGD, 2 ranks, 400 steps",
        "fashion-mnist.csv:fashion-mnist",
        {
            "float32": "float32",
            "3LC s=1.00": "lc3 `ddp`, s = 1",
            "local H=8": "lc3 `local_sgd`, H = 8, 10 %",
            "PowerSGD rank 4": "PowerSGD, rank 4",
            "top-k 1%": "top-k 1 %",
            "8-bit int": "8-bit integers",
        },
        accuracy=True,
    ),
    Task(
        "CIFAR-10: ResNet-20, SGD, 2 ranks, five passes",
        "cifar10-resnet20.csv:cifar10-longer",
        {
            "float32": "float32",
            "3LC s=1.00, all coded": "lc3 `ddp`, s = 1, all coded",
            "local H=4, density 10 %, all coded": "lc3 `local_sgd`, H = 4, 10 %",
        },
        accuracy=True,
    ),
    Task(
        "Characters: transformer of 0.36 M, AdamW, 4 ranks, 1,600 steps",
        "chars.csv:chars-warm-up",
        {
            "float32": "float32",
            "preconditioned s=1.00, updates ≤ 3, rans": "lc3 `ddp`",
            "preconditioned s=1.00, rans": "lc3 `ddp`, `max_update=inf`",
            f"local H=8, density 11.5 %, {_HALVED}, lr × 2": (
                'lc3 `preset="adamw"`, twice the rate'
            ),
            "push-pull s=1.00": "lc3 `push_pull`",
            "PowerSGD rank 4": "PowerSGD, rank 4",
        },
    ),
    Task(
        "Characters: the same, 4,512 steps",
        "chars.csv:chars-long",
        {
            "float32": "float32",
            "preconditioned s=1.00": "lc3 `ddp`, `max_update=inf`, zstd",
            "local H=8, decay 0.8, momentum 0.5, outer rate 2": (
                "lc3 `local_sgd`, H = 8, 10 %"
            ),
        },
    ),
    Task(
        "Characters: transformer of 2.25 M, AdamW, 4 ranks, 7,200 steps",
        "chars-large.csv:chars-large-warm-up",
        {
            "float32": "float32",
            f"local H=8, density 11.5 %, {_HALVED}, lr × 3": (
                'lc3 `preset="adamw"`, three times the rate'
            ),
        },
    ),
    Task(
        "Python sources, each byte seen once: transformer of 0.28 M, AdamW, 4 ranks, "
        "672 steps",
        "one-pass-0.25m.csv:one-pass-quarter",
        {
            "float32": "float32",
            "preconditioned s=1.00, updates ≤ 3, rans": "lc3 `ddp`",
            "preconditioned s=1.00, rans": "lc3 `ddp`, `max_update=inf`",
            f"local H=8, density 11.5 %, {_HALVED}": 'lc3 `preset="adamw"`',
            f"local H=32, density 11.5 %, {_HALVED}": 'lc3 `preset="fewest-bytes"`',
            "1-bit Adam": "1-bit Adam",
            "DiLoCo H=8": "DiLoCo, H = 8",
            "DiLoCo H=32": "DiLoCo, H = 32",
            "DiLoCo E3M0 H=32": "DiLoCo, H = 32, four bits",
            "SparseLoCo H=8": "SparseLoCo, H = 8",
            "SparseLoCo H=32": "SparseLoCo, H = 32",
            "DeMo": "DeMo",
        },
    ),
    Task(
        "Characters: transformer of 0.36 M, Muon, 4 ranks, 9,024 steps",
        "chars-muon.csv:chars-muon-longer",
        {
            "float32": "float32",
            "local H=16, density 9.5 %, all coded": "lc3 `local_sgd`, H = 16, 9.5 %",
            f"local H=32, density 11.5 %, {_HALVED}": 'lc3 `preset="fewest-bytes"`',
        },
    ),
    Task(
        "Characters: transformer of 2.25 M, Muon, 4 ranks, 3,600 steps",
        "chars-muon-large.csv:chars-muon-large",
        {
            "float32": "float32",
            f"local H=16, density 11 %, {_HALVED}, lr × 0.5": (
                'lc3 `preset="muon"`, half the rate'
            ),
        },
    ),
)
SCRIPTS = {
    "nanogpt": "nanoGPT, AdamW, 300 steps",
    "trainer": "HF Trainer, AdamW, 300 steps",
    "lightning_transformer": "Lightning, SGD, 600 steps",
}
TITLES = ("method", "fewer bytes than float32", "than bfloat16")


@dataclass(frozen=True)
class Outcome:
    """How a method ended, at the best of its learning rates.

    Attributes:
        figures: by seed.
        bytes_per_step: that a rank sends.
        times: of the task's rate; one, where it was not swept.
    """

    figures: dict[str, float]
    bytes_per_step: float
    times: float = 1.0

    @property
    def mean(self) -> float:
        """The figure's mean over the seeds."""
        return mean(self.figures.values())


def swept(task: Task, rows: Sequence[Row]) -> list[float]:
    """Return the rates that every method has ended at, as factors of the task's.

    Raises:
        ResultError: the file lacks one of the methods.
    """
    common: set[float] | None = None
    for method in task.forms:
        times = set()
        for row in rows:
            if row["step"] != row["steps"]:
                continue
            name, _, factor = row["method"].partition(AT_RATE)
            if row["method"] == method:
                times.add(1.0)
            elif name == method:
                times.add(float(factor))
        if not times:
            raise ResultError(f"{task.file} has no {method!r}; run it again")
        common = times if common is None else common & times
    return sorted(common or ())


def outcomes(task: Task, rows: Sequence[Row]) -> dict[str, Outcome]:
    """Return how the methods of a task ended, each at the best of the same rates.

    Raises:
        ResultError: see ``swept``; or they have ended at no rate alike.
    """
    best = max if task.accuracy else min
    rates = swept(task, rows)
    if not rates:
        raise ResultError(f"{task.file}: no rate that all methods have; run it again")
    found = {}
    for method in task.forms:
        at = [_outcome(task, rows, method, times) for times in rates]
        swept_with = set.intersection(*(set(outcome.figures) for outcome in at))
        found[method] = best(at, key=partial(_mean_of, seeds=swept_with))
    return found


def _mean_of(outcome: Outcome, seeds: Collection[str]) -> float:
    """Return the mean of some seeds: the best rate may have been given more."""
    return mean(outcome.figures[seed] for seed in seeds)


def _outcome(task: Task, rows: Sequence[Row], method: str, times: float) -> Outcome:
    column = "accuracy" if task.accuracy else "test_loss"
    name = at_rate(method, times)
    last = [r for r in rows if r["method"] == name and r["step"] == r["steps"]]
    sent = mean(int(row["sent_bytes"]) / int(row["steps"]) for row in last)
    return Outcome({r["seed"]: float(r[column]) for r in last}, sent, times)


def compared(
    mine: Mapping[str, float], base: Mapping[str, float], *, accuracy: bool
) -> str:
    """Return in words how a method stands to the baseline, by seeds that both have.

    Args:
        mine: the figure by seed.
        base: the baseline's.
        accuracy: whether they are accuracies, 0 to 1, not losses.
    """
    seeds = sorted(mine.keys() & base.keys())
    if not seeds:
        return "no common seed"
    pairs = [(mine[seed], base[seed]) for seed in seeds]
    if accuracy:
        apart = f"{100 * mean(a - b for a, b in pairs):+.2f} points"
    else:
        apart = f"{100 * mean(a / b - 1 for a, b in pairs):+.2f} %"
    if len(seeds) == 1:
        return f"{apart}; one seed"
    p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    higher = mean(a - b for a, b in pairs) > 0
    word = ("higher" if higher else "lower") if p < _SURE else "no clear difference"
    sure = "p < 0.01" if p < 0.01 else f"p = {p:.2f}"
    return f"{apart}: {word} ({sure}, {len(seeds)} seeds)"


def noise(base: Outcome) -> str:
    """Return the spread of the baseline's seeds, in per cent of their mean."""
    if len(base.figures) < 2:
        return "one seed"
    return f"{100 * stdev(base.figures.values()) / base.mean:.2f} %"


def table(task: Task, rows: Sequence[Row]) -> str:
    """Return one task's table as Markdown."""
    found = outcomes(task, rows)
    base = found[BASELINE]
    lines = []
    for method, form in task.forms.items():
        mine = found[method]
        fewer = base.bytes_per_step / mine.bytes_per_step
        figure = f"{100 * mine.mean:.2f} %" if task.accuracy else f"{mine.mean:.4f}"
        against = ""
        if method != BASELINE:
            against = compared(mine.figures, base.figures, accuracy=task.accuracy)
        lines.append([form, f"{fewer:.1f} ×", f"{fewer / 2:.1f} ×", figure, against])
    titles = [*TITLES, "accuracy" if task.accuracy else "loss", "against float32"]
    rates = swept(task, rows)
    if len(rates) > 1:
        titles.append("rate")
        for line, method in zip(lines, task.forms, strict=True):
            line.append(f"{found[method].times:g} ×")
    tried = ", ".join(f"{times:g}" for times in rates)
    said = f"Each at the best of the rates {tried} × the task's.\n"
    return (
        f"### {task.title}\n\n{grid(titles, lines, words=(0, 4))}\n\n"
        f"Noise (σ of float32's seeds): {noise(base)}.\n{said * (len(rates) > 1)}"
        f"{beside(task, found)}"
    )


def beside(task: Task, found: Mapping[str, Outcome]) -> str:
    """Return how lc3 stands to each rival at no more bytes; empty without rivals."""
    ours = [name for name, form in task.forms.items() if form.startswith("lc3")]
    lines = []
    for rival, form in task.forms.items():
        if rival == BASELINE or rival in ours:
            continue
        theirs = found[rival]
        sends_less = [
            name for name in ours if found[name].bytes_per_step <= theirs.bytes_per_step
        ]
        if not sends_less:
            lines.append([form, "none", "", "no form of lc3 here sends as little"])
            continue
        best = (max if task.accuracy else min)(sends_less, key=lambda n: found[n].mean)
        times = theirs.bytes_per_step / found[best].bytes_per_step
        apart = compared(found[best].figures, theirs.figures, accuracy=task.accuracy)
        lines.append([form, task.forms[best], f"{times:.1f} ×", apart])
    if not lines:
        return ""
    figure = "accuracy" if task.accuracy else "loss"
    titles = ("rival", f"best {figure} of lc3 at no more bytes", "fewer bytes")
    table = grid([*titles, f"{figure} against the rival"], lines, words=(0, 1, 3))
    return f"\n{table}\n"


def page(results: Path) -> str:
    """Return all tables as Markdown."""
    return "\n".join(table(task, read_csv(results / task.file)) for task in TASKS)


def short(results: Path) -> str:
    """Return README's table: what the documented lines do, nothing else changed."""
    rows = read_csv(results / "scripts.csv")

    def by_seed(script: str, form: str, column: str) -> dict[str, float]:
        mine = [r for r in rows if (r["script"], r["form"]) == (script, form)]
        return {row["seed"]: float(row[column]) for row in mine}

    lines = []
    for script, what in SCRIPTS.items():
        plain = by_seed(script, "plain", "score")
        for form in ("ddp", "local_sgd"):
            fewer = mean(by_seed(script, form, "ratio").values())
            against = compared(by_seed(script, form, "score"), plain, accuracy=False)
            lines.append(
                [what, f"`{form}`", f"{fewer:.0f} × ({fewer / 2:.0f} ×)", against]
            )
    titles = ["script", "lines", "fewer bytes than float32 (bfloat16)", "loss"]
    return grid(titles, lines, words=(0, 1, 3)) + "\n"


def presets(_: Path) -> str:
    """Return the presets' values as Markdown."""
    lines = []
    for name, preset in knobs.PRESETS.items():
        values = {
            "density": preset.settings.density,
            "entropy": preset.settings.entropy,
            **preset.knobs,
        }
        said = ", ".join(f"`{knob}={value!r}`" for knob, value in values.items())
        lines.append([f'`"{name}"`', preset.purpose, said])
    titles = ["preset", "for", "sets"]
    return grid(titles, lines, words=(0, 1, 2)) + "\n"


def command_line(_: Path) -> str:
    """Return what the commands say of themselves, 80 columns wide."""
    said = []
    for command in ([], *([name] for name in COMMANDS)):
        done = subprocess.run(
            [sys.executable, "-m", "lc3", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "80"},
        )
        said.append(f"```\n{done.stdout}```\n")
    return "\n".join(said)


def plot(results: Path, path: Path) -> None:
    """Draw the loss of lc3's forms and of its rivals against their bytes.

    Each at the best of the task's rates; a bar is the σ of its seeds.
    """
    (task,) = (one for one in TASKS if one.file.endswith(PICTURED))
    found = outcomes(task, read_csv(results / task.file))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, outcome in found.items():
        name = task.forms[method].replace("`", "")
        sent, figures = outcome.bytes_per_step / 1e3, outcome.figures.values()
        ours = name.startswith("lc3")
        axes.errorbar(
            sent,
            outcome.mean,
            yerr=stdev(figures) if len(figures) > 1 else None,
            fmt="o" if ours else "s",
            color="C0" if ours else "C7",
            capsize=3,
        )
        axes.annotate(
            name,
            (sent, outcome.mean),
            (0, -8 if ours else 8),
            textcoords="offset points",
            ha="center",
            va="top" if ours else "bottom",
            fontsize=8,
            color="C0" if ours else "0.3",
        )
    axes.set(xscale="log", xlabel="kB sent by a rank in a step", ylabel="test loss")
    axes.margins(x=0.2, y=0.14)
    figure.savefig(path, dpi=150)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "results": page,
    "short": short,
    "presets": presets,
    "help": command_line,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the blocks into pages that have their markers; print them without."""
    parser = argparse.ArgumentParser(
        prog="experiments.report.summary", description=__doc__
    )
    parser.add_argument("page", nargs="*", type=Path, help="Markdown with markers")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    options = parser.parse_args(arguments)
    if options.plot:
        plot(options.results, options.plot)
    blocks = {name: make(options.results) for name, make in BLOCKS.items()}
    if not options.page:
        print("\n".join(blocks.values()))
    for path in options.page:
        text = path.read_text()
        for name, block in blocks.items():
            if f"<!-- {name}:begin -->" in text:
                text = insert(text, name, block)
        path.write_text(text)


if __name__ == "__main__":
    main()
