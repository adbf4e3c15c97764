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
    """The base of every error that lc3 raises on purpose.

    Example:
        >>> issubclass(lc3.ConfigError, lc3.Lc3Error)
        True
    """


class ConfigError(Lc3Error, ValueError):
    """A knob of ``Config`` is out of range, or a name pattern matches no parameter.

    Example:
        >>> lc3.Config(sparsity=3.0)
        Traceback (most recent call last):
        ...
        lc3.errors.ConfigError: ...
    """


class InputError(Lc3Error, ValueError):
    """A tensor that lc3 cannot encode, or that does not belong with this frame.

    Example:
        >>> lc3.encode(torch.ones(2, dtype=torch.int64))
        Traceback (most recent call last):
        ...
        lc3.errors.InputError: ...
    """


class AttachError(Lc3Error, RuntimeError):
    """A model, or a way of using it, that cannot be compressed.

    Example:
        >>> lc3.hooks.ddp.attach(None)
        Traceback (most recent call last):
        ...
        lc3.errors.AttachError: ...
    """


class FormatError(Lc3Error, ValueError):
    """Received bytes are not a message or frame of format 1, or not the one due.

    Example:
        >>> lc3.decode(torch.zeros(3, dtype=torch.uint8), 5)
        Traceback (most recent call last):
        ...
        lc3.errors.FormatError: ...
    """


class PlanMismatch(Lc3Error, RuntimeError):  # noqa: N818  # reads as what it is
    """Ranks disagree on the model, world size, configuration or version.

    Example:
        >>> try:
        ...     state = lc3.hooks.local_sgd.attach(model, optimizer)
        ... except lc3.PlanMismatch as error:
        ...     raise SystemExit(str(error))  # every rank says the same
        >>> state.close()
    """


class ReplicasDiffer(Lc3Error, RuntimeError):  # noqa: N818  # reads as what it is
    """Ranks that should hold the same parameters do not.

    Example:
        >>> state = lc3.hooks.ddp.attach(model, optimizer)
        >>> try:
        ...     state.check_replicas()
        ... except lc3.ReplicasDiffer as error:
        ...     raise SystemExit(str(error))  # load a checkpoint from before
    """


class DivergedError(Lc3Error, RuntimeError):
    """What a rank has trained is not finite, in too many exchanges in a row.

    Example:
        >>> issubclass(lc3.DivergedError, lc3.Lc3Error)
        True
    """


class StateError(Lc3Error, ValueError):
    """A state_dict does not fit this model, rank, world size or version.

    Example:
        >>> lc3.merge_states([])
        Traceback (most recent call last):
        ...
        lc3.errors.StateError: ...
    """


class ExchangeError(Lc3Error, RuntimeError):
    """The transport failed: a rank died, a link was cut, or the timeout passed.

    Example:
        >>> state = lc3.hooks.local_sgd.attach(model, optimizer)
        >>> try:
        ...     state.sync()
        ... except lc3.ExchangeError as error:
        ...     raise SystemExit(str(error))  # restart from the last checkpoint
        >>> state.close()
    """


class PeerError(Lc3Error, RuntimeError):
    """Another rank failed inside lc3 and sent its reason instead of its gradients.

    Attributes:
        rank: the rank that failed.
        reason: the rank's own error, one line.

    Example:
        >>> str(lc3.PeerError(1, 'MemoryError: no memory'))
        'rank 1 stopped: MemoryError: no memory'
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} stopped: {reason}")
        self.rank = rank
        self.reason = reason
