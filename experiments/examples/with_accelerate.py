"""Digits with Accelerate and 3LC.

torchrun --nproc-per-node 2 -m experiments.examples.with_accelerate
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from experiments.examples.digits import accuracy, datasets
from experiments.harness.models import small_cnn
from lc3.hooks import accelerate as lc3_accelerate


def main() -> None:
    """Train, and print the accuracy."""
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    train, test = datasets()
    net = small_cnn()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    state = lc3_accelerate.attach(accelerator, model, optimizer)

    for _ in range(8):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()

    accelerator.print(
        f"accuracy {accuracy(net, test):.4f}, {state.meter.ratio:.0f} times fewer bytes"
    )
    state.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
