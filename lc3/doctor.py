"""What to know before a long run: versions, the codec's speed, the link's.

python -m lc3 doctor                                            # this machine
torchrun --nnodes 2 … --no-python python -m lc3 doctor          # and the link
"""

import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch
import torch.distributed as dist

from lc3.codec import codec_for, decode_add, max_frame_bytes, warm_up
from lc3.config import Config
from lc3.exchange import GroupExchange
from lc3.measure import LINKS_BIT_S
from lc3.version import __version__
from lc3.workers import cores

_ELEMENTS = 4_000_000
_DENSITY = 0.05
_REPEATS = 7
_LINK_BYTES = 4_000_000
_TIMEOUT_S = 120


def _seconds(work: Callable[[], object], repeats: int = _REPEATS) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def codec_gb_s() -> tuple[float, float]:
    """Return GB/s of float32 that one thread encodes, and decodes, at 5 % density."""
    codec = codec_for(torch.device("cpu"))
    warm_up(codec)
    generator = torch.Generator().manual_seed(0)
    x = 0.2 * torch.rand(_ELEMENTS, generator=generator)
    x[torch.rand(_ELEMENTS, generator=generator) < _DENSITY] = 1.0
    room = torch.empty(max_frame_bytes(_ELEMENTS), dtype=torch.uint8)
    residual, values = torch.zeros_like(x), torch.zeros_like(x)
    work = x.clone()

    def encode() -> None:
        work.copy_(x)
        codec.encode(work, 1.0, room, residual)

    copying = _seconds(lambda: work.copy_(x))
    encoding = _seconds(encode) - copying
    work.copy_(x)
    used, _ = codec.encode(work, 1.0, room, residual)
    decoding = _seconds(lambda: decode_add(codec, room[:used], values))
    size = 4 * _ELEMENTS / 1e9
    return size / encoding, size / decoding


def link(exchange: GroupExchange) -> tuple[float, float]:
    """Return seconds of a small exchange, and bytes per second that a rank sends.

    Collective.
    """
    small = torch.zeros(1, dtype=torch.uint8)
    exchange.all_gather(small)
    round_s = _seconds(lambda: exchange.all_gather(small))
    large = torch.zeros(_LINK_BYTES // (exchange.world - 1), dtype=torch.uint8)
    whole_s = _seconds(lambda: exchange.all_gather(large), repeats=3)
    sent = large.numel() * (exchange.world - 1)
    return round_s, sent / max(whole_s - round_s, 1e-9)


def versions() -> list[str]:
    """Return a line for each package that matters, missing ones too."""
    lines = [f"lc3 {__version__}, Python {platform.python_version()}"]
    for name in ("torch", "numpy", "numba", "zstandard", "numba-cuda", "horovod"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name}: not installed")
    return lines


def report(elements: int, compute_ms: float) -> None:
    """Print everything; collective if torchrun's environment is there.

    Args:
        elements: parameters of the model that is to be trained.
        compute_ms: of one step, without communication.
    """
    in_job = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    first = not in_job or os.environ["RANK"] == "0"
    encode, decode = codec_gb_s()
    if first:
        print("\n".join(versions()))
        print(f"{cores()} cores for this process; torch uses {torch.get_num_threads()}")
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        print(f"CUDA devices: {devices}; gradients must be on the CPU in this version")
        print(
            f"codec, one thread, 5 % sent: encode {encode:.2f} GB/s of float32, "
            f"decode {decode:.2f}"
        )
    # Push and pull each encode once; the owner decodes what W ranks sent of 1/W of the
    # elements, everybody decodes the means.
    codec_s = 4 * elements / 1e9 * (1 / encode + 2 / decode)
    if not in_job:
        print(
            "start it with torchrun on every machine to measure the link between them"
        )
        _predict(elements, compute_ms, codec_s, 2, dict(LINKS_BIT_S))
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT_S))
    world = dist.get_world_size()
    if world > 1:
        assert dist.group.WORLD is not None
        round_s, rate = link(GroupExchange(dist.group.WORLD, torch.device("cpu")))
        if first:
            print(
                f"{world} ranks: {1e3 * round_s:.2f} ms a round, {rate / 1e6:.1f} MB/s "
                f"({8 * rate / 1e6:,.0f} Mbit/s) from each rank"
            )
            _predict(
                elements,
                compute_ms,
                codec_s + 2 * round_s,
                world,
                {"this link": 8 * rate},
            )
    dist.destroy_process_group()


def _predict(
    elements: int,
    compute_ms: float,
    extra_s: float,
    world: int,
    links: dict[str, float],
) -> None:
    """Print step times with and without, at the bits of a typical gradient."""
    bits = 2 * 0.4  # both hops at 5 % density, entropy stage on; see docs/codec.md
    dense = 2 * (world - 1) / world * 4 * elements
    sent = (world - 1) / world * elements * bits / 8
    even = 8 * (dense - sent) / extra_s
    print(
        f"for {elements:,} parameters, {compute_ms:g} ms of computing, {world} ranks, "
        "no overlap:"
    )
    for name, bit_s in links.items():
        plain = compute_ms + 8e3 * dense / bit_s
        coded = compute_ms + 1e3 * extra_s + 8e3 * sent / bit_s
        verdict = "compress" if coded < plain else "do not compress"
        print(
            f"  {name:11} float32 {plain:10,.1f} ms, 3LC {coded:10,.1f} ms: {verdict}"
        )
    print(
        f"  break-even: {even / 1e9:.2f} Gbit/s. {Config().entropy!r} entropy stage; "
        "python -m lc3 measure your_script.py tells what your gradients need"
    )
