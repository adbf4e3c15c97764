"""The smallest file whose score falls by no more than is allowed: one step is searched.

A file is judged by what its reader will see, so the model is loaded with the decoded
weights, evaluated, and given its own back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lc3.errors import ConfigError
from lc3.ship.choose import Lossy, section_of
from lc3.ship.container import check_input, host
from lc3.ship.model import RATE_WEIGHT, PathLike, save
from lc3.ship.rate import FINEST, deviation_of, float_values

_ROUNDS = 10
_WEIGHTS = (0.0, RATE_WEIGHT)
_FINER = 8.0  # of log2 of the step, where that is not enough
_FINEST, _COARSEST = 2.0**-9, 2.0**4  # of the deviation of all weights


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``fit`` has found.

    Attributes:
        step: the distance of two values of a weight.
        rate_weight: how much a bit counted, in squared steps.
        score: of the model that was shipped so.
        full_score: of the model as it is.
        nbytes: of the sections of all tensors.
        bits: of those, for each value that may be quantized.
    """

    step: float
    rate_weight: float
    score: float
    full_score: float
    nbytes: int
    bits: float

    def save(self, model: nn.Module, path: PathLike) -> int:
        """Write a model with this step; return how many bytes the file has."""
        return save(
            model.state_dict(), path, step=self.step, rate_weight=self.rate_weight
        )


def fit(
    model: nn.Module, evaluate: Callable[[nn.Module], float], drop: float = 0.005
) -> Plan:
    """Return the plan of the smallest file whose score is at most ``drop`` lower.

    The score is taken to fall as the step grows, as it does but for noise. The step is
    searched twice, for nearest numbers and for those that cost few bits. Parameters and
    buffers are what they were when it returns.

    Args:
        model: trained; it is evaluated as it stands, in its own mode.
        evaluate: returns a score, larger is better: a share of right answers, or a
            loss with its sign turned.
        drop: by how much the score may fall, in its units, at least 0.

    Raises:
        ConfigError: ``drop`` is out of range, a score is not finite, or even the finest
            step loses more.
        InputError: the model has something in its state that a file cannot hold.

    Example:
        >>> def evaluate(net):
        ...     return -float((net.weight - kept).abs().max())
        >>> net = nn.Linear(40, 30)
        >>> kept = net.weight.detach().clone()
        >>> plan = fit(net, evaluate, drop=0.01)
        >>> plan.full_score, -0.0101 <= plan.score <= -0.008
        (-0.0, True)
    """
    if not isinstance(drop, int | float) or not 0 <= drop < math.inf:
        raise ConfigError(f"drop={drop!r} must be a number from 0 up")
    for name, tensor in model.state_dict().items():
        check_input(name, tensor)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full = _score(evaluate, model)
    size, values = deviation_of(own), max(1, float_values(own))

    def at(step: float, weight: float) -> Plan:
        found, nbytes = {}, 0
        lossy = Lossy(step, rate_weight=weight)
        for name, tensor in own.items():
            section = section_of(name, host(tensor), None, lossy)
            found[name] = section.decoded.to(tensor.device)
            nbytes += len(section.data)
        model.load_state_dict(found)
        score = _score(evaluate, model)
        return Plan(step, weight, score, full, nbytes, 8 * nbytes / values)

    def largest(weight: float) -> Plan:
        lowest = math.log2(FINEST)
        low, high = (math.log2(x * size) for x in (_FINEST, _COARSEST))
        low, high = max(low, lowest), max(high, lowest)
        best = at(2.0**low, weight)
        while best.score < full - drop and low > lowest:  # a few values rule the size
            high, low = low, max(lowest, low - _FINER)
            best = at(2.0**low, weight)
        if best.score < full - drop:
            raise ConfigError(
                f"even a step of {best.step:.3g} lowers the score from {full:.6g} to "
                f"{best.score:.6g}, by more than drop={drop}; ship it lossless"
            )
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            plan = at(2.0**middle, weight)
            if plan.score >= full - drop:
                best, low = plan, middle
            else:
                high = middle
        return best

    try:
        return min(map(largest, _WEIGHTS), key=lambda plan: plan.nbytes)
    finally:
        model.load_state_dict(own)


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    with torch.no_grad():
        score = float(evaluate(model))
    if not math.isfinite(score):
        raise ConfigError(f"evaluate returned {score}, not a finite score")
    return score
