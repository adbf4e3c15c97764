"""Step times from latency and bandwidth: fitted on the lab, checked, extrapolated.

    python -m experiments.bench.alpha_beta digits.csv:links2 digits.csv:links

A step takes its computing and coding time, as measured without any network, and then

    a · rounds + b · messages + c · bytes + wire

where a is the latency of a round, b and c what the hosts' processors spend on a
message and on a byte, and wire is the time that the bytes beyond the link's burst take
at its rate. Bytes are what the method counts plus the headers that gloo and TCP add.
a, b and c are fitted by non-negative least squares to half of the points; the error is
that of the other half.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from scipy.optimize import nnls

from experiments.lab import netlab
from experiments.record import ResultError, read_csv
from experiments.tables import COLUMNS, Row, grid, insert

PACKET_BYTES, PAYLOAD_BYTES, MESSAGE_BYTES = 1514, 1448, 450
RATES = {
    "10 Mbit/s": 1e7,
    "100 Mbit/s": 1e8,
    "1 Gbit/s": 1e9,
    "10 Gbit/s": 1e10,
    "100 Gbit/s": 1e11,
}
WORLDS = (2, 4, 8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Pattern:
    """How a method talks.

    Attributes:
        hops: exchanges of a message with everybody, in a step in which there are some.
        rings: all-reduces of a step, 2 (W − 1) rounds of one message each.
        every: how many steps share what is sent in one of them.
    """

    hops: int = 0
    rings: int = 0
    every: int = 1

    def rounds(self, world: int) -> float:
        """Return how often a rank waits for others in a step."""
        return self.hops / self.every + self.rings * 2 * (world - 1)

    def messages(self, world: int) -> float:
        """Return how many messages a rank sends in a step."""
        return (self.hops / self.every + 2 * self.rings) * (world - 1)


PATTERNS = {
    **{m: Pattern(rings=1) for m in ("float32", "fp16", "bf16")},
    **{m: Pattern(hops=2) for m in ("8-bit int", "top-k 1%", "MQE 1-bit int")},
    **{f"3LC s={s:.2f}": Pattern(hops=2) for s in (1.0, 1.5, 1.75, 1.9)},
    "push-pull s=1.00": Pattern(hops=3),
    **{f"local H={every}": Pattern(hops=2, every=every) for every in (8, 16, 32)},
}


@dataclass(frozen=True)
class Point:
    """One measurement of the lab: a method, a world size and a rate."""

    method: str
    world: int
    rate: str
    local_ms: float
    payload_bytes: float
    step_ms: float

    @property
    def bytes(self) -> float:
        """Return what a rank sends in a step, headers included."""
        headers = MESSAGE_BYTES * PATTERNS[self.method].messages(self.world)
        return self.payload_bytes * PACKET_BYTES / PAYLOAD_BYTES + headers

    def wire_ms(self) -> float:
        """Return how long the bytes beyond the burst take at the link's rate."""
        bit_s = netlab.rate_bits(self.rate)
        every = PATTERNS[self.method].every
        beyond = max(0.0, every * self.bytes - netlab.burst_bytes(bit_s)) / every
        return beyond * 8e3 / bit_s

    def terms(self) -> list[float]:
        """Return what a, b and c are multiplied with."""
        pattern = PATTERNS[self.method]
        return [pattern.rounds(self.world), pattern.messages(self.world), self.bytes]


@dataclass(frozen=True)
class Costs:
    """The fitted part of the model, in milliseconds.

    Attributes:
        round_ms: a, per round.
        message_ms: b, per message.
        byte_ms: c, per byte.
    """

    round_ms: float
    message_ms: float
    byte_ms: float

    def step_ms(self, point: Point) -> float:
        """Return the predicted milliseconds of a step."""
        fitted = (self.round_ms, self.message_ms, self.byte_ms)
        spent = sum(x * y for x, y in zip(fitted, point.terms(), strict=True))
        return point.local_ms + spent + point.wire_ms()


def points(rows: Sequence[Row]) -> list[Point]:
    """Return the lab's measurements of methods whose pattern is known."""
    result = []
    for row in rows:
        if row["step"] != row["steps"] or not row.get("rate"):
            continue
        if row["method"] not in PATTERNS:
            continue
        result.append(
            Point(
                row["method"],
                int(row["ranks"]),
                row["rate"],
                float(row["compute_ms"]) + float(row["codec_ms"]),
                int(row["sent_bytes"]) / int(row["steps"]),
                float(row["step_ms"]),
            )
        )
    return result


def fit(measured: Sequence[Point]) -> Costs:
    """Return the costs that predict ``measured`` with the least relative squares."""
    scale = np.array([1 / point.step_ms for point in measured])
    left = np.array([point.terms() for point in measured]) * scale[:, None]
    rest = np.array([p.step_ms - p.local_ms - p.wire_ms() for p in measured]) * scale
    columns = np.linalg.norm(left, axis=0)
    found, _ = nnls(left / columns, rest)
    return Costs(*(found / columns))


def errors(costs: Costs, measured: Sequence[Point]) -> list[float]:
    """Return predicted over measured, less one, for each point."""
    return [costs.step_ms(point) / point.step_ms - 1 for point in measured]


def check_table(costs: Costs, held_out: Sequence[Point]) -> str:
    """Return the points that were not fitted, predicted and measured, as Markdown."""
    titles = ["method", "ranks", "rate", "measured", "predicted", "error"]
    lines = []
    for point, error in zip(held_out, errors(costs, held_out), strict=True):
        times = (point.step_ms, costs.step_ms(point))
        lines.append(
            [
                *(point.method, str(point.world), point.rate),
                *(f"{ms:,.1f} ms" for ms in times),
                f"{100 * error:+.1f} %",
            ]
        )
    sizes = sorted(abs(error) for error in errors(costs, held_out))
    within = sum(size <= 0.15 for size in sizes)
    return (
        f"{grid(titles, lines)}\n\nPoints that were not fitted: {within} of "
        f"{len(sizes)} within 15 %, median error {100 * median(sizes):.1f} %, largest "
        f"{100 * sizes[-1]:.1f} %. Fitted: {1e3 * costs.round_ms:.0f} µs a round, "
        f"{1e3 * costs.message_ms:.0f} µs a message, "
        f"{1e6 * costs.byte_ms:.2f} ns a byte.\n"
    )


@dataclass(frozen=True)
class Job:
    """What is extrapolated: a model on machines of one kind.

    Attributes:
        elements: parameters of the model.
        compute_ms: a step on one machine.
        codec_gb_s: float32 gradients encoded and decoded, both hops together.
        latency_ms: milliseconds of a round between machines.
        message_ms: processor time of a message.
        inner_bit_s: rate between the ranks of one node, for two levels.
        per_node: ranks of a node.
    """

    elements: int = 25_600_000
    compute_ms: float = 200.0
    codec_gb_s: float = 2.0
    latency_ms: float = 0.3
    message_ms: float = 0.005
    inner_bit_s: float = 1e11
    per_node: int = 8

    def step_ms(self, method: str, bits: float, world: int, bit_s: float) -> float:
        """Return the milliseconds of a step with one rank a machine.

        Args:
            method: a method of ``PATTERNS``.
            bits: per element and step, push and pull together.
            world: machines.
            bit_s: rate of each machine's link.
        """
        pattern = PATTERNS[method]
        # An all-reduce by recursive halving and doubling: a ring's bytes, few rounds.
        rounds = pattern.hops + pattern.rings * 2 * math.ceil(math.log2(world))
        talk = self.latency_ms * rounds
        messages = pattern.hops * (world - 1) + pattern.rings * rounds
        talk += self.message_ms * messages
        payload = (world - 1) / world * self.elements * bits / 8
        sent = payload * PACKET_BYTES / PAYLOAD_BYTES
        sent += MESSAGE_BYTES * messages
        code = 0.0 if pattern.rings else self.elements * 4 / (self.codec_gb_s * 1e6)
        return self.compute_ms + code * pattern.hops / 2 + talk + sent * 8e3 / bit_s

    def two_level_ms(self, method: str, bits: float, world: int, bit_s: float) -> float:
        """Return the same with ``per_node`` ranks a machine, which share its link.

        The ranks of a node reduce densely among themselves first; each then speaks for
        its share of the parameters, and they gather afterwards.
        """
        share = self.elements // self.per_node
        inner = 2 * (self.per_node - 1) / self.per_node * 4 * self.elements
        one = Job(
            *(share, 0.0, self.codec_gb_s, self.latency_ms, self.message_ms),
        )
        outer = one.step_ms(method, bits, world // self.per_node, bit_s / self.per_node)
        return self.compute_ms + inner * 8e3 / self.inner_bit_s + outer


def winners(job: Job, bits: Mapping[str, float]) -> list[list[str]]:
    """Return by world and rate the fastest method and how it compares with float32."""
    lines = []
    for world in WORLDS:
        line = [str(world)]
        for bit_s in RATES.values():
            times = {m: job.step_ms(m, b, world, bit_s) for m, b in bits.items()}
            best = min(times, key=times.__getitem__)
            line.append(f"{best} ({times['float32'] / times[best]:.1f} ×)")
        lines.append(line)
    return lines


def extrapolation(job: Job, bits: Mapping[str, float]) -> str:
    """Return where each method wins, and flat against two levels, as Markdown."""
    titles = ["ranks", *RATES]
    methods = range(1, len(titles))
    flat = grid(titles, winners(job, bits), words=methods)
    coded = "3LC s=1.00"
    lines = []
    for world in (w for w in WORLDS if w >= 2 * job.per_node):
        line = [str(world)]
        for bit_s in RATES.values():
            # The same machines: one rank each a link of rate / per_node, against
            # per_node ranks that share theirs.
            one = job.step_ms(coded, bits[coded], world, bit_s / job.per_node)
            two = job.two_level_ms(coded, bits[coded], world, bit_s)
            line.append(f"{one:,.0f} → {two:,.0f} ms")
        lines.append(line)
    levels = grid(titles, lines, words=methods)
    return (
        f"The fastest method and, in brackets, float32's step time over its own, for a "
        f"model of {job.elements / 1e6:.1f} M parameters, {job.compute_ms:.0f} ms of "
        f"computing, a codec of {job.codec_gb_s:.1f} GB/s, {job.latency_ms} ms of "
        "latency; extrapolated, not measured, and local steps left out, since they "
        f"change what is trained:\n\n{flat}\n\n{coded}, {job.per_node} ranks a "
        "machine that share its link: flat, then with two levels "
        f"(`attach(mesh={job.per_node})`):\n\n{levels}\n"
    )


def plot(job: Job, bits: Mapping[str, float], path: Path) -> None:
    """Write a PNG: step time against link rate, for three world sizes."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    rates = np.logspace(7, 11, 81)
    for axes, world in zip(
        figure.subplots(1, 3, sharey=True), (4, 64, 1024), strict=True
    ):
        for method, bit in bits.items():
            times = [job.step_ms(method, bit, world, rate) for rate in rates]
            axes.plot(rates / 1e6, times, label=method)
        axes.axhline(job.compute_ms, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="Mbit/s", title=f"{world} ranks")
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel("step, ms (dotted: computing alone)")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def bits_of(measured: Sequence[Row]) -> dict[str, float]:
    """Return bits per element and step, both ways, of methods that send every step."""
    result: dict[str, float] = {}
    for row in measured:
        method = row["method"]
        if row["step"] == row["steps"] and method in PATTERNS and "local" not in method:
            result[method] = float(row["push_bits"]) + float(row["pull_bits"])
    return result


def split(measured: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Return every second point for the fit, and the others for the check."""
    ordered = sorted(measured, key=lambda p: (p.method, p.world, p.step_ms))
    return ordered[::2], ordered[1::2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, check, extrapolate."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.alpha_beta", description=__doc__
    )
    parser.add_argument(
        "csv", nargs="+", type=Path, help="of experiments.harness.run, with rates"
    )
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--docs", type=Path, help="Markdown file with markers")
    options = parser.parse_args(arguments)
    try:
        rows = [row for path in options.csv for row in read_csv(path, COLUMNS)]
    except ResultError as error:
        parser.error(str(error))
    measured = points(rows)
    if len(measured) < 8:
        parser.error(f"{len(measured)} measured points are too few; 8 or more")
    some, others = split(measured)
    costs = fit(some)
    checked = check_table(costs, others)
    job, bits = Job(), bits_of(rows)
    further = extrapolation(job, bits)
    console = Console(highlight=False, soft_wrap=True)
    console.print(checked)
    console.print(f"mean error {100 * mean(errors(costs, others)):+.1f} %\n{further}")
    if options.plot:
        plot(job, bits, options.plot)
    if options.docs:
        text = insert(options.docs.read_text(), "model-check", checked)
        options.docs.write_text(insert(text, "model-wins", further))


if __name__ == "__main__":
    main()
