"""What a person meets first: names, knobs, lines of the documentation, errors."""

import ast
import doctest
import importlib
import itertools
import logging
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import lc3
from lc3 import ConfigError, knobs
from lc3.__main__ import main
from lc3.codec import cpu
from lc3.config import Config, Settings, Tuning, settle
from lc3.engines.costs import Costs, sent_bits
from lc3.hooks import ddp, local_sgd
from lc3.transport.protocol import Transport
from lc3.version import __version__
from tests import forked, surface_cases
from tests.ranks import Ranks
from tests.test_engine import engine_of, in_threads, random_gradients

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "notebook" not in p.parts),
]
Pools = Callable[[int], Ranks]
ADAPTERS = {
    "lightning": "LC3",
    "accelerate": "attach",
    "transformers": "attach",
    "horovod": "DistributedOptimizer",
    "torchft": "attach",
}

# Knobs with a value that has an effect on three tensors and three ranks.
KNOBS: dict[str, Any] = {
    "sparsity": 1.5,
    "density": 0.05,
    "entropy": "none",
    "include": ("bias",),
    "exclude": ("c",),
    "bytes_per_step": 900,
    "pull_sparsity": 1.25,
    "topology": "direct",
    "min_numel": 1100,
    "min_ndim": 3,
    "min_shard": 600,
    "block_size": 64,
}
SHAPES = [("a", (50, 40)), ("bias", (30,)), ("b", (1, 1050)), ("c", (7, 11, 30))]
MEANINGLESS = {
    ("sparsity", "density"),
    ("density", "pull_sparsity"),
    ("pull_sparsity", "topology"),
}


def said(**given: Any) -> Config:
    """Return a Config, its experts' knobs where they belong."""
    own = {k: v for k, v in given.items() if k in Config.__dataclass_fields__}
    others = {k: v for k, v in given.items() if k not in own}
    return Config(**own, tuning=Tuning(**others) if others else None)


def outcome(**given: Any) -> tuple[object, ...]:
    """Return what ten steps with these knobs end with: residuals, bytes, plan."""
    settings = settle(said(**given), Settings())

    def job(rank: int, transport: Transport) -> tuple[object, ...]:
        engine = engine_of(transport, settings, shapes=SHAPES)
        sums = []
        for step in range(12):
            grads = random_gradients(rank, step, SHAPES)
            engine.all_reduce(grads, step, 0)
            sums.append(sum(grad.double().sum().item() for grad in grads.values()))
        engine.close()
        return (sum(sums), engine.meter.sent_bytes, engine.plan.fingerprint)

    found: list[tuple[object, ...]] = in_threads(3, job)
    return found[0]


def test_every_pair_of_knobs_has_an_effect_or_is_refused() -> None:
    alone = {knob: outcome(**{knob: value}) for knob, value in KNOBS.items()}
    assert len({*alone.values(), outcome()}) == len(KNOBS) + 1
    refused = set()
    for pair in itertools.combinations(KNOBS, 2):
        try:
            found = outcome(**{knob: KNOBS[knob] for knob in pair})
        except ConfigError:
            refused.add(pair)
            continue
        assert found not in (alone[pair[0]], alone[pair[1]]), pair
    assert refused == MEANINGLESS


def test_auto_goes_with_what_3lc_can_be_told_and_no_budget() -> None:
    for knob, value in KNOBS.items():
        if knob == "bytes_per_step":
            with pytest.raises(ConfigError, match="mode='auto' may send without it"):
                said(mode="auto", **{knob: value})
        else:
            said(mode="auto", **{knob: value})


def test_a_config_that_says_nothing_of_a_knob_leaves_the_forms() -> None:
    for defaults in (Settings(), ddp.FOR_ADAM, knobs.DEFAULT, knobs.FOR_TWO):
        found = settle(Config(log_every=100), defaults)
        assert found.log_every == 100
        names = [n for n in Settings.__dataclass_fields__ if n != "log_every"]
        assert all(getattr(found, n) == getattr(defaults, n) for n in names)
    assert settle(Config(sparsity=1.5), knobs.DEFAULT).density is None
    assert settle(Config(density=0.2), ddp.FOR_ADAM).sparsity == 1.0
    pulled = settle(said(pull_sparsity=1.5), knobs.FOR_TWO)
    assert (pulled.topology, pulled.density) == ("owners", None)


def test_the_public_knobs_are_few() -> None:
    assert len(Config.__dataclass_fields__) == 7 + 1  # and the experts'
    both = {*Config.__dataclass_fields__, *Tuning.__dataclass_fields__} - {"tuning"}
    assert both == set(Settings.__dataclass_fields__)
    assert len(knobs.PRESETS) <= 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Config(sparsity=2.0), "sparsity=2.0 is outside"),
        (lambda: Config(tuning={"min_numel": 3}), "must be a Tuning"),  # type: ignore[arg-type]
        (lambda: Tuning(topology="ring"), "'owners', 'direct'"),  # type: ignore[arg-type]
        (lambda: settle({"density": 1}, Settings()), "must be a Config"),  # type: ignore[arg-type]
        (lambda: knobs.preset_of("best"), "'adamw', 'muon', 'fewest-bytes'"),  # type: ignore[arg-type]
        (lambda: knobs.Knobs(outer_lr="2"), r"outer_lr='2' must be a number"),  # type: ignore[arg-type]
        (lambda: knobs.Knobs(outer_lr=True), r"outer_lr=True must be a number"),
        (lambda: knobs.Knobs(outer_lr=float("nan")), r"outer_lr=nan must be a num"),
        (lambda: knobs.Knobs(sync_every=2.0), "sync_every=2.0 must be an integer"),  # type: ignore[arg-type]
        (lambda: knobs.Knobs(sync_every=None, overlap=1), "overlap=1 counts steps"),
    ],
)  # fmt: skip
def test_a_bad_value_is_a_config_error(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_repr_names_what_is_said_only() -> None:
    assert repr(Config()) == "Config()"
    tuned = Config(density=0.1, tuning=Tuning(min_ndim=0))
    assert repr(tuned) == "Config(density=0.1, tuning=Tuning(min_ndim=0))"
    assert repr(Settings(entropy="rans")) == "Settings(entropy='rans')"


def test_auto_predicts_from_the_configuration() -> None:
    bits = {
        name: sent_bits(cpu, settle(given, Settings()))
        for name, given in {
            "s = 1": Config(),
            "s = 1.75": Config(sparsity=1.75),
            "s = 1.75 for the pull": said(pull_sparsity=1.75),
            "density": Config(density=0.1),
            "paper": Config(entropy="none"),
        }.items()
    }
    assert bits["s = 1.75"] < bits["s = 1.75 for the pull"] < bits["s = 1"] < 0.8
    assert bits["s = 1"] < bits["paper"] < bits["density"]
    costs = [
        Costs(0, 0, 0, 1e-6, 0, 0, bits=bits[name]).predict(1000, 2, direct=False)
        for name in ("s = 1", "density")
    ]
    assert costs[0]["3lc"] < costs[1]["3lc"]


def test_hooks_are_there_without_an_import_and_import_no_framework() -> None:
    code = (
        "import lc3, sys; lc3.hooks.ddp.attach; lc3.hooks.local_sgd; lc3.hooks.fsdp2;"
        "lc3.hooks.push_pull; assert 'lightning' in dir(lc3.hooks);"
        "print(sorted({'lightning', 'accelerate', 'transformers', 'horovod'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr
    with pytest.raises(AttributeError, match="has no 'dpp'; there are accelerate, ddp"):
        lc3.hooks.dpp  # noqa: B018


@pytest.mark.parametrize("name", ["lightning", "accelerate", "transformers", "torchft"])
def test_a_framework_that_is_missing_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (name, f"{name}.pytorch"):
        monkeypatch.setitem(sys.modules, part, None)
    monkeypatch.delitem(sys.modules, f"lc3.hooks.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'torch-lc3\[{name}\]'"):
        importlib.import_module(f"lc3.hooks.{name}")


def blocks(kind: str) -> list[str]:
    """Return the code blocks of a kind in README and docs."""
    texts = [page.read_text() for page in PAGES]
    return [b for t in texts for b in re.findall(rf"```{kind}\n(.*?)```", t, re.DOTALL)]


def test_every_name_in_the_documentation_resolves() -> None:
    names = {
        name.rstrip(".")
        for page in PAGES
        for name in re.findall(
            r"`[^`]*?\b(lc3\.[A-Za-z_][A-Za-z_.0-9]*)", page.read_text()
        )
    }
    frameworks = ("lightning", "accelerate", "transformers", "horovod", "torchft")
    assert len(names) > 15
    for name in names - {"lc3.monitor"}:
        found: Any = lc3
        for part in name.split(".")[1:]:
            if part in frameworks or part == "pt":
                break  # test_adapters, test_horovod; a file
            if not hasattr(found, part):
                importlib.import_module(f"lc3.{part}")
            found = getattr(found, part)


def test_the_lines_of_the_documentation_run_as_they_stand(ranks: Pools) -> None:
    added = [
        "".join(line[2:] + "\n" for line in b.splitlines() if line.startswith("+ "))
        for b in blocks("diff")
    ]
    added += [b for b in blocks("python") if "init_" not in b and ">>>" not in b]
    assert len(added) >= 2
    for lines in added:
        for bound, ratio in ranks(2).run(surface_cases.runs, lines):
            assert bound <= {"lc3", "state", "optimizer"}, lines
            assert ("optimizer" in bound) == ("push_pull" in lines)
            assert ratio > 1


def test_hooks_register_as_torchs_do(ranks: Pools) -> None:
    for found in ranks(2).run(surface_cases.registered):
        assert found["equal to attach"]
        assert found["buffers are lc3's"]
        assert found["closed is plain"]


def test_a_state_that_nobody_registers_is_told_of(ranks: Pools) -> None:
    for found in ranks(2).run(surface_cases.forgotten):
        assert found["attach"] == found["register"] == []
        (said,) = found["neither"]
        assert "model.register_comm_hook(state, lc3.hooks.ddp.hook)" in said


def test_every_form_shows_itself_in_a_line(ranks: Pools) -> None:
    for shown in ranks(2).run(surface_cases.shown):
        assert re.fullmatch(
            r"<lc3 ddp: 2 ranks; 1,\d+ of 1,\d+ parameters coded; .*sparsity=1\.1.*"
            r"optimizer='adam', max_update=3\.0; "
            r"\d+\.\d times fewer bytes than float32 so far>",
            shown["ddp"],
        )
        assert "sync_every=16, overlap=0" in shown["local_sgd"]
        assert "outer_lr=1.5, residual_decay=0.9" not in shown["local_sgd"]
        assert "outer_lr=1.2" in shown["local_sgd"]
        assert "inner_momentum_scale=0.8" in shown["local_sgd"]
        assert "optimizer='SGD', max_norm=1.0" in shown["push_pull"]
        first = [
            "lc3: Settings(sparsity=1.1, topology='direct', min_numel=1, min_ndim=0), "
            "chosen for AdamW",
            "lc3: local steps with Settings(density=0.12, entropy='rans', "
            "topology='direct', min_numel=1, min_ndim=0); residual_decay=0.9, "
            "inner_momentum_scale=0.8 chosen: AdamW, density 0.12",
        ]
        assert shown["chosen"] in (first, [])  # on the first rank


def test_one_process_trains_as_without_lc3(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lc3")
    for form in (ddp, local_sgd):
        torch.manual_seed(0)
        nets = [nn.Linear(8, 2), nn.Linear(8, 2)]
        nets[1].load_state_dict(nets[0].state_dict())
        optimizers = [torch.optim.AdamW(net.parameters()) for net in nets]
        with form.attach(nets[0], optimizers[0]) as state:
            for net, optimizer in zip(nets, optimizers, strict=True):
                net(torch.ones(4, 8)).sum().backward()
                optimizer.step()
            state.sync()
            with state.shared_model():
                assert torch.equal(nets[0].weight, nets[1].weight)
            state.check_replicas()
            assert state.meter.sent_bytes == 0
            state.load_state_dict(state.state_dict())
            state.load_gathered(state.gather_state())
    assert "one process" in caplog.text


def test_a_process_of_several_without_a_group_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    net = nn.Linear(8, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(lc3.AttachError, match="wrap the module first"):
        ddp.attach(net, optimizer)  # type: ignore[arg-type]
    with pytest.raises(lc3.AttachError, match="init_process_group first"):
        local_sgd.attach(net, optimizer)


def test_examples_in_docstrings_run() -> None:
    for name in ("choices", "wire.frame", "config", "checkpoint", "errors"):
        module = importlib.import_module(f"lc3.{name}")
        run_examples(module)
    for module in (ddp, local_sgd):
        run_examples(module)


def run_examples(module: ModuleType) -> None:
    model = nn.Linear(8, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    given = {"torch": torch, "lc3": lc3, "model": model, "optimizer": optimizer}
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    failed, tried = doctest.testmod(module, extraglobs=given, optionflags=flags)
    assert tried, module
    assert not failed, module


def test_nearly_every_public_name_has_an_example() -> None:
    named = {
        name: getattr(lc3, name)
        for name in lc3.__all__
        if name not in ("__version__", "hooks")
    }
    named |= {f"{m.__name__}.attach": m.attach for m in (ddp, local_sgd)}
    docstrings = {name: found.__doc__ or "" for name, found in named.items()}
    for adapter, name in ADAPTERS.items():  # whose frameworks may be missing
        tree = ast.parse((ROOT / f"hooks/{adapter}.py").read_text())
        (found,) = (n for n in tree.body if getattr(n, "name", "") == name)
        docstrings[adapter] = ast.get_docstring(found) or ""  # type: ignore[arg-type]
    without = [name for name, said in docstrings.items() if ">>>" not in said]
    assert len(without) < 0.1 * len(docstrings), without


def test_pages_of_examples_run() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        if "notebook" not in page.parts:
            failed, _ = doctest.testfile(str(page), module_relative=False)
            assert not failed, page


def test_help_begins_with_what_it_is_and_how() -> None:
    text = pydoc.plain(pydoc.render_doc(lc3))
    screen = "\n".join(text.splitlines()[:40])
    for words in ("gradient compression", "lc3.hooks.ddp.attach", "local_sgd.attach"):
        assert words in screen


def test_show_choices_prints_them() -> None:
    code = (
        "import lc3, torch; lc3.show_choices(); m = torch.nn.Linear(2, 2);"
        "lc3.hooks.local_sgd.attach(m, torch.optim.AdamW(m.parameters()))"
    )
    done = forked.run([sys.executable, "-c", code])
    assert "outer_lr=2, residual_decay=0.8, inner_momentum_scale=0.5" in done.stderr


def test_the_command_is_installed_and_says_its_units(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for which, words in {
        "measure": ["default: 50", "number of ranks to assume"],
        "doctor": ["milliseconds", "default: 25000000"],
    }.items():
        with pytest.raises(SystemExit) as ended:
            main([which, "--help"])
        assert ended.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert all(word in said for word in words), said
    command = [str(Path(sys.executable).with_name("lc3")), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1] == __version__


def test_arguments_of_the_wrong_kind_are_lc3s_errors(ranks: Pools) -> None:
    busy = "AttachError: lc3 is already attached to this model; close() that state"
    for said in ranks(2).run(surface_cases.refused):
        assert all(one.startswith(busy) for one in said[:4]), said[:4]
        assert "registered as this model's communication hook" in said[4]
        starts = [
            *["ConfigError: max_norm='x' must be a positive", "ConfigError: max_norm="],
            *[
                "ConfigError: max_update='x' must be",
                "ConfigError: max_update=0.0 must",
            ],
            "ConfigError: max_update=3.0 bounds what Adam steps by, and no Adam was",
            *["ConfigError: scaler='x' must be a torch", "AttachError: group='x' must"],
            *[
                "AttachError: mesh='x' must be the",
                "ConfigError: check_every=True must",
            ],
            "AttachError: attach needs a DistributedDataParallel, got str; wrap the",
            "AttachError: attach needs the model, a torch.nn.Module, got str",
            "ConfigError: preset='x' must be one of",
            "AttachError: attach needs a DistributedDataParallel, got WithBuffers;",
            "AttachError: push_pull makes the optimizer of this rank's share itself",
            "AttachError: make_optimizer returned str, not an optimizer",
            "AttachError: params must hold every trainable parameter",
            "AttachError: a group in params has no key 'params'",
        ]
        for one, start in zip(said[5:], starts, strict=True):
            assert one.startswith(start), one


def test_a_loop_that_sets_ddps_flag_itself_still_trains_alone(ranks: Pools) -> None:
    assert ranks(2).run(surface_cases.toggled) == [True, True]


def test_a_state_dict_is_a_copy(ranks: Pools) -> None:
    assert ranks(2).run(surface_cases.taken_twice) == [True, True]


def test_a_preset_and_momentum_go_as_far_in_the_long_run() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    for preset in (None, knobs.PRESETS["adamw"]):
        given = {"outer_momentum": 0.9}
        found, why = knobs.knobs_for([optimizer], knobs.DEFAULT, given, preset)
        assert found.outer_lr == 0.2
        assert "outer_lr=0.2" in why
    found, _ = knobs.knobs_for([optimizer], knobs.DEFAULT, {}, knobs.PRESETS["muon"])
    assert (found.sync_every, found.outer_lr) == (16, 2.0)


@pytest.mark.parametrize("knob", ["min_numel", "min_shard", "block_size", "threads"])
def test_a_count_has_a_limit(knob: str) -> None:
    with pytest.raises(ConfigError, match=f"{knob} must be at most"):
        said(**{knob: 10**400})
    with pytest.raises(ConfigError, match="is outside"):
        Config(sparsity=10**400)
    with pytest.raises(ConfigError, match=r"pull_sparsity=1\.0 would say it again"):
        said(density=0.1, pull_sparsity=1.0)
