"""stanford_alpaca, in small: the Hugging Face Trainer, AdamW, cosine, clipping."""

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import lc3.hooks.transformers
from experiments.scripts.gpt import Text
from experiments.scripts.report import Report, options
from lc3.hooks import local_sgd

LENGTH, BATCH = 64, 16


class Pieces(Dataset[dict[str, torch.Tensor]]):
    """Pieces of a text, each a context of its own."""

    def __init__(self, tokens: torch.Tensor, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tokens = tokens
        self._starts = torch.randint(
            len(tokens) - LENGTH, (count,), generator=generator
        )

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one: int64[length], which is its own target."""
        at = int(self._starts[index])
        piece = self._tokens[at : at + LENGTH]
        return {"input_ids": piece, "labels": piece}


def main() -> None:
    """Train, and report the loss on text that was held out."""
    given = options(steps=300)
    text = Text(given.text, LENGTH)
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=given.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=given.steps // 33,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=given.seed,
        ddp_find_unused_parameters=False,
    )
    torch.manual_seed(given.seed)
    shape = GPT2Config(
        vocab_size=text.symbols,
        n_positions=LENGTH,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    pieces = Pieces(text.train, 2 * BATCH * given.steps, given.seed)
    held_out = Pieces(text.test, 480, 77)
    trainer = Trainer(GPT2LMHeadModel(shape), arguments, train_dataset=pieces)
    report = Report(given)
    callback = None
    if given.form == "ddp":
        callback = lc3.hooks.transformers.attach(trainer)
    elif given.form == "local_sgd":
        callback = lc3.hooks.transformers.attach(trainer, attach=local_sgd.attach)
    trainer.train()
    for entry in trainer.state.log_history:
        if "grad_norm" in entry:
            report.step(entry["loss"], entry["grad_norm"])
    if callback is not None:
        report.state = callback.state
    score = trainer.evaluate(eval_dataset=held_out)["eval_loss"]
    report.end(score)


if __name__ == "__main__":
    main()
