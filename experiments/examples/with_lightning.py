"""Digits with Lightning and 3LC.

torchrun --nproc-per-node 2 -m experiments.examples.with_lightning
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.examples.digits import accuracy, datasets
from experiments.harness.models import small_cnn
from lc3.hooks.lightning import LC3


class Digits(lightning.LightningModule):
    """A small network; nothing here knows of lc3."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_cnn()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Train, and print the accuracy."""
    lightning.seed_everything(0)
    train, test = datasets()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=8,
        callbacks=[LC3()],
        enable_model_summary=False,
    )
    module = Digits()
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True))
    if trainer.is_global_zero:
        ratio = trainer.callback_metrics["lc3/ratio"]
        print(
            f"accuracy {accuracy(module.net, test):.4f}, {ratio:.0f} times fewer bytes"
        )


if __name__ == "__main__":
    main()
