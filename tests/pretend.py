"""A device that is none: tensors that must not meet those on the CPU.

They hold values of the CPU, call themselves tensors on ``meta``, and mixing them with
others fails as it does on an accelerator, where only copies may.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)


class Pretend(torch.Tensor):
    """A tensor on the device; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretend":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        wrapper.held = held
        return wrapper

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor on the device to numpy; use .cpu()")

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return Pretend(self.held.new_tensor(data, **options))

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def on_the_device() -> Iterator[None]:
    """While it lasts, what is made on ``DEVICE`` in this thread is there."""
    operators: Any = _Operators
    with operators(), _Literals():
        yield


class _Literals(TorchFunctionMode):
    """``torch.tensor``, which becomes no operator."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.tensor and named.pop("device", None) == DEVICE:
            return Pretend(func(*args, **named))
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values; refuse what a device refuses."""
    given: list[Tensor] = []

    def held(value: Any) -> Any:
        if isinstance(value, Tensor):
            given.append(value)
        return value.held if isinstance(value, Pretend) else value

    inner, named = tree_map(held, args), tree_map(held, kwargs)
    there = [isinstance(tensor, Pretend) for tensor in given]
    mixed = any(there) and any(
        not on and t.dim() > 0 for on, t in zip(there, given, strict=True)
    )
    if mixed and func not in _COPIES:
        raise RuntimeError(f"{func}: tensors on the device and on the CPU")
    device = named.get("device")
    if device is not None:
        named["device"] = torch.device("cpu")
    result = func(*inner, **named)
    stays = any(there) if device is None else torch.device(device) == DEVICE
    if func._schema.is_mutable and given and func not in _COPIES:
        return args[0]
    if func in _COPIES:
        return args[0]

    def wrapped(value: Any) -> Any:
        return Pretend(value) if isinstance(value, Tensor) and stays else value

    return tree_map(wrapped, result)


def there(value: Tensor) -> Tensor:
    """Return a tensor on the device."""
    return Pretend(value.clone())
