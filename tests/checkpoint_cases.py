"""What the ranks of ``test_checkpoint`` do: each function runs on every rank."""

import copy
import dataclasses
import math
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lc3
from lc3.checkpoint import PerRank
from lc3.config import Settings, Topology
from lc3.engines.exchange import gather
from lc3.hooks import ddp, local_sgd, push_pull
from tests.ddp_cases import hash_of
from tests.local_cases import NEUTRAL
from tests.push_pull_cases import CODED, KINDS, small_net

AVERAGING, WITHOUT_OWNERS = "local_sgd, averaging", "ddp, without owners"
HOOKS = ("ddp", "push_pull", "local_sgd", AVERAGING, WITHOUT_OWNERS)


class Run:
    """A small model in training under one of the hooks."""

    def __init__(
        self,
        hook: str,
        dtype: torch.dtype = torch.float32,
        net: nn.Module | None = None,
        direct: bool = False,
    ) -> None:
        self.hook = hook
        exchange: Topology = "direct" if direct else "owners"
        self.net = small_net().to(dtype) if net is None else net
        self.model: nn.Module = self.net
        self.state: Any
        self.optimizer: Any
        if hook.startswith("local_sgd"):
            self.optimizer = KINDS["adamw"](self.net.parameters())
            config = Settings(density=0.1, min_numel=64, min_shard=500)
            momentum = 0.0 if hook == AVERAGING else 0.5
            config = dataclasses.replace(config, topology=exchange)
            self.state = local_sgd.attach(
                self.net,
                self.optimizer,
                config,
                sync_every=2,
                outer_momentum=momentum,
                **NEUTRAL,
            )
            return
        self.model = DistributedDataParallel(self.net)
        if hook == "push_pull":
            self.optimizer = push_pull.attach(self.model, KINDS["adamw"], CODED)
            self.state = self.optimizer
        else:
            self.optimizer = KINDS["adamw"](self.net.parameters())
            config = dataclasses.replace(CODED, topology=exchange)
            self.state = ddp.attach(self.model, config=config)

    def train(self, rank: int, steps: range) -> None:
        for step in steps:
            torch.manual_seed(1000 * step + rank)
            x = torch.randn(8, 30, dtype=next(self.net.parameters()).dtype)
            self.optimizer.zero_grad()
            self.model(x).float().square().mean().backward()
            self.optimizer.step()

    def masters(self) -> dict[str, Tensor]:
        if self.hook.startswith("ddp"):
            return {n: p.detach().clone() for n, p in self.net.named_parameters()}
        if self.hook == "push_pull":
            return dict(self.state.export())
        exported: dict[str, Tensor] = self.state.owners.export()
        return {} if self.hook == AVERAGING else exported

    def pending(self) -> dict[str, Tensor]:
        if self.hook.startswith("ddp"):
            pending: dict[str, Tensor] = self.state.pending()
            return pending
        engine = self.state.engine
        owed = {
            name: engine.channel.mean(sent, 0, 0)
            for name, sent in engine.residuals.sent.items()
        }
        if self.hook == AVERAGING:  # where masters will be, whoever holds them
            masters = self.state.owners.export()
            return {name: masters[name] - values for name, values in owed.items()}
        return owed


def save(rank: int, world: int, hook: str, folder: str, bfloat16: bool) -> Any:
    """Train a while and save; return what any other number of ranks must find."""
    run = Run(hook, torch.bfloat16 if bfloat16 else torch.float32)
    run.train(rank, range(6))
    saved = {"model": run.net.state_dict(), "lc3": run.state.state_dict()}
    torch.save(saved, Path(folder) / f"{rank}.pt")
    found = run.masters(), run.pending(), optimizer_state(run, world)
    run.state.close()
    return found


def optimizer_state(run: Run, world: int) -> dict[str, Tensor]:
    """Return exp_avg of the whole model, whoever owns it."""
    if run.hook != "push_pull":
        return {}
    engine = run.state.engine
    shares = {
        name: run.state.inner.state[master]["exp_avg"].reshape(-1)
        for name, master in run.state._sharded.masters.items()
    }
    whole: dict[str, Tensor] = gather(engine, shares, list(engine.plan.numel))
    return whole


def load(
    rank: int, world: int, hook: str, folder: str, files: int, bfloat16: bool
) -> Any:
    """Load on another number of ranks; return what is found, then train on."""
    direct = hook in (WITHOUT_OWNERS, AVERAGING) and world == 2
    run = Run(hook, torch.bfloat16 if bfloat16 else torch.float32, direct=direct)
    states = [
        torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in range(files)
    ]
    run.net.load_state_dict(states[0]["model"])
    run.state.load_state_dict(lc3.merge_states([state["lc3"] for state in states]))
    engine = run.state.engine
    if direct:  # nothing would bring it on
        assert not any(owed.any() for owed in engine.residuals.owned.values())
    found = run.masters(), run.pending(), optimizer_state(run, world)
    run.train(rank, range(6, 10))
    digest = hash_of(run.net)
    run.state.close()
    return (*found, digest)


def flushes(rank: int, world: int) -> tuple[float, float, float]:
    """What is pending becomes gradient, and nothing is owed; return three norms."""
    run = Run("ddp")
    run.train(rank, range(5))
    owed = run.pending()
    run.optimizer.zero_grad()
    run.state.flush()
    grads = {
        name: p.grad.reshape(-1)
        for name, p in run.net.named_parameters()
        if p.grad is not None
    }
    apart = max(float((grads[name] - owed[name]).abs().max()) for name in owed)
    before = sum(float(values.norm()) for values in owed.values())
    after = sum(float(values.norm()) for values in run.pending().values())
    run.state.close()
    return before, apart, after


def through_dcp(rank: int, world: int, folder: str) -> bool:
    """Save and load with torch.distributed.checkpoint, a part of it for each rank."""
    run = Run("ddp")
    run.train(rank, range(5))
    dcp.save({"lc3": PerRank(run.state)}, checkpoint_id=folder)
    run.train(rank, range(5, 8))
    straight = hash_of(run.net)
    run.state.close()
    run = Run("ddp")
    run.train(rank, range(5))  # the model itself; the residuals are overwritten
    for buffer in run.state.engine.residuals.buffers():
        buffer.zero_()
    dcp.load({"lc3": PerRank(run.state)}, checkpoint_id=folder)
    run.train(rank, range(5, 8))
    run.state.close()
    return hash_of(run.net) == straight


# By step: the rank that overflows, or None where the sum does; the tensor; the value.
Overflows = dict[int, tuple[int | None, str, float]]


def overflows(count: int, steps: int, world: int, seed: int) -> Overflows:
    """Return ``count`` random ones; on the way back when the owner's sum overflows."""
    chance = random.Random(seed)
    names = [name for name, _ in small_net().named_parameters()]
    found: Overflows = {}
    for step in sorted(chance.sample(range(1, steps), count)):
        value = chance.choice((torch.inf, -torch.inf, torch.nan, 3e38))
        rank = None if value == 3e38 else chance.randrange(world)
        found[step] = rank, chance.choice(names), value
    return found


def with_a_scaler(rank: int, world: int, hook: str, steps: int, bad: Overflows) -> Any:
    """Train with overflows; then a run in which those steps never were."""
    digests, scales, skipped = [], set(), 0
    for scaled in (True, False):
        net = small_net()
        model = DistributedDataParallel(net, bucket_cap_mb=0.002)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**8, growth_interval=3, enabled=scaled
        )
        optimizer: Any
        if hook == "ddp":
            optimizer = KINDS["sgd"](net.parameters())
            state: Any = ddp.attach(model, config=CODED, scaler=scaler)
        else:
            state = optimizer = push_pull.attach(
                model, KINDS["sgd"], CODED, scaler=scaler
            )
        fault: tuple[int | None, str, float] | None = None

        def spoil(grad: Tensor, name: str) -> Tensor:
            if fault and fault[1] == name and fault[0] in (None, rank):  # noqa: B023
                return torch.full_like(grad, fault[2])  # noqa: B023
            return grad

        for name, parameter in net.named_parameters():
            parameter.register_hook(partial(spoil, name=name))
        for step in range(steps):
            if not scaled and step in bad:
                continue
            fault = bad.get(step)
            optimizer.zero_grad()
            torch.manual_seed(1000 * step + rank)
            loss = model(torch.randn(8, 30)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.add(scaler.get_scale())
        digests.append(hash_of(net))
        if scaled and hook == "push_pull":
            skipped = state.skipped
        state.close()
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, digests)
    return digests, everyone, sorted(scales), skipped


# Of the engine, its messages or channel, where something goes wrong; calls before.
STAGES = {
    "encode": 6,
    "pack": 9,
    "unpack": 6,
    "reduce_scatter": 3,
    "all_gather": 3,
    "keep_residuals": 3,
    "apply": 3,
    "push_and_pull": 3,
    "_unsealed": 6,
}
WITH_OWNERS = {"reduce_scatter", "all_gather", "keep_residuals", "apply"}


def a_stage_fails(rank: int, world: int, seed: int) -> tuple[str, float, str]:
    """Raise somewhere on one rank; return where, when (monotonic), and what is said."""
    chance = random.Random(seed)
    hook, culprit = chance.choice(HOOKS), chance.randrange(world)
    # Its statistics are averaged, too. DDP would wait for them in every forward.
    normed = nn.Sequential(nn.BatchNorm1d(30), small_net())
    direct = hook in (WITHOUT_OWNERS, AVERAGING)
    run = Run(hook, net=normed if hook.startswith("local_sgd") else None, direct=direct)
    engine = run.state.engine
    unused = WITH_OWNERS if direct else {"push_and_pull"}
    if hook.startswith("ddp"):
        unused = {*unused, "_unsealed"}
    stage = chance.choice([name for name in STAGES if name not in unused])
    owner = next(
        one for one in (engine, engine.messages, engine.channel) if hasattr(one, stage)
    )
    good, left, at = getattr(owner, stage), chance.randrange(STAGES[stage]), 0.0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal left, at
        left -= 1
        if left < 0:
            at = at or time.monotonic()
            raise RuntimeError(f"injected into {stage}")
        return good(*args, **kwargs)

    # In its second forward DDP has a collective of its own, to arrange its buckets. A
    # rank that fails before and lives on, as none does but here, is waited for there.
    run.train(rank, range(2))
    if rank == culprit:
        setattr(owner, stage, fail)
    said = "nothing"
    try:
        run.train(rank, range(2, 40))
    except Exception as error:  # noqa: BLE001  # the test looks at what it is
        said, at = f"{type(error).__name__}: {error}", at or time.monotonic()
    run.state.close()
    return f"rank {culprit}, {hook}, {stage}", at, said


def uneven_local_steps(
    rank: int, world: int, tokens: list[float] | None = None
) -> tuple[str, float]:
    """Each rank makes another number of steps, the last one none; uncoded.

    Returns:
        The hash of the model, and how far it was from the weighted mean of the ranks'.
    """
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    state = local_sgd.attach(
        net, optimizer, Settings(exclude=("*",)), sync_every="manual"
    )
    apart = 0.0
    for round_ in range(4):
        for step in range(world - 1 - rank):
            optimizer.zero_grad()
            torch.manual_seed(1000 * round_ + 10 * step + rank)
            net(torch.randn(8, 30)).square().mean().backward()
            optimizer.step()
        everyone: list[Any] = [None] * world
        mine = {n: p.detach().clone() for n, p in net.named_parameters()}
        dist.all_gather_object(everyone, mine)
        state.exchange(None if tokens is None else tokens[rank])
        weights = tokens or [float(world - 1 - r) for r in range(world)]
        for name, parameter in net.named_parameters():
            mean = sum(w * e[name] for w, e in zip(weights, everyone, strict=True))
            mean /= sum(weights)
            apart = max(apart, float((parameter.detach() - mean).abs().max()))
    for weight in (-1.0, math.nan, True, "3", 10**30):
        try:
            state.exchange(weight)  # type: ignore[arg-type]
        except lc3.ConfigError as error:
            assert "must be a number from 0 to 1e+18" in str(error)  # noqa: PT017
        else:
            raise AssertionError(weight)
    state.close()
    return hash_of(net), apart


def uneven_goes_on(rank: int, world: int) -> list[str]:
    """Rank 0 makes steps, the other one after a state was saved; or after none was."""
    ends = []
    config = Settings(density=0.1, min_numel=64, min_shard=500)
    for stops in (False, True):
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        state = local_sgd.attach(net, optimizer, config, sync_every="manual")
        for step in range(4):
            if step == 3 and stops:
                saved = copy.deepcopy((net.state_dict(), state.state_dict()))
                state.close()
                net = small_net()
                optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
                state = local_sgd.attach(net, optimizer, config, sync_every="manual")
                net.load_state_dict(saved[0])
                state.load_state_dict(saved[1])
            if rank == (step == 3):
                optimizer.zero_grad()
                torch.manual_seed(step)
                net(torch.randn(8, 30)).square().mean().backward()
                optimizer.step()
        state.exchange()
        ends.append(hash_of(net))
        state.close()
    return ends


def a_replica_drifts(rank: int, world: int, hook: str) -> str:
    """One bit of one parameter changes on rank 1; return what is said."""
    run = Run(hook)
    run.train(rank, range(4))
    run.state.check_replicas()
    with torch.no_grad():
        if rank == 1:
            bits = run.net.get_parameter("2.weight").view(-1).view(torch.int32)
            bits[7] ^= 1
    try:
        run.state.check_replicas()
    except lc3.ReplicasDiffer as error:
        return str(error)
    finally:
        run.state.close()
    return "nothing"
