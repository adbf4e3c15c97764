"""Every private name of torch that lc3 uses, in one place.

Torch may change them in any version. ``check`` says so at attach, in a sentence, rather
than in the middle of training.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable, profiler
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lc3.errors import AttachError

TESTED = "2.13"
_CPU = torch.device("cpu")

# What is looked for: an object, and a path of names from there.
_NAMES: tuple[tuple[str, object, str], ...] = (
    ("torch", torch, "_foreach_mul_"),
    ("torch", torch, "_foreach_norm"),
    ("torch.Tensor", torch.Tensor, "_version"),
    ("torch.distributed", dist, "_broadcast_coalesced"),
    ("torch.autograd.Variable", Variable, "_execution_engine.queue_callback"),
    ("torch.autograd.profiler", profiler, "_is_profiler_enabled"),
    ("torch.nn.modules.batchnorm", nn.modules.batchnorm, "_NormBase"),
    (
        "torch.nn.parallel.distributed",
        nn.parallel.distributed,
        "_BufferCommHookLocation.PRE_FORWARD",
    ),
    (
        "DistributedDataParallel",
        DistributedDataParallel,
        "_register_buffer_comm_hook",
    ),
)


def missing() -> list[str]:
    """Return the names that this torch does not have."""
    found = []
    for owner, thing, path in _NAMES:
        here = thing
        for part in path.split("."):
            here = getattr(here, part, None)
        if here is None:
            found.append(f"{owner}.{path}")
    return found


def check() -> None:
    """Raise ``AttachError`` if this torch is one that lc3 does not know."""
    if lost := missing():
        raise AttachError(
            f"torch {torch.__version__} has no {lost[0]}, which lc3 uses; install "
            f"torch {TESTED}, which lc3 is tested with, or a newer lc3"
        )


def comm_hook(model: DistributedDataParallel) -> tuple[Callable[..., Any], Any] | None:
    """Return the communication hook of a model and its state, if it has one."""
    hooks = model._comm_hooks
    return hooks[0] if hooks else None


def buffer_state(model: DistributedDataParallel) -> Any:
    """Return the state of a model's hook for buffers, ``None`` without one."""
    hook = getattr(model, "buffer_hook", None)
    return None if hook is None else hook.buffer_comm_hook_state


def register_buffer_hook(
    model: DistributedDataParallel, state: Any, hook: Callable[..., None]
) -> None:
    """Let ``hook(state, buffers)`` send a model's buffers, before every forward."""
    before = nn.parallel.distributed._BufferCommHookLocation.PRE_FORWARD
    model._register_buffer_comm_hook(state, hook, before)


def gives_no_buckets(model: DistributedDataParallel) -> bool:
    """Return whether a model reduces in Python, where hooks get no buckets."""
    return bool(getattr(model, "_use_python_reducer", False))


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward pass ends that is under way.

    Raises:
        RuntimeError: none is.
    """
    Variable._execution_engine.queue_callback(callback)


def broadcast(
    group: dist.ProcessGroup, tensors: list[Tensor], bucket_bytes: int
) -> None:
    """Give all ranks of a group what its first one has, coalesced."""
    dist._broadcast_coalesced(group, tensors, bucket_bytes, 0)


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Return how long a group waits, if it says so."""
    device = next(iter(getattr(group, "_device_types", ())), _CPU)
    backend = getattr(group, "_get_backend", lambda _: None)(device)
    return getattr(getattr(backend, "options", None), "_timeout", None)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module keeps running statistics of a batch."""
    return isinstance(module, nn.modules.batchnorm._NormBase)


def version_of(tensor: Tensor) -> int:
    """Return how many times a tensor was written to in place."""
    return tensor._version


def is_profiling() -> bool:
    """Return whether a profiler is recording."""
    return bool(profiler._is_profiler_enabled)


def multiply(tensors: Sequence[Tensor], factors: Any) -> None:
    """Multiply tensors in place, all by one number, or each by its own."""
    torch._foreach_mul_(list(tensors), factors)


def norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the 2-norm of each tensor, summed in float32."""
    return torch._foreach_norm(list(tensors), 2, dtype=torch.float32)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the module itself."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def shard_groups(module: FSDPModule) -> list[Any]:
    """Return what FSDP2 reduces of a module: groups of sharded parameters.

    Raises:
        AttachError: this torch keeps them elsewhere.
    """
    try:
        groups: list[Any] = list(module._get_fsdp_state()._fsdp_param_groups)
        for group in groups:
            _ = group.mesh_info.mesh
            _ = group.force_sum_reduction_for_comms
            for one in group.fsdp_params:
                _ = one.sharded_param, one.padded_sharded_param_size, one.offload_to_cpu
    except AttributeError as error:
        raise AttachError(
            f"torch {torch.__version__} keeps FSDP2's shards where lc3 does not look "
            f"({error}); install torch {TESTED}, which lc3 is tested with, or a newer "
            "lc3"
        ) from error
    return groups


def takes_views(group: Any, output: Tensor) -> bool:
    """Return whether FSDP2 makes gradients views of what it reduced, and no more."""
    return (
        output.dtype == group._orig_dtype
        and output.dtype in (torch.float32, torch.bfloat16)  # others it divides
        and not group.force_sum_reduction_for_comms
        and all(
            p.sharded_param.grad is None
            and not p.offload_to_cpu
            and not getattr(p.sharded_param, "_post_accumulate_grad_hooks", None)
            for p in group.fsdp_params
        )
    )
