"""The norm of a step's mean gradient where every owner has only its share of it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lc3.engines.exchange import Exchange
from lc3.format import NORM_BUCKET
from lc3.module.sketch import Sketch, squares


class MeanNorm:
    """Finds the norm, the same on all ranks: exact of what is uncoded, else estimated.

    What is decoded has a norm many times the gradient's, so what is coded is sketched
    before: see ``lc3.module.sketch``.

    Args:
        engine: of which owners have the means.
    """

    def __init__(self, engine: Exchange) -> None:
        self._engine = engine
        plan = engine.plan
        self._coded = {n: numel for n, numel in plan.numel.items() if n in plan.coded}
        self._sketch: Sketch | None = None
        if self._coded and engine.transport.world > 1:
            self._sketch = Sketch(self._coded, engine.messages.coder.device)

    def begin(self) -> None:
        """Forget a step that was not made."""
        if self._sketch is not None:
            self._sketch.take()

    def add(self, values: Mapping[str, Tensor], step: int) -> None:
        """Take in gradients of this rank, by name [numel], before they are pushed."""
        if self._sketch is not None:
            for name in self._coded.keys() & values.keys():
                self._sketch.add(name, values[name], step)

    def find(
        self, means: Mapping[str, Tensor], flag: bool, step: int
    ) -> tuple[float, bool]:
        """Return the norm, and whether some rank has raised its flag; collective.

        Args:
            means: by name float32[slice], this rank's share of the mean gradient.
            flag: what this rank says.
            step: of the run.

        Returns:
            The norm is nan if what arrived is not finite somewhere.
        """
        exact = whole = 0.0  # squared norms: of what is not coded, of all that arrived
        for name, mean in means.items():
            square = float(mean.double().square().sum())
            whole += square
            if self._sketch is None or name not in self._coded:
                exact += square
        sums = [] if self._sketch is None else self._sketch.take().tolist()
        channel = self._engine.channel
        with channel.exchanging(0, step, NORM_BUCKET):
            everybody = channel.all_gather_numbers(
                [exact, whole, flag, *sums], step, NORM_BUCKET
            )
        total = sum(numbers[0] for numbers in everybody)
        if sums:
            found = torch.tensor(everybody, dtype=torch.float64)[:, 3:].mean(0)
            total += squares(found)[0]
        finite = math.isfinite(sum(numbers[1] for numbers in everybody) + total)
        raised = any(numbers[2] for numbers in everybody)
        return math.sqrt(total) if finite else math.nan, raised
