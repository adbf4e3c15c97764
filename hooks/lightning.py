"""3LC in a Lightning Trainer that trains with DDP: a callback.

    Trainer(strategy="ddp", callbacks=[LC3()])

Lightning itself registers communication hooks on CUDA only, and before it has a process
group; a callback can do so on any device, when the model is wrapped.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lc3 import private
from lc3.config import Config, Settings
from lc3.errors import AttachError
from lc3.hooks.frameworks import (
    Attach,
    FormName,
    attach_of,
    check_sites,
    figures,
    is_sharded,
    missing,
    require,
)
from lc3.session.state import FormState

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise missing("lightning", error) from error

log = logging.getLogger(__name__)

_LEAST = "2.2"


class LC3(Callback):
    """Compresses what the model that the Trainer fits exchanges.

    Saves what every rank has not sent yet in the Trainer's checkpoints (with as many
    ranks a run goes on bit for bit, with others it keeps the mean), and logs
    ``lc3/ratio``, ``lc3/bits_push``, ``lc3/bits_pull`` and ``lc3/seconds_wait`` and so
    on where the module logs. On one rank it does nothing.

    >>> from lightning.pytorch import Trainer
    >>> callbacks = [lc3.hooks.lightning.LC3()]
    >>> trainer = Trainer(
    ...     accelerator="cpu", devices=2, strategy="ddp", callbacks=callbacks
    ... )

    Local steps: ``LC3(form="local_sgd", sync_every=8)``. A checkpoint holds the first
    rank's optimizer, as without lc3, and all ranks resume from that.

    Args:
        config: see ``lc3.hooks.ddp.attach``, which gets the Trainer's optimizers.
            ``gradient_clip_val`` clips as it does without lc3.
        form: "ddp", which compresses gradients, or "local_sgd": every rank trains by
            itself, and ranks come together every so many steps. Default: "ddp".
        sync_every: steps between two exchanges of "local_sgd"; see its ``attach``.
        attach: ``attach`` of a form with more of its arguments, instead of both:
            ``functools.partial(lc3.hooks.local_sgd.attach, overlap=2)``. Local
            steps are brought together before they are saved and at the end, and
            validated as the model that all ranks share. With its ``mesh`` sites make
            local steps, under ``DDPStrategy(process_group=mesh.get_group(1))``; or
            under ``ModelParallelStrategy``, where ``configure_model`` shards the model
            over ``mesh["inside"]``, the mesh's second dimension. Its distributed
            checkpoints hold of each shard some site's optimizer; those with
            ``save_distributed_checkpoint=False`` the first one's.

    Attributes:
        state: the state that ``attach`` returned, while the Trainer fits.

    Raises:
        ConfigError: ``form``, ``sync_every`` and ``attach`` contradict each other.
        AttachError: this Lightning is too old; at the start of ``fit``: the strategy
            neither wraps the module in DistributedDataParallel nor shards it.
    """

    def __init__(
        self,
        config: Config | Settings | None = None,
        *,
        form: FormName | None = None,
        sync_every: int | None = None,
        attach: Attach | None = None,
    ) -> None:
        require("lightning", version("lightning"), _LEAST)
        self.config = config
        self.state: FormState | None = None
        self._attach = attach_of(form, sync_every, attach)
        self._shared = ExitStack()
        self._loaded: list[Mapping[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the strategy has wrapped the module by now."""
        if trainer.world_size == 1:
            log.info("lc3: one rank, so nothing to compress")
            return
        if self.state is not None:  # of a fit that was interrupted
            self.state.close()
        model = trainer.strategy.model
        model = private.uncompiled(model)
        if not isinstance(model, DistributedDataParallel) and not is_sharded(model):
            strategy = type(trainer.strategy).__name__
            raise AttachError(
                "lc3 needs Trainer(strategy='ddp'), or a model that is sharded inside "
                f"of sites; this one has {strategy}, which makes the module a "
                f"{type(model).__name__}"
            )
        check_sites(model, self._attach, "mesh")
        self.state = self._attach(model, trainer.optimizers, self.config)
        self._take_loaded()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: object
    ) -> None:
        """Log what compression did so far."""
        if self.state is not None:
            pl_module.log_dict(figures(self.state.meter), rank_zero_only=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the parameters be those that all ranks share."""
        if self.state is not None:
            self._shared.enter_context(self.state.shared_model())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from this rank's own."""
        self._shared.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the ranks together."""
        if self.state is not None:
            self.state.sync()

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks have to keep; collective, as saving is.

        What this changes in the parameters is saved, too: the Trainer has not copied
        them yet, or ``on_save_checkpoint`` does so again.
        """
        if self.state is None:
            return {}
        self._shared.close()
        self.state.sync()
        return {"ranks": self.state.gather_state()}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather shards again: ``state_dict`` has brought the sites together since."""
        if self.state is not None and is_sharded(pl_module):
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's state, or remember it until there is a model."""
        self._loaded = state_dict.get("ranks", [])
        self._take_loaded()

    def _take_loaded(self) -> None:
        """Load what was remembered; strategies restore before or after attaching."""
        if self._loaded and self.state is not None:
            self.state.load_gathered(self._loaded)
            self._loaded = []

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """End what ``attach`` started."""
        if self.state is not None:
            self.state.close()
            self.state = None
