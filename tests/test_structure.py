"""Imports point downward only, and a framework is imported in one file."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lc3 import AttachError, private
from tests.rooms import (
    BELOW,
    FOLDERS,
    ROOT,
    WHOLE,
    folders,
    heights,
    path_of,
    table,
)


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
    return {
        room: list(path_of(room).parent.glob("*.py"))
        if room in WHOLE
        else [path_of(room)]
        for room in BELOW
    }


def lc3_imports(path: Path) -> set[str]:
    """Return which rooms of lc3 a file imports."""
    found = set()
    for module in imported(path):
        top, *inside = module.split(".")
        if top != "lc3" or not inside:
            continue
        folder, *rest = inside
        if folder in WHOLE or folder not in FOLDERS:
            found.add(folder)
        elif rest:
            found.add(rest[0])
    return found


def test_every_room_is_listed() -> None:
    listed = {path for paths in sources().values() for path in paths}
    listed |= {ROOT / "lc3" / folder / "__init__.py" for folder in FOLDERS}
    assert listed == set((ROOT / "lc3").rglob("*.py")) - set(
        (ROOT / "lc3/hooks").glob("*.py")
    )
    assert sum(map(len, FOLDERS.values())) == len(BELOW)  # names are one room's
    for folder in set(FOLDERS) - {"", *WHOLE}:  # says what it is, and imports nothing
        assert not list(imported(ROOT / "lc3" / folder / "__init__.py"))


def test_folders_stand_on_few_floors_and_the_ground_on_nothing() -> None:
    below = folders()
    assert not below[""]
    assert max(heights(below).values()) <= 6  # and the hooks on the seventh


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


# From the ground up: each imports what stands before it only.
PACKAGES = ("lc3", "hooks", "experiments", "launch", "tests")


def modules() -> dict[str, Path]:
    """Return every module of the repository but ``lc3``'s front, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if inside.parts[:2] == ("lc3", "hooks") or inside == Path(
                "lc3/__init__.py"
            ):
                continue
            parts = inside.with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_packages_import_only_what_is_below_them() -> None:
    for name, path in modules().items():
        package = name.partition(".")[0]
        above = set(PACKAGES[PACKAGES.index(package) + 1 :])
        tops = {module.partition(".")[0] for module in imported(path)}
        tops |= {"hooks"} if "hooks" in lc3_imports(path) else set()
        assert not tops & above, f"{name} imports {tops & above}"


# Folders of experiments, those that stand on them below.
EXPERIMENTS = (("",), ("lab",), ("harness",), ("report",), ("bench", "ship"))


def test_folders_of_experiments_import_only_what_is_below_them() -> None:
    floor = {folder: at for at, row in enumerate(EXPERIMENTS) for folder in row}
    files = (ROOT / "experiments").rglob("*.py")
    for path in files:
        folder = path.parent.relative_to(ROOT / "experiments").as_posix()
        if folder in ("examples", "scripts"):  # of a user's, and beside the others
            continue
        own = floor["" if folder == "." else folder]
        for module in imported(path):
            top, *inside = module.split(".")
            if top == "experiments" and inside:
                other = inside[0] if inside[0] in floor else ""
                assert floor[other] < own or other == folder or not other, path


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {}
    for name, path in known.items():
        below = {m.replace("lc3.hooks", "hooks") for m in imported(path)}
        graph[name] = below.intersection(known) - {name, name.rpartition(".")[0]}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) > 100


def private_names(path: Path) -> Iterator[str]:
    """Yield what a file uses of others that begins with an underscore."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("lc3"):
            names = [alias.name for alias in node.names]
            yield from (f"{node.module}.{n}" for n in names if n.startswith("_"))
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "part", "super()"):
                yield f"{owner}.{node.attr}"


def test_private_names_of_torch_are_used_in_one_file() -> None:
    files = [path for paths in sources().values() for path in paths]
    files += (ROOT / "hooks").glob("*.py")
    others = {path.name: set(private_names(path)) for path in files}
    assert len(others.pop("private.py")) > 10
    assert {name: found for name, found in others.items() if found} == {
        "accelerate.py": {"accelerator._optimizers"},
        "compiled.py": {
            *("made._cache", "self._disk._load_data", "self._disk._save_data"),
        },
        "torchft.py": {
            *("manager._pg", "manager._quorum_id", "manager._quorum_future"),
            *("manager._timeout", "manager._quorum_timeout"),
            *("manager._use_async_quorum", "manager._group_world_size"),
            *("manager._replica_world_size_mode", "manager._replica_id"),
        },
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
    files = [path for paths in sources().values() for path in paths]
    for framework in ("horovod", "lightning", "accelerate", "transformers", "torchft"):
        for path in files:
            assert framework not in {m.partition(".")[0] for m in imported(path)}, path


def test_nothing_runs_a_pickle() -> None:
    forbidden = (" eval(", " exec(", "weights_only=False")
    for folder in ("lc3", "hooks"):
        for path in (ROOT / folder).rglob("*.py"):
            tops = {module.partition(".")[0] for module in imported(path)}
            assert "pickle" not in tops, path
            assert not any(word in path.read_text() for word in forbidden), path


def test_the_map_of_the_rooms_is_true() -> None:
    assert table() in (ROOT / "CONTRIBUTING.md").read_text()
