"""``python -m lc3 ship``, ``unship`` and ``inspect``."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lc3.errors import InputError
from lc3.ship import model, weights
from lc3.ship.container import check_input
from lc3.ship.steps import CODERS

COMMANDS = ("ship", "unship", "inspect")


def add_to(commands: Any, positive: Callable[[str], float]) -> None:
    """Add the three commands to a parser's.

    Args:
        commands: what ``add_subparsers`` returned.
        positive: reads a number above 0.
    """
    ship = commands.add_parser(
        "ship",
        help="write a model as one small file",
        description="Writes a .pt, a .safetensors, or shards with their .safetensors."
        "index.json as one small file. Nothing is lost unless --bits, --error or "
        "--step says so.",
    )
    ship.add_argument("model", type=Path, help="weights to ship")
    ship.add_argument("-o", "--out", type=Path, required=True, help="file to write")
    how = ship.add_mutually_exclusive_group()
    how.add_argument("--bits", type=positive, help="bits of the file for each weight")
    how.add_argument(
        "--error", type=positive, help="largest absolute error of any weight"
    )
    how.add_argument("--step", type=positive, help="distance of two values of a weight")
    how.add_argument(
        "--lossless", action="store_true", help="lose nothing (the default)"
    )
    ship.add_argument(
        "--base", type=Path, help="weights that the receiver holds: ship the difference"
    )
    ship.add_argument(
        "--coder",
        choices=CODERS,
        default="predictive",
        help="predictive is smallest, zstd fastest (default: %(default)s)",
    )
    unship = commands.add_parser(
        "unship",
        help="write a shipped model as .safetensors or .pt",
        description="Writes a shipped model as .safetensors or .pt.",
    )
    unship.add_argument("file", type=Path, help="shipped model")
    unship.add_argument("-o", "--out", type=Path, required=True, help="file to write")
    unship.add_argument("--base", type=Path, help="what the file is a difference to")
    inspect = commands.add_parser(
        "inspect",
        help="what a shipped model holds",
        description="Prints a table of a shipped model's tensors: how each is coded, "
        "bits a value, and the step (nearest values are at most half of it away; where "
        "--bits was given, some that cost fewer bits are farther).",
    )
    inspect.add_argument("file", type=Path, help="shipped model")


def run(options: argparse.Namespace) -> None:
    """Run one of the commands.

    Raises:
        Lc3Error, OSError: it failed, and says why.
    """
    if options.command == "inspect":
        print(_printable(table(options.file)))
    elif options.command == "unship":
        weights.check_target(options.out)
        with _progress(f"unship {options.file.name}") as (known, progress):
            known(sum(row.nbytes for row in model.rows(options.file)))
            model.unship(
                options.file, options.out, base=options.base, progress=progress
            )
        print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    else:
        _ship(options)


def _ship(options: argparse.Namespace) -> None:
    if options.out.suffix != model.SUFFIX:
        raise InputError(f"{options.out} must end in {model.SUFFIX}")
    with (
        weights.opened(options.model) as state,
        _progress(f"ship {options.model.name}") as (known, progress),
    ):
        total = _check(state)
        known(total)
        written = model.save(
            state,
            options.out,
            bits=options.bits,
            error=options.error,
            step=options.step,
            lossless=options.lossless,
            base=options.base,
            coder=options.coder,
            notes=getattr(state, "notes", None),
            progress=progress,
        )
    print(
        f"{options.out}: {written:,} bytes, {total / max(1, written):.2f} times fewer "
        f"than {total:,}"
    )


def _check(state: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors.

    Raises:
        InputError: the file holds state dicts, or tensors that cannot be shipped.
    """
    inner = [key for key, value in state.items() if isinstance(value, Mapping)]
    if inner:
        raise InputError(
            f"the file holds {', '.join(map(repr, inner))} inside, not a state_dict "
            "alone; torch.save the one to ship by itself"
        )
    total = 0
    for name in state:
        tensor = state[name]
        check_input(name, tensor)
        total += tensor.nbytes
    return total


def _printable(text: str) -> str:
    """Return what the terminal's encoding has of a text."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def table(path: Path) -> str:
    """Return the table of a file as text."""
    lines = [("tensor", "dtype", "shape", "coded as", "bytes", "bits", "step")]
    found = model.rows(path)
    for row in found:
        shape = "×".join(map(str, row.shape)) or "scalar"
        step = "0" if row.step is None else f"{row.step:.3g}"
        dtype = str(row.dtype).removeprefix("torch.")
        size = (f"{row.stored_bytes:,}", f"{row.bits:.2f}")
        name = "".join(c if c.isprintable() else repr(c)[1:-1] for c in row.name)
        lines.append((name, dtype, shape, row.coding, *size, step))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    file_bytes = path.stat().st_size
    before = sum(row.nbytes for row in found)
    return "\n".join(
        [
            *text,
            f"{file_bytes:,} bytes, {before / max(1, file_bytes):.2f} times fewer than "
            f"{before:,}",
        ]
    )


@contextmanager
def _progress(
    what: str,
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Give a way to say how many bytes there are, and one to say that some are done."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
    except ImportError as error:
        raise InputError(
            "the commands need the package rich: pip install 'torch-lc3[ship]'"
        ) from error
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    hidden = not sys.stderr.isatty()
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=None)
        yield (
            lambda total: bar.update(task, total=total),
            lambda done: bar.advance(task, done),
        )
