"""Experiments from TOML: what is refused, what is kept, what a report says."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from experiments import record, tables
from experiments.harness import keep, run, train
from experiments.record import ResultError
from experiments.report import build as report
from tests import forked

ROOT = Path(__file__).parents[1]
GOOD = 'task = "digits"\nmethods = ["float32"]\nsteps = 20\n'
QUIET = Console(quiet=True)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an experiment fork its ranks."""
    popen = SimpleNamespace(Popen=forked.Job, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(run, "subprocess", popen)


def spec_of(tmp_path: Path, text: str) -> run.Spec:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return run.read_spec(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task = ", "cannot be read as TOML"),
        (GOOD + "step = 1\n", "'step'; an experiment has task, methods, steps"),
        (GOOD.replace("digits", "mnist"), "task 'mnist' is unknown; there are digits"),
        (GOOD.replace("float32", "4LC"), "method '4LC' is unknown; there are float32"),
        (GOOD.replace('["float32"]', "[]"), "is not a list of str, not empty"),
        (GOOD.replace("20", '"20"'), "steps = '20' is not a int"),
        (GOOD.replace("20", "0"), "steps = 0 must be 1 or more"),
        (GOOD + "averaged = 1\n", "averaged = 1 is not a bool"),
        (GOOD + "ranks = true\n", "ranks = True is not a int"),
        (GOOD + "ranks = 0\n", "ranks = 0 must be 1 or more"),
        (GOOD + "warm_up = 1.5\n", "warm_up = 1.5 must be 0 to 1"),
        (GOOD + "warm_up = nan\n", "warm_up = nan must be 0 to 1"),
        (GOOD + "evaluate_every = -1\n", "evaluate_every = -1 must be 0 or more"),
        (GOOD + 'rates = ["fast"]\n', "'fast' is not a rate"),
        (GOOD.replace("steps = 20", ""), "has no 'steps'"),
        (GOOD + "[seeds_of]\nDeMo = 2\n", "'DeMo', which is not trained; there are"),
    ],
)
def test_a_bad_description_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(run.SpecError, match=r"some\.toml") as caught:
        spec_of(tmp_path, text)
    assert words in str(caught.value)


def test_every_committed_description_can_be_read() -> None:
    found = sorted((ROOT / "experiments/configs").glob("*.toml"))
    assert len(found) >= 4
    for path in found:
        assert run.read_spec(path).trainings()


def test_every_method_is_trained_at_every_rate() -> None:
    spec = run.Spec("x", "digits", ["float32", "DeMo"], 8, learning_rates=[0.5, 1.0])
    assert [training.method for training in spec.trainings()] == [
        *("float32, lr × 0.5", "float32", "DeMo, lr × 0.5", "DeMo"),
    ]
    spec.seeds_of["DeMo, lr × 0.5"] = 2  # this rate, and no other
    more = [(one.method, one.seed) for one in spec.trainings()][4:]
    assert more == [("DeMo, lr × 0.5", 1)]


def test_a_folder_of_another_experiment_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run.prepare(spec_of(tmp_path, GOOD), folder)
    old = json.loads((folder / "spec.json").read_text())
    del old["evaluate_every"], old["warm_up"]  # as written before there were any
    (folder / "spec.json").write_text(json.dumps(old))
    run.prepare(spec_of(tmp_path, GOOD + "seeds = 2\n"), folder)
    before = (folder / "spec.json").read_text()
    with pytest.raises(run.SpecError, match=r"holds runs with steps = 20.*says 40"):
        run.prepare(spec_of(tmp_path, GOOD.replace("20", "40")), folder)
    with pytest.raises(run.SpecError, match="evaluate_every = 0, the file says 7"):
        run.prepare(spec_of(tmp_path, GOOD + "evaluate_every = 7\n"), folder)
    with pytest.raises(run.SpecError, match=r"warm_up = 0\.05, the file says 0\.2"):
        run.prepare(spec_of(tmp_path, GOOD + "warm_up = 0.2\n"), folder)
    assert (folder / "spec.json").read_text() == before


def test_rows_of_an_older_version_are_joined(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GOOD.replace('"float32"', '"float32", "bf16"'))
    older, newer = (training.kept(tmp_path) for training in spec.trainings())
    record.write_csv(older, [{"method": "float32", "step": 1}])
    record.write_csv(newer, [{"method": "bf16", "warm_up": 0.05, "step": 1}])
    assert run.run(spec, tmp_path, None, QUIET) == []
    assert record.read_csv(tmp_path / "results.csv") == [
        {"method": "float32", "step": "1", "warm_up": ""},
        {"method": "bf16", "step": "1", "warm_up": "0.05"},
    ]


def test_what_the_task_s_file_has_is_not_trained_again(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GOOD.replace('"float32"', '"float32", "bf16"'))
    first, other = spec.trainings()
    folder = tmp_path / spec.name
    row = dict.fromkeys((*tables.COLUMNS, "rate"), "1") | {
        "task": spec.task,
        "method": "float32",
        "rate": first.rate,
        "seed": str(first.seed),
        "steps": str(spec.steps),
    }
    record.write_csv(first.kept(folder), [row])
    keep.main([str(folder), "--out", str(tmp_path)])
    new = tmp_path / "new"
    assert run.take_from(spec, tmp_path, new) == 1
    assert run.take_from(spec, tmp_path, new) == 0
    (found,) = record.read_csv(first.kept(new))
    assert {name: found[name] for name in row} == row
    assert not other.kept(new).exists()
    assert run.take_from(replace(spec, name="another"), tmp_path, tmp_path / "n") == 0
    assert run.take_from(replace(spec, steps=21), tmp_path, tmp_path / "n") == 0
    with pytest.raises(SystemExit):
        keep.main([str(tmp_path / "n")])


@pytest.mark.usefixtures("forks")
def test_a_stopped_experiment_goes_on(tmp_path: Path) -> None:
    """Killed after the first method; the second start trains the second only."""
    text = GOOD.replace('"float32"', '"float32", "3LC s=1.00"').replace("20", "100")
    spec = spec_of(tmp_path, text)
    folder = tmp_path / "out" / "some"
    arguments = [str(tmp_path / "some.toml"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "experiments.harness.run", *arguments]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    kept = spec.trainings()[0].kept(folder)
    deadline = time.monotonic() + 90
    while not kept.exists():
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    assert first.wait(30) in (0, 130)  # 0: it had ended already
    before = kept.stat().st_mtime_ns
    assert run.main(arguments) == 0
    assert kept.stat().st_mtime_ns == before
    rows = record.read_csv(folder / "results.csv", tables.COLUMNS)
    assert {row["method"] for row in rows} == {"float32", "3LC s=1.00"}
    assert not list(folder.glob("running*"))
    page = tmp_path / "page"
    report.main([str(folder / "results.csv"), "--page", str(page)])
    html, text = (page / "index.html").read_text(), (page / "report.md").read_text()
    assert html.count("data:image/png;base64,") == 3
    for title in ("Comparison", "Time of a step", "Speed-up"):
        assert f"<h2>{title}</h2>" in html
        assert f"## {title}\n" in text


@pytest.mark.usefixtures("forks")
def test_an_experiment_says_when_it_evaluates(tmp_path: Path) -> None:
    text = GOOD + "warm_up = 0.5\nevaluate_every = 8\naveraged = true\n"
    spec = spec_of(tmp_path, text)
    run.prepare(spec, tmp_path / "out")
    assert run.run(spec, tmp_path / "out", None, QUIET) == []
    rows = record.read_csv(tmp_path / "out" / "results.csv")
    assert [row["step"] for row in rows] == 2 * ["8", "16", "20"]
    assert {row["warm_up"] for row in rows} == {"0.5"}
    assert [row["method"] for row in rows[2:4]] == ["float32", "float32, averaged"]
    assert "20 steps, 50 % of them warm-up, mean of 1 seed" in tables.caption(rows)


@pytest.mark.usefixtures("forks")
def test_a_failing_method_leaves_the_others(tmp_path: Path) -> None:
    """Local steps end apart unless their number is a multiple of H."""
    methods = '"float32", "local H=16", "3LC s=1.00"'
    spec = spec_of(tmp_path, GOOD.replace('"float32"', methods))
    run.prepare(spec, tmp_path / "out")
    failed = run.run(spec, tmp_path / "out", None, QUIET)
    assert [training.method for training in failed] == ["local H=16"]
    (log,) = (tmp_path / "out").glob("*.log")
    line = "experiments.harness.train: 'local H=16' exchanges every 16 steps, so ranks"
    assert (
        f"\n{line} would end apart after 20; give a multiple of 16\n" in log.read_text()
    )
    assert "StepsError" not in log.read_text()
    assert "exchanges every 16 steps" in log.read_text()
    rows = record.read_csv(tmp_path / "out" / "results.csv")
    assert {row["method"] for row in rows} == {"float32", "3LC s=1.00"}


def test_result_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = record.read_csv(ROOT / "experiments/results/digits.csv")
    for content, words in (
        (b"", "empty, or was cut off"),
        (b"a,b\n1\n", "empty, or was cut off"),
        (b"\x89PNG\xff\xfe", "is not a result file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ResultError, match=words):
            record.read_csv(path)
    with pytest.raises(ResultError, match="is not a result file"):
        record.read_csv(tmp_path / "none.csv")
    old = [{k: v for k, v in row.items() if k != "frame_bits"} for row in rows]
    record.write_csv(path, old)
    with pytest.raises(
        ResultError, match=r"no column 'frame_bits': it is of lc3 0.1.0"
    ):
        record.read_csv(path, tables.COLUMNS)
    with pytest.raises(SystemExit):
        report.main([str(path)])


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk's."""
    path = tmp_path / "a.csv"
    record.write_csv(path, [{"a": 1}])
    before = path.read_bytes()
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        try:
            record.write_csv(path, [{"a": "x" * 4096}])
        except ResultError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    said = os.read(reader, 4096).decode()
    os.close(reader)
    assert "could not be written" in said
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_a_gpu_that_is_not_there_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, reason in (
        (["--device", "cuda"], "there is no GPU that torch can use; say cpu"),
        (["--device", "tpu"], "'tpu' is neither cpu nor cuda"),
    ):
        with pytest.raises(SystemExit):
            train.parse(["--out", "x.csv", *arguments])
        assert reason in capsys.readouterr().err


def test_trainings_are_added_to_an_experiment_or_take_its_place() -> None:
    def row(method: str, seed: str, loss: str) -> dict[str, str]:
        return {"method": method, "seed": seed, "rate": "", "test_loss": loss}

    old = [
        {"experiment": name, **row(method, "0", "1.0")}
        for name, method in (("a", "float32"), ("a", "3LC s=1.00"), ("b", "float32"))
    ]
    new = [row("3LC s=1.00", "0", "2.0"), row("3LC s=1.00", "1", "3.0")]
    of_a = [("3LC s=1.00", "2.0"), ("3LC s=1.00", "3.0")]
    for add, first in ((False, []), (True, [("float32", "1.0")])):
        kept = keep.together(old, new, "a", add=add)
        found = [(r["method"], r["test_loss"]) for r in kept if r["experiment"] == "a"]
        assert found == [*first, *of_a]
        assert [r["method"] for r in kept if r["experiment"] == "b"] == ["float32"]
