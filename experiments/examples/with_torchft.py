"""Digits on machines that come and go, with torchft and 3LC.

LIGHTHOUSE=http://10.0.0.1:29510 launch/torchft.sh replica
"""

import os
from datetime import timedelta

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchft import Manager, ProcessGroupGloo

from experiments.examples.digits import accuracy, datasets
from experiments.harness.models import small_cnn
from lc3.hooks import torchft as lc3_torchft

TIMEOUT = timedelta(seconds=float(os.environ.get("TIMEOUT_S", "20")))


def main() -> None:
    """Train, and print the accuracy."""
    train, test = datasets()
    model = small_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=1,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=3 * TIMEOUT,
        replica_id=os.environ.get("REPLICA", ""),
        hostname=os.environ["ADDRESS"],
    )
    state = lc3_torchft.attach(
        model, optimizer, manager, hostname=os.environ["ADDRESS"]
    )
    print(f"joined: process {os.getpid()}, {state.world} ranks", flush=True)
    for _ in range(int(os.environ.get("EPOCHS", "8"))):
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            state.tokens += len(labels)
            optimizer.step()
    state.sync()
    print(
        f"accuracy {accuracy(model, test):.4f} after {state.exchanges} exchanges, of "
        f"which {state.failed} failed, {state.world} ranks in the last",
        flush=True,
    )
    state.close()
    manager.shutdown(wait=False)


if __name__ == "__main__":
    main()
