"""scikit-learn's digits for the examples."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

TRAIN = 1500


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Return images, float32[n, 1, 8, 8], and labels, for training and for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    return (
        TensorDataset(images[:TRAIN], labels[:TRAIN]),
        TensorDataset(images[TRAIN:], labels[TRAIN:]),
    )


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of some examples by the names of ``forward``'s arguments."""
    images, labels = map(torch.stack, zip(*examples, strict=True))
    return {"images": images, "labels": labels}


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    """Return the share of images that get their label."""
    images, labels = data.tensors
    return float((net(images).argmax(1) == labels).float().mean())
