"""A meter's figures for TensorBoard and Prometheus, through their own libraries.

monitor.to_tensorboard(state.meter, writer, step)     # whenever it suits
monitor.to_prometheus(state.meter, {"rank": "0"})     # once; read at every scrape
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lc3.meter import Meter

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Writer(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` has, and others like it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one figure."""
        ...


def to_tensorboard(meter: Meter, writer: Writer, step: int) -> None:
    """Write every figure of ``meter.summary()`` under ``lc3/``."""
    for name, value in meter.summary().items():
        writer.add_scalar(f"lc3/{name}", value, step)


def to_prometheus(
    meter: Meter, labels: Mapping[str, str] | None = None, registry: Any = None
) -> "MeterCollector":
    """Let Prometheus read a meter; needs the package prometheus_client.

    Args:
        meter: the meter of a hook's state.
        labels: labels of every figure, such as the rank where several are scraped
            together.
        registry: where it is registered. Default: prometheus_client's own.

    Returns:
        What the registry holds, for ``registry.unregister``.
    """
    from prometheus_client import REGISTRY

    collector = MeterCollector(meter, dict(labels or {}))
    (REGISTRY if registry is None else registry).register(collector)
    return collector


class MeterCollector:
    """Gives a meter's figures when they are asked for. Made by ``to_prometheus``."""

    def __init__(self, meter: Meter, labels: dict[str, str]) -> None:
        self._meter = meter
        self._labels = labels

    def collect(self) -> Iterable["Metric"]:
        """Yield every figure: totals as counters, the rest as gauges."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        names, values = list(self._labels), list(self._labels.values())
        meter = self._meter
        for name, help_, total in (
            ("steps", "optimizer steps or synchronised backward passes", meter.steps),
            ("buckets", "exchanges of a bucket", meter.buckets),
            ("rounds", "waits for a message of every other rank", meter.rounds),
            ("sent_bytes", "given to the transport for other ranks", meter.sent_bytes),
            ("dense_bytes", "a float32 all-reduce would send", meter.dense_bytes),
        ):
            counter = CounterMetricFamily(f"lc3_{name}", help_, labels=names)
            counter.add_metric(values, total)
            yield counter
        seconds = CounterMetricFamily(
            "lc3_seconds", "wall-clock by stage", labels=[*names, "stage"]
        )
        for stage, spent in list(meter.seconds.items()):
            seconds.add_metric([*values, stage], spent)
        yield seconds
        bits = GaugeMetricFamily(
            "lc3_bits_per_element", "sent so far", labels=[*names, "direction"]
        )
        density = GaugeMetricFamily(
            "lc3_density", "share of elements sent", labels=[*names, "direction"]
        )
        for direction, counted in (("push", meter.push), ("pull", meter.pull)):
            bits.add_metric([*values, direction], counted.bits_per_element)
            density.add_metric([*values, direction], counted.density)
        yield bits
        yield density
        residual = GaugeMetricFamily(
            "lc3_residual_ratio",
            "norm of what pushes owe over the norm of the gradient",
            labels=names,
        )
        residual.add_metric(values, meter.residual_ratio)
        yield residual
