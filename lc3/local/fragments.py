"""Fragments: a model's layers in groups that are exchanged one after the other.

The peak of traffic is that of one group, and the link is busy more evenly. Source:
Streaming DiLoCo (arXiv 2501.18512).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from lc3.errors import ConfigError
from lc3.local.says import Says


def fragments_of(numel: Mapping[str, int], count: int) -> list[list[str]]:
    """Return the parameters in groups of consecutive layers.

    What belongs to one module stays together. The largest group is as small as that
    allows.

    Args:
        numel: elements by parameter name, in the model's order.
        count: how many groups.

    Raises:
        ConfigError: there are fewer layers.
    """
    layers = [list(some) for _, some in groupby(numel, _module_of)]
    if count > len(layers):
        raise ConfigError(
            f"fragments={count} is more than the {len(layers)} layers of the model "
            "that have parameters; give as many at most"
        )
    sizes = [sum(numel[name] for name in names) for names in layers]
    least, most = max(sizes), sum(sizes)
    while least < most:
        limit = (least + most) // 2
        if len(_cut(sizes, limit, 1)) <= count:
            most = limit
        else:
            least = limit + 1
    found = []
    at = 0
    for layers_of_one in _cut(sizes, most, count):
        some = layers[at : at + layers_of_one]
        found.append([name for names in some for name in names])
        at += layers_of_one
    return found


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _cut(sizes: Sequence[int], limit: int, count: int) -> list[int]:
    """Return lengths of at least ``count`` runs of sizes, no run's sum over a limit."""
    runs: list[int] = []
    total = limit + 1
    for index, size in enumerate(sizes):
        left = len(sizes) - index  # enough for a run each
        if total + size > limit or len(runs) + left <= count:
            runs.append(0)
            total = 0
        runs[-1] += 1
        total += size
    return runs


def turns(sync_every: int, count: int) -> dict[int, int]:
    """Return when each of ``count`` fragments is exchanged, once in so many steps.

    Returns:
        By steps modulo ``sync_every`` the number of a fragment. The last one's is 0.
    """
    return {
        (index + 1) * sync_every // count % sync_every: index for index in range(count)
    }


@dataclass
class UnderWay:
    """An exchange that has begun.

    Attributes:
        number: its number.
        names: of the parameters that it is about.
        due: the step after which it is taken over.
        steps: by these names the steps since their last exchange.
        said: what all ranks have said, by rank, when it has ended.
        future: of the mean of the buffers that have changed.
    """

    number: int
    names: frozenset[str]
    due: int
    steps: Mapping[str, int]
    said: list[Says] = field(default_factory=list)
    future: torch.futures.Future[Tensor] = field(default_factory=torch.futures.Future)
