"""One worker thread that runs jobs in the order they came.

Collectives must be issued in the same order on every rank. DDP hands buckets to its
hook in the same order everywhere, and this lane keeps that order; callbacks of futures
do not (on gloo they deadlock or mix up buckets, pytorch/pytorch#48478).
"""

import queue
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lc3.errors import AttachError

Job = Callable[[], Tensor]
_Item = tuple[Job, torch.futures.Future[Tensor]]


class Lane:
    """Runs submitted jobs one after the other on a thread of its own.

    The thread is a daemon and ends with the lane, so neither a forgotten ``close`` nor
    a peer that never answers keeps the interpreter from exiting.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_work, args=(self._jobs,), name=name, daemon=True
        )
        self._thread.start()
        self._stop = weakref.finalize(self, self._jobs.put, None)

    def submit(self, job: Job) -> torch.futures.Future[Tensor]:
        """Queue ``job``; the future gets its tensor, or its exception.

        Raises:
            AttachError: the lane is closed.
        """
        if not self._stop.alive:
            raise AttachError(
                "this model's lc3 state is closed; wrap the module in a new "
                "DistributedDataParallel and attach to that"
            )
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._jobs.put((job, future))
        return future

    def close(self, timeout_s: float) -> bool:
        """Let queued jobs finish and end the thread; return whether it ended in time.

        False, too, if it was closed before.
        """
        if not self._stop.alive:
            return False
        self._stop()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _work(jobs: "queue.SimpleQueue[_Item | None]") -> None:
    while (item := jobs.get()) is not None:
        job, future = item
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001  # it must reach backward()
            future.set_exception(error)  # type: ignore[arg-type]
        else:
            future.set_result(result)
        del item, job, future  # no reference to a bucket while waiting for the next
