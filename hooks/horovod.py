"""3LC for Horovod: a drop-in for ``hvd.DistributedOptimizer``.

    optimizer = lc3.hooks.horovod.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters()
    )

Horovod's ``compression=`` seam sums what it is given, and 3LC's bytes cannot be summed;
so the class is built as Horovod builds its own, with another way of reducing. Gradients
are exchanged in buckets of a fixed order, on a thread of their own, while backward
still runs. Tested with Horovod 0.28.1 (private names of its class are used).
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lc3.config import Config, Settings, settle
from lc3.errors import AttachError, ConfigError, ExchangeError
from lc3.module.model import flat_view
from lc3.session.attaching import attaching
from lc3.session.session import Session
from lc3.session.state import FormState
from lc3.transport.group import MOST_BYTES

try:
    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError
    from horovod.torch.optimizer import _DistributedOptimizer
except ImportError as error:
    raise ImportError(
        "lc3.hooks.horovod needs Horovod, built for PyTorch, and could not import it "
        f"({error}); in a clone of lc3, run launch/install_horovod.sh with the path of "
        "this Python"
    ) from error

log = logging.getLogger(__name__)

_CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = 1 << 20, 25 << 20  # as DDP's
_SPLIT_BYTES = 4
_POLL_S = 0.001


class Compression:
    """Says where 3LC is, to those who look for it among Horovod's compressors."""

    class lc3:  # noqa: N801  # named as Horovod names its own
        """Not a compressor: 3LC's bytes cannot be summed."""

        @staticmethod
        def compress(tensor: Tensor) -> NoReturn:  # noqa: ARG004
            """Raise ``AttachError``."""
            raise AttachError(
                "Horovod sums what a compressor returns, and 3LC's bytes cannot be "
                "summed; use lc3.hooks.horovod.DistributedOptimizer(optimizer, "
                "named_parameters) in place of hvd.DistributedOptimizer"
            )

        decompress = compress


class HorovodTransport:
    """A ``Transport`` over Horovod's own collectives, one at a time.

    Args:
        process_set: the ranks.
    """

    def __init__(self, process_set: Any) -> None:
        self.rank: int = process_set.rank()
        self.world: int = process_set.size()
        self.sent_bytes = self.rounds = 0
        self.most_bytes = MOST_BYTES  # Horovod allocates before anybody can look
        self._process_set = process_set

    def all_to_all(
        self, messages: Sequence[Tensor], timeout_s: float | None = None
    ) -> list[Tensor]:
        """See ``lc3.transport.protocol.Transport``. Horovod tells the sizes itself."""
        if self.world == 1:
            return list(messages)
        outgoing = [0 if r == self.rank else m.numel() for r, m in enumerate(messages)]
        payload = torch.cat([m for r, m in enumerate(messages) if r != self.rank])
        splits = torch.tensor(outgoing, dtype=torch.int32)
        received, incoming = self._wait(
            lambda: hvd.alltoall_async(
                payload, splits, name="lc3.all_to_all", process_set=self._process_set
            ),
            timeout_s,
        )
        self.sent_bytes += sum(outgoing) + _SPLIT_BYTES * (self.world - 1)
        self.rounds += 1
        arrived = list(torch.split(received, incoming.tolist()))
        arrived[self.rank] = messages[self.rank]
        return arrived

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """See ``lc3.transport.protocol.Transport``."""
        return self.all_to_all([message] * self.world)

    def all_reduce(self, tensor: Tensor) -> None:
        """See ``lc3.transport.protocol.Transport``. Counted as a ring sends it."""
        self._wait(
            lambda: hvd.allreduce_async_(
                tensor, name="lc3.sum", op=hvd.Sum, process_set=self._process_set
            ),
            None,
        )
        self.sent_bytes += 2 * (self.world - 1) * tensor.nbytes // self.world
        self.rounds += 2 * (self.world - 1)

    def leave_word(self, reason: str) -> None:
        """See ``lc3.transport.protocol.Transport``. Horovod has no place for it."""

    def _wait(self, start: Callable[[], int], timeout_s: float | None) -> Any:
        try:
            handle = start()
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            while deadline is not None and not hvd.poll(handle):
                if time.monotonic() > deadline:
                    raise ExchangeError(
                        f"no answer from the other ranks within {timeout_s} s"
                    )
                time.sleep(_POLL_S)
            return hvd.synchronize(handle)
        except (HorovodInternalError, ValueError) as error:
            raise ExchangeError(
                f"Horovod's exchange failed ({error}); a rank died or the link is "
                "down: look at the other ranks' logs"
            ) from error


def _check_devices(trained: Sequence[tuple[str, Parameter]]) -> None:
    for name, parameter in trained:
        if parameter.device.type != "cpu":
            raise AttachError(
                f"parameter {name!r} is on {parameter.device}; in this version lc3's "
                "Horovod optimizer exchanges on the CPU only; lc3.hooks.ddp takes it "
                "there"
            )


class State(FormState):
    """Everything lc3 keeps for one optimizer: its attribute ``lc3``.

    See ``FormState``.
    """

    form = "horovod"

    def __init__(
        self,
        named: Sequence[tuple[str, Parameter]],
        config: Config | Settings | None,
        process_set: Any,
    ) -> None:
        transport = HorovodTransport(process_set)
        trained = [(name, p) for name, p in named if p.requires_grad]
        with attaching(lambda: (transport, lambda: None)):
            _check_devices(trained)
            self.settings = settle(config, Settings())
        self.session = Session(trained, self.settings, transport, lambda: None)
        self.meter, self.engine = self.session.meter, self.session.engine
        self._buckets = _buckets([p for _, p in reversed(trained)])
        self._bucket_of = {p: i for i, some in enumerate(self._buckets) for p in some}
        self._begin()

    def _begin(self) -> None:
        self._waiting = [set(some) for some in self._buckets]
        self._futures: list[torch.futures.Future[Tensor]] = []

    def ready(self, parameter: Parameter) -> None:
        """Take a gradient that backward has finished; send the buckets that are whole.

        Buckets go in one order on every rank, whatever the order of backward.
        """
        self._waiting[self._bucket_of[parameter]].discard(parameter)
        while len(self._futures) < len(self._buckets):
            index = len(self._futures)
            if self._waiting[index]:
                return
            self._futures.append(self._submit(index))

    def reduced(self, parameter: Parameter) -> Tensor:
        """Return a parameter's averaged gradient, when it has arrived."""
        with self.meter.stage("wait"):
            self._futures[self._bucket_of[parameter]].wait()
        assert parameter.grad is not None
        return parameter.grad

    def end_step(self) -> None:
        """Begin the next step; all gradients have arrived."""
        if len(self._futures) == len(self._buckets):
            self.session.begin_step(self.session.step + 1)
            self.meter.at_step(self.session.step)
            self._begin()

    def _submit(self, index: int) -> torch.futures.Future[Tensor]:
        step = self.session.step
        grads = {self.session.names[p]: p for p in self._buckets[index]}

        def job() -> Tensor:
            coded: dict[str, Tensor] = {}
            for name, parameter in grads.items():
                grad = parameter.grad
                assert grad is not None
                if grad.layout != torch.strided or grad.dtype not in _CODED_DTYPES:
                    parameter.grad = self._passed_through(name, grad, step, index)
                else:
                    # In the parameter's own order of memory, on every rank.
                    ordered = torch.empty_like(parameter).copy_(grad)
                    coded[name] = flat_view(ordered).float()
            if coded:
                self.engine.all_reduce(coded, step, index)
            for name, mean in coded.items():
                grad, parameter = grads[name].grad, grads[name]
                assert grad is not None
                ordered = torch.empty_like(parameter)
                flat_view(ordered).copy_(mean)
                grad.copy_(ordered)
            return torch.empty(0, dtype=torch.float32)

        return self.session.lane.submit(job)

    def _passed_through(
        self, name: str, grad: Tensor, step: int, bucket: int
    ) -> Tensor:
        if grad.layout != torch.strided:
            raise AttachError(
                f"the gradient of {name!r} is sparse; make the embedding with "
                "sparse=False, or keep it out of this optimizer"
            )
        if self.session.step == 0:
            log.warning("lc3: %s of %r passes through uncompressed", grad.dtype, name)
        return self.engine.channel.pass_through(grad, step, bucket)

    def check_replicas(self) -> None:
        """Raise ``ReplicasDiffer`` if ranks hold other parameters; collective.

        Of the parameters that the optimizer was given.
        """
        self.session.check_replicas(
            {f"parameter {name!r}": p for p, name in self.session.names.items()}
        )

    def close(self) -> None:
        """End the lane. The optimizer can no longer step."""
        self.session.close()


def DistributedOptimizer(  # noqa: N802  # named as Horovod names it
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Parameter]] | None = None,
    config: Config | Settings | None = None,
    *,
    backward_passes_per_step: int = 1,
    op: Any = hvd.Average,
    process_set: Any = hvd.global_process_set,
    **others: Any,
) -> Any:
    """Return ``optimizer`` as one whose gradients are averaged by 3LC; collective.

    Used as ``hvd.DistributedOptimizer``: ``synchronize()``, ``skip_synchronize()``,
    ``hvd.broadcast_parameters`` and ``hvd.broadcast_optimizer_state`` as ever. Its
    attribute ``lc3`` is the ``State``: meter, checkpoint, ``close()``.

    Under ``horovodrun``::

        hvd.init()
        optimizer = lc3.hooks.horovod.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters()
        )
        model(inputs).sum().backward()
        optimizer.step()

    Args:
        optimizer: torch's; a new object of a class derived from its own is returned.
        named_parameters: the model's. Default: numbers.
        config: settings of what to compress, and how much.
        backward_passes_per_step: backward passes whose sum is exchanged once.
        op: ``hvd.Average``, the only one.
        process_set: the ranks that train this model; this rank is one of them.
        others: other arguments of Horovod's, none of which fits 3LC.

    Raises:
        AttachError: Horovod is not initialised, or an argument does not fit 3LC.
        ConfigError: a pattern of the configuration matches no parameter, or an argument
            is out of range.
        PlanMismatch: ranks differ in configuration, parameters or version.
        PeerError: one of these happened on another rank.
    """
    if not hvd.is_initialized():
        raise AttachError("Horovod is not initialised; call hvd.init() first")
    if others:
        raise AttachError(
            f"{sorted(others)[0]} does not go with 3LC, which exchanges dense "
            "gradients in buckets of its own; leave it out"
        )
    if op != hvd.Average:
        raise AttachError("op must be hvd.Average; 3LC averages gradients")
    if not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
        raise ConfigError(
            f"backward_passes_per_step={backward_passes_per_step!r} must be an integer "
            "of at least 1"
        )
    if not process_set.included():
        raise AttachError(
            f"rank {hvd.rank()} is not in the process set; call this on its ranks only"
        )
    _check_launcher()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    named = (
        [(f"parameter {index}", p) for index, p in enumerate(parameters)]
        if named_parameters is None
        else list(named_parameters)
    )
    base = type(optimizer)
    own = dict(_DistributedOptimizer.__dict__)

    def allreduce_grad_async(
        self: Any, p: Parameter
    ) -> tuple[Callable[[], Tensor], None]:
        if p.grad is None:  # not computed on this rank
            p.grad = torch.zeros_like(p)
        self.lc3.ready(p)
        return (lambda: self.lc3.reduced(p)), None

    def synchronize(self: Any) -> None:
        own["synchronize"](self)
        self.lc3.end_step()

    made = type(
        base.__name__,
        (base,),
        {
            **own,
            "_allreduce_grad_async": allreduce_grad_async,
            "synchronize": synchronize,
        },
    )
    state = State(named, config, process_set)
    result = made(
        *(optimizer.param_groups, named, hvd.Compression.none),
        backward_passes_per_step=backward_passes_per_step,
        process_set=process_set,
    )
    result.lc3 = state
    return result


def _check_launcher() -> None:
    """Refuse a world that is not the one another launcher has announced."""
    announced = os.environ.get("WORLD_SIZE")
    if announced is not None and announced != str(hvd.size()):
        raise AttachError(
            f"Horovod has {hvd.size()} ranks, but WORLD_SIZE says {announced}; start "
            "the job with horovodrun (or mpirun), not with torchrun"
        )


def _buckets(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """Return parameters in buckets, the first small, so that sending starts early."""
    buckets: list[list[Parameter]] = []
    left = 0
    for parameter in parameters:
        if not buckets or left < parameter.nbytes:
            buckets.append([])
            left = _BUCKET_BYTES if len(buckets) > 1 else _FIRST_BUCKET_BYTES
        buckets[-1].append(parameter)
        left -= parameter.nbytes
    return buckets
