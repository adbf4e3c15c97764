"""3LC in a training loop with Accelerate.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state = lc3.hooks.accelerate.attach(accelerator, model, optimizer)

Accelerate's own list of communication hooks is closed; what ``prepare`` returns is a
DistributedDataParallel that takes any.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lc3.config import Config
from lc3.errors import AttachError
from lc3.frameworks import Attach, State, require
from lc3.hooks import ddp

_LEAST = "0.30"


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    config: Config | None = None,
    *,
    attach: Attach = ddp.attach,
) -> State:
    """Compress what a prepared model exchanges; collective.

    ``accelerator.clip_grad_norm_``, ``accelerator.accumulate`` and mixed precision work
    as without lc3.

    What every rank has not sent yet becomes a part of ``accelerator.save_state`` and
    ``load_state``: with as many ranks a run goes on bit for bit, with others it keeps
    the mean. Local steps are brought together before they are saved.

    Args:
        accelerator: that prepared it.
        model: what ``prepare`` returned.
        optimizer: what ``prepare`` returned, see ``ddp.attach``. ``None``: those that
            this accelerator has prepared.
        config: see ``ddp.attach``.
        attach: of the form, with its arguments:
            ``functools.partial(lc3.hooks.local_sgd.attach, every=32)``.

    Returns:
        What ``attach`` returns.

    Raises:
        AttachError: this Accelerate is too old, or the model is not wrapped in
            DistributedDataParallel; and what ``ddp.attach`` raises.
    """
    require("accelerate", version("accelerate"), _LEAST)
    inner = getattr(model, "_orig_mod", model)  # compiled
    if not isinstance(inner, DistributedDataParallel):
        raise AttachError(
            "lc3 needs a model that accelerator.prepare wrapped in "
            f"DistributedDataParallel; with {accelerator.num_processes} process(es) "
            f"and {accelerator.distributed_type} it is a {type(model).__name__}"
        )
    if optimizer is None:
        optimizer = list(accelerator._optimizers)  # there is no public list
    state = attach(inner, optimizer, config)

    def before_saving(*_: object) -> None:
        state.sync()

    accelerator.register_save_state_pre_hook(before_saving)
    accelerator.register_for_checkpointing(_OfAllRanks(state))
    return state


class _OfAllRanks:
    """What Accelerate saves from its first process, and loads in every one."""

    def __init__(self, state: State) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": self._state.gather_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state.load_gathered(state["ranks"])
