"""The whole exchange between threads equals the oracle, and failures lose nothing."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lc3
from lc3.codec import Codec, Encoded, cpu, reference
from lc3.config import ENTROPY_STAGES, EntropyStage, Settings, Topology
from lc3.engines.auto import AutoEngine
from lc3.engines.costs import Costs
from lc3.engines.direct import engine_for
from lc3.engines.engine import Engine
from lc3.engines.exchange import Exchange, pending, push_what_owners_owe
from lc3.format import HEADER_BYTES
from lc3.meter import Meter
from lc3.plan import make_plan
from lc3.transport.group import MOST_BYTES
from lc3.transport.handshake import agree
from lc3.transport.loopback import Loopback
from lc3.transport.protocol import Lazily, Transport
from lc3.wire.coder import Coder
from tests.oracle import Oracle

SHAPES = [
    ("a", (40, 50)),
    ("b", (7,)),
    ("empty", (0, 3)),
    ("c", (900, 3)),
    ("d", (11, 3)),
]
SMALL = Settings(min_numel=100, min_shard=400)
DIRECT = dataclasses.replace(SMALL, topology="direct")


def in_threads(
    world: int, job: Callable[[int, Transport], Any], timeout_s: float = 20
) -> list[Any]:
    """Return what ``job(rank, transport)`` returned or raised, by rank."""
    results: list[Any] = [None] * world
    loopback = Loopback(world, timeout_s)

    def work(rank: int) -> None:
        try:
            results[rank] = job(rank, loopback.ranks[rank])
        except Exception as error:  # noqa: BLE001  # it is the result
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s + 10)
        assert not thread.is_alive()
    return results


def engine_of(
    transport: Transport,
    config: Settings = SMALL,
    codec: Codec = cpu,
    shapes: Any = SHAPES,
) -> Engine:
    plan = make_plan(shapes, transport.world, config)
    coder = Coder(codec, config.threads or 1)
    return engine_for(plan, config, transport, coder, Meter())


Gradients = Callable[[int, int], dict[str, Tensor]]


def random_gradients(rank: int, step: int, shapes: Any = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {
        name: torch.randn(int(np.prod(shape)), generator=generator) ** 3
        for name, shape in shapes
    }


def run(
    world: int,
    steps: int,
    config: Settings,
    gradients: Gradients = random_gradients,
    codecs: Sequence[Codec] = (cpu,),
    shapes: Any = SHAPES,
) -> list[Any]:
    """Train W ranks; check every mean against the oracle; return the engines."""
    oracle = Oracle(shapes, world, config)
    expected = [
        oracle.step(
            [
                {k: g.numpy().copy() for k, g in gradients(r, step).items()}
                for r in range(world)
            ]
        )
        for step in range(steps)
    ]

    def job(rank: int, transport: Transport) -> Engine:
        engine = engine_of(transport, config, codecs[rank % len(codecs)], shapes)
        for step in range(steps):
            grads = gradients(rank, step)
            engine.all_reduce(grads, step, 0)
            for name, grad in grads.items():
                np.testing.assert_array_equal(grad.numpy(), expected[step][name], name)
        for name, buffer in engine.residuals.sent.items():
            np.testing.assert_array_equal(buffer.numpy(), oracle.sent[rank][name], name)
        for slice_ in engine.plan.slices_of(engine.plan.coded, rank):
            np.testing.assert_array_equal(
                engine.residuals.owned[slice_.name].numpy(),
                oracle.owned[slice_.name][slice_.start : slice_.stop],
                slice_.name,
            )
        return engine

    results = in_threads(world, job)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("world", [2, 3, 4, 7])
@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("exchange", ["owners", "direct"])
def test_the_exchange_equals_the_oracle(
    world: int, block: int | None, exchange: Topology
) -> None:
    config = Settings(
        sparsity=1.5, min_numel=100, min_shard=400, block_size=block, topology=exchange
    )
    run(world, 20, config)


@pytest.mark.parametrize("world", [2, 3])
def test_messages_made_one_by_one_equal_the_oracle(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setattr("lc3.wire.coder._SEVERAL_CALLS_FROM", 0)
    asked: list[int] = []
    take = Lazily.__getitem__

    def noted(messages: Lazily, rank: int) -> Tensor:
        asked.append(rank)
        message: Tensor = take(messages, rank)
        return message

    monkeypatch.setattr(Lazily, "__getitem__", noted)
    run(world, 5, Settings(sparsity=1.5, min_numel=100, min_shard=400))
    assert set(asked) >= set(range(world))


@pytest.mark.parametrize("entropy", ["auto", "none"])
def test_two_ranks_send_as_much_with_owners_as_without(entropy: EntropyStage) -> None:
    """But for a header and a size; in one round instead of two, and coded once."""
    owners, direct = (
        run(2, 6, dataclasses.replace(SMALL, topology=exchange, entropy=entropy))[0]
        for exchange in ("owners", "direct")
    )
    assert direct.meter.rounds == 6
    assert owners.meter.rounds == 12
    assert direct.meter.sent_bytes < 1.05 * owners.meter.sent_bytes
    assert direct.meter.dense_bytes == owners.meter.dense_bytes
    assert direct.meter.pull.coded_elements == 0
    numel = sum(direct.plan.numel[name] for name in direct.plan.coded)
    assert direct.meter.push.coded_elements == 6 * numel
    assert "nan" not in direct.meter.line()
    assert not direct.means


def test_what_a_pull_would_carry_needs_owners() -> None:
    with pytest.raises(lc3.ConfigError, match="there is none"):
        Settings(topology="direct", pull_sparsity=1.5)
    with pytest.raises(lc3.ConfigError, match="one of 'owners', 'direct'"):
        Settings(topology="ring")  # type: ignore[arg-type]


@pytest.mark.parametrize("largest", [3e38, 1e38])
def test_a_sum_beyond_float32_is_nan_and_leaves_residuals(largest: float) -> None:
    """Each rank's part is finite: what overflows is their sum."""

    def job(rank: int, transport: Transport) -> tuple[Engine, dict[str, Tensor]]:
        engine = engine_of(transport, DIRECT)
        grads = random_gradients(rank, 0)
        grads["a"][3] = largest
        engine.all_reduce(grads, 0, 0)
        return engine, grads

    for engine, grads in in_threads(2, job):
        lost = largest > 2e38
        assert grads["a"][:1000].isnan().all() == lost
        assert grads["a"][:1000].isfinite().all() != lost
        assert engine.residuals.sent["a"][:1000].any() != lost
        assert engine.residuals.sent["c"].any()


@pytest.mark.parametrize("from_owners", [False, True])
def test_a_run_without_owners_goes_on_from_what_they_owed(from_owners: bool) -> None:
    """The sum of all means plus what is pending is that of the gradients."""

    def job(rank: int, transport: Transport) -> tuple[dict[str, Tensor], Engine]:
        engine = engine_of(transport, SMALL if from_owners else DIRECT)
        total = {
            name: torch.zeros(int(np.prod(shape))).double() for name, shape in SHAPES
        }
        for step in range(8):
            if step == 4 and from_owners:
                before = engine.residuals
                engine = engine_of(transport, DIRECT)
                for mine, kept in zip(
                    engine.residuals.buffers(), before.buffers(), strict=True
                ):
                    mine.copy_(kept)
                assert any(owed.any() for owed in before.owned.values())
                push_what_owners_owe(engine)
                assert not any(o.any() for o in engine.residuals.owned.values())
            grads = random_gradients(rank, step)
            engine.all_reduce(grads, step, 0)
            for name, grad in grads.items():
                total[name] += grad
        for name, owed in pending(engine).items():
            total[name] += owed
        return total, engine

    for total, _ in in_threads(2, job):
        for name, _ in SHAPES:
            everything = [
                random_gradients(r, s)[name] for r in (0, 1) for s in range(8)
            ]
            expected = sum(g.double() for g in everything) / 2
            torch.testing.assert_close(total[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["3lc", "auto"])
@pytest.mark.parametrize("world", [1, 3])
def test_half_precision_goes_the_way_of_what_it_stands_for(
    world: int, mode: str, dtype: torch.dtype
) -> None:
    """Raw pieces, steps whose norms are measured, and a lone rank among them."""

    def halves_of(rank: int, step: int) -> dict[str, Tensor]:
        return {k: g.to(dtype) for k, g in random_gradients(rank, step).items()}

    def job(rank: int, transport: Transport) -> list[dict[str, Tensor]]:
        found = []
        for given_as_halves in (False, True):
            engine: Exchange = engine_of(transport)
            if mode == "auto":
                assert isinstance(engine, Engine)
                costs = Costs(2e-9, 5e-10, 1e-4, 8e-12, 2e-4, 8e-12)
                engine = AutoEngine(engine, costs)
            for step in range(3):
                halves = halves_of(rank, step)
                grads = {k: h.float() for k, h in halves.items()}
                if given_as_halves:
                    grads = {k: torch.full_like(g, 7) for k, g in grads.items()}
                    engine.all_reduce(grads, step, 0, halves)
                else:
                    engine.all_reduce(grads, step, 0)
            owing = {f"{k} owing": r for k, r in engine.residuals.sent.items()}
            found.append({**grads, **owing})
        return found

    for whole, halved in in_threads(world, job):
        assert whole.keys() == halved.keys()
        for name, values in whole.items():
            assert torch.equal(values, halved[name]), name


@pytest.mark.parametrize("entropy", ENTROPY_STAGES)
def test_the_entropy_stage_changes_bytes_only(entropy: EntropyStage) -> None:
    config = dataclasses.replace(SMALL, entropy=entropy, min_shard=4000)
    shapes = [("a", (60, 90)), ("b", (70, 80))]

    def gradients(rank: int, step: int) -> dict[str, Tensor]:
        return random_gradients(rank, step, shapes)

    for engine in run(2, 6, config, gradients, shapes=shapes):
        for direction in (engine.meter.push, engine.meter.pull):
            assert (direction.coded_saved_bytes > 0) == (entropy != "none")


@settings(max_examples=settings().max_examples // 4)
@given(
    world=st.integers(2, 5),
    sparsity=st.floats(1, 1.9375, width=32),
    pull=st.none() | st.floats(1, 1.9375, width=32),
    density=st.none() | st.floats(0.001, 0.999),
    min_numel=st.integers(0, 3000),
    min_ndim=st.integers(0, 3),
    min_shard=st.integers(1, 3000),
    block_size=st.none() | st.integers(5, 3000),
    entropy=st.sampled_from(ENTROPY_STAGES),
)
def test_any_configuration_equals_the_oracle(
    world: int, sparsity: float, pull: float | None, **knobs: Any
) -> None:
    if knobs["density"] is not None:
        sparsity, pull = 1.0, None
    config = Settings(sparsity=sparsity, pull_sparsity=pull, **knobs)
    run(world, 3, config)


@pytest.mark.parametrize("entropy", ["auto", "rans"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int, entropy: EntropyStage) -> None:
    shapes = [(f"w{i}", (90, 40 + i)) for i in range(25)]

    def gradients(rank: int, step: int) -> dict[str, Tensor]:
        return random_gradients(rank, step, shapes)

    config = dataclasses.replace(
        SMALL, threads=threads, block_size=1000, entropy=entropy
    )
    for engine in run(2, 4, config, gradients, shapes=shapes):
        assert engine.messages.coder.threads == threads
        engine.close()


def test_ranks_with_different_backends_agree() -> None:
    run(3, 10, SMALL, codecs=(reference, cpu))


def test_gradients_arrive_in_the_end() -> None:
    """Sum of inputs = sum of outputs + what is still owed, on both sides."""
    engines = run(3, 30, SMALL)
    for name in ("a", "c"):
        given = torch.stack(
            [random_gradients(r, t)[name].double() for r in range(3) for t in range(30)]
        ).sum(0)
        oracle = Oracle(SHAPES, 3, SMALL)
        applied = np.zeros(given.numel())
        for t in range(30):
            grads = [
                {k: g.numpy() for k, g in random_gradients(r, t).items()}
                for r in range(3)
            ]
            applied += oracle.step(grads)[name]
        owed = sum(engine.residuals.sent[name].double() for engine in engines) / 3
        owned = torch.cat(
            [
                engines[s.owner].residuals.owned[name]
                for s in engines[0].plan.slices[name]
            ]
        )
        torch.testing.assert_close(
            given / 3,
            torch.from_numpy(applied) + owed + owned.double(),
            rtol=0,
            atol=2e-4,
        )


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [[0], [2], [0, 1, 2]])
def test_a_step_that_overflows_anywhere_never_was(bad: float, where: list[int]) -> None:
    """Every rank sees NaN in that tensor; later steps equal a run without the step."""

    def overflow_at_2(rank: int, step: int) -> dict[str, Tensor]:
        grads = random_gradients(rank, step)
        if step == 2:
            for grad in grads.values():
                grad.zero_()
            if rank in where:
                grads["c"][1234] = bad
        return grads

    def quiet_at_2(rank: int, step: int) -> dict[str, Tensor]:
        grads = random_gradients(rank, step)
        return {name: grad * (step != 2) for name, grad in grads.items()}

    def job(gradients: Gradients) -> list[Any]:
        def train(rank: int, transport: Transport) -> Any:
            engine = engine_of(transport)
            outputs = []
            for step in range(5):
                grads = gradients(rank, step)
                engine.all_reduce(grads, step, 0)
                outputs.append(grads)
            return outputs, sides_of(engine)

        return in_threads(3, train)

    for (with_, state), (without, state_too) in zip(
        job(overflow_at_2), job(quiet_at_2), strict=True
    ):
        bad_slice = with_[2]["c"].isnan()
        assert bad_slice[1234]
        assert bad_slice.sum() == 900
        for step in (0, 1, 3, 4):
            for name in with_[step]:
                assert torch.equal(with_[step][name], without[step][name])
        for side in ("sent", "owned"):
            for name, buffer in state[side].items():
                assert torch.equal(buffer, state_too[side][name])


def test_a_rank_without_gradient_keeps_its_residual() -> None:
    def sometimes(rank: int, step: int) -> dict[str, Tensor]:
        grads = random_gradients(rank, step)
        if step % 3 == 1 or (step % 3 == 2 and rank == 1):
            grads["a"].zero_()
        return grads

    engines = run(3, 12, SMALL, sometimes)
    assert all(engine.residuals.sent["a"].any() for engine in engines)


def test_one_rank_sends_nothing_and_changes_nothing() -> None:
    transport = Loopback(1).ranks[0]
    engine = engine_of(transport)
    grads = random_gradients(0, 0)
    engine.all_reduce(grads, 0, 0)
    for name, grad in random_gradients(0, 0).items():
        assert torch.equal(grads[name], grad)
    assert transport.sent_bytes == 0


def test_the_meter_counts_what_is_sent() -> None:
    engines = run(3, 4, SMALL)
    for engine in engines:
        meter = engine.meter
        assert meter.sent_bytes == engine.transport.sent_bytes
        assert meter.dense_bytes == pytest.approx(
            4 * 4 / 3 * 4 * (2000 + 7 + 2700 + 33)
        )
        assert meter.buckets == 4
        assert set(meter.push.coded_bytes) == {"a", "c"}
        assert meter.push.raw_bytes == {"b": 4 * 4 * 7, "d": 4 * 4 * 33}
        assert meter.push.header_bytes == 4 * 3 * HEADER_BYTES
        assert meter.push.coded_elements == 4 * (2000 + 2700)
        assert 0 < meter.push.density < 0.2
        frame_bytes = sum(meter.push.coded_bytes.values())
        assert meter.push.frame_bits_per_element == 8 * frame_bytes / 18800
        assert meter.push.coded_saved_bytes < frame_bytes
        assert (
            meter.push.bits_per_element
            == 8 * (frame_bytes - meter.push.coded_saved_bytes) / 18800
        )
        assert set(meter.seconds) == {"encode", "exchange", "decode"}
        assert meter.summary()["ratio"] == meter.dense_bytes / meter.sent_bytes
    everything = sum(
        sum(d.coded_bytes.values())
        + sum(d.raw_bytes.values())
        + d.header_bytes
        - d.coded_saved_bytes
        - d.raw_saved_bytes
        for e in engines
        for d in (e.meter.push, e.meter.pull, e.meter.pull)
    )
    own = sum(e.meter.sent_bytes for e in engines)
    assert own < everything  # pushes to oneself are never sent


def test_density_counts_nonzero_digits() -> None:
    def few(rank: int, step: int) -> dict[str, Tensor]:
        grads = {name: torch.zeros(int(np.prod(shape))) for name, shape in SHAPES}
        grads["a"][[3, 500, 1999]] = torch.tensor([1.0, -1.0, 1.0])
        return grads

    for engine in run(2, 1, Settings(min_numel=100), few):
        assert engine.meter.push.nonzero_digits == 3
        assert engine.meter.pull.nonzero_digits == (
            3 if engine.residuals.owned.get("a") is not None else 0
        )


def sides_of(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Return copies of the residuals."""
    both = {"sent": engine.residuals.sent, "owned": engine.residuals.owned}
    return {
        side: {name: buffer.clone() for name, buffer in named.items()}
        for side, named in both.items()
    }


class FailingCodec:
    """A codec that raises at its n-th call of one function."""

    def __init__(self, function: str, at: int) -> None:
        self.left = {"encode": -1, "check": -1, "add": -1, function: at}

    def count(self, function: str) -> None:
        self.left[function] -= 1
        if self.left[function] == 0:
            raise MemoryError(f"injected into {function}")

    def encode(self, x: Tensor, sparsity: float, out: Tensor, *rest: Any) -> Encoded:
        self.count("encode")
        return cpu.encode(x, sparsity, out, *rest)

    max_frame_bytes = staticmethod(cpu.max_frame_bytes)

    def check(self, frame: Tensor, numel: int) -> int:
        self.count("check")
        return cpu.check(frame, numel)

    def add(self, frame: Tensor, acc: Tensor) -> None:
        self.count("add")
        cpu.add(frame, acc)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("function", ["encode", "check", "add"])
@pytest.mark.parametrize("at", [1, 6, 9, 14, 25])
def test_a_rank_that_fails_stops_the_others_with_its_reason(
    rank: int, function: str, at: int
) -> None:
    def job(r: int, transport: Transport) -> None:
        engine = engine_of(
            transport, codec=FailingCodec(function, at) if r == rank else cpu
        )
        for step in range(10):
            before = sides_of(engine)
            try:
                engine.all_reduce(random_gradients(r, step), step, 0)
            except lc3.PeerError:
                after = sides_of(engine)
                assert all(
                    torch.equal(before[side][name], after[side][name])
                    for side in ("sent", "owned")
                    for name in before[side]
                )
                with pytest.raises(
                    lc3.ExchangeError, match="stopped at an earlier error"
                ):
                    engine.all_reduce(random_gradients(r, step), step, 0)
                raise

    for r, error in enumerate(in_threads(3, job)):
        if r == rank:
            assert isinstance(error, MemoryError)
        else:
            assert isinstance(error, lc3.PeerError)
            assert error.rank == rank
            assert error.reason == f"MemoryError: injected into {function}"


def test_a_damaged_message_stops_every_rank() -> None:
    class Damaging:
        def __init__(self, transport: Transport) -> None:
            self.inner = transport
            self.rank, self.world = transport.rank, transport.world
            self.calls = self.sent_bytes = self.rounds = 0
            self.most_bytes = MOST_BYTES

        def all_to_all(
            self, messages: Sequence[Tensor], timeout_s: float | None = None
        ) -> Any:
            arrived = self.inner.all_to_all(messages, timeout_s)
            self.calls += 1
            if self.calls == 1 and self.rank == 1:
                arrived[2] = arrived[2].clone()
                arrived[2][50] ^= 4
            return arrived

        def all_gather(self, message: Tensor) -> Any:
            return self.all_to_all([message] * self.world)

        def all_reduce(self, tensor: Tensor) -> None:
            self.inner.all_reduce(tensor)

        def leave_word(self, reason: str) -> None:
            self.inner.leave_word(reason)

    def job(rank: int, transport: Transport) -> None:
        engine = engine_of(Damaging(transport))
        for step in range(3):
            engine.all_reduce(random_gradients(rank, step), step, 4)

    results = in_threads(3, job)
    assert isinstance(results[1], lc3.FormatError)
    assert "rank 2, bucket 4, step 0: CRC-32" in str(results[1])
    for rank in (0, 2):
        assert isinstance(results[rank], lc3.PeerError)
        assert "CRC-32" in str(results[rank])


def test_ranks_out_of_step_stop_with_one_sentence() -> None:
    def job(rank: int, transport: Transport) -> None:
        engine_of(transport).all_reduce(
            random_gradients(rank, 0), step=3 + rank, bucket=0
        )

    results = in_threads(2, job)
    assert all(isinstance(error, lc3.FormatError) for error in results)
    assert "ranks run different numbers of steps" in str(results[0])


def test_sparse_tensors_pass_through() -> None:
    def job(rank: int, transport: Transport) -> Any:
        rows = [[], [0, 2, 2], [2]][rank]
        sparse = torch.sparse_coo_tensor(
            torch.tensor([rows], dtype=torch.int64),
            torch.full((len(rows), 2), 3.0 * rank),
            (4, 2),
            check_invariants=True,
        )
        mean = engine_of(transport).channel.pass_through(sparse, 0, 0)
        assert mean.is_sparse
        return mean.to_dense().tolist()

    assert in_threads(3, job) == [[[1, 1], [0, 0], [4, 4], [0, 0]]] * 3


def test_dense_tensors_pass_through() -> None:
    def job(rank: int, transport: Transport) -> Any:
        engine = engine_of(transport)
        values = torch.tensor([[1.0, 3.0 * rank, 4.0]], dtype=torch.float64)
        mean = engine.channel.pass_through(values, 0, 0)
        return mean.tolist(), engine.meter.passed_through_bytes

    # Three values on three ranks: one goes each way, in messages of 40 + 8 bytes.
    two_hops = 2 * 2 * (HEADER_BYTES + 8 + 8)
    assert in_threads(3, job) == [([[1.0, 3.0, 4.0]], two_hops)] * 3


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (
            {"config": Settings(sparsity=1.5)},
            r"Config.sparsity is 1.0 on rank 0 and 1.5 on rank 1",
        ),
        ({"version": "9"}, "lc3 version is '1' on rank 0 and '9' on rank 1"),
        (
            {"shapes": [("w", (3, 4))]},
            r"parameter w is \[4, 4\] on rank 0 and \[3, 4\] on rank 1",
        ),
        (
            {"shapes": [("v", (4, 4))]},
            r"parameter w is \[4, 4\] on rank 0 and 'missing'",
        ),
    ],
)
def test_ranks_that_differ_all_say_the_same(theirs: dict[str, Any], words: str) -> None:
    def job(rank: int, transport: Transport) -> Any:
        mine = {"version": "1", "config": Settings(), "shapes": [("w", (4, 4))]}
        given = SimpleNamespace(**{**mine, **(theirs if rank == 1 else {})})
        return agree(
            transport, given.version, given.config, given.shapes, lambda: "built"
        )

    results = in_threads(3, job)
    assert all(isinstance(error, lc3.PlanMismatch) for error in results)
    assert len({str(error) for error in results}) == 1
    with pytest.raises(lc3.PlanMismatch, match=words):
        raise results[0]


def test_an_error_before_the_first_step_reaches_every_rank() -> None:
    def job(rank: int, transport: Transport) -> Any:
        def build() -> str:
            if rank == 2:
                raise lc3.AttachError("out of luck")
            return "built"

        return agree(transport, "1", Settings(), [], build)

    results = in_threads(3, job)
    assert isinstance(results[2], lc3.AttachError)
    assert [str(results[0]), str(results[1])] == ["rank 2 stopped: out of luck"] * 2
