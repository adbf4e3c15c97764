"""Before the first step: all ranks show that they are about to do the same.

Whatever is wrong on one rank is an error on every rank, at once, instead of a hang.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lc3.config import Settings
from lc3.errors import FormatError, Lc3Error, PeerError, PlanMismatch
from lc3.transport.protocol import Transport
from lc3.transport.workers import cores

T = TypeVar("T")


class Gathers(Protocol):
    """What a handshake needs of a ``Transport``."""

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """See ``Transport.all_gather``."""
        ...


_BOOT_ID = Path(
    "/proc/sys/kernel/random/boot_id"
)  # one for all containers of a machine


def agree(
    transport: Gathers,
    version: str,
    config: Settings,
    shapes: Sequence[tuple[str, Sequence[int]]],
    build: Callable[[], T],
    facts: Mapping[str, object] | None = None,
) -> T:
    """Return ``build()``, if it works and all ranks have the same configuration.

    Collective: one exchange of 32 bytes, and one of the details if ranks differ.

    Args:
        transport: between the ranks.
        version: version of lc3.
        config: config of this rank.
        shapes: the ordered (name, shape) of this rank's trainable parameters.
        build: the function to call; may raise an ``Lc3Error``.
        facts: other values that all ranks must share, by name.

    Raises:
        Exception: what ``build`` raised on this rank.
        PeerError: what it raised on another.
        FormatError: another rank has sent something else than lc3 sends here.
        PlanMismatch: ranks differ; the same sentence on every rank.
    """
    built: T | None = None
    failure: Exception | None = None
    try:
        built = build()
    except Exception as error:  # noqa: BLE001  # raised below, when it is told
        failure = error
    said = None if failure is None else _said_of(failure)
    mine = {"error": said, **alike(version, config, shapes, facts or {})}
    text = json.dumps(mine).encode()
    digests = gather_bytes(transport, hashlib.sha256(text).digest())
    if len(set(digests)) > 1:
        everybody = [
            _read(r, said) for r, said in enumerate(gather_bytes(transport, text))
        ]
        if failure is None:
            _explain(everybody)
    if failure is not None:
        raise failure
    return built  # type: ignore[return-value]  # build() succeeded


def alike(
    version: str,
    config: Settings,
    shapes: Sequence[tuple[str, Sequence[int]]],
    facts: Mapping[str, object],
) -> dict[str, object]:
    """Return by name what must be the same on every rank; see ``agree``."""
    knobs = dataclasses.asdict(config)
    for own in ("threads", "log_every"):  # each rank's own affair
        del knobs[own]
    return {
        "lc3 version": version,
        **{f"Config.{k}": v for k, v in knobs.items()},
        **facts,
        **{f"parameter {name}": list(shape) for name, shape in shapes},
    }


def refuse(transport: Transport, version: str, error: Exception) -> None:
    """Take part in a handshake with an error from before it; collective.

    The others get it as a ``PeerError``.
    """

    def build() -> None:
        raise error

    threads_for(transport, Settings())
    with suppress(type(error)):
        agree(transport, version, Settings(), [], build)


def threads_for(transport: Transport, config: Settings) -> int:
    """Return how many threads this rank encodes with; collective.

    Raises:
        ExchangeError: the transport failed.
    """
    found = machines(transport)
    if config.threads is not None:
        return config.threads
    return max(1, cores() // found.count(found[transport.rank]))


def machines(transport: Transport) -> list[bytes]:
    """Return what stands for the machine of each rank; collective."""
    machine = _BOOT_ID.read_text() if _BOOT_ID.exists() else platform.node()
    return gather_bytes(transport, machine.encode())


def gather_bytes(transport: Gathers, data: bytes) -> list[bytes]:
    """Return what every rank has to say; collective."""
    message = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return [bytes(said.numpy()) for said in transport.all_gather(message)]


def _said_of(error: Exception) -> str:
    return (
        str(error)
        if isinstance(error, Lc3Error)
        else f"{type(error).__name__}: {error}"
    )


def _read(rank: int, said: bytes) -> dict[str, object]:
    """Return what a rank has said of itself."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "error" not in found:
        raise FormatError(
            f"rank {rank} sent {len(said)} bytes that are no handshake of lc3; does it "
            "run lc3, of the same version, in the same process group?"
        )
    return found


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
