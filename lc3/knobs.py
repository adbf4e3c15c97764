"""The knobs of local steps: their limits, what suits an optimizer, and presets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch.optim import SGD, Adam, Optimizer

from lc3.config import Settings, check_count
from lc3.errors import ConfigError

_SPARSE = 0.3  # the largest density that the chosen knobs suit
PresetName = Literal["adamw", "muon", "fewest-bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How ranks that train alone come together. See ``lc3.hooks.local_sgd.attach``.

    Attributes:
        sync_every: H, local steps between two exchanges. ``None``: the loop says when.
        overlap: steps that go on while an exchange is under way.
        outer_lr: learning rate of the masters' optimizer.
        outer_momentum: Nesterov momentum of the masters' optimizer.
        residual_decay: factor of the residuals after every exchange.
        inner_momentum_scale: factor of the optimizers' first moments then.
        fragments: groups of layers that take turns.
        alpha: weight of a rank's own parameters beside what arrives with an overlap.
            ``None``: what it has trained meanwhile is added to what arrives.

    Raises:
        ConfigError: one is out of range.
    """

    sync_every: int | None = 8
    overlap: int = 0
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    residual_decay: float = 1.0
    inner_momentum_scale: float = 1.0
    fragments: int = 1
    alpha: float | None = None

    def __post_init__(self) -> None:
        for knob, least in (("sync_every", 1), ("overlap", 0), ("fragments", 1)):
            value = getattr(self, knob)
            if value is None and knob == "sync_every":
                continue
            check_count(knob, value, least)
        if self.overlap and self.sync_every is None:
            raise ConfigError(
                f"overlap={self.overlap!r} counts steps, so it needs sync_every to be "
                "a number, not 'manual'"
            )
        if self.sync_every is not None and self.overlap >= self.sync_every:
            raise ConfigError(
                f"overlap={self.overlap!r} must be less than sync_every="
                f"{self.sync_every!r}"
            )
        if self.fragments > 1 and self.sync_every is None:
            raise ConfigError(
                f"fragments={self.fragments!r} take turns within sync_every steps, so "
                "it has to be a number, not 'manual'"
            )
        if self.sync_every is not None and self.fragments > self.sync_every:
            raise ConfigError(
                f"fragments={self.fragments!r} must be at most sync_every="
                f"{self.sync_every!r}: one after a step"
            )
        if self.alpha is not None:
            _check_number("alpha", self.alpha, "in [0, 1), or None", 0, 1, without=1)
            if not self.overlap:
                raise ConfigError(
                    f"alpha={self.alpha!r} weighs what a rank has trained while an "
                    "exchange is under way; give an overlap, or leave it out"
                )
        _check_number("outer_lr", self.outer_lr, "in (0, 2]", 0, 2, without=0)
        _check_number("outer_momentum", self.outer_momentum, "in [0, 1)", 0, 1, 1)
        for knob in ("residual_decay", "inner_momentum_scale"):
            value = getattr(self, knob)
            _check_number(knob, value, "in [0, 1]; 1 changes nothing", 0, 1)

    def said(self) -> dict[str, object]:
        """Return the knobs by name, numbers alike on every rank."""
        counts = ("sync_every", "overlap", "fragments")
        return {
            k: v if k in counts or v is None else float(v)
            for k, v in asdict(self).items()
        }


def _check_number(
    knob: str,
    value: object,
    limits: str,
    least: float,
    most: float,
    without: float | None = None,
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_inside = is_number and least <= value <= most  # type: ignore[operator]
    if not is_inside or value == without:
        raise ConfigError(f"{knob}={value!r} must be a number {limits}")


class Preset(NamedTuple):
    """A documented set of values.

    Attributes:
        settings: the settings of what is compressed.
        knobs: values for the fields of ``Knobs``.
        purpose: purpose of the preset, in a sentence.
    """

    settings: Settings
    knobs: Mapping[str, Any]
    purpose: str


# Every parameter is coded: biases and norms left raw would be most of the bytes.
DEFAULT = Settings(density=0.115, min_ndim=0, min_numel=1, entropy="rans")
# Two ranks send each other what they have coded, in one hop.
FOR_TWO = Settings(
    density=0.12, min_ndim=0, min_numel=1, entropy="rans", topology="direct"
)

# Of one site, which sends nothing.
ALONE: Mapping[str, Any] = MappingProxyType(
    {"residual_decay": 1.0, "inner_momentum_scale": 1.0}
)

_MOMENTUM_BETWEEN = {
    "outer_lr": 2.0,
    "residual_decay": 0.8,
    "inner_momentum_scale": 0.5,
}
PRESETS: Mapping[PresetName, Preset] = MappingProxyType(
    {
        "adamw": Preset(
            DEFAULT,
            {"sync_every": 8, **_MOMENTUM_BETWEEN},
            "AdamW inside, at two to three times the rate it has alone",
        ),
        "muon": Preset(
            Settings(density=0.11, min_ndim=0, min_numel=1, entropy="rans"),
            {"sync_every": 16, **_MOMENTUM_BETWEEN},
            "Muon inside, at its own rate or half of it",
        ),
        "fewest-bytes": Preset(
            DEFAULT,
            {"sync_every": 32, **_MOMENTUM_BETWEEN},
            "Muon inside, where every byte counts",
        ),
    }
)


def preset_of(name: PresetName | None) -> Preset | None:
    """Return a preset by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"preset={name!r} must be one of {', '.join(map(repr, PRESETS))}"
        )
    return PRESETS[name]


def given_by(
    sync_every: int | Literal["manual"] | None, **said: float | None
) -> dict[str, Any]:
    """Return the knobs that a user has given, by name."""
    given: dict[str, Any] = {k: v for k, v in said.items() if v is not None}
    if sync_every is not None:
        given["sync_every"] = None if sync_every == "manual" else sync_every
    return given


def knobs_for(
    optimizers: Sequence[Optimizer],
    settings: Settings,
    given: Mapping[str, Any],
    preset: Preset | None = None,
) -> tuple[Knobs, str]:
    """Return the knobs, and a sentence on those that were chosen.

    Args:
        optimizers: the optimizers that train the model.
        settings: the settings of what is compressed.
        given: values that the user gave, by name; the rest is the preset's, or chosen.
        preset: the preset that the user has chosen.

    Raises:
        ConfigError: one is out of range.
    """
    fragments = given.get("fragments", 1)
    chosen, why = chosen_for(optimizers, settings, fragments)
    every = {}
    if preset is not None:
        chosen = {knob: preset.knobs.get(knob, value) for knob, value in chosen.items()}
        every = {k: v for k, v in preset.knobs.items() if k not in chosen}
        why = f"the preset is for {preset.purpose}"
    knobs = Knobs(**{**every, **chosen, **given})
    if knobs.outer_momentum and "outer_lr" not in given:  # as far in the long run
        outer_lr = round(chosen["outer_lr"] * (1 - knobs.outer_momentum), 9)
        knobs = Knobs(**{**every, **chosen, **given, "outer_lr": outer_lr})
    own = {k: v for k, v in asdict(knobs).items() if k in chosen and k not in given}
    values = ", ".join(f"{knob}={value:g}" for knob, value in own.items())
    return knobs, f"{values} chosen: {why}" if own else ""


def chosen_for(
    optimizers: Sequence[Optimizer], settings: Settings, fragments: int = 1
) -> tuple[dict[str, float], str]:
    """Return what suits the optimizers, and why.

    Where a density of 0.3 or less is sent and Adam or AdamW trains everything,
    ``outer_lr`` 2, ``residual_decay`` 0.8 and ``inner_momentum_scale`` 0.5 (without
    owners 1.5, 0.9 and 0.8), with fragments, too: what they bring, and where, see
    docs/explanation/local-steps.md. Without owners and fragments, with SGD without
    momentum: ``outer_lr`` 1.25, since what waits in residuals is a momentum that is not
    there otherwise. Else 1.
    """
    names = "outer_lr", "residual_decay", "inner_momentum_scale"
    kinds = " and ".join(sorted({type(one).__name__ for one in optimizers}))
    chosen, why = (1.0, 1.0, 1.0), f"plain averaging, with {kinds}"
    if settings.density is None or settings.density > _SPARSE:
        why = f"plain averaging, where no density of {_SPARSE} or less is sent"
    elif optimizers:
        direct = settings.topology == "direct"
        if all(isinstance(one, Adam) for one in optimizers):
            chosen = (1.5, 0.9, 0.8) if direct else (2.0, 0.8, 0.5)
            why = f"{kinds}, density {settings.density:g}"
        elif direct and fragments == 1 and all(map(_without_momentum, optimizers)):
            chosen, why = (1.25, 1.0, 1.0), "SGD without momentum, in one hop"
    return dict(zip(names, chosen, strict=True)), why


def _without_momentum(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    return isinstance(optimizer, SGD) and not any(g["momentum"] for g in groups)
