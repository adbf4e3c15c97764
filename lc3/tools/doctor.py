"""What to know before a long run: versions, speeds of codec and link, which form wins.

python -m lc3 doctor                                            # this machine
torchrun --nnodes 2 … --no-python python -m lc3 doctor          # and the link
"""

import os
import platform
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from lc3.codec import codec_for, warm_up
from lc3.config import Settings
from lc3.engines.costs import Costs, codec_costs, measure, sent_bits
from lc3.knobs import DEFAULT, FOR_TWO
from lc3.tools.measure import LINKS_BIT_S
from lc3.transport.group import GroupTransport
from lc3.transport.handshake import machines
from lc3.transport.workers import cores
from lc3.version import __version__

_TIMEOUT_S = 120
_CLEAR = 1.25  # times faster; these are predictions from a second of measuring
# Local steps between two exchanges that cost little of what the optimizer learns.
_EVERY = {"SGD": 4, "Adam": 8}


def versions() -> list[str]:
    """Return a line for each package that matters, missing ones too."""
    lines = [f"lc3 {__version__}, Python {platform.python_version()}"]
    for name in ("torch", "numpy", "numba", "zstandard", "numba-cuda", "horovod"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name}: not installed")
    return lines


def _coded_by() -> str:
    """Say what codes gradients there."""
    backend = getattr(codec_for(torch.device("cuda")), "__name__", "")
    kernels = backend.endswith("cuda")
    return f"; coded by {'numba-cuda kernels' if kernels else 'torch operators'}"


def report(elements: int, compute_ms: float) -> None:
    """Print everything; collective if torchrun's environment is there.

    Args:
        elements: parameters of the model that is to be trained.
        compute_ms: milliseconds of one step, without communication.
    """
    in_job = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    first = not in_job or os.environ["RANK"] == "0"
    codec = codec_for(torch.device("cpu"))
    warm_up(codec)
    config = Settings()
    encode, decode = codec_costs(codec, config)
    if first:
        print("\n".join(versions()))
        print(f"{cores()} cores for this process; torch uses {torch.get_num_threads()}")
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        print(f"CUDA devices: {devices}{_coded_by() if devices else ''}")
        print(
            f"codec, one thread, 5 % sent: encode {4e-9 / encode:.2f} GB/s of float32, "
            f"decode {4e-9 / decode:.2f}; {config.entropy!r} entropy stage"
        )
    if not in_job:
        print(
            "start it with torchrun on every machine to measure the link between them"
        )
        every_step = Costs(encode, decode, 0.0, 0.0, 0.0, 0.0)
        encode, decode = codec_costs(codec, FOR_TWO)
        bits = sent_bits(codec, FOR_TWO)
        local = replace(every_step, encode=encode, decode=decode, bits=bits)
        links = {
            name: (
                replace(every_step, byte=8 / bit_s, reduce_byte=8 / bit_s),
                replace(local, byte=8 / bit_s),
            )
            for name, bit_s in LINKS_BIT_S.items()
        }
        _predict(elements, compute_ms, 2, links)
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT_S))
    world = dist.get_world_size()
    if world > 1:
        assert dist.group.WORLD is not None
        transport = GroupTransport(dist.group.WORLD, torch.device("cpu"))
        costs = measure(transport, codec, config, threads=1)
        sparse = FOR_TWO if world == 2 else DEFAULT
        local = measure(transport, codec, sparse, threads=1)
        alone = len(set(machines(transport))) == 1
        if first:
            print(
                f"{world} ranks, the slowest of them: {1e3 * costs.round:.2f} ms a "
                f"round, {1e-6 / costs.byte:.1f} MB/s ({8e-6 / costs.byte:,.0f} "
                "Mbit/s) from each to all others at once, as 3LC sends; an all-reduce "
                f"takes in {1e-6 / costs.reduce_byte:.1f} MB/s of a tensor"
            )
            if alone:
                print(
                    f"all ranks are on this machine and share its {cores()} cores: "
                    "between machines it is the link that counts"
                )
            _predict(elements, compute_ms, world, {"this link": (costs, local)})
    dist.destroy_process_group()


def _predict(
    elements: int, compute_ms: float, world: int, links: dict[str, tuple[Costs, Costs]]
) -> None:
    """Print step times by form, for one bucket that nothing hides, and break-even.

    Args:
        elements: parameters of the model.
        compute_ms: milliseconds of one step, without communication.
        world: number of ranks.
        links: costs of 3LC in every step and of local steps' exchanges, by link.
    """
    print(
        f"for {elements:,} parameters, {compute_ms:g} ms of computing, {world} ranks, "
        "no overlap:"
    )
    for name, (costs, local) in links.items():
        times = costs.predict(elements, world, direct=False)
        steps: dict[str, float] = {
            form: compute_ms + 1e3 * seconds for form, seconds in times.items()
        }
        direct_ms = 1e3 * costs.predict(elements, world, direct=True)["3lc"]
        times_faster = steps["float32"] / steps["3lc"]
        verdict = "no clear difference"
        if not 1 / _CLEAR < times_faster < _CLEAR:
            verdict = "compress" if times_faster > 1 else "do not compress"
        print(
            f"  {name:11} float32 {steps['float32']:10,.1f} ms, bfloat16 "
            f"{steps['bfloat16']:10,.1f} ms, 3LC {steps['3lc']:10,.1f} ms "
            f"(direct {compute_ms + direct_ms:,.1f} ms): {verdict}"
        )
        exchange_ms = 1e3 * local.predict(elements, world, direct=world == 2)["3lc"]
        said = []
        for optimizer, every in _EVERY.items():
            local_ms = compute_ms + exchange_ms / every
            form = _winner({**steps, f"local steps, H = {every}": local_ms})
            said.append(f"with {optimizer} {form} ({local_ms:,.1f} ms local)")
        print(f"  {'':11} predicted to win: {'; '.join(said)}")
    print(
        "  break-even with float32: about "
        f"{costs.break_even(elements, world, direct=False) / 1e9:.1g} "
        "Gbit/s, within a factor of two. python -m lc3 measure your_script.py tells "
        "what your gradients need"
    )
    print(
        f"  a form wins if it is {_CLEAR:g} times as fast as those that change less; "
        "in order: float32, bfloat16, 3LC (hooks.ddp), local steps (hooks.local_sgd, "
        "one exchange in H steps)"
    )


def _winner(step_ms: dict[str, float]) -> str:
    """Return the last form that is clearly faster than the best before it."""
    (best, *rest) = step_ms
    for form in rest:
        if _CLEAR * step_ms[form] < step_ms[best]:
            best = form
    return {"3lc": "3LC"}.get(best, best)
