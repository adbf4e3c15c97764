"""The methods lc3 is compared with do what they say, with the bytes they say."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.harness.baselines import (
    Baseline,
    Int8,
    Largest,
    OneBit,
    StochasticTernary,
)
from experiments.harness.methods import METHODS
from lc3.codec import decode_add
from lc3.errors import FormatError
from tests.ranks import Ranks

CODECS = [
    Int8(),
    StochasticTernary(seed=1),
    OneBit(),
    Largest(0.25, bitmap=True),
    Largest(0.01, bitmap=False),
]
codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda c: type(c).__name__)


def noise(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


@codecs
@pytest.mark.parametrize("n", [1, 5, 8, 9, 1000])
def test_decoded_plus_residual_is_the_input(codec: Baseline, n: int) -> None:
    x, out = noise(n), torch.empty(codec.max_frame_bytes(n), dtype=torch.uint8)
    left = x * 0.5
    used, digits = codec.encode(left, 1.0, out, x * 0.5)
    assert used == codec.frame_bytes(n)
    values = torch.zeros(n)
    assert decode_add(codec, out[:used], values) == used
    assert digits == int(values.count_nonzero())
    if codec.feedback:
        torch.testing.assert_close(values + left, x)
    else:
        assert not left.any()
    with pytest.raises(FormatError):
        codec.check(out[: used - 1], n)


@codecs
def test_special_frames(codec: Baseline) -> None:
    out = torch.empty(codec.max_frame_bytes(9), dtype=torch.uint8)
    left = torch.zeros(9)
    assert codec.encode(left, 1.0, out, torch.ones(9)) == (4, 0)
    assert (left == 1).all()
    assert codec.encode(torch.full((9,), torch.inf), 1.0, out) == (4, 0)
    acc = torch.zeros(9)
    assert decode_add(codec, out[:4], acc) == 4
    assert acc.isnan().all()


def test_int8_is_within_half_a_step() -> None:
    x = noise(1000)
    values = torch.from_numpy(Int8().read(Int8().write(x.numpy()), 1000))
    assert (values - x).abs().max() <= x.abs().max() / 127 * 0.5001


def test_ternary_is_unbiased() -> None:
    x, codec = noise(50).numpy(), StochasticTernary(seed=3)
    mean = np.mean([codec.read(codec.write(x), 50) for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(mean, x, atol=0.06)


def test_one_bit_levels_have_the_least_error() -> None:
    x = noise(400).numpy()
    values = OneBit().read(OneBit().write(x), 400)
    assert set(np.unique(values)) == {x[x > 0].mean(), x[x <= 0].mean()}


def test_largest_are_sent_exactly() -> None:
    x = noise(400).numpy()
    for codec in (Largest(0.1, bitmap=True), Largest(0.1, bitmap=False)):
        values = codec.read(codec.write(x), 400)
        kept = np.argsort(-np.abs(x))[:40]
        assert np.count_nonzero(values) == 40
        assert (values[kept] == x[kept]).all()


def train_with_power_sgd(rank: int, world: int) -> float:
    """Train a model of several of DDP's usual buckets for 8 steps."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(600, 600) for _ in range(3)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    training = METHODS["PowerSGD rank 2"](net, [optimizer])
    torch.manual_seed(rank)
    for _ in range(8):
        optimizer.zero_grad()
        training.model(torch.randn(8, 600)).square().mean().backward()
        optimizer.step()
    return float(sum(p.detach().double().sum() for p in net.parameters()))


def test_power_sgd_gets_one_bucket(ranks: Callable[[int], Ranks]) -> None:
    """With several its all-reduces of different sizes meet on gloo."""
    assert len(set(ranks(2).run(train_with_power_sgd))) == 1
