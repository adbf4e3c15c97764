"""The map of the rooms, from the ground up, as CONTRIBUTING shows it.

    python -m tests.rooms CONTRIBUTING.md

writes it there. A room's floor is one more than the highest that it imports.
"""

import argparse
import ast
from pathlib import Path

from experiments.tables import grid, insert
from tests.test_structure import ROOT, floors


def purpose(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    sentence, *_ = " ".join(text.split("\n\n")[0].split()).partition(". ")
    return sentence.rstrip(".")


def table() -> str:
    """Return the rooms of lc3 with their floors, the highest first."""
    found = []
    for room, floor in floors().items():
        package, _, name = room.partition(".")
        folder = ROOT / package
        path = folder / f"{name}.py"
        if not path.exists():
            path = folder / name / "__init__.py"
        found.append((floor, room, purpose(path)))
    found.sort(key=lambda one: (-one[0], one[1]))
    lines = [(str(floor), f"`{room}`", what) for floor, room, what in found]
    return grid(("floor", "room", "what it is"), lines, words=(1, 2)) + "\n"


def main() -> None:
    """Write the map to a page."""
    parser = argparse.ArgumentParser(prog="tests.rooms", description=__doc__)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    page.write_text(insert(page.read_text(), "rooms", table()))


if __name__ == "__main__":
    main()
