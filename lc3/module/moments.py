"""Second moments of gradients, alike on all ranks, to divide by before coding.

Adam after 3LC does not work: its second moment is large where values arrive now and
then, and so its steps are small. Here nothing divides by the squares of what was
decoded. Every rank divides its own gradient by the root of a second moment that all
ranks have alike, and codes what Adam would step by (docs/explanation/adam.md).

A matrix is cut into blocks of 64 × 64, and each block has as second moment the outer
product of its rows' and its columns' (Adafactor, arXiv 1804.04235). A tensor of more
dimensions counts as the matrix with the fewest rows and columns that it is in memory;
one of fewer has a moment for each element. So few numbers are shared exactly, in the
first ten steps and then in every tenth.
"""

from collections.abc import Mapping, Sequence
from math import inf, prod, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # its usual name

BLOCK = 64
REFRESH = 10  # steps from one exchange of moments to the next
FIRST = 10  # steps that all exchange them
_EPSILON = 1e-8


class Moments:
    """The second moment of every parameter, and what it is made of.

    Args:
        shapes: shapes by parameter name.
        beta2: Adam's, of one step, by parameter name.
        device: device of the gradients.
        most: bounds every element of a divided gradient. Default: Adam's own bound, of
            a gradient that comes out of nothing. 3LC's scale is the largest element, so
            a lower bound sends more values, and each in smaller steps. Adafactor bounds
            its updates in the same way (arXiv 1804.04235, section 6).

    Attributes:
        kept: by parameter name float32[*]: means of the squares of each block's rows
            and then of its columns, or of every element, and the weight of all
            gradients in them.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        beta2: Mapping[str, float],
        device: torch.device,
        most: float = inf,
    ) -> None:
        self._grids = {name: _Grid(*matrix_of(shape)) for name, shape in shapes.items()}
        self._decay = {name: beta2[name] ** REFRESH for name in shapes}
        self._most = {name: min(most, 1 / sqrt(1 - beta2[name])) for name in shapes}
        self.kept = {
            name: torch.zeros(grid.numbers + 1, device=device, dtype=torch.float32)
            for name, grid in self._grids.items()
        }
        self._before: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Return whether ``take`` comes before ``divide`` in a step, from 0 up."""
        return step < FIRST or step % REFRESH == REFRESH - 1

    def of(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's part of the moments of some gradients, float32[*].

        Args:
            grads: by parameter name, float32[numel].
        """
        return torch.cat(
            [
                part.reshape(-1)
                for name, gradient in grads.items()
                for part in self._grids[name].means(gradient.square())
            ]
        )

    def take(self, names: Sequence[str], shared: Tensor) -> None:
        """Take in the mean over ranks of what ``of`` returned for the same names.

        What overflowed in a parameter is left out: its step will not be taken.
        ``settle`` says afterwards how much of the gradients was applied.
        """
        sizes = [self.kept[name].numel() - 1 for name in names]
        one = torch.ones(1, device=shared.device, dtype=torch.float32)
        for name, mean in zip(names, torch.split(shared, sizes), strict=True):
            if mean.isfinite().all():
                self._before[name] = self.kept[name].clone()
                new = torch.cat([mean, one])
                self.kept[name].lerp_(new, 1 - self._decay[name])

    def settle(self, applied: Mapping[str, float]) -> None:
        """Let moments be those of what was applied of the gradients last taken.

        Args:
            applied: by parameter name, see ``Residuals.settle``.
        """
        for name in [name for name in self._before if name in applied]:
            before, share = self._before.pop(name), applied[name]
            if share == 0:
                self.kept[name].copy_(before)
            elif share != 1:  # of squares, whose weight stays
                old = before[:-1] * self._decay[name]
                self.kept[name][:-1].lerp_(old, 1 - share**2)

    def divide(self, grads: Mapping[str, Tensor]) -> None:
        """Divide gradients by the roots of their moments, in place.

        Elements are bounded; inf and nan become nan.

        Args:
            grads: by parameter name, float32[numel], contiguous.
        """
        for name, gradient in grads.items():
            lost = ~gradient.isfinite()
            self._grids[name].scale(gradient, [1 / root for root in self._roots(name)])
            most = self._most[name]
            gradient.clamp_(-most, most).masked_fill_(lost, torch.nan)

    def multiply(self, grads: Mapping[str, Tensor]) -> None:
        """Make what ``divide`` has divided gradients again, in place.

        Args:
            grads: by parameter name, float32[numel], contiguous.
        """
        for name, gradient in grads.items():
            self._grids[name].scale(gradient, self._roots(name))

    def of_elements(self, name: str) -> Tensor:
        """Return the second moment of every element of a parameter: float32[numel]."""
        grid = self._grids[name]
        moment = torch.ones(
            grid.numel, device=self.kept[name].device, dtype=torch.float32
        )
        grid.scale(moment, [root.square() for root in self._roots(name)])
        return moment

    def _roots(self, name: str) -> list[Tensor]:
        """Return the roots of the moments of blocks' rows and columns, or elements."""
        weight = self.kept[name][-1]
        means = self.kept[name][:-1] / weight
        # Where no gradient was finite so far nothing is divided.
        means = torch.where(weight > 0, means, 1.0)
        parts = self._grids[name].parts(means)
        if len(parts) == 1:
            return [parts[0].sqrt() + _EPSILON]
        of_rows, of_columns = parts
        whole = self._grids[name].of_blocks(of_rows)
        return [(of_rows / (whole + 1e-30)).sqrt() + _EPSILON, of_columns.sqrt() + 1e-8]


class _Grid:
    """A matrix in blocks; without rows a row of elements.

    Args:
        rows: number of rows of the matrix; 0: there is none.
        columns: number of columns of the matrix, or of elements.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.numel = max(rows, 1) * columns
        self._down, self._across = -(-rows // BLOCK), -(-columns // BLOCK)
        self.numbers = rows * self._across + self._down * columns if rows else columns

    def means(self, values: Tensor) -> list[Tensor]:
        """Return the means of blocks' rows, and of their columns, or the values."""
        if not self.rows:
            return [values]
        padding = (
            *(0, self._across * BLOCK - self.columns),
            *(0, self._down * BLOCK - self.rows),
        )
        matrix = F.pad(values.view(self.rows, self.columns), padding)
        blocks = matrix.view(self._down, BLOCK, self._across, BLOCK)
        wide, high = self._sizes(self.columns), self._sizes(self.rows)
        of_rows = blocks.sum(3).view(-1, self._across)[: self.rows]
        of_columns = blocks.sum(1).view(self._down, -1)[:, : self.columns]
        device = values.device
        return [of_rows / wide.to(device), of_columns / high.to(device)[:, None]]

    def parts(self, row: Tensor) -> list[Tensor]:
        """Undo putting ``means`` in a row."""
        if not self.rows:
            return [row]
        cut = self.rows * self._across
        return [row[:cut].view(self.rows, -1), row[cut:].view(self._down, -1)]

    def of_blocks(self, of_rows: Tensor) -> Tensor:
        """Return the mean of the block that each part of a row is in."""
        padded = F.pad(of_rows, (0, 0, 0, self._down * BLOCK - self.rows))
        sums = padded.view(self._down, BLOCK, self._across).sum(1)
        means = sums / self._sizes(self.rows).to(of_rows.device)[:, None]
        return means.repeat_interleave(BLOCK, 0)[: self.rows]

    def scale(self, values: Tensor, by: Sequence[Tensor]) -> None:
        """Multiply values, float32[numel], by blocks' rows and columns, or each."""
        if len(by) == 1:
            values.mul_(by[0])
            return
        of_rows, of_columns = by
        if self.rows % BLOCK == 0 and self.columns % BLOCK == 0:
            blocks = values.view(self._down, BLOCK, self._across, BLOCK)
            blocks.mul_(of_rows.view(self._down, BLOCK, self._across, 1))
            blocks.mul_(of_columns.view(self._down, 1, self._across, BLOCK))
        else:
            matrix = values.view(self.rows, self.columns)
            wide = of_rows.repeat_interleave(BLOCK, 1)
            matrix.mul_(wide[:, : self.columns])
            high = of_columns.repeat_interleave(BLOCK, 0)
            matrix.mul_(high[: self.rows])

    @staticmethod
    def _sizes(n: int) -> Tensor:
        """Return how many of ``n`` rows or columns are in each block."""
        return torch.arange(n, 0, -BLOCK, dtype=torch.int64).clamp(max=BLOCK).float()


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns that a tensor's moments are kept for.

    (0, numel): those of every element are.
    """
    numel = prod(shape)
    if len(shape) < 2 or numel == 0:
        return 0, numel
    return min(
        ((rows := prod(shape[:i]), numel // rows) for i in range(1, len(shape))),
        key=sum,
    )
