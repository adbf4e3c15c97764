"""The networks of the tasks, as their papers describe them."""

import itertools
import time
from typing import Any

import torch
from torch import Tensor, nn


def small_cnn() -> nn.Module:
    """Return a convolutional network for images of 8 by 8, 151 306 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def lenet() -> nn.Module:
    """Return LeNet-5 for images of 28 by 28, with ReLU and maximum pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 20, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def vgg() -> nn.Module:
    """Return a narrow VGG for images of 32 by 32: 6 868 042 parameters, 27 MB."""
    widths = (3, 64, 128, 256, 256, 512, 512, 512)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        if i in (0, 1, 3, 5):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    )


class Elsewhere(nn.Module):
    """A model whose computing leaves this machine's cores alone, as a GPU's does.

    The layers of ``vgg``; each sleeps for its share of the backward pass and then has a
    gradient of noise.

    Args:
        backward_s: seconds of a backward pass.
    """

    bucket_cap_mb = 4

    def __init__(self, backward_s: float) -> None:
        super().__init__()
        convolutions = [m for m in vgg().children() if isinstance(m, nn.Conv2d)]
        sides = (32, 16, 8, 8, 4, 4, 4)
        work = [
            m.weight.numel() * s * s for m, s in zip(convolutions, sides, strict=True)
        ]
        self.weights = nn.ParameterList(m.weight.detach() for m in convolutions)
        self.seconds = [backward_s * share / sum(work) for share in work]
        self.noise = [torch.randn_like(weight) ** 3 for weight in self.weights]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of no meaning that depend on every weight."""
        sleep: Any = _Sleep.apply
        total = x.flatten(1)[:, :10]
        layers = zip(self.weights, self.noise, self.seconds, strict=True)
        for weight, noise, seconds in layers:
            total = sleep(total, weight, noise, seconds)
        return total


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _: Tensor, noise: Tensor, seconds: float
    ) -> Tensor:
        ctx.noise, ctx.seconds = noise, seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        time.sleep(ctx.seconds)
        return grad, ctx.noise, None, None


def resnet(depth: int) -> nn.Module:
    """Return the CIFAR ResNet of 6n + 2 layers (He et al., arXiv 1512.03385, 4.2)."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth} must be 6n + 2, like 20, 56 or 110")
    blocks = (depth - 2) // 6
    layers: list[nn.Module] = [_conv(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(blocks):
            layers.append(_Residual(width, channels, stride if block == 0 else 1))
            width = channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers, *head)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class _Residual(nn.Module):
    """Two convolutions around a shortcut without parameters (the paper's option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return float32[n, outputs, h / stride, w / stride]."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            before = self.more // 2
            padding = (0, 0, 0, 0, before, self.more - before)
            shortcut = nn.functional.pad(shortcut, padding)
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + shortcut)


class Transformer(nn.Module):
    """A decoder-only transformer in the manner of nanoGPT, pre-norm, tied embedding.

    Args:
        alphabet: how many symbols there are.
        context: how many of them it sees.
        width: width of the residual stream.
        depth: number of blocks.
        heads: number of attention heads.
    """

    def __init__(
        self,
        alphabet: int,
        context: int,
        width: int = 96,
        depth: int = 3,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits, float32[n, context, alphabet], of int64[n, context]."""
        places = torch.arange(codes.shape[1], device=codes.device)
        x = self.embedding(codes) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = nn.functional.linear(self.norm(x), self.embedding.weight)
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32[n, context, width]."""
        n, context, width = x.shape
        split = (n, context, 3, self.heads, width // self.heads)
        q, k, v = self.attention(self.norm1(x)).view(split).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(n, context, width))
        widened = nn.functional.gelu(self.expand(self.norm2(x)))
        return torch.add(x, self.contract(widened))
