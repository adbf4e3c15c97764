"""What the adapters of training frameworks share."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lc3.config import Config, Settings
from lc3.errors import AttachError, ConfigError
from lc3.hooks import ddp, local_sgd
from lc3.meter import Meter
from lc3.session.state import FormState


class Attach(Protocol):
    """``lc3.hooks.ddp.attach``, ``lc3.hooks.local_sgd.attach``, or a partial of one."""

    def __call__(
        self,
        model: Any,
        optimizer: Optimizer | Sequence[Optimizer],
        config: Config | Settings | None = None,
        /,
    ) -> FormState:
        """Compress what ``model`` exchanges; collective."""


FormName = Literal["ddp", "local_sgd"]
FORMS: dict[str, Callable[..., FormState]] = {
    "ddp": ddp.attach,
    "local_sgd": local_sgd.attach,
}


def attach_of(
    form: FormName | None,
    sync_every: int | None,
    attach: Attach | None,
) -> Attach:
    """Return what attaches, from what a user has said of it.

    Args:
        form: name of the form. Default: "ddp".
        sync_every: local steps between two exchanges, of the form that has them.
        attach: ``attach`` of a form with its arguments, instead of both.

    Raises:
        ConfigError: there is no such form, or two of these contradict each other.
    """
    if attach is not None:
        if form is not None or sync_every is not None:
            raise ConfigError(
                "attach says the form and its knobs; leave form and sync_every out, or "
                "attach"
            )
        return attach
    name = form or "ddp"
    if name not in FORMS:
        raise ConfigError(f"form={form!r} must be one of {', '.join(map(repr, FORMS))}")
    if sync_every is None:
        return cast("Attach", FORMS[name])
    if name != "local_sgd":
        raise ConfigError(
            f"sync_every={sync_every!r} is for local steps, and form is {name!r}; say "
            "form='local_sgd', too"
        )
    return partial(FORMS[name], sync_every=sync_every)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are sharded over ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def check_inside(accelerator: Any) -> None:
    """Raise ``AttachError`` if an Accelerator's FSDP2 shards across sites.

    Args:
        accelerator: of Accelerate, with FSDP2.
    """
    config = getattr(accelerator, "parallelism_config", None)
    if config is None or "dp_replicate" in config.fsdp_dim_names:
        raise AttachError(
            "FSDP2 averages gradients between sites here; call "
            "lc3.hooks.accelerate.inside(accelerator) before the model is prepared"
        )


def check_sites(model: nn.Module, attach: Attach, mesh: str) -> None:
    """Raise ``AttachError`` if a sharded model would be attached to without sites.

    Args:
        model: wrapped or sharded.
        attach: see ``attach_of``.
        mesh: how a user names the mesh of the sites.
    """
    form, knobs = (
        (attach.func, attach.keywords) if isinstance(attach, partial) else (attach, {})
    )
    if is_sharded(model) and form in FORMS.values() and "mesh" not in knobs:
        raise AttachError(
            "the model is sharded, so sites make local steps; leave form and "
            "sync_every out, and pass attach=partial(lc3.hooks.local_sgd.attach, "
            f"mesh={mesh}, sync_every=8)"
        )


def figures(meter: Meter) -> dict[str, float]:
    """Return the main figures under the names that loggers get."""
    stages = {f"lc3/seconds_{stage}": spent for stage, spent in meter.seconds.items()}
    return {
        "lc3/ratio": meter.ratio,
        "lc3/bits_push": meter.push.bits_per_element,
        "lc3/bits_pull": meter.pull.bits_per_element
        if meter.pull.coded_elements
        else 0.0,
        **stages,
    }


def missing(extra: str, error: ModuleNotFoundError) -> ImportError:
    """Return what to raise where a framework is not installed.

    Args:
        extra: extra of the package, named as the adapter.
        error: error that its import raised.
    """
    return ImportError(
        f"lc3.hooks.{extra} could not import what it adapts ({error}); "
        f"pip install 'torch-lc3[{extra}]'"
    )


def require(package: str, found: str, least: str) -> None:
    """Raise ``AttachError`` if a package is older than what lc3 knows how to use."""
    if _numbers(found) < _numbers(least):
        raise AttachError(
            f"lc3 needs {package} {least} or newer, {found} is installed; "
            f"pip install '{package}>={least}'"
        )


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"[0-9]+", version.partition("+")[0])[:3]]
