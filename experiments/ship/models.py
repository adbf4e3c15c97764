"""The trained networks that ``make ship-bench`` ships, and snapshots of their training.

    python -m experiments.ship.models FOLDER --data-dir /usr/share/.../fashion-mnist

trains LeNet-300-100, the Caffe form of LeNet-5 and a small transformer, and keeps for
each what a codec meets: gradient and momentum in the middle of training, the weights at
its end, and how they move in ten steps more.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.harness import models, sources
from experiments.harness.tasks import fashion_mnist
from lc3.checkpoint import load_checkpoint, save_checkpoint

BATCH = 128
CONTEXT = 64  # characters that the transformer sees
GRADIENT_STEP = 1000  # or in the middle, if that is earlier


def lenet_300() -> nn.Sequential:
    """Return LeNet-300-100: 266,610 parameters on 28 by 28 pixels."""
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(100, 10))


def lenet_5() -> nn.Sequential:
    """Return Caffe's LeNet-5 (20-50-500-10): 431,080 parameters on 28 by 28 pixels.

    Kernels lie in memory with channels last, which is a third faster on one core.
    """
    model = nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def transformer() -> nn.Module:
    """Return a character transformer of two blocks, 128 wide."""
    return models.Transformer(256, CONTEXT, 128, 2, 4)


class Pictures:
    """Fashion-MNIST: batches to train on, and accuracy in per cent on the test set."""

    def __init__(self, data_dir: Path) -> None:
        task = fashion_mnist(data_dir)
        self._x, self._y = task.train.tensors
        self._test = task.test.tensors

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs float32[128, 1, 28, 28] and labels int64[128]."""
        chosen = torch.randint(len(self._y), (BATCH,), generator=generator)
        return self._x[chosen], self._y[chosen]

    def test(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first pictures of the test set, and their labels."""
        return self._test[0][:count], self._test[1][:count]

    def score(self, model: nn.Module) -> float:
        """Return the accuracy in per cent."""
        return accuracy(self.predicted(model), self.answers)

    @property
    def answers(self) -> Tensor:
        """The labels of the test set."""
        return self._test[1]

    def predicted(self, model: nn.Module) -> Tensor:
        """Return the likeliest label of each picture of the test set."""
        model.eval()
        with torch.no_grad():
            parts = [model(part).argmax(1) for part in self._test[0].split(500)]
        model.train()
        return torch.cat(parts)


class Characters:
    """Python sources: batches of bytes, and accuracy in per cent on another package."""

    def __init__(self) -> None:
        self._train = torch.from_numpy(sources.load(["scikit-learn"])).long()
        self._test = torch.from_numpy(sources.load(sources.TEST)).long()

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return bytes int64[32, 64], and those that follow each."""
        return self._cut(self._train, 32, generator)

    def score(self, model: nn.Module) -> float:
        """Return how many per cent of the next bytes are the likeliest one."""
        return accuracy(self.predicted(model), self.answers)

    @property
    def answers(self) -> Tensor:
        """The bytes that follow in the test text."""
        return self._drawn()[1].flatten()

    def predicted(self, model: nn.Module) -> Tensor:
        """Return the likeliest next byte at each place of the test text."""
        model.eval()
        with torch.no_grad():
            found: Tensor = model(self._drawn()[0]).argmax(-1).flatten()
        model.train()
        return found

    def _drawn(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return self._cut(self._test, 256, generator)

    @staticmethod
    def _cut(
        text: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator)
        places = starts + torch.arange(CONTEXT)
        return text[places], text[places + 1]


def accuracy(predicted: Tensor, answers: Tensor) -> float:
    """Return how many per cent of predictions are right."""
    return 100 * (predicted == answers).double().mean().item()


Data = Pictures | Characters
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "lenet-300": lenet_300,
    "lenet-5": lenet_5,
    "transformer": transformer,
}
STEPS = {"lenet-300": 4700, "lenet-5": 2500, "transformer": 300}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats."""
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def train(
    model: nn.Module,
    data: Data,
    steps: int,
    *,
    seed: int = 0,
    lr: float = 0.05,
    after: Callable[[int, torch.optim.Optimizer], None] | None = None,
) -> torch.optim.Optimizer:
    """Train with SGD, momentum 0.9, the rate falling to zero by a cosine.

    Args:
        model: is changed.
        data: to train on.
        steps: how many.
        seed: of the batches.
        lr: learning rate at the start.
        after: called after each backward pass and step, with its number from 1 on.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(model, *data.batch(generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if after is not None:
            after(step, optimizer)
    return optimizer


def snapshots(name: str, data: Data) -> dict[str, dict[str, Tensor]]:
    """Train one network; return what it had on the way, and its weights at the end."""
    torch.manual_seed(0)
    model = MAKERS[name]()
    kept: dict[str, dict[str, Tensor]] = {}
    middle = STEPS[name] // 2

    def look(step: int, optimizer: torch.optim.Optimizer) -> None:
        named = dict(model.named_parameters())
        if step == min(GRADIENT_STEP, middle):
            kept["gradient"] = {n: _given(p.grad) for n, p in named.items()}
            kept["momentum"] = {
                n: optimizer.state[p]["momentum_buffer"].clone()
                for n, p in named.items()
            }
        if step in (middle, middle + 10):
            where = "middle" if step == middle else "ten steps later"
            kept[where] = {n: p.detach().clone() for n, p in named.items()}

    train(model, data, STEPS[name], after=look)
    kept["weights"] = {n: t.clone() for n, t in model.state_dict().items()}
    return kept


def _given(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.clone()


def data_of(name: str, data_dir: Path) -> Data:
    """Return what a network is trained on."""
    return Characters() if name == "transformer" else Pictures(data_dir)


def prepared(folder: Path, name: str, data_dir: Path) -> dict[str, dict[str, Tensor]]:
    """Return the snapshots of a network, trained now if the folder has none."""
    path = folder / f"{name}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(snapshots(name, data_of(name, data_dir)), path)
    found: dict[str, dict[str, Tensor]] = load_checkpoint(path)
    return found


def main() -> None:
    """Train what is not there yet, and print each score."""
    parser = argparse.ArgumentParser(prog="experiments.ship.models")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    for name, make in MAKERS.items():
        model = make()
        kept = prepared(options.folder, name, options.data_dir)
        model.load_state_dict(kept["weights"])
        score = data_of(name, options.data_dir).score(model)
        print(f"{name}: {score:.2f} %", flush=True)


if __name__ == "__main__":
    main()
