"""One rank of a comparison: train the same network once per method and seed.

Any launcher that sets torchrun's environment starts it; rank 0 writes the CSV:

    torchrun --nproc-per-node 2 -m experiments.harness.train --task digits --out a.csv

With ``--device cuda`` each rank trains on a GPU, ranks in turn on those that there are;
what they exchange goes over gloo all the same.
"""

import argparse
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DistributedSampler, TensorDataset

from experiments.average import AVERAGED, EVERY, Average
from experiments.harness.methods import DEMO, METHODS, Training, columns, find
from experiments.harness.tasks import TASKS, DataError, Task
from experiments.lab import ranks
from experiments.record import stamped, write_csv

if importlib.util.find_spec("horovod") is not None:
    from experiments.harness import horovod_methods

    METHODS.update(horovod_methods.METHODS)

CPU = torch.device("cpu")
WARM_UP = 0.05  # of all steps, if nothing else is said
EVALUATIONS = 10
_QUIET_S = 0.1  # longer than TCP keeps an acknowledgement back


class StepsError(ValueError):
    """A number of steps that a method cannot end at."""


@dataclass(frozen=True)
class Run:
    """What is measured: one task, the same for every method and seed.

    Attributes:
        task: the task that is trained.
        steps: steps of each training.
        warm_up: share of them in which the learning rate rises, 0 to 1.
        compute_ms: milliseconds of a step without communication.
        progress: display of the trainings.
        device: device of this rank.
        evaluate_every: steps between evaluations; one more comes after the last step.
        averaged: whether a moving average of the parameters is evaluated, too.
    """

    task: Task
    steps: int
    warm_up: float
    compute_ms: float
    progress: Progress
    device: torch.device
    evaluate_every: int
    averaged: bool

    def train(self, method: str, seed: int) -> list[dict[str, object]]:
        """Train once; collective.

        Returns:
            One row per evaluation, the same on all ranks: bytes sent so far and the
            codec's time are means over ranks, the loss a mean over ranks and the steps
            since the row before. Then those of the moving average, if there is one.

        Raises:
            RuntimeError: the ranks' parameters differ at the end.
            StepsError: the method cannot end after so many steps.
        """
        torch.manual_seed(seed)
        module = self.task.make_model().to(self.device)
        given = self.task.make_optimizers(module)
        attach, rate_factor = find(method)
        for optimizer in given:
            scale_rate(optimizer, rate_factor)
        training = attach(module, given)
        model, optimizers, traffic = training[:3]
        if self.steps % training.every:
            raise StepsError(
                f"{method!r} exchanges every {training.every} steps, so ranks would "
                f"end apart after {self.steps}; give a multiple of {training.every}"
            )
        windows = self.steps * self.task.batch_size * dist.get_world_size()
        if self.task.one_pass and windows > len(self.task.train):
            raise StepsError(
                f"{self.steps} steps take {windows:,} samples; {self.task.name} "
                f"has {len(self.task.train):,}, each seen once; make fewer steps"
            )
        average = Average(module) if self.averaged else None
        schedules = [
            schedule(optimizer, self.steps, self.warm_up) for optimizer in optimizers
        ]
        rows: list[dict[str, object]] = []
        averaged_rows: list[dict[str, object]] = []
        losses: list[Tensor] = []
        seconds, on_link, since = 0.0, 0, settled_bytes()
        bar = self.progress.add_task(f"{method}, seed {seed}", total=self.steps)
        every_batch = batches(self.task, seed, self.steps, self.device)
        for step, batch in enumerate(every_batch, start=1):
            start = time.perf_counter()
            losses.append(train_step(model, optimizers, batch))
            seconds += time.perf_counter() - start
            for rate in schedules:
                rate.step()
            if step == self.steps and training.end is not None:
                training.end()
            if average is not None and step % EVERY == 0:
                with training.shared():
                    average.update()
            if step % self.evaluate_every == 0 or step == self.steps:
                on_link += settled_bytes() - since
                measured = self._measure(training, torch.stack(losses), step)
                which = {"task": self.task.name, "method": method, "seed": seed}
                ended = timed(seconds / step, on_link)
                rows.append({**which, **measured, **ended, **columns(method)})
                if average is not None:
                    with average.in_place():
                        mean = evaluated(model, self.task)
                    named = {"method": method + AVERAGED}
                    averaged_rows.append({**rows[-1], **mean, **named})
                losses.clear()
                dist.barrier()
                since = settled_bytes()
            self.progress.update(bar, completed=step)
        self.progress.remove_task(bar)
        check_replicas(model)
        traffic.close()
        return rows + averaged_rows

    def _measure(
        self, training: Training, losses: Tensor, step: int
    ) -> dict[str, object]:
        traffic = training.traffic
        sent_bytes, entropy_bytes, codec_ms, loss, *bits = mean_over_ranks(
            traffic.sent_bytes,
            getattr(traffic, "entropy_bytes", traffic.sent_bytes),
            1e3 * traffic.codec_seconds / step,
            losses.mean().item(),
            traffic.push_bits,
            traffic.pull_bits,
            traffic.frame_bits,
        )
        push_bits, pull_bits, frame_bits = bits
        average_buffers(training.model)
        with training.shared():
            found = evaluated(training.model, self.task)
        return {
            "ranks": dist.get_world_size(),
            "steps": self.steps,
            "warm_up": self.warm_up,
            "step": step,
            "sent_bytes": round(sent_bytes),
            "entropy_bytes": round(entropy_bytes),
            "push_bits": round(push_bits, 4),
            "pull_bits": round(pull_bits, 4),
            "frame_bits": round(frame_bits, 4),
            "loss": round(loss, 5),
            **found,
            "compute_ms": round(self.compute_ms, 3),
            "codec_ms": round(codec_ms, 3),
        }


def interface_bytes() -> int:
    """Return what the interface that gloo was given has sent; 0 if none was."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        interface, _, counters = line.partition(":")
        if interface.strip() == name:
            return int(counters.split()[8])  # the ninth: bytes sent
    return 0


def settled_bytes() -> int:
    """Return ``interface_bytes()`` when what was sent before is acknowledged.

    TCP keeps an acknowledgement back for some 40 ms, in case there is data to send
    it with. It belongs to the messages of before.
    """
    found, before = interface_bytes(), -1
    while found and found != before:
        time.sleep(_QUIET_S)
        found, before = interface_bytes(), found
    return found


def timed(step_s: float, link_bytes: int) -> dict[str, object]:
    """Return the measured columns of a row, means over ranks; collective."""
    step_ms, sent = mean_over_ranks(1e3 * step_s, link_bytes)
    return {"step_ms": round(step_ms, 3), "link_bytes": round(sent)}


def scale_rate(optimizer: Optimizer, factor: float) -> None:
    """Multiply the learning rate, of groups that are added later, too."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
    optimizer.defaults["lr"] *= factor


def schedule(optimizer: Optimizer, steps: int, warm_up: float = WARM_UP) -> LambdaLR:
    """Return the learning rate over ``steps``: linear warm-up, then a cosine.

    Args:
        optimizer: optimizer whose rate rises to its present one, and falls to 0.
        steps: steps of the training.
        warm_up: share of the steps in which it rises, 0 to 1; at least one step.
    """
    rising = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / (steps - rising + 1))) / 2

    return LambdaLR(optimizer, factor)


def batches(
    task: Task, seed: int, steps: int, device: torch.device = CPU
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's batches, epoch after epoch, the same for every method."""
    sampler: DistributedSampler[TensorDataset] = DistributedSampler(
        task.train, shuffle=True, seed=seed, drop_last=True
    )
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    inputs, labels = task.train.tensors
    done = 0
    for epoch in range(steps):
        sampler.set_epoch(epoch)
        order = torch.tensor(list(sampler))
        for batch in order[: len(order) // task.batch_size * task.batch_size].split(
            task.batch_size
        ):
            chosen = _numbers(inputs[batch])
            if task.augment is not None:
                chosen = task.augment(chosen, generator)
            yield chosen.to(device), _numbers(labels[batch]).to(device)
            done += 1
            if done == steps:
                return


def _numbers(data: Tensor) -> Tensor:
    """Return bytes as numbers that index an embedding, anything else as it is."""
    return data.long() if data.dtype == torch.uint8 else data


def train_step(
    model: nn.Module, optimizers: Sequence[Optimizer], batch: Sequence[Tensor]
) -> Tensor:
    """Update the model with one batch and return its loss, a scalar; wait for it."""
    inputs, labels = batch
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = loss_of(model(inputs), labels)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    if loss.device.type != "cpu":
        torch.accelerator.synchronize(loss.device)
    return loss.detach()


def measure_compute_ms(task: Task, device: torch.device, steps: int = 40) -> float:
    """Return the milliseconds of one step without any communication.

    Every rank runs at once, as in training: the median step, averaged over ranks.
    """
    model = task.make_model().to(device)
    optimizers = task.make_optimizers(model)
    times = []
    for batch in batches(task, 0, steps, device):
        start = time.perf_counter()
        train_step(model, optimizers, batch)
        times.append(time.perf_counter() - start)
    (median_s,) = mean_over_ranks(sorted(times)[len(times) // 2])
    return 1e3 * median_s


def loss_of(outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of float32[..., classes] against int64[...]."""
    flat = outputs.reshape(-1, outputs.shape[-1])
    return nn.functional.cross_entropy(flat, labels.reshape(-1), reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Return the mean loss on ``data`` and the share of right labels, 0 to 1."""
    loss = right = 0.0
    device = next(model.parameters()).device
    model.eval()
    for some in zip(*(t.split(128) for t in data.tensors), strict=True):
        inputs, labels = (_numbers(part).to(device) for part in some)
        outputs = model(inputs)
        loss += loss_of(outputs, labels, reduction="sum").item()
        right += (outputs.argmax(dim=-1) == labels).sum().item()
    model.train()
    count = data.tensors[1].numel()
    return loss / count, right / count


def evaluate_together(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Return the same of all of ``data``, each rank's model on a part; collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = TensorDataset(*(tensor[rank::world] for tensor in data.tensors))
    count = len(mine)
    loss, right = evaluate(model, mine) if count else (0.0, 0.0)
    loss, right, mean = mean_over_ranks(count * loss, count * right, count)
    return loss / mean, right / mean


def evaluated(model: nn.Module, task: Task) -> dict[str, object]:
    """Return the columns of an evaluation; collective."""
    loss, accuracy = evaluate_together(model, task.test)
    return {"test_loss": round(loss, 5), "accuracy": round(accuracy, 5)}


def average_buffers(model: nn.Module) -> None:
    """Replace float buffers (statistics of batch norms) by their means over ranks."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def mean_over_ranks(*values: float) -> list[float]:
    """Return each value's mean over all ranks; collective."""
    means = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(means)
    return [value / dist.get_world_size() for value in means.tolist()]


def check_replicas(model: nn.Module) -> None:
    """Compare the parameters of all ranks bit for bit; collective.

    Raises:
        RuntimeError: they differ, so the figures of this run mean nothing.
    """
    mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, src=0)
    (differing,) = mean_over_ranks(float(not torch.equal(first, mine)))
    if differing:
        raise RuntimeError("ranks hold different parameters after training")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked command line; a bad one ends the program with its reason."""
    parser = argparse.ArgumentParser(
        prog="experiments.harness.train", description="Compare methods on one task."
    )
    add_run_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    return parser.parse_args(arguments)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what a run is made of; the launchers of runs pass it on."""
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data-dir", type=Path, help="where the task's data is")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=known,
        default=list(DEMO),
        metavar="METHOD",
        help=(
            f"of {', '.join(METHODS)}, each also with another learning rate, like "
            f"'float32, lr × 0.5' (default: {', '.join(DEMO)})"
        ).replace("%", "%%"),
    )
    parser.add_argument("--steps", type=at_least(1), default=500)
    parser.add_argument(
        "--warm-up",
        type=share,
        default=WARM_UP,
        metavar="SHARE",
        help="of all steps, in which the learning rate rises (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluate-every",
        type=at_least(1),
        metavar="STEPS",
        help="between evaluations (default: a tenth of all steps)",
    )
    parser.add_argument(
        "--averaged",
        action="store_true",
        help=f"evaluate a moving average, too, as 'METHOD{AVERAGED}'",
    )
    parser.add_argument("--seeds", type=at_least(1), default=3, help="how many")
    parser.add_argument("--first-seed", type=at_least(0), default=0)
    add_device_option(parser)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add what ranks train on."""
    parser.add_argument(
        "--device", type=usable, default="cpu", help="cpu (the default) or cuda"
    )


def usable(device: str) -> str:
    """Return a kind of device that ranks can train on, for the command line."""
    if device not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{device!r} is neither cpu nor cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU that torch can use; say cpu")
    return device


def device_of_rank(kind: str) -> torch.device:
    """Return this rank's device of a kind, and make it the current one."""
    if kind == "cpu":
        return torch.device(kind)
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    device = torch.device(kind, local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def known(method: str) -> str:
    """Return the name of a method, for the command line."""
    try:
        find(method)
    except KeyError as error:
        raise argparse.ArgumentTypeError(error.args[0]) from error
    return method


def at_least(low: int) -> Callable[[str], int]:
    """Return a converter of one command-line argument to an integer from ``low`` up."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not an integer of at least {low}"
            )
        return int(text)

    return convert


def share(text: str) -> float:
    """Return a share, 0 to 1, for the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, 0 to 1")
    return value


def ended(row: Mapping[str, object]) -> str:
    """Return in a line how a training ended."""
    return (
        f"{row['method']:12} seed {row['seed']}: test accuracy "
        f"{100 * float(str(row['accuracy'])):.2f} %, "
        f"{int(str(row['sent_bytes'])):,} bytes sent per rank"
    )


def main() -> None:
    """Train every method with every seed and write the rows."""
    options = parse()
    try:
        ranks.init()
    except ranks.LaunchError as error:
        raise SystemExit(f"experiments.harness.train: {error}") from error
    first = dist.get_rank() == 0
    try:
        task = TASKS[options.task](options.data_dir)
    except DataError as error:
        raise SystemExit(f"experiments.harness.train: {error}") from error
    console = Console(quiet=not first)
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    rows: list[dict[str, object]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        device = device_of_rank(options.device)
        card = "" if device.type == "cpu" else torch.cuda.get_device_name(device)
        compute_ms = measure_compute_ms(task, device)
        every = options.evaluate_every or math.ceil(options.steps / EVALUATIONS)
        run = Run(
            *(task, options.steps, options.warm_up, compute_ms, progress, device),
            evaluate_every=every,
            averaged=options.averaged,
        )
        everything = progress.add_task(
            "all runs", total=options.seeds * len(options.methods)
        )
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for method in options.methods:
                try:
                    new = run.train(method, seed)
                except StepsError as error:
                    raise SystemExit(f"experiments.harness.train: {error}") from error
                rows += new
                if first:  # after each, so that a stopped comparison keeps what it has
                    write_csv(options.out, stamped(rows, card))
                progress.advance(everything)
                for row in new:
                    if row["step"] == options.steps:
                        console.print(ended(row), highlight=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
