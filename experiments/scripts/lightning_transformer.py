"""The shape of Lightning's transformer example: SGD, ``gradient_clip_val`` 0.25."""

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.scripts.gpt import GPT, Text
from experiments.scripts.report import Report, options
from lc3.hooks import local_sgd
from lc3.hooks.lightning import LC3

LENGTH, BATCH, CONTEXTS = 35, 20, 40  # few contexts, again and again


class Module(lightning.LightningModule):
    """A small transformer that learns a page by heart."""

    def __init__(self, symbols: int, report: Report) -> None:
        super().__init__()
        self.model = GPT(symbols, LENGTH, 2, 2, 200, bias=True, tied=False)
        self.report = report
        self.norm: Tensor | float = 0.0

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.model(*batch)
        self.report.step(loss.detach(), self.norm)
        return torch.as_tensor(loss)

    def on_before_optimizer_step(self, _: Any) -> None:
        """Note the gradient's norm, before it is clipped."""
        self.norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters() if p.grad is not None]
        )

    def on_train_end(self) -> None:
        """Keep lc3's state, whose meter is read at the end."""
        for callback in self.trainer.callbacks:
            if isinstance(callback, LC3):
                self.report.state = callback.state

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of Lightning's example."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    """Train, and report the loss on what was trained on."""
    given = options(steps=600)
    text = Text(given.text, LENGTH)
    torch.manual_seed(given.seed)
    report = Report(given)
    module = Module(text.symbols, report)
    generator = torch.Generator().manual_seed(given.seed)
    contexts = text.batch(text.train, 2 * CONTEXTS, generator)
    loader = DataLoader(TensorDataset(*contexts), batch_size=BATCH, shuffle=True)
    callbacks: dict[str, list[lightning.Callback]] = {
        "plain": [],
        "ddp": [LC3()],
        "local_sgd": [LC3(attach=local_sgd.attach)],
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=given.steps,
        gradient_clip_val=0.25,
        callbacks=callbacks[given.form],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    with torch.no_grad():
        score = float(module.model(*contexts))
    report.end(score)


if __name__ == "__main__":
    main()
