"""3LC in a Hugging Face Trainer.

trainer = Trainer(model, TrainingArguments(...), train_dataset=...)
lc3.hooks.transformers.attach(trainer)
trainer.train()
"""

import logging
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lc3 import private
from lc3.checkpoint import load_checkpoint, save_checkpoint
from lc3.config import Config, Settings
from lc3.errors import AttachError
from lc3.hooks.frameworks import (
    Attach,
    FormName,
    attach_of,
    check_inside,
    check_sites,
    figures,
    is_sharded,
    missing,
    require,
)
from lc3.session.state import FormState

try:
    from transformers import (
        DefaultFlowCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ModuleNotFoundError as error:
    raise missing("transformers", error) from error

log = logging.getLogger(__name__)

_LEAST = "4.46"


def attach(
    trainer: Trainer,
    config: Config | Settings | None = None,
    *,
    form: FormName | None = None,
    sync_every: int | None = None,
    attach: Attach | None = None,
) -> "LC3Callback":
    """Compress what the ranks of a Trainer exchange, from ``train()`` on.

    Every rank's residuals are saved beside each checkpoint, as ``lc3.pt``, and loaded
    when training resumes from there. ``lc3/ratio``, ``lc3/bits_push`` and so on are
    logged with the Trainer's figures. On one rank it does nothing. Say
    ``ddp_find_unused_parameters=False`` where every parameter is used: the Trainer's
    default searches the graph in every step.

    >>> from transformers import Trainer, TrainingArguments
    >>> arguments = TrainingArguments("out", ddp_find_unused_parameters=False)
    >>> trainer = Trainer(model, arguments)
    >>> callback = lc3.hooks.transformers.attach(trainer)

    Args:
        trainer: not training yet.
        config: see ``lc3.hooks.ddp.attach``, which gets the Trainer's optimizer.
            ``max_grad_norm`` clips as it does without lc3.
        form: "ddp", which compresses gradients, or "local_sgd": every rank trains by
            itself, and ranks come together every so many steps. Default: "ddp".
        sync_every: steps between two exchanges of "local_sgd"; see its ``attach``.
        attach: ``attach`` of a form with more of its arguments, instead of both:
            ``functools.partial(lc3.hooks.local_sgd.attach, overlap=2)``. Local
            steps are brought together before they are saved and at the end, and
            evaluated as the model that all ranks share.

    Raises:
        ConfigError: ``form``, ``sync_every`` and ``attach`` contradict each other.
        AttachError: this Transformers is too old; in ``train()``: the Trainer does not
            wrap its model in DistributedDataParallel or shard it with FSDP2.
    """
    require("transformers", version("transformers"), _LEAST)
    make = attach_of(form, sync_every, attach)
    callback = LC3Callback(trainer, config, make)
    trainer.add_callback(callback)
    # After the Trainer's own, which decides what is saved, and before those that print
    # and report, so that they get lc3's figures, too.
    callbacks = trainer.callback_handler.callbacks
    flow = [isinstance(one, DefaultFlowCallback) for one in callbacks].index(True)
    callbacks.insert(flow + 1, callbacks.pop())
    return callback


class LC3Callback(TrainerCallback):
    """Made by ``attach``.

    Attributes:
        state: the state that ``attach`` returned, from the start of training on.
    """

    def __init__(
        self, trainer: Trainer, config: Config | Settings | None, attach: Attach
    ) -> None:
        self.state: FormState | None = None
        self._trainer = trainer
        self._config = config
        self._attach = attach
        self._shared = ExitStack()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Attach: the model is wrapped by now; go on from a checkpoint's residuals."""
        if args.world_size == 1:
            return
        if self.state is not None:  # of a training that was interrupted
            self.state.close()
        model = self._trainer.model_wrapped
        model = private.uncompiled(model)
        if not isinstance(model, DistributedDataParallel) and not is_sharded(model):
            raise AttachError(
                "lc3 needs a Trainer that trains with DistributedDataParallel or "
                f"FSDP2; its model is a {type(model).__name__}: leave deepspeed out"
            )
        if is_sharded(model):
            check_inside(self._trainer.accelerator)
        check_sites(model, self._attach, "trainer.accelerator.torch_device_mesh")
        self.state = self._attach(model, self._trainer.optimizer, self._config)
        if state.global_step:
            path = _path(args, state)
            if not path.exists():
                log.warning(
                    "lc3: %s is not there, as where lc3 was not attached; training "
                    "resumes with nothing owed",
                    path,
                )
                return
            self.state.load_gathered(load_checkpoint(path))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Let the model be the shared one where it is saved or evaluated next."""
        if self.state is None:
            return
        if control.should_save:
            self.state.sync()
        elif control.should_evaluate:
            self._shared.enter_context(self.state.shared_model())

    on_epoch_end = on_step_end

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Go on from this rank's own parameters."""
        self._shared.close()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Save every rank's residuals beside the checkpoint; collective."""
        if self.state is not None:
            ranks = self.state.gather_state()
            if ranks:
                save_checkpoint(ranks, _path(args, state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add lc3's figures to what the Trainer logs."""
        if self.state is not None and logs is not None:
            found = figures(self.state.meter)
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Bring the ranks together, and end what ``attach`` started."""
        if self.state is not None:
            self.state.sync()
            self.state.close()


def _path(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "lc3.pt"
