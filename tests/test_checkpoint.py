"""Nothing is lost: across restarts, other numbers of ranks, and a scaler's skips."""

import argparse
import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import lc3
from lc3 import checkpoint, files
from lc3.checkpoint import Parts
from lc3.config import Settings
from lc3.engines.engine import Engine
from lc3.errors import StateError
from lc3.transport.loopback import Loopback
from tests import checkpoint_cases, state_fuzz
from tests.ranks import Ranks
from tests.test_engine import SMALL, engine_of, run

pytestmark = pytest.mark.timeout(240)
Pools = Callable[[int], Ranks]


def parts_of(engine: Engine) -> Parts:
    return Parts({"step": 3}, engine.residuals.sent, {"owned": engine.residuals.owned})


def states() -> list[dict[str, Any]]:
    """The states of two ranks after three steps."""
    return [
        checkpoint.save("ddp", engine.plan, rank, parts_of(engine))
        for rank, engine in enumerate(run(2, 3, SMALL))
    ]


@pytest.mark.parametrize(
    ("before", "after", "bfloat16"),
    [(3, 2, False), (3, 2, True), (2, 3, False), (2, 3, True), (4, 2, False)],
)
@pytest.mark.parametrize("hook", checkpoint_cases.HOOKS)
def test_another_number_of_ranks(
    ranks: Pools, tmp_path: Path, hook: str, before: int, after: int, bfloat16: bool
) -> None:
    """Masters and optimizer state exactly; what is pending up to one division."""
    folder = str(tmp_path)
    saved = ranks(before).run(checkpoint_cases.save, hook, folder, bfloat16)
    loaded = ranks(after).run(checkpoint_cases.load, hook, folder, before, bfloat16)
    masters, pending, state = saved[0]
    for found in loaded:
        for wanted, mine in zip((masters, state), (found[0], found[2]), strict=True):
            assert set(wanted) == set(mine)
            for name, tensor in wanted.items():
                assert torch.equal(mine[name], tensor), name
        for name, tensor in pending.items():
            apart = (found[1][name] - tensor).norm()
            assert apart <= 1e-6 * tensor.norm(), name
    assert any(tensor.any() for tensor in pending.values())
    assert len({found[3] for found in loaded}) == 1


def test_flush_makes_gradient_of_what_is_pending(ranks: Pools) -> None:
    for before, apart, after in ranks(2).run(checkpoint_cases.flushes):
        assert before > 0
        assert apart == 0
        assert after == 0


def test_torchs_distributed_checkpoint(ranks: Pools, tmp_path: Path) -> None:
    assert all(ranks(2).run(checkpoint_cases.through_dcp, str(tmp_path / "dcp")))


@pytest.mark.parametrize("hook", ["ddp", "push_pull"])
def test_steps_that_a_scaler_skips_never_were(ranks: Pools, hook: str) -> None:
    """One tensor overflows on one rank; the others' tensors lose nothing either."""
    bad = checkpoint_cases.overflows(10, 40, 2, seed=1)
    for digests, everyone, scales, skipped in ranks(2).run(
        checkpoint_cases.with_a_scaler, hook, 40, bad
    ):
        assert digests[0] == digests[1]
        assert all(theirs == digests for theirs in everyone)
        assert len(scales) > 3  # it grew, and backed off
        assert skipped == (len(bad) if hook == "push_pull" else 0)


@pytest.mark.parametrize("tokens", [None, [300.0, 100.0, 0.0], [1.5, 0.5, 2.0]])
def test_ranks_with_other_numbers_of_local_steps(
    ranks: Pools, tokens: list[float] | None
) -> None:
    """They weigh as much as they have trained, or as the script says."""
    reports = ranks(3).run(checkpoint_cases.uneven_local_steps, tokens)
    assert len({digest for digest, _ in reports}) == 1
    for _, apart in reports:
        assert apart < 1e-6


def test_steps_since_the_last_exchange_are_saved(ranks: Pools) -> None:
    first, other = ranks(2).run(checkpoint_cases.uneven_goes_on)
    assert first == other
    assert first[0] == first[1]


@pytest.mark.parametrize("hook", checkpoint_cases.HOOKS)
def test_a_bit_that_differs_is_found(ranks: Pools, hook: str) -> None:
    for said in ranks(3).run(checkpoint_cases.a_replica_drifts, hook):
        assert said.startswith("parameter '2.weight' differs on rank 1")


def test_a_state_comes_back() -> None:
    engine = run(2, 3, SMALL)[1]
    state = checkpoint.save("ddp", engine.plan, 1, parts_of(engine))
    fresh = engine_of(Loopback(2).ranks[1])
    mine = parts_of(fresh)
    mine.copy_from(checkpoint.load(state, "ddp", fresh.plan, 1, mine))
    pairs = zip(fresh.residuals.buffers(), engine.residuals.buffers(), strict=True)
    for new, old in pairs:
        assert torch.equal(new, old)
        assert old.any()


WRONG_SENT = {"a": torch.zeros(2000), "c": torch.zeros(2700)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "has format 1, this lc3 reads 3"),
        ({"hook": "push_pull"}, "saved with hook 'push_pull', this run has 'ddp'"),
        ({"rank": 0}, "saved with rank 0, this run has 1"),
        ({"world": 3}, "saved with world 3, this run has 2"),
        ({"plan": 1}, "saved with plan 1,"),
        (
            {"numel": {"a": 5}, "sent": {}, "slices": {}, "starts": {}},
            "a model with 5 elements of 'a', this run's has 2000",
        ),
        ({"extra": 1}, r"missing or unexpected keys: \['extra'\]"),
        ({"counters": {}}, "the state has counters .* this run"),
        ({"slices": {}}, r"has slices \[\], this run \['owned'\]"),
        ({"sent": {}}, "'a' is only on one side"),
        ({"sent": {**WRONG_SENT, "a": torch.zeros(1999)}}, "1999"),
        ({"sent": {**WRONG_SENT, "a": torch.zeros(2000).double()}}, "float64"),
        ({"sent": {**WRONG_SENT, "a": torch.full((2000,), torch.nan)}}, "nan"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    change: dict[str, Any], words: str
) -> None:
    engine = run(2, 3, SMALL)[1]
    before = [buffer.clone() for buffer in engine.residuals.buffers()]
    mine = parts_of(engine)
    state = checkpoint.save("ddp", engine.plan, 1, mine)
    changed = checkpoint.with_checksum({**state, **change})
    with pytest.raises(lc3.StateError, match=words):
        checkpoint.load(changed, "ddp", engine.plan, 1, mine)
    for old, new in zip(before, engine.residuals.buffers(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda both: [], "no states to merge"),
        (lambda both: both[:1], r"1 states of the ranks \[0\].* had 2 ranks"),
        (lambda both: [both[0], both[0]], r"2 states of the ranks \[0\]"),
        (
            lambda both: [
                both[0],
                checkpoint.with_checksum({**both[1], "counters": {"step": 4}}),
            ],
            r"rank 1 has counters \{'step': 4\}, rank 0",
        ),
        (lambda both: [lc3.merge_states(both)], "merged already"),
        (lambda both: [{"model": 1}], r"keys \['model'\] is not what"),
        (lambda both: [torch.zeros(3)], "keys Tensor is not what"),
    ],
)
def test_states_that_are_not_of_one_run(
    spoil: Callable[[list[Any]], list[Any]], words: str
) -> None:
    with pytest.raises(lc3.StateError, match=words):
        lc3.merge_states(spoil(states()))


def test_states_are_plain_and_files_are_read_as_such() -> None:
    buffer = io.BytesIO()
    torch.save(states(), buffer)
    whole = buffer.getvalue()
    assert len(torch.load(io.BytesIO(whole), weights_only=True)) == 2
    with pytest.raises((RuntimeError, ValueError, pickle.UnpicklingError)):
        torch.load(io.BytesIO(whole[: len(whole) // 2]), weights_only=True)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran-code"),)


def spoiled(kind: str, path: Path) -> None:
    """Write a file that is no whole checkpoint."""
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("accuracy 98 %")
    elif kind == "code":
        torch.save({"lc3": RunsCode()}, path)
    elif kind == "plain pickle with code":
        path.write_bytes(pickle.dumps(RunsCode()))
    else:
        lc3.save_checkpoint({"lc3": states()[0]}, path)
        path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "0 bytes is cut off, damaged or no"),
        ("text", "13 bytes is cut off, damaged or no checkpoint"),
        ("code", "could run foreign code"),
        ("plain pickle with code", "could run foreign code"),
        ("cut off", "is cut off, damaged or no"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-8.pt"
    spoiled(kind, path)
    with pytest.raises(lc3.StateError, match=words) as caught:
        lc3.load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)  # no advice to run it anyway
    assert not (tmp_path / "ran-code").exists()


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "step-8.pt"
    lc3.save_checkpoint({"lc3": states()[0]}, path)
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        lc3.save_checkpoint({"lc3": lambda: None}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError):
        lc3.load_checkpoint(tmp_path / "none.pt")


def test_a_flipped_bit_is_found() -> None:
    engine = run(2, 3, SMALL)[1]
    state = checkpoint.save("ddp", engine.plan, 1, parts_of(engine))
    state["sent"]["a"].view(torch.int32)[7] ^= 1 << 30
    with pytest.raises(lc3.StateError, match="checksum is wrong: a bit has flipped"):
        checkpoint.load(state, "ddp", engine.plan, 1, parts_of(engine))


@pytest.mark.parametrize("target", ["load", "merge"])
def test_a_state_that_was_changed_is_a_state_error(target: str) -> None:
    """``make fuzz`` tries more of them."""
    assert state_fuzz.campaign(target, limit=400, seed=1) == 400


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    lc3.save_checkpoint({"lr": 0.1}, path)
    refused = [
        numpy.float64(0.5),
        argparse.Namespace(lr=1),
        Path("x"),
        Settings(),
    ]
    for value in refused:
        with pytest.raises(lc3.StateError, match="load_checkpoint refuses"):
            lc3.save_checkpoint({"value": value}, path)
    assert lc3.load_checkpoint(path) == {"lr": 0.1}
    assert [one.name for one in tmp_path.iterdir()] == ["state.pt"]


def test_files_of_killed_processes_go_and_links_are_not_followed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.pt"
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".state.pt.{files.host()}.{dead.pid}.00"
    alive = tmp_path / f".state.pt.{files.host()}.{os.getpid()}.00"
    for one in (left, alive):
        one.write_bytes(b"half")
    lc3.save_checkpoint({"lr": 0.1}, path)
    assert not left.exists()
    assert alive.exists()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(lc3.StateError, match="is no regular file"):
        lc3.load_checkpoint(pipe)


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: Any) -> None:
    def save(value: object, file: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    path = tmp_path / "state.pt"
    lc3.save_checkpoint({"lr": 0.1}, path)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="is the disk full"):
        lc3.save_checkpoint({"lr": 0.2}, path)
    monkeypatch.undo()
    assert lc3.load_checkpoint(path) == {"lr": 0.1}
    assert len(list(tmp_path.iterdir())) == 1


def _bomb() -> bytes:
    """Return a file of a few kB that would load as 40 MB."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(10_000_000)}, plain)
    deflated = zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(plain) as source, deflated as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed.getvalue()


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


RUBBISH = {
    "compressed": (_bomb(), "compressed"),
    "expanded": (_saved({"a": torch.zeros(1).expand(1 << 40)}), "tensors of more"),
    "nested": (
        _saved({"a": [{"b": torch.zeros(1).expand(1 << 40)}]}),
        "tensors of more",
    ),
    "a list": (_saved([torch.zeros(1)]), ""),
    "empty": (b"", ""),
    "rubbish": (b"rubbish", ""),
    "cut": (_saved({"a": torch.zeros(9)})[:-30], ""),
    "code": (pickle.dumps({"a": print}), ""),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_a_peers_bytes_are_no_state(kind: str) -> None:
    sent, why = RUBBISH[kind]
    empty = torch.empty(0, dtype=torch.uint8)
    data = torch.frombuffer(bytearray(sent), dtype=torch.uint8) if sent else empty
    said = rf"rank 3 sent {len(sent)} bytes that are no state \(.*{why}"
    with pytest.raises(StateError, match=said):
        checkpoint.from_bytes(data, "rank 3")


def test_a_state_comes_back_from_bytes() -> None:
    state: dict[str, Any] = {"a": torch.arange(5), "n": 3, "b": {"c": torch.ones(2, 2)}}
    back = checkpoint.from_bytes(checkpoint.to_bytes(state), "rank 0")
    assert back["n"] == 3
    assert torch.equal(back["a"], state["a"])
    assert torch.equal(back["b"]["c"], torch.ones(2, 2))
