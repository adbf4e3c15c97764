"""``Config``: what a user says. ``Settings``: that, and a form's defaults."""

import math
import struct
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from lc3.errors import ConfigError

_MOST = 2**62  # of what is counted

Mode = Literal["3lc", "auto"]
MODES: tuple[Mode, ...] = get_args(Mode)
Topology = Literal["owners", "direct"]
TOPOLOGIES: tuple[Topology, ...] = get_args(Topology)
EntropyStage = Literal["auto", "zstd", "rans", "none"]
ENTROPY_STAGES: tuple[EntropyStage, ...] = get_args(EntropyStage)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Settings:
    """Every knob with its value: what a form's defaults and a ``Config`` come to.

    Attributes:
        sparsity: see ``Config``.
        density: see ``Config``.
        entropy: see ``Config``.
        include: see ``Config``.
        exclude: see ``Config``.
        bytes_per_step: see ``Config``.
        log_every: see ``Config``.
        pull_sparsity: see ``Tuning``. ``None``: the push's.
        topology: see ``Tuning``.
        min_numel: see ``Tuning``.
        min_ndim: see ``Tuning``.
        min_shard: see ``Tuning``.
        block_size: see ``Tuning``.
        mode: see ``Tuning``.
        threads: see ``Tuning``.
    """

    sparsity: float = 1.0
    density: float | None = None
    entropy: EntropyStage = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    bytes_per_step: int | None = None
    log_every: int | None = None
    pull_sparsity: float | None = None
    topology: Topology = "owners"
    min_numel: int = 1024
    min_ndim: int = 2
    min_shard: int = 16_384
    block_size: int | None = None
    mode: Mode = "3lc"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_sparsity("sparsity", self.sparsity)
        if self.pull_sparsity is not None:
            check_sparsity("pull_sparsity", self.pull_sparsity)
        _check_word("topology", self.topology, TOPOLOGIES)
        _check_word("entropy", self.entropy, ENTROPY_STAGES)
        _check_word("mode", self.mode, MODES)
        if self.density is not None and not (
            isinstance(self.density, float) and 0 < self.density < 1
        ):
            raise ConfigError(
                f"density={self.density!r} must be a float between 0 and 1, like 0.1"
            )
        check_count("bytes_per_step", self.bytes_per_step, 1)
        check_count("min_numel", self.min_numel, 0)
        check_count("min_ndim", self.min_ndim, 0)
        check_count("min_shard", self.min_shard, 1)
        check_count("block_size", self.block_size, 5)
        check_count("threads", self.threads, 1)
        check_count("log_every", self.log_every, 1)
        _check_patterns("include", self.include)
        _check_patterns("exclude", self.exclude)
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Raise ``ConfigError`` where one knob makes another meaningless."""
        if self.topology == "direct" and self.pull_sparsity is not None:
            raise ConfigError(
                f"pull_sparsity={self.pull_sparsity!r} is for a pull, and with "
                "topology='direct' there is none; leave one of them out"
            )
        if self.density is not None:
            for knob in ("sparsity", "pull_sparsity"):
                value = getattr(self, knob)
                if value not in (None, 1.0):
                    raise ConfigError(
                        f"density={self.density!r} says how many values are sent, and "
                        f"{knob}={value!r} would say it again; leave one of them out"
                    )
        if self.mode == "auto" and self.bytes_per_step is not None:
            raise ConfigError(
                f"bytes_per_step={self.bytes_per_step!r} steers what 3LC sends, and "
                "mode='auto' may send without it; leave one of them out"
            )

    def __repr__(self) -> str:
        return _said(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Tuning:
    """Knobs for experts. What is ``None`` is as the form has it.

    Attributes:
        pull_sparsity: 3LC's s for the pull (owner to everybody). Default: the push's.
        topology: who averages. "owners", as in the paper: every slice has an owner, who
            gets what all ranks push, and whose mean, coded once more, everybody pulls.
            "direct": every rank sends what it has coded to every other, and all
            average alike: one round in place of two, and nothing is coded twice, for
            W/2 times the bytes. For large s on two ranks, or two nodes with a mesh, and
            for far links; not for ``hooks.push_pull``, whose masters owners hold.
        min_numel: elements; parameters with fewer travel uncoded, as float32.
        min_ndim: dimensions; parameters with fewer travel uncoded. 2 keeps norm scales
            and biases in float32; 0 codes them too.
        min_shard: elements; a parameter is spread over several owners only in slices of
            about as many or more.
        block_size: elements under one scale. Default: a slice, as in the paper.
        mode: "3lc": always. "auto": link and codec are measured at attach, and a bucket
            that a plain all-reduce, float32 or bfloat16, should bring sooner travels
            so; ``hooks.ddp`` only.
        threads: number of codec threads on this rank; may differ between ranks.
            Default: its share of the cores of the machine.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> Tuning(topology="direct")
        Tuning(topology='direct')
    """

    pull_sparsity: float | None = None
    topology: Topology | None = None
    min_numel: int | None = None
    min_ndim: int | None = None
    min_shard: int | None = None
    block_size: int | None = None
    mode: Mode | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        Settings(**_given(self))

    def __repr__(self) -> str:
        return _said(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Config:
    """What is compressed, and how much. What is ``None`` is as the form has it.

    The same on every rank; ``attach`` compares it.

    Attributes:
        sparsity: 3LC's s, 1 ≤ s < 2 after rounding to float32. Larger sends fewer
            values and keeps a larger residual.
        density: share of values to send instead, 0 < density < 1: the largest ones,
            each as their mean magnitude, in push and pull. For local steps, whose
            moves are light-tailed; not recommended for per-step gradients.
        entropy: lossless stage over each message, both ways. "zstd" tries it on every
            message, "auto" on those that are long enough to gain; "rans" makes them
            smaller yet and takes longer, for slow links
            (docs/explanation/codec.md). A message that does not shrink is sent as it
            is. "none": the paper's bytes.
        include: shell-style patterns of parameter names that are coded, whatever their
            size.
        exclude: patterns of parameter names that travel uncoded, as float32, whatever
            their size.
        bytes_per_step: target bytes per rank and step, or per exchange of local steps,
            for what lc3 exchanges itself. ``sparsity``, or ``density``, is then only
            the starting value, and is adjusted alike on all ranks.
        log_every: steps between two lines about traffic and time in the log
            ``lc3.meter``, on the first rank.
        tuning: knobs for experts.

    Raises:
        ConfigError: a value is out of range, or makes another one meaningless.

    Example:
        >>> Config(sparsity=1.5, exclude=("head.*",))
        Config(sparsity=1.5, exclude=('head.*',))
    """

    sparsity: float | None = None
    density: float | None = None
    entropy: EntropyStage | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    bytes_per_step: int | None = None
    log_every: int | None = None
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tuning, Tuning | None):
            raise ConfigError(
                f"tuning={self.tuning!r} must be a Tuning, like "
                "lc3.Tuning(topology='direct')"
            )
        if self.sparsity is not None and self.density is not None:
            raise ConfigError(
                f"density={self.density!r} says how many values are sent, and "
                f"sparsity={self.sparsity!r} would say it again; leave one of them out"
            )
        pull = None if self.tuning is None else self.tuning.pull_sparsity
        if self.density is not None and pull is not None:
            raise ConfigError(
                f"density={self.density!r} says how many values are sent, and "
                f"pull_sparsity={pull!r} would say it again; leave one of them out"
            )
        settle(self, Settings())

    def __repr__(self) -> str:
        return _said(self)


def settle(config: "Config | Settings | None", defaults: Settings) -> Settings:
    """Return every knob: what ``config`` says, and otherwise what a form has.

    Args:
        config: the user's. ``Settings``, those of another state, are complete.
        defaults: defaults of the form.

    Raises:
        ConfigError: a value makes another one meaningless.
    """
    if config is None:
        return defaults
    if isinstance(config, Settings):
        return config
    if not isinstance(config, Config):
        raise ConfigError(
            f"config={config!r} must be a Config, like lc3.Config(sparsity=1.5)"
        )
    given = _given(config)
    given |= _given(given.pop("tuning", Tuning()))
    if "sparsity" in given or "pull_sparsity" in given:  # instead of a density
        given.setdefault("density", None)
    elif "density" in given:
        given |= {"sparsity": 1.0, "pull_sparsity": None}
    if given.get("pull_sparsity") is not None:
        given.setdefault("topology", "owners")
    return replace(defaults, **given)


def _given(config: "Config | Tuning") -> dict[str, Any]:
    """Return what is said, by name."""
    said = ((one.name, getattr(config, one.name)) for one in fields(config))
    return {name: value for name, value in said if value is not None}


def _said(config: "Config | Tuning | Settings") -> str:
    """Return a ``repr`` that names only what is not as it is by default."""
    said = ", ".join(
        f"{one.name}={value!r}"
        for one in fields(config)
        if (value := getattr(config, one.name)) != one.default
    )
    return f"{type(config).__name__}({said})"


def check_sparsity(name: str, value: float) -> None:
    """Raise ``ConfigError`` unless 1 ≤ value < 2 holds, in float32 too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    rounded = math.nan
    if -4 < value < 4:
        (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    if not 1.0 <= rounded < 2.0:
        raise ConfigError(
            f"{name}={value!r} is outside [1, 2) (as float32); 1.0 sends most, "
            "1.75 is the paper's middle, and at 2 nothing would ever be sent"
        )


def _check_word(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ConfigError(
            f"{name}={value!r} must be one of {', '.join(map(repr, words))}"
        )


def check_count(name: str, value: int | None, least: int) -> None:
    """Raise ``ConfigError`` unless a value is ``None``, or an integer in limits."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")
    if value > _MOST:
        raise ConfigError(f"{name} must be at most {_MOST}, got one of more digits")


def _check_patterns(name: str, value: tuple[str, ...]) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError(
            f"{name}={value!r} must be a tuple of name patterns, like ('fc.*',)"
        )
