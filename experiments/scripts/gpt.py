"""A small GPT and batches of text, as nanoGPT and minGPT have them."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.norm_2 = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32[batch, length, width] of as much."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(width, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return torch.as_tensor(x + self.down(F.gelu(self.up(self.norm_2(x)))))


class GPT(nn.Module):
    """A decoder over characters; its forward pass returns the loss.

    Args:
        symbols: how many characters there are.
        length: length of a context.
        layers: blocks.
        heads: number of heads of each.
        width: width of the residual stream.
        bias: whether linear layers and norms have one (minGPT), or not (nanoGPT).
        tied: whether the head is the embedding.
    """

    def __init__(
        self,
        symbols: int,
        length: int,
        layers: int,
        heads: int,
        width: int,
        *,
        bias: bool,
        tied: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(symbols, width)
        self.places = nn.Embedding(length, width)
        blocks = [Block(width, heads, bias) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, symbols, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of int64[batch, length] targets."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.tokens(tokens) + self.places(places))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Text:
    """A text in characters, nine tenths of it for training.

    Args:
        path: a text file.
        length: length of a context.
    """

    def __init__(self, path: str, length: int) -> None:
        text = Path(path).read_text(encoding="utf-8")
        symbols = {c: i for i, c in enumerate(sorted(set(text)))}
        whole = torch.tensor([symbols[c] for c in text])
        self.symbols, self.length = len(symbols), length
        cut = len(whole) * 9 // 10
        self.train, self.test = whole[:cut], whole[cut:]

    def batch(
        self, part: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return contexts and what follows each character, int64[size, length]."""
        starts = torch.randint(len(part) - self.length, (size,), generator=generator)
        rows = torch.stack([part[s : s + self.length + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    @torch.no_grad()
    def test_loss(self, model: nn.Module) -> float:
        """Return the loss of 40 batches of 12, always the same ones."""
        generator = torch.Generator().manual_seed(77)
        losses = [model(*self.batch(self.test, 12, generator)) for _ in range(40)]
        return float(torch.stack(losses).mean())
