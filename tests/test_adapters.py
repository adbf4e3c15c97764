"""Lightning, Accelerate and the Trainer give what DDP with lc3's hook gives."""

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lc3 import AttachError, ConfigError
from lc3.hooks import ddp, local_sgd
from lc3.hooks.frameworks import attach_of, check_inside, require
from tests import forked
from tests.test_surface import run_examples

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ["lightning", "accelerate", "transformers"]
EXAMPLES = {
    "lightning": "with_lightning",
    "accelerate": "with_accelerate",
    "transformers": "with_trainer",
}
pytestmark = pytest.mark.timeout(600)


def needs(framework: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs the extra {framework}; make test-adapters installs it")


def torchrun(folder: Path, *arguments: str, world: int = 2) -> str:
    """Run in ``folder``, where frameworks leave their logs; return what it prints."""
    done = forked.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(world), "-m", *arguments),
        ],
        cwd=folder,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def trained(framework: str, mode: str, folder: Path) -> dict[str, Any]:
    """Return what rank 0 found; the other ranks' parameters are the same."""
    world = 4 if mode.startswith(("sites", "shards")) else 2
    torchrun(folder, "tests.adapter_cases", framework, mode, str(folder), world=world)
    found: dict[str, Any]
    found, *others = (
        torch.load(folder / f"{framework}-{mode}-{rank}.pt") for rank in range(world)
    )
    for other in others:
        assert torch.equal(found["parameters"], other["parameters"]), "replicas differ"
    return found


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.filterwarnings("default")  # the frameworks' own
def test_the_examples_in_the_docstring_run(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(framework)
    monkeypatch.chdir(tmp_path)
    run_examples(importlib.import_module(f"lc3.hooks.{framework}"))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_trains_what_ddp_trains_and_resumes(
    framework: str, tmp_path: Path
) -> None:
    """Bit for bit, and on both ranks."""
    needs(framework)
    plain = trained(framework, "plain", tmp_path)
    straight = trained(framework, "straight", tmp_path)
    assert torch.equal(straight["parameters"], plain["parameters"])
    assert straight["ratio"] == pytest.approx(plain["ratio"], rel=0.01)
    half = trained(framework, "half", tmp_path)
    assert not torch.equal(half["parameters"], plain["parameters"])
    rest = trained(framework, "rest", tmp_path)
    assert torch.equal(rest["parameters"], plain["parameters"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_makes_local_steps(framework: str, tmp_path: Path) -> None:
    needs(framework)
    plain = trained(framework, "local_plain", tmp_path)
    local = trained(framework, "local", tmp_path)
    assert torch.equal(local["parameters"], plain["parameters"])
    assert local["ratio"] == pytest.approx(plain["ratio"], rel=0.01)
    if framework != "accelerate":  # whose users evaluate themselves
        other = torch.load(tmp_path / f"{framework}-local-1.pt")
        assert len(local["evaluated"]) >= 4
        for here, there in zip(local["evaluated"], other["evaluated"], strict=True):
            assert torch.equal(here, there)


@pytest.mark.parametrize("steps_of", ["local", "sites", "shards"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_resumes_local_steps(
    framework: str, steps_of: str, tmp_path: Path
) -> None:
    """Bit for bit what a loop does that syncs and shares an optimizer there.

    Of ranks, and of two sites of two ranks with DDP or FSDP2 inside; on all ranks.
    """
    needs(framework)
    stopped = trained(framework, f"{steps_of}_plain_half", tmp_path)
    half = trained(framework, f"{steps_of}_half", tmp_path)
    assert torch.equal(half["parameters"], stopped["parameters"])
    plain = trained(framework, f"{steps_of}_plain_rest", tmp_path)
    rest = trained(framework, f"{steps_of}_rest", tmp_path)
    assert torch.equal(rest["parameters"], plain["parameters"])
    assert not torch.equal(rest["parameters"], half["parameters"])


def test_what_attaches_is_said_once() -> None:
    assert attach_of(None, None, None) is ddp.attach
    assert attach_of("local_sgd", None, None) is local_sgd.attach
    made: Any = attach_of("local_sgd", 8, None)
    assert (made.func, made.keywords) == (local_sgd.attach, {"sync_every": 8})
    bad: list[tuple[tuple[Any, Any, Any], str]] = [
        (("ring", None, None), "form='ring' must be one of 'ddp', 'local_sgd'"),
        ((None, 8, None), "sync_every=8 is for local steps, and form is 'ddp'"),
        ((None, 8, ddp.attach), "attach says the form and its knobs"),
    ]
    for given, words in bad:
        with pytest.raises(ConfigError, match=words):
            attach_of(*given)


def test_accelerate_accumulates_as_ddp_does(tmp_path: Path) -> None:
    needs("accelerate")
    plain = trained("accelerate", "accumulate_plain", tmp_path)
    accumulated = trained("accelerate", "accumulate", tmp_path)
    assert accumulated["steps"] == plain["steps"] == 12
    assert torch.equal(accumulated["parameters"], plain["parameters"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_example(framework: str, tmp_path: Path) -> None:
    needs(framework)
    path = ROOT / f"experiments/examples/{EXAMPLES[framework]}.py"
    assert len(path.read_text().splitlines()) < 60
    said = torchrun(tmp_path, f"experiments.examples.{EXAMPLES[framework]}")
    found = re.search(r"accuracy (0\.\d+), (\d+) times fewer bytes", said)
    assert found, said
    assert float(found[1]) > 0.8
    assert int(found[2]) > 20


def test_lightning_without_ddp_is_refused() -> None:
    needs("lightning")
    from types import SimpleNamespace

    from lc3.hooks.lightning import LC3

    strategy = SimpleNamespace(model=torch.nn.Linear(2, 2))
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy)
    module: Any = None
    with pytest.raises(AttachError, match=r"needs Trainer\(strategy='ddp'\)"):
        LC3().on_fit_start(trainer, module)
    trainer.world_size = 1
    callback = LC3()
    callback.on_fit_start(trainer, module)
    assert callback.state is None


def test_accelerate_is_told_what_sites_it_lacks() -> None:
    needs("accelerate")
    from types import SimpleNamespace

    from accelerate import ParallelismConfig

    from lc3.hooks import accelerate

    one_site = ParallelismConfig(dp_shard_size=4)
    refused: list[tuple[Any, Any]] = [(None, None), (one_site, None), (one_site, 2)]
    for config, mesh in refused:
        sharding: Any = SimpleNamespace(
            is_fsdp2=True, parallelism_config=config, _optimizers=[]
        )
        with pytest.raises(AttachError, match="with FSDP2 the sites are Accelerate's"):
            accelerate.inside(sharding, mesh)
        with pytest.raises(AttachError, match="before the model is prepared"):
            check_inside(SimpleNamespace(parallelism_config=None))
    plain: Any = SimpleNamespace(is_fsdp2=False, _optimizers=[])
    with pytest.raises(AttachError, match="name the mesh of the sites"):
        accelerate.inside(plain)
    plain._optimizers.append("one")
    with pytest.raises(AttachError, match=r"before accelerator\.prepare"):
        accelerate.inside(plain, one_site)


def test_accelerate_on_one_process_trains_as_without_lc3(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs("accelerate")
    from accelerate import Accelerator

    from lc3.hooks import accelerate, local_sgd

    accelerator = Accelerator(cpu=True)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    model, optimizer = accelerator.prepare(net, optimizer)
    for attach in (ddp.attach, local_sgd.attach):
        with accelerate.attach(accelerator, model, optimizer, attach=attach) as state:
            accelerator.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            state.sync()
            assert state.meter.sent_bytes == 0
            accelerator.save_state(str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")  # as if others had been started
    with pytest.raises(AttachError, match=r"with 1 process\(es\)"):
        accelerate.attach(accelerator, model, optimizer)


@pytest.mark.parametrize(
    ("found", "fine"),
    [("2.2.0", True), ("2.1.9", False), ("2.10.0+cpu", True), ("1.9", False)],
)
def test_a_version_that_is_too_old_is_named(found: str, fine: bool) -> None:
    if fine:
        require("lightning", found, "2.2")
        return
    said = rf"needs lightning 2\.2 or newer, {re.escape(found)} is installed"
    with pytest.raises(AttachError, match=said):
        require("lightning", found, "2.2")
