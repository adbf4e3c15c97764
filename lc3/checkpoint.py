"""What a rank saves, and how the states of W ranks go on with any number of ranks.

A hook describes what it keeps as ``Parts``, views of its own memory. ``save`` makes a
state of this rank from them: plain tensors, strings and numbers, for ``torch.save`` and
``torch.load(weights_only=True)``. Loaded by the same rank of an equal run it continues
bit for bit. ``merge`` makes one state of the states of all ranks, which any number of
ranks can load: masters and optimizer state stay exact, and what was not sent yet is
kept as the mean over ranks, so that its sum is the same up to one division.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lc3.errors import StateError
from lc3.plan import Plan, Slice

FORMAT = 2
OPTIONAL = "optimizer."  # shares that a fresh run does not have yet begin like this
Named = dict[str, Tensor]
_KEYS = {
    *("format", "hook", "rank", "world", "plan", "numel", "counters", "sent"),
    *("starts", "shares", "whole", "scalars"),
}


@dataclass
class Parts:
    """What a hook keeps.

    Attributes:
        counters: numbers that are the same on every rank.
        sent: this rank's worker-side residuals, float32[numel] by coded parameter.
        shares: by kind, then by parameter: one tensor of as many elements as the slice
            that this rank owns.
        whole: by kind, then by parameter: one tensor, the same on every rank.
        scalars: of the optimizer, by parameter: numbers and tensors of one element, and
            under ``""`` its parameter groups.
    """

    counters: dict[str, int | float]
    sent: Named
    shares: dict[str, Named] = field(default_factory=dict)
    whole: dict[str, Named] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (kind, parameter, tensor) of everything with a fixed size."""
        for kind, named in (("sent", self.sent), *self.shares.items()):
            for name, tensor in named.items():
                yield kind, name, tensor
        for kind, named in self.whole.items():
            for name, tensor in named.items():
                yield kind, name, tensor

    def copy_from(self, other: "Parts") -> None:
        """Copy every tensor of ``other`` into this one's memory, where it has some."""
        theirs = {(kind, name): tensor for kind, name, tensor in other.tensors()}
        for kind, name, tensor in self.tensors():
            tensor.copy_(theirs[kind, name].view(tensor.shape))


def save_checkpoint(value: object, path: str | os.PathLike[str]) -> None:
    """Save what ``torch.save`` takes to a file that appears whole or not at all.

    A crash, a kill or a full disk on the way leaves an earlier file as it was.

    Raises:
        OSError: it cannot be written.
    """
    whole = Path(path)
    unfinished = whole.with_name(f".{whole.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(whole)
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Return what ``save_checkpoint`` or ``torch.save`` saved, on the CPU.

    No code of the file is run.

    Raises:
        StateError: the file is cut off, is no checkpoint, or holds more than tensors,
            numbers, strings and containers of them.
        OSError: there is none, or it cannot be read.
    """
    with Path(path).open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on old pickles; what is wrong raises
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if type(error).__name__ == "UnpicklingError":
                found = re.search(r"GLOBAL (\S+)", str(error))
                named = f" ({found[1]})" if found else ""
                reason = (
                    f"holds more than tensors and numbers{named}, or is no checkpoint, "
                    "and loading it could run foreign code; save state_dict()s"
                )
            else:
                size = Path(path).stat().st_size
                reason = (
                    f"of {size} bytes is cut off, damaged or no checkpoint; take an "
                    "earlier one"
                )
            raise StateError(f"{path} {reason}") from error


def save(hook: str, plan: Plan, rank: int, parts: Parts) -> dict[str, Any]:
    """Return copies of ``parts`` as this rank's state."""
    return {
        "format": FORMAT,
        "hook": hook,
        "rank": rank,
        "world": plan.world,
        "plan": plan.fingerprint,
        "numel": dict(plan.numel),
        "starts": {s.name: s.start for s in _slices(plan, rank)},
        "counters": dict(parts.counters),
        "sent": {name: t.clone() for name, t in parts.sent.items()},
        "shares": {
            kind: {name: t.reshape(-1).clone() for name, t in named.items()}
            for kind, named in parts.shares.items()
        },
        "whole": {
            kind: {name: t.clone() for name, t in named.items()}
            for kind, named in parts.whole.items()
        },
        "scalars": dict(parts.scalars),
    }


def merge(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one state, for any number of ranks, of the states of all ranks of a run.

    Args:
        states: what ``state_dict()`` returned on each rank at the same step, in any
            order.

    Raises:
        StateError: one is missing, or they are not of one run and step.
    """
    if not states:
        raise StateError("there are no states to merge")
    for state in states:
        _check_keys(state)
    first = states[0]
    if first["rank"] is None:
        raise StateError("this state was merged already; load it as it is")
    world = first["world"]
    by_rank = {state["rank"]: state for state in states}
    if len(states) != world or set(by_rank) != set(range(world)):
        raise StateError(
            f"{len(states)} states of the ranks {sorted(by_rank)} were given, "
            f"but the run had {world} ranks; give each rank's state once"
        )
    for state in states:
        for key in ("hook", "plan", "numel", "world", "counters"):
            if _shared(state[key]) != _shared(first[key]):
                raise StateError(
                    f"rank {state['rank']} has {key} {state[key]!r}, rank "
                    f"{first['rank']} {first[key]!r}; are they of the same step?"
                )
    ordered = [by_rank[rank] for rank in range(world)]
    senders = first["counters"].get("senders", world)
    kinds = dict.fromkeys(kind for state in ordered for kind in state["shares"])
    scalars: dict[str, Any] = {}
    for state in reversed(ordered):
        scalars.update(state["scalars"])
    return {
        **ordered[0],
        **dict.fromkeys(("rank", "world", "plan")),
        "starts": {},
        "sent": {
            name: (sum(s["sent"][name].double() for s in ordered) / senders).float()
            for name in ordered[0]["sent"]
        },
        "shares": {kind: _joined(ordered, kind, first["numel"]) for kind in kinds},
        "scalars": scalars,
    }


def of_rank(
    states: Sequence[Mapping[str, Any]], rank: int, world: int
) -> Mapping[str, Any]:
    """Return this rank's of the states of all ranks, or what it shares of them.

    Raises:
        StateError: the run had another number of ranks, and they cannot be merged.
    """
    return states[rank] if len(states) == world else merge(states)


def _shared(value: Any) -> Any:
    """Return what all ranks must have alike: counters without a budget's."""
    if not isinstance(value, dict):
        return value
    return {key: v for key, v in value.items() if not key.startswith("budget_")}


def _joined(
    states: Sequence[Mapping[str, Any]], kind: str, numel: Mapping[str, int]
) -> Named:
    """Return whole parameters from every rank's shares; 0 where no rank has any."""
    whole: Named = {}
    for state in states:
        for name, share in state["shares"].get(kind, {}).items():
            start = state["starts"][name]
            if name not in whole:
                whole[name] = torch.zeros(numel[name], dtype=share.dtype)
            whole[name][start : start + share.numel()] = share.reshape(-1)
    return whole


def load(
    state: Mapping[str, Any], hook: str, plan: Plan, rank: int, mine: Parts
) -> Parts:
    """Return what a state says for this rank; changes nothing.

    Args:
        state: of the same rank, world and plan, or merged.
        hook: that reads it.
        plan: of this run.
        rank: this one.
        mine: what it must have, each of its shape; shares whose kind begins with
            ``OPTIONAL`` come on top.

    Raises:
        StateError: it does not fit.
    """
    _check_keys(state)
    merged = state["rank"] is None
    expected: dict[str, object] = {"hook": hook}
    if not merged:
        expected |= {"rank": rank, "world": plan.world, "plan": plan.fingerprint}
    for key, value in expected.items():
        if state[key] != value:
            raise StateError(
                f"the state was saved with {key} {state[key]!r}, this run has "
                f"{value!r}; load each rank's own state into the same model, Config "
                "and number of ranks, or lc3.merge_states of all ranks' into any"
            )
    if state["numel"] != plan.numel:
        raise StateError(
            f"the state is of a model with {_difference(state['numel'], plan.numel)}"
        )
    shares = state["shares"]
    if merged:
        slices = {s.name: s for s in _slices(plan, rank)}
        shares = {
            kind: {
                name: whole[slices[name].start : slices[name].stop]
                for name, whole in named.items()
                if name in slices
            }
            for kind, named in shares.items()
        }
    found = Parts(
        dict(state["counters"]),
        dict(state["sent"]),
        dict(shares),
        dict(state["whole"]),
        dict(state["scalars"]),
    )
    _check(found, mine)
    return found


def _check(found: Parts, mine: Parts) -> None:
    if set(found.counters) != set(mine.counters):
        raise StateError(
            f"the state counts {sorted(found.counters)}, this run "
            f"{sorted(mine.counters)}; was it saved with the same arguments of attach?"
        )
    for side, theirs, ours in (
        ("shares", found.shares, mine.shares),
        ("whole", found.whole, mine.whole),
        ("sent", {"sent": found.sent}, {"sent": mine.sent}),
    ):
        needed = {kind for kind in ours if not kind.startswith(OPTIONAL)}
        if needed != {kind for kind in theirs if not kind.startswith(OPTIONAL)}:
            raise StateError(
                f"the state has {side} {sorted(theirs)}, this run {sorted(needed)}; "
                "was it saved with the same arguments of attach?"
            )
        for kind in needed:
            _check_tensors(kind, theirs[kind], ours[kind])


def _check_tensors(kind: str, theirs: Named, ours: Named) -> None:
    if different := sorted(set(theirs) ^ set(ours)):
        raise StateError(
            f"{kind} of {different[0]!r} is only on one side; same model and Config?"
        )
    for name, tensor in ours.items():
        value = theirs[name]
        if value.numel() != tensor.numel() or value.dtype != tensor.dtype:
            raise StateError(
                f"{kind} of {name!r} is {value.dtype}[{value.numel()}], expected "
                f"{tensor.dtype}[{tensor.numel()}]"
            )
        if not value.isfinite().all():
            raise StateError(f"{kind} of {name!r} holds inf or nan; discard it")


def _check_keys(state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or "format" not in state or "hook" not in state:
        keys = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise StateError(
            f"a state with the keys {keys} is not what an lc3 state_dict() returned"
        )
    if state["format"] != FORMAT:
        raise StateError(
            f"the state has format {state['format']!r}, this lc3 reads {FORMAT}; "
            "continue with the version of lc3 that saved it"
        )
    if set(state) != _KEYS:
        raise StateError(
            f"the state has {sorted(set(state) ^ _KEYS)} too many or too few; is it "
            "cut off, or changed?"
        )


def _difference(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            return (
                f"{theirs.get(name, 'no')} elements of {name!r}, this run's has "
                f"{ours.get(name, 'none')}"
            )
    return "its parameters in another order"


def _slices(plan: Plan, rank: int) -> Iterator[Slice]:
    """Yield the slices that a rank owns, at most one of a parameter."""
    return plan.slices_of(plan.numel, rank)
