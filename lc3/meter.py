"""Bytes by direction and tensor, density, seconds: counted where they happen."""

import logging
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.autograd import profiler

from lc3.private import is_profiling

log = logging.getLogger(__name__)

_SOON, _LITTLE = 10, 2.0  # steps, and a ratio that is hardly worth it
NORMS_EVERY = 100  # steps; the two norms read all of the memory twice more


@dataclass
class Direction:
    """What one direction, push or pull, wrote on this rank.

    Its own share is counted too, so that bits per element do not depend on the number
    of ranks; ``Meter.sent_bytes`` is what really left.

    Attributes:
        coded_elements: gradient elements that were coded.
        coded_bytes: bytes of their frames, by parameter name, before the entropy stage.
        nonzero_digits: how many of them were sent as ±1.
        raw_bytes: bytes of raw pieces, by parameter name, before the entropy stage.
        header_bytes: bytes of message headers.
        coded_saved_bytes: bytes that the entropy stage took off the frames.
        raw_saved_bytes: bytes that it took off the raw pieces.
    """

    coded_elements: int = 0
    coded_bytes: Counter[str] = field(default_factory=Counter)
    nonzero_digits: int = 0
    raw_bytes: Counter[str] = field(default_factory=Counter)
    header_bytes: int = 0
    coded_saved_bytes: int = 0
    raw_saved_bytes: int = 0

    def add_frame(self, name: str, numel: int, size: int, nonzero_digits: int) -> None:
        """Count one frame of ``size`` bytes for ``numel`` elements of a parameter."""
        self.coded_elements += numel
        self.coded_bytes[name] += size
        self.nonzero_digits += nonzero_digits

    def add_messages(self, headers: int, raw_saved: int, coded_saved: int) -> None:
        """Count messages: bytes of their headers, what the entropy stage took off."""
        self.header_bytes += headers
        self.raw_saved_bytes += raw_saved
        self.coded_saved_bytes += coded_saved

    @property
    def bits_per_element(self) -> float:
        """Bits sent per coded element, scales included; nan before the first."""
        sent = self.coded_bytes.total() - self.coded_saved_bytes
        return _ratio(8 * sent, self.coded_elements)

    @property
    def frame_bits_per_element(self) -> float:
        """The same before the entropy stage."""
        return _ratio(8 * self.coded_bytes.total(), self.coded_elements)

    @property
    def density(self) -> float:
        """Share of coded elements sent as ±1; nan before the first."""
        return _ratio(self.nonzero_digits, self.coded_elements)


@dataclass
class Meter:
    """What compression did so far on this rank. Plain numbers, always counted.

    Attributes:
        steps: synchronised backward passes.
        buckets: exchanges of a bucket.
        rounds: times that all ranks waited for a message of every other: a link's
            latency counts that often.
        sent_bytes: bytes this rank gave to the transport for other ranks: messages with
            headers, the sizes that announce them, tensors passed through.
        dense_bytes: bytes that a bandwidth-optimal float32 all-reduce of the same
            gradients would have sent from this rank: 2 (W − 1) / W · 4 an element.
        passed_through_bytes: the part of ``sent_bytes`` that is sparse and float64
            gradients, which are not compressed.
        push, pull: the two directions; nothing is pulled where there are no owners.
        seconds: wall-clock by stage: encode, exchange, decode on the worker lane, and
            wait: exposed communication time, in which training was blocked.
            The lane's stages are ranges of torch.profiler, named ``lc3.encode`` and so
            on, where it looks at all threads: ``experimental_config=torch.profiler.
            _ExperimentalConfig(profile_all_threads=True)``.
        log_every: steps between two lines in the log ``lc3.meter``; ``None``: no lines.
    """

    steps: int = 0
    buckets: int = 0
    rounds: int = 0
    sent_bytes: int = 0
    dense_bytes: float = 0.0
    passed_through_bytes: int = 0
    push: Direction = field(default_factory=Direction)
    pull: Direction = field(default_factory=Direction)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    log_every: int | None = None
    _begun: int | None = None  # steps that were made before
    _said: bool = False
    _norms_of: int = -1  # the step that the squares belong to
    _gradient_square: float = 0.0
    _residual_square: float = 0.0
    _lock: threading.Lock = field(
        default_factory=threading.Lock, repr=False, compare=False
    )

    def add(
        self, sent_bytes: int, dense_bytes: float, rounds: int, buckets: int = 0
    ) -> None:
        """Count an exchange. From any thread."""
        with self._lock:
            self.sent_bytes += sent_bytes
            self.dense_bytes += dense_bytes
            self.rounds += rounds
            self.buckets += buckets

    def add_all_reduce(self, elements: int, element_bytes: int, world: int) -> None:
        """Count a bucket that DDP's own all-reduce moves: a ring."""
        hops = 2 * (world - 1)
        self.add(
            sent_bytes=hops * element_bytes * elements // world,
            dense_bytes=hops * 4 * elements / world,
            rounds=hops,
            buckets=1,
        )

    def at_step(self, steps: int) -> None:
        """Note that ``steps`` were made or begun, and log a line when it is time."""
        with self._lock:
            if self._begun is None:  # a training that goes on has exchanged nothing
                self._begun = 0 if self.buckets else max(0, steps - 1)
                self.steps = self._begun
            due = self.log_every is not None and steps // self.log_every > (
                self.steps // self.log_every
            )
            self.steps = steps
            made = steps - self._begun
            little = not self._said and made > _SOON and 0 < self.ratio < _LITTLE
            self._said = self._said or little
        if due:
            log.info("%s", self.line())
        if little:
            log.warning(
                "lc3 sends only %.1f times fewer bytes than float32 would have after "
                "%d steps: small tensors, buffers and what is not coded travel as they "
                "are; python -m lc3 measure says what it brings, and without lc3 there "
                "is less to compute",
                self.ratio,
                made,
            )

    def add_norms(
        self, step: int, gradient_square: float, residual_square: float
    ) -> None:
        """Count a bucket's squared norms; the first one of a step begins anew."""
        if step != self._norms_of:
            self._norms_of = step
            self._gradient_square = self._residual_square = 0.0
        self._gradient_square += gradient_square
        self._residual_square += residual_square

    @property
    def residual_ratio(self) -> float:
        """The residual's norm over the gradient's, ‖residual‖ / ‖gradient‖.

        Of this rank's coded tensors, after the last step whose number is a multiple of
        100; nan before the first. Where it grows without end, the sparsity is too much.
        """
        return math.sqrt(_ratio(self._residual_square, self._gradient_square))

    @contextmanager
    def stage(self, name: str, within: str | None = None) -> Iterator[None]:
        """Add the wall-clock seconds of the block to ``seconds[name]``.

        Args:
            name: of the stage.
            within: the stage that the block is in, which they do not count for.
        """
        start = time.perf_counter()
        try:
            if is_profiling():  # a range takes microseconds
                with profiler.record_function(f"lc3.{name}"):
                    yield
            else:
                yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] += took
            if within is not None:
                self.seconds[within] -= took

    @property
    def ratio(self) -> float:
        """How many times fewer bytes left this rank than float32 would have sent."""
        return _ratio(self.dense_bytes, self.sent_bytes)

    def line(self) -> str:
        """Return what happened so far, since the state was made, in one line."""
        steps = max(self.steps - (self._begun or 0), 1)
        stages = ", ".join(
            f"{stage} {1e3 * self.seconds[stage] / steps:.2f}"
            for stage in ("encode", "exchange", "decode", "wait")
        )
        return (
            f"step {self.steps:,}: {self.ratio:.1f} times fewer bytes "
            f"({self.sent_bytes / steps:,.0f} a step), "
            f"{self._bits()} bits an element, "
            f"residual {self.residual_ratio:.1f} times the gradient, "
            f"{self.rounds / steps:.1f} rounds, ms a step: {stages}"
        )

    def _bits(self) -> str:
        ways = [d for d in (self.push, self.pull) if d.coded_elements]
        return " + ".join(f"{way.bits_per_element:.3f}" for way in ways) or "no"

    def summary(self) -> dict[str, float]:
        """Return the main figures by name, for logs and tables."""
        return {
            "steps": self.steps,
            "buckets": self.buckets,
            "rounds": self.rounds,
            "sent_bytes": self.sent_bytes,
            "ratio": self.ratio,
            "push_bits_per_element": self.push.bits_per_element,
            "pull_bits_per_element": self.pull.bits_per_element,
            "push_frame_bits_per_element": self.push.frame_bits_per_element,
            "pull_frame_bits_per_element": self.pull.frame_bits_per_element,
            "push_density": self.push.density,
            "pull_density": self.pull.density,
            "residual_ratio": self.residual_ratio,
            **{f"{stage}_seconds": value for stage, value in self.seconds.items()},
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
