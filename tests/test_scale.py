"""Virtual ranks are what real ranks are: the oracle's bits, the meter's bytes."""

from pathlib import Path

import pytest
import torch

from experiments import record
from experiments.bench import scale
from experiments.harness.tasks import TASKS
from lc3.config import Settings
from tests.oracle import Oracle


def test_virtual_ranks_equal_the_oracle() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 30))
    config = Settings()
    world = 5
    shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    ranks = scale.VirtualRanks(module, world, config)
    oracle = Oracle(shapes, world, config)
    for step in range(6):
        gradients = [
            {n: torch.randn(p.numel()) for n, p in module.named_parameters()}
            for _ in range(world)
        ]
        expected = oracle.step(
            [{n: g.numpy().copy() for n, g in mine.items()} for mine in gradients]
        )
        got = ranks.all_reduce(gradients, step)
        for name, mean in got.items():
            assert torch.equal(mean, torch.from_numpy(expected[name])), (step, name)
    ranks.close()


def test_a_table_by_world_size(tmp_path: Path) -> None:
    out = tmp_path / "scale.csv"
    arguments = ["--worlds", "2", "8", "--steps", "12", "--seeds", "1"]
    scale.main([*arguments, "--sparsity", "1", "--out", str(out)])
    rows = record.read_csv(out)
    assert [(row["ranks"], row["method"]) for row in rows] == [
        (world, method) for world in "28" for method in ("float32", "3LC s=1.00")
    ]
    # The global batch is the same, so the plain mean is too, up to rounding.
    plain = [float(r["test_loss"]) for r in rows if r["method"] == "float32"]
    assert plain[0] == pytest.approx(plain[1], rel=1e-3)
    for row in rows[1::2]:
        assert 20 < int(row["dense_bytes"]) / int(row["sent_bytes"]) < 200
    assert scale.markdown(rows).count("\n| ") == 3


def test_batches_share_out_every_sample() -> None:
    task = TASKS["digits"](None)
    seen = torch.cat(list(scale.global_batches(task, 100, 0, 12)))
    assert torch.equal(seen.unique(), torch.arange(len(task.train))[seen.unique()])
    assert len(seen[: len(task.train)].unique()) == min(len(task.train), len(seen))


def test_more_ranks_than_samples_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        scale.main(["--worlds", "64", "--batch", "32", "--out", str(tmp_path / "a")])
    assert "--batch 32 is less than 64 ranks" in capsys.readouterr().err
