"""Accuracy against world size: a real training of 2 to 64 ranks in one process.

    python -m experiments.bench.scale --worlds 2 4 8 16 32 64 --out scale.csv

Every rank is an engine of lc3 with residuals of its own, on a thread; they exchange
real messages through memory. As replicas are bit-identical on all ranks, one copy of
the model computes the gradients of all of them, each on its part of one global batch.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from torch import Tensor, nn

import lc3
from experiments.harness.tasks import TASKS, DataError, Task
from experiments.harness.train import at_least, evaluate, loss_of, schedule
from experiments.record import ResultError, read_csv, stamped, write_csv
from experiments.tables import grid
from lc3.codec import codec_for
from lc3.config import Settings
from lc3.engines.direct import engine_for
from lc3.meter import Meter
from lc3.plan import make_plan
from lc3.transport.loopback import Loopback
from lc3.wire.coder import Coder

Gradients = list[dict[str, Tensor]]


class VirtualRanks:
    """The engines of all ranks; averages their gradients as a job of as many would.

    Args:
        module: its parameters say what is exchanged.
        world: number of ranks.
        config: settings of every rank.
    """

    def __init__(self, module: nn.Module, world: int, config: Settings) -> None:
        shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
        plan = make_plan(shapes, world, config)
        codec = codec_for(torch.device("cpu"))
        self.engines = [
            engine_for(plan, config, transport, Coder(codec), Meter())
            for transport in Loopback(world).ranks
        ]
        self._pool = ThreadPoolExecutor(world)

    def all_reduce(self, gradients: Gradients, step: int) -> dict[str, Tensor]:
        """Return the mean that every rank gets; all ``gradients`` are overwritten.

        Raises:
            RuntimeError: two ranks got different means.
        """
        jobs = [
            self._pool.submit(engine.all_reduce, mine, step, 0)
            for engine, mine in zip(self.engines, gradients, strict=True)
        ]
        for job in jobs:
            job.result()
        first, *others = gradients
        for other in others:
            if any(not torch.equal(first[name], other[name]) for name in first):
                raise RuntimeError(f"ranks got different means in step {step}")
        return first

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        for engine in self.engines:
            engine.close()


def global_batches(task: Task, size: int, seed: int, steps: int) -> Iterator[Tensor]:
    """Yield the indices of ``steps`` batches of ``size``, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    count = len(task.train)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def train(
    task: Task, world: int, config: Settings | None, seed: int, steps: int, batch: int
) -> dict[str, object]:
    """Train once with ``world`` ranks and return the row of the result.

    Args:
        task: the task that is trained.
        world: number of ranks.
        config: lc3's settings; ``None`` for the plain mean in float32.
        seed: seed of the initial parameters and of the order of the data.
        steps: number of steps of the optimizer.
        batch: samples of all ranks in a step.
    """
    torch.manual_seed(seed)
    module = task.make_model()
    optimizers = task.make_optimizers(module)
    schedules = [schedule(optimizer, steps) for optimizer in optimizers]
    ranks = None if config is None else VirtualRanks(module, world, config)
    inputs, labels = task.train.tensors
    for step, chosen in enumerate(global_batches(task, batch, seed, steps)):
        gradients = [
            _gradients(module, inputs[part], labels[part])
            for part in chosen.tensor_split(world)
        ]
        if ranks is None:
            averaged = {
                name: torch.stack([mine[name] for mine in gradients]).mean(dim=0)
                for name in gradients[0]
            }
        else:
            averaged = ranks.all_reduce(gradients, step)
        for name, parameter in module.named_parameters():
            parameter.grad = averaged[name].view_as(parameter)
        for optimizer, rate in zip(optimizers, schedules, strict=True):
            optimizer.step()
            rate.step()
    test_loss, accuracy = evaluate(module, task.test)
    row: dict[str, object] = {
        "task": task.name,
        "method": "float32" if config is None else f"3LC s={config.sparsity:.2f}",
        "seed": seed,
        "ranks": world,
        "steps": steps,
        "batch": batch,
        "test_loss": round(test_loss, 5),
        "accuracy": round(accuracy, 5),
    }
    meters = [engine.meter for engine in ranks.engines] if ranks else []
    for column in ("sent_bytes", "dense_bytes"):
        values = [float(getattr(meter, column)) for meter in meters]
        row[column] = round(mean(values)) if values else ""
    for way in ("push", "pull"):
        bits = [float(getattr(meter, way).bits_per_element) for meter in meters]
        # A rank that owns nothing coded pulls nothing.
        known = [b for b in bits if b == b]  # not nan
        row[f"{way}_bits"] = round(mean(known), 4) if known else ""
    if ranks is not None:
        ranks.close()
    return row


def _gradients(module: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss_of(module(inputs), labels).backward()
    return {
        name: parameter.grad.detach().reshape(-1).contiguous()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return accuracy and traffic by world size and method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    coded = [method for method in methods if method != "float32"]
    titles = ["ranks", *methods, *(f"{m}, fewer bytes" for m in coded)]
    titles += [f"{m}, bits push + pull" for m in coded]
    lines = []
    for world in dict.fromkeys(row["ranks"] for row in rows):
        mine = {
            method: [r for r in rows if (r["ranks"], r["method"]) == (world, method)]
            for method in methods
        }

        def over_seeds(method: str, column: str, mine: dict = mine) -> float:  # type: ignore[type-arg]
            return mean(float(row[column]) for row in mine[method])

        cells = [f"{100 * over_seeds(method, 'accuracy'):.2f} %" for method in methods]
        for method in coded:
            dense, sent = (over_seeds(method, f"{c}_bytes") for c in ("dense", "sent"))
            cells.append(f"{dense / sent:.0f} ×")
        for method in coded:
            push, pull = (over_seeds(method, f"{w}_bits") for w in ("push", "pull"))
            cells.append(f"{push:.3f} + {pull:.3f}")
        lines.append([world, *cells])
    table = grid(titles, lines, words=())
    row = rows[0]
    seeds = len({row["seed"] for row in rows})
    return (
        f"{table}\n\nTask {row['task']}, {row['steps']} steps of one global batch of "
        f"{row['batch']}, shared out among the ranks; test accuracy, mean of {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}. Real messages between ranks that are "
        f"threads of one process. lc3 {row['lc3']} at commit {row['commit']}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train at every world size and write the rows."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.scale", description=__doc__
    )
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument(
        "--worlds", nargs="+", type=at_least(2), default=[2, 4, 8, 16, 32, 64]
    )
    parser.add_argument("--sparsity", nargs="+", type=float, default=[1.0, 1.75])
    parser.add_argument("--steps", type=at_least(1), default=300)
    parser.add_argument("--seeds", type=at_least(1), default=2)
    parser.add_argument("--batch", type=at_least(2), default=256)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if max(options.worlds) > options.batch:
        parser.error(
            f"--batch {options.batch} is less than {max(options.worlds)} ranks"
        )
    console = Console(highlight=False)
    try:
        task = TASKS[options.task](options.data_dir)
        configs = [None, *(Settings(sparsity=s) for s in options.sparsity)]
    except (DataError, lc3.ConfigError) as error:
        parser.error(str(error))
    rows = []
    for world in options.worlds:
        for config in configs:
            for seed in range(options.seeds):
                row = train(task, world, config, seed, options.steps, options.batch)
                rows.append(row)
                console.print(
                    f"{world:3} ranks, {row['method']:11} seed {seed}: "
                    f"{100 * float(str(row['accuracy'])):.2f} %"
                )
        try:
            write_csv(options.out, stamped(rows))
        except ResultError as error:
            parser.error(str(error))
    console.print(markdown(read_csv(options.out)), soft_wrap=True)


if __name__ == "__main__":
    main()
