"""Data is read in its published layouts, and what is wrong with it is said."""

import gzip
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.optim import SGD, AdamW
from torch.utils.data import TensorDataset

from experiments.harness import models, sources, train
from experiments.harness.tasks import TASKS, DataError, chars, cifar10, fashion_mnist
from experiments.harness.train import evaluate, loss_of

ROOT = Path(__file__).parents[1]


def idx(values: np.ndarray) -> bytes:
    shape = np.array(values.shape, ">u4").tobytes()
    return b"\0\0\x08" + bytes([values.ndim]) + shape + values.tobytes()


def write_fashion(folder: Path) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 64), ("t10k", 20)):
        images = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = random.integers(10, size=count, dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx(images))
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


def write_batches(folder: Path) -> None:
    random = np.random.default_rng(0)
    binary = folder / "cifar-10-batches-bin"
    binary.mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = random.integers(256, size=(8, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(8)
        records.tofile(binary / name)


def write_images(folder: Path, size: int = 32) -> None:
    for part in ("train", "test"):
        for label in range(10):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            Image.new("RGB", (size, size), (label, 0, 255)).save(place / "0.png")


def test_fashion_mnist_is_read(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    task = fashion_mnist(tmp_path)
    assert task.train.tensors[0].shape == (64, 1, 28, 28)
    assert 0 <= evaluate(task.make_model(), task.test)[1] <= 1


def test_cifar10_is_read_from_both_layouts(tmp_path: Path) -> None:
    for name, write, count in (("bin", write_batches, 40), ("png", write_images, 10)):
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        task = cifar10(folder)
        inputs, labels = task.train.tensors
        assert inputs.shape == (count, 3, 32, 32)
        assert set(labels.tolist()) <= set(range(10))
        assert task.augment is not None
        generator = torch.Generator().manual_seed(0)
        assert task.augment(inputs[:8], generator).shape == (8, 3, 32, 32)
        loss_of(task.make_model()(inputs[:8]), labels[:8]).backward()


def test_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    for task in (chars(tmp_path), chars(tmp_path / "a.txt", muon=True)):
        inputs, targets = task.train.tensors
        assert torch.equal(inputs[0, 1:], targets[0, :-1])
        model = task.make_model()
        loss_of(model(inputs[:4]), targets[:4]).backward()
        for optimizer in task.make_optimizers(model):
            optimizer.step()


def test_a_task_with_adamw_differs_in_its_optimizer_only(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    write_batches(tmp_path)
    for name in ("fashion-mnist", "cifar10-resnet20"):
        plain, task = TASKS[name](tmp_path), TASKS[f"{name}-adamw"](tmp_path)
        assert (plain.name, task.name) == (name, f"{name}-adamw")
        assert type(task.make_optimizers(task.make_model())[0]) is AdamW
        assert type(plain.make_optimizers(plain.make_model())[0]) is SGD
        assert (task.batch_size, task.augment) == (plain.batch_size, plain.augment)
        assert torch.equal(task.train.tensors[0], plain.train.tensors[0])


def test_resnets_have_the_papers_sizes() -> None:
    sizes = {
        depth: sum(p.numel() for p in models.resnet(depth).parameters())
        for depth in (20, 56, 110)
    }
    assert sizes == {20: 269_722, 56: 853_018, 110: 1_727_962}
    with pytest.raises(ValueError, match="depth=21 must be"):
        models.resnet(21)


@pytest.mark.parametrize(
    "name", [n for n in TASKS if n != "digits" and not n.startswith("one-pass")]
)
def test_missing_data_is_said_with_where_to_get_it(name: str, tmp_path: Path) -> None:
    for place in (None, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"this task needs .* get it: .*"):
            TASKS[name](place)


def test_damaged_data_is_named(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(DataError, match="not a whole idx file"):
        fashion_mnist(tmp_path)
    labels.unlink()
    with pytest.raises(DataError, match="neither train-labels"):
        fashion_mnist(tmp_path)
    write_batches(tmp_path)
    batch = tmp_path / "cifar-10-batches-bin/data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-5])
    with pytest.raises(DataError, match="records of 3073 bytes"):
        cifar10(tmp_path)
    batch.unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin is missing"):
        cifar10(tmp_path)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    with pytest.raises(DataError, match="has 0 folders of classes, not 10"):
        cifar10(tmp_path / "few")
    (tmp_path / "big").mkdir()
    write_images(tmp_path / "big", size=40)
    with pytest.raises(DataError, match="not 32 by 32"):
        cifar10(tmp_path / "big")
    with pytest.raises(DataError, match="holds 0 text files"):
        chars(tmp_path / "few")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="too short"):
        chars(tmp_path / "short.txt")


@pytest.mark.parametrize("count", [7, 1])
def test_ranks_evaluate_a_part_each(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together what one rank makes of all; a rank may be without a part."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    data = TensorDataset(torch.randn(count, 3), torch.arange(count) % 4)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    said: list[list[float]] = []

    def remember(*values: float) -> list[float]:
        said.append(list(values))
        return [value or 1.0 for value in values]

    monkeypatch.setattr(train, "mean_over_ranks", remember)
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        train.evaluate_together(model, data)
    loss, right, total = (sum(values) for values in zip(*said, strict=True))
    assert total == count
    whole = train.evaluate(model, data)
    assert (loss / total, right / total) == pytest.approx(whole, rel=1e-6)


def test_a_text_of_one_pass_is_that_of_the_list() -> None:
    task = TASKS["one-pass-0.25m"](None)
    assert len(task.train) > 450_000
    assert len(task.test) == 2048
    inputs, labels = task.train[7]
    assert inputs.dtype == torch.uint8
    assert torch.equal(inputs[1:], labels[:-1])
    after, _ = task.train[8]
    assert after[0] == labels[-1]
    model = task.make_model()
    assert 250_000 < sum(p.numel() for p in model.parameters()) < 300_000


def test_sources_of_another_version_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text_of = sources.text_of
    monkeypatch.setattr(sources, "text_of", lambda package: text_of(package) + b"#")
    with pytest.raises(DataError, match="networkx's sources are 6,471,339 bytes"):
        TASKS["one-pass-0.25m"](None)
    with pytest.raises(sources.SourcesError, match="lc4 is not installed; pip install"):
        sources.files("lc4")


def test_the_packages_of_the_text_are_pinned() -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    listed = tomllib.loads(sources.LIST.read_text())
    assert set(listed) == {*sources.TRAIN, *sources.TEST}
    for package, line in listed.items():
        assert f"{package}=={line['version']}" in pinned
