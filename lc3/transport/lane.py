"""One worker thread that runs jobs in the order they came, on a stream of its own.

Collectives must be issued in the same order on every rank. DDP hands buckets to its
hook in the same order everywhere, and this lane keeps that order; callbacks of futures
do not (on gloo they deadlock or mix up buckets, pytorch/pytorch#48478).
"""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lc3.errors import AttachError

T = TypeVar("T")
Job = Callable[[], Tensor]
_Item = tuple[Job, torch.futures.Future[Tensor], Any]

_HOST = torch.device("cpu")


class Streams:
    """What an accelerator computes for the lane, beside what it computes for training.

    Args:
        device: an accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.Stream(device)

    def mark(self) -> Any:
        """Return a point behind all that the calling thread has queued so far."""
        return torch.accelerator.current_stream(self._device).record_event()

    @contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        """Queue the block's work beside training, behind ``mark``; wait for its end.

        The host waits, not a stream: what the lane wrote may then be read from any
        stream and thread, and what it read may be freed. Most of a job is the network,
        for which the host waits anyway.
        """
        self._side.wait_event(mark)
        with self._side:
            yield
        self._side.synchronize()


class Lane:
    """Runs submitted jobs one after the other on a thread of its own.

    Each sees on the device what was queued there when it was submitted, and is through
    there when its future is.

    The thread is a daemon and ends with the lane, so neither a forgotten ``close`` nor
    a peer that never answers keeps the interpreter from exiting.

    Args:
        name: name of the thread.
        device: device that jobs work on.
        streams: the device's streams.
    """

    def __init__(
        self, name: str, device: torch.device = _HOST, streams: Any = Streams
    ) -> None:
        self._devices: list[int | str | torch.device] = (
            [] if device == _HOST else [device]
        )
        self._streams = streams(device) if self._devices else None
        self._jobs: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_work, args=(self._jobs, self._streams), name=name, daemon=True
        )
        self._thread.start()
        self._stop = weakref.finalize(self, self._jobs.put, None)

    def submit(self, job: Job) -> torch.futures.Future[Tensor]:
        """Queue ``job``; the future gets its tensor, or its exception.

        Raises:
            AttachError: the lane is closed.
        """
        if not self._stop.alive:
            raise AttachError("this model's lc3 state is closed; attach again")
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=self._devices
        )
        mark = None if self._streams is None else self._streams.mark()
        self._jobs.put((job, future, mark))
        return future

    def call(self, job: Callable[[], T]) -> T:
        """Run ``job`` when all that is queued has ended; return what it returns."""
        found: list[T] = []

        def run() -> Tensor:
            found.append(job())
            return torch.empty(0, dtype=torch.float32)

        self.submit(run).wait()
        return found[0]

    def close(self, timeout_s: float) -> bool:
        """Let queued jobs finish and end the thread; return whether it ended in time.

        False, too, if it was closed before.
        """
        if not self._stop.alive:
            return False
        self._stop()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _work(jobs: "queue.SimpleQueue[_Item | None]", streams: Streams | None) -> None:
    while (item := jobs.get()) is not None:
        job, future, mark = item
        try:
            if streams is None:
                result = job()
            else:
                with streams.after(mark):
                    result = job()
        except BaseException as error:  # noqa: BLE001  # it must reach backward()
            future.set_exception(error)  # type: ignore[arg-type]
        else:
            future.set_result(result)
        del (
            item,
            job,
            future,
            mark,
        )  # no reference to a bucket while waiting for the next
