"""Real gradients with their residuals, for ratios that no random numbers can give.

``python -m experiments.bench.gradients --data-dir FOLDER`` records them: FOLDER holds
CIFAR-10 in a folder ``cifar10`` and one text file. Without it those of the digits,
which need no data, are recorded when they are first asked for.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

import lc3
from experiments.harness.tasks import TASKS, Task
from experiments.harness.train import loss_of, schedule

RECORDED = Path(__file__).parent / "results" / "local" / "gradients.npz"
STEPS = 400
SNAPSHOTS = {"early": 20, "middle": 200, "late": 400}
SPARSITIES = (1.0, 1.75)
KEPT_BITS = 12  # of the 24 of a float32's significand, so that the file stays small


@dataclass(frozen=True)
class Recorded:
    """What one parameter's push has to carry at one moment of one training.

    Attributes:
        task: name of the task.
        sparsity: sparsity of the training.
        moment: early, middle or late.
        name: name of the parameter.
        x: float32[numel], gradient plus residual.
    """

    task: str
    sparsity: float
    moment: str
    name: str
    x: Tensor


def recorded() -> Iterator[Recorded]:
    """Yield everything that was recorded, or else record the digits now."""
    if not RECORDED.exists():
        write({"digits": RECORDED.parent})
    with np.load(RECORDED, allow_pickle=False) as file:
        for key in file.files:
            task, sparsity, moment, name = key.split("|")
            x = torch.from_numpy(file[key])
            yield Recorded(task, float(sparsity), moment, name, x)


def record(task: Task, sparsity: float) -> dict[str, np.ndarray]:
    """Train with 3LC's push on one rank; return snapshots by key."""
    torch.manual_seed(0)
    model = task.make_model()
    (optimizer,) = task.make_optimizers(model)
    rate = schedule(optimizer, STEPS)
    residual = {n: torch.zeros(p.numel()) for n, p in model.named_parameters()}
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))
    inputs, labels = task.train.tensors
    moments = {step: moment for moment, step in SNAPSHOTS.items()}
    snapshots = {}
    for step in track(
        range(1, STEPS + 1), f"{task.name}, s = {sparsity}", transient=True
    ):
        first = (step - 1) * task.batch_size % (len(order) - task.batch_size)
        batch = order[first : first + task.batch_size]
        optimizer.zero_grad()
        loss_of(model(inputs[batch]), labels[batch]).backward()
        for name, x in push(model, residual, sparsity):
            if step in moments:
                key = f"{task.name}|{sparsity}|{moments[step]}|{name}"
                snapshots[key] = shortened(x)
        optimizer.step()
        rate.step()
    return snapshots


def push(
    model: nn.Module, residual: dict[str, Tensor], sparsity: float
) -> Iterator[tuple[str, Tensor]]:
    """Code every large gradient in place; yield its name and what was to be sent."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter.numel() < 1024 or parameter.grad is None:
            continue
        x = parameter.grad.contiguous().view(-1) + residual[name]
        yield name, x
        frame, residual[name] = lc3.encode(x, sparsity)
        parameter.grad.copy_(lc3.decode(frame, x.numel()).view(parameter.shape))


def shortened(x: Tensor) -> np.ndarray:
    """Return ``x`` rounded towards zero to ``KEPT_BITS`` significant bits."""
    bits = x.numpy().view(np.uint32) & np.uint32(2**32 - 2 ** (24 - KEPT_BITS))
    return bits.view(np.float32).copy()


def write(places: Mapping[str, Path]) -> None:
    """Record some tasks, each with the place of its data, and write the file whole."""
    snapshots: dict[str, np.ndarray] = {}
    for name, place in places.items():
        task = TASKS[name](place)
        for sparsity in SPARSITIES:
            snapshots |= record(task, sparsity)
    RECORDED.parent.mkdir(parents=True, exist_ok=True)
    part = RECORDED.with_suffix(f".{os.getpid()}.npz")
    np.savez_compressed(part, **snapshots)  # type: ignore[arg-type]
    part.replace(RECORDED)


def main() -> None:
    """Record all tasks and write the file."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.gradients", description=__doc__
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    folder = parser.parse_args().data_dir
    text = next(iter(folder.glob("*.txt")), folder)
    write({"digits": folder, "cifar10-resnet20": folder / "cifar10", "chars": text})
    print(f"{RECORDED}: {RECORDED.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
