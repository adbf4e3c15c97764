"""nanoGPT's train.py, shortened: AdamW with two groups, cosine, clipping at 1.0."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lc3.hooks.ddp
import lc3.hooks.local_sgd
from experiments.scripts.gpt import GPT, Text
from experiments.scripts.report import Report, options

LENGTH, BATCH, RATE, WARM_UP = 64, 12, 1e-3, 100


def made(symbols: int) -> tuple[GPT, torch.optim.AdamW]:
    """Return the model and its optimizer, as the script makes them."""
    raw_model = GPT(symbols, LENGTH, 4, 4, 128, bias=False, tied=True)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in raw_model.parameters() if p.dim() >= 2]},
        {
            "params": [p for p in raw_model.parameters() if p.dim() < 2],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), weight_decay=0.1)
    return raw_model, optimizer


def main() -> None:
    """Train, and report the test loss."""
    given = options(steps=300)
    dist.init_process_group("gloo")
    text = Text(given.text, LENGTH)
    torch.manual_seed(given.seed)
    raw_model, optimizer = made(text.symbols)
    model: nn.Module = raw_model
    report = Report(given)
    if given.form == "local_sgd":
        report.state = lc3.hooks.local_sgd.attach(model, optimizer)
    else:
        model = DistributedDataParallel(model)
        if given.form == "ddp":
            report.state = lc3.hooks.ddp.attach(model, optimizer)

    generator = torch.Generator().manual_seed(1000 * given.seed + dist.get_rank())
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        loss = model(*text.batch(text.train, BATCH, generator))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report.step(loss, norm)
    if given.form == "local_sgd":
        report.state.sync()
    report.end(text.test_loss(raw_model))


def rate_at(step: int) -> float:
    """Return the learning rate: a warm-up, then a cosine over 2 000 steps."""
    if step < WARM_UP:
        return RATE * (step + 1) / (WARM_UP + 1)
    share = (step - WARM_UP) / (2000 - WARM_UP)
    return RATE / 10 + 0.5 * (1 + math.cos(math.pi * share)) * (RATE - RATE / 10)


if __name__ == "__main__":
    main()
