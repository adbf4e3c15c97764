"""What the adapters of training frameworks share."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch.optim import Optimizer

from lc3.config import Config
from lc3.errors import AttachError
from lc3.meter import Meter


class State(Protocol):
    """What adapters need of the state that a form's ``attach`` returns."""

    meter: Meter

    def sync(self) -> None:
        """Make replicas equal; collective."""

    def shared_model(self) -> AbstractContextManager[None]:
        """Lend the parameters that all ranks share."""

    def gather_state(self) -> list[dict[str, Any]]:
        """Return the states of all ranks on rank 0; collective."""

    def load_gathered(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what ``gather_state`` returned."""

    def close(self) -> None:
        """End what ``attach`` started."""


class Attach(Protocol):
    """``lc3.hooks.ddp.attach``, ``lc3.hooks.local_sgd.attach``, or a partial of one."""

    def __call__(
        self,
        model: Any,
        optimizer: Optimizer | Sequence[Optimizer],
        config: Config | None = None,
        /,
    ) -> State:
        """Compress what ``model`` exchanges; collective."""


def figures(meter: Meter) -> dict[str, float]:
    """Return the main figures under the names that loggers get."""
    stages = {f"lc3/seconds_{stage}": spent for stage, spent in meter.seconds.items()}
    return {
        "lc3/ratio": meter.ratio,
        "lc3/bits_push": meter.push.bits_per_element,
        "lc3/bits_pull": meter.pull.bits_per_element
        if meter.pull.coded_elements
        else 0.0,
        **stages,
    }


def require(package: str, found: str, least: str) -> None:
    """Raise ``AttachError`` if a package is older than what lc3 knows how to use."""
    if _numbers(found) < _numbers(least):
        raise AttachError(
            f"lc3 needs {package} {least} or newer, {found} is installed; "
            f"pip install '{package}>={least}'"
        )


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"[0-9]+", version.partition("+")[0])[:3]]
