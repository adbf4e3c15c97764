"""What Horovod's ranks do for ``test_horovod``: the names of cases are arguments.

Rank 0 prints the results of all cases as one line of JSON.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn

import lc3
from lc3.config import Settings
from lc3.hooks import horovod as hook
from tests.oracle import Oracle

CONFIG = Settings(min_numel=64, min_shard=500)
STEPS = 24


class Net(nn.Module):
    """Three layers, of which the middle one is used when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(30, 50)
        self.spare = nn.Linear(50, 50)
        self.last = nn.Linear(50, 4)

    def forward(self, x: Tensor, use_spare: bool) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.as_tensor(self.last(self.spare(x) if use_spare else x))


def make_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


def backward(
    net: Net, rank: int, step: int, part: int = 0, spare: str = "True"
) -> None:
    """One backward pass of a rank; ``spare`` says where the middle layer is used."""
    generator = torch.Generator().manual_seed(10_000 * part + 100 * step + rank)
    dtype = net.first.weight.dtype
    x = torch.randn(8, 30, generator=generator).to(dtype)
    use = eval(spare, {"rank": rank, "step": step})  # of this file only
    net(x, use).float().square().mean().backward()


def gradients(
    net: Net, copy_of: Net, rank: int, step: int, parts: int, spare: str
) -> Any:
    """Return what a rank's passes leave in ``grad``, computed on a copy."""
    copy_of.load_state_dict(net.state_dict())
    copy_of.zero_grad()
    for part in range(parts):
        backward(copy_of, rank, step, part, spare)
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad)
        .float()
        .reshape(-1)
        .numpy()
        .copy()
        for name, p in copy_of.named_parameters()
    }


def wrapped(net: nn.Module, config: Settings = CONFIG, **options: Any) -> Any:
    plain = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return hook.DistributedOptimizer(
        plain, net.named_parameters(), config=config, **options
    )


def digest(net: nn.Module) -> str:
    data = b"".join(p.detach().float().numpy().tobytes() for p in net.parameters())
    return hashlib.sha256(data).hexdigest()


def alike(net: nn.Module) -> bool:
    return len(set(hvd.allgather_object(digest(net)))) == 1


def equals_the_oracle(
    parts: int = 1, spare: str = "True", dtype: torch.dtype = torch.float32
) -> bool:
    """Train beside the oracle; every gradient and parameter has the same bits."""
    net, shadow, copy_of = make_net(dtype), make_net(dtype), make_net(dtype)
    optimizer = wrapped(net, backward_passes_per_step=parts)
    theirs = torch.optim.SGD(shadow.parameters(), lr=0.05, momentum=0.9)
    shapes = [(name, tuple(p.shape)) for name, p in net.named_parameters()]
    oracle = Oracle(shapes, hvd.size(), CONFIG)
    for step in range(STEPS):
        said = [
            gradients(net, copy_of, rank, step, parts, spare)
            for rank in range(hvd.size())
        ]
        means = oracle.step(said)
        for part in range(parts):
            backward(net, hvd.rank(), step, part, spare)
        optimizer.step()
        for name, p in shadow.named_parameters():
            p.grad = torch.from_numpy(means[name]).view(p.shape).to(dtype)
        theirs.step()
        for (name, mine), other in zip(
            net.named_parameters(), shadow.parameters(), strict=True
        ):
            assert torch.equal(mine, other), (step, name)
        optimizer.zero_grad()
    assert optimizer.lc3.meter.steps == STEPS
    assert optimizer.lc3.meter.ratio > 3
    optimizer.lc3.close()
    return alike(net)


def half_precision() -> bool:
    return all(
        equals_the_oracle(dtype=dtype) for dtype in (torch.float16, torch.bfloat16)
    )


def accumulates() -> bool:
    return equals_the_oracle(parts=2)


def unused_on_one_rank() -> bool:
    return equals_the_oracle(spare="(rank + step) % 2 == 0 and step % 4 != 3")


def clips_between() -> bool:
    """``synchronize``, change the gradients, ``step`` under ``skip_synchronize``."""
    net = make_net()
    optimizer = wrapped(net)
    for step in range(5):
        backward(net, hvd.rank(), step)
        optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        assert norm > 1e-3
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
    optimizer.lc3.close()
    return alike(net)


def broadcasts() -> bool:
    """Ranks that start apart are brought together by Horovod's own functions."""
    torch.manual_seed(hvd.rank())
    net = Net()
    optimizer = wrapped(net)
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    for step in range(3):
        backward(net, hvd.rank(), step)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.lc3.close()
    return alike(net)


def resumes() -> bool:
    """Ten steps; or five, a checkpoint, and five more: the same bits."""

    def train(net: Net, optimizer: Any, steps: range) -> None:
        for step in steps:
            backward(net, hvd.rank(), step)
            optimizer.step()
            optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        net = make_net()
        optimizer = wrapped(net)
        train(net, optimizer, range(5))
        kept = [net.state_dict(), optimizer.state_dict(), optimizer.lc3.state_dict()]
        torch.save(kept, path)
        train(net, optimizer, range(5, 10))
        optimizer.lc3.close()
        straight = digest(net)
        saved = torch.load(path, weights_only=True)
    net = make_net()
    optimizer = wrapped(net)
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.lc3.load_state_dict(saved[2])
    train(net, optimizer, range(5, 10))
    optimizer.lc3.close()
    return bool(digest(net) == straight)


def float64_passes_through() -> bool:
    net = make_net(torch.float64)
    optimizer = wrapped(net)
    backward(net, hvd.rank(), 0)
    optimizer.step()
    passed = optimizer.lc3.meter.passed_through_bytes
    optimizer.lc3.close()
    return bool(passed > 0) and alike(net)


def a_process_set() -> bool:
    """Ranks 0 and 1 train together, the others do not."""
    everybody = hvd.size() == 2  # which has a process set already
    some = hvd.global_process_set if everybody else hvd.add_process_set([0, 1])
    net = make_net()
    if some.included():
        optimizer = wrapped(net, process_set=some)
        for step in range(3):
            backward(net, hvd.rank(), step)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.lc3.close()
    digests = hvd.allgather_object(digest(net))
    if not everybody:
        hvd.remove_process_set(some)
    return bool(digests[0] == digests[1])


def sent_on_loopback() -> list[float]:
    """Return all ranks' bytes by meter, and by loopback without idle chatter."""

    def counted() -> int:
        for line in Path("/proc/self/net/dev").read_text().splitlines():
            if line.strip().startswith("lo:"):
                return int(line.split(":")[1].split()[8])
        return 0

    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(4)))
    # Nothing is coded, so that there is something to count.
    optimizer = wrapped(net, Settings(exclude=("*",), entropy="none"))
    torch.manual_seed(hvd.rank())
    hvd.barrier()
    before, start = counted(), time.monotonic()
    for _ in range(10):
        net(torch.randn(4, 1000)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    hvd.barrier()
    during, seconds = counted() - before, time.monotonic() - start
    before = counted()
    time.sleep(seconds)
    idle = counted() - before
    meter = sum(hvd.allgather_object(optimizer.lc3.meter.sent_bytes))
    optimizer.lc3.close()
    return [meter, during - idle]


def refusals() -> list[str]:
    """What is said to arguments that do not fit, one sentence each."""
    net = make_net()
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    named = list(net.named_parameters())
    said = []
    for options in (
        {"op": hvd.Adasum},
        {"groups": 2},
        {"backward_passes_per_step": 0},
    ):
        try:
            hook.DistributedOptimizer(plain, named, **options)
        except lc3.Lc3Error as error:
            said.append(str(error))
    os.environ["WORLD_SIZE"] = "7"  # as if torchrun had started this
    try:
        hook.DistributedOptimizer(plain, named)
    except lc3.AttachError as error:
        said.append(str(error))
    finally:
        del os.environ["WORLD_SIZE"]
    try:
        hook.Compression.lc3.compress(torch.zeros(1))
    except lc3.AttachError as error:
        said.append(str(error))
    return said


def fails_on_rank_1() -> str:
    """Rank 1 breaks inside lc3; the others must hear why. Ends the job."""
    net = make_net()
    optimizer = wrapped(net)
    if hvd.rank() == 1:

        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a broken codec")

        optimizer.lc3.engine.messages.coder = type("Broken", (), {"encode": broken})()
    try:
        backward(net, hvd.rank(), 0)
        optimizer.step()
    except (lc3.PeerError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    hvd.init()
    torch.set_num_threads(1)
    results = {case: globals()[case]() for case in sys.argv[1:]}
    np.testing.assert_equal(hvd.size() > 1, True)
    everyone = hvd.allgather_object(results)
    if hvd.rank() == 0:
        print("RESULTS " + json.dumps(everyone), flush=True)


if __name__ == "__main__":
    main()
