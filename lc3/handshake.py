"""Before the first step: all ranks show that they are about to do the same.

Whatever is wrong on one rank is an error on every rank, at once, instead of a hang.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lc3.config import Config
from lc3.errors import Lc3Error, PeerError, PlanMismatch
from lc3.exchange import Exchange
from lc3.workers import cores

T = TypeVar("T")

_BOOT_ID = Path(
    "/proc/sys/kernel/random/boot_id"
)  # one for all containers of a machine


def agree(
    exchange: Exchange,
    version: str,
    config: Config,
    shapes: Sequence[tuple[str, Sequence[int]]],
    build: Callable[[], T],
    facts: Mapping[str, object] | None = None,
) -> T:
    """Return ``build()``, if it works and all ranks have the same configuration.

    Collective: one exchange of 32 bytes, and one of the details if ranks differ.

    Args:
        exchange: between the ranks.
        version: of lc3.
        config: of this rank.
        shapes: the ordered (name, shape) of this rank's trainable parameters.
        build: what to do; may raise an ``Lc3Error``.
        facts: what else has to be the same, by name.

    Raises:
        Lc3Error: what ``build`` raised on this rank.
        PeerError: what it raised on another.
        PlanMismatch: ranks differ; the same sentence on every rank.
    """
    built: T | None = None
    failure: Lc3Error | None = None
    try:
        built = build()
    except Lc3Error as error:
        failure = error
    knobs = dataclasses.asdict(config)
    for own in ("threads", "log_every"):  # each rank's own affair
        del knobs[own]
    mine = {
        "error": None if failure is None else str(failure),
        "lc3 version": version,
        **{f"Config.{k}": v for k, v in knobs.items()},
        **(facts or {}),
        **{f"parameter {name}": list(shape) for name, shape in shapes},
    }
    text = json.dumps(mine).encode()
    digests = _gather(exchange, hashlib.sha256(text).digest())
    if len(set(digests)) > 1:
        everybody = [json.loads(said) for said in _gather(exchange, text)]
        if failure is None:
            _explain(everybody)
    if failure is not None:
        raise failure
    return built  # type: ignore[return-value]  # build() succeeded


def threads_for(exchange: Exchange, config: Config) -> int:
    """Return how many threads this rank encodes with; collective.

    Raises:
        ExchangeError: the transport failed.
    """
    machine = _BOOT_ID.read_text() if _BOOT_ID.exists() else platform.node()
    machines = _gather(exchange, machine.encode())
    if config.threads is not None:
        return config.threads
    return max(1, cores() // machines.count(machine.encode()))


def _gather(exchange: Exchange, data: bytes) -> list[bytes]:
    message = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return [bytes(said.numpy()) for said in exchange.all_gather(message)]


def _explain(everybody: Sequence[dict[str, object]]) -> None:
    """Raise the first difference between ranks."""
    for rank, said in enumerate(everybody):
        if said["error"] is not None:
            raise PeerError(rank, str(said["error"]))
    first = everybody[0]
    for rank, said in enumerate(everybody):
        for key in [*first, *said]:
            if first.get(key) != said.get(key):
                raise PlanMismatch(
                    f"ranks differ: {key} is {first.get(key, 'missing')!r} on rank 0 "
                    f"and {said.get(key, 'missing')!r} on rank {rank}; start every "
                    "rank with the same model, Config, arguments and lc3 version"
                )
    raise PlanMismatch(
        "ranks list the same parameters in another order; build the model alike "
        "everywhere"
    )
