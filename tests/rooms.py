"""Which rooms there are, what each may import, and their map in CONTRIBUTING.

    python -m tests.rooms CONTRIBUTING.md

writes it there. A room's floor is one more than the highest that it imports.
"""

import argparse
import ast
from pathlib import Path

from experiments.tables import grid, insert

ROOT = Path(__file__).parents[1]
# What each room of lc3 may import.
BELOW = {
    "errors": set(),
    "version": set(),
    "private": {"errors"},
    "choices": set(),
    "knobs": {"config", "errors"},
    "state": {"checkpoint", "config", "exchange", "meter", "session"},
    "model": {"errors", "transport", "private"},
    "says": {"errors"},
    "meeting": {"errors", "says"},
    "seed": {"errors", "ship"},
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
    "owners": {"engine", "exchange", "format", "plan"},
    "outer": {"knobs", "owners"},
    "norm": {"exchange", "format", "sketch"},
    "sharded": {"checkpoint", "errors"},
    "edits": {"errors", "exchange", "model", "owners"},
    "stand_in": {"applied", "errors"},
    "pushes": {
        *("edits", "errors", "exchange", "format", "model", "norm", "owners"),
        *("residual", "stand_in"),
    },
    "fragments": {"errors", "says"},
    "held": {"errors", "handshake", "model", "private", "site", "transport"},
    "site": {"channel", "errors", "meter", "private", "says", "transport"},
    "statistics": {"channel", "model", "says"},
    "ends": {
        *("checkpoint", "config", "errors", "held", "link", "model", "says"),
        *("session", "site", "steps"),
    },
    "local_steps": {
        *("config", "ends", "errors", "fragments", "held", "knobs", "link", "model"),
        *("outer", "owners", "residual", "says", "session", "state", "statistics"),
        "steps",
    },
    "channel": {"budget", "errors", "format", "meter", "transport"},
    "messages": {
        *("budget", "coder", "config", "errors", "format", "message", "meter"),
        "plan",
    },
    "averages": {
        *("applied", "buckets", "checkpoint", "config", "errors", "exchange"),
        *("meter", "model", "session", "state"),
    },
    "buckets": {"applied", "errors", "exchange", "moments", "private", "sketch"},
    "exchange": {
        *("budget", "channel", "config", "messages", "meter", "plan", "residual"),
        "transport",
    },
    "direct": {
        *("budget", "channel", "coder", "config", "engine", "exchange", "format"),
        *("meter", "plan", "residual", "transport"),
    },
    "two_levels": {
        *("channel", "coder", "config", "direct", "errors", "exchange", "meter"),
        *("plan", "residual", "transport"),
    },
    "session": {
        *(
            "auto",
            "buffers",
            "channel",
            "checkpoint",
            "codec",
            "coder",
            "config",
            "costs",
            "direct",
            "engine",
            "errors",
            "exchange",
            "transport",
            "handshake",
            "lane",
            "link",
        ),
        *("meter", "model", "plan", "private", "rans", "residual", "two_levels"),
        "version",
    },
    "measure": {
        "applied",
        *("codec", "coder", "config", "direct", "engine", "errors", "transport"),
        *("meter", "plan"),
    },
    "doctor": {
        "costs",
        "codec",
        "config",
        "transport",
        "handshake",
        "knobs",
        "measure",
        "version",
        "workers",
    },
    "__main__": {"config", "doctor", "errors", "measure", "ship", "version"},
    "costs": {
        *("codec", "config", "exchange", "format", "message", "plan", "transport"),
    },
    "auto": {"costs", "engine", "exchange", "plan"},
    "engine": {
        *("budget", "channel", "coder", "config", "errors", "exchange", "format"),
        *("messages", "meter", "plan", "residual", "transport"),
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
