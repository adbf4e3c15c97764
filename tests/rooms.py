"""Which rooms there are, what each may import, and their map in CONTRIBUTING.

    python -m tests.rooms CONTRIBUTING.md

writes it there. A room is a file, but of ``WHOLE`` folders. The floor of a room, or of
a folder, is one more than the highest that it imports.
"""

import argparse
import ast
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

from experiments.tables import grid, insert

ROOT = Path(__file__).parents[1]
WHOLE = ("codec", "ship")
TOP = "__main__"  # the command line, above all folders
# What each room of lc3 may import, folder by folder; "" is the ground.
FOLDERS: dict[str, dict[str, str]] = {
    "": {
        "__main__": "config doctor errors measure ship version",
        "budget": "config",
        "checkpoint": "errors files plan",
        "choices": "",
        "config": "errors",
        "errors": "",
        "files": "",
        "format": "errors",
        "knobs": "config errors",
        "meter": "private",
        "monitor": "meter",
        "plan": "config errors",
        "private": "errors",
        "residual": "plan",
        "version": "",
    },
    "codec": {
        "codec": "errors format",
    },
    "transport": {
        "channel": "budget errors format meter protocol",
        "group": "errors protocol",
        "handshake": "config errors protocol workers",
        "lane": "errors",
        "loopback": "errors protocol",
        "protocol": "",
        "workers": "",
    },
    "wire": {
        "coder": "codec workers",
        "entropy": "errors format",
        "frame": "codec config entropy errors format",
        "message": "codec config entropy errors format plan rans",
        "messages": "budget coder config errors format message meter plan",
        "rans": "codec errors format",
    },
    "module": {
        "applied": "errors model moments private residual",
        "buffers": "model private",
        "link": "buffers errors private",
        "model": "errors private protocol",
        "moments": "",
        "sketch": "",
        "steps": "errors model",
    },
    "engines": {
        "auto": "costs engine exchange plan",
        "costs": "codec config exchange format message plan protocol",
        "direct": (
            "budget channel coder config engine exchange format meter plan protocol "
            "residual"
        ),
        "engine": (
            "budget channel coder config errors exchange format messages meter plan "
            "protocol residual"
        ),
        "exchange": "budget channel config messages meter plan protocol residual",
        "two_levels": (
            "channel coder config direct errors exchange meter plan protocol residual"
        ),
    },
    "masters": {
        "edits": "errors exchange model owners",
        "norm": "exchange format sketch",
        "owners": "engine exchange format plan",
        "pushes": "edits errors exchange format model norm owners residual stand_in",
        "sharded": "checkpoint errors",
        "stand_in": "applied errors",
    },
    "session": {
        "attaching": "config errors group groups handshake protocol version",
        "averages": (
            "applied buckets checkpoint checks config errors exchange meter model state"
        ),
        "buckets": "applied errors exchange moments private sketch",
        "checks": "config errors model",
        "groups": "errors group loopback private protocol",
        "session": (
            "attaching auto channel checkpoint checks codec coder config costs "
            "direct engine errors exchange groups handshake lane meter plan private "
            "protocol rans residual two_levels version"
        ),
        "state": "checkpoint config exchange meter session",
        "wrapped": "buffers checks config errors groups link model private session",
    },
    "local": {
        "ends": (
            "checkpoint config errors groups held link model says session site steps"
        ),
        "fragments": "errors says",
        "held": "errors handshake model private protocol site",
        "joining": (
            "attaching checks config ends handshake held local_steps site version"
        ),
        "local_steps": (
            "checks config ends errors fragments held knobs link model outer owners "
            "residual says session state statistics steps"
        ),
        "meeting": "errors says",
        "outer": "knobs owners steps",
        "says": "errors",
        "seed": "errors ship",
        "site": "channel errors group meter private says",
        "statistics": "channel model says",
    },
    "tools": {
        "doctor": "codec config costs group handshake knobs measure version workers",
        "measure": (
            "applied codec coder config direct engine errors loopback meter plan"
        ),
    },
    "ship": {
        "ship": "checkpoint codec errors files",
    },
}
BELOW = {
    room: set(below.split())
    for rooms in FOLDERS.values()
    for room, below in rooms.items()
}
FOLDER_OF = {room: folder for folder, rooms in FOLDERS.items() for room in rooms}


def path_of(room: str) -> Path:
    """Return a room's file, or its folder's front."""
    if room in WHOLE:
        return ROOT / "lc3" / room / "__init__.py"
    return ROOT / "lc3" / FOLDER_OF[room] / f"{room}.py"


def heights(below: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the floor of each.

    Raises:
        graphlib.CycleError: some import each other in a circle.
    """
    found: dict[str, int] = {}
    for one in TopologicalSorter(below).static_order():
        found[one] = 1 + max((found[other] for other in below[one]), default=0)
    return found


def floors() -> dict[str, int]:
    """Return for every room, and every hook, how many floors are below it."""
    named = {f"lc3.{room}": floor for room, floor in heights(BELOW).items()}
    top = 1 + max(named.values())
    hooks = {f"hooks.{path.stem}": top for path in (ROOT / "hooks").glob("*.py")}
    return {**named, **hooks}


def folders() -> dict[str, set[str]]:
    """Return which folders each folder of lc3 imports."""
    found: dict[str, set[str]] = {folder: set() for folder in FOLDERS}
    for room, below in BELOW.items():
        if room != TOP:
            others = {FOLDER_OF[other] for other in below}
            found[FOLDER_OF[room]] |= others - {FOLDER_OF[room]}
    return found


def purpose(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    sentence, *_ = " ".join(text.split("\n\n")[0].split()).partition(". ")
    return sentence.rstrip(".")


def table() -> str:
    """Return the folders of lc3 with their floors, the highest first."""
    found = heights(folders())
    top = 1 + max(found.values())
    hooks = sorted(path.stem for path in (ROOT / "hooks").glob("*.py"))
    lines = [(top, "hooks", purpose(ROOT / "hooks/__init__.py"), hooks[1:])]
    for folder, floor in found.items():
        front = ROOT / "lc3" / folder / "__init__.py"
        what = purpose(front) if folder else "What all others stand on"
        rooms = sorted(FOLDERS[folder]) if folder not in WHOLE else []
        if folder in WHOLE:
            rooms = sorted(path.stem for path in front.parent.glob("*.py"))[1:]
        name = f"lc3/{folder}".rstrip("/")
        lines.append((floor, name, what, [room for room in rooms if room != TOP]))
    lines.sort(key=lambda line: (-line[0], line[1]))
    rows = [
        (str(floor), f"`{name}`", what, ", ".join(f"`{room}`" for room in rooms))
        for floor, name, what, rooms in lines
    ]
    return (
        grid(("floor", "folder", "what it is", "rooms"), rows, words=(1, 2, 3)) + "\n"
    )


def main() -> None:
    """Write the map to a page."""
    parser = argparse.ArgumentParser(prog="tests.rooms", description=__doc__)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    page.write_text(insert(page.read_text(), "rooms", table()))


if __name__ == "__main__":
    main()
