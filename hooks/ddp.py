"""3LC as a communication hook of DistributedDataParallel.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with
the classes themselves.
"""

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lc3.config import Config
from lc3.errors import AttachError, StateError
from lc3.session import session_for

log = logging.getLogger(__name__)

_CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attach(
    model: DistributedDataParallel,
    config: Config = Config(),  # noqa: B008  # frozen
    *,
    group: dist.ProcessGroup | None = None,
) -> "State":
    """Compress the gradients of ``model`` from its next backward pass on.

    Collective: every rank of the group calls it, with the same configuration.

    Args:
        model: wrapped in DistributedDataParallel, on the CPU, without a hook of
            its own.
        config: what to compress, and how much.
        group: a process group that nobody else uses, over the ranks of the model's.
            Default: lc3 makes one, which it can only if the model is on all ranks.

    Returns:
        The state: its ``meter``, ``state_dict()``, ``close()``.

    Raises:
        AttachError: the model cannot be compressed.
        ConfigError: a pattern of the configuration matches no parameter.
        PlanMismatch: ranks differ in configuration, parameters or version.
        PeerError: one of these happened on another rank.
    """
    state = State(model, config, group=group)
    model.register_comm_hook(state, lc3_hook)
    return state


def lc3_hook(
    state: "State", bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Replace every gradient in ``bucket`` by its 3LC mean (``register_comm_hook``)."""
    return state.session.on_bucket(bucket, state.reduce)


class State:
    """Everything lc3 keeps for one model: made by ``attach``.

    Attributes:
        config: the configuration.
        meter: bytes and seconds so far, on this rank.
        engine: averages gradients; holds the plan and the residuals.
        session: names, group and worker lane; counts the steps.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        config: Config = Config(),  # noqa: B008  # frozen
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.session = session_for(model, config, group)
        self.config = config
        self.meter = self.session.meter
        self.engine = self.session.engine
        self._said: set[str] = set()
        self._wide = torch.empty(0)

    def reduce(
        self, buffer: Tensor, names: list[str], step: int, bucket: int
    ) -> Tensor:
        """Average one bucket over the ranks. Runs on the lane.

        Args:
            buffer: the bucket's flat buffer, overwritten. Slices of it, never shaped
                views: for channels_last parameters the two differ in order.
            names: of its parameters, in the order of the buffer.
            step: synchronised backward passes before this one.
            bucket: its number in this backward pass.

        Returns:
            What the hook's future must hold: ``buffer``, or for a gradient that passes
            through uncompressed a tensor like it.
        """
        self.meter.steps = step + 1
        if buffer.layout != torch.strided or buffer.dtype not in _CODED_DTYPES:
            self._say_once(
                f"{buffer.dtype if buffer.layout == torch.strided else 'sparse'} "
                f"gradients pass through a plain all-reduce (first: {names[0]})"
            )
            return self.engine.pass_through(buffer)
        flat = buffer if buffer.dtype == torch.float32 else self._widened(buffer)
        sizes = [self.engine.plan.numel[name] for name in names]
        if sum(sizes) != flat.numel():
            raise AttachError(
                f"bucket {bucket} holds {flat.numel()} elements, its parameters "
                f"{sum(sizes)}; this torch lays out buckets in a way lc3 does not know"
            )
        grads = dict(zip(names, torch.split(flat, sizes), strict=True))
        self.engine.all_reduce(grads, step, bucket)
        return buffer if flat is buffer else buffer.copy_(flat)

    def _widened(self, buffer: Tensor) -> Tensor:
        """Return float32[numel] of a half-precision bucket, in memory used again."""
        if self._wide.numel() < buffer.numel():
            self._wide = torch.empty(buffer.numel())
        return self._wide[: buffer.numel()].copy_(buffer)

    def _say_once(self, what: str) -> None:
        kind = what.split()[0]
        if kind not in self._said:
            self._said.add(kind)
            log.warning("lc3: %s", what)

    def state_dict(self) -> dict[str, Any]:
        """Return residuals and step of this rank: tensors, strings, integers only.

        Every rank saves its own; load it into the same rank of an equal run.
        """
        return {
            "step": self.session.step,
            "residuals": self.engine.residuals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict`` of this rank.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        if set(state) != {"step", "residuals"}:
            raise StateError(
                f"state has the keys {sorted(state)}, expected ['residuals', 'step']; "
                "is this what state.state_dict() returned?"
            )
        self.engine.residuals.load_state_dict(state["residuals"])
        self.session.begin_step(int(state["step"]))

    def close(self) -> None:
        """End the lane and the group it made. The model can no longer run backward."""
        self.session.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an lc3 State holds a process group and cannot be pickled; save "
            "state.state_dict(), and save model.module, not the DDP wrapper"
        )
