"""What a user sees of a training: a line, TensorBoard, Prometheus, a profile."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lc3 import ConfigError, monitor
from lc3.config import Settings
from lc3.meter import Meter
from tests.test_engine import SMALL, random_gradients, run


def meter_of_a_run() -> Meter:
    meter: Meter = run(2, 3, SMALL)[0].meter
    return meter


def test_rounds_are_counted() -> None:
    """One for the push and one for the pull of every bucket."""
    assert meter_of_a_run().rounds == 2 * 3


def test_the_residual_beside_the_gradient() -> None:
    """Norms over all coded tensors, of the last step that is a multiple of 100."""
    for engine in run(2, 101, SMALL):
        rank, coded = engine.transport.rank, engine.plan.coded
        gradients = random_gradients(rank, 100)
        pushed = torch.cat([gradients[name] for name in coded]).norm()
        owed = torch.cat([engine.residuals.sent[name] for name in coded]).norm()
        assert engine.meter.residual_ratio == pytest.approx(float(owed / pushed))
        assert f"residual {owed / pushed:.1f} times the gradient" in engine.meter.line()
    assert math.isnan(Meter().residual_ratio)


def test_lines_of_a_training_that_goes_on_count_its_own_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    meter = Meter(log_every=20)
    with caplog.at_level("INFO", logger="lc3.meter"):
        for step in range(31, 42):
            meter.at_step(step)
            meter.add(sent_bytes=100, dense_bytes=1000.0, rounds=2, buckets=1)
    (said,) = caplog.messages
    assert said.startswith("step 40: 10.0 times fewer bytes (90 a step)")


def test_a_line_every_n_steps(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(log_every=3)
    with caplog.at_level(logging.INFO, logger="lc3.meter"):
        for step in (1, 2, 3, 3, 4, 7, 8):
            meter.at_step(step)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == ["step 3", "step 7"]
    meter = meter_of_a_run()
    meter.at_step(3)
    assert "times fewer bytes" in meter.line()
    assert "2.0 rounds, ms a step: encode " in meter.line()
    with pytest.raises(ConfigError, match="log_every=0"):
        Settings(log_every=0)


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events_of = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    meter = meter_of_a_run()
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        monitor.to_tensorboard(meter, writer, 7)
    events = events_of.EventAccumulator(str(tmp_path))
    events.Reload()
    summary = meter.summary()
    assert set(events.Tags()["scalars"]) == {f"lc3/{name}" for name in summary}
    (ratio,) = events.Scalars("lc3/ratio")
    assert ratio.step == 7
    assert ratio.value == pytest.approx(meter.ratio)


def test_prometheus_reads_the_meter_as_it_is() -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    meter = meter_of_a_run()
    monitor.to_prometheus(meter, {"rank": "1"}, registry)

    def value(name: str, **labels: str) -> Any:
        return registry.get_sample_value(name, {"rank": "1", **labels})

    assert value("lc3_sent_bytes_total") == meter.sent_bytes
    assert value("lc3_bits_per_element", direction="push") == pytest.approx(
        meter.push.bits_per_element
    )
    assert value("lc3_residual_ratio") == pytest.approx(meter.residual_ratio)
    assert value("lc3_seconds_total", stage="encode") == meter.seconds["encode"]
    meter.sent_bytes += 5
    assert value("lc3_sent_bytes_total") == meter.sent_bytes


def test_stages_are_ranges_of_the_profiler() -> None:
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=config) as profile:
        meter_of_a_run()
    found = {event.key for event in profile.key_averages()}
    assert {"lc3.encode", "lc3.exchange", "lc3.decode"} <= found
