"""What the states of all forms have in common: how they show, and how they end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, Self

from lc3.checkpoint import Parts, load, of_rank, save
from lc3.config import Settings
from lc3.engines.exchange import Exchange, push_what_owners_owe
from lc3.meter import Meter
from lc3.session.session import Session


class FormState:
    """Base of every form's state: what ``attach`` returns.

    A context manager that closes itself. Its ``repr`` is one line: ranks, what is
    coded, every knob that is not as it is by default, and the ratio so far.

    Attributes:
        settings: every knob, with what the form has chosen.
        meter: bytes and seconds so far, on this rank.
        engine: averages and codes; holds the plan and the residuals.
        session: names, group and worker lane; counts the steps.
    """

    session: Session
    settings: Settings
    meter: Meter
    engine: Exchange

    form: str  # in what is saved

    def _parts(self) -> Parts:
        """Return what is kept: views, not copies."""
        residuals = self.engine.residuals
        counters = {"step": self.session.step, **self.engine.budget.counters()}
        return Parts(counters, residuals.sent, {"owned": residuals.owned})

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank has to keep: tensors, strings and numbers only.

        Every rank saves its own. The same rank of an equal run continues from it bit
        for bit; ``lc3.merge_states`` of all ranks' fits any number of ranks.
        """
        return save(self.form, self.engine.plan, self.engine.me, self._parts())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict`` of this rank, or from merged ones.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        mine = self._parts()
        found = self._found(state, mine)
        mine.copy_from(found)
        push_what_owners_owe(self.engine)
        self._go_on(found)

    def _found(self, state: Mapping[str, Any], mine: Parts) -> Parts:
        """Return what a state holds of the kinds in ``mine``, checked."""
        return load(state, self.form, self.engine.plan, self.engine.me, mine)

    def _go_on(self, found: Parts) -> None:
        """Count on from a state."""
        self.engine.budget.load(found.counters)
        self.session.begin_step(int(found.counters["step"]))

    def gather_state(self) -> list[dict[str, Any]]:
        """Return every rank's ``state_dict()`` on rank 0, none elsewhere; collective.

        For checkpoints that one rank writes; ``load_gathered`` takes it on any.
        """
        return self.session.gather(self.state_dict())

    def load_gathered(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from what ``gather_state`` returned on rank 0, with any ranks.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        transport = self.engine.transport
        self.load_state_dict(of_rank(states, transport.rank, transport.world))

    def check_replicas(self) -> None:
        """Raise ``ReplicasDiffer`` if ranks hold other parameters; collective."""
        raise NotImplementedError

    def sync(self) -> None:
        """Make all replicas equal; collective. Where they always are: nothing."""

    @contextmanager
    def shared_model(self) -> Iterator[None]:
        """Lend the parameters that all ranks share. Where they always are: nothing."""
        yield

    def close(self) -> None:
        """End what ``attach`` started."""
        raise NotImplementedError

    def _knobs(self) -> dict[str, object]:
        """Return the form's own knobs, for ``repr``."""
        return {}

    def __repr__(self) -> str:
        plan, transport = self.engine.plan, self.engine.transport
        coded = sum(plan.numel[name] for name in plan.coded)
        trained = sum(n for name, n in plan.numel.items() if name not in plan.extras)
        said = [
            f"{transport.world} rank{'s' * (transport.world > 1)}",
            f"{coded:,} of {trained:,} parameters coded",
            repr(self.settings).removeprefix("Settings(").removesuffix(")"),
            ", ".join(f"{k}={v!r}" for k, v in self._knobs().items()),
        ]
        if self.meter.sent_bytes:
            said.append(f"{self.meter.ratio:.1f} times fewer bytes than float32 so far")
        form = type(self).__module__.removeprefix("lc3.hooks.")
        return f"<lc3 {form}: {'; '.join(filter(None, said))}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an lc3 state holds a process group and cannot be pickled; save "
            "state.state_dict(), and of a wrapped model model.module.state_dict()"
        )
