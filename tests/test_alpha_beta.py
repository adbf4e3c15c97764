"""The model of step times: what it predicts of points it was made of, and its shape."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import record
from experiments.bench import alpha_beta
from experiments.bench.alpha_beta import Costs, Job, Point
from experiments.lab import netlab


def made(costs: Costs) -> list[Point]:
    """Points that the model itself has made, with other traffic each."""
    result = []
    for world in (2, 4, 8):
        for method, payload in (("float32", 9e5), ("3LC s=1.00", 9e3), ("fp16", 4e5)):
            for rate in ("10mbit", "100mbit", "1gbit"):
                point = Point(method, world, rate, 5.0 + world, payload, 0.0)
                result.append(replace(point, step_ms=costs.step_ms(point)))
    return result


def test_the_fit_finds_the_costs_that_made_the_points() -> None:
    costs = Costs(0.2, 0.05, 3e-6)
    found = alpha_beta.fit(made(costs))
    assert found.round_ms == pytest.approx(costs.round_ms, rel=1e-6)
    assert found.message_ms == pytest.approx(costs.message_ms, rel=1e-6)
    assert found.byte_ms == pytest.approx(costs.byte_ms, rel=1e-6)
    assert "27 of 27 within 15 %" in alpha_beta.check_table(found, made(costs))


def test_a_burst_passes_at_once() -> None:
    small = Point("fp16", 2, "10mbit", 1.0, 10_000, 0.0)
    assert small.wire_ms() == 0
    large = replace(small, payload_bytes=1_000_000)
    beyond = large.bytes - netlab.burst_bytes(10_000_000)
    assert large.wire_ms() == pytest.approx(beyond * 8 / 1e4)


def test_both_halves_have_every_method() -> None:
    fitted, held_out = alpha_beta.split(made(Costs(0.1, 0.1, 1e-6)))
    assert abs(len(fitted) - len(held_out)) == 1
    assert {p.method for p in fitted} == {p.method for p in held_out}


def test_what_wins_where() -> None:
    """Few bytes win on slow links, plain float32 on fast ones."""
    lines = alpha_beta.winners(Job(), {"float32": 64, "fp16": 32, "3LC s=1.00": 0.8})
    for line in lines:
        assert line[1].startswith("3LC s=1.00")
        assert not line[-1].startswith("3LC")


def test_two_levels_send_less_through_a_shared_link() -> None:
    job = Job()
    flat = job.step_ms("3LC s=1.00", 0.8, 64, 1e7 / job.per_node)
    two = job.two_level_ms("3LC s=1.00", 0.8, 64, 1e7)
    sending = flat - job.compute_ms
    assert sending / 10 < two - job.compute_ms < sending / 6


def test_too_few_points_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = record.read_csv(Path(record.RESULTS) / "digits.csv")
    path = tmp_path / "a.csv"
    record.write_csv(path, [{"step_ms": "1", **row} for row in rows])
    with pytest.raises(SystemExit):
        alpha_beta.main([str(path)])
    assert "0 measured points are too few" in capsys.readouterr().err
