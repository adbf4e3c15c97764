"""Second moments of gradients, alike on all ranks, to divide by before coding.

Adam after 3LC does not work: its second moment is large where values arrive now and
then, and so its steps are small. Here nothing divides by what was decoded. Every rank
divides its own gradient by the root of a second moment that all ranks have alike, and
codes what Adam would step by. docs/adam.md derives it.

A matrix has as second moment the outer product of its rows' and its columns'
(Adafactor, arXiv 1804.04235), a tensor of more dimensions that of the matrix with the
fewest rows and columns that it is in memory; one of fewer has each element's. So few
numbers are shared exactly, in the first steps and then in every fifth.
"""

from collections.abc import Mapping, Sequence
from math import prod, sqrt

import torch
from torch import Tensor

REFRESH = 5  # steps from one exchange of moments to the next
FIRST = 10  # steps that all exchange them
_EPSILON = 1e-8


class Moments:
    """The second moment of every parameter, and what it is made of.

    Args:
        shapes: by parameter name.
        beta2: Adam's, of one step.
        device: of the gradients.

    Attributes:
        kept: by parameter name float32[*]: means of the squares of rows and then of
            columns, or of every element, and the weight of all gradients in them.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        beta2: float,
        device: torch.device,
    ) -> None:
        self._matrices = {name: matrix_of(shape) for name, shape in shapes.items()}
        self._decay = beta2**REFRESH
        # Adam's own steps are no larger, of a gradient that comes out of nothing.
        self._most = 1 / sqrt(1 - beta2)
        self.kept = {
            name: torch.zeros(rows + columns + 1, device=device)
            for name, (rows, columns) in self._matrices.items()
        }

    def due(self, step: int) -> bool:
        """Return whether ``take`` comes before ``divide`` in a step, from 0 up."""
        return step < FIRST or step % REFRESH == REFRESH - 1

    def of(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's part of the moments of some gradients, float32[*].

        Args:
            grads: by parameter name, float32[numel].
        """
        parts = []
        for name, gradient in grads.items():
            rows, columns = self._matrices[name]
            squares = gradient.square()
            if rows:
                matrix = squares.view(rows, columns)
                parts += [matrix.mean(dim=1), matrix.mean(dim=0)]
            else:
                parts.append(squares)
        return torch.cat(parts)

    def take(self, names: Sequence[str], shared: Tensor) -> None:
        """Take in the mean over ranks of what ``of`` returned for the same names.

        What overflowed in a parameter is left out: its step will not be taken.
        """
        sizes = [self.kept[name].numel() - 1 for name in names]
        one = torch.ones(1, device=shared.device)
        for name, mean in zip(names, torch.split(shared, sizes), strict=True):
            if mean.isfinite().all():
                self.kept[name].lerp_(torch.cat([mean, one]), 1 - self._decay)

    def divide(self, grads: Mapping[str, Tensor]) -> None:
        """Divide gradients by the roots of their moments, in place.

        Elements are bounded by Adam's bound, 1 / √(1 − β2); inf and nan become nan.

        Args:
            grads: by parameter name, float32[numel], contiguous.
        """
        for name, gradient in grads.items():
            rows, columns = self._matrices[name]
            mean = self.kept[name][:-1] / self.kept[name][-1]
            lost = ~gradient.isfinite()
            if rows:
                of_rows, of_columns = mean[:rows], mean[rows:]
                of_rows = of_rows / (of_rows.mean() + 1e-30)
                matrix = gradient.view(rows, columns)
                matrix.mul_(_inverse_root(of_rows)[:, None])
                matrix.mul_(_inverse_root(of_columns))
            else:
                gradient.mul_(_inverse_root(mean))
            gradient.clamp_(-self._most, self._most).masked_fill_(lost, torch.nan)

    def rescale(self, factor: float) -> None:
        """Go on with gradients that are ``factor`` times as large."""
        for kept in self.kept.values():
            kept[:-1] *= factor**2


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


def _inverse_root(moments: Tensor) -> Tensor:
    return 1 / (moments.sqrt() + _EPSILON)
