"""A link on which every frame arrives some time after it was sent.

Two TAP interfaces, and a thread that reads frames from each and writes them to the
other when their time has come. As many frames may be on the way as were sent: what
limits the rate is the queue of an interface (``tc tbf``), not this.
"""

import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from contextlib import suppress

_SET_INTERFACE = 0x400454CA  # TUNSETIFF
_TAP, _NO_HEADER = 0x0002, 0x1000  # IFF_TAP, IFF_NO_PI
_LONGEST_FRAME = 1 << 16


class DelayedLink:
    """Two interfaces of the caller's network namespace, joined by a delay.

    They may be moved to other namespaces afterwards, and are gone when this is closed,
    or the process ends.

    Args:
        names: of the interfaces to be made.
        delay_s: seconds that a frame is on the way.

    Raises:
        OSError: they cannot be made: no /dev/net/tun, or not root.
    """

    def __init__(self, names: tuple[str, str], delay_s: float) -> None:
        self._ends = [_tap(name) for name in names]
        self._delay_s = delay_s
        self._closed, self._closing = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        waiting: list[deque[tuple[float, bytes]]] = [deque(), deque()]  # for each end
        while True:
            now = time.monotonic()
            for end, frames in zip(self._ends, waiting, strict=True):
                while frames and frames[0][0] <= now:
                    _write(end, frames.popleft()[1])
            due = [frames[0][0] - now for frames in waiting if frames]
            ready = select.select(
                [*self._ends, self._closed], [], [], min(due, default=None)
            )[0]
            if self._closed in ready:
                return
            arrives = time.monotonic() + self._delay_s
            for here, there in ((0, 1), (1, 0)):
                if self._ends[here] in ready:
                    read = _read_all(self._ends[here])
                    waiting[there].extend((arrives, frame) for frame in read)

    def close(self) -> None:
        """Remove the interfaces; frames on the way are lost."""
        os.write(self._closing, b"\0")
        self._thread.join()
        for descriptor in (*self._ends, self._closed, self._closing):
            os.close(descriptor)


def _tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        wanted = struct.pack("16sH", name.encode(), _TAP | _NO_HEADER)
        fcntl.ioctl(descriptor, _SET_INTERFACE, wanted)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _read_all(end: int) -> list[bytes]:
    frames = []
    while True:
        try:
            frames.append(os.read(end, _LONGEST_FRAME))
        except OSError:  # no more, or the interface is down
            return frames


def _write(end: int, frame: bytes) -> None:
    with suppress(OSError):  # down: a frame that nobody gets, as on any link
        os.write(end, frame)
