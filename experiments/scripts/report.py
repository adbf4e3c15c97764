"""What a script is told on its command line, and what it reports."""

import argparse
import json
from typing import Any

import torch.distributed as dist
from torch import Tensor

FORMS = "plain", "ddp", "local_sgd"


def options(steps: int) -> argparse.Namespace:
    """Return the command line of a script that trains ``steps`` steps by default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("form", choices=FORMS, help="whose lines are added")
    parser.add_argument("--text", default="", help="a text file")
    parser.add_argument("--steps", type=int, default=steps, help="of the optimizer")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Report:
    """Collects a training's figures; the first rank prints them as JSON.

    Args:
        given: the command line.

    Attributes:
        state: lc3's, if it is attached.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.state: Any = None
        self._given = given
        self._losses: list[float] = []
        self._norms: list[float] = []

    def step(self, loss: Tensor | float, norm: Tensor | float) -> None:
        """Note the loss and the gradient norm of a step."""
        self._losses.append(float(loss))
        self._norms.append(float(norm))

    def end(self, score: float) -> None:
        """Print the figures, close the state, leave the process group."""
        if dist.get_rank() == 0:
            meter = None if self.state is None else self.state.meter
            figures = {
                "form": self._given.form,
                "seed": self._given.seed,
                "steps": self._given.steps,
                "score": score,
                "train_loss": sum(self._losses[-20:]) / max(len(self._losses[-20:]), 1),
                "ratio": 1.0 if meter is None else meter.ratio,
                "sent_bytes": 0 if meter is None else meter.sent_bytes,
                "norms": self._norms[::10],
            }
            print("REPORT " + json.dumps(figures), flush=True)
        if self.state is not None:
            self.state.close()
        dist.destroy_process_group()
