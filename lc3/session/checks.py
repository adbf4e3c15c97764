"""What is refused before anything is attached, and what must be alike afterwards."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lc3.config import Settings
from lc3.errors import AttachError, ConfigError
from lc3.module.model import named_parameters

_CPU = torch.device("cpu")
_MOST_UPDATE = 3.0  # of Adam where nothing is said, in learning rates


def check_module(model: object) -> None:
    """Raise ``AttachError`` unless this is a module."""
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"attach needs the model, a torch.nn.Module, got {type(model).__name__}"
        )


def check_bound(name: str, value: object) -> None:
    """Raise ``ConfigError`` unless a value is ``None`` or a positive number."""
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigError(
            f"{name}={value!r} must be a positive number, like 1.0, or None"
        )


def check_clipping(max_norm: float | None, optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ConfigError`` unless gradients can be clipped to this norm."""
    check_bound("max_norm", max_norm)
    if max_norm is not None and not optimizers:
        raise ConfigError(
            f"max_norm={max_norm!r} clips right before the optimizer steps; pass it, "
            "too: attach(model, optimizer, max_norm=...)"
        )


def update_bound(max_update: float | None, kind: str | None) -> float | None:
    """Return what bounds the steps of such an optimizer; ``None``: nothing does.

    Raises:
        ConfigError: this is no bound, or the optimizer is not Adam.
    """
    if max_update is None:
        return _MOST_UPDATE if kind == "adam" else None
    if max_update != math.inf:
        check_bound("max_update", max_update)
    if kind != "adam":
        raise ConfigError(
            f"max_update={max_update!r} bounds what Adam steps by, and no Adam was "
            "given; leave it out"
        )
    return max_update


def check_scaler(scaler: object) -> None:
    """Raise ``ConfigError`` unless this is ``None`` or a GradScaler."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise ConfigError(f"scaler={scaler!r} must be a torch.amp.GradScaler, or None")


def check_form(config: Settings, hook: str) -> None:
    """Raise ``ConfigError`` if a configuration asks for what only one hook does."""
    if config.mode != "3lc":
        raise ConfigError(
            f"mode={config.mode!r} lets a bucket of hooks.ddp without a mesh travel "
            f"uncoded; {hook} always sends 3LC: leave mode out"
        )


def check_owners(config: Settings, what: str) -> None:
    """Raise ``ConfigError`` if there are no owners for what lives on them."""
    if config.topology == "direct":
        raise ConfigError(
            f"{what} needs master weights on owner ranks, and topology='direct' has "
            "none; leave one of them out"
        )


def check_parameters(names: Mapping[Tensor, str], config: Settings) -> torch.device:
    """Return the device that all parameters are on."""
    if not names:
        raise AttachError(
            "the model has no trainable parameter, so nothing to compress"
        )
    first, first_name = next(iter(names.items()))
    for parameter, name in names.items():
        if parameter.is_complex():
            raise AttachError(
                f"parameter {name!r} is {parameter.dtype}; lc3 compresses real "
                "gradients: keep complex parameters as two real ones "
                "(torch.view_as_real)"
            )
        if parameter.device != first.device:
            raise AttachError(
                f"parameter {first_name!r} is on {first.device}, {name!r} on "
                f"{parameter.device}; all parameters of a rank must be on one device"
            )
    if config.mode == "auto" and first.device != _CPU:
        raise ConfigError(
            f"mode='auto' compares 3LC with an all-reduce on the CPU, the model is on "
            f"{first.device}; python -m lc3 doctor says below which link rate 3LC "
            "wins: leave mode out, or do not attach"
        )
    return first.device


def alike_in(module: nn.Module) -> dict[str, Tensor]:
    """Return what replicas of a module must have alike, by what it is called.

    All parameters, frozen ones and those that were added since attach, too, and buffers
    of whole numbers and bits; those with statistics are each rank's own.
    """
    return {
        **{f"parameter {name!r}": p for name, p in named_parameters(module)},
        **{
            f"buffer {name!r}": b
            for name, b in module.named_buffers()
            if not b.is_floating_point() and not b.is_complex()
        },
    }
