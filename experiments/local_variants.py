"""Variants of local steps, some of which lc3 does not have: what each ends with.

    torchrun --nproc-per-node 4 -m experiments.local_variants --data-dir input.txt

Prints the test loss after training, how many times fewer bytes coded tensors took than
float32, and the same after exchanges without steps, which deliver what was still owed.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from experiments.methods import FOR_ADAM
from experiments.record import ResultError, read_csv, stamped, write_csv
from experiments.tables import grid, length
from experiments.tasks import TASKS, DataError
from experiments.train import (
    WARM_UP,
    at_least,
    batches,
    evaluate_together,
    scale_rate,
    schedule,
    share,
    train_step,
)
from launch import ranks
from lc3.config import Settings
from lc3.hooks import local_sgd

_COLUMN = {"inner_momentum_scale": "momentum_decay"}  # as it was called first
KNOBS = ("lr", "warm_up", "residual_decay", "momentum_decay", "outer_lr")

# What tells trainings of different settings apart, beside their seeds.
SETTINGS = (
    *("task", "ranks", "steps", "every", "density", "variant"),
    *KNOBS,
    *("outer_momentum", "extra"),
)


def go_on_from_own(state: local_sgd.State) -> None:
    """Let a rank go on from the replica and what it has not sent yet.

    Its residual is then part of its model, and not of the next push a second time.
    """

    def start_again() -> None:
        for name, flat in state._model.flats().items():
            flat.copy_(state.owners.replica[name])
            residual = state.engine.residuals.sent.get(name)
            if residual is not None:
                flat.sub_(residual)
                residual.zero_()

    state._copy_replica = start_again  # type: ignore[method-assign]
    # What parameters then are is no load of other weights.
    state._watch.look = lambda *_, **__: None  # type: ignore[method-assign]


def average_moments(state: local_sgd.State, optimizers: Sequence[Optimizer]) -> None:
    """Average first moments over ranks at each exchange; their bytes are not counted.

    What it would bring, were it free (Local Adam, arXiv 2409.13155; DES-LOC,
    arXiv 2505.22549).
    """
    decay = state._decay_momenta

    def average_first() -> None:
        for optimizer in optimizers:
            for kept in optimizer.state.values():
                for key in local_sgd.MOMENTA:
                    if key in kept:
                        dist.all_reduce(kept[key])
                        kept[key] /= dist.get_world_size()
        decay()

    state._decay_momenta = average_first  # type: ignore[method-assign]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(
        prog="experiments.local_variants", description="Variants of local steps."
    )
    parser.add_argument("--task", choices=TASKS, default="chars-muon")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=at_least(1), default=1600)
    parser.add_argument("--every", type=at_least(1), default=16)
    parser.add_argument("--density", type=float, default=0.1)
    coded = parser.add_mutually_exclusive_group()
    coded.add_argument("--raw", action="store_true", help="send float32, uncoded")
    coded.add_argument("--all-coded", action="store_true", help="vectors too, by rans")
    parser.add_argument("--own", action="store_true", help=go_on_from_own.__doc__)
    parser.add_argument("--average", action="store_true", help=average_moments.__doc__)
    parser.add_argument("--lr", type=float, default=1.0, help="multiplies the task's")
    parser.add_argument("--warm-up", type=share, default=WARM_UP, help="share of steps")
    parser.add_argument("--residual-decay", type=float, default=1.0)
    parser.add_argument("--momentum-decay", type=float, default=1.0)
    parser.add_argument("--outer-lr", type=float, default=1.0)
    parser.add_argument("--outer-momentum", type=float, default=0.0)
    parser.add_argument("--extra", type=at_least(0), default=0, help="exchanges at end")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> Settings:
    """Return what to compress."""
    if options.raw:
        return Settings(density=options.density, exclude=("*",))
    if options.all_coded:
        return Settings(
            density=options.density, min_ndim=0, min_numel=1, entropy="rans"
        )
    return Settings(density=options.density)


def over_seeds(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return one row for those that differ in their seeds only.

    Raises:
        ResultError: one was trained with other seeds than another.
    """
    same: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        same.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    if len({tuple(row["seed"] for row in alike) for alike in same.values()}) > 1:
        raise ResultError("variants were trained with different seeds: train the rest")
    means = []
    for alike in same.values():
        mean = dict(alike[0])
        for name in ("fewer", "test_loss"):
            if mean[name]:
                mean[name] = str(sum(float(row[name]) for row in alike) / len(alike))
        means.append(mean)
    return means


def table(path: Path) -> str:
    """Return the rows of a result file as Markdown, most bytes first.

    Bytes and losses are means over seeds.
    """
    titles = ["steps between exchanges", "density", "", "fewer in coded tensors"]
    titles.append("test loss")
    lines = []
    rows = read_csv(path)
    for row in sorted(over_seeds(rows), key=lambda r: float(r["fewer"] or 0)):
        what = [row["variant"]] if row["variant"] else []
        if float(row["lr"]) != 1:
            what.append(f"lr × {row['lr']}")
        if float(row["residual_decay"]) != 1:
            what.append(f"residuals × {row['residual_decay']}")
        if float(row["momentum_decay"]) != 1:
            what.append(f"first moments × {row['momentum_decay']}")
        if float(row["outer_lr"]) != 1:
            what.append(f"outer rate {row['outer_lr']}")
        if float(row["outer_momentum"]):
            what.append(f"Nesterov momentum {row['outer_momentum']} of the masters")
        if int(row["extra"]):
            what.append(f"{row['extra']} more exchanges at the end")
        sent = f"{100 * float(row['density']):.3g} %" if row["density"] else "float32"
        fewer = f"{float(row['fewer']):.0f} ×" if row["fewer"] else ""
        loss = f"{float(row['test_loss']):.4f}"
        lines.append([row["every"], sent, ", ".join(what), fewer, loss])
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    first, seeds = rows[0], ", ".join(dict.fromkeys(row["seed"] for row in rows))
    many = "seeds" if "," in seeds else "seed"
    return (
        f"{grid(titles, lines, words=(2,))}\n\nTask {first['task']}, {first['ranks']} "
        f"ranks, {length(first)}, {many} {seeds}. lc3 {first['lc3']} at "
        f"commit {commits}.\n"
    )


def halved_table(paths: Sequence[Path]) -> str:
    """Return what ``FOR_ADAM`` brings, by optimizer, as Markdown, most gained first.

    A line for each task and form that was trained with and without them at the task's
    own rate, with means over the seeds of both.
    """
    kept = ("task", "ranks", "steps", "warm_up", "every", "density")
    others = {"lr": "1.0", "variant": "", "outer_momentum": "0.0", "extra": "0"}
    found: dict[tuple[str, ...], dict[bool, dict[str, float]]] = {}
    for row in (row for path in paths for row in read_csv(path)):
        if {name: row[name] for name in others} != others:
            continue
        knobs = {knob: float(row[_COLUMN.get(knob, knob)]) for knob in FOR_ADAM}
        if knobs == FOR_ADAM or set(knobs.values()) == {1.0}:
            both = found.setdefault(tuple(row[name] for name in kept), {})
            mine = both.setdefault(knobs == FOR_ADAM, {})
            mine[row["seed"]] = float(row["test_loss"])
    lines = []
    for (task, ranks_, steps, rising, every, density), both in found.items():
        seeds = both.get(True, {}).keys() & both.get(False, {}).keys()
        if not seeds:
            continue
        before, after = (
            sum(both[halved][seed] for seed in seeds) / len(seeds)
            for halved in (False, True)
        )
        line = [_optimizer(task), task.removesuffix("-adamw").removesuffix("-muon")]
        line += [ranks_, steps, f"{100 * float(rising):g} %"]
        line += [every, f"{100 * float(density):g} %", f"{before:.4f}", f"{after:.4f}"]
        line += [f"{100 * (after / before - 1):+.1f} %", f"{len(seeds)}"]
        lines.append(line)
    titles = ["optimizer", "task", "ranks", "steps", "warm-up", "H", "density"]
    titles += ["1 each", "2, 0.8 and 0.5", "change", "seeds"]
    lines.sort(key=lambda line: (line[0], float(line[-2].removesuffix(" %"))))
    return grid(titles, lines, words=(0, 1)) + "\n"


def _optimizer(task: str) -> str:
    if "muon" in task:
        return "Muon"
    return "AdamW" if "adamw" in task or "chars" in task else "SGD"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once and print what came of it."""
    options = parse(arguments)
    earlier: list[dict[str, str]] = []
    try:
        if options.out and options.out.exists():
            earlier = read_csv(options.out, KNOBS)
    except ResultError as error:  # before the training, not after it
        raise SystemExit(f"experiments.local_variants: {error}") from error
    ranks.init()
    torch.manual_seed(options.seed)
    try:
        task = TASKS[options.task](options.data_dir)
    except DataError as error:
        raise SystemExit(f"experiments.local_variants: {error}") from error
    module = task.make_model()
    optimizers = task.make_optimizers(module)
    for optimizer in optimizers:
        scale_rate(optimizer, options.lr)
    state = local_sgd.attach(
        module,
        optimizers,
        chosen(options),
        sync_every=options.every,
        outer_lr=options.outer_lr,
        outer_momentum=options.outer_momentum,
        residual_decay=options.residual_decay,
        inner_momentum_scale=options.momentum_decay,
    )
    if options.own:
        go_on_from_own(state)
    if options.average:
        average_moments(state, optimizers)
    schedules = [schedule(o, options.steps, options.warm_up) for o in optimizers]
    for batch in batches(task, options.seed, options.steps):
        train_step(module, optimizers, batch)
        for rate in schedules:
            rate.step()
    variants = {
        "all coded": options.all_coded,
        "own model": options.own,
        "first moments averaged": options.average,
    }
    rows: list[dict[str, object]] = []
    for extra in range(options.extra + 1):
        if extra:
            state.exchange()
        loss, _ = evaluate_together(module, task.test)
        bits = sum(way.bits_per_element for way in (state.meter.push, state.meter.pull))
        fewer = round(64 * options.steps / (state.exchanges * bits), 1)
        rows.append(
            {
                "task": task.name,
                "ranks": dist.get_world_size(),
                "steps": options.steps,
                "every": options.every,
                "density": "" if options.raw else options.density,
                "variant": ", ".join(name for name, on in variants.items() if on),
                **{knob: getattr(options, knob) for knob in KNOBS},
                "outer_momentum": options.outer_momentum,
                "extra": extra,
                "seed": options.seed,
                "fewer": "" if options.raw else fewer,
                "test_loss": round(loss, 5),
            }
        )
        if dist.get_rank() == 0:
            said = "" if options.raw else f", {fewer:.0f} × fewer"
            print(f"{extra} exchanges after training: loss {loss:.4f}{said}")
    if options.out and dist.get_rank() == 0:
        write_csv(options.out, [*earlier, *stamped(rows)])
    state.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
