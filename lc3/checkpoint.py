"""What a rank saves, and how the states of W ranks go on with any number of ranks.

A hook describes what it keeps as ``Parts``, views of its own memory. ``save`` makes a
state of this rank from them: plain tensors, strings and numbers, for ``torch.save`` and
``torch.load(weights_only=True)``. Loaded by the same rank of an equal run it continues
bit for bit. ``merge`` makes one state of the states of all ranks, which any number of
ranks can load: masters and optimizer state stay exact, and what was not sent yet is
kept as the mean over ranks, so that its sum is the same up to one division.
"""

import copy
import io
import math
import os
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lc3.errors import StateError
from lc3.files import whole_file
from lc3.plan import Plan, Slice

FORMAT = 3
OPTIONAL = "optimizer."  # slices that a fresh run does not have yet begin like this
Named = dict[str, Tensor]
_KEYS = {
    *("format", "hook", "rank", "world", "plan", "numel", "counters", "sent"),
    *("starts", "slices", "whole", "scalars", "checksum"),
}


UNSENT = "unsent_steps"  # a counter that each rank has for itself
_COUNTS = {"step", "steps", "exchanges", "scale", "senders", UNSENT}


@dataclass
class Parts:
    """What a hook keeps.

    Attributes:
        counters: numbers that are the same on every rank.
        sent: this rank's worker-side residuals, float32[numel] by coded parameter.
        slices: by kind, then by parameter: one tensor of as many elements as the slice
            that this rank owns.
        whole: by kind, then by parameter: one tensor, the same on every rank.
        scalars: the optimizer's, by parameter: numbers and tensors of one element, and
            under ``""`` its parameter groups.
    """

    counters: dict[str, int | float]
    sent: Named
    slices: dict[str, Named] = field(default_factory=dict)
    whole: dict[str, Named] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (kind, parameter, tensor) of everything with a fixed size."""
        for kind, named in (("sent", self.sent), *self.slices.items()):
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
        StateError: ``load_checkpoint`` would refuse it; nothing is written.
        OSError: it cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = mkdtemp()
        >>> save_checkpoint({"step": 3}, f"{folder}/a.pt")
        >>> load_checkpoint(f"{folder}/a.pt")
        {'step': 3}
    """
    with whole_file(path) as unfinished:
        try:
            torch.save(value, unfinished.file)
        except RuntimeError as error:
            raise OSError(
                f"{path} cannot be written ({error}); is the disk full?"
            ) from error
        unfinished.file.flush()
        try:
            torch.load(unfinished.path, map_location="meta", weights_only=True)
        except Exception as error:
            raise StateError(
                f"{path} would hold more than tensors, numbers, strings and containers "
                f"of them{_named(error)}, which load_checkpoint refuses; save numbers "
                "as float(x), settings as a dict, and state_dict()s"
            ) from error


def _named(error: Exception) -> str:
    """Return what a file holds that is refused, in brackets, if it is said."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f" ({found[1]})" if found else ""


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Return what ``save_checkpoint`` or ``torch.save`` saved, on the CPU.

    No code of the file is run.

    Raises:
        StateError: the file is cut off, is no checkpoint, or holds more than tensors,
            numbers, strings and containers of them.
        OSError: there is none, or it cannot be read.

    Example:
        >>> load_checkpoint(__file__)
        Traceback (most recent call last):
        ...
        lc3.errors.StateError: ...
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise StateError(f"{path} is no regular file")
    with Path(path).open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on old pickles; what is wrong raises
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if type(error).__name__ == "UnpicklingError":
                reason = (
                    f"holds more than tensors and numbers{_named(error)}, or is no "
                    "checkpoint, and loading it could run foreign code; save "
                    "state_dict()s"
                )
            else:
                size = Path(path).stat().st_size
                reason = (
                    f"of {size} bytes is cut off, damaged or no checkpoint; take an "
                    "earlier one"
                )
            raise StateError(f"{path} {reason}") from error


def to_bytes(state: Mapping[str, Any]) -> Tensor:
    """Return a rank's state as uint8[*], for ``from_bytes``."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def from_bytes(data: Tensor, sender: str) -> dict[str, Any]:
    """Return the state that a peer has sent, in no more memory than it has sent bytes.

    Args:
        data: uint8[*], of ``to_bytes``.
        sender: rank to name in errors.

    Raises:
        StateError: it is no state, is compressed, or its tensors are larger than it.
    """
    file = io.BytesIO(data.numpy().tobytes())
    try:
        with zipfile.ZipFile(file) as parts:
            stored = {one.compress_type for one in parts.infolist()}
            size = sum(one.file_size for one in parts.infolist())
        if stored != {zipfile.ZIP_STORED} or size > data.numel():
            raise ValueError("compressed")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or _nbytes(state) > data.numel():
            raise ValueError("tensors of more elements than bytes")
    except Exception as error:
        raise StateError(
            f"{sender} sent {data.numel()} bytes that are no state ({error}); does it "
            "run the same version of lc3?"
        ) from error
    return state


def _nbytes(value: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


def save(hook: str, plan: Plan, rank: int, parts: Parts) -> dict[str, Any]:
    """Return copies of ``parts`` as this rank's state."""
    return with_checksum(
        {
            "format": FORMAT,
            "hook": hook,
            "rank": rank,
            "world": plan.world,
            "plan": plan.fingerprint,
            "numel": dict(plan.numel),
            "starts": {s.name: s.start for s in _slices(plan, rank)},
            "counters": dict(parts.counters),
            "sent": {name: t.clone() for name, t in parts.sent.items()},
            "slices": {
                kind: {name: t.reshape(-1).clone() for name, t in named.items()}
                for kind, named in parts.slices.items()
            },
            "whole": {
                kind: {name: t.clone() for name, t in named.items()}
                for kind, named in parts.whole.items()
            },
            "scalars": copy.deepcopy(parts.scalars),
        }
    )


class Stateful(Protocol):
    """What has a state to save: every lc3 state."""

    def state_dict(self) -> dict[str, Any]:
        """Return it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from it."""


class PerRank:
    """A state for ``torch.distributed.checkpoint``, which keeps one value of each key.

    ``dcp.save({"model": model, "lc3": lc3.PerRank(state)}, checkpoint_id=path)``, and
    ``dcp.load`` with as many ranks.

    Args:
        state: state of this rank.

    Example:
        >>> state = lc3.hooks.local_sgd.attach(model, optimizer)
        >>> list(PerRank(state).state_dict())
        ['rank 0 of 1']
        >>> state.close()
    """

    def __init__(self, state: Stateful) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state under a key of its own."""
        mine = self._state.state_dict()
        return {_key_of(mine): mine}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned.

        Raises:
            StateError: this rank's is not there, or does not fit; nothing was changed.
        """
        key = _key_of(self._state.state_dict())
        if key not in state:
            raise StateError(
                f"there is no state of {key!r}, only of {sorted(state)}; load with as "
                "many ranks as have saved it"
            )
        self._state.load_state_dict(state[key])


def _key_of(state: Mapping[str, Any]) -> str:
    """Return a name that no other rank's state has.

    The rank in the job: where sites exchange, two ranks of a site are the same one
    among those that hold their shards.
    """
    rank, world = state["rank"], state["world"]
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    return f"rank {rank} of {world}"


def merge(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one state, for any number of ranks, of the states of all ranks of a run.

    Args:
        states: what ``state_dict()`` returned on each rank at the same step, in any
            order.

    Raises:
        StateError: one is missing, or they are not of one run and step.

    Example:
        >>> merge([])
        Traceback (most recent call last):
        ...
        lc3.errors.StateError: there are no states to merge
    """
    if not states:
        raise StateError("there are no states to merge")
    if isinstance(states, Mapping) or not isinstance(states, Sequence):
        raise StateError(
            f"the states of all ranks have to be a list, not a {type(states).__name__}"
        )
    for state in states:
        _check_state(state)
    first = states[0]
    if any(state["rank"] is None for state in states):
        raise StateError("this state was merged already; load it as it is")
    world = first["world"]
    hooks = dict.fromkeys(state["hook"] for state in states)
    if len(hooks) > 1:
        raise StateError(
            f"these are states of {' and of '.join(hooks)}; merge those of one form, "
            "and of sites those of one place in every site"
        )
    by_rank = {state["rank"]: state for state in states}
    if len(states) != world or set(by_rank) != set(range(world)):
        raise StateError(
            f"{len(states)} states of the ranks {sorted(by_rank)} were given, "
            f"but the run had {world} ranks; give each rank's state once"
        )
    for state in states:
        for key in ("plan", "numel", "world", "counters"):
            if _shared(state[key]) != _shared(first[key]):
                raise StateError(
                    f"rank {state['rank']} has {key} {state[key]!r}, rank "
                    f"{first['rank']} {first[key]!r}; are they of the same step?"
                )
    ordered = [by_rank[rank] for rank in range(world)]
    senders = first["counters"].get("senders", world)
    kinds = dict.fromkeys(kind for state in ordered for kind in state["slices"])
    scalars: dict[str, Any] = {}
    for state in reversed(ordered):
        scalars.update(state["scalars"])
    for kind in ("sent", "slices", "whole"):
        _alike(ordered, kind)
    merged = {
        **ordered[0],
        **dict.fromkeys(("rank", "world", "plan")),
        "starts": {},
        "sent": {
            name: (sum(s["sent"][name].double() for s in ordered) / senders).float()
            for name in ordered[0]["sent"]
        },
        "slices": {kind: _joined(ordered, kind, first["numel"]) for kind in kinds},
        "scalars": scalars,
    }
    return with_checksum(merged)


def of_rank(
    states: Sequence[Mapping[str, Any]], rank: int, world: int
) -> Mapping[str, Any]:
    """Return this rank's of the states of all ranks, or what it shares of them.

    Raises:
        StateError: the run had another number of ranks, and they cannot be merged.
    """
    if not isinstance(states, Sequence) or not states:
        raise StateError(
            f"there are no states in {type(states).__name__}, but gather_state() "
            "returns them on rank 0; give every rank that list: torch.distributed."
            "broadcast_object_list, or load_checkpoint from a file that rank 0 saved"
        )
    return states[rank] if len(states) == world else merge(states)


def _shared(value: Any) -> Any:
    """Return what all ranks must have alike: counters without each rank's own."""
    if not isinstance(value, dict):
        return value
    own = ("budget_", UNSENT)
    return {key: v for key, v in value.items() if not key.startswith(own)}


def _joined(
    states: Sequence[Mapping[str, Any]], kind: str, numel: Mapping[str, int]
) -> Named:
    """Return whole parameters from every rank's slices; 0 where no rank has any."""
    whole: Named = {}
    covered: dict[str, int] = {}
    for state in states:
        for name, part in state["slices"].get(kind, {}).items():
            start = state["starts"][name]
            if name not in whole:
                whole[name] = torch.zeros(numel[name], dtype=part.dtype)
            if part.dtype != whole[name].dtype:
                raise StateError(
                    f"{kind} of {name!r} is {part.dtype} on rank {state['rank']} and "
                    f"{whole[name].dtype} on another"
                )
            whole[name][start : start + part.numel()] = part.reshape(-1)
            covered[name] = covered.get(name, 0) + part.numel()
    if not kind.startswith(OPTIONAL):
        for name, count in covered.items():
            if count != numel[name]:
                raise StateError(
                    f"{kind} of {name!r} are there for {count} of {numel[name]} "
                    "elements; a rank's slice is missing"
                )
    return whole


def _alike(states: Sequence[Mapping[str, Any]], kind: str) -> None:
    """Raise ``StateError`` if ranks keep things of different names."""
    for state in states:
        if kind == "slices":
            same = {k for k in state[kind] if not k.startswith(OPTIONAL)} == {
                k for k in states[0][kind] if not k.startswith(OPTIONAL)
            }
        elif kind == "sent":
            same = set(state[kind]) == set(states[0][kind])
        else:
            same = {k: set(v) for k, v in state[kind].items()} == {
                k: set(v) for k, v in states[0][kind].items()
            }
        if not same:
            raise StateError(
                f"rank {state['rank']} keeps {kind} of other names than rank "
                f"{states[0]['rank']}; are they of one run?"
            )


def load(
    state: Mapping[str, Any], hook: str, plan: Plan, rank: int, mine: Parts
) -> Parts:
    """Return what a state says for this rank; changes nothing.

    Args:
        state: state of the same rank, world and plan, or merged.
        hook: name of the hook that reads it.
        plan: plan of this run.
        rank: this one.
        mine: what it must have, each of its shape; slices whose kind begins with
            ``OPTIONAL`` come on top.

    Raises:
        StateError: it does not fit.
    """
    _check_state(state)
    merged = state["rank"] is None
    expected: dict[str, object] = {"hook": hook}
    if not merged:
        expected |= {"rank": rank, "world": plan.world, "plan": plan.fingerprint}
    for key, value in expected.items():
        if state[key] != value:
            raise StateError(
                f"the state was saved with {key} {state[key]!r}, this run has "
                f"{value!r}; load each rank's own state into the same model, Config "
                "and number of ranks, or lc3.merge_states of all ranks' into any; of "
                "sites, of one place in every site"
            )
    if state["numel"] != plan.numel:
        raise StateError(
            f"the state is of a model with {_difference(state['numel'], plan.numel)}"
        )
    owned = state["slices"]
    if merged:
        slices = {s.name: s for s in _slices(plan, rank)}
        for kind, named in owned.items():
            for name, tensor in named.items():
                if tensor.numel() != plan.numel.get(name):
                    raise StateError(
                        f"{kind} of {name!r} has {tensor.numel()} elements, expected "
                        f"{plan.numel.get(name)}"
                    )
        owned = {
            kind: {
                name: whole[slices[name].start : slices[name].stop]
                for name, whole in named.items()
                if name in slices
            }
            for kind, named in owned.items()
        }
    found = Parts(
        dict(state["counters"]),
        dict(state["sent"]),
        dict(owned),
        dict(state["whole"]),
        copy.deepcopy(dict(state["scalars"])),
    )
    _check(found, mine)
    return found


def _check(found: Parts, mine: Parts) -> None:
    if set(found.counters) != set(mine.counters):
        raise StateError(
            f"the state has counters {sorted(found.counters)}, this run needs "
            f"{sorted(mine.counters)}; was it saved with the same arguments of attach?"
        )
    for side, theirs, ours in (
        ("slices", found.slices, mine.slices),
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


def _check_keys(state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or "format" not in state or "hook" not in state:
        keys = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise StateError(
            f"a state with the keys {keys} is not what an lc3 state_dict() returned"
        )
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise StateError(
            f"the state has format {state['format']!r}, this lc3 reads {FORMAT}; "
            "continue with the version of lc3 that saved it"
        )
    if set(state) != _KEYS:
        raise StateError(
            f"missing or unexpected keys: {sorted(map(str, set(state) ^ _KEYS))}; "
            "is the state cut off, or changed?"
        )


_TYPES: dict[str, tuple[type, ...]] = {
    "hook": (str,),
    "rank": (int, type(None)),
    "world": (int, type(None)),
    "plan": (int, type(None)),
    **dict.fromkeys(("numel", "starts", "counters"), (Mapping,)),
    **dict.fromkeys(("sent", "slices", "whole", "scalars"), (Mapping,)),
    "checksum": (int,),
}


def _check_state(state: Any) -> None:
    """Raise ``StateError`` if a state is not what ``save`` or ``merge`` returned."""
    _check_keys(state)
    for key, types in _TYPES.items():
        value = state[key]
        if isinstance(value, bool) or not isinstance(value, types):
            raise StateError(
                f"the state's {key} is a {type(value).__name__}; is it changed?"
            )
    merged = state["rank"] is None
    if not merged and not 0 <= state["rank"] < (state["world"] or 0):
        raise StateError(
            f"the state is of rank {state['rank']} of {state['world']}; is it changed?"
        )
    for key in ("numel", "starts", "counters"):
        for name, value in state[key].items():
            kinds = (int, float) if key == "counters" else (int,)
            number = isinstance(value, kinds) and not isinstance(value, bool)
            least = -math.inf if key == "counters" and name not in _COUNTS else 0
            if not number or not math.isfinite(value) or value < least:
                raise StateError(
                    f"the state's {key} of {name!r} is {value!r}; is it changed?"
                )
    if not state["counters"].get("scale", 1) or not state["counters"].get("senders", 1):
        raise StateError("the state has a scale of 0, or no senders; is it changed?")
    _check_named("sent", state["sent"], state["numel"], whole=True)
    for side in ("slices", "whole"):
        for kind, named in state[side].items():
            if not isinstance(named, Mapping):
                raise StateError(
                    f"the state's {kind} is a {type(named).__name__}; is it changed?"
                )
            _check_named(str(kind), named, state["numel"], whole=False)
    starts, numel = state["starts"], state["numel"]
    for kind, named in () if merged else state["slices"].items():
        for name, tensor in named.items():
            end = int(starts.get(name, numel[name])) + tensor.numel()
            if end > numel[name]:
                raise StateError(
                    f"the share in {kind!r} of {name!r} ends at {end} of {numel[name]}"
                )
    if _checksum(state) != state["checksum"]:
        raise StateError(
            "the state's checksum is wrong: a bit has flipped, or it was changed, or "
            "torch.distributed.checkpoint has mixed several ranks' under one key (give "
            "it lc3.PerRank(state)); take an earlier checkpoint"
        )


def _check_named(
    kind: str, named: Mapping[str, Any], numel: Mapping[str, int], *, whole: bool
) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise StateError(
                f"{kind} of {name!r} is a {type(tensor).__name__}, not a dense tensor"
            )
        if name not in numel:
            raise StateError(f"{kind} of {name!r}, which is no parameter of the state")
        if whole and tensor.numel() != numel[name]:
            raise StateError(
                f"{kind} of {name!r} has {tensor.numel()} elements of {numel[name]}"
            )
        if not tensor.isfinite().all():
            raise StateError(f"{kind} of {name!r} holds inf or nan; discard it")


def with_checksum(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with its checksum."""
    return {**state, "checksum": _checksum(state)}


def _checksum(state: Mapping[str, Any]) -> int:
    """Return CRC-32 of all that a state holds, in the order of its keys."""
    found = 0
    for key in sorted(_KEYS - {"checksum"}):
        found = _crc(state[key], found)
    return found


def _crc(value: Any, found: int) -> int:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found = _crc(value[key], zlib.crc32(str(key).encode(), found))
        return found
    if isinstance(value, list | tuple):
        for one in value:
            found = _crc(one, found)
        return zlib.crc32(str(len(value)).encode(), found)
    if isinstance(value, Tensor):
        flat = value.detach().to_dense().reshape(-1).contiguous().cpu()
        data = flat.view(torch.uint8).numpy() if flat.numel() else b""
        return zlib.crc32(data, found)  # type: ignore[arg-type]  # since 3.12
    return zlib.crc32(repr(value).encode(), found)


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
