"""``Config``: every knob, checked once when it is built."""

import math
import struct
from dataclasses import dataclass
from typing import Literal, get_args

from lc3.errors import ConfigError

Mode = Literal["3lc", "auto"]
MODES: tuple[Mode, ...] = get_args(Mode)
Topology = Literal["owners", "direct"]
TOPOLOGIES: tuple[Topology, ...] = get_args(Topology)
EntropyStage = Literal["auto", "zstd", "rans", "none"]
ENTROPY_STAGES: tuple[EntropyStage, ...] = get_args(EntropyStage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How gradients are compressed. The same on every rank; ``attach`` compares it.

    Attributes:
        sparsity: 3LC's s for the push (worker to owner), 1 ≤ s < 2 after rounding to
            float32. Larger sends fewer values and keeps a larger residual.
        pull_sparsity: s for the pull (owner to everybody). ``None``: the push's.
        exchange: who averages. "owners", as in the paper: every slice has an owner, who
            gets what all ranks push, and whose mean, coded once more, everybody pulls.
            "direct": every rank sends what it has coded to every other, and all
            average alike: one round in place of two, and nothing is coded twice, for
            W/2 times the bytes. For large s on two ranks, or two nodes with a mesh, and
            for far links; not for ``hooks.push_pull``, whose masters owners hold.
        density: a share of values to send, 0 < density < 1, instead of a sparsity: the
            largest ones, each as their mean magnitude. Right for the light tails of
            local steps, wrong for per-step gradients. Both ways.
        budget: bytes that a rank may send per step, or per exchange of local steps, for
            what lc3 exchanges itself: ``sparsity``, or ``density``, then is where it
            begins, and all ranks move it together to hold the budget. ``None``: they
            stay.
        min_numel: parameters with fewer elements travel raw, as float32.
        min_ndim: parameters with fewer dimensions travel raw. 2 keeps norm scales and
            biases raw; 0 codes them too.
        raw: shell-style patterns of parameter names that travel raw, whatever their
            size.
        coded: patterns of parameter names that are coded, whatever their size.
        min_share: a parameter is spread over several owners only in slices of about
            this many elements or more.
        block: elements under one scale. ``None``: one scale per slice, as in the paper.
        entropy: a lossless stage over each message, both ways. "zstd" tries it on every
            message, "auto" on those that are long enough to gain; "rans" makes them 9
            to 13 % smaller yet, sparse ones 18 to 44 %, and takes longer: for links of
            some 40 Mbit/s and less (docs/codec.md). A message that does not shrink is
            sent as it is. "none": the paper's bytes.
        mode: "3lc": always. "auto": link and codec are measured at attach, and a bucket
            that a plain all-reduce, float32 or bfloat16, should bring sooner travels
            so; ``hooks.ddp`` only.
        threads: that encode and decode on this rank; may differ between ranks.
            ``None``: the cores it may use, divided among the ranks on its machine.
        log_every: steps between two lines about traffic and time in the log
            ``lc3.meter``, on the first rank. ``None``: none.
    """

    sparsity: float = 1.0
    pull_sparsity: float | None = None
    exchange: Topology = "owners"
    density: float | None = None
    budget: int | None = None
    min_numel: int = 1024
    min_ndim: int = 2
    raw: tuple[str, ...] = ()
    coded: tuple[str, ...] = ()
    min_share: int = 16_384
    block: int | None = None
    entropy: EntropyStage = "auto"
    mode: Mode = "3lc"
    threads: int | None = None
    log_every: int | None = None

    def __post_init__(self) -> None:
        check_sparsity("sparsity", self.sparsity)
        if self.pull_sparsity is not None:
            check_sparsity("pull_sparsity", self.pull_sparsity)
        if self.exchange not in TOPOLOGIES:
            raise ConfigError(
                f"exchange={self.exchange!r} must be one of "
                f"{', '.join(map(repr, TOPOLOGIES))}"
            )
        if self.exchange == "direct" and self.pull_sparsity is not None:
            raise ConfigError(
                f"pull_sparsity={self.pull_sparsity!r} is for a pull, and with "
                "exchange='direct' there is none; leave one of them out"
            )
        if self.density is not None and not (
            isinstance(self.density, float) and 0 < self.density < 1
        ):
            raise ConfigError(
                f"density={self.density!r} must be a float between 0 and 1, like 0.1"
            )
        if self.budget is not None:
            _check_count("budget", self.budget, 1)
            if self.mode == "auto":
                raise ConfigError(
                    f"budget={self.budget!r} steers what 3LC sends, and mode='auto' "
                    "may send without it; leave one of them out"
                )
        _check_count("min_numel", self.min_numel, 0)
        _check_count("min_ndim", self.min_ndim, 0)
        _check_count("min_share", self.min_share, 1)
        if self.block is not None:
            _check_count("block", self.block, 5)
        if self.threads is not None:
            _check_count("threads", self.threads, 1)
        if self.log_every is not None:
            _check_count("log_every", self.log_every, 1)
        if self.entropy not in ENTROPY_STAGES:
            raise ConfigError(
                f"entropy={self.entropy!r} must be one of "
                f"{', '.join(map(repr, ENTROPY_STAGES))}"
            )
        if self.mode not in MODES:
            raise ConfigError(
                f"mode={self.mode!r} must be one of {', '.join(map(repr, MODES))}"
            )
        _check_patterns("raw", self.raw)
        _check_patterns("coded", self.coded)


def check_sparsity(name: str, value: float) -> None:
    """Raise ``ConfigError`` unless 1 ≤ value < 2 holds, in float32 too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    rounded = math.nan
    if math.isfinite(value) and abs(value) < 4:
        (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    if not 1.0 <= rounded < 2.0:
        raise ConfigError(
            f"{name}={value!r} is outside [1, 2) (as float32); 1.0 sends most, "
            "1.75 is the paper's middle, and at 2 nothing would ever be sent"
        )


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")


def _check_patterns(name: str, value: tuple[str, ...]) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError(
            f"{name}={value!r} must be a tuple of name patterns, like ('fc.*',)"
        )
