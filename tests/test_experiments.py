"""What the README shows and says is what the code does."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from experiments import (
    allocation,
    alpha_beta,
    bench_codec,
    bench_step,
    demo,
    frontier,
    local_delay,
    local_variants,
    methods,
    pages,
    paper,
    record,
    replica_distance,
    report,
    scale,
    train,
)
from experiments.average import Average
from experiments.methods import DEMO
from experiments.report import BASELINE
from lc3 import knobs
from tests.method_kinds import KINDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULT = record.read_csv(ROOT / "experiments/results/digits.csv")


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program on two ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_the_readmes_script_trains(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    done = torchrun("train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss ([\d.]+), (\d+) times fewer bytes", done.stdout)
    assert found is not None
    assert float(found[1]) < 2
    assert int(found[2]) > 10
    assert {p.name for p in tmp_path.glob("*.pt")} == {
        "checkpoint.pt",
        "lc3-rank0.pt",
        "lc3-rank1.pt",
    }


def test_the_docs_tables_are_the_committed_results() -> None:
    docs = (ROOT / "docs/codec.md").read_text()
    speed, entropy = (
        record.read_csv(ROOT / f"experiments/results/{name}.csv")
        for name in ("codec", "entropy")
    )
    said = bench_codec.speed_table(speed) + bench_codec.caption(speed)
    assert report.insert(docs, "speed", said) == docs
    said = bench_codec.entropy_table(entropy) + bench_codec.caption(entropy)
    assert report.insert(docs, "entropy", said) == docs
    said = bench_codec.range_table(entropy) + bench_codec.caption(entropy)
    assert report.insert(docs, "range", said) == docs


def test_what_is_said_of_the_range_coder_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/entropy.csv")
    dense: list[float] = []
    sparse: list[float] = []
    for row in rows:
        less = 100 * (1 - float(row["rans_bits"]) / float(row["zstd1_bits"]))
        (dense if float(row["density"]) >= 0.02 else sparse).append(less)
        longer = float(row["rans_ms"]) - float(row["stage_ms"])
        saved = (float(row["zstd1_bits"]) - float(row["rans_bits"])) * int(row["numel"])
        assert 10 < saved / longer / 1e3 < 60
    assert (round(min(dense)), round(max(dense))) == (9, 13)
    assert (round(min(sparse)), round(max(sparse))) == (18, 44)
    changes = (ROOT / "CHANGELOG.md").read_text()
    for page in (README, changes):
        assert "9 to 13 %" in page
        assert "18 to 44 %" in page
    docs = (ROOT / "docs/codec.md").read_text()
    speeds = [float(row["zstd_encode_gb_s"]) for row in rows]
    assert f"{min(speeds):.0f} to {max(speeds):.0f} GB/s of float32" in docs
    shares = [100 * float(row["stage_ms"]) / float(row["codec_ms"]) for row in rows]
    assert f"takes {min(shares):.0f} to {max(shares):.0f} % of" in docs


def test_no_figure_is_cut_off_in_a_terminal_of_80_columns() -> None:
    rows = record.read_csv(ROOT / "experiments/results/cifar10-longer.csv")
    out = io.StringIO()
    report.print_table(rows, Console(file=out, width=80))
    assert "1,078,888" in out.getvalue()
    assert "…" not in out.getvalue()


def test_the_readmes_table_is_the_committed_result() -> None:
    assert report.insert(README, "digits", report.markdown(RESULT)) == README


def test_the_committed_result_keeps_what_the_demo_promises() -> None:
    """s = 1 within 0.5 points of plain DDP, 15 times fewer bytes in coded tensors."""
    of = {summary.method: summary for summary in report.summarise(RESULT)}
    assert set(of) == set(DEMO)
    plain, coded = of["float32"], of["3LC s=1.00"]
    assert len({row["seed"] for row in RESULT}) == 3
    assert coded.accuracy >= plain.accuracy - 0.005
    assert 64 / (coded.push_bits + coded.pull_bits) >= 15


def test_every_kind_of_method_trains_and_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv"
    arguments = ["--steps", "32", "--seeds", "1", "--out", str(path)]
    slower = "float32, lr × 0.5"
    arguments += ["--methods", *KINDS, slower]
    done = torchrun("-m", "experiments.train", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = record.read_csv(path)
    last = {row["method"]: row for row in rows if row["step"] == "32"}
    assert list(last) == [*KINDS, slower]
    assert last[slower]["sent_bytes"] == last["float32"]["sent_bytes"]
    assert float(last[slower]["loss"]) > float(last["float32"]["loss"])
    sent = {method: int(row["sent_bytes"]) for method, row in last.items()}
    assert sent["float32"] == 2 * sent["fp16"] == 32 * 4 * 151_306
    ratio = {method: sent["float32"] / sent[method] for method in KINDS}
    assert sent["bf16"] == sent["fp16"]
    assert 3.7 < ratio["8-bit int"] < 4  # 8 bits of 32, headers, raw biases
    assert 17 < ratio["Stoch 3-value + QE"] < 20  # 1.6 bits
    assert 25 < ratio["MQE 1-bit int"] < 32
    assert 3.2 < ratio["25% sparsification"] < 32 / 9
    assert 10 < ratio["5% sparsification"] < 32 / 2.6
    assert 35 < ratio["top-k 1%"] < 50
    assert ratio["PowerSGD rank 4"] < ratio["PowerSGD rank 1"]
    assert sent["3LC s=1.00, rans"] < 0.95 * sent["3LC s=1.00"]
    assert sent["3LC s=1.75, rans"] < 0.95 * sent["3LC s=1.75"]
    assert sent["3LC s=1.90"] < sent["3LC s=1.00"] < sent["fp16"] / 15
    for row in last.values():
        assert {"commit", "torch", "numba", "machine", "seed"} <= set(row)
        assert 0 <= float(row["accuracy"]) <= 1
    report.plot(rows, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_an_average_is_of_the_last_tenth_and_leaves_the_model_alone() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    average = Average(module)
    expected = 0.0
    for count in range(1, 30):
        module.weight.data.fill_(float(count**2))
        average.update()
        expected += (count**2 - expected) * 9 / (count + 8)
    module.weight.data.fill_(-1.0)
    with average.in_place():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == -1


@pytest.mark.parametrize(
    ("warm_up", "rates"),
    [
        (0.0, [1.0, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464]),
        (0.5, [0.25, 0.5, 0.75, 1.0, 1.0, 0.9045, 0.6545, 0.3455]),
        (1.0, [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]),
    ],
)
def test_the_rate_rises_and_falls(warm_up: float, rates: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = train.schedule(optimizer, 8, warm_up)
    found = []
    for _ in range(8):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates, abs=1e-4)


@pytest.mark.parametrize("text", ["-0.1", "1.01", "nan", "a fifth"])
def test_a_warm_up_is_a_share(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--warm-up", text, "--out", "x.csv"])
    assert f"{text!r} is not a share, 0 to 1" in capsys.readouterr().err


def test_rows_of_an_average_stand_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv"
    arguments = ["--steps", "32", "--seeds", "1", "--evaluate-every", "12"]
    arguments += ["--averaged", "--methods", "float32", "local H=8"]
    done = torchrun(
        *("-m", "experiments.train", *arguments, "--out", str(path)), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = record.read_csv(path)
    by_method: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    assert [*by_method] == [
        *("float32", "float32, averaged"),
        *("local H=8", "local H=8, averaged"),
    ]
    for name in ("float32", "local H=8"):
        both = zip(by_method[name], by_method[f"{name}, averaged"], strict=True)
        next(both)  # local steps' average is one exchange's value there
        for plain, averaged in both:
            differing = {key for key in plain if plain[key] != averaged[key]}
            assert {"method", "test_loss"} <= differing
            assert differing <= {"method", "test_loss", "accuracy"}
    for name in by_method:
        assert f"{name:12} seed 0: test accuracy" in done.stdout
    steps = [row["step"] for row in by_method["local H=8"]]
    assert steps == ["12", "24", "32"]


def test_a_rank_may_go_on_from_its_own_model() -> None:
    """What is owed then is in the model, and nowhere else."""
    flat = {"raw": torch.full((2,), 9.0), "coded": torch.full((2,), 9.0)}
    residual = torch.tensor([0.5, -1.0])
    state = SimpleNamespace(
        _model=SimpleNamespace(flats=lambda: flat),
        _watch=SimpleNamespace(),
        owners=SimpleNamespace(replica={n: torch.tensor([1.0, 2.0]) for n in flat}),
        engine=SimpleNamespace(residuals=SimpleNamespace(sent={"coded": residual})),
    )
    local_variants.go_on_from_own(state)  # type: ignore[arg-type]
    state._copy_replica()
    assert flat["raw"].tolist() == [1, 2]
    assert flat["coded"].tolist() == [0.5, 3]
    assert residual.tolist() == [0, 0]


def test_variants_refuse_a_file_of_other_columns_before_they_train(
    tmp_path: Path,
) -> None:
    path = tmp_path / "old.csv"
    path.write_text("task,every,lc3\nchars,8,0.1.0\n")
    with pytest.raises(SystemExit, match="has no column 'lr': it is of lc3"):
        local_variants.main(["--task", "digits", "--out", str(path)])
    assert path.read_text() == "task,every,lc3\nchars,8,0.1.0\n"


def test_first_moments_are_averaged_before_they_decay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    momentum = optimizer.state[weight]["momentum_buffer"]
    seen: list[list[float]] = []
    state = SimpleNamespace(_decay_momenta=lambda: seen.append(momentum.tolist()))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t: t.add_(1))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    local_variants.average_moments(state, [optimizer])  # type: ignore[arg-type]
    state._decay_momenta()
    assert momentum.tolist() == [1, 1.5]
    assert seen == [[1, 1.5]]


def test_the_command_of_variants_prints_what_it_ends_with(tmp_path: Path) -> None:
    path = tmp_path / "variants.csv"
    arguments = ["--task", "digits", "--steps", "8", "--every", "4", "--extra", "1"]
    done = torchrun(
        *("-m", "experiments.local_variants", *arguments),
        *("--own", "--average", "--all-coded", "--out", str(path)),
        *("--momentum-decay", "0.5", "--outer-lr", "1.5", "--lr", "2"),
        *("--residual-decay", "0.8"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    rows = record.read_csv(path)
    assert [
        f"{row['extra']} exchanges after training: loss {float(row['test_loss']):.4f}, "
        f"{float(row['fewer']):.0f} × fewer"
        for row in rows
    ] == done.stdout.splitlines()
    said = "| all coded, own model, first moments averaged, lr × 2.0, residuals × 0.8, "
    said += "first moments × 0.5, outer rate 1.5"
    assert local_variants.table(path).count(said) == 2
    assert "2 ranks, 8 steps, 5 % of them warm-up, seed 0" in local_variants.table(path)
    assert float(rows[1]["fewer"]) < float(rows[0]["fewer"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "'0' is not an integer of at least 1"),
        (["--seeds", "x"], "'x' is not an integer of at least 1"),
        (["--methods", "4LC"], "method '4LC' is unknown; there are float32, fp16"),
        (["--methods", "fp16, lr × 0"], "method 'fp16, lr × 0' is unknown"),
        (["--methods", "fp16, lr × one"], "'float32, lr × 0.5', with half the"),
        (["--task", "mnist"], "invalid choice: 'mnist'"),
        (["--ranks", "1"], "'1' is not an integer of at least 2"),
    ],
)
def test_the_demo_refuses_bad_arguments(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_the_demo_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--task", "chars", "--data-dir", "/data", "--methods", "fp16", "bf16"]
    options += ["--steps", "7", "--warm-up", "0.3", "--evaluate-every", "2"]
    options += ["--averaged", "--seeds", "4", "--first-seed", "5"]
    started: list[list[str]] = []

    def start(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(demo.subprocess, "run", start)
    monkeypatch.setattr(sys, "argv", ["demo", *options, "--out", "/out"])
    assert demo.main() == 3
    (command,) = started
    passed = command[command.index("experiments.train") + 1 :]
    expected = train.parse([*options, "--out", "/out/chars.csv"])
    assert train.parse(passed) == expected
    assert all(
        value != train.parse(["--out", "/o"]).__dict__[name]
        for name, value in vars(expected).items()
        if name != "device"
    )


def test_a_result_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    record.write_csv(path, [{"a": 1}])
    before = path.read_text()
    for bad in ([], [{"a": 1}, {"b": 2}]):
        with pytest.raises(ValueError, match=r"no rows|columns"):
            record.write_csv(path, bad)
        assert path.read_text() == before


@pytest.mark.parametrize(
    "text", ["", "<!-- x:begin -->\n", "<!-- x:end --><!-- x:begin -->\n"]
)
def test_insert_needs_its_markers(text: str) -> None:
    with pytest.raises(ValueError, match="x:end"):
        report.insert(text, "x", "")


DOCS = (ROOT / "docs/results.md").read_text()
FRONTIERS = [  # result file, marker in the docs
    ("chars-muon-longer", "chars-muon-longer"),
    ("chars-muon-longer-warm-up", "chars-muon-longer-warm-up"),
    ("chars-longer", "chars-longer-frontier"),
    ("chars-longer-warm-up", "chars-longer-warm-up"),
    ("chars-muon-rates", "chars-muon-rates"),
    ("chars-muon-longest", "chars-muon-longest"),
    ("chars-large", "chars-large"),
    ("chars-large-longer", "chars-large-longer"),
    ("chars-large-warm-up", "chars-large-warm-up"),
    ("chars-large-epochs", "chars-large-epochs"),
    ("chars-epochs", "chars-epochs"),
    ("chars-muon-large", "chars-muon-large"),
    ("chars-frontier", "chars-frontier"),
    ("chars-warm-up", "chars-warm-up"),
    ("cifar10", "cifar10-frontier"),
    ("chars-two", "chars-two"),
    ("quantizer-chars", "quantizer-chars"),
]


@pytest.mark.parametrize(
    "name",
    [
        "chars-longer",
        "chars-muon",
        "cifar10",
        "cifar10-longer",
        "digits-four",
        "fashion-mnist",
        "forms",
        "quantizer",
    ],
)
def test_the_tables_in_the_docs_are_the_committed_results(name: str) -> None:
    rows = record.read_csv(ROOT / f"experiments/results/{name}.csv")
    assert report.insert(DOCS, name, report.markdown(rows, times=False)) == DOCS


def test_the_table_of_forms_on_text_is_of_the_frontiers_results() -> None:
    forms = ("float32", "local H=8", "3LC s=1.00", "push-pull s=1.00")
    everything = record.read_csv(ROOT / "experiments/results/chars-frontier.csv")
    rows = [row for row in everything if row["method"] in forms]
    assert report.insert(DOCS, "chars", report.markdown(rows, times=False)) == DOCS


def test_the_model_of_step_times_is_checked_against_the_lab() -> None:
    """12 points and more that were not fitted are within 15 %."""
    rows = [
        row
        for name in ("links", "links2")
        for row in record.read_csv(ROOT / f"experiments/results/{name}.csv")
    ]
    fitted, others = alpha_beta.split(alpha_beta.points(rows))
    costs = alpha_beta.fit(fitted)
    checked = alpha_beta.check_table(costs, others)
    assert report.insert(DOCS, "model-check", checked) == DOCS
    wins = alpha_beta.extrapolation(alpha_beta.Job(), alpha_beta.bits_of(rows))
    assert report.insert(DOCS, "model-wins", wins) == DOCS
    errors = alpha_beta.errors(costs, others)
    assert sum(abs(error) <= 0.15 for error in errors) >= 20


def test_the_reproduction_is_the_committed_result() -> None:
    rows = record.read_csv(ROOT / "experiments/results/reproduction.csv")
    assert report.insert(DOCS, "paper", paper.markdown(rows)) == DOCS
    assert report.insert(DOCS, "reproduction", report.markdown(rows)) == DOCS
    assert {s.method for s in report.summarise(rows)} >= {BASELINE, *paper.PAPER}


def test_the_table_of_time_to_accuracy_is_the_committed_result() -> None:
    rows = record.read_csv(ROOT / "experiments/results/evaluate.csv")
    assert report.insert(DOCS, "evaluate", pages.time_markdown(rows)) == DOCS


def test_replicas_stay_near_the_masters() -> None:
    path = ROOT / "experiments/results/replica-distance.csv"
    table = replica_distance.table(path)
    assert report.insert(DOCS, "replica-distance", table) == DOCS
    rows = record.read_csv(path)
    assert sum(row["form"] == "push-pull s=1.00" for row in rows) >= 1_000
    assert all(float(row["distance"]) < 0.5 for row in rows)


def above(point: frontier.Point, base: frontier.Point) -> float:
    """Return how much higher its loss is, in percent, of the seeds of both."""
    return 100 * (frontier.ratio(point, base) - 1)


@pytest.mark.parametrize(("name", "marker"), FRONTIERS)
def test_the_frontiers_in_the_docs_are_the_committed_results(
    name: str, marker: str
) -> None:
    rows = record.read_csv(ROOT / f"experiments/results/{name}.csv")
    assert report.insert(DOCS, marker, frontier.markdown(rows)) == DOCS


def test_the_table_of_allocations_is_the_committed_result() -> None:
    rows = record.read_csv(ROOT / "experiments/results/allocation.csv")
    assert report.insert(DOCS, "allocation", allocation.markdown(rows)) == DOCS


@pytest.mark.parametrize("name", ["chars-frontier", "chars-warm-up", "cifar10"])
def test_below_powersgd_and_top_k_there_is_a_form_of_lc3(name: str) -> None:
    points = frontier.points(record.read_csv(ROOT / f"experiments/results/{name}.csv"))
    forms = [p for p in points if p.method.startswith(("3LC", "push-pull", "local"))]
    others = [p for p in points if p.method.startswith(("PowerSGD", "top-k"))]
    assert others
    for other in others:
        assert frontier.better(other, forms) is not None, other


def test_what_is_said_of_adam_in_every_step_is_so() -> None:
    text = (ROOT / "docs/adam.md").read_text()
    rows = record.read_csv(ROOT / "experiments/results/chars-long.csv")
    assert report.insert(text, "adam", frontier.markdown(rows)) == text
    method = "preconditioned s=1.00"
    last = [row for row in rows if row["step"] == row["steps"]]
    found = {(row["method"], row["seed"]): row for row in last}

    def above(method: str, seed: str) -> str:
        ends = [float(found[m, seed]["test_loss"]) for m in (method, "float32")]
        return f"{100 * (ends[0] / ends[1] - 1):.1f}"

    def fewer(method: str) -> float:
        sent = [int(found[m, "0"]["sent_bytes"]) for m in ("float32", method)]
        return sent[0] / sent[1]

    assert [above(method, seed) for seed in "012"] == ["0.6", "-0.5", "0.3"]
    means = {p.method: p.loss for p in frontier.points(rows)}
    assert f"{100 * (means[method] / means['float32'] - 1):.1f}" == "0.1"
    assert round(fewer(method)) == 45
    ranged = f"{method}, rans"
    for end in (found[method, "1"], found[ranged, "1"]):
        assert f"at {end['test_loss']} with it and without" in text
    all_of_it, some = (int(found[m, "0"]["sent_bytes"]) for m in ("float32", ranged))
    assert round(all_of_it / some) == 50
    quarter = "local H=4, density 30 %, all coded"
    assert above(quarter, "0") == "0.7"
    assert round(fewer(quarter)) == 106
    half = "local H=2, density 30 %, all coded"
    losses = [float(found[m, "0"]["test_loss"]) for m in (method, quarter, half)]
    assert [f"{100 * (loss / losses[0] - 1):.1f}" for loss in losses[1:]] == [
        "0.1",
        "1.0",
    ]
    halves = record.read_csv(ROOT / "experiments/results/chars-long-bf16.csv")
    (half_moments,) = frontier.points(halves)
    ends = {
        row["seed"]: float(row["test_loss"])
        for row in halves
        if row["step"] == row["steps"]
    }
    assert "ended at {:.4f}, {:.4f} and {:.4f}, ".format(*ends.values()) in text
    plain = [float(found["float32", seed]["test_loss"]) for seed in ends]
    over = [100 * (end / p - 1) for end, p in zip(ends.values(), plain, strict=True)]
    assert "({:.1f}, {:.1f} and {:.1f} %), at".format(*over) in text
    mean = 100 * (sum(ends.values()) / sum(plain) - 1)
    assert f", {mean:.1f} % above float32 in the mean" in text
    dense = int(found["float32", "0"]["sent_bytes"]) / 4512
    assert f"at {dense / half_moments.bytes_per_step:.1f} times fewer" in text
    whole = {p.method: p.bytes_per_step for p in frontier.points(rows)}[method]
    shorter = 100 * (1 - half_moments.bytes_per_step / whole)
    assert f"sent {shorter:.0f} % less" in text
    rates = record.read_csv(ROOT / "experiments/results/chars-adam-rates.csv")
    assert report.insert(text, "adam-rates", frontier.markdown(rates)) == text
    best = {point.method: point.loss for point in frontier.points(rates)}
    assert min(best, key=lambda name: best[name]) == method
    adamw = [name for name in best if name.startswith("3LC")]
    assert min(adamw, key=lambda name: best[name]) == "3LC s=1.00, lr × 2"
    for page in (README, text):
        assert "from 0.6 % above to 0.5 % below the same ones" in page


def test_what_the_docs_say_of_the_frontier_is_so() -> None:
    said = " ".join(DOCS.split())
    rows = record.read_csv(ROOT / "experiments/results/chars-frontier.csv")
    found = {p.method: p for p in frontier.points(rows)}
    assert {p.seeds for m, p in found.items() if " lr × " not in m} == {3}
    preconditioned = found["preconditioned s=1.00"]
    assert frontier.better(preconditioned, [*found.values()]) is None
    half, quarter = (
        found[f"local H={every}, density 30 %, all coded"] for every in (2, 4)
    )
    others = [preconditioned, found["3LC s=1.00"], found["push-pull s=1.00"], half]
    losses = [f"{point.loss:.4f}" for point in others]
    assert losses == ["1.7367", "1.8666", "1.8873", "1.8139"]
    assert all(loss in DOCS for loss in losses)
    for point, rate in zip(others[1:], ("2", "0.5", "0.5"), strict=True):
        other = found[f"{point.method}, lr × {rate}"]
        assert other.seeds == 3
        times = "twice" if rate == "2" else "half"
        assert f"{point.loss:.4f} ({other.loss:.4f} at {times} the rate)" in said
    assert 2 * quarter.bytes_per_step < preconditioned.bytes_per_step
    assert f"{100 * (quarter.loss / preconditioned.loss - 1):.1f}" == "0.9"
    adam = " ".join((ROOT / "docs/adam.md").read_text().split())
    assert "In 1 600 steps those of every fourth are 0.9 % above it" in adam
    often, default = found["local H=4, density 4.7 %, all coded"], found["local H=8"]
    assert f"{100 * (1 - often.loss / default.loss):.1f}" == "0.9"
    assert f"{100 * (1 - often.bytes_per_step / default.bytes_per_step):.0f}" == "19"
    longer = frontier.points(
        record.read_csv(ROOT / "experiments/results/chars-long.csv")
    )
    (end,) = (point.loss for point in longer if point.method == often.method)
    assert f"({end:.4f}, and 1.6061 to 1.6124)" in said
    eighth = "local H=8, density 9.5 %, all coded"
    rare, rarer = found[eighth], found["local H=4, density 3.6 %, all coded"]
    assert abs(rare.loss / rarer.loss - 1) < 0.001
    assert rare.bytes_per_step < 5300 > rarer.bytes_per_step
    ranged = found["local H=8, density 11.5 %, all coded, rans"]
    often = found["local H=4, density 4.6 %, all coded, rans"]
    assert f"({often.loss:.4f} at {often.bytes_per_step:,.0f} bytes)" in said
    lower = 100 * (1 - ranged.loss / rare.loss)
    fewer = int(found["float32"].bytes_per_step / ranged.bytes_per_step)
    assert (
        f"{ranged.loss:.4f}, {lower:.1f} % lower, {fewer} times fewer bytes than "
        "float32" in said
    )
    decayed, slow = (found[f"{eighth}, {x}"] for x in ("decay 0.8", "lr × 0.5"))
    assert (
        f"{decayed.loss:.4f} with decay, {slow.loss:.4f} at half the rate, "
        f"{rare.loss:.4f} with neither" in said
    )


def test_what_the_docs_say_of_seeds_that_go_badly_is_so() -> None:
    """The third seed ends behind at the task's rate; at half of it they are level."""
    rows = record.read_csv(ROOT / "experiments/results/chars-frontier.csv")

    def by_seed(method: str, step: str) -> list[float]:
        mine = [r for r in rows if r["method"] == method and r["step"] == step]
        assert [r["seed"] for r in mine] == ["0", "1", "2"], method
        return [float(r["test_loss"]) for r in mine]

    behind = []
    for method in (
        "push-pull s=1.00",
        "local H=2, density 30 %, all coded",
        "PowerSGD rank 2",
        "PowerSGD rank 4, lr × 2",
        "3LC s=1.00, lr × 2",
    ):
        *others, worst = by_seed(method, "1600")
        behind.append(100 * (worst / (sum(others) / 2) - 1))
        *early, early_worst = by_seed(method, "160")
        assert early_worst > max(early)
        if "lr" not in method:
            slow = by_seed(f"{method}, lr × 0.5", "1600")
            assert max(slow) < 1.01 * min(slow)
    *first, dense, hook = (f"{part:.0f}" for part in behind)
    text = " ".join(DOCS.split())
    low, high = sorted(first, key=float)[::2]
    assert f"ends {low} to {high} % above the mean" in text
    assert (
        f"of 3LC ends {hook} % and that of PowerSGD of rank 4 {dense} % above" in text
    )
    rare = [f"local H={every}" for every in (4, 8, 16)]
    for method in {r["method"] for r in rows}:
        if method.partition(",")[0] in rare:
            ends = by_seed(method, "1600")
            assert max(ends) < 1.014 * min(ends), method


def test_what_the_docs_say_of_cifar10_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/cifar10.csv")
    found = {s.method: s for s in report.summarise(rows)}
    base, hook = found["float32"], found["3LC s=1.00"]
    said = " ".join(DOCS.split())
    own = [
        100 * float(row["accuracy"])
        for row in rows
        if row["method"] == "float32" and row["step"] == row["steps"]
    ]
    assert "three seeds end at {:.1f}, {:.1f} and {:.1f} %".format(*own) in said
    ranks = [found[f"PowerSGD rank {rank}"] for rank in (4, 2, 1)]
    main = [hook, found["local H=8"], found["3LC s=1.50"], *ranks]
    assert {s.seeds for s in [base, found["top-k 1%"], *main]} == {3}
    behind = [f"{100 * (base.accuracy - s.accuracy):.1f}" for s in main]
    assert hook.accuracy > base.accuracy
    assert behind[1:] == ["2.1", "3.0", "1.4", "4.4", "9.9"]
    coded = [64 / (s.push_bits + s.pull_bits) for s in main[:2]]
    assert [f"{times:.0f}" for times in coded] == ["88", "409"]
    for other in (*ranks, found["top-k 1%"]):
        assert other.test_loss > hook.test_loss
        assert other.bytes_per_step > hook.bytes_per_step
    assert f"{100 * (ranks[0].test_loss / hook.test_loss - 1):.1f}" == "4.7"
    assert f"{ranks[0].bytes_per_step / hook.bytes_per_step:.1f}" == "5.1"


def test_push_pull_ends_no_lower_than_the_hook() -> None:
    """Means of seeds at s = 1, in four tasks, after the short warm-up."""
    more = []
    for name in ("forms", "fashion-mnist", "cifar10", "chars-frontier"):
        rows = record.read_csv(ROOT / f"experiments/results/{name}.csv")
        found = {s.method: s for s in report.summarise(rows)}
        hook, paper_form = found["3LC s=1.00"], found["push-pull s=1.00"]
        assert hook.seeds == paper_form.seeds >= 2
        assert paper_form.test_loss >= hook.test_loss
        assert paper_form.pull_bits > hook.pull_bits
        more.append(100 * (paper_form.bytes_per_step / hook.bytes_per_step - 1))
    slow, fast = found["push-pull s=1.00, lr × 0.5"], found["3LC s=1.00, lr × 2"]
    assert slow.test_loss > fast.test_loss
    both = f"({slow.test_loss:.4f} and {fast.test_loss:.4f}, each at the better"
    assert both in " ".join(DOCS.split())
    for page in (README, DOCS):
        assert f"{min(more):.0f} to {max(more):.0f} % more" in " ".join(page.split())


def test_what_a_longer_warm_up_brings_is_so() -> None:
    short, long = (
        {
            p.method: p
            for p in frontier.points(
                record.read_csv(ROOT / f"experiments/results/{name}.csv")
            )
        }
        for name in ("chars-frontier", "chars-warm-up")
    )
    long = {method: point for method, point in long.items() if method in short}
    assert len(long) == 9
    assert all(
        point.seeds == short[method].seeds == 3 for method, point in long.items()
    )

    def lower(method: str) -> str:
        return f"{100 * (1 - long[method].loss / short[method].loss):.1f}"

    hook, paper_form = "3LC s=1.00", "push-pull s=1.00"
    local = "local H=8, density 11.5 %, all coded, rans"
    half, text = "local H=4, density 30 %, all coded", " ".join(DOCS.split())
    adam = "preconditioned s=1.00, rans"
    gains = [lower(m) for m in ("float32", adam, hook, half, local, paper_form)]
    assert gains == ["0.5", "1.2", "1.5", "1.6", "1.6", "5.6"]
    others = "PowerSGD rank 4", "PowerSGD rank 2", "local H=2, density 30 %, all coded"
    assert [lower(method) for method in others] == ["0.8", "4.8", "4.2"]
    assert max(point.high / point.low for point in long.values()) < 1.011
    below = [
        100 * (1 - found[paper_form].loss / found[hook].loss) for found in (long, short)
    ]
    assert [f"{change:.1f}" for change in below] == ["3.0", "-1.1"]
    assert "a loss 3.0 % lower" in " ".join(README.split())
    assert "end lower, by 3.0 %" in text
    assert "push-pull ends 3.0 % below 3LC" in text
    more = long[paper_form].bytes_per_step / long[hook].bytes_per_step - 1
    assert f"with {100 * more:.1f} % more bytes; with the short one 1.1 % above" in text
    dense = long["float32"]
    above = {m: f"{100 * (p.loss / dense.loss - 1):.1f} %" for m, p in long.items()}
    fewer = {
        m: f"{dense.bytes_per_step / p.bytes_per_step:.0f}" for m, p in long.items()
    }
    for words in (
        f"warm-up: it {above[adam]} above at {fewer[adam]} × (with `entropy",
        f"local steps {above[half]} at {fewer[half]} × (H = 4, 30 %)",
        f"and {above[local]} at {fewer[local]} × (H = 8, 11.5 %; ",
        f"`hooks.push_pull` {above[paper_form]} at {fewer[paper_form]} ×",
        f"under AdamW itself {above[hook]} at {fewer[hook]} × (",
    ):
        assert words in " ".join(README.split())


@pytest.mark.parametrize(
    ("before", "after", "lower", "above", "in_docs"),
    [
        (
            *("chars-large-longer", "chars-large-warm-up", ["1.1", "0.3"], "1.4"),
            "best evaluation is 0.3 % lower, float32's 1.1 %. So here",
        ),
        (
            *("chars-longer", "chars-longer-warm-up", ["0.6", "-0.3"], "0.4"),
            "above and local steps' 0.3 % higher, so 0.4 % above float32's.",
        ),
    ],
)
def test_what_a_longer_warm_up_brings_long_trainings_is_so(
    before: str, after: str, lower: list[str], above: str, in_docs: str
) -> None:
    """Of the first seed."""
    short, long = (
        {
            p.method: p.loss
            for p in frontier.points(
                [
                    row
                    for row in record.read_csv(ROOT / f"experiments/results/{name}.csv")
                    if row["seed"] == "0"
                ]
            )
        }
        for name in (before, after)
    )
    both = "float32", "local H=8, density 9.5 %, all coded"
    gains = [f"{100 * (1 - long[method] / short[method]):.1f}" for method in both]
    assert gains == lower
    assert f"{100 * (long[both[1]] / long[both[0]] - 1):.1f}" == above
    assert in_docs in " ".join(DOCS.split())


def test_what_halved_first_moments_bring_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/chars-warm-up.csv")
    found = {point.method: point for point in frontier.points(rows)}
    plain = "local H=8, density 11.5 %, all coded, rans"
    halved = f"{plain}, momentum 0.5, outer rate 2, lr × 2"
    dense = min(("float32", "float32, lr × 2"), key=lambda m: found[m].loss)
    adam = "preconditioned s=1.00, rans"
    assert {found[m].seeds for m in (plain, halved, dense, adam)} == {3}
    above = {m: f"{100 * (found[m].loss / found[dense].loss - 1):.1f} %" for m in found}
    times = {m: found[m].bytes_per_step / found[halved].bytes_per_step for m in found}
    of_first_seed = {
        row["method"]: float(row["test_loss"])
        for row in rows
        if row["seed"] == "0" and row["step"] == row["steps"]
    }
    rate = 1 - of_first_seed[f"{plain}, lr × 2"] / of_first_seed[plain]
    docs, readme = (" ".join(page.split()) for page in (DOCS, README))
    lower = f"{100 * (1 - found[halved].loss / found[plain].loss):.1f} %"
    decayed = found[halved.replace("coded, ", "coded, decay 0.8, ")]
    assert decayed.seeds == 3
    assert decayed.loss < found[adam].loss
    again = f"{100 * (1 - decayed.loss / found[halved].loss):.1f} % lower again"
    assert f"they end {again}" in docs
    assert f"`residual_decay=0.8`, too, {again}" in readme
    behind = f"{100 * (decayed.loss / found[dense].loss - 1):.1f} %"
    assert f"{behind} above float32 and below the pre" in docs
    for words in (
        f"end {lower} lower than without, with as many bytes",
        f"{above[halved]}, not {above[plain]}, above float32 at the better of two",
        f"Twice the rate by itself takes {100 * rate:.1f} % off",
        f"{above[adam]} above, with {times[adam]:.1f} times the bytes",
    ):
        assert words in docs
    assert f"end {lower} lower at as many bytes" in readme
    assert f"(H = 8, 11.5 %; {behind} with first moments halved and" in readme
    assert 0.99 < times[plain] < 1.01


def test_a_longer_warm_up_changes_little_with_muon() -> None:
    best = {
        (name, point.method): point.losses["0"]
        for name in ("chars-muon-longer", "chars-muon-longer-warm-up")
        for point in frontier.points(
            record.read_csv(ROOT / f"experiments/results/{name}.csv")
        )
    }
    local = "local H=16, density 9.5 %, all coded"
    changes = [
        100 * (best["chars-muon-longer-warm-up", m] / best["chars-muon-longer", m] - 1)
        for m in ("float32", local)
    ]
    low, high = sorted(f"{change:.1f}" for change in changes)
    assert f"both are higher by {low} to {high} %, and as" in " ".join(DOCS.split())


@pytest.mark.parametrize(
    ("name", "over", "times", "in_docs"),
    [
        (
            *("chars-large-warm-up", "+0.7", "404"),
            "the range coder they are 0.7 % above it, at 404 times fewer bytes",
        ),
        (
            *("chars-longer-warm-up", "-0.1", "400"),
            "local steps' best is 0.1 % below float32's, at 400 times fewer bytes",
        ),
    ],
)
def test_what_halved_first_moments_bring_long_trainings_is_so(
    name: str, over: str, times: str, in_docs: str
) -> None:
    rows = record.read_csv(ROOT / f"experiments/results/{name}.csv")
    found = {point.method: point for point in frontier.points(rows)}
    halved = "local H=8, density 11.5 %, all coded, rans, momentum 0.5, outer rate 2"
    rates = [found[m] for m in ("float32", "float32, lr × 2") if m in found]
    dense, local = min(rates, key=lambda p: p.loss), found[f"{halved}, lr × 2"]
    assert f"{above(local, dense):+.1f}" == over
    assert f"{dense.bytes_per_step / local.bytes_per_step:.0f}" == times
    assert in_docs in " ".join(DOCS.split())
    if name == "chars-large-warm-up":
        form = halved.replace("coded, ", "coded, decay 0.8, ")
        faster = [found[f"{form}, lr × {factor}"] for factor in (1.5, 3)]
        assert (faster[1].seeds, dense.seeds) == (2, 2)
        both = [f"{above(point, dense):.1f} %" for point in faster]
        said = f"too, they are {both[0]} above it at one and a half times the rate, "
        said += f"and {both[1]} at three times (two seeds: "
        said += " and ".join(
            f"{100 * (faster[1].losses[seed] / dense.losses[seed] - 1):.1f}"
            for seed in ("0", "1")
        )
        assert f"{said} %):" in " ".join(DOCS.split())
        higher = f"{above(found['float32, lr × 2'], dense):.1f} %"
        assert f"which float32 is {higher} higher than at" in " ".join(DOCS.split())
    else:
        behind = f"{above(found['local H=8, density 9.5 %, all coded'], dense):.1f}"
        assert f"it has {behind} % and not" in " ".join(DOCS.split())
        fewer = halved.replace("11.5 %, all coded, ", "11 %, all coded, decay 0.8, ")
        decayed = found[f"{fewer}, lr × 2"]
        assert (decayed.seeds, dense.seeds) == (2, 2)
        said = f"it is {-above(decayed, dense):.1f} % below, at "
        said += (
            f"{dense.bytes_per_step / decayed.bytes_per_step:.0f} times (two seeds: "
        )
        said += " and ".join(
            f"{100 * (1 - decayed.losses[seed] / dense.losses[seed]):.1f}"
            for seed in ("0", "1")
        )
        said += " %)."
        assert said in " ".join(DOCS.split())
        lower = f"{-above(dense, found['float32']):.1f} % lower"
        assert f"At twice the rate float32's is {lower}" in " ".join(DOCS.split())


def test_how_far_apart_the_longest_trainings_seeds_are_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/chars-longer.csv")
    dense = next(p for p in frontier.points(rows) if p.method == "float32")
    local = next(p for p in frontier.points(rows) if "all coded" in p.method)
    said = f"(one seed) the best is {-above(local, dense):.1f} % below that of the "
    said += "same seed of float32"
    assert said in " ".join(DOCS.split())
    spread = f"{100 * (dense.high / dense.low - 1):.1f} %"
    assert f"differences (float32's above: {spread})" in " ".join(DOCS.split())


def test_each_knob_of_the_quantizer_wins_somewhere() -> None:
    found = [
        point
        for name in ("fashion-mnist", "quantizer")
        for point in frontier.points(
            record.read_csv(ROOT / f"experiments/results/{name}.csv")
        )
    ]
    (blocks,) = (point for point in found if point.method == "s=1.00, block 1024")
    assert frontier.better(blocks, found) is None
    (pull,) = (point for point in found if point.method == "s=1.75, pull s=1.00")
    every_step = [point for point in found if "local" not in point.method]
    assert frontier.better(pull, every_step) is None
    assert frontier.better(pull, found) is not None


def test_what_the_docs_say_of_the_quantizer_on_text_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/quantizer-chars.csv")
    found = {point.method: point for point in frontier.points(rows)}
    plain, blocks = found["3LC s=1.00"], found["s=1.00, block 1024"]
    assert f"{100 * (1 - blocks.loss / plain.loss):.1f}" == "3.1"
    assert f"{blocks.bytes_per_step / plain.bytes_per_step:.2f}" == "1.35"
    pull = found["s=1.75, pull s=1.00"]
    assert frontier.better(found["s=1.75, block 1024"], [pull]) is pull
    density = found["density 5 %"]
    assert round(density.bytes_per_step, -2) == round(plain.bytes_per_step, -2)
    assert density.loss == max(point.loss for point in found.values())


def test_the_steps_of_the_frontier_are_those_the_lab_measured() -> None:
    rows = record.read_csv(ROOT / "experiments/results/links-chars.csv")
    times, measured = report.step_ms_by_link(rows)
    assert measured
    shown = ("float32", "3LC s=1.00", "local H=16, density 30 %")
    rates = ("10mbit", "1gbit")
    rounded = [[round(times[method][rate]) for method in shown] for rate in rates]
    assert rounded == [[2030, 167, 80], [86, 112, 63]]
    every_step = ("3LC s=1.00", "push-pull s=1.00", "preconditioned s=1.00, rans")
    assert round(times["preconditioned s=1.00, rans"]["1gbit"]) == 139
    halved = "decay 0.8, rans, momentum 0.5, outer rate 2"
    alike = [f"local H=8, density {d} %, all coded, {halved}" for d in ("11.5", "11")]
    assert [round(times[method]["1gbit"]) for method in alike] == [74, 87]
    assert times["float32"]["1gbit"] < min(times[m]["1gbit"] for m in every_step)


@pytest.mark.parametrize(
    ("name", "percent"), [("chars-longer-warm-up", 1), ("chars-warm-up", 3)]
)
def test_the_table_of_times_is_of_the_committed_results(
    name: str, percent: float
) -> None:
    results = ROOT / "experiments/results"
    links = record.read_csv(results / "links-chars.csv")
    rows = record.read_csv(results / f"{name}.csv")
    table = frontier.waits(rows, links, percent)
    assert report.insert(DOCS, f"{name}-times", table) == DOCS
    halved = "| local H=8, density 11 %, all coded, decay 0.8, rans, momentum 0.5,"
    if percent == 1:
        assert f"{halved} outer rate 2, lr × 2 | 5,760 | 6.9 min (30.9 ×)" in table
        assert "6.7 min (4.1 ×) | 8.4 min (1.1 ×)" in table
        assert frontier.BEST[3] == (name, halved[2:] + " outer rate 2, lr × 2")
        assert "| float32, lr × 2 | 6,259 | 211.8 min (1.0 ×) |" in table
        for page in (README, DOCS):
            assert "6.9 minutes" in page
            assert "31 times" in page
    else:
        line = "| preconditioned s=1.00, rans | 1,392 | 4.6 min (9.1 ×)"
        assert line in table
        assert "3.2 min (0.5 ×)" in table


def test_the_table_of_best_forms_is_of_the_committed_results(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = ROOT / "experiments/results"
    assert report.insert(README, "best", frontier.best(results)) == README
    frontier.main([str(results)])
    assert capsys.readouterr().out.strip() in README
    for name, method in frontier.BEST:
        rows = record.read_csv(results / f"{name}.csv")
        points = [p for p in frontier.points(rows) if "averaged" not in p.method]
        base = frontier.dense(points)
        assert base is not None
        local = next(p for p in points if p.method == method)
        if name == "chars-longer-warm-up":
            assert base.bytes_per_step > 400 * local.bytes_per_step
            assert above(local, base) < 0
        if name == "chars-large-warm-up":
            assert base.bytes_per_step > 400 * local.bytes_per_step
            assert above(local, base) < 0.5
        if "muon" in name:
            assert base.bytes_per_step > 800 * local.bytes_per_step
            assert above(local, base) < (1 if "H=32" in method else 0)
        if "H=32" in method:
            assert base.bytes_per_step > 1500 * local.bytes_per_step
        if int(rows[0]["steps"]) > 1600:
            ends = {
                row["seed"]: float(row["test_loss"])
                for row in rows
                if row["method"] == base.method and row["step"] == row["steps"]
            }
            assert ends.keys() == base.losses.keys()
            for seed, end in ends.items():
                assert end > base.losses[seed]  # until it overfits
    spreads = [
        100 * (point.high / point.low - 1)
        for name in (
            *("chars-longer", "chars-longer-warm-up"),
            *("chars-large", "chars-large-warm-up"),
        )
        for point in frontier.points(record.read_csv(results / f"{name}.csv"))
        if point.method in ("float32", "float32, lr × 2") and point.seeds > 1
    ]
    assert len(spreads) == 4
    said = f"with AdamW differ by {min(spreads):.1f} to {max(spreads):.1f} %"
    assert said in " ".join(README.split())


def test_a_folder_without_the_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        frontier.main([str(tmp_path)])
    assert "chars-warm-up.csv is not a result file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        frontier.main([str(tmp_path), "--plot", "x.png"])
    assert "--plot go with one result file" in capsys.readouterr().err
    (tmp_path / "chars-warm-up.csv").write_text(
        (ROOT / "experiments/results/chars-long.csv").read_text()
    )
    with pytest.raises(SystemExit):
        frontier.main([str(tmp_path)])
    assert "chars-warm-up.csv has no 'local H=8" in capsys.readouterr().err
    name, method = frontier.BEST[0]
    rows = record.read_csv(ROOT / f"experiments/results/{name}.csv")
    record.write_csv(
        tmp_path / f"{name}.csv",
        [{**row, "seed": "9"} if row["method"] == method else row for row in rows],
    )
    with pytest.raises(SystemExit):
        frontier.main([str(tmp_path)])
    assert f"{method!r} has no seed of 'float32" in capsys.readouterr().err


def test_what_the_docs_say_of_long_trainings_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/chars-muon-longer.csv")
    points = {point.method: point for point in frontier.points(rows)}
    base = points["float32"]
    coded = next(s for s in report.summarise(rows) if s.method == "local H=16")
    assert 64 / (coded.push_bits + coded.pull_bits) > 800
    assert above(points["local H=16"], base) < 0.4
    whole = points["local H=16, density 9.5 %, all coded"]
    assert round(base.bytes_per_step / whole.bytes_per_step) == 819
    assert "it is 819 times fewer of all bytes" in " ".join(DOCS.split())
    assert 0.994 < whole.losses["0"] / base.losses["0"] < 0.9955
    both_seeds = [100 * (whole.losses[s] / base.losses[s] - 1) for s in ("0", "1")]
    said = f"{-above(whole, base):.1f} % below float32's, the mean of two seeds "
    said += f"({-both_seeds[0]:.1f} % below and {both_seeds[1]:.1f} % above)"
    assert said in " ".join(DOCS.split())
    fewer = points["local H=16, density 4 %, all coded"]
    assert base.bytes_per_step / fewer.bytes_per_step > 1470
    assert 2.5 < above(fewer, base) < 2.85
    least = points["local H=32, density 10 %, all coded"]
    assert base.bytes_per_step / least.bytes_per_step > 1500
    assert above(least, base) < 2.6
    slower = points["float32, lr × 0.5"].loss
    assert f"{slower:.4f}" == "1.5576"
    rates = f"rate it is {slower:.4f}, at twice the rate "
    rates += f"{points['float32, lr × 2'].loss:.4f}.)"
    assert rates in " ".join(DOCS.split())
    best = points["local H=32, density 10 %, all coded, decay 0.8, lr × 0.5"]
    assert round(base.bytes_per_step / best.bytes_per_step) == 1574
    assert 1.35 < above(best, base) < 1.4
    both = "local H=32, density 11.5 %, all coded, decay 0.8, rans, momentum 0.5"
    both += ", outer rate 2"
    higher = [above(points[both + rate], base) for rate in ("", ", lr × 0.5")]
    times = f"{base.bytes_per_step / points[both].bytes_per_step:,.0f}"
    times = times.replace(",", " ")
    said = f"within {higher[0]:.1f} % at {times} times (two seeds; "
    said += f"at half of it {higher[1]:.1f} %)"
    assert said in " ".join(DOCS.split())
    large = record.read_csv(ROOT / "experiments/results/chars-large.csv")
    base_large, decayed, eighth, halved, sixteenth = frontier.points(large)
    first, *others = (
        f"{above(point, base_large):.1f} %" for point in (eighth, sixteenth, halved)
    )
    assert [first, *others] == ["2.6 %", "3.2 %", "4.7 %"]
    assert f"{first} above the best evaluation of its same seed" in " ".join(
        DOCS.split()
    )
    assert f"{others[0]} with H = 16 and 30 %; to let" in DOCS
    assert f"half the rate ({others[1]} above)" in DOCS
    assert round(base_large.bytes_per_step / eighth.bytes_per_step) == 419
    assert decayed.loss > eighth.loss
    twice = record.read_csv(ROOT / "experiments/results/chars-large-longer.csv")
    base_twice, ranged, eighth, faster = frontier.points(twice)
    assert faster.loss > eighth.loss
    assert f"{100 * (eighth.loss / base_twice.loss - 1):.2f}" == "0.55"
    for some in (eighth, ranged):
        assert f"{100 * (some.loss / base_large.loss - 1):.1f}" == "0.6"
    assert round(base_twice.bytes_per_step / ranged.bytes_per_step) == 405
    assert round(base_twice.bytes_per_step / eighth.bytes_per_step) == 418
    between = record.read_csv(ROOT / "experiments/results/chars-large-5400.csv")
    (middle,) = frontier.points(between)
    assert f"{100 * (middle.loss / base_large.loss - 1):.1f}" == "1.3"
    lowest_of: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in (*[r for r in large if r["method"] == "float32"], *twice):
        key = row["steps"], row["method"], row["seed"]
        best_row = lowest_of.setdefault(key, row)
        if float(row["test_loss"]) < float(best_row["test_loss"]):
            lowest_of[key] = row
    assert [r["step"] for r in lowest_of.values()] == ["2880"] * 3 + ["4320"] * 4
    three = [float(r["test_loss"]) for r in lowest_of.values() if r["steps"] == "3600"]
    assert f"{100 * (max(three) / min(three) - 1):.1f}" == "0.4"
    denser = points["local H=32, density 12.4 %, all coded, decay 0.8, rans, lr × 0.5"]
    assert f"{above(denser, base):.1f}" == "2.1"
    assert round(base.bytes_per_step / denser.bytes_per_step) == 1492
    longest = record.read_csv(ROOT / "experiments/results/chars-muon-longest.csv")
    lowest = min(longest, key=lambda row: float(row["test_loss"]))
    assert (lowest["test_loss"], lowest["step"]) == ("1.54212", "10830")
    assert lowest["sent_bytes"] == "14347925"
    assert 1 < float(lowest["test_loss"]) / base.losses["0"] < 1.0020
    assert base.bytes_per_step / frontier.points(longest)[0].bytes_per_step > 1500
    muon_large = record.read_csv(ROOT / "experiments/results/chars-muon-large.csv")
    half_rate, base_muon, lower, _, quarter = frontier.points(muon_large)
    assert (base_muon.method, half_rate.method) == ("float32", "float32, lr × 0.5")
    assert f"{-above(base_muon, half_rate):.1f}" == "1.1"
    behind = f"best evaluation is {above(quarter, base_muon):.1f} %"
    assert f"Local steps' {behind} above that, or" in " ".join(DOCS.split())
    said = f"{abs(above(lower, base_muon)):.1f} % "
    said += "above it" if lower.loss > base_muon.loss else "below it"
    said += f" ({lower.loss:.4f}, {base_muon.loss:.4f}; two seeds), at "
    said += f"{base_muon.bytes_per_step / lower.bytes_per_step:.0f} times fewer bytes"
    assert "decay 0.8, rans, momentum 0.5" in lower.method
    assert said in " ".join(DOCS.split())
    ends = {s.method: s.test_loss for s in report.summarise(rows)}
    for method in (fewer.method, least.method):
        assert ends[method] < ends["float32"]


def test_what_is_said_of_moving_averages_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/chars-large-epochs.csv")
    found = {p.method: p for p in frontier.points(rows)}
    dense, local = found["float32"], found["local H=8, density 11.5 %, all coded, rans"]
    averages = [found[f"{p.method}, averaged"] for p in (dense, local)]
    large = record.read_csv(ROOT / "experiments/results/chars-large.csv")
    three = next(p for p in frontier.points(large) if p.method == "float32")

    def change(loss: float, base: float) -> str:
        return f"{100 * (loss / base - 1):+.1f}"

    assert change(local.loss, dense.loss) == "+0.7"
    assert change(averages[0].loss, dense.loss) == "-3.0"
    assert change(averages[1].loss, local.loss) == "-1.9"
    assert (change(averages[1].loss, three.loss), three.seeds) == ("-0.9", 3)
    assert change(averages[1].loss, averages[0].loss) == "+1.8"
    assert f"{dense.bytes_per_step / local.bytes_per_step:.0f}" == "404"
    assert {int(row["step"]) % 490 for row in rows} == {0}
    readme, docs = (" ".join(page.split()) for page in (README, DOCS))
    warmed = record.read_csv(ROOT / "experiments/results/chars-large-warm-up.csv")
    best = {p.method: p.loss for p in frontier.points(warmed)}
    form = "local H=8, density 11.5 %, all coded, decay 0.8, rans, momentum 0.5"
    form += ", outer rate 2, lr × 3"
    own, theirs = best[form], best[f"{form}, averaged"]
    base, mean = best["float32"], best["float32, averaged"]
    own_gain, gain = change(theirs, own)[1:], change(mean, base)[1:]
    below, over = change(theirs, base)[1:], change(theirs, mean)[1:]
    assert (own_gain, gain, below, over) == ("2.1", "2.6", "1.8", "0.9")
    words = f"it is {below} % below float32's best at 404 times, and {over} % above"
    assert words in readme
    words = f"is {own_gain} % below local steps' own best and {below} % below float32's"
    words += f", but {over} % above float32's average: an average takes {gain} %"
    assert words in docs
    assert 0 < theirs - mean < base - theirs
    smaller = record.read_csv(ROOT / "experiments/results/chars-epochs.csv")
    loss = {p.method: p.loss for p in frontier.points(smaller)}
    both = [(loss[m], loss[f"{m}, averaged"]) for m in ("float32", local.method)]
    assert [change(mean, own) for own, mean in both] == ["-0.5", "-0.1"]
    without, averaged = zip(*both, strict=True)
    assert (change(*without[::-1]), change(*averaged[::-1])) == ("+1.3", "+1.7")


def test_what_the_readme_says_of_optimizers_is_so() -> None:
    """Points of accuracy, losses, and times fewer bytes, beside float32's."""

    def beside(task: str) -> dict[str, tuple[str, str, str]]:
        rows = record.read_csv(ROOT / f"experiments/results/{task}.csv")
        found = {s.method: s for s in report.summarise(rows)}
        base = found["float32"]
        return {
            method: (
                f"{100 * (s.accuracy - base.accuracy):+.1f}",
                f"{100 * (s.test_loss / base.test_loss - 1):.1f}",
                f"{base.bytes_per_step / s.bytes_per_step:.0f}",
            )
            for method, s in found.items()
        }

    digits, fashion, chars = map(beside, ("digits", "fashion-mnist", "chars-frontier"))
    assert digits["3LC s=1.00"][::2] == ("+0.4", "106")
    assert digits["3LC s=1.00, direct"][::2] == ("+0.2", "103")
    assert digits["3LC s=1.90, direct"][::2] == ("-1.2", "230")
    assert digits["3LC s=1.90"][::2] == ("-39.6", "278")
    assert digits["3LC s=1.50"][::2] == ("-1.0", "167")
    ends = {s.method: f"{100 * s.accuracy:.1f}" for s in report.summarise(RESULT)}
    for method in ("3LC s=1.90, direct", "3LC s=1.90", "3LC s=1.50"):
        assert f"at {ends[method]} %" in " ".join(README.split())
    assert fashion["3LC s=1.00"][::2] == ("-0.7", "144")
    assert fashion["local H=8"][::2] == ("-1.0", "383")
    rows = record.read_csv(ROOT / "experiments/results/cifar10-longer.csv")
    final = {
        (row["method"], row["seed"]): 100 * float(row["accuracy"])
        for row in rows
        if row["step"] == row["steps"]
    }
    local, coded = "local H=4, density 10 %, all coded", "3LC s=1.00, all coded"
    points = [final[local, seed] - final["float32", seed] for seed in "01"]
    assert [f"{point:+.1f}" for point in points] == ["+0.0", "+0.6"]
    assert f"{sum(points) / 2:+.1f}" == "+0.3"
    assert f"{final[coded, '0'] - final['float32', '0']:+.1f}" == "-0.6"
    assert (coded, "1") not in final
    assert f"{final['float32', '0'] - final['float32', '1']:.1f}" == "1.0"
    fewer = {s.method: s.bytes_per_step for s in report.summarise(rows)}
    assert round(fewer["float32"] / fewer[local]) == 159
    assert round(fewer["float32"] / fewer[coded]) == 75
    assert chars["local H=8"][1:] == ("6.5", "267")
    assert chars["push-pull s=1.00"][1:] == ("11.8", "39")
    assert chars["3LC s=1.00"][1:] == ("10.5", "43")
    assert "ends 11 % above float32" in (ROOT / "docs/adam.md").read_text()
    assert beside("chars-muon-longer")["local H=16"][2] == "534"
    longer = record.read_csv(ROOT / "experiments/results/chars-longer.csv")
    best = {point.method: point.loss for point in frontier.points(longer)}
    assert best["local H=8"] < 1.004 * best["float32"]
    whole = "local H=8, density 9.5 %, all coded"
    assert 0.9975 < best[whole] / best["float32"] < 0.9985
    assert beside("chars-longer")[whole][2] == "411"
    assert (
        beside("chars-muon-longer")["local H=16, density 9.5 %, all coded"][2] == "819"
    )


def test_what_is_said_of_two_ranks_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/chars-two.csv")
    loss = {p.method: p.loss for p in frontier.points(rows)}
    sent = {p.method: p.bytes_per_step for p in frontier.points(rows)}

    def change(of: dict[str, float], method: str, base: str) -> str:
        return f"{100 * (of[method] / of[base] - 1):+.1f}"

    assert change(loss, "local H=8, direct", "local H=8") == "-0.7"
    fewer = "local H=8, density 5 %, direct"
    assert change(loss, fewer, "local H=8") == "-0.2"
    assert change(sent, fewer, "local H=8") == "-26.3"
    assert change(loss, "3LC s=1.75, direct", "3LC s=1.75") == "-13.1"
    assert change(loss, "3LC s=1.00, direct", "3LC s=1.00") == "+5.3"
    rates = {
        form: min(loss[f"3LC s=1.00{form}{rate}"] for rate in (", lr × 2", ""))
        for form in (", direct", "")
    }
    slow = loss["3LC s=1.00, direct, lr × 0.5"]
    assert slow < rates[", direct"]
    assert rates[""] == loss["3LC s=1.00, lr × 2"]
    assert f"{100 * (slow / rates[''] - 1):.1f}" == "2.6"
    direct, owners = (f"preconditioned s=1.00{form}" for form in (", direct", ""))
    assert change(loss, direct, owners) == "-0.3"
    assert change(sent, direct, owners) == "+12.1"
    rows_of_images = record.read_csv(ROOT / "experiments/results/cifar10.csv")
    images = frontier.points(rows_of_images)
    loss |= {f"{p.method}, images": p.loss for p in images}
    sent |= {f"{p.method}, images": p.bytes_per_step for p in images}
    large, one, local = (
        change(loss, f"{method}, direct, images", f"{method}, images")
        for method in ("3LC s=1.75", "3LC s=1.00", "local H=8")
    )
    assert (large, one, local) == ("-6.9", "+3.9", "+0.8")
    direct, smaller = "3LC s=1.75, direct, images", "3LC s=1.50, images"
    both = [change(of, direct, smaller) for of in (loss, sent)]
    assert both == ["-0.5", "-6.2"]
    assert change(sent, direct, "3LC s=1.75, images") == "+14.0"
    four = record.read_csv(ROOT / "experiments/results/digits-four.csv")
    of = {s.method: s for s in report.summarise(four)}
    assert of["3LC s=1.50"].accuracy > of["3LC s=1.90, direct"].accuracy
    assert of["3LC s=1.50"].bytes_per_step < of["3LC s=1.90, direct"].bytes_per_step
    found = {s.method: s for s in report.summarise(RESULT)}
    ends = [found[m] for m in ("3LC s=1.50, direct", "3LC s=1.00")]
    assert "({:.1f} and\n{:.1f} %)".format(*(100 * s.accuracy for s in ends)) in DOCS
    assert f"{100 * (1 - ends[0].bytes_per_step / ends[1].bytes_per_step):.0f}" == "25"


def test_the_rate_of_the_larger_transformer_is_the_best_of_three() -> None:
    rows = record.read_csv(ROOT / "experiments/results/chars-large-rates.csv")
    ends = {
        row["method"]: f"{float(row['test_loss']):.3f}"
        for row in rows
        if row["step"] == row["steps"]
    }
    assert [*ends.values()] == ["2.175", "2.456", "2.492"]
    assert "end at 2.175, 2.456 and 2.492" in DOCS


def test_what_is_said_of_halved_first_moments_at_the_tasks_rate_is_so() -> None:
    results = ROOT / "experiments/results"
    table = local_variants.halved_table(sorted(results.glob("local-variants*.csv")))
    assert report.insert(DOCS, "local-variants-halved", table) == DOCS
    change = {}
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        form = " ".join((*cells[:3], cells[4], "H", cells[5]))
        change[form] = float(cells[9].split()[0])
    assert len(change) == len(table.splitlines()) - 2
    text = [change[f"AdamW chars 4 {warm} % H 8"] for warm in (20, 5)]
    adamw = {k: v for k, v in change.items() if k.startswith("AdamW")}
    images = [v for k, v in adamw.items() if "chars" not in k]
    assert len(images) == 2
    found = {
        (row["momentum_decay"], row["outer_lr"]): float(row["test_loss"])
        for row in record.read_csv(results / "local-variants-chars.csv")
        if (row["ranks"], row["warm_up"], row["every"]) == ("4", "0.2", "8")
        and row["seed"] == "0"
    }
    alone = 100 * (found["0.5", "1.0"] / found["1.0", "1.0"] - 1)
    docs = " ".join(DOCS.split())
    for words in (
        f"text ends {-text[0]:.1f} to {-text[1]:.1f} % lower by it",
        f"images within {max(map(abs, images)):.1f} % of what they had",
        f"without the outer rate, is {alone:.1f} % higher",
    ):
        assert words in docs
    assert (text, images, f"{alone:.1f}") == ([-1.6, -2.6], [-0.6, 0.5], "2.6")
    assert change["AdamW chars 8 20 % H 8"] == -3.9
    assert 0 < change["AdamW chars 4 20 % H 4"] < 0.5
    assert 0 < change["Muon chars 4 5 % H 8"] < 0.5
    assert change["AdamW chars 4 20 % H 16"] < text[0]
    assert f"between 8 ranks {-change['AdamW chars 8 20 % H 8']:.1f} %" in docs


def test_what_the_experiments_halve_is_what_attach_chooses_for_adamw() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert knobs.chosen_for([optimizer], knobs.DEFAULT)[0] == methods.FOR_ADAM


def test_what_is_said_of_halved_first_moments_with_sgd_is_so() -> None:
    lower = {}
    for name in ("cifar10", "fashion"):
        path = ROOT / f"experiments/results/local-variants-{name}.csv"
        table = local_variants.table(path)
        assert report.insert(DOCS, f"local-variants-{name}", table) == DOCS
        means = local_variants.over_seeds(record.read_csv(path))
        losses = {
            (row["lr"], row["momentum_decay"], row["residual_decay"]): float(
                row["test_loss"]
            )
            for row in means
        }
        lower[name] = {
            key: 100 * (1 - loss / losses["1.0", "1.0", "1.0"])
            for key, loss in losses.items()
        }
    docs, readme = (" ".join(page.split()) for page in (DOCS, README))
    recipe, kept, rate = ("1.0", "0.5", "0.8"), ("1.0", "0.5", "1.0"), "2.0"
    higher = f"{-lower['cifar10'][recipe]:.0f} % higher"
    assert f"CIFAR-10 is {higher} so" in readme
    without = f"{-lower['cifar10'][kept]:.0f} % without residuals that decay"
    assert f"on CIFAR-10 ends {higher} with all three, and {without}" in docs
    fashion = lower["fashion"]
    said = f"ends {fashion[recipe]:.1f} and {fashion[kept]:.1f} % lower, but "
    said += f"{fashion[rate, '1.0', '1.0']:.1f} % lower by twice the rate alone"
    assert said in docs


def test_variants_of_different_seeds_have_no_mean() -> None:
    path = ROOT / "experiments/results/local-variants-cifar10.csv"
    rows = record.read_csv(path)
    with pytest.raises(record.ResultError, match="different seeds: train the rest"):
        local_variants.over_seeds(rows[:-1])


def test_what_the_docs_say_of_variants_of_local_steps_is_so() -> None:
    path = ROOT / "experiments/results/local-variants.csv"
    table = local_variants.table(path)
    assert report.insert(DOCS, "local-variants", table) == DOCS
    losses = {
        (row["every"], row["density"], row["variant"], row["extra"]): float(
            row["test_loss"]
        )
        for row in record.read_csv(path)
        if row["outer_momentum"] == "0.0"
    }
    summaries = report.summarise(
        record.read_csv(ROOT / "experiments/results/chars-muon.csv")
    )
    loss = {summary.method: summary.test_loss for summary in summaries}
    assert 1.01 < losses["16", "", "", "0"] / loss["float32"] < 1.02
    assert 1.07 < losses["16", "0.1", "", "0"] / loss["float32"] < 1.09
    assert losses["16", "0.3", "", "0"] < loss["local H=8"]
    assert losses["32", "0.3", "", "0"] < losses["16", "0.1", "", "0"]
    long = {
        row["method"]: float(row["test_loss"])
        for row in record.read_csv(ROOT / "experiments/results/chars-long.csv")
        if row["seed"] == "0" and row["step"] == row["steps"]
    }
    behind = long["local H=16, density 30 %"] / long["local H=8"]
    assert 1.015 < behind < 1.025
    assert losses["16", "0.1", "own model", "0"] > losses["16", "0.1", "", "0"]
    assert abs(losses["16", "0.1", "", "8"] - losses["16", "0.1", "", "0"]) < 0.001


def test_a_delay_hides_an_exchange_that_takes_less() -> None:
    path = ROOT / "experiments/results/local-delay.csv"
    assert report.insert(DOCS, "local-delay", local_delay.table(path)) == DOCS
    hidden = [
        float(row["exposed"])
        for row in record.read_csv(path)
        if float(row["exchange_ms"])
        < float(row["compute_ms"]) * (int(row["delay"]) - 1)
    ]
    assert len(hidden) >= 3
    assert max(hidden) <= 0.02


def test_what_is_exposed_of_an_exchange() -> None:
    """On slow links 3LC hides most; on a fast one it loses, and auto does not."""
    path = ROOT / "experiments/results/step.csv"
    assert report.insert(DOCS, "step", bench_step.table(path) + "\n") == DOCS
    rows = record.read_csv(path)
    step = {
        (row["model"], row["rate"], int(row["ranks"]), row["method"]): float(
            row["step_ms"]
        )
        for row in rows
    }
    for (model, rate, ranks, method), seconds in step.items():
        plain = step[model, rate, ranks, "float32"]
        if method == "auto" and ranks == 2:
            assert seconds <= 1.05 * plain, (model, rate)
        if method == "3LC s=1.00" and rate in ("10mbit", "100mbit"):
            assert seconds < plain / 3, (model, rate)
    slower = {
        model: step[model, "loopback", 2, "3LC s=1.00"]
        / step[model, "loopback", 2, "float32"]
        for model in bench_step.MODELS
    }
    assert slower["VGG, 6.9 M"] < 1.085
    assert max(slower.values()) < 1.34
    (hidden,) = (
        float(row["step_ms"]) / float(row["bound_ms"])
        for row in rows
        if (row["model"], row["rate"], row["ranks"], row["method"])
        == ("VGG's, computed elsewhere", "100mbit", "4", "3LC s=1.00")
    )
    assert hidden <= 1.15
    rounds = [float(row["rounds"]) for row in rows if row["method"] == "3LC s=1.00"]
    assert max(r for r in rounds) <= 2


def test_what_the_docs_say_of_the_codec_is_so() -> None:
    rows = record.read_csv(ROOT / "experiments/results/codec.csv")
    took = {
        (r["what"], r["direction"], r["numel"], r["density"], r["threads"]): float(
            r["memcpies"]
        )
        for r in rows
    }

    def of(what: str, density: str, n: str = "6500000", threads: str = "1") -> float:
        return took[what, "encode", n, density, threads]

    for density in ("0.05", "0.01"):
        added = took["cpu", "decode_add", "6500000", density, "1"]
        least = took["adding a number in place", "decode_add", "6500000", density, "1"]
        assert 0.45 < added < 0.6
        assert 1.05 < added / least < 1.15
        for n in ("6500000", "64000000"):
            fused = of("cpu, bfloat16 and residual", density, n)
            apart = of("cpu, bfloat16 widened first, and residual", density, n)
            assert 0.77 < fused / apart < 0.88
        assert 1.3 < of("cpu, float32 and residual", density) < 1.5
        plain = of("torch operators, no zero runs", density)
        assert plain / of("cpu", density) > 8
    for density in ("0.5", "0.05", "0.01"):
        bucket = [of("cpu, bucket of 64", density, threads=t) for t in ("1", "2")]
        assert 1.1 < bucket[0] / bucket[1] < 1.55
        copied = of("memcpy in parts", density, threads="2")
        assert 0.95 < 1 / copied < 1.25


def test_the_docs_command_for_world_sizes_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class BegunError(Exception):
        pass

    def begin(*_: object) -> None:
        raise BegunError

    monkeypatch.setattr(scale, "train", begin)
    (options,) = re.findall(r"`python -m experiments\.scale ([^`]+)`", DOCS)
    with pytest.raises(BegunError):
        scale.main(options.split())


def test_the_table_of_world_sizes_is_the_committed_result() -> None:
    rows = record.read_csv(ROOT / "experiments/results/scale.csv")
    assert report.insert(DOCS, "scale", scale.markdown(rows)) == DOCS


def test_horovod_gives_what_ddp_gives() -> None:
    rows = record.read_csv(ROOT / "experiments/results/horovod.csv")
    assert report.insert(DOCS, "horovod", report.markdown(rows)) == DOCS
    of = {summary.method: summary for summary in report.summarise(rows)}
    for method in ("float32", "3LC s=1.00"):
        ours, theirs = of[method], of[f"Horovod {method}"]
        assert ours.accuracy == theirs.accuracy
        assert ours.push_bits == theirs.push_bits


@pytest.mark.parametrize("name", ["chars-long", "chars-muon-long"])
def test_the_tables_of_text_are_the_committed_results(name: str) -> None:
    rows = record.read_csv(ROOT / f"experiments/results/{name}.csv")
    assert report.insert(README, name, report.markdown(rows, times=False)) == README


def test_the_table_of_links_is_the_committed_result() -> None:
    rows = record.read_csv(ROOT / "experiments/results/links.csv")
    assert report.insert(README, "links", report.links_markdown(rows)) == README


def by_end(name: str) -> list[dict[str, str]]:
    """Return the last row of each training."""
    rows = record.read_csv(ROOT / f"experiments/results/{name}.csv")
    return [row for row in rows if row["step"] == row["steps"]]


def test_what_the_readme_says_of_text_is_so() -> None:
    """Of the long runs; and that local steps need six times fewer bytes than others."""

    def of(task: str) -> dict[str, report.Summary]:
        rows = record.read_csv(ROOT / f"experiments/results/{task}.csv")
        return {summary.method: summary for summary in report.summarise(rows)}

    adamw, muon = of("chars-long"), of("chars-muon-long")
    coded = muon["local H=16"]
    assert 64 / (coded.push_bits + coded.pull_bits) > 800
    assert coded.test_loss < 1.01 * muon["float32"].test_loss
    assert coded.test_loss < adamw["float32"].test_loss
    coded = adamw["local H=8"]
    assert 64 / (coded.push_bits + coded.pull_bits) > 400
    assert coded.test_loss < 1.015 * adamw["float32"].test_loss
    found = {p.method: p for p in frontier.points(by_end("chars-long"))}
    chosen = found["local H=8, decay 0.8, momentum 0.5, outer rate 2"]
    above = 100 * (frontier.ratio(chosen, found["float32"]) - 1)
    end = f"{abs(above):.1f} % {'above' if above > 0 else 'below'}"
    words = f"they end {end} float32, at 403 times (three seeds)"
    assert words in " ".join(README.split())
    lower = f"{100 * (1 - frontier.ratio(chosen, found['local H=8'])):.1f} % lower"
    assert f"the three still end {lower} (three seeds" in " ".join(DOCS.split())
    fewer = found["float32"].bytes_per_step / chosen.bytes_per_step
    assert (end, lower, f"{fewer:.0f}") == ("0.1 % below", "1.3 % lower", "268")
    adam = found["preconditioned s=1.00"]
    less = f"{100 * (1 - frontier.ratio(chosen, adam)):.1f} % below it (three seeds)"
    assert f"every 8th step end {less}" in " ".join(
        (ROOT / "docs/adam.md").read_text().split()
    )
    assert round(adam.bytes_per_step / chosen.bytes_per_step) == 6
    assert chosen.seeds == adam.seeds == 3
    assert (
        f"{fewer:.0f} times fewer of all bytes" in (ROOT / "CHANGELOG.md").read_text()
    )
    assert f"local steps {end} at {fewer:.0f} × fewer bytes" in README
    assert 64 / (adamw[chosen.method].push_bits + adamw[chosen.method].pull_bits) > 400
    longer = of("chars-longer")
    coded = longer["local H=8"]
    assert 64 / (coded.push_bits + coded.pull_bits) > 400
    assert coded.test_loss < longer["float32"].test_loss
    short = of("chars-frontier")
    for other in (short["3LC s=1.00"], short["push-pull s=1.00"]):
        assert 6 < other.bytes_per_step / short["local H=8"].bytes_per_step < 7


def test_a_budget_is_held_as_readme_says() -> None:
    """And a bucket takes two rounds without one."""
    rows = record.read_csv(ROOT / "experiments/results/budget.csv")
    plain, *held = rows
    assert float(plain["steps_of_2_rounds"]) >= 0.95
    assert [int(row["budget"]) for row in held] == [4500, 5000, 6000]
    for row in held:
        assert float(row["sent_bytes"]) == pytest.approx(float(row["budget"]), rel=0.02)
    assert "2 % of 4 500, 5 000 and 6 000 bytes" in README
