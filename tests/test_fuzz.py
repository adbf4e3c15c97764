"""The short form of ``make fuzz``; that its guard works; that memory stays flat."""

import sys
import tracemalloc
from pathlib import Path

import torch

import lc3
from lc3.codec import cpu
from lc3.format import max_frame_bytes
from tests import forked
from tests.fuzz import campaign


def test_a_short_campaign() -> None:
    said = campaign(40_000, seed=1)
    for kind, count in (("frames", 32_000), ("messages", 8_000)):
        assert sum(said[kind].values()) == count
        assert min(said[kind].values()) > count // 100


def test_the_guard_page_faults() -> None:
    code = (
        "import ctypes; from tests.fuzz import Guarded; m = Guarded(8).last(8);"
        "ctypes.memset(m.data_ptr() + 8, 0, 1)"
    )
    root = Path(__file__).parents[1]
    done = forked.run([sys.executable, "-c", code], cwd=root, timeout=60)
    assert done.returncode == -11


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def test_memory_is_flat_over_ten_thousand_calls() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40_000, generator=generator) ** 3
    out = torch.empty(max_frame_bytes(40_000), dtype=torch.uint8)

    def calls(count: int) -> None:
        for index in range(count):
            n = 1 + index * 7919 % 40_000
            used, _ = cpu.encode(x[:n].clone(), 1.0, out)
            cpu.add(out[: cpu.check(out[:used], n)], torch.zeros(n))
            if index % 10 == 0:
                lc3.decode(lc3.encode(x[:n], 1.5, entropy=True)[0], n)

    calls(2000)
    tracemalloc.start()
    before_kib, (before, _) = resident_kib(), tracemalloc.get_traced_memory()
    calls(10_000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 50_000
    assert resident_kib() - before_kib < 8 * 1024
