"""Everything lc3 raises on purpose.

::

    Lc3Error
    ├── ConfigError    (ValueError)    a knob of ``Config`` is out of range
    ├── InputError     (ValueError)    a tensor that lc3 cannot encode
    ├── AttachError    (RuntimeError)  a model or a use of it that cannot be compressed
    ├── FormatError    (ValueError)    received bytes are not what is due in format 1
    ├── PlanMismatch   (RuntimeError)  ranks disagree on what they are training
    ├── ReplicasDiffer (RuntimeError)  ranks hold different parameters
    ├── DivergedError  (RuntimeError)  a rank's training is not finite, again and again
    ├── StateError     (ValueError)    a state_dict does not fit this run
    ├── ExchangeError  (RuntimeError)  a dead rank, a cut link, a timeout
    └── PeerError      (RuntimeError)  another rank failed inside lc3 and said so
"""


class Lc3Error(Exception):
    """The base of every error that lc3 raises on purpose."""


class ConfigError(Lc3Error, ValueError):
    """A knob of ``Config`` is out of range, or a name pattern matches no parameter."""


class InputError(Lc3Error, ValueError):
    """A tensor that lc3 cannot encode, or that does not belong with this frame."""


class AttachError(Lc3Error, RuntimeError):
    """A model, or a way of using it, that cannot be compressed."""


class FormatError(Lc3Error, ValueError):
    """Received bytes are not a message or frame of format 1, or not the one due."""


class PlanMismatch(Lc3Error, RuntimeError):  # noqa: N818  # reads as what it is
    """Ranks disagree on the model, world size, configuration or version."""


class ReplicasDiffer(Lc3Error, RuntimeError):  # noqa: N818  # reads as what it is
    """Ranks that should hold the same parameters do not."""


class DivergedError(Lc3Error, RuntimeError):
    """What a rank has trained is not finite, in too many exchanges in a row."""


class StateError(Lc3Error, ValueError):
    """A state_dict does not fit this model, rank, world size or version."""


class ExchangeError(Lc3Error, RuntimeError):
    """The transport failed: a rank died, a link was cut, or the timeout passed."""


class PeerError(Lc3Error, RuntimeError):
    """Another rank failed inside lc3 and sent its reason instead of its gradients.

    Attributes:
        rank: the rank that failed.
        reason: what it said, one line.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} stopped: {reason}")
        self.rank = rank
        self.reason = reason
