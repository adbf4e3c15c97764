"""Values on a device, frames on the host: nothing else may cross."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lc3.codec import cpu, tensor
from lc3.engines.engine import Engine
from lc3.engines.exchange import pending
from lc3.engines.two_levels import TwoLevels
from lc3.masters.owners import owners_of
from lc3.meter import Meter
from lc3.plan import make_plan
from lc3.transport.loopback import LoopbackTransport
from lc3.transport.protocol import Transport
from lc3.wire.coder import Coder
from tests.oracle import Oracle
from tests.oracle import TwoLevels as TwoLevelsOracle
from tests.pretend import DEVICE, Pretend, on_the_device, there
from tests.test_engine import SHAPES, SMALL, in_threads, random_gradients

WORLD, STEPS = 4, 3


def raised(results: Sequence[Any]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


def test_the_device_refuses_what_a_device_refuses() -> None:
    with on_the_device():
        x = torch.zeros(4, device=DEVICE)
        assert isinstance(x, Pretend)
        with pytest.raises(RuntimeError, match="on the device and on the CPU"):
            x.add_(torch.ones(4))
        with pytest.raises(TypeError, match="to numpy"):
            x.numpy()
        x[1:3] = torch.ones(2)
        assert x.cpu().tolist() == [0, 1, 1, 0]
        assert not isinstance(x.cpu(), Pretend)


@pytest.mark.parametrize("nodes", [None, [[0, 1], [2, 3]]])
def test_gradients_on_a_device_equal_the_oracle(nodes: Any) -> None:
    oracle: Any = Oracle(SHAPES, WORLD, SMALL)
    if nodes:
        oracle = TwoLevelsOracle(SHAPES, nodes, SMALL)
    expected = [
        oracle.step(
            [
                {k: g.numpy() for k, g in random_gradients(rank, step).items()}
                for rank in range(WORLD)
            ]
        )
        for step in range(STEPS)
    ]

    def job(rank: int, transport: Transport) -> None:
        assert isinstance(transport, LoopbackTransport)
        plan = make_plan(SHAPES, WORLD, SMALL)
        with on_the_device():
            coder = Coder(tensor, device=DEVICE)
            engine = (
                TwoLevels(plan, SMALL, transport, nodes, coder, Meter())
                if nodes
                else Engine(plan, SMALL, transport, coder, Meter())
            )
            for step in range(STEPS):
                grads = {k: there(g) for k, g in random_gradients(rank, step).items()}
                engine.all_reduce(grads, step, 0)
                for name, grad in grads.items():
                    found = grad.cpu().numpy()
                    np.testing.assert_array_equal(found, expected[step][name], name)
            assert all(isinstance(b, Pretend) for b in engine.residuals.buffers())
            assert all(isinstance(p, Pretend) for p in pending(engine).values())
            passed = engine.channel.pass_through(
                there(torch.ones(7).double() * rank), 9, 0
            )
            assert isinstance(passed, Pretend)
            assert passed.tolist() == [1.5] * 7

    raised(in_threads(WORLD, job))


def test_masters_on_a_device_equal_those_on_the_host() -> None:
    def masters(device: bool) -> list[Any]:
        def job(rank: int, transport: Transport) -> list[Tensor]:
            plan = make_plan(SHAPES, WORLD, SMALL)
            with on_the_device() if device else nullcontext():
                put = there if device else torch.clone
                coder = Coder(tensor, device=DEVICE) if device else Coder(cpu)
                engine = Engine(plan, SMALL, transport, coder, Meter())
                start = {k: put(g) for k, g in random_gradients(0, 0).items()}
                owners = owners_of(engine, start)
                for step in range(STEPS):
                    moved = {
                        k: put(g) for k, g in random_gradients(rank, step + 1).items()
                    }
                    with engine.channel.exchanging(1, step, 0):
                        owners.push(moved, step, 0)
                        for piece in owners.owned:
                            owners.master(piece).sub_(owners.mean(piece), alpha=0.1)
                        owners.pull(moved, step, 0)
                exported = [v.cpu() for v in owners.export().values()]
                owners.flush()
                return exported + [v.cpu() for v in owners.replica.values()]

        results = in_threads(WORLD, job)
        raised(results)
        return results

    for here, on_device in zip(masters(False), masters(True), strict=True):
        for a, b in zip(here, on_device, strict=True):
            assert torch.equal(a, b)
