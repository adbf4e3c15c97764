"""What is trained: data, network and optimizer settings that every method shares.

Only ``digits`` comes with a package; the others read ``--data-dir``, a folder in one of
the layouts in which the data is published, and say where to get it when it is missing.
Nothing is unpickled.
"""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.utils.data import TensorDataset

from experiments.harness import models, sources

Augment = Callable[[Tensor, torch.Generator], Tensor]


class DataError(Exception):
    """Data that is not there, or not what it should be."""


@dataclass(frozen=True)
class Task:
    """One training problem.

    Attributes:
        name: name of the task, for result files.
        train: pairs of input and class label (for text: a label per position).
        test: the same, never trained on.
        make_model: returns a fresh network, initialised from torch's global seed.
        make_optimizers: returns its optimizers, at the peak of the learning rate, which
            warms up linearly and then decays to zero by a cosine.
        batch_size: samples per rank and step.
        augment: changes a batch of training inputs, with a generator of its own.
        one_pass: whether no sample may be trained on twice.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    make_model: Callable[[], nn.Module]
    make_optimizers: Callable[[nn.Module], list[Optimizer]]
    batch_size: int
    augment: Augment | None = None
    one_pass: bool = False


def digits(_data_dir: Path | None = None) -> Task:
    """Return scikit-learn's 1 797 handwritten digits, 8 by 8, 540 of them for testing.

    Real scans that come with scikit-learn, so nothing is downloaded.
    """
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=540, random_state=0, stratify=labels
    )
    return Task(
        name="digits",
        train=TensorDataset(images[train], labels[train]),
        test=TensorDataset(images[test], labels[test]),
        make_model=models.small_cnn,
        make_optimizers=_sgd(0.05),
        batch_size=32,
    )


def fashion_mnist(data_dir: Path | None, adamw: bool = False) -> Task:
    """Return Fashion-MNIST from its four idx files, gzipped or not.

    Args:
        data_dir: folder that they are in.
        adamw: whether AdamW trains in place of SGD with momentum.
    """
    where = _needs(
        data_dir,
        "Fashion-MNIST's idx files (train-images-idx3-ubyte and so on)",
        "Debian's package dataset-fashion-mnist, or "
        "https://github.com/zalandoresearch/fashion-mnist",
    )

    def load(part: str) -> TensorDataset:
        images = torch.from_numpy(_idx(where, f"{part}-images-idx3-ubyte"))
        labels = torch.from_numpy(_idx(where, f"{part}-labels-idx1-ubyte"))
        scaled = (images.float().unsqueeze(1) / 255 - 0.286) / 0.353
        return TensorDataset(scaled, labels.long())

    return Task(
        name="fashion-mnist" + "-adamw" * adamw,
        train=load("train"),
        test=load("t10k"),
        make_model=models.lenet,
        make_optimizers=_adamw(4e-3) if adamw else _sgd(0.02),
        batch_size=32,
    )


def cifar10(data_dir: Path | None, depth: int = 20, adamw: bool = False) -> Task:
    """Return CIFAR-10 with a ResNet of ``depth`` layers, standard augmentation.

    Args:
        data_dir: holds ``cifar-10-batches-bin``, or ``train`` and ``test`` with one
            folder of images per class.
        depth: 6n + 2, as in the ResNet paper.
        adamw: whether AdamW trains in place of SGD with momentum.
    """
    where = _needs(
        data_dir,
        "CIFAR-10 (cifar-10-batches-bin, or train/<class>/* and test/<class>/*)",
        "https://www.cs.toronto.edu/~kriz/cifar.html, the binary version",
    )
    binary = where / "cifar-10-batches-bin"
    if binary.is_dir():
        train = _cifar_batches([binary / f"data_batch_{i}.bin" for i in range(1, 6)])
        test = _cifar_batches([binary / "test_batch.bin"])
    else:
        train, test = (_image_folder(where / part) for part in ("train", "test"))
    return Task(
        name=f"cifar10-resnet{depth}" + "-adamw" * adamw,
        train=_normalised(*train),
        test=_normalised(*test),
        make_model=lambda: models.resnet(depth),
        make_optimizers=_adamw(4e-3) if adamw else _sgd(0.1),
        batch_size=32,
        augment=_crop_and_flip,
    )


def chars(
    data_dir: Path | None,
    context: int = 64,
    muon: bool = False,
    large: bool = False,
) -> Task:
    """Return a text, character by character, and a small transformer.

    Args:
        data_dir: a text file, or a folder with exactly one ``*.txt``. Its last tenth is
            for testing.
        context: characters the network sees.
        muon: whether its matrices are trained by Muon; AdamW trains the rest, or all.
        large: 2.25 million parameters instead of 0.36 million.
    """
    where = _needs(
        data_dir,
        "a text file",
        "any plain text of a megabyte or so, like tinyshakespeare in "
        "https://github.com/karpathy/char-rnn",
    )
    files = [where] if where.is_file() else sorted(where.glob("*.txt"))
    if len(files) != 1:
        raise DataError(
            f"{where} holds {len(files)} text files; give one: --data-dir FILE.txt"
        )
    text = files[0].read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    number = {character: index for index, character in enumerate(alphabet)}
    codes = torch.tensor([number[character] for character in text])
    split = len(codes) * 9 // 10
    if len(codes) - split <= context:
        raise DataError(f"{files[0]} has {len(codes)} characters; that is too short")

    def windows(part: Tensor) -> TensorDataset:
        count = (len(part) - 1) // context
        inputs = part[: count * context].view(count, context)
        return TensorDataset(inputs, part[1 : count * context + 1].view(count, context))

    size = {"width": 192, "depth": 5, "heads": 6} if large else {}
    return Task(
        name="chars" + "-muon" * muon + "-large" * large,
        train=windows(codes[:split]),
        test=windows(codes[split:]),
        make_model=lambda: models.Transformer(len(alphabet), context, **size),
        make_optimizers=_muon if muon else _adamw(2e-3 if large else 8e-3),
        batch_size=8,
    )


# Width, depth and heads of the transformers, and the rate of AdamW.
_SIZES = {
    "0.25m": (64, 5, 4, 8e-3),
    "1m": (128, 5, 4, 4e-3),
    "4m": (256, 5, 8, 2e-3),
    "15m": (384, 8, 6, 1e-3),
    "124m": (768, 17, 12, 6e-4),
}
_ONE_PASS_CONTEXT = 256
_ONE_PASS_TESTED = 2048  # windows, spread over the packages that are tested on


def one_pass(_data_dir: Path | None, size: str, muon: bool = False) -> Task:
    """Return Python sources byte by byte, each seen once, and a transformer.

    Args:
        _data_dir: not needed; the text is that of installed packages.
        size: size of the network, of ``0.25m`` to ``124m``.
        muon: whether its matrices are trained by Muon; AdamW trains the rest, or all.

    Raises:
        DataError: a package is missing, or is of another version.
    """
    width, depth, heads, rate = _SIZES[size]
    context = _ONE_PASS_CONTEXT

    def windows(packages: Sequence[str]) -> tuple[Tensor, Tensor]:
        try:
            data = torch.from_numpy(sources.load(packages))
        except sources.SourcesError as error:
            raise DataError(str(error)) from error
        both = data.unfold(0, context + 1, context)  # without a copy
        return both[:, :-1], both[:, 1:]

    inputs, labels = windows(sources.TEST)
    every = len(inputs) // _ONE_PASS_TESTED
    some = slice(0, every * _ONE_PASS_TESTED, every)
    return Task(
        name=f"one-pass-{size}" + "-muon" * muon,
        train=TensorDataset(*windows(sources.TRAIN)),
        test=TensorDataset(inputs[some], labels[some]),
        make_model=lambda: models.Transformer(256, context, width, depth, heads),
        make_optimizers=_muon if muon else _adamw(rate),
        batch_size=8,
        one_pass=True,
    )


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-adamw": lambda data_dir: fashion_mnist(data_dir, adamw=True),
    "cifar10-resnet20": cifar10,
    "cifar10-resnet20-adamw": lambda data_dir: cifar10(data_dir, adamw=True),
    "cifar10-resnet56": lambda data_dir: cifar10(data_dir, 56),
    "cifar10-resnet110": lambda data_dir: cifar10(data_dir, 110),
    "chars": chars,
    "chars-muon": lambda data_dir: chars(data_dir, muon=True),
    "chars-large": lambda data_dir: chars(data_dir, large=True),
    "chars-muon-large": lambda data_dir: chars(data_dir, muon=True, large=True),
    **{
        f"one-pass-{size}" + "-muon" * muon: partial(one_pass, size=size, muon=muon)
        for size in _SIZES
        for muon in (False, True)
    },
}


def _sgd(learning_rate: float) -> Callable[[nn.Module], list[Optimizer]]:
    return lambda model: [
        SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    ]


def _adamw(learning_rate: float) -> Callable[[nn.Module], list[Optimizer]]:
    return lambda model: [
        AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    ]


def _muon(model: nn.Module) -> list[Optimizer]:
    """Return Muon for the matrices inside, AdamW for embeddings, norms and biases."""
    named = list(model.named_parameters())
    inside = [p for name, p in named if p.dim() == 2 and "blocks." in name]
    others = [p for name, p in named if p.dim() != 2 or "blocks." not in name]
    muon = Muon(inside, lr=1.6e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(others, lr=1.6e-2, betas=(0.9, 0.99))]


def _needs(data_dir: Path | None, what: str, source: str) -> Path:
    if data_dir is None or not data_dir.exists():
        given = "no --data-dir was given" if data_dir is None else f"{data_dir} is not"
        raise DataError(f"this task needs {what}, but {given} there; get it: {source}")
    return data_dir


def _idx(folder: Path, name: str) -> np.ndarray:
    """Return an idx file of unsigned bytes, as LeCun published MNIST."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            raw = path.read_bytes()
            data = gzip.decompress(raw) if path.suffix == ".gz" else raw
            dims = data[3] if data[:3] == b"\0\0\x08" else 0
            shape = np.frombuffer(data, ">u4", dims, offset=4) if dims else ()
            if not dims or len(data) != 4 + 4 * dims + int(np.prod(shape, dtype=int)):
                raise DataError(f"{path} is not a whole idx file of bytes; get it anew")
            return (
                np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()
            )
    raise DataError(f"{folder} has neither {name} nor {name}.gz")


def _cifar_batches(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Return images, uint8[n, 3, 32, 32], and labels of CIFAR-10's binary files."""
    records = []
    for path in files:
        if not path.exists():
            raise DataError(f"{path} is missing; is the archive unpacked?")
        data = np.fromfile(path, np.uint8)
        if data.size == 0 or data.size % 3073 or data[::3073].max() > 9:
            raise DataError(
                f"{path} of {data.size} bytes is not made of CIFAR-10's records of "
                "3073 bytes; get it anew"
            )
        records.append(data.reshape(-1, 3073))
    whole = torch.from_numpy(np.concatenate(records))
    return whole[:, 1:].reshape(-1, 3, 32, 32), whole[:, 0].long()


def _image_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images, uint8[n, 3, 32, 32], and labels of folder/<class>/<image>."""
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    if len(classes) != 10:
        raise DataError(f"{folder} has {len(classes)} folders of classes, not 10")
    images, labels = [], []
    for label, of_class in enumerate(classes):
        for path in sorted(of_class.iterdir()):
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
            labels.append(label)
            if images[-1].shape != (32, 32, 3):
                raise DataError(f"{path} is {images[-1].shape}, not 32 by 32 pixels")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(labels)


def _normalised(images: Tensor, labels: Tensor) -> TensorDataset:
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    spread = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
    return TensorDataset((images.float() / 255 - mean) / spread, labels)


def _crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image shifted by up to 4 pixels and flipped half of the time."""
    count = len(images)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    at = torch.randint(9, (count, 2), generator=generator).tolist()
    flip = (torch.rand(count, generator=generator) < 0.5).tolist()
    views = [
        padded[i, :, top : top + 32, left : left + 32]
        for i, (top, left) in enumerate(at)
    ]
    return torch.stack(
        [
            view.flip(-1) if turn else view
            for view, turn in zip(views, flip, strict=True)
        ]
    )
