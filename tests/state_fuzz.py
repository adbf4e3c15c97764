"""Wrong states: each is a ``StateError``, and changes nothing.

    python -m tests.state_fuzz --count 100000

Takes states of two ranks, changes something at a random place, with a checksum that
fits or one that does not, and loads or merges them.
"""

import argparse
import copy
import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lc3 import StateError, checkpoint
from lc3.checkpoint import Parts
from lc3.engines.engine import Engine
from tests.test_engine import SMALL, run


def parts_of(engine: Engine) -> Parts:
    """Return what a hook with masters, optimizer state and a replica keeps."""
    owned = engine.residuals.owned
    return Parts(
        {"step": 3, "scale": 1.0, "senders": 2},
        engine.residuals.sent,
        {
            "owned": owned,
            f"{checkpoint.OPTIONAL}exp_avg": {n: t.clone() for n, t in owned.items()},
        },
        {"replica": {name: t.clone() for name, t in engine.residuals.sent.items()}},
        {"": [{"lr": 0.1, "betas": (0.9, 0.99)}], "a": {"step": torch.tensor(3.0)}},
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to everything in nested mappings."""
    found = [path] if path else []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    return found


def wrong(value: Any, dice: random.Random) -> Any:
    """Return something else than ``value``."""
    others: list[Any] = [
        *(None, "x", -1, 0, 10**18, math.nan, -math.inf, 0.5, True, [], {}, {"a": 1}),
        *(torch.zeros(3), torch.zeros(2, 2), b"bytes", object(), {"a": None}),
        torch.ones(4).to_sparse(),
    ]
    if isinstance(value, Tensor):
        flat = value.reshape(-1)
        spoiled = flat.clone().float()
        if spoiled.numel():
            spoiled[dice.randrange(spoiled.numel())] = math.nan
        others += [flat[:-1], torch.cat([flat, flat[:1]]), value.double(), spoiled]
    if isinstance(value, int):
        others += [value + 1, -value, value * 2]
    return dice.choice(others)


def change(state: dict[str, Any], dice: random.Random) -> str:
    """Change one thing in a state; return where."""
    path = dice.choice([one for one in places(state) if one[0] != "checksum"])
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    deed = dice.choice(["replace", "replace", "remove", "rename"])
    value = inner.pop(path[-1])
    if deed == "replace":
        inner[path[-1]] = wrong(value, dice)
    elif deed == "rename":
        inner[f"{path[-1]}x"] = value
    return f"{deed} {path}"


def campaign(target: str, limit: int, seed: int) -> int:
    """Try ``limit`` wrong states; return how many were refused, or made no difference.

    Raises:
        AssertionError: one raised something else, or has changed something.
    """
    dice = random.Random(seed)
    engines = run(2, 3, SMALL)
    good = [
        checkpoint.save("ddp", engine.plan, rank, parts_of(engine))
        for rank, engine in enumerate(engines)
    ]
    mine = parts_of(engines[1])
    before = [tensor.clone() for _, _, tensor in mine.tensors()]
    merged = checkpoint.merge(good)
    done = 0
    for _ in range(limit):
        bad = copy.deepcopy(
            good[1] if target == "merge" else dice.choice([good[1], merged])
        )
        where = change(bad, dice)
        try:
            if dice.random() < 0.8:
                bad = checkpoint.with_checksum(bad)
        except KeyError:
            pass  # a key that the checksum is made of is gone
        try:
            if target == "merge":
                result: Any = checkpoint.merge([good[0], bad])
            else:
                result = checkpoint.load(bad, "ddp", engines[1].plan, 1, mine)
        except StateError:
            done += 1
        except Exception as error:
            raise AssertionError(f"{target}: {where}: {error!r:.200}") from error
        else:
            done += 1
            if isinstance(result, Parts):
                for _, _, tensor in result.tensors():
                    assert tensor.isfinite().all(), where
        after = [tensor for _, _, tensor in mine.tensors()]
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old, new), where
    return done


def main() -> None:
    """Run both campaigns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    options = parser.parse_args()
    for target in ("load", "merge"):
        done = campaign(target, options.count // 2, seed=0)
        print(f"{target}: {done} wrong states, each a StateError or no difference")


if __name__ == "__main__":
    main()
