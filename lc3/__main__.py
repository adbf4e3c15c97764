"""``python -m lc3``: look before you leap."""

import argparse
import sys
from collections.abc import Callable, Sequence

from lc3 import doctor, measure
from lc3.config import check_sparsity
from lc3.errors import ConfigError, Lc3Error


def _sparsity(text: str) -> float:
    try:
        value = float(text)
        check_sparsity("sparsity", value)
    except (ValueError, ConfigError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def _from(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not an integer from {low} up"
            )
        return int(text)

    return convert


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked command line; a bad one ends the program with its reason."""
    parser = argparse.ArgumentParser(prog="lc3", description="3LC for PyTorch")
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser(
        "measure", help="what compression would save and cost in your training"
    )
    measured.add_argument("--steps", type=_from(1), default=50, help="to measure")
    measured.add_argument(
        "--ranks",
        type=_from(2),
        help="of the job to be (default: the script's own, or 4)",
    )
    measured.add_argument(
        *("--sparsity", "-s"),
        type=_sparsity,
        action="append",
        help=f"may be given again (default: {measure.SPARSITIES})",
    )
    measured.add_argument("script", help="that trains, as it is")
    measured.add_argument("arguments", nargs=argparse.REMAINDER, help="its own")
    checked = commands.add_parser("doctor", help="versions, codec and link")
    checked.add_argument("--elements", type=_from(1), default=25_000_000)
    checked.add_argument("--compute-ms", type=float, default=100.0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command."""
    options = parse(arguments)
    try:
        if options.command == "doctor":
            doctor.report(options.elements, options.compute_ms)
        else:
            measure.main(
                options.script,
                options.arguments,
                options.steps,
                options.sparsity or measure.SPARSITIES,
                options.ranks,
            )
    except Lc3Error as error:
        print(f"lc3: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
