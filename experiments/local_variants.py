"""Variants of local steps, some of which lc3 does not have: what each ends with.

    torchrun --nproc-per-node 4 -m experiments.local_variants --data-dir input.txt

Prints the test loss after training, how many times fewer bytes coded tensors took than
float32, and the same after exchanges without steps, which deliver what was still owed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import lc3
from experiments.tasks import TASKS, DataError
from experiments.train import at_least, batches, evaluate_together, schedule, train_step
from launch import ranks
from lc3.hooks import local_sgd


def go_on_from_own(state: local_sgd.State) -> None:
    """Let a rank go on from the replica and what it has not sent yet.

    Its residual is then part of its model, and not of the next push a second time.
    """

    def start_again() -> None:
        for name, flat in state._flat.items():
            flat.copy_(state.owners.replica[name])
            residual = state.engine.residuals.sent.get(name)
            if residual is not None:
                flat.sub_(residual)
                residual.zero_()

    state._copy_replica = start_again  # type: ignore[method-assign]


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
    parser.add_argument("--raw", action="store_true", help="send float32, uncoded")
    parser.add_argument("--own", action="store_true", help=go_on_from_own.__doc__)
    parser.add_argument("--outer-momentum", type=float, default=0.0)
    parser.add_argument("--extra", type=at_least(0), default=0, help="exchanges at end")
    parser.add_argument("--seed", type=at_least(0), default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once and print what came of it."""
    options = parse(arguments)
    ranks.init()
    torch.manual_seed(options.seed)
    try:
        task = TASKS[options.task](options.data_dir)
    except DataError as error:
        raise SystemExit(f"experiments.local_variants: {error}") from error
    module = task.make_model()
    optimizers = task.make_optimizers(module)
    raw = ("*",) if options.raw else ()
    state = local_sgd.attach(
        module,
        optimizers,
        lc3.Config(density=options.density, raw=raw),
        every=options.every,
        outer_momentum=options.outer_momentum,
    )
    if options.own:
        go_on_from_own(state)
    schedules = [schedule(optimizer, options.steps) for optimizer in optimizers]
    for batch in batches(task, options.seed, options.steps):
        train_step(module, optimizers, batch)
        for rate in schedules:
            rate.step()
    for extra in range(options.extra + 1):
        if extra:
            state.exchange()
        loss, _ = evaluate_together(module, task.test)
        bits = sum(way.bits_per_element for way in (state.meter.push, state.meter.pull))
        if dist.get_rank() == 0:
            exchanges = state.exchanges * bits / 64
            fewer = "" if options.raw else f", {options.steps / exchanges:.0f} × fewer"
            print(f"{extra} exchanges after training: loss {loss:.4f}{fewer}")
    state.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
