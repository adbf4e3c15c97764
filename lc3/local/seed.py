"""A model for whoever joins: served beside training, lossless, one tensor at a time.

The rank that serves goes on training meanwhile: it keeps a copy of what is asked for,
and codes tensors (``lc3.ship``'s planes) while those before them are on their way.
"""

import json
import logging
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lc3.errors import ExchangeError, FormatError
from lc3.ship import planes
from lc3.ship.format import DTYPES

log = logging.getLogger(__name__)

FACTS = 0
_KEY = struct.Struct("<Q")
_SIZE = struct.Struct("<Q")
_KEEP_S = 600.0  # that an offer is there
_MOST_OFFERS = 2
_MOST_CONNECTIONS = 64  # at a time; more are closed
_KEY_S = 5.0  # to say which offer
_MOST_HEAD = 1 << 26
_DTYPES = {str(dtype): dtype for dtype in DTYPES}
Held = tuple[Mapping[str, Any], Mapping[str, Tensor]]


class Seed:
    """Serves what this rank offers, on threads of its own.

    Nobody but ranks that met this one knows the key of an offer. What is sent is not
    encrypted.

    Args:
        host: name or address under which others reach this machine.
        bind: address to listen on; ``""``: all of the machine's.
        timeout_s: how long a receiver may be silent.
        facts: what anybody may know, under the key ``FACTS``.

    Attributes:
        address: ``host:port``, for ``fetch``.
    """

    def __init__(
        self, host: str, bind: str, timeout_s: float, facts: Mapping[str, Any]
    ) -> None:
        warm_up()
        self._facts = facts
        self._timeout_s = timeout_s
        self._offers: dict[int, tuple[float, Held]] = {}
        self._past: set[int] = set()  # keys of offers that are no longer there
        self._awaited: dict[int, int] = {}  # those who have not fetched, of an offer
        self._changed = threading.Condition()
        seed = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(min(timeout_s, _KEY_S))
                with suppress(OSError, FormatError):
                    key = _KEY.unpack(_exactly(self.request, _KEY.size))[0]
                    self.request.settimeout(timeout_s)
                    if (held := seed.held(key)) is not None:
                        self.give(key, held)

            def give(self, key: int, held: Held) -> None:
                try:
                    for part in _parts_of(held):
                        self.request.sendall(part)
                    self.request.recv(1)  # the other side closes when it has all
                finally:
                    seed.served(key)

        connections = threading.Semaphore(_MOST_CONNECTIONS)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            allow_reuse_address = True
            request_queue_size = _MOST_CONNECTIONS
            address_family = socket.AF_INET6 if ":" in bind else socket.AF_INET

            def verify_request(self, *_: Any) -> bool:
                return connections.acquire(blocking=False)

            def process_request_thread(self, *given: Any) -> None:
                try:
                    super().process_request_thread(*given)
                finally:
                    connections.release()

        self._server = Server((bind, 0), Handler)
        self.address = f"{host}:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, name="lc3-seed", daemon=True
        ).start()

    def offer(
        self,
        key: int,
        head: Mapping[str, Any],
        held: dict[str, Tensor],
        takers: int = 0,
    ) -> None:
        """Serve something from now on, for some minutes.

        Args:
            key: who knows it may fetch.
            head: JSON's numbers, strings, lists and mappings of them.
            held: tensors by name, on the CPU, that nobody changes any more.
            takers: how many will fetch it, for ``wait``.
        """
        now = time.monotonic()
        with self._changed:
            kept = [
                k for k, (since, _) in self._offers.items() if now - since < _KEEP_S
            ]
            recent = kept[-_MOST_OFFERS + 1 :]
            self._past |= self._offers.keys() - recent
            self._offers = {k: self._offers[k] for k in recent}
            self._awaited = {k: self._awaited[k] for k in recent}
            self._offers[key] = now, (head, held)
            self._awaited[key] = takers
            self._changed.notify_all()

    def held(self, key: int) -> Held | None:
        """Return an offer; wait for it, since who asks may be earlier."""
        if key == FACTS:
            return self._facts, {}
        with self._changed:
            self._changed.wait_for(
                lambda: key in self._offers or key in self._past, self._timeout_s
            )
            return self._offers[key][1] if key in self._offers else None

    def served(self, key: int) -> None:
        """Note that one of the takers has fetched an offer, or has gone."""
        with self._changed:
            if self._awaited.get(key, 0) > 0:
                self._awaited[key] -= 1
                if not self._awaited[key]:  # its memory is needed no longer
                    self._offers.pop(key, None)
                    self._past.add(key)
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when every offer is fetched, or was there for ``timeout_s``."""
        with self._changed:
            for key, (since, _) in list(self._offers.items()):
                left = since + self._timeout_s - time.monotonic()
                self._changed.wait_for(partial(self._is_fetched, key), max(0.0, left))

    def _is_fetched(self, key: int) -> bool:
        return self._awaited.get(key, 0) <= 0

    def close(self) -> None:
        """Listen no longer, when those who are to fetch something have it."""
        self.wait()
        self._server.shutdown()
        self._server.server_close()
        self._offers.clear()


def fetch(address: str, key: int, timeout_s: float) -> Held:
    """Return what a rank offers under a key: its head, and tensors by name.

    Args:
        address: of its ``Seed``.
        key: of the offer.
        timeout_s: how long it may be silent.

    Raises:
        ExchangeError: it cannot be reached, went silent, or has no such offer.
        FormatError: what came is damaged.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout_s) as connection:
            connection.sendall(_KEY.pack(key))
            return _read(connection)
    except (OSError, UnicodeError) as error:  # the latter of no name of a host
        raise ExchangeError(
            f"the model could not be fetched from {address} ({error}); can this "
            "machine reach that address? attach(hostname=...) there says another"
        ) from error


def _parts_of(held: Held) -> Iterator[bytes]:
    """Yield what is sent: sizes, head, a section for each tensor, and a checksum."""
    head, tensors = held
    listed = [[n, str(t.dtype), list(t.shape)] for n, t in tensors.items()]
    text = json.dumps({"head": head, "tensors": listed}).encode()
    crc = 0
    with ThreadPoolExecutor(1, "lc3-codes") as coding:
        sections = coding.map(_encoded, tensors.values())
        for data in chain([text], sections):
            crc = zlib.crc32(data, crc)
            yield _SIZE.pack(len(data)) + data
    yield _SIZE.pack(crc)


def _encoded(tensor: Tensor) -> bytes:
    return planes.encode(tensor, None)


def warm_up() -> None:
    """Compile what codes and decodes float32, once."""
    some = torch.zeros(1)
    planes.decode(_encoded(some), some.dtype, (1,), None)


def _read(connection: socket.socket) -> Held:
    crc = 0

    def section(most: int) -> bytes:
        nonlocal crc
        size = _SIZE.unpack(_exactly(connection, _SIZE.size))[0]
        if size > most:
            raise FormatError(f"a section of {size} bytes, {most} are the most")
        data = _exactly(connection, size)
        crc = zlib.crc32(data, crc)
        return data

    try:
        said = json.loads(section(_MOST_HEAD))
        head = dict(said["head"])
        coming: dict[str, Future[Tensor]] = {}
        with ThreadPoolExecutor(1, "lc3-decodes") as decoding:
            for name, dtype, shape in said["tensors"]:
                whole = torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
                data = section(whole.nbytes + whole.nbytes // 16 + 1024)
                given = data, whole.dtype, tuple(shape), None
                coming[str(name)] = decoding.submit(planes.decode, *given)
            tensors = {name: future.result() for name, future in coming.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FormatError(f"what came is no model ({error})") from error
    if _SIZE.unpack(_exactly(connection, _SIZE.size))[0] != crc:
        raise FormatError("what came of a model is damaged: its checksum is another")
    return head, tensors


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        data = connection.recv(min(size, 1 << 20))
        if not data:
            raise ConnectionResetError("the other side has closed the connection")
        parts.append(data)
        size -= len(data)
    return b"".join(parts)
