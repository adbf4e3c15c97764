"""Long runs with faults: ``make soak``. CI runs a short form of each.

``steps`` trains three ranks in one process beside the oracle, with inf, nan, silent
ranks and slow ones, and checks every step bit for bit, residuals included.
``overflows`` makes steps that a GradScaler skips, which must never have been.
``raises`` lets some stage fail on some rank and looks how soon the others know.
``kills`` kills workers of a torchrun job at random moments until it has got through
anyway. ``worlds`` kills whole jobs, and goes on with other numbers of ranks.
``signals.campaign`` kills, stops and holds up ranks that nobody starts again.
"""

import argparse
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from lc3.checkpoint import load_checkpoint, merge
from lc3.codec import codec_for
from lc3.config import Settings
from lc3.engines.direct import engine_for
from lc3.meter import Meter
from lc3.plan import make_plan
from lc3.transport.loopback import Loopback
from lc3.wire.coder import Coder
from tests import checkpoint_cases, signals
from tests.oracle import Oracle
from tests.ranks import Ranks

ROOT = Path(__file__).parents[1]
WORLD = 3
SHAPES = [("a", (50, 40)), ("bias", (30,)), ("b", (1, 3000)), ("c", (7, 11, 13))]
CONFIG = Settings(min_numel=64, min_shard=900, threads=1)
DIRECT = dataclasses.replace(CONFIG, topology="direct")
GROWTH_FROM = 0.3  # of the run; before it, allocators are still warming up


def resident_bytes() -> int:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Return how many file descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))


def steps(count: int, seed: int, config: Settings = CONFIG) -> dict[str, float]:
    """Run ``count`` steps with faults; return what was seen.

    Raises:
        AssertionError: a mean or a residual is not the oracle's, to the bit.
    """
    chance = random.Random(seed)
    generator = np.random.default_rng(seed)
    plan = make_plan(SHAPES, WORLD, config)
    codec = codec_for(torch.device("cpu"))
    engines = [
        engine_for(plan, config, transport, Coder(codec), Meter())
        for transport in Loopback(WORLD).ranks
    ]
    oracle = Oracle(SHAPES, WORLD, config)
    seen = {"steps": 0.0, "non-finite": 0.0, "silent": 0.0, "slow": 0.0}
    memory = threads = files = 0
    with ThreadPoolExecutor(WORLD) as pool, np.errstate(all="ignore"):
        for step in track(range(count), "soak", transient=True):
            scale = np.float32(2.0 ** chance.randint(-8, 8))  # a scaler, a new rate
            grads = [
                {
                    name: (generator.standard_normal(n) ** 3 * scale).astype(np.float32)
                    for name, n in plan.numel.items()
                }
                for _ in range(WORLD)
            ]
            fault = chance.choices(
                ("none", "non-finite", "silent", "slow"), (90, 4, 4, 2)
            )[0]
            bad = grads[chance.randrange(WORLD)]
            name = chance.choice(list(bad))
            if fault == "non-finite":
                at = chance.randrange(plan.numel[name])
                bad[name][at] = chance.choice((np.inf, -np.inf, np.nan))
            elif fault == "silent":
                bad[name][:] = 0
            late = chance.randrange(WORLD) if fault == "slow" else None
            if fault != "none":
                seen[fault] += 1
            expected = oracle.step([{k: v.copy() for k, v in g.items()} for g in grads])

            def reduce(
                rank: int, step: int = step, late: int | None = late
            ) -> dict[str, torch.Tensor]:
                if rank == late:
                    time.sleep(0.005)
                mine = {k: torch.from_numpy(v) for k, v in grads[rank].items()}  # noqa: B023
                engines[rank].all_reduce(mine, step, 0)
                return mine

            for means in pool.map(reduce, range(WORLD)):
                for key, mean in means.items():
                    np.testing.assert_array_equal(mean.numpy(), expected[key])
            for rank, engine in enumerate(engines):
                for key, residual in engine.residuals.sent.items():
                    np.testing.assert_array_equal(
                        residual.numpy(), oracle.sent[rank][key]
                    )
            seen["steps"] += 1
            if step == int(GROWTH_FROM * count):
                memory, threads, files = (
                    *(resident_bytes(), threading.active_count()),
                    open_files(),
                )
        seen["memory growth, %"] = 100 * (resident_bytes() / memory - 1)
        seen["more threads"] = threading.active_count() - threads
        seen["more files"] = open_files() - files
    for engine in engines:
        engine.close()
    return seen


def overflows(count: int, seed: int, pool: Ranks) -> dict[str, float]:
    """Let a GradScaler skip ``count`` steps; the parameters are those without them.

    Raises:
        AssertionError: they are not, or ranks differ.
    """
    steps = 2 * count + 20
    bad = checkpoint_cases.overflows(count, steps, pool.world, seed)
    seen = set()
    for hook in ("ddp", "push_pull"):
        for digests, everyone, scales, skipped in pool.run(
            checkpoint_cases.with_a_scaler, hook, steps, bad, timeout_s=600
        ):
            assert digests[0] == digests[1], hook
            assert all(theirs == digests for theirs in everyone), hook
            seen.update(scales)
            assert skipped == (count if hook == "push_pull" else 0)
    return {
        "steps": 2 * steps,
        "overflows": 2 * count,
        "of the owner's sum": 2 * sum(rank is None for rank, *_ in bad.values()),
        "scales": len(seen),
    }


def raises(count: int, seed: int, pool: Ranks) -> dict[str, float]:
    """Let ``count`` stages fail; every other rank must name the rank that did.

    Raises:
        AssertionError: one does not, or not within 5 s.
    """
    delays = []
    for trial in track(range(seed, seed + count), "raises", transient=True):
        found = pool.run(checkpoint_cases.a_stage_fails, trial)
        where = found[0][0]
        culprit = int(where.split(",")[0].split()[1])
        start = found[culprit][1]
        assert "injected" in found[culprit][2], (where, found)
        for rank, (_, at, said) in enumerate(found):
            if rank != culprit:
                assert said.startswith(f"PeerError: rank {culprit} stopped: "), (
                    where,
                    said,
                )
                delays.append(at - start)
    assert max(delays) <= 5.0
    return {"raises": count, "heard": len(delays), "longest delay, s": max(delays)}


def torchrun(folder: Path, world: int, count: int, restarts: int) -> list[str]:
    """Return the command of a job that saves often."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world), "--max-restarts", str(restarts)]
    command += [
        "--monitor-interval",
        "0.2",
        "-m",
        "launch.train",
        "--steps",
        str(count),
    ]
    return [*command, "--checkpoints", str(folder), "--save-every", "8"]


def run(command: list[str], kill: int = 0, seed: int = 0) -> tuple[str, int]:
    """Run a job, killing ``kill`` of its workers on the way; return output, kills.

    Raises:
        RuntimeError: the job failed.
    """
    chance = random.Random(seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        killed = 0
        while job.poll() is None:
            time.sleep(0.02)
            if killed < kill and (workers := children(job.pid)):
                # Some die while they start, some in training, some while they save.
                time.sleep(chance.uniform(0.0, 8.0))
                if victim := chance.choice(children(job.pid) or [0]):
                    os.kill(victim, signal.SIGKILL)
                    killed += 1
                    while set(children(job.pid)) & set(workers) and job.poll() is None:
                        time.sleep(0.02)
        output.seek(0)
        text = output.read()
    if job.returncode:
        raise RuntimeError(f"the job failed after {killed} kills:\n{text[-3000:]}")
    return text, killed


def children(pid: int) -> list[int]:
    """Return the Python processes that a process has started."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in found]


def parameters(text: str) -> str:
    """Return the digest of the trained parameters that rank 0 has printed."""
    (found,) = re.findall(r"parameters ([0-9a-f]{16})", text)
    return str(found)


def kills(wanted: int, count: int, seed: int) -> dict[str, float]:
    """Kill workers until ``wanted`` have died; the parameters are those of no kill.

    Raises:
        AssertionError: they are not.
    """
    with tempfile.TemporaryDirectory() as folder:
        straight, _ = run(torchrun(Path(folder) / "straight", 2, count, 0))
        expected = parameters(straight)
        done = jobs = 0
        while done < wanted:
            place = Path(folder) / str(jobs)
            # A worker that dies while ranks connect takes the others' attempt with it.
            command = torchrun(place, 2, count, restarts=4 * wanted)
            text, killed = run(command, min(5, wanted - done), seed + jobs)
            assert parameters(text) == expected, (jobs, text[-2000:])
            done, jobs = done + killed, jobs + 1
            print(f"{done} of {wanted} killed, parameters {expected} each time")
    return {"killed": done, "jobs": jobs}


def worlds(sizes: Sequence[int], count: int, seed: int) -> dict[str, float]:
    """Kill jobs whole, and go on with another number of ranks; the last one ends.

    Returns:
        accuracy: at the end, and without any kill, in percent.
        pending: largest relative difference, over every change of world, between the
            sum of what was not sent before and after.
    """
    chance = random.Random(seed)
    apart = 0.0
    with tempfile.TemporaryDirectory() as folder:
        straight, _ = run(torchrun(Path(folder) / "straight", sizes[0], count, 0))
        place = Path(folder) / "changing"
        for number, world in enumerate(sizes[:-1], start=1):
            _until_saved(torchrun(place, world, count, 0), place, count, number, chance)
            (step,) = place.glob("step-*")
            saved = [load_checkpoint(file) for file in sorted(step.glob("*.pt"))]
            assert len(saved) == world
            states = [state["kept"][-1] for state in saved]
            merged = merge(states)
            for name, mean in merged["sent"].items():
                total = sum(state["sent"][name].double() for state in states)
                left = (mean.double() * world - total).norm()
                apart = max(apart, float(left / total.norm()))
            print(f"{world} ranks killed after {step.name}; on with {sizes[number]}")
        text, _ = run(torchrun(place, sizes[-1], count, 0))
        assert "from step 0" not in text
    accuracy = [
        float(re.findall(r"accuracy ([0-9.]+)", said)[0]) for said in (text, straight)
    ]
    return {"accuracy": accuracy[0], "of no kill": accuracy[1], "pending": apart}


def _until_saved(
    command: list[str], place: Path, count: int, part: int, chance: random.Random
) -> None:
    """Run a job, and kill all of it some time after it has saved in its third."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        due = count * part // 4
        while job.poll() is None:
            saved = [int(path.name[5:]) for path in place.glob("step-*")]
            if saved and max(saved) >= due:
                time.sleep(chance.uniform(0.0, 0.5))
                for pid in [job.pid, *children(job.pid)]:
                    os.kill(pid, signal.SIGKILL)
                job.wait()
                return
            time.sleep(0.02)
        output.seek(0)
        raise RuntimeError(f"the job ended by itself:\n{output.read()[-3000:]}")


def main() -> None:
    """Run what is asked for and print what was seen."""
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--overflows", type=int, default=100, help="for each hook")
    parser.add_argument("--raises", type=int, default=100)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--train", type=int, default=400, help="steps of a killed job")
    parser.add_argument(
        "--worlds", type=int, nargs="*", default=[4, 3, 4], help="numbers of ranks"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps:
        print(steps(options.steps, options.seed))
        print(steps(options.steps, options.seed, DIRECT))
    if options.overflows or options.raises:
        pool = Ranks(WORLD)
        if options.overflows:
            print(overflows(options.overflows, options.seed, pool))
        if options.raises:
            print(raises(options.raises, options.seed, pool))
        pool.close()
    if options.signals:
        print(signals.campaign(options.signals, options.seed))
    if options.worlds:
        print(worlds(options.worlds, options.train, options.seed))
    if options.kills:
        print(kills(options.kills, options.train, options.seed))


if __name__ == "__main__":
    main()
