"""What the ranks of ``test_modes`` do: every combination of DDP's modes."""

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lc3 import Lc3Error
from lc3.config import Settings
from lc3.hooks import ddp
from tests.ddp_cases import CONFIG, Case, equals_the_oracle, flat, hash_of
from tests.oracle import Oracle

GRAPHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}


def matrix() -> Iterator[tuple[str, Case]]:
    """Yield every combination of DDP's options, accumulation and dtypes.

    Except a static graph whose first backward is under ``no_sync``: DDP itself fails
    there, see ``static_graph_that_begins_unsynchronised``.
    """
    for graph, view, last, accumulate, dtype in itertools.product(
        GRAPHS,
        (False, True),
        (False, True),
        (1, 2),
        (torch.float32, torch.bfloat16, torch.float16),
    ):
        if graph == "static" and accumulate == 2:
            continue
        options = {
            "bucket_cap_mb": 0.1,
            "gradient_as_bucket_view": view,
            **GRAPHS[graph],
        }
        case = Case(
            tuple(options.items()),
            used={
                "plain": "True",
                "unused": "(step + rank) % 3 == 0 and step % 4 > 0",
                "static": "rank == 0",
            }[graph],
            accumulate=accumulate,
            channels_last=last,
            dtype=dtype,
            steps=5,
        )
        yield f"{graph}, view {view}, {last=}, {accumulate=}, {dtype}", case


def every_combination(rank: int, world: int) -> list[str]:
    """Compare all of them with the oracle; return their names."""
    done = []
    for name, case in matrix():
        try:
            equals_the_oracle(rank, world, case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        done.append(name)
    return done


def static_graph_that_begins_unsynchronised(rank: int, world: int) -> list[str]:
    """Return what DDP says without lc3, and with it."""
    said = []
    for attached in (False, True):
        torch.manual_seed(11)
        model = DistributedDataParallel(Wide(), static_graph=True)
        state = ddp.attach(model, config=CONFIG) if attached else None
        try:
            with model.no_sync():
                model(batch(rank, 0)).square().mean().backward()
            model(batch(rank, 1)).square().mean().backward()
        except RuntimeError as error:
            said.append(str(error))
        if state is not None:
            state.close()
    return said


def static_graph_accumulates(rank: int, world: int) -> bool:
    """Accumulate with a static graph, once DDP has seen it in a synchronised step."""
    model = DistributedDataParallel(Wide(), static_graph=True, bucket_cap_mb=0.02)
    state = ddp.attach(model, config=CONFIG)
    oracle = oracle_of(model, world)
    for step in range(5):
        parts = [batch(rank, 10 * step + part) for part in range(2 if step else 1)]
        mine = [local_grads(model, x) for x in parts]
        local = {name: sum(grads[name] for grads in mine) for name in mine[0]}
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, local)
        expected = oracle.step(everyone)
        model.zero_grad()
        for x in parts[:-1]:
            with model.no_sync():
                model(x).square().mean().backward()
        model(parts[-1]).square().mean().backward()
        for name, p in model.module.named_parameters():
            np.testing.assert_array_equal(flat(p, p.grad), expected[name], name)
    state.close()
    return True


class Wide(nn.Module):
    """Two layers, and nothing that a compiler would fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.last = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(torch.relu(self.first(x))))


def wrapped(cap_mb: float = 0.02, view: bool = False) -> Any:
    torch.manual_seed(11)
    return DistributedDataParallel(
        Wide(), bucket_cap_mb=cap_mb, gradient_as_bucket_view=view
    )


def local_grads(model: Any, x: torch.Tensor) -> dict[str, Any]:
    """Return this rank's own gradients, flat."""
    shadow = Wide()
    shadow.load_state_dict(model.module.state_dict())
    shadow(x).square().mean().backward()
    return {name: flat(p, p.grad) for name, p in shadow.named_parameters()}


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 64, generator=generator)


def oracle_of(model: Any, world: int) -> Oracle:
    shapes = [(n, tuple(p.shape)) for n, p in model.module.named_parameters()]
    return Oracle(shapes, world, CONFIG)


def joins(rank: int, world: int, view: bool) -> int:
    """Ranks with other numbers of batches, under ``join``; return how many it had."""
    model = wrapped(view=view)
    state = ddp.attach(model, config=CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    oracle, longest = oracle_of(model, world), 3 + 2 * (world - 1)
    mine = 3 + 2 * rank
    replay = {n: flat(p, p.detach()).copy() for n, p in model.module.named_parameters()}
    with model.join():
        for step in range(mine):
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            optimizer.step()
    # Again without lc3: a rank that has no batch left gives zeros.
    for step in range(longest):
        everyone = []
        for other in range(world):
            shadow = Wide()
            with torch.no_grad():
                for name, p in shadow.named_parameters():
                    p.copy_(torch.from_numpy(replay[name]).view(p.shape))
            if step < 3 + 2 * other:
                shadow(batch(other, step)).square().mean().backward()
            everyone.append({n: flat(p, p.grad) for n, p in shadow.named_parameters()})
        for name, mean in oracle.step(everyone).items():
            replay[name] -= np.float32(0.1) * mean
    for name, p in model.module.named_parameters():
        np.testing.assert_allclose(
            flat(p, p.detach()), replay[name], rtol=1e-5, atol=1e-7, err_msg=name
        )
    state.check_replicas()
    state.close()
    return mine


def backward_twice(rank: int, world: int) -> bool:
    """Two synchronised backward passes a step: DDP averages what has piled up."""
    model = wrapped()
    state = ddp.attach(model, config=CONFIG)
    oracle = oracle_of(model, world)
    for step in range(4):
        model.zero_grad()
        piled: dict[str, Any] = {name: 0 for name, _ in model.module.named_parameters()}
        for part in range(2):
            x = batch(rank, 10 * step + part)
            local = {n: g + piled[n] for n, g in local_grads(model, x).items()}
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, local)
            expected = oracle.step(everyone)
            model(x).square().mean().backward()
            for name, p in model.module.named_parameters():
                np.testing.assert_array_equal(flat(p, p.grad), expected[name], name)
            piled = expected
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    state.close()
    return True


def compiled(rank: int, world: int, mode: str) -> str:
    """Train under torch.compile with one of its modes for DDP; return a hash."""
    import torch._dynamo

    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.reset()
    try:
        if mode != "eager":
            torch._dynamo.config.optimize_ddp = mode  # type: ignore[assignment]
        model = wrapped(cap_mb=25)
        state = ddp.attach(model, config=CONFIG)
        run = model if mode == "eager" else torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            run(batch(rank, step)).square().mean().backward()
            optimizer.step()
        assert state.meter.steps == 4
        assert state.meter.ratio > 1
        state.close()
    except Lc3Error as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch._dynamo.config.optimize_ddp = before
        torch._dynamo.reset()
    return hash_of(model.module)


def random_runs(rank: int, world: int, runs: int, seed: int) -> int:
    """Random models, buckets, modes; delays on random ranks; return how many ran."""
    drawn, late = random.Random(seed), random.Random(1000 * seed + rank)
    for run in range(runs):
        layers = [drawn.randint(1, 90) for _ in range(drawn.randint(2, 6))]
        torch.manual_seed(run)
        net = nn.Sequential(*map(nn.Linear, layers, layers[1:]))
        model = DistributedDataParallel(
            net,
            bucket_cap_mb=drawn.choice([0.001, 0.005, 0.02, 25]),
            gradient_as_bucket_view=drawn.random() < 0.5,
        )
        mesh = 2 if world == 4 and drawn.random() < 0.4 else None
        config = Settings(
            sparsity=drawn.uniform(1, 1.9),
            min_numel=drawn.choice([0, 50, 1000]),
            min_shard=drawn.choice([1, 500, 16384]),
            block_size=drawn.choice([None, 64]),
            entropy=drawn.choice(["auto", "none", "rans", "zstd"]),
            mode="3lc" if mesh else drawn.choice(["3lc", "3lc", "auto"]),
        )
        state = ddp.attach(model, config=config, mesh=mesh)
        original = state.engine.transport.all_to_all

        def slow(
            messages: Any, timeout_s: float | None = None, to: Any = original
        ) -> Any:
            if late.random() < 0.2:
                time.sleep(late.uniform(0, 0.01))
            return to(messages, timeout_s)

        state.engine.transport.all_to_all = slow  # type: ignore[method-assign]
        for step in range(drawn.randint(2, 6)):
            if late.random() < 0.3:
                time.sleep(late.uniform(0, 0.02))
            torch.manual_seed(100 * step + rank)
            model(torch.randn(3, layers[0])).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None
                    p.sub_(p.grad, alpha=0.1)
                    p.grad = None
        state.check_replicas()
        state.close()
    return runs
