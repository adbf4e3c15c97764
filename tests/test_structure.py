"""Imports point downward only, and a framework is imported in one file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lc3 import AttachError, private

ROOT = Path(__file__).parents[1]
BELOW = {
    "errors": set(),
    "version": set(),
    "private": {"errors"},
    "frameworks": {"config", "errors", "meter", "state"},
    "choices": set(),
    "knobs": {"config", "errors"},
    "state": {"checkpoint", "config", "engine", "meter", "session"},
    "model": {"errors", "transport", "private"},
    "says": {"errors"},
    "buffers": {"model", "private"},
    "link": {"buffers", "errors", "private"},
    "steps": {"errors", "model"},
    "format": {"errors"},
    "config": {"errors"},
    "budget": {"config"},
    "entropy": {"errors", "format"},
    "codec": {"config", "entropy", "errors", "format"},
    "rans": {"codec", "errors", "format"},
    "transport": {"errors"},
    "plan": {"config", "errors"},
    "residual": {"plan"},
    "files": set(),
    "checkpoint": {"errors", "files", "plan"},
    "ship": {"checkpoint", "codec", "errors", "files"},
    "meter": {"private"},
    "moments": set(),
    "sketch": set(),
    "applied": {"errors", "model", "moments", "residual", "private"},
    "monitor": {"meter"},
    "message": {
        *("codec", "config", "entropy", "errors", "format", "plan", "rans"),
    },
    "workers": set(),
    "coder": {"codec", "workers"},
    "lane": {"errors"},
    "handshake": {"config", "errors", "transport", "workers"},
    "owners": {"engine", "format", "plan"},
    "channel": {"budget", "errors", "format", "meter", "transport"},
    "two_levels": {
        *(
            "auto",
            "channel",
            "coder",
            "config",
            "engine",
            "errors",
            "transport",
            "meter",
            "plan",
        ),
    },
    "session": {
        *(
            "auto",
            "buffers",
            "checkpoint",
            "codec",
            "coder",
            "config",
            "engine",
            "errors",
            "transport",
            "handshake",
            "lane",
            "link",
        ),
        *("meter", "model", "plan", "private", "rans", "two_levels", "version"),
    },
    "measure": {
        "applied",
        *("codec", "coder", "config", "engine", "errors", "transport", "meter", "plan"),
    },
    "doctor": {
        "auto",
        "codec",
        "config",
        "transport",
        "handshake",
        "measure",
        "version",
        "workers",
    },
    "__main__": {"config", "doctor", "errors", "measure", "ship", "version"},
    "auto": {"codec", "config", "transport", "format", "message", "plan"},
    "engine": {
        *(
            "auto",
            "budget",
            "channel",
            "coder",
            "config",
            "transport",
            "format",
            "message",
        ),
        *("meter", "plan", "residual"),
    },
}


def floors() -> dict[str, int]:
    """Return for every room, and every hook, how many floors are below it."""
    found: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((height(below) for below in BELOW[room]), default=0)
        return found[room]

    named = {f"lc3.{room}": height(room) for room in BELOW}
    top = 1 + max(named.values())
    hooks = {f"hooks.{path.stem}": top for path in (ROOT / "hooks").glob("*.py")}
    return {**named, **hooks}


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> dict[str, list[Path]]:
    rooms = {path.stem: [path] for path in (ROOT / "lc3").glob("*.py")}
    for folder in ("codec", "ship"):
        rooms[folder] = list((ROOT / "lc3" / folder).glob("*.py"))
    del rooms["__init__"]
    return rooms


def lc3_imports(path: Path) -> set[str]:
    """Return which rooms of lc3 a file imports."""
    found = set()
    for module in imported(path):
        top, _, rest = module.partition(".")
        if top == "lc3" and rest:
            found.add(rest.split(".")[0])
    return found


def test_every_room_is_listed() -> None:
    assert set(sources()) == set(BELOW)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    for path in sources()[room]:
        known = {name for name in lc3_imports(path) if name in BELOW}
        assert known <= {*BELOW[room], room}, path


def test_the_codec_knows_no_network_and_the_transport_no_codec() -> None:
    for path in sources()["codec"]:
        assert not any(name.startswith("torch.dist") for name in imported(path)), path


def test_nothing_below_imports_hooks_experiments_or_tests() -> None:
    for paths in sources().values():
        for path in paths:
            tops = {name.partition(".")[0] for name in imported(path)}
            assert not tops & {"hooks", "experiments", "tests", "launch"}, path
            assert "hooks" not in lc3_imports(path), path
    for path in (ROOT / "hooks").glob("*.py"):
        tops = {name.partition(".")[0] for name in imported(path)}
        assert not tops & {"experiments", "tests", "launch"}, path


def private_names(path: Path) -> Iterator[str]:
    """Yield what a file uses of others that begins with an underscore."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("lc3"):
            names = [alias.name for alias in node.names]
            yield from (f"{node.module}.{n}" for n in names if n.startswith("_"))
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "part"):
                yield f"{owner}.{node.attr}"


def test_private_names_of_torch_are_used_in_one_file() -> None:
    files = [path for paths in sources().values() for path in paths]
    files += (ROOT / "hooks").glob("*.py")
    others = {path.name: set(private_names(path)) for path in files}
    assert len(others.pop("private.py")) > 10
    assert {name: found for name, found in others.items() if found} == {
        "accelerate.py": {"accelerator._optimizers"},
        "horovod.py": {"horovod.torch.optimizer._DistributedOptimizer"},
    }


def test_a_torch_without_a_private_name_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private.check()
    monkeypatch.delattr(torch, "_foreach_norm")
    with pytest.raises(
        AttachError, match=r"has no torch\._foreach_norm, which lc3 uses"
    ):
        private.check()


def test_a_framework_is_imported_in_one_file() -> None:
    files = [*(ROOT / "lc3").glob("*.py"), *(ROOT / "lc3/codec").glob("*.py")]
    files += (ROOT / "lc3/ship").glob("*.py")
    for framework in ("horovod", "lightning", "accelerate", "transformers"):
        for path in files:
            assert framework not in {m.partition(".")[0] for m in imported(path)}, path


def test_nothing_runs_a_pickle() -> None:
    forbidden = (" eval(", " exec(", "weights_only=False")
    for folder in ("lc3", "lc3/codec", "lc3/ship", "hooks"):
        for path in (ROOT / folder).glob("*.py"):
            tops = {module.partition(".")[0] for module in imported(path)}
            assert "pickle" not in tops, path
            assert not any(word in path.read_text() for word in forbidden), path
