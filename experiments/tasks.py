"""What is trained: data, network and optimizer settings that every method shares."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class Task:
    """One training problem.

    Attributes:
        name: of the task, for result files.
        train: pairs of input and class label.
        test: the same, never trained on.
        make_model: returns a fresh network, initialised from torch's global seed.
        batch_size: samples per rank and step.
        learning_rate: its peak; linear warm-up, then cosine decay to zero.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    make_model: Callable[[], nn.Module]
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float


def digits() -> Task:
    """Return scikit-learn's 1 797 handwritten digits, 8 by 8, 540 of them for testing.

    Real scans that come with scikit-learn, so nothing is downloaded.
    """
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=540, random_state=0, stratify=labels
    )
    return Task(
        name="digits",
        train=TensorDataset(images[train], labels[train]),
        test=TensorDataset(images[test], labels[test]),
        make_model=_digits_model,
        batch_size=32,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=1e-4,
    )


def _digits_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits}
