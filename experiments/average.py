"""A moving average of the parameters that ranks share, to evaluate beside them.

All ranks have the same, so nothing is sent for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

EVERY = 8  # steps from one update to the next
AVERAGED = ", averaged"  # what the name of a method's rows then ends with
_ETA = 8


class Average:
    """The average of a model, by PyTorch's own means.

    Args:
        model: model whose parameters are averaged; the present ones are not in it yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._average = AveragedModel(model, avg_fn=_moved)

    def update(self) -> None:
        """Take in the model's parameters."""
        self._average.update_parameters(self._model)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model's parameters be the average; buffers stay as they are."""
        mine, means = (
            [parameter.detach() for parameter in model.parameters()]
            for model in (self._model, self._average.module)
        )
        own = [value.clone() for value in mine]
        for value, mean in zip(mine, means, strict=True):
            value.copy_(mean)
        try:
            yield
        finally:
            for value, before in zip(mine, own, strict=True):
                value.copy_(before)


def _moved(mean: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
    """Return the mean of ``count`` values with one more.

    Polynomial-decay averaging (Shamir and Zhang, ICML 2013): about the last tenth of
    however many there have been, so that nothing depends on a training's length.
    """
    return mean + (value - mean) * ((_ETA + 1) / (count + 1 + _ETA))
