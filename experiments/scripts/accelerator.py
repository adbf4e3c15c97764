"""The shape of Accelerate's checkpointing example: a classifier, AdamW, accuracy."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_linear_schedule_with_warmup

import lc3.hooks.accelerate
import lc3.hooks.local_sgd
from experiments.scripts.report import Report, options

WORDS, LENGTH, BATCH = 200, 32, 16


class Classifier(nn.Module):
    """Two layers of attention, which look for one of twenty words in a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 64)
        self.places = nn.Embedding(LENGTH, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float32[batch, 2] of int64[batch, length]."""
        places = torch.arange(LENGTH, device=tokens.device)
        x = self.layers(self.words(tokens) + self.places(places))
        return torch.as_tensor(self.head(x.mean(1)))


def pairs(count: int, seed: int) -> TensorDataset:
    """Return sentences of which half name a word of a set, and whether they do."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, WORDS, (count, LENGTH), generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    at = torch.randint(LENGTH, (count,), generator=generator)
    named = torch.randint(20, (count,), generator=generator)
    rows = torch.arange(count)[labels == 1]
    tokens[rows, at[rows]] = named[rows]
    return TensorDataset(tokens, labels)


def main() -> None:
    """Train, and report the accuracy."""
    given = options(steps=500)
    set_seed(given.seed)
    accelerator = Accelerator(cpu=True)
    count = 2 * BATCH * 100
    model: nn.Module = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(pairs(count, given.seed), batch_size=BATCH, shuffle=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 30, 2 * given.steps)
    model, optimizer, loader, schedule = accelerator.prepare(
        model, optimizer, loader, schedule
    )
    report = Report(given)
    if given.form == "ddp":
        report.state = lc3.hooks.accelerate.attach(accelerator, model, optimizer)
    elif given.form == "local_sgd":
        report.state = lc3.hooks.local_sgd.attach(model, optimizer)

    step = 0
    while step < given.steps:
        for tokens, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(tokens), labels)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            report.step(loss.detach(), 0.0 if norm is None else norm)
            step += 1
            if step == given.steps:
                break

    if given.form == "local_sgd":
        report.state.sync()
    model.eval()
    tokens, labels = pairs(2000, 77).tensors
    with torch.no_grad():
        right = accelerator.unwrap_model(model)(tokens).argmax(1) == labels
    report.end(float(right.float().mean()))


if __name__ == "__main__":
    main()
