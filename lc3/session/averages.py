"""What a state keeps that averages gradients by ``Buckets``, and what it still owes."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lc3.checkpoint import Parts
from lc3.config import Settings
from lc3.engines.exchange import pending, push_what_owners_owe
from lc3.errors import StateError
from lc3.meter import Meter
from lc3.module.applied import Kind
from lc3.module.model import flat_view
from lc3.session.buckets import Buckets
from lc3.session.checks import alike_in
from lc3.session.state import FormState

log = logging.getLogger(__name__)


class Averages(FormState):
    """Base of the states of gradients that are averaged; see ``FormState``.

    Attributes:
        kind: of the optimizer: "adam", "sgd" or "other"; ``None`` without one.
    """

    form = "ddp"
    kind: Kind | None = None
    _buckets: Buckets
    _module: nn.Module

    def discard(self) -> None:
        """Say that no optimizer applies the gradients of the last backward pass.

        For a state without ``optimizer``, right after such a pass: a step that the
        script skips, gradients that ``zero_grad`` throws away. Residuals and moments
        then are those from before it. With ``optimizer`` that is noticed.
        """
        self._buckets.discard()

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's mean gradient, estimated.

        See ``lc3.module.sketch``.

        nan without ``optimizer``, and before the first step.
        """
        return self._buckets.norm

    def pending(self) -> dict[str, Tensor]:
        """Return what gradients still owe the parameters; collective.

        By coded parameter float32[numel] in memory order, the same on every rank: the
        mean over ranks of the residuals, in the units of the gradients that the
        optimizer applies; with Adam of gradients over the roots of their moments.
        """

        def ask() -> dict[str, Tensor]:
            self._buckets.settle()
            return pending(self.engine)

        return self.session.lane.call(ask)

    def check_replicas(self) -> None:
        """Raise ``ReplicasDiffer`` if ranks hold other parameters; collective."""
        self.session.check_replicas(alike_in(self._module))

    def flush(self) -> None:
        """Add what is pending to the gradients, densely, and owe nothing; collective.

        For the last ``optimizer.step()`` before the model is handed over. Call it after
        ``backward()``, on every rank, and clip no more: with an optimizer gradients
        are clipped already, if the script has clipped before.
        """
        self._buckets.release()
        owed = self.pending()
        self._buckets.multiply(owed)
        for parameter, name in self.session.names.items():
            if name not in owed or not owed[name].any():
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
            flat_view(parameter.grad).add_(owed[name].to(parameter.dtype))
        for buffer in self.engine.residuals.buffers():
            buffer.zero_()

    def _parts(self) -> Parts:
        parts = super()._parts()
        parts.counters |= {"senders": self.engine.senders, **self._buckets.counters()}
        if self._buckets.moments is not None:
            parts.whole = {"moments": self._buckets.moments.kept}
        return parts

    def state_dict(self) -> dict[str, Any]:
        """See ``FormState.state_dict``."""
        self._buckets.settle()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``FormState.load_state_dict``."""
        mine = self._parts()
        found = self._found(state, mine)
        merged, senders = state["rank"] is None, found.counters["senders"]
        if not merged and senders != self.engine.senders:
            raise StateError(
                f"the state was saved with {senders} senders of each element, this run "
                f"has {self.engine.senders}; attach with the same mesh, or load "
                "lc3.merge_states of all ranks'"
            )
        self.engine.residuals.settle_all(0.0)  # of what went before
        mine.copy_from(found)
        if merged:
            self.engine.keep_own_part()
        push_what_owners_owe(self.engine)
        self.engine.owing.update(self.engine.residuals.sent)
        self._buckets.load(found.counters)
        self._go_on(found)


class Alone(Averages):
    """One process, which nobody has started with others: nothing to exchange."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.meter = settings, Meter()

    def discard(self) -> None:
        """Do nothing: nothing was exchanged."""

    @property
    def grad_norm(self) -> float:
        """The norm of a gradient that lc3 has not seen: nan."""
        return math.nan

    def pending(self) -> dict[str, Tensor]:
        """Return that nothing is owed."""
        return {}

    def flush(self) -> None:
        """Do nothing: nothing is owed."""

    def check_replicas(self) -> None:
        """Do nothing: there is one."""

    def state_dict(self) -> dict[str, Any]:
        """Return that there is nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Owe nothing; what several ranks have saved as owed is dropped, and said."""
        if state:
            log.warning(
                "lc3: one process owes nothing; what the state's ranks have not sent "
                "is dropped"
            )

    def gather_state(self) -> list[dict[str, Any]]:
        """Return that there is nothing to keep."""
        return []

    def load_gathered(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See ``load_state_dict``."""
        for state in states[:1]:
            self.load_state_dict(state)

    def close(self) -> None:
        """Do nothing."""

    def __repr__(self) -> str:
        return "<lc3 ddp: one process, nothing to exchange>"
