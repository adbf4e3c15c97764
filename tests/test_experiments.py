"""What the README shows and says is what the code does."""

import io
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from experiments import record, tables
from experiments.average import Average
from experiments.bench import codec as bench_codec
from experiments.bench import gpu as bench_gpu
from experiments.bench import growth, memory, site_loss
from experiments.harness import demo, keep, methods, train
from experiments.harness.methods import DEMO
from experiments.report import prose, summary
from experiments.scripts.__main__ import page_block
from experiments.ship import tables as ship_tables
from experiments.ship import works as ship_works
from lc3 import knobs
from tests import churn, forked, speeds

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULT = record.read_csv(ROOT / "experiments/results/digits.csv")


def torchrun(*arguments: str, cwd: Path) -> CompletedProcess[str]:
    """Run a program on two ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return forked.run(
        [*command, "--nproc-per-node", "2", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=440,
    )


def test_the_script_of_the_first_tutorial_trains(tmp_path: Path) -> None:
    page = (ROOT / "docs/tutorials/one-machine.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
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


def of_file(name: str, experiment: str = "") -> list[dict[str, str]]:
    return record.read_csv(
        ROOT / f"experiments/results/{name}.csv:{experiment or name}"
    )


BLOCKS: dict[str, Callable[[], str]] = {
    **{
        name: partial(make, ROOT / "experiments/results")
        for name, make in summary.BLOCKS.items()
    },
    "scripts": lambda: page_block(of_file("scripts")),
    "links": lambda: tables.links_markdown(of_file("digits", "links")),
    "growth": lambda: growth.table(of_file("growth")),
    "memory": lambda: memory.table(of_file("memory")),
    "memory-sizes": lambda: memory.table(of_file("memory_sizes")),
    "sites": lambda: site_loss.table(of_file("sites")),
    "churn": lambda: churn.table(of_file("churn")),
    "speeds": lambda: speeds.table(of_file("speeds")),
    "ship": lambda: ship_tables.page(of_file("ship")),
    "works": lambda: ship_works.table(of_file("ship")),
    "gpu": lambda: bench_gpu.markdown(of_file("gpu")),
    "speed": lambda: (
        bench_codec.speed_table(of_file("codec"))
        + bench_codec.caption(of_file("codec"))
    ),
    "entropy": lambda: (
        bench_codec.entropy_table(of_file("entropy"))
        + bench_codec.caption(of_file("entropy"))
    ),
    "range": lambda: (
        bench_codec.range_table(of_file("entropy"))
        + bench_codec.caption(of_file("entropy"))
    ),
}


def test_every_block_of_the_pages_is_what_its_command_makes() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = set()
    for page in pages:
        text = page.read_text()
        for name in re.findall(r"<!-- ([\w-]+):begin -->", text):
            if name == "cuda-kernels":  # needs NVIDIA's compiler: tests/test_cuda.py
                continue
            found.add(name)
            assert tables.insert(text, name, BLOCKS[name]()) == text, (page, name)
    assert found == set(BLOCKS)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 8000


def test_no_figure_is_cut_off_in_a_terminal_of_80_columns() -> None:
    rows = of_file("cifar10-resnet20", "cifar10-longer")
    out = io.StringIO()
    tables.print_table(rows, Console(file=out, width=80))
    assert "1,078,888" in out.getvalue()
    assert "…" not in out.getvalue()


def test_the_committed_result_keeps_what_the_demo_promises() -> None:
    """s = 1 within 0.5 points of plain DDP, 15 times fewer bytes in coded tensors."""
    of = {summary.method: summary for summary in tables.summarise(RESULT)}
    assert set(of) == set(DEMO)
    plain, coded = of["float32"], of["3LC s=1.00"]
    assert len({row["seed"] for row in RESULT}) == 3
    assert coded.accuracy >= plain.accuracy - 0.005
    assert 64 / (coded.push_bits + coded.pull_bits) >= 15


def test_methods_are_data(tmp_path: Path) -> None:
    table = tmp_path / "methods.toml"
    table.write_text('method = [{hook = "muloco", sync_every = 5, bits = 4}]')
    (found,) = methods.read(table).items()
    assert found == (
        "MuLoCo 4 bit H=5",
        methods.Fields(hook="muloco", sync_every=5, bits=4),
    )
    table.write_text('method = [{hook = "demo"}, {hook = "demo"}]')
    with pytest.raises(ValueError, match="two methods are 'DeMo'"):
        methods.read(table)
    table.write_text('method = [{hook = "carrier pigeons"}]')
    with pytest.raises(ValueError, match="hook 'carrier pigeons' is unknown; there"):
        methods.read(table)


def campaign(method: str, seed: int, kind: str, **said: object) -> dict[str, object]:
    named = dict(zip(churn.CAMPAIGN, (method, seed, "5", "5 to 15", kind), strict=True))
    events = {f"events: {kind}": 1 for kind in churn.EVENTS}
    figures = {"goodput": 0.9, "hangs": 0, "bytes": 3_000_000, "loss": 2.0}
    tokens = {"tokens counted": 1000, "tokens trained": 1_500_000}
    how = {"batch": 8, "rate": "falling"}
    return {**named, **events, **figures, **tokens, **how, **said}


def test_rows_of_a_campaign_replace_those_that_it_had() -> None:
    old = [campaign("lc3", seed, "churn", goodput=0.1) for seed in (0, 1)]
    new = [campaign("lc3", 1, "churn")]
    assert churn.together(old, new) == [old[0], *new]
    assert churn.together([], new) == new


def test_a_campaign_stands_beside_its_undisturbed_training() -> None:
    rows = [
        campaign("lc3", 0, "churn", goodput=0.8, loss=2.1),
        campaign("lc3", 0, "undisturbed", goodput=1.0),
        campaign("lc3", 1, "churn", goodput=1.0, loss=2.3),
        campaign("lc3", 1, "undisturbed", goodput=1.0),
        campaign("diloco", 0, "churn", hangs=3),
        campaign("diloco", 0, "undisturbed", loss=4.0),
    ]
    said = churn.table([{k: str(v) for k, v in row.items()} for row in rows])
    _, _, ours, theirs = (line.split(" | ") for line in said.splitlines())
    assert ours[3:8] == ["2", "2, 2, 2, 2", "1.50", "90.0 %", "0"]
    assert ours[8:] == [
        *("falling", "2.2000", "2.0000 (1 × 8, 1 × 8)"),
        *("+10.0 %", "3,000", "2 |"),
    ]
    assert theirs[0] == "| torchft's DiLoCo"
    assert theirs[6:8] == ["90.0 %", "3"]
    assert theirs[9:12] == ["2.0000", "4.0000 (1 × 8)", "-50.0 %"]


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
        *("-m", "experiments.harness.train", *arguments, "--out", str(path)), cwd=ROOT
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
    passed = command[command.index("experiments.harness.train") + 1 :]
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


def test_experiments_of_a_task_share_a_file(tmp_path: Path) -> None:
    first = {name: RESULT[0][name] for name in (*tables.COLUMNS, "commit")}
    for name, method in (("a", "3LC s=1.00"), ("b", "local H=8, lr × 2")):
        row = {**first, "method": method}
        record.write_csv(tmp_path / f"{name}.csv", [row])
        keep.main([str(tmp_path / f"{name}.csv"), "--out", str(tmp_path)])
    out = tmp_path / "digits.csv"
    (found,) = record.read_csv(tmp_path / "digits.csv:a")
    assert {name: found[name] for name in first} == {**first, "method": "3LC s=1.00"}
    assert found["sparsity"] == "1.0"
    assert "sync_every" not in found
    assert record.read_csv(tmp_path / "digits.csv:b")[0]["sync_every"] == "8"
    record.write_csv(tmp_path / "a.csv", [{**first, "commit": "new"}])
    keep.main([str(tmp_path / "a.csv"), "--out", str(tmp_path)])
    assert [row["commit"] for row in record.read_whole(out)] == [
        first["commit"],
        "new",
    ]
    with pytest.raises(
        record.ResultError,
        match=r"no experiment 'digits'; it holds b, a: write digits\.csv:b",
    ):
        record.read_csv(out)


@pytest.mark.parametrize(
    "text", ["", "<!-- x:begin -->\n", "<!-- x:end --><!-- x:begin -->\n"]
)
def test_insert_needs_its_markers(text: str) -> None:
    with pytest.raises(ValueError, match="x:end"):
        tables.insert(text, "x", "")


def test_what_the_experiments_halve_is_what_attach_chooses_for_adamw() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert knobs.chosen_for([optimizer], knobs.DEFAULT)[0] == methods.FOR_ADAM


def test_readme_reads_easily() -> None:
    found = prose.figures(README)
    assert found["words a sentence"] <= 20
    assert found["numbers a sentence"] <= 1
    two = prose.figures("# A\n\nOne two three. Four, 5 and 6.\n\n```\ncode 7\n```\n")
    assert (two["sentences"], two["words a sentence"]) == (2, 3.5)
    assert two["numbers a sentence"] == 1


def test_each_rival_stands_beside_what_sends_no_more() -> None:
    forms = {"float32": "float32", "a": "lc3 a", "b": "lc3 b", "c": "lc3 c", "r": "R"}
    found = {
        "float32": summary.Outcome({"0": 1.0, "1": 1.0}, 1000),
        "a": summary.Outcome({"0": 1.6, "1": 1.5}, 20),
        "b": summary.Outcome({"0": 1.3, "1": 1.2}, 50),
        "c": summary.Outcome({"0": 1.1, "1": 1.1}, 101),  # better, and sends more
        "r": summary.Outcome({"0": 1.3, "1": 1.25}, 100),
    }
    said = summary.beside(summary.Task("", "", forms), found)
    (line,) = [one for one in said.splitlines() if one.startswith("| R ")]
    assert line.startswith("| R | lc3 b | 2.0 × | -2.00 %: no clear difference (p =")
    higher = summary.beside(summary.Task("", "", forms, accuracy=True), found)
    assert "| R | lc3 a | 5.0 × | +27.50 points" in higher
    least = {"float32": found["float32"], "c": found["c"], "r": found["r"]}
    alone = summary.Task("", "", {name: forms[name] for name in least})
    assert "| R | none |  | no form of lc3" in summary.beside(alone, least)
    del least["r"], alone.forms["r"]
    assert summary.beside(alone, least) == ""


def test_each_method_stands_at_the_best_of_the_rates_that_all_have_ended_at() -> None:
    def row(method: str, loss: float, step: int = 8) -> dict[str, str]:
        return {
            "method": method,
            "seed": "0",
            "step": str(step),
            "steps": "8",
            "sent_bytes": "80",
            "test_loss": str(loss),
        }

    task = summary.Task("T", "t.csv:t", {"float32": "float32", "a": "lc3 a"})
    rows = [
        *(row("float32", 2.0), row("float32, lr × 2", 3.0), row("float32, lr × 4", 1)),
        *(row("a", 2.5), row("a, lr × 2", 2.2), row("a, lr × 4", 1.0, step=4)),
    ]
    assert summary.swept(task, rows) == [1, 2]
    found = summary.outcomes(task, rows)
    assert {name: (one.mean, one.times) for name, one in found.items()} == {
        "float32": (2.0, 1),
        "a": (2.2, 2),
    }
    more = [{**row("a, lr × 2", 9.0), "seed": "1"}]  # worse, and only that rate's
    assert summary.outcomes(task, rows + more)["a"].figures == {"0": 2.2, "1": 9.0}
    said = summary.table(task, rows)
    assert "| lc3 a | 1.0 × | 0.5 × | 2.2000 | +10.00 %; one seed | 2 × |" in said
    assert "best of the rates 1, 2 × the task's" in said
    with pytest.raises(summary.ResultError, match="has no 'float32'"):
        summary.outcomes(task, rows[3:])


def test_methods_are_compared_by_the_seeds_of_both() -> None:
    base = {"0": 2.0, "1": 4.0, "2": 5.0}
    lower = {"0": 1.9, "1": 3.8, "2": 4.75, "9": 1.0}
    # Differences -0.1, -0.2, -0.25: t = -4.16 with two degrees of freedom.
    said = summary.compared(lower, base, accuracy=False)
    assert said == "-5.00 %: no clear difference (p = 0.05, 3 seeds)"
    surer = {"0": 1.9, "1": 3.9, "2": 4.89}
    said = summary.compared(surer, base, accuracy=False)
    assert said == "-3.23 %: lower (p < 0.01, 3 seeds)"
    assert (
        summary.compared({"1": 4.1}, base, accuracy=True) == "+10.00 points; one seed"
    )
    assert summary.compared({"7": 4.1}, base, accuracy=True) == "no common seed"
    outcome = summary.Outcome({"0": 0.9, "1": 1.1}, 1.0)
    assert summary.noise(outcome) == "14.14 %"
