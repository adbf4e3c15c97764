"""Holding a budget of bytes: how much is sent, steered alike on every rank.

Every few exchanges the ranks share what each has sent, and move the sparsity, or the
density, by how far their mean is from the budget. All compute the same from the same
numbers, so no clock and no link decides. Frames carry their scales: a receiver need not
know.
"""

import logging
import math

from lc3.config import Settings

log = logging.getLogger(__name__)

LOOK_EVERY = 8  # exchanges between two looks
_LARGEST_S = 1.98
_DENSITIES = (1e-4, 0.5)
# Bytes fall by a factor e for 0.2 to 0.5 more of s: a look takes off half an error.
_S_GAIN, _DENSITY_GAIN = 0.12, 0.5
# What was too much or too little is made good over so many looks, by half at most.
_DEBT_LOOKS, _MOST_CREDIT = 10, 0.5
_PATIENCE = 6  # looks at the end of the range before it is said


class Budget:
    """What is sent of each value, moved towards a budget.

    Args:
        config: says the budget, if there is one, and where to begin.

    Attributes:
        target: bytes of this rank an exchange, or ``None``: nothing is moved.
        sparsity: sparsity of the push.
        pull_sparsity: sparsity of the pull.
        density: instead of both, or ``None``.
        exchanges: so far.
        sent_bytes: bytes that this rank sent in the exchanges since the last look.
        debt: bytes beyond the budget so far, the mean over ranks.
    """

    def __init__(self, config: Settings) -> None:
        self.target = config.bytes_per_step
        self.sparsity = config.sparsity
        self.pull_sparsity = (
            config.sparsity if config.pull_sparsity is None else config.pull_sparsity
        )
        self.density = config.density
        self.exchanges = 0
        self.sent_bytes = 0
        self.debt = 0.0
        self._stuck = 0

    def due(self) -> bool:
        """Count a step, or an exchange of local steps; return whether to look first."""
        if self.target is None:
            return False
        self.exchanges += 1
        return self.exchanges > 1 and self.exchanges % LOOK_EVERY == 1

    def look(self, sent_bytes: float) -> None:
        """Move towards the budget.

        Args:
            sent_bytes: since the last look, the mean over ranks.
        """
        assert self.target is not None
        self.sent_bytes = 0
        allowed = float(LOOK_EVERY * self.target)
        credit = _MOST_CREDIT * allowed
        now = allowed - min(credit, max(-credit, self.debt / _DEBT_LOOKS))
        most = _DEBT_LOOKS * credit
        self.debt = min(most, max(-most, self.debt + sent_bytes - allowed))
        over = math.log(max(sent_bytes, 1.0) / now)
        bounded = min(1.0, max(-1.0, over))
        if self.density is not None:
            least, most = _DENSITIES
            moved = self.density * math.exp(-_DENSITY_GAIN * bounded)
            at_an_end = not least < moved < most
            self.density = min(most, max(least, moved))
        else:
            moved = self.sparsity + _S_GAIN * bounded
            at_an_end = not 1.0 < moved < _LARGEST_S
            # The pull keeps its distance, as far as the range lets it.
            self.pull_sparsity = _within(self.pull_sparsity + _S_GAIN * bounded)
            self.sparsity = _within(moved)
        self._stuck = self._stuck + 1 if at_an_end and over > 0.1 else 0
        if self._stuck == _PATIENCE:
            log.warning(
                "lc3: bytes_per_step=%d cannot be held: at the end of the range an "
                "exchange still takes %.0f bytes of this rank; raise it, exchange less "
                "often, or let fewer parameters travel raw",
                self.target,
                sent_bytes / LOOK_EVERY,
            )

    def counters(self) -> dict[str, int | float]:
        """Return what a checkpoint has to keep: nothing without a budget."""
        if self.target is None:
            return {}
        kept: dict[str, int | float] = {
            "budget_exchanges": self.exchanges,
            "budget_sent_bytes": self.sent_bytes,
            "budget_debt": self.debt,
            "budget_sparsity": self.sparsity,
            "budget_pull_sparsity": self.pull_sparsity,
        }
        return (
            kept if self.density is None else {**kept, "budget_density": self.density}
        )

    def load(self, counters: dict[str, int | float]) -> None:
        """Go on from ``counters``."""
        if self.target is not None:
            self.exchanges = int(counters["budget_exchanges"])
            self.sent_bytes = int(counters["budget_sent_bytes"])
            self.debt = float(counters["budget_debt"])
            self.sparsity = float(counters["budget_sparsity"])
            self.pull_sparsity = float(counters["budget_pull_sparsity"])
            if self.density is not None:
                self.density = float(counters["budget_density"])


def _within(sparsity: float) -> float:
    return min(_LARGEST_S, max(1.0, sparsity))
