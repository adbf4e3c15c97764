"""A training by each framework, for ``test_adapters``; run by torchrun.

    torchrun --nproc-per-node 2 -m tests.adapter_cases FRAMEWORK MODE FOLDER

Modes: ``straight`` and ``local``, all epochs; ``accumulate``, two batches a step;
``half`` and ``rest``, stopped in between and resumed in new processes, ``local_half``
and ``local_rest`` the same with local steps, against ``local_plain_half``, which stops,
and ``local_plain_rest``, which gives all ranks the first one's optimizer; ``plain``,
``local_plain`` and ``accumulate_plain``, the same without the framework, on the same
batches. Modes of sites are named ``sites`` in place of ``local``: of four ranks two
are a site, with DDP inside; named ``shards``, FSDP2. Every rank writes what came of it
to ``FOLDER/FRAMEWORK-MODE-RANK.pt``.

Nothing is compared here: a collective just before the end of the process may abort it,
where a framework still holds the process group (pytorch/pytorch#190489).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    TensorDataset,
)

from lc3.config import Settings
from lc3.hooks import ddp, local_sgd

BATCH, BATCHES, EPOCHS = 8, 6, 4  # batches a rank and epoch
CONFIG = Settings(sparsity=1.5, min_numel=64, log_every=None)
LOCAL = Settings(density=0.2, min_numel=64, log_every=None)
EVERY = 8  # local steps between two exchanges
CLIP = 0.25  # below every norm of the trainings that share gradients
ACCUMULATE = 2  # backward passes a step, where they accumulate


def dataset(world: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    count = BATCH * BATCHES * world
    x = torch.randn(count, 64, generator=generator)
    return TensorDataset(x, torch.randint(10, (count,), generator=generator))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 10))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


SITES = ("sites", "shards")  # how modes of sites are named


def makes_local_steps(mode: str) -> bool:
    return mode.startswith(("local", *SITES))


def mesh_of() -> DeviceMesh:
    """Return two sites of two ranks; starts the process group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "inside"))


def said_of(mode: str, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return what a mode gives to an adapter."""
    if mesh is not None:
        sites = partial(local_sgd.attach, mesh=mesh, sync_every=EVERY)
        return {"config": LOCAL, "attach": sites}
    if mode.startswith("local"):
        return {"config": LOCAL, "form": "local_sgd", "sync_every": EVERY}
    return {"config": CONFIG}


def flat_of(net: nn.Module) -> Tensor:
    flats = []
    for parameter in net.parameters():
        held = parameter.detach()
        whole = held.full_tensor() if isinstance(held, DTensor) else held
        flats.append(whole.reshape(-1))
    return torch.cat(flats)


def shared(optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> None:
    """Give all sites the first one's optimizer state, shard by shard."""
    for state in optimizer.state.values():
        for held in state.values():
            mine = held.to_local() if isinstance(held, DTensor) else held
            dist.broadcast(mine, group=mesh.get_group("between"), group_src=0)


def report(
    framework: str,
    mode: str,
    folder: Path,
    net: nn.Module,
    meter: Any,
    evaluated: Sequence[Tensor] = (),
) -> None:
    """Write this rank's parameters and figures, and parameters it has evaluated."""
    found = {"parameters": flat_of(net), "ratio": meter.ratio, "steps": meter.steps}
    found["evaluated"] = list(evaluated)
    torch.save(found, folder / f"{framework}-{mode}-{dist.get_rank()}.pt")


def batches(framework: str, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's batches of an epoch as the framework deals them."""
    x, y = dataset(world).tensors
    if framework == "lightning":  # example after example
        x, y = x[rank::world], y[rank::world]
        yield from zip(x.split(BATCH), y.split(BATCH), strict=True)
    else:  # batch after batch
        pairs = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        yield from pairs[rank::world]


def plain(framework: str, mode: str, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = mesh_of() if mode.startswith(SITES) else None
    net = network()
    inside = None if mesh is None else mesh.get_group("inside")
    if mesh is not None and mode.startswith("shards"):
        model: Any = fully_shard(net, mesh=mesh["inside"])
    else:
        model = DistributedDataParallel(net, process_group=inside)
    optimizer = adamw(net.parameters())
    state: Any
    if makes_local_steps(mode):
        state = local_sgd.attach(model, optimizer, LOCAL, sync_every=EVERY, mesh=mesh)
    else:
        state = ddp.attach(model, optimizer, CONFIG)
    passes = ACCUMULATE if mode == "accumulate_plain" else 1
    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2 and mode.endswith("plain_half"):
            break
        if epoch == EPOCHS // 2 and mode.endswith("plain_rest"):
            state.sync()  # for what was saved
            if mesh is not None and mode.startswith("shards"):
                shared(optimizer, mesh)
            else:
                said: list[Any] = [optimizer.state_dict()]
                dist.broadcast_object_list(said)
                optimizer.load_state_dict(said[0])
        dealt = batches(framework, dist.get_rank(), dist.get_world_size())
        for count, (x, y) in enumerate(dealt, 1):
            last = count % passes == 0
            waits = (
                model.no_sync if isinstance(model, DistributedDataParallel) else None
            )
            with nullcontext() if last or waits is None else waits():
                (nn.functional.cross_entropy(model(x), y) / passes).backward()
            if last:
                norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                assert norm > CLIP or makes_local_steps(mode)
                optimizer.step()
                optimizer.zero_grad()
    state.sync()
    report(framework, mode, folder, net, state.meter)
    state.close()
    dist.destroy_process_group()


def with_lightning(mode: str, folder: Path) -> None:
    import lightning
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from lc3.hooks.lightning import LC3

    evaluated: list[Tensor] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def configure_model(self) -> None:
            if mode.startswith("shards"):
                assert mesh is not None
                fully_shard(self.net, mesh=mesh["inside"])

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def validation_step(self, batch: Any, _: int) -> None:
            evaluated.append(flat_of(self.net))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.net.parameters())

        def on_train_end(self) -> None:
            assert callback.state is not None
            meter = callback.state.meter
            report("lightning", mode, folder, self.net, meter, evaluated)

    mesh = mesh_of() if mode.startswith(SITES) else None
    strategy: Any = "ddp"
    if mesh is not None:
        strategy = DDPStrategy(process_group=mesh.get_group("inside"))
    if mode.startswith("shards"):
        strategy = ModelParallelStrategy(4, 1, save_distributed_checkpoint=False)
    callback = LC3(**said_of(mode, mesh))
    half = mode.endswith("half")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2 if mesh is None else mesh.size(),
        strategy=strategy,
        gradient_clip_val=CLIP,
        max_epochs=EPOCHS // 2 if half else EPOCHS,
        callbacks=[callback],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        use_distributed_sampler=False,
    )
    world = trainer.world_size
    data = dataset(world)
    sampler: Any = DistributedSampler(data, world, trainer.global_rank, shuffle=False)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    saved = str(folder / "lightning.ckpt")

    class Saving(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch + 1 == trainer.max_epochs:  # in mid-interval
                trainer.save_checkpoint(saved)

    if half:
        trainer.callbacks.append(Saving())
    resumed = saved if mode.endswith("rest") else None
    evaluates = loader if mode == "local" else None
    trainer.fit(Module(), loader, evaluates, ckpt_path=resumed)
    if mode == "straight":
        assert trainer.callback_metrics["lc3/ratio"] > 1
    dist.destroy_process_group()


def pass_for_gpu() -> None:
    """Let Accelerate take the CPU for a GPU, as on CPUs it does not shard."""
    from accelerate import DistributedType, PartialState

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def sharding_accelerator() -> Any:
    """Return one with FSDP2 for two sites."""
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    pass_for_gpu()
    return Accelerator(
        parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=2),
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        ),
    )


def with_accelerate(mode: str, folder: Path) -> None:
    from accelerate import Accelerator

    from lc3.hooks import accelerate as adapter

    passes = ACCUMULATE if mode == "accumulate" else 1
    mesh = mesh_of() if mode.startswith("sites") else None
    if mode.startswith("shards"):
        accelerator = sharding_accelerator()
        adapter.inside(accelerator)
        mesh = accelerator.torch_device_mesh
    else:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
    if mode.startswith("sites"):
        adapter.inside(accelerator, mesh)
    net = network()
    loader = DataLoader(dataset(accelerator.num_processes), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(net, adamw(net.parameters()), loader)
    state = adapter.attach(accelerator, model, optimizer, **said_of(mode, mesh))
    saved = str(folder / "accelerate")
    if mode.endswith("rest"):
        accelerator.load_state(saved)
    stops = mode.endswith(("half", "rest"))
    for _ in range(EPOCHS // 2 if stops else EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
    if mode.endswith("half"):
        accelerator.save_state(saved)
    else:
        state.sync()
    report("accelerate", mode, folder, net, state.meter)
    state.close()
    accelerator.end_training()


def with_transformers(mode: str, folder: Path) -> None:
    from accelerate import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    from lc3.hooks import accelerate
    from lc3.hooks import transformers as adapter

    mesh = mesh_of() if mode.startswith("sites") else None
    evaluated: list[Tensor] = []

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            if not self.training:
                evaluated.append(flat_of(self.net))
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, *_: Any) -> Any:
            self.optimizer = adamw(self.model.parameters())
            return self.optimizer

        def create_scheduler(self, *_: Any, **__: Any) -> Any:
            constant = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
            self.lr_scheduler = constant
            return constant

    def collate(examples: Sequence[Any]) -> dict[str, Tensor]:
        x, y = zip(*examples, strict=True)
        return {"x": torch.stack(x), "labels": torch.stack(y)}

    steps = EPOCHS * BATCHES
    sharded: dict[str, Any] = {}
    if mode.startswith("shards"):
        two_sites = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
        sharded["parallelism_config"] = two_sites
        sharded["fsdp"] = True
        sharded["fsdp_config"] = {
            "version": 2,
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "FULL_STATE_DICT",
        }
    options = TrainingArguments(
        str(folder / "trainer"),
        use_cpu=True,
        max_steps=steps // 2 if mode.endswith("half") else steps,
        per_device_train_batch_size=BATCH,
        max_grad_norm=CLIP,
        save_strategy="steps" if mode.endswith("half") else "no",
        save_steps=steps // 2,
        eval_strategy="steps" if mode == "local" else "no",
        eval_steps=5,
        logging_steps=4,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **sharded,
    )
    if sharded:
        pass_for_gpu()
    module = Module()
    world = options.world_size
    trainer = InOrder(
        module,
        options,
        collate,
        dataset(world),
        dataset(world) if mode == "local" else None,
    )
    if mode.startswith("shards"):
        accelerate.inside(trainer.accelerator)
        mesh = trainer.accelerator.torch_device_mesh
    elif mesh is not None:
        accelerate.inside(trainer.accelerator, mesh)
    callback = adapter.attach(trainer, **said_of(mode, mesh))
    trainer.train(resume_from_checkpoint=True if mode.endswith("rest") else None)
    assert callback.state is not None
    meter = callback.state.meter
    report("transformers", mode, folder, module.net, meter, evaluated)
    logged = [entry for entry in trainer.state.log_history if "lc3/ratio" in entry]
    assert logged
    assert logged[-1]["lc3/ratio"] > 1
    dist.destroy_process_group()


def main() -> None:
    framework, mode, folder = sys.argv[1:]
    torch.set_num_threads(1)
    if "plain" in mode:
        plain(framework, mode, Path(folder))
    else:
        globals()[f"with_{framework}"](mode, Path(folder))


if __name__ == "__main__":
    main()
