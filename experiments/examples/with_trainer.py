"""Digits with the Hugging Face Trainer and 3LC.

torchrun --nproc-per-node 2 -m experiments.examples.with_trainer
"""

import tempfile

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from experiments.examples.digits import accuracy, collate, datasets
from experiments.harness.models import small_cnn
from lc3.hooks import transformers as lc3_transformers


class Digits(nn.Module):
    """What a Trainer trains: a module that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_cnn()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self.net(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    """Train, and print the accuracy."""
    train, test = datasets()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            use_cpu=True,
            num_train_epochs=8,
            per_device_train_batch_size=32,
            learning_rate=5e-3,
            save_strategy="no",
            report_to=[],
            ddp_find_unused_parameters=False,
        )
        model = Digits()
        trainer = Trainer(model, options, collate, train)
        callback = lc3_transformers.attach(trainer)
        trainer.train()
    if trainer.is_world_process_zero() and callback.state is not None:
        ratio = callback.state.meter.ratio
        print(
            f"accuracy {accuracy(model.net, test):.4f}, {ratio:.0f} times fewer bytes"
        )


if __name__ == "__main__":
    main()
