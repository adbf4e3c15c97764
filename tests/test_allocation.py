"""Spreading bytes over layers: the greedy allocation against all there are."""

import itertools

import numpy as np
import torch

from experiments import allocation
from experiments.allocation import Choice


def test_a_setting_counts_the_bytes_and_the_energy_left() -> None:
    x = torch.tensor([4.0, -4.0, 1.0, 0.0, 0.0] * 100)
    choice = allocation.coded(x, 1.0, None)
    assert choice.left == 100  # threes and fours are sent whole, ones are not
    assert 4 < choice.size < 104


def test_the_hull_keeps_what_is_worth_its_bytes() -> None:
    choices = [
        Choice(*c) for c in ((10, 9), (5, 10), (20, 1), (12, 8.9), (30, 1), (5, 12))
    ]
    assert allocation.hull(choices) == [(5, 10), (20, 1)]


def test_greedy_is_best_where_it_uses_all_bytes() -> None:
    chance = np.random.default_rng(0)
    met = 0
    for _ in range(200):
        tensors = [
            [
                Choice(int(size), float(left))
                for size, left in zip(
                    np.sort(chance.choice(30, 4, replace=False)),
                    -np.sort(-chance.random(4)),
                    strict=True,
                )
            ]
            for _ in range(3)
        ]
        limit = int(chance.integers(60, 90))
        found = allocation.allocate(tensors, limit)
        every = [
            (sum(c.size for c in some), sum(c.left for c in some))
            for some in itertools.product(*tensors)
        ]
        assert found.size <= limit
        # No choice of as many bytes leaves less: the hull's points are optimal.
        best = min(left for size, left in every if size <= found.size)
        if np.isclose(found.left, best):
            met += 1
    assert met > 150  # but where a last step did not fit any more and a later one did


def test_the_same_choice_for_all_is_interpolated() -> None:
    tensors = [[Choice(0, 4.0), Choice(10, 2.0)], [Choice(0, 4.0), Choice(10, 0.0)]]
    assert allocation.at_size(tensors, 10) == 5.0
    assert allocation.at_size(tensors, 99) == 2.0
