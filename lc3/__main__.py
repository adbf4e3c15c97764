"""``python -m lc3``: look before you leap."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence

from lc3.config import check_sparsity
from lc3.errors import ConfigError, Lc3Error
from lc3.ship import command as ship
from lc3.tools import doctor, measure
from lc3.version import __version__


def _sparsity(text: str) -> float:
    try:
        value = float(text)
        check_sparsity("sparsity", value)
    except (ValueError, ConfigError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
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
    parser = argparse.ArgumentParser(
        prog="lc3", description="3LC gradient compression for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"lc3 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser(
        "measure",
        help="what compression would save and cost in your training",
        description="Runs a training script unmodified, and codes its gradients on the "
        "side.",
    )
    measured.add_argument(
        "--steps",
        type=_from(1),
        default=50,
        help="optimizer steps to measure (default: %(default)s)",
    )
    measured.add_argument(
        "--ranks",
        type=_from(2),
        help="number of ranks to assume (default: those of this job, or 4)",
    )
    measured.add_argument(
        *("--sparsity", "-s"),
        type=_sparsity,
        action="append",
        metavar="S",
        help="sparsity multiplier to try, from 1 to below 2; may be given again "
        f"(default: {', '.join(map(str, measure.SPARSITIES))})",
    )
    measured.add_argument("script", help="training script to run unmodified")
    measured.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of the script"
    )
    checked = commands.add_parser(
        "doctor",
        help="versions, speed of the codec, and under torchrun of the link",
        description="Prints versions and measures the codec; under torchrun the link, "
        "too, and below which rate compression pays.",
    )
    checked.add_argument(
        "--elements",
        type=_from(1),
        default=25_000_000,
        help="parameters of the model to judge for (default: %(default)s)",
    )
    checked.add_argument(
        "--compute-ms",
        type=_positive,
        default=100.0,
        metavar="MS",
        help="milliseconds that a step computes, without the exchange (default: "
        "%(default)s)",
    )
    ship.add_to(commands, _positive)
    for command in commands.choices.values():
        command.allow_abbrev = False  # --bit would be --bits
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = commands.choices[options.command]
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command."""
    options = parse(arguments)
    try:
        if options.command == "doctor":
            doctor.report(options.elements, options.compute_ms)
        elif options.command in ship.COMMANDS:
            ship.run(options)
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
    except OSError as error:
        if options.command not in ship.COMMANDS:
            raise
        print(f"lc3: {error}", file=sys.stderr)
        return 2
    return 0


def run() -> None:
    """Be the installed command ``lc3``."""
    sys.exit(main())


if __name__ == "__main__":
    run()
