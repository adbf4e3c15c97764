"""What can be proven of the CUDA kernels without a GPU, and of what surrounds them."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench.cuda_kernels import KERNELS
from lc3 import AttachError, ConfigError, codec
from lc3.codec import tensor
from lc3.config import Settings
from lc3.session import checks
from lc3.transport.lane import Lane

ROOT = Path(__file__).parents[1]
needs_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None,
    reason="needs the extra cuda; make test-cuda installs it",
)


def python(*arguments: str, simulated: bool) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(simulated))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_numba_cuda
@pytest.mark.timeout(900)
def test_kernels_equal_the_reference_in_the_simulator() -> None:
    said = python("-W", "ignore", "-m", "tests.cuda_cases", simulated=True)
    counts = {line.split(":")[0]: line.split()[1] for line in said.splitlines()}
    assert counts == {
        "special_values": "112",
        "densities": "14",
        "whole_exchange": "4",
        "pieces_of_every_length": "300",
        "launches_that_are_kept": "12",
    }


@needs_numba_cuda
@pytest.mark.timeout(600)
def test_kernels_compile_for_every_target_and_spill_nothing() -> None:
    """To machine code, without a GPU; no multiplication fused with an addition."""
    pytest.importorskip("nvidia.cuda_nvcc", reason="make test-cuda installs it")
    script = (
        "from experiments.bench.cuda_kernels import TARGETS, compiled\n"
        "for target in TARGETS:\n"
        "    for row in compiled(target):\n"
        "        print(row['kernel'], row['target'], row['stack'], row['spills'], "
        "row['fused'], row['registers'], row['shared'])\n"
    )
    rows = [line.split() for line in python("-c", script, simulated=False).splitlines()]
    assert len(rows) == 4 * 9
    for row in rows:
        stack, spills, fused, registers, shared = map(int, row[2:])
        assert (stack, spills, fused) == (0, 0, 0), row
        assert 0 < registers <= 128, row  # two blocks of 256 threads fit a processor
        assert shared <= 4096, row


def test_the_page_has_the_table_of_kernels() -> None:
    text = (ROOT / "docs/explanation/codec.md").read_text()
    assert "<!-- cuda-kernels:begin -->" in text
    for name in KERNELS:
        assert f"| `{name.removeprefix('_')}` |" in text


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    codec._kernels_or_operators.cache_clear()
    yield
    codec._kernels_or_operators.cache_clear()


@pytest.mark.usefixtures("chosen_anew")
def test_cuda_without_a_driver_is_coded_by_operators_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("numba_cuda") is not None:
        from lc3.codec import cuda

        monkeypatch.setattr(cuda, "unusable", lambda _: "no driver")
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING, logger="lc3"):
        assert codec.codec_for(device) is tensor
        assert codec.codec_for(device) is tensor
    (said,) = caplog.records
    assert "the same bytes but tens of times slower" in said.getMessage()


@needs_numba_cuda
@pytest.mark.usefixtures("chosen_anew")
def test_kernels_that_do_not_compile_are_done_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As numba-cuda 0.30 with NumPy 2.5, where it looks for np.row_stack."""
    from lc3.codec import cuda

    def fails(*_: object) -> None:
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")

    monkeypatch.setattr(cuda.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda._config, "ENABLE_CUDASIM", 1)
    monkeypatch.setattr(cuda, "encode", fails)
    with caplog.at_level(logging.WARNING, logger="lc3"):
        assert codec.codec_for(torch.device("cuda", 0)) is tensor
    (said,) = caplog.records
    assert "has no attribute 'row_stack'; pip install" in said.getMessage()


@pytest.mark.usefixtures("chosen_anew")
def test_cuda_without_numba_cuda_names_the_extra(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lc3.codec.cuda", None)
    monkeypatch.delattr(codec, "cuda", raising=False)
    with caplog.at_level(logging.WARNING, logger="lc3"):
        assert codec.codec_for(torch.device("cuda")) is tensor
    assert "pip install 'torch-lc3[cuda]'" in caplog.text


@needs_numba_cuda
@pytest.mark.usefixtures("chosen_anew")
def test_cuda_with_kernels_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from lc3.codec import cuda

    monkeypatch.setattr(cuda, "unusable", lambda _: "")
    assert codec.codec_for(torch.device("cuda")) is cuda
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert codec.codec_for(torch.device("cuda")) is tensor


class Recorded:
    """Streams of a device that only notes what happens, in order."""

    said: list[Any]

    def __init__(self, device: torch.device) -> None:
        self.said = []

    def mark(self) -> int:
        self.said.append("marked")
        return len(self.said)

    @contextmanager
    def after(self, mark: int) -> Iterator[None]:
        self.said.append(("after", mark))
        yield
        self.said.append("waited")


def test_the_lane_marks_when_a_job_comes_and_waits_before_its_future_is_done() -> None:
    lane = Lane("lc3-test", torch.device("meta"), Recorded)
    streams = lane._streams
    assert isinstance(streams, Recorded)
    seen = []

    def job() -> torch.Tensor:
        seen.append(list(streams.said))
        return torch.zeros(1)

    # A future of a device refuses values of others; here its value is of no interest.
    lane._devices = []
    future = lane.submit(job)
    future.add_done_callback(lambda _: seen.append(list(streams.said)))
    future.wait()
    lane.close(5)
    at_job, at_done = seen
    assert at_job == ["marked", ("after", 1)]
    assert at_done == ["marked", ("after", 1), "waited"]


def test_a_job_that_fails_on_a_device_is_the_futures_error() -> None:
    lane = Lane("lc3-test", torch.device("meta"), Recorded)
    lane._devices = []

    def job() -> torch.Tensor:
        raise MemoryError("no memory left")

    with pytest.raises(MemoryError, match="no memory left"):
        lane.submit(job).wait()
    assert lane.submit(lambda: torch.ones(1)).wait() == 1
    lane.close(5)


def test_a_model_on_a_device_that_auto_cannot_serve_is_refused() -> None:
    """Without a GPU: only where tensors are is asked."""
    here = {torch.empty(2, 2): "a"}
    there = {torch.empty(2, 2, device="meta"): "b"}
    assert checks.check_parameters(there, Settings()).type == "meta"
    with pytest.raises(
        ConfigError, match="mode='auto' compares 3LC with an all-reduce"
    ):
        checks.check_parameters(there, Settings(mode="auto"))
    with pytest.raises(AttachError, match="'a' is on cpu, 'b' on meta"):
        checks.check_parameters(here | there, Settings())


@needs_numba_cuda
def test_the_simulator_gives_a_blocks_threads_one_array() -> None:
    """Also where making it takes so long that all threads ask before it is there."""
    script = (
        "import threading, time, types\n"
        "from tests.cuda_cases import kernelapi\n"
        "real = kernelapi.np\n"
        "def empty(*arguments):\n"
        "    time.sleep(0.05)\n"
        "    return real.empty(*arguments)\n"
        "shared, found = kernelapi.FakeCUDAShared(0), []\n"
        "kernelapi.np = types.SimpleNamespace(empty=empty)\n"
        "def thread():\n"
        "    found.append(shared.array(8, real.int32))\n"
        "threads = [threading.Thread(target=thread) for _ in range(8)]\n"
        "[t.start() for t in threads], [t.join() for t in threads]\n"
        "print(len(found), len({id(array) for array in found}))\n"
    )
    assert python("-W", "ignore", "-c", script, simulated=True).split() == ["8", "1"]
