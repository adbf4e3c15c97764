"""The division of labour: complete, balanced, the same everywhere; limits of knobs."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lc3 import ConfigError
from lc3.config import Settings
from lc3.plan import make_plan
from tests.oracle import Oracle

SHAPES = [
    ("conv.weight", (64, 32, 3, 3)),
    ("conv.bias", (64,)),
    ("empty", (0, 4)),
    ("fc.weight", (10, 50)),
    ("embedding", (5000, 64)),
    ("scalar", ()),
]

shapes = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 300)), min_size=1, max_size=12
).map(lambda sizes: [(f"p{i}", size) for i, size in enumerate(sizes)])
configs = st.builds(
    Settings,
    min_numel=st.integers(0, 5000),
    min_shard=st.integers(1, 20_000),
    block_size=st.none() | st.integers(5, 3000),
)


@given(shapes=shapes, world=st.integers(1, 9), config=configs)
def test_every_element_has_one_owner_and_the_oracles_pieces(
    shapes: list[tuple[str, tuple[int, int]]], world: int, config: Settings
) -> None:
    plan = make_plan(shapes, world, config)
    oracle = Oracle(shapes, world, config)
    names = list(plan.numel)
    for name, shape in shapes:
        slices = plan.slices[name]
        assert len({slice_.owner for slice_ in slices}) == len(slices)
        pieces = [
            slice(piece.start, piece.stop)
            for slice_ in slices
            for piece in plan.pieces_of([name], slice_.owner)
        ]
        assert pieces == list(oracle.pieces(name, shape[0] * shape[1]))
        assert [piece.stop for piece in pieces[:-1]] == [
            piece.start for piece in pieces[1:]
        ]
        assert (name in plan.coded) == oracle.coded(name, shape)
    for kind in (plan.coded, set(names) - plan.coded):
        by_owner = [len(list(plan.slices_of(kind, owner))) for owner in range(world)]
        assert sum(by_owner) == sum(len(plan.slices[name]) for name in kind)
        assert max(by_owner) - min(by_owner) <= 1


def test_small_and_one_dimensional_tensors_travel_raw() -> None:
    plan = make_plan(SHAPES, 4, Settings())
    assert plan.coded == {"conv.weight", "embedding"}
    assert [s.numel for s in plan.slices["conv.weight"]] == [9216, 9216]
    assert [s.owner for s in plan.slices["embedding"]] == [2, 3, 0, 1]
    assert plan.slices["empty"] == ()


def test_names_and_rules_decide_what_is_coded() -> None:
    def coded(**knobs: object) -> frozenset[str]:
        return make_plan(SHAPES, 2, Settings(**knobs)).coded  # type: ignore[arg-type]

    assert coded(exclude=("conv.*",)) == {"embedding"}
    assert coded(include=("fc.weight", "*bias")) == {
        "conv.weight",
        "embedding",
        "fc.weight",
        "conv.bias",
    }
    assert coded(min_ndim=1, min_numel=64) == {
        "conv.weight",
        "conv.bias",
        "embedding",
        "fc.weight",
    }
    with pytest.raises(ConfigError, match=r"'fd\.\*' matches no trainable parameter"):
        coded(exclude=("fd.*",))
    with pytest.raises(ConfigError, match="matched by exclude and by include"):
        coded(exclude=("conv*",), include=("*.weight",))


def test_whatever_changes_the_bytes_changes_the_fingerprint() -> None:
    base = make_plan(SHAPES, 4, Settings())
    assert f"{base.fingerprint:08x}" == "1041e244"  # as specified in lc3.format
    assert make_plan(SHAPES, 4, Settings(sparsity=1.9)).fingerprint == base.fingerprint
    others = [
        make_plan(SHAPES, 3, Settings()),
        make_plan(SHAPES, 4, Settings(block_size=1024)),
        make_plan(SHAPES, 4, Settings(min_numel=1000)),
        make_plan(SHAPES, 4, Settings(min_shard=1000)),
        make_plan(SHAPES, 4, Settings(exclude=("conv.weight",))),
        make_plan(SHAPES[::-1], 4, Settings()),
        make_plan([*SHAPES, ("more", (3,))], 4, Settings()),
    ]
    assert len({base.fingerprint, *(plan.fingerprint for plan in others)}) == 8


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"sparsity": 2.0}, r"sparsity=2\.0 is outside \[1, 2\)"),
        ({"sparsity": 0.999}, "outside"),
        ({"sparsity": float("inf")}, "outside"),
        ({"sparsity": True}, "must be a number"),
        ({"pull_sparsity": -1.0}, r"pull_sparsity=-1\.0 is outside"),
        ({"min_numel": -1}, "min_numel=-1 must be an integer of at least 0"),
        ({"min_ndim": 1.5}, "min_ndim=1.5"),
        ({"min_shard": 0}, "min_shard=0 must be an integer of at least 1"),
        ({"block_size": 4}, "block_size=4 must be an integer of at least 5"),
        ({"exclude": "fc.*"}, "tuple of name patterns"),
        ({"include": (1,)}, "tuple of name patterns"),
    ],
)
def test_config_refuses(knobs: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**knobs)  # type: ignore[arg-type]


def test_config_is_a_value() -> None:
    assert Settings(sparsity=1.5) == Settings(sparsity=1.5)
    assert dataclasses.replace(Settings(block_size=99), sparsity=1.25).block_size == 99
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().sparsity = 1.5  # type: ignore[misc]


@pytest.mark.parametrize("merged", [False, True])
def test_the_layout_of_a_bucket_is_found_once(merged: bool) -> None:
    shapes = [("a", (40, 40)), ("empty", (0, 3)), ("b", (7,)), ("c", (90, 30))]
    plan = make_plan(shapes, 3, Settings(block_size=512, min_shard=100))
    names = [name for name, _ in shapes]
    found = plan.layout(names, range(3), merged=merged)
    assert plan.layout(iter(names), [0, 1, 2], merged=merged) is found
    everything = [piece for pieces in found for piece in pieces]
    assert len(found) == (1 if merged else 3)
    expected = [p for owner in range(3) for p in plan.pieces_of(names, owner)]
    assert sorted(map(str, everything)) == sorted(map(str, expected))
    if merged:
        places = [(names.index(p.name), p.start) for p in everything]
        assert places == sorted(places)
    assert plan.layout(names[:1], range(3), merged=merged) is not found
    assert len(plan.layout(names, range(3), merged=not merged)) == (3 if merged else 1)
