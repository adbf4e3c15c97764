"""Every kind of method trains, and the network sees the bytes that it says it sends."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments import record, tables
from experiments.harness import run
from experiments.lab import netlab
from lc3.module.moments import Moments
from tests.method_kinds import KINDS

REASON = netlab.missing()
# What gloo and TCP add to a message for one peer: three control messages of 48 bytes,
# each of them, the data and the answers in packets with 66 bytes of headers.
PER_MESSAGE = 450
DUE = Moments({}, {}, torch.device("cpu")).due  # steps that share second moments
MESSAGES = {  # of a step, where they are not one of a push and one of a pull
    "push-pull s=1.00": 3,
    "local H=2, uncoded": 3 / 2,  # a small one first
    "local H=8": 3 / 8,
    "local H=16": 3 / 16,
    "local H=32": 3 / 32,
    **{
        f"preconditioned s=1.00{stage}": 2 + 2 * sum(map(DUE, range(32))) / 32
        for stage in ("", ", rans")
    },
    "preconditioned s=1.00, direct": 1 + 2 * sum(map(DUE, range(32))) / 32,
    **{f"3LC s={s:.2f}, direct": 1 for s in (1.0, 1.5, 1.75, 1.9)},
    **{f"local H=8{density}, direct": 2 / 8 for density in ("", ", density 5 %")},
    "float32": 6,
    "fp16": 6,
    "auto": 6,
    "bf16": 6,  # a ring, in segments
    **{f"PowerSGD rank {rank}": 14 for rank in (1, 2, 4)},  # three rings
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Give the rows of 32 steps of every kind of method, between hosts of the lab.

    Over loopback where there is no lab.
    """
    folder = tmp_path_factory.mktemp("kinds")
    methods = [*KINDS, "float32, lr × 0.5"]
    rates = [] if netlab.missing() else ["1gbit"]
    spec = run.Spec("all", "digits", methods, 32, rates=rates, evaluate_every=32)
    assert run.run(spec, folder, None, Console()) == []
    return record.read_csv(folder / "results.csv")


@pytest.mark.timeout(450)
def test_every_kind_of_method_trains_and_is_recorded(
    kinds: list[dict[str, str]], tmp_path: Path
) -> None:
    slower = "float32, lr × 0.5"
    last = {row["method"]: row for row in kinds if row["step"] == "32"}
    assert list(last) == [*KINDS, slower]
    assert last[slower]["sent_bytes"] == last["float32"]["sent_bytes"]
    assert float(last[slower]["loss"]) > float(last["float32"]["loss"])
    sent = {method: int(row["sent_bytes"]) for method, row in last.items()}
    assert sent["float32"] == 2 * sent["fp16"] == 32 * 4 * 151_306
    ratio = {method: sent["float32"] / sent[method] for method in KINDS}
    assert sent["bf16"] == sent["fp16"]
    assert 3.7 < ratio["8-bit int"] < 4  # 8 bits of 32, headers, raw biases
    assert 17 < ratio["Stoch 3-value + QE"] < 20  # 1.6 bits
    assert 25 < ratio["MQE 1-bit int"] < 32
    assert 3.2 < ratio["25% sparsification"] < 32 / 9
    assert 10 < ratio["5% sparsification"] < 32 / 2.6
    assert 35 < ratio["top-k 1%"] < 50
    assert ratio["PowerSGD rank 4"] < ratio["PowerSGD rank 1"]
    assert sent["3LC s=1.00, rans"] < 0.95 * sent["3LC s=1.00"]
    assert sent["3LC s=1.75, rans"] < 0.95 * sent["3LC s=1.75"]
    assert sent["3LC s=1.90"] < sent["3LC s=1.00"] < sent["fp16"] / 15
    assert last["SparseLoCo H=8"]["hook"] == "sparseloco"
    assert last["SparseLoCo H=8"]["sync_every"] == "8"
    assert last["3LC s=1.75, pull s=1.00"]["pull_sparsity"] == "1.0"
    assert last[slower]["dtype"] == "float32"
    for row in last.values():
        assert {"commit", "torch", "numba", "machine", "seed"} <= set(row)
        assert 0 <= float(row["accuracy"]) <= 1
    tables.plot(kinds, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.timeout(450)
def test_interfaces_count_what_every_method_says_it_sends(
    kinds: list[dict[str, str]],
) -> None:
    """Within 3 %, plus what every message adds."""
    assert {row["rate"] for row in kinds} == {"1gbit"}
    for row in kinds:
        method = row["method"].removesuffix(", lr × 0.5")
        sent, on_link = int(row["sent_bytes"]), int(row["link_bytes"])
        most = 1.03 * sent + PER_MESSAGE * 32 * MESSAGES.get(method, 2)
        assert sent < on_link < most, (method, sent, on_link)
        assert float(row["step_ms"]) > 1
