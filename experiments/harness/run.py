"""Runs an experiment that a TOML file describes, and goes on where it was stopped.

    python -m experiments.harness.run experiments/configs/links.toml
    python -m experiments.harness.run --go-on experiments/configs/one-pass.toml

The second trains only what the committed results lack (``experiments.harness.keep``).
Each seed at each link rate is a job that trains every method; a method's rows are kept
as soon as it has ended. With rates, every rank is a host of a network lab
(``experiments.lab.netlab``, as root); without root the job runs over loopback instead,
and the run says so.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.average import AVERAGED
from experiments.harness.methods import AT_RATE, find
from experiments.harness.tasks import TASKS
from experiments.harness.train import WARM_UP, add_device_option
from experiments.lab import netlab
from experiments.record import (
    EXPERIMENT,
    RESULTS,
    ResultError,
    read_csv,
    read_whole,
    write_csv,
)
from experiments.tables import Row

LOOPBACK = ""  # the rate of a job that runs without a lab
_LOG_LINES = 15
_POLL_S = 0.5


class SpecError(Exception):
    """An experiment's description that cannot be run, and why."""


@dataclass(frozen=True)
class Spec:
    """One experiment, as its TOML file describes it.

    Attributes:
        name: name of the file, without its ending.
        task: the task that is trained.
        methods: methods that are compared.
        steps: steps of each training.
        warm_up: share of them in which the learning rate rises, 0 to 1.
        seeds: how many, from 0 up.
        ranks: number of ranks of each job; with rates, hosts of one rank each.
        rates: rates of the links, as ``tc`` writes them; none: over loopback.
        seeds_of: number of seeds by method and rate, "float32, lr × 2", instead of
            ``seeds``: rates are swept with one, and the best of them has more.
        evaluate_every: steps between evaluations; 0: a tenth of all.
        averaged: whether a moving average of the parameters is evaluated, too.
        learning_rates: factors of the task's rate that every method is trained at.
    """

    name: str
    task: str
    methods: list[str]
    steps: int
    warm_up: float = WARM_UP
    seeds: int = 1
    ranks: int = 2
    rates: list[str] = field(default_factory=list)
    seeds_of: dict[str, int] = field(default_factory=dict)
    evaluate_every: int = 0
    averaged: bool = False
    learning_rates: list[float] = field(default_factory=list)

    def trainings(self) -> "list[Training]":
        """Return all trainings, job after job, seed after seed."""
        most = max(self.seeds, *self.seeds_of.values(), 1)
        return [
            Training(name, seed, rate)
            for seed in range(most)
            for rate in self.rates or [LOOPBACK]
            for name in self.names()
            if seed < self.seeds_of.get(name, self.seeds)
        ]

    def names(self) -> list[str]:
        """Return the methods, each at every learning rate."""
        rates = self.learning_rates or [1.0]
        return [at_rate(method, times) for method in self.methods for times in rates]


def at_rate(method: str, times: float) -> str:
    """Return the name of a method at a multiple of the task's learning rate."""
    return method if times == 1 else f"{method}{AT_RATE}{times:g}"


@dataclass(frozen=True)
class Training:
    """One method, one seed, one rate."""

    method: str
    seed: int
    rate: str

    def kept(self, folder: Path) -> Path:
        """Return the file with its rows."""
        method = "".join(c if c.isalnum() or c in "=.-" else "_" for c in self.method)
        return folder / f"{method}.{self.rate or 'loopback'}.{self.seed}.csv"


def read_spec(path: Path) -> Spec:
    """Return the experiment that a TOML file describes.

    Raises:
        SpecError: it is not there, is no TOML, or has an unknown or a bad value.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path} cannot be read as TOML: {error}") from error
    known = [f.name for f in fields(Spec) if f.name != "name"]
    for key in given:
        if key not in known:
            raise SpecError(f"{path} has {key!r}; an experiment has {', '.join(known)}")
    for key in ("task", "methods", "steps"):
        if key not in given:
            raise SpecError(f"{path} has no {key!r}")
    _check_types(path, given)
    spec = Spec(name=path.stem, **given)
    if spec.task not in TASKS:
        raise SpecError(
            f"{path}: task {spec.task!r} is unknown; there are {', '.join(TASKS)}"
        )
    for method in [*spec.methods, *spec.seeds_of]:
        try:
            find(method)
        except KeyError as error:
            raise SpecError(f"{path}: {error.args[0]}") from error
    for name in spec.seeds_of:
        if name not in spec.names():
            raise SpecError(
                f"{path}: seeds_of has {name!r}, which is not trained; there are "
                f"{', '.join(map(repr, spec.names()))}"
            )
    lowest = {"steps": 1, "seeds": 1, "ranks": 1, "evaluate_every": 0}
    for key, low in lowest.items():
        if getattr(spec, key) < low:
            raise SpecError(
                f"{path}: {key} = {getattr(spec, key)} must be {low} or more"
            )
    if not 0 <= spec.warm_up <= 1:
        raise SpecError(f"{path}: warm_up = {spec.warm_up} must be 0 to 1, a share")
    for times in spec.learning_rates:
        if not 0 < times < math.inf:
            raise SpecError(f"{path}: learning_rates has {times}; it must be above 0")
    for rate in spec.rates:
        try:
            netlab.rate_bits(rate)
        except ValueError as error:
            raise SpecError(f"{path}: {error}") from error
    return spec


def _check_types(path: Path, given: dict[str, object]) -> None:
    kinds: dict[str, tuple[type, type | None]] = {
        "task": (str, None),
        "methods": (list, str),
        "steps": (int, None),
        "warm_up": (float, None),
        "seeds": (int, None),
        "ranks": (int, None),
        "rates": (list, str),
        "seeds_of": (dict, int),
        "evaluate_every": (int, None),
        "averaged": (bool, None),
        "learning_rates": (list, float),
    }
    for key, value in given.items():
        kind, inner = kinds[key]
        items = list(value.values()) if isinstance(value, dict) else value
        good = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if good and inner is not None:
            assert isinstance(items, list)
            good = bool(items) and all(isinstance(item, inner) for item in items)
        if not good:
            of = f" of {inner.__name__}, not empty" if inner else ""
            raise SpecError(f"{path}: {key} = {value!r} is not a {kind.__name__}{of}")


def command(
    spec: Spec,
    job: Sequence[Training],
    data_dir: Path | None,
    device: str,
    out: Path,
) -> list[str]:
    """Return the command line of a job that writes its rows to ``out``."""
    seed, rate = job[0].seed, job[0].rate
    training = ["-m", "experiments.harness.train", "--task", spec.task]
    training += ["--methods", *(t.method for t in job), "--steps", str(spec.steps)]
    training += ["--warm-up", str(spec.warm_up)]
    training += ["--seeds", "1", "--first-seed", str(seed), "--out", str(out)]
    training += ["--data-dir", str(data_dir)] if data_dir else []
    if spec.evaluate_every:
        training += ["--evaluate-every", str(spec.evaluate_every)]
    training += ["--averaged"] if spec.averaged else []
    training += ["--device", device]
    if rate == LOOPBACK:
        start = ["torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(spec.ranks)]
    else:
        start = [
            "experiments.lab.netlab",
            "--hosts",
            str(spec.ranks),
            "--rate",
            rate,
            "--",
        ]
    return [sys.executable, "-m", *start, *training]


def run_job(
    spec: Spec,
    job: Sequence[Training],
    data_dir: Path | None,
    device: str,
    folder: Path,
    ended: Callable[[int], None],
) -> str | None:
    """Train the methods of a job, until all have ended or one fails.

    Args:
        spec: the experiment.
        job: trainings of one seed and rate.
        data_dir: folder of the task's data.
        device: cpu or cuda.
        folder: folder of the rows, each training's as soon as it has ended.
        ended: function that is told how many trainings have ended.

    Returns:
        ``None``, or how the first training without rows failed.
    """
    out, log = folder / "running.csv", folder / "running.log"
    out.unlink(missing_ok=True)
    threads = max(1, (os.cpu_count() or 1) // spec.ranks)
    with log.open("w") as file:
        process = subprocess.Popen(
            command(spec, job, data_dir, device, out),
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            cwd=RESULTS.parents[1],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                ended(_keep(job, out, folder))
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            ended(_keep(job, out, folder))
    if not process.returncode:
        log.unlink()
        return None
    tail = "\n".join(log.read_text().splitlines()[-_LOG_LINES:])
    return f"exit status {process.returncode}\n{tail}"


def _keep(job: Sequence[Training], out: Path, folder: Path) -> int:
    """Keep the rows of trainings that have ended; return how many have."""
    return keep_rows(job, read_csv(out) if out.exists() else [], folder)


def keep_rows(job: Sequence[Training], rows: Sequence[Row], folder: Path) -> int:
    """Keep those of ``rows`` that are of trainings of one seed and rate.

    Returns:
        Of how many trainings there are rows.
    """
    done = 0
    for training in job:
        names = training.method, training.method + AVERAGED
        mine = [row for row in rows if row["method"] in names]
        if mine:
            done += 1
            kept = training.kept(folder)
            if not kept.exists():
                write_csv(kept, [{"rate": training.rate, **row} for row in mine])
    return done


def take_from(spec: Spec, results: Path, folder: Path) -> int:
    """Take trainings that the task's result file has, so that they are not run again.

    Args:
        spec: the experiment.
        results: folder of result files, one for each task (``harness.keep``).
        folder: folder of the experiment's rows.

    Returns:
        How many were taken.

    Raises:
        ResultError: there is a file that is no result file.
    """
    file = results / f"{spec.task}.csv"
    if not file.exists():
        return 0
    rows = [row for row in read_whole(file) if row[EXPERIMENT] == spec.name]
    taken = 0
    for training in spec.trainings():
        mine = [
            {name: value for name, value in row.items() if name != EXPERIMENT}
            for row in rows
            if (row["seed"], row.get("rate", "")) == (str(training.seed), training.rate)
            and row["steps"] == str(spec.steps)
        ]
        if not training.kept(folder).exists():
            taken += keep_rows([training], mine, folder)
    return taken


def prepare(spec: Spec, folder: Path) -> None:
    """Make the experiment's folder, or see that it is this experiment's.

    Raises:
        SpecError: it holds rows of another description.
    """
    described = folder / "spec.json"
    text = json.dumps(asdict(spec), indent=1)
    if described.exists():
        new = json.loads(text)
        old = {**asdict(Spec("", "", [], 0)), **json.loads(described.read_text())}
        for key in new:
            # More seeds, methods or rates only add jobs.
            if key in ("seeds", "seeds_of", "methods", "rates", "learning_rates"):
                continue
            if old[key] != new[key]:
                raise SpecError(
                    f"{folder} holds runs with {key} = {old[key]!r}, the file says "
                    f"{new[key]!r}; give another --out or remove the folder"
                )
    folder.mkdir(parents=True, exist_ok=True)
    described.write_text(text)


def run(
    spec: Spec,
    folder: Path,
    data_dir: Path | None,
    console: Console,
    device: str = "cpu",
) -> list[Training]:
    """Train what is not there yet and join all rows; return what failed."""
    trainings = spec.trainings()
    failed: list[Training] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(spec.name, total=len(trainings))
        for seed, rate in dict.fromkeys((t.seed, t.rate) for t in trainings):
            while job := [
                t
                for t in trainings
                if (t.seed, t.rate) == (seed, rate)
                and t not in failed
                and not t.kept(folder).exists()
            ]:
                progress.update(
                    bar, description=f"{spec.name}: seed {seed}, {rate or 'loopback'}"
                )
                before = len(trainings) - _missing(trainings, failed, folder)

                def ended(count: int, before: int = before) -> None:
                    progress.update(bar, completed=before + count)

                why = run_job(spec, job, data_dir, device, folder, ended)
                if why is not None:
                    bad = next(t for t in job if not t.kept(folder).exists())
                    failed.append(bad)
                    log = bad.kept(folder).with_suffix(".log")
                    (folder / "running.log").replace(log)
                    console.print(f"{bad.method}, seed {seed}, {rate} failed: {why}")
                    console.print(f"all of its output is in {log}")
    (folder / "running.csv").unlink(missing_ok=True)
    rows: list[dict[str, str]] = []
    for training in trainings:
        if training not in failed:
            rows += read_csv(training.kept(folder))
    if rows:
        # Rows of an older version lack what it did not record.
        names = dict.fromkeys(name for row in rows for name in row)
        whole = [{name: row.get(name, "") for name in names} for row in rows]
        write_csv(folder / "results.csv", whole)
    return failed


def _missing(
    trainings: Sequence[Training], failed: Sequence[Training], folder: Path
) -> int:
    return sum(t not in failed and not t.kept(folder).exists() for t in trainings)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line, with ``specs`` read; a bad one ends the program."""
    parser = argparse.ArgumentParser(
        prog="experiments.harness.run", description=__doc__
    )
    parser.add_argument("toml", nargs="+", type=Path, help="one file per experiment")
    parser.add_argument("--data-dir", type=Path, help="where the task's data is")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "local", help="a folder per experiment"
    )
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="train only what the committed results lack",
    )
    add_device_option(parser)
    options = parser.parse_args(arguments)
    try:
        options.specs = [read_spec(path) for path in options.toml]
        for spec in options.specs:
            prepare(spec, options.out / spec.name)
            if options.go_on:
                take_from(spec, RESULTS, options.out / spec.name)
    except (SpecError, ResultError) as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every experiment; 1 if some job failed, after all the others."""
    options = parse(arguments)
    console = Console(highlight=False, soft_wrap=True)
    failed = 0
    for spec in options.specs:
        folder = options.out / spec.name
        if spec.rates and (reason := netlab.missing()):
            console.print(f"{spec.name}: {reason}. Running over loopback instead:")
            console.print("step times at each rate are then computed, not measured")
            spec = Spec(**{**asdict(spec), "rates": []})
        data_dir = options.data_dir.resolve() if options.data_dir else None
        try:
            failures = run(spec, folder, data_dir, console, options.device)
        except KeyboardInterrupt:
            console.print("stopped; what has ended is kept, the same command goes on")
            return 130
        failed += len(failures)
        console.print(f"{spec.name}: {folder / 'results.csv'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
