"""``python -m lc3 measure`` and ``doctor``: what they say, and what they refuse."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

import lc3
from lc3 import __main__ as command
from lc3.config import Settings
from lc3.engines.costs import Costs
from lc3.tools import doctor, measure
from tests import forked
from tests.oracle import Oracle

SCRIPT = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
print("arguments", sys.argv[1:], __name__)
for step in range(int(sys.argv[2])):
    x = torch.randn(32, 64)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), x).backward()
    optimizer.step()
print("the script ended by itself")
"""


def lc3_command(
    *arguments: str, launcher: tuple[str, ...] = ()
) -> CompletedProcess[str]:
    return forked.run(
        [sys.executable, *(launcher or ("-m", "lc3")), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


@pytest.mark.parametrize(("made", "measured"), [(100, 20), (7, 7)])
def test_measure_runs_a_script_as_it_is(
    tmp_path: Path, made: int, measured: int
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = lc3_command("measure", "--steps", "20", str(script), "--steps", str(made))
    assert done.returncode == 0, done.stderr
    assert f"arguments ['--steps', '{made}'] __main__" in done.stdout
    assert ("ended by itself" in done.stdout) == (made == measured)
    assert f"{measured} steps, 33,088 gradient elements" in done.stdout
    found = re.findall(r"^ +(1\.\d\d) +([\d.]+) ", done.stdout, re.MULTILINE)
    assert [s for s, _ in found] == ["1.00", "1.50", "1.75", "1.90"]
    fewer = [float(ratio) for _, ratio in found]
    assert 10 < fewer[0] < fewer[1] < fewer[2] < fewer[3] < 300
    lines = [line for line in done.stdout.splitlines() if str(script) not in line]
    assert max(map(len, lines)) <= 80


RANKS_SCRIPT = """
import time, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
model = DistributedDataParallel(nn.Linear(512, 512))
optimizer = torch.optim.AdamW(model.parameters())
for step in range(8):
    time.sleep(0.05)
    optimizer.zero_grad()
    model(torch.randn(8, 512)).square().mean().backward()
    optimizer.step()
dist.destroy_process_group()
"""


def test_measure_under_torchrun_knows_ranks_link_and_optimizer(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RANKS_SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = lc3_command("-m", "lc3", "measure", str(script), launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lc3 measure: ") == 1  # rank 0 only
    dense = 4 * (512 * 512 + 512)
    assert f"float32 all-reduce, 2 ranks: {dense:,} bytes" in done.stdout
    all_reduce, rest = (
        float(re.search(pattern, done.stdout)[1])  # type: ignore[index]
        for pattern in (r"in ([\d.]+) ms between the", r"a step, ([\d.]+) ms, is")
    )
    (step,) = re.findall(r"([\d.]+) ms a step as the script", done.stdout)
    assert rest == pytest.approx(float(step) - all_reduce, abs=0.2)
    header = next(x for x in done.stdout.splitlines() if x.startswith("ms a step"))
    assert header.split()[3:5] == ["this", "link"]
    (here,) = re.findall(r"^float32 +([\d.,]+) ", done.stdout, re.MULTILINE)
    assert float(here) == pytest.approx(float(step), abs=0.2)
    assert "For AdamW, exchanged in every step:" in done.stdout
    assert "With Adam leave s at 1" in done.stdout
    assert max(map(len, done.stdout.split("lc3 measure: ")[1].splitlines()[1:])) <= 80


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (torch.optim.SGD, "    state = lc3.hooks.ddp.attach(model, optimizer)"),
        (torch.optim.Adagrad, "Adagrad trains worse on gradients that 3LC has decoded"),
    ],
)
def test_measure_says_which_line_suits_the_optimizer(kind: Any, words: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(40, 50))
    recorder = measure.Recorder(100, [1.0], Settings())
    weight.grad = torch.randn(40, 50)
    recorder(kind([weight], lr=1.0))
    said = measure.report(recorder, 4)
    assert words in said
    assert "With Adam" not in said


def test_the_link_is_that_of_the_scripts_ranks() -> None:
    weight = torch.nn.Parameter(torch.zeros(40, 50))
    recorder = measure.Recorder(100, [1.0], Settings())
    for _ in range(3):
        weight.grad = torch.randn(40, 50)
        recorder(torch.optim.SGD([weight], lr=1.0))
    recorder.step_s, recorder.world, recorder.all_reduce_s = [0.25], 2, 0.2
    rows = [line.split() for line in measure.report(recorder, 2).splitlines()]
    assert any(row[:2] == ["float32", "250.0"] for row in rows)
    # Four ranks send half as much again, at the same rate.
    rows = [line.split() for line in measure.report(recorder, 4).splitlines()]
    assert any(row[:2] == ["float32", "350.0"] for row in rows)


def test_measured_gradients_of_adam_are_divided() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 50))
    optimizer = torch.optim.Adam([weight])
    size = torch.logspace(-3, 3, 4)[:, None].expand(4, 50)
    for _ in range(3):
        weight.grad = size.clone()
        optimizer.step()
    (divided,) = measure._gradients(optimizer).values()
    rows = divided.view(4, 50).mean(1)
    assert rows[-2:].tolist() == pytest.approx([rows[-1].item()] * 2, rel=0.02)
    assert rows.max() < 100 * rows[-1]


def test_measured_bytes_are_those_of_both_hops() -> None:
    """One rank that talks to itself: the oracle's bytes, before the entropy stage."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    config = Settings(entropy="none")
    recorder = measure.Recorder(100, [1.0, 1.75], config)
    oracles = [
        Oracle([("parameter 0", (40, 50))], 1, Settings(sparsity=s))
        for s in (1.0, 1.75)
    ]
    for _ in range(5):
        weight.grad = torch.randn(40, 50) ** 3
        recorder(optimizer)
        for oracle in oracles:
            oracle.step([{"parameter 0": weight.grad.numpy().reshape(-1).copy()}])
    (engines,) = recorder._engines.values()
    for engine, oracle in zip(engines, oracles, strict=True):
        ours, theirs = engine.residuals, oracle
        assert (ours.sent["parameter 0"].numpy() == theirs.sent[0]["parameter 0"]).all()
        assert (ours.owned["parameter 0"].numpy() == theirs.owned["parameter 0"]).all()
    first, second = (figures.bytes_per_step(5) for figures in recorder.figures)
    assert second < first < 2 * 2000 / 5 + 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["measure", "nowhere.py"], "'nowhere.py' is not a file"),
        (["measure", "-s", "2", "x.py"], "outside [1, 2)"),
        (["measure", "-s", "much", "x.py"], "could not convert string to float"),
        (["measure", "--ranks", "1", "x.py"], "'1' is not an integer from 2 up"),
        (["doctor", "--elements", "0"], "'0' is not an integer from 1 up"),
        ([], "required: command"),
    ],
)
def test_bad_command_lines(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command.main(arguments)
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert words in capsys.readouterr().err


def test_a_script_without_a_step_is_said(tmp_path: Path) -> None:
    script = tmp_path / "nothing.py"
    script.write_text("print('nothing')")
    done = lc3_command("measure", str(script))
    assert done.returncode == 2
    assert "ended without a step of a torch optimizer" in done.stderr


def test_a_scripts_own_failure_is_its_own(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text("raise SystemExit(3)")
    assert lc3_command("measure", str(script)).returncode == 3


def test_the_doctor_knows_this_machine() -> None:
    done = lc3_command("doctor", "--elements", "25000000", "--compute-ms", "20")
    assert done.returncode == 0, done.stderr
    assert f"lc3 {lc3.__version__}" in done.stdout
    assert re.search(r"encode \d+\.\d\d GB/s of float32, decode \d+\.\d\d", done.stdout)
    slowest = r"10 Mbit/s +float32 .* 3LC +(\S+) ms \(direct (\S+) ms\): compress\n"
    found = re.search(slowest, done.stdout)
    assert found
    # Two ranks send as much without owners, and do not encode the means.
    direct, owners = (float(ms.replace(",", "")) for ms in (found[2], found[1]))
    assert direct < owners
    assert "break-even" in done.stdout


def test_the_doctor_measures_the_link() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = lc3_command("-m", "lc3", "doctor", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MB/s") == 2  # of both ways, by one rank
    assert "2 ranks, the slowest of them: " in done.stdout
    assert "this link" in done.stdout
    assert "all ranks are on this machine" in done.stdout


@pytest.mark.parametrize(
    ("reduce_byte", "verdict"),
    [(1e-6, "compress"), (1e-11, "do not compress"), (3.5e-10, "no clear difference")],
)
def test_the_doctor_says_what_is_clear_only(
    reduce_byte: float, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = Costs(4e-10, 2e-10, 0.0, reduce_byte, 0.0, reduce_byte)
    doctor._predict(1_000_000, 1.0, 2, {"this link": (costs, costs)})
    assert f"): {verdict}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bit_s", "code_s", "compute_ms", "sgd", "adam"),
    [
        (10e6, 1e-9, 100.0, "local steps, H = 4", "local steps, H = 8"),
        (60e6, 1e-9, 300.0, "3LC", "local steps, H = 8"),
        (3e9, 2e-8, 100.0, "bfloat16", "bfloat16"),
        (1e12, 1e-9, 100.0, "float32", "float32"),
    ],
)
def test_the_doctor_names_the_form_that_wins_for_an_optimizer(
    bit_s: float,
    code_s: float,
    compute_ms: float,
    sgd: str,
    adam: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    costs = Costs(code_s, code_s, 0.0, 8 / bit_s, 0.0, 8 / bit_s)
    local = dataclasses.replace(costs, bits=1.2)
    doctor._predict(10_000_000, compute_ms, 2, {"this link": (costs, local)})
    said = capsys.readouterr().out
    assert f"to win: with SGD {sgd} (" in said
    assert f"with Adam {adam} (" in said
