"""The session of a model that DDP wraps: its buckets, its hook, its buffers."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lc3 import private
from lc3.config import Settings, check_count
from lc3.errors import AttachError
from lc3.module.buffers import Buffers
from lc3.module.link import (
    Link,
    Run,
    buffers_are_free,
    check_unclaimed,
    fill,
    link_of,
    link_to,
)
from lc3.module.model import named_parameters
from lc3.session.checks import alike_in
from lc3.session.groups import connection
from lc3.session.session import CLOSE_TIMEOUT_S, Session

# Works on a bucket: its flat buffer, its parameters' names, step, number; returns what
# the hook's future must hold.
BucketJob = Callable[[Tensor, list[str], int, int], Tensor]
Native = Callable[
    [dist.GradBucket, list[str], int], torch.futures.Future[Tensor] | None
]


class Wrapped(Session):
    """See ``Session``; gets the buckets of a model until it is closed."""

    _link: Link | None = None
    _compared: tuple[nn.Module, int] | None = None

    def on_bucket(
        self, bucket: dist.GradBucket, job: BucketJob, native: Native | None = None
    ) -> torch.futures.Future[Tensor]:
        """Run ``job`` on the lane for a bucket that DDP hands to its hook.

        Its error ends ``backward()`` as what it is, and the future.

        Args:
            bucket: the bucket that the hook was given.
            job: see ``BucketJob``.
            native: starts an exchange that needs no lane, or returns ``None``; the same
                on every rank.
        """
        buffer = bucket.buffer()
        names = [self._name_of(parameter) for parameter in bucket.parameters()]
        step, index = self.next_bucket(names)
        if self._compared is not None and index == 0 and step:
            module, every = self._compared
            if step % every == 0:
                self._wait_at_end(
                    self.lane.submit(self._comparison(alike_in(module), step))
                )
        if native is not None and (started := native(bucket, names, step)) is not None:
            return started
        future = self.lane.submit(lambda: job(buffer, names, step, index))
        self._wait_at_end(future)
        return future

    def _name_of(self, parameter: Tensor) -> str:
        name = self.names.get(parameter)
        if name is None:
            raise AttachError(
                f"a bucket holds a parameter of shape {list(parameter.shape)} that was "
                "frozen when lc3 was attached; set requires_grad before wrapping the "
                "model"
            )
        return name

    def _wait_at_end(self, future: torch.futures.Future[Tensor]) -> None:
        # DDP would cast an exception to a tensor. Waiting at the end of backward,
        # before DDP does, raises it. Outside of backward (Join) nobody but DDP can.
        with suppress(RuntimeError):
            private.at_end_of_backward(partial(self.wait, future))

    def link_to(
        self,
        model: DistributedDataParallel,
        job: BucketJob,
        native: Native | None = None,
        check_every: int | None = None,
    ) -> None:
        """Let ``on_bucket`` have the buckets of ``model`` until this is closed.

        Args:
            model: the module that DDP wraps.
            job: see ``on_bucket``.
            native: see ``on_bucket``.
            check_every: steps between two comparisons of all replicas; ``None``: none.

        Raises:
            ConfigError: ``check_every`` is less than 1, or no integer.
            PlanMismatch: it differs between ranks.
        """
        said = check_every if isinstance(check_every, int | None) else repr(check_every)
        self.agree_on({"check_every": said})
        if check_every is not None:
            check_count("check_every", check_every, 1)
            self._compared = model.module, check_every
        run = self._run(job, native)
        self._link = link_to(model, run, self._buffers_of(model))

    def adopt(
        self,
        model: DistributedDataParallel,
        job: BucketJob,
        native: Native | None = None,
    ) -> Link:
        """Return a link for a model whose hook the user has registered.

        Args:
            model: the module that DDP wraps.
            job: see ``on_bucket``.
            native: see ``on_bucket``.
        """
        self._link = Link(model.process_group)
        fill(self._link, model, self._run(job, native), self._buffers_of(model))
        return self._link

    def _run(self, job: BucketJob, native: Native | None) -> Run:
        return partial(self.on_bucket, job=job, native=native)

    def _buffers_of(self, model: DistributedDataParallel) -> Buffers | None:
        if self.engine.transport.world == 1 or not buffers_are_free(model):
            return None
        return Buffers(model, self.any_rank, self.count_buffers)

    def count_buffers(self, sent_bytes: int) -> None:
        """Count what DDP sends of buffers."""
        self.meter.add(sent_bytes, 0.0, 1)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """See ``Session.close``; the model exchanges its gradients as without lc3."""
        if self._link is not None:
            self._link.close()
            self._link = None
        super().close(timeout_s)


def session_for(
    model: DistributedDataParallel,
    config: Settings,
    group: dist.ProcessGroup | None,
    mesh: DeviceMesh | int | None = None,
    facts: Mapping[str, object] | None = None,
    extras: Mapping[str, int] = MappingProxyType({}),
) -> Wrapped:
    """Return the session of a model that DDP wraps; see ``Session``.

    Raises:
        AttachError: it is not wrapped, has a hook already, or gives hooks no buckets.
    """
    if not isinstance(model, DistributedDataParallel):
        raise AttachError(
            f"attach needs a DistributedDataParallel, got {type(model).__name__}; wrap "
            "the module first: model = DistributedDataParallel(model); for one that "
            "fully_shard has sharded there are hooks.fsdp2 and hooks.local_sgd"
        )
    if private.gives_no_buckets(model):
        raise AttachError(
            'with torch._dynamo.config.optimize_ddp = "python_reducer" DDP gives hooks '
            'no buckets; set it to "ddp_optimizer" before the model is wrapped'
        )
    link_of(model)
    check_unclaimed(model.module)
    trained = [
        (name, parameter)
        for name, parameter in named_parameters(model.module)
        if parameter.requires_grad and name not in model.parameters_to_ignore
    ]
    transport, leave = connection(model.process_group, group)
    ranks = dist.get_process_group_ranks(group or model.process_group)
    return Wrapped(trained, config, transport, leave, mesh, ranks, facts, extras)


def senders(model: DistributedDataParallel, mesh: DeviceMesh | int | None) -> int:
    """Return how many ranks, or nodes, send each other what they have coded."""
    if not isinstance(model, DistributedDataParallel):
        return 0  # which is refused later
    world = dist.get_world_size(model.process_group)
    if mesh is None:
        return world
    if isinstance(mesh, int):
        return world // mesh if mesh > 0 else 0
    return int(mesh.mesh.shape[0]) if isinstance(mesh, DeviceMesh) else 0
