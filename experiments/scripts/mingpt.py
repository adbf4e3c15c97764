"""minGPT-ddp, shortened: AdamW at a constant rate, biases, clipping at 1.0."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lc3.hooks.ddp
import lc3.hooks.local_sgd
from experiments.scripts.gpt import GPT, Text
from experiments.scripts.report import Report, options

LENGTH, BATCH = 64, 32


def main() -> None:
    """Train, and report the test loss."""
    given = options(steps=300)
    dist.init_process_group("gloo")
    text = Text(given.text, LENGTH)
    torch.manual_seed(given.seed)
    raw_model = GPT(text.symbols, LENGTH, 3, 3, 96, bias=True, tied=False)
    optimizer = torch.optim.AdamW(
        raw_model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1
    )
    model: nn.Module = raw_model
    report = Report(given)
    if given.form == "local_sgd":
        report.state = lc3.hooks.local_sgd.attach(model, optimizer)
    else:
        model = DistributedDataParallel(model)
        if given.form == "ddp":
            report.state = lc3.hooks.ddp.attach(model, optimizer)

    generator = torch.Generator().manual_seed(1000 * given.seed + dist.get_rank())
    for _ in range(given.steps):
        loss = model(*text.batch(text.train, BATCH, generator))
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report.step(loss, norm)
    if given.form == "local_sgd":
        report.state.sync()
    report.end(text.test_loss(raw_model))


if __name__ == "__main__":
    main()
