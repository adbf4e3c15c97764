"""Draws what each step of 3LC does to a tensor, for the documentation.

python -m experiments.report.pictures docs/images/3lc.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import lc3

_VALUES = 300


def draw(path: Path) -> None:
    """Draw a tensor, its three values, its residual, its bytes, and folded bytes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(_VALUES, generator=generator) ** 3
    frame, residual = lc3.encode(x, 1.0)
    decoded = lc3.decode(frame, _VALUES)
    scale = decoded.abs().max()
    digits = (decoded / scale).long() + 1
    fifth = digits.view(5, -1)
    weights = torch.tensor([81, 27, 9, 3, 1]).view(5, 1)
    quartic = (fifth * weights).sum(0)
    body = frame[4:].long()
    figure = Figure(figsize=(8, 8.5), layout="constrained")
    parts = figure.subplots(5, 1)
    _lines(parts[0], x, "1. gradient plus residual: float32, 32 bits a value")
    _lines(parts[1], decoded, "2. three values: -scale, 0, +scale")
    _lines(parts[2], x - decoded, "3. what stays with the sender: the new residual")
    title = f"4. five values in a byte: {len(quartic)} bytes, most of them 121 (zeros)"
    _bytes(parts[3], quartic, title)
    title = f"5. runs of zeros folded: {len(body)} bytes and the scale"
    _bytes(parts[4], body, title)
    assert torch.equal(x - decoded, residual)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _lines(axes: Axes, values: Tensor, title: str) -> None:
    axes.vlines(range(len(values)), 0, values.tolist(), lw=1)
    axes.set_title(title, loc="left")
    axes.set_xlim(-1, _VALUES)


def _bytes(axes: Axes, values: Tensor, title: str) -> None:
    axes.bar(range(len(values)), values.tolist(), width=0.8, color="C1")
    axes.set_title(title, loc="left")
    axes.set_xlim(-1, _VALUES / 5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        prog="experiments.report.pictures", description=__doc__
    )
    parser.add_argument("path", type=Path, help="PNG file to write")
    draw(parser.parse_args(arguments).path)


if __name__ == "__main__":
    main()
