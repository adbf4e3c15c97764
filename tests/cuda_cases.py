"""Everything the CUDA kernels must do, for numba's simulator and for a GPU alike.

    NUMBA_ENABLE_CUDASIM=1 python -m tests.cuda_cases      # in small blocks of threads
    python -m tests.cuda_cases                             # on the first GPU

Prints a line for each case, and ends with an error at the first that fails.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numba import config
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec import cuda, reference
from lc3.engines.engine import Engine
from lc3.meter import Meter
from lc3.plan import make_plan
from lc3.transport.protocol import Transport
from lc3.wire.coder import Coder, Sums
from tests.oracle import Oracle
from tests.test_engine import SMALL, in_threads, random_gradients

SIMULATED = bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]
if SIMULATED:
    from numba.cuda.simulator import kernelapi

    def _shared_array(self: Any, shape: int, dtype: Any) -> NDArray[Any]:
        """Return one array for a line of a kernel, whichever thread asks first.

        The simulator's own looks and then stores, so that now and then two threads of a
        block are given an array each, and the kernel's result is wrong.
        """
        frame = sys._getframe(1)
        place = frame.f_code.co_filename, frame.f_lineno
        found: NDArray[Any] = self._allocations.setdefault(
            place, kernelapi.np.empty(shape, dtype)
        )
        return found

    kernelapi.FakeCUDAShared.array = _shared_array  # type: ignore[method-assign]
DEVICE = torch.device("cpu" if SIMULATED else "cuda")
FLOAT32_MAX = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

Piece = tuple[Tensor, Tensor | None]


def special(numel: int, chance: np.random.Generator) -> Iterator[Tensor]:
    """Yield values that a format or a kernel could get wrong."""
    noise = torch.from_numpy(chance.standard_normal(numel).astype(np.float32))
    yield noise**3
    yield torch.zeros(numel)
    yield -torch.zeros(numel)
    for at, value in ((0, torch.inf), (numel // 2, torch.nan), (numel - 1, -torch.inf)):
        broken = noise.clone()
        broken[at] = value
        yield broken
    for at in (0, numel // 3, numel - 1):  # runs of zeros around one value
        lone = torch.zeros(numel)
        lone[at] = -3
        yield lone
    yield torch.full((numel,), FLOAT32_MAX)
    yield noise.sign() * SMALLEST
    yield noise * 1e-42
    yield torch.where(noise.abs() > 2, noise, 0)
    yield torch.where(noise > 0, 1.0, 0.5)  # on the threshold of s = 1


def compare(pieces: Sequence[Piece], sparsity: float, density: float | None) -> None:
    """Encode a batch, and add its frames; both like the reference, every bit."""
    arena = torch.cat([x for x, _ in pieces]).to(DEVICE)
    sizes = [x.numel() for x, _ in pieces]
    values = torch.split(arena, sizes)
    owing = torch.cat([torch.zeros(3), *(r for _, r in pieces if r is not None)])
    rooms = iter(
        torch.split(
            owing[3:].to(DEVICE), [r.numel() for _, r in pieces if r is not None]
        )
    )
    residuals = [None if r is None else next(rooms) for _, r in pieces]
    coder = Coder(cuda, device=DEVICE)
    frames = coder.encode(values, residuals, sparsity, density)
    sums = []
    for (x, r), mine, (frame, digits) in zip(pieces, values, frames, strict=True):
        expected = x.clone()
        out = torch.empty(reference.max_frame_bytes(x.numel()), dtype=torch.uint8)
        used, nonzero = reference.encode(expected, sparsity, out, r, density)
        assert bytes(frame.numpy()) == bytes(out[:used].numpy())
        assert digits == nonzero
        assert same_bits(mine, expected)
        assert cuda.check(frame, x.numel()) == used
        sums.append(frame.clone())
    # Each piece gets its own frame twice, between a value and its neighbours.
    start = torch.linspace(-1, 1, sum(sizes) + 2)
    on_device = start.to(DEVICE)
    accs = torch.split(on_device[1:-1], sizes)
    coder.add([(acc, [frame, frame]) for acc, frame in zip(accs, sums, strict=True)])
    for acc, frame in zip(torch.split(start[1:-1], sizes), sums, strict=True):
        reference.add(frame, acc)
        reference.add(frame, acc)
    assert same_bits(on_device, start)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, but for the kind of NaN."""
    here, there = a.cpu(), b.cpu()
    both_nan = here.isnan() & there.isnan()
    equal = here.view(torch.int32) == there.view(torch.int32)
    return bool((both_nan | equal).all())


def lengths() -> list[int]:
    """Return lengths 1 … 2 000: around every block and run boundary, and others."""
    quartic = {
        edge + near
        for edge in (cuda.TILE, 2 * cuda.TILE, cuda.THREADS, cuda.RANGE, 14, 28)
        for near in (-1, 0, 1)
    }
    around = {5 * q + r for q in quartic for r in (-4, -1, 0, 1)}
    chance = np.random.default_rng(1)
    rest = chance.integers(1, 2001, 300).tolist()
    small = [n for n in sorted(around) if 1 <= n <= 2000]
    return [1, 2, 4, 5, 6, 69, 70, 71, *small, *rest][: 300 if SIMULATED else None]


def pieces_of_every_length() -> int:
    """Batches of 1 … 50 pieces of mixed lengths, with and without residuals."""
    chance, todo = np.random.default_rng(2), lengths()
    count, sparsities = len(todo), [1.0, 1.5, 1.75, 1.984375]
    while todo:
        some = [todo.pop() for _ in range(min(int(chance.integers(1, 51)), len(todo)))]
        batch: list[Piece] = []
        for numel in some:
            x = torch.from_numpy(chance.standard_normal(numel).astype(np.float32)) ** 3
            r = torch.from_numpy(chance.standard_normal(numel).astype(np.float32))
            batch.append((x, r if chance.random() < 0.7 else None))
        compare(batch, float(chance.choice(sparsities)), None)
    return count


def special_values() -> int:
    """Every special piece, one batch of all of them for each length."""
    chance, count = np.random.default_rng(3), 0
    for numel in (1, 7, 70, 333):
        batch: list[Piece] = [(x, None) for x in special(numel, chance)]
        owed = torch.from_numpy(chance.standard_normal(numel).astype(np.float32))
        batch += [(x, owed) for x in special(numel, chance)]
        compare(batch, 1.0, None)
        count += len(batch)
    return count


def densities() -> int:
    """A target density, also where a sample has nothing to choose from."""
    chance = np.random.default_rng(4)
    batch: list[Piece] = [(x, None) for x in special(200, chance)]
    compare(batch, 1.0, 0.1)
    return len(batch)


class OneAtATime(Coder):
    """For ranks that are threads: the simulator runs one kernel at a time."""

    _lock = threading.Lock()

    def encode(self, *arguments: Any) -> list[tuple[Tensor, int]]:
        with self._lock:
            return [(f.clone(), d) for f, d in super().encode(*arguments)]

    def _sum(self, sums: Sums, *, anew: bool) -> None:
        with self._lock:
            super()._sum(sums, anew=anew)


def whole_exchange() -> int:
    """Two ranks whose gradients are coded by the kernels equal the oracle."""
    shapes = [("a", (23, 40)), ("bias", (7,)), ("c", (311,)), ("d", (60, 5))]
    steps, world = 2, 2
    oracle = Oracle(shapes, world, SMALL)
    expected = []
    for step in range(steps):
        everyone = [random_gradients(rank, step, shapes) for rank in range(world)]
        given = [{k: g.numpy().copy() for k, g in one.items()} for one in everyone]
        expected.append(oracle.step(given))

    def job(rank: int, transport: Transport) -> None:
        plan = make_plan(shapes, world, SMALL)
        engine = Engine(
            plan, SMALL, transport, OneAtATime(cuda, device=DEVICE), Meter()
        )
        for step in range(steps):
            grads = random_gradients(rank, step, shapes)
            flat = torch.cat([g.view(-1) for g in grads.values()]).to(DEVICE)
            parts = torch.split(flat, [g.numel() for g in grads.values()])
            views = dict(zip(grads, parts, strict=True))
            engine.all_reduce(views, step, 0)
            for name, view in views.items():
                found = view.cpu().numpy()
                np.testing.assert_array_equal(found, expected[step][name], name)
        for name, buffer in engine.residuals.sent.items():
            found = buffer.cpu().numpy()
            np.testing.assert_array_equal(found, oracle.sent[rank][name], name)

    for result in in_threads(world, job):
        if isinstance(result, Exception):
            raise result
    return steps * world


def launches_that_are_kept() -> int:
    """Frames of ever other lengths do not make ever new launches."""
    chance = np.random.default_rng(6)
    batch, launches = cuda.Batch(DEVICE), set()
    launch = batch._launch

    def noted(kernel: Any, blocks: int, *arguments: Any) -> None:
        launches.add((id(kernel), blocks))
        launch(kernel, blocks, *arguments)

    batch._launch = noted  # type: ignore[assignment, method-assign]
    adds = 12
    for add in range(adds):
        noise = chance.standard_normal(600).astype(np.float32)
        noise[: 50 * add] = 0
        out = torch.empty(cuda.max_frame_bytes(600), dtype=torch.uint8)
        used, _ = reference.encode(torch.from_numpy(noise.copy()), 1.0, out)
        expected, found = torch.zeros(600), torch.zeros(600, device=DEVICE)
        reference.add(out[:used], expected)
        batch.add([(found, [out[:used]])])
        assert torch.equal(found.cpu(), expected)
    # Of 1 to 15 chunks under the simulator: 1, 2, 4, 8 or 16 blocks; and two more.
    assert len(launches) <= 7, launches
    return adds


CASES: tuple[Callable[[], int], ...] = (
    special_values,
    densities,
    whole_exchange,
    pieces_of_every_length,
    launches_that_are_kept,
)


def main() -> None:
    """Run the cases, all or those that are named."""
    parser = argparse.ArgumentParser(prog="tests.cuda_cases")
    names = {case.__name__: case for case in CASES}
    parser.add_argument("cases", nargs="*", choices=[*names, []])
    if SIMULATED:  # its scheduler polls, and holds the others up for as long
        sys.setswitchinterval(5e-5)
    chosen: list[str] = parser.parse_args().cases or list(names)
    where: Any = "the simulator" if SIMULATED else torch.cuda.get_device_name(DEVICE)
    for name in chosen:
        start = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore"):
            count = names[name]()
        seconds = time.perf_counter() - start
        print(f"{name}: {count} on {where}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
