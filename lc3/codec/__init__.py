"""The ``Codec`` protocol, and ``codec_for(device)``."""

import logging
from functools import cache
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lc3.errors import InputError
from lc3.format import max_frame_bytes

log = logging.getLogger("lc3")


class Encoded(NamedTuple):
    """What ``Codec.encode`` wrote: so many bytes, so many values sent as ±1."""

    frame_bytes: int
    nonzero_digits: int


class Codec(Protocol):
    """A backend: a module with these functions.

    All backends agree on every byte and on every residual. The functions may run on
    several threads at once, on tensors that do not overlap. A backend that is better at
    many pieces at once has ``encode_all``, ``check_all`` and ``add_all`` as well (see
    ``lc3.codec.cpu``), or a class ``Batch`` (see ``lc3.codec.cuda``).
    """

    def max_frame_bytes(self, numel: int) -> int:
        """Return the size of the largest frame of ``numel`` values."""
        ...

    def encode(
        self,
        x: Tensor,
        sparsity: float,
        out: Tensor,
        residual: Tensor | None = None,
        density: float | None = None,
        source: Tensor | None = None,
    ) -> Encoded:
        """Write ``x`` plus ``residual`` as one frame; leave in ``x`` what it lacks.

        Args:
            x: float32[n], contiguous. On return the new residual,
                ``x + residual - decode(frame)``; where that sum is not finite, the sum.
            sparsity: 3LC's s, 1 ≤ s < 2.
            out: uint8[≥ max_frame_bytes(n)]. Only the returned prefix is meaningful.
            residual: float32[n], what earlier frames lacked. If ``x`` is all zero,
                there is nothing to say: the frame has scale 0, the residual stays.
            density: a share of values to send instead, see ``lc3.codec.density``. What
                is taken off ``x`` may then be rounded.
            source: float32[n], float16[n] or bfloat16[n], contiguous: the values, in
                place of those of ``x``, which is then only written.

        Source: Lim, Andersen, Kaminsky, "3LC", MLSys 2019 (arXiv 1802.07389).
        """
        ...

    def check(self, frame: Tensor, numel: int) -> int:
        """Return how many bytes the frame of ``numel`` values at the start has.

        Args:
            frame: uint8[*], contiguous; more may follow the frame.
            numel: how many values it must have.

        Raises:
            FormatError: no valid frame of so many values stands there.
        """
        ...

    def add(self, frame: Tensor, acc: Tensor) -> None:
        """Add the values of a frame to ``acc``.

        Args:
            frame: uint8[*], contiguous: one frame of n values that ``check`` accepted.
            acc: float32[n], contiguous. Mutated where a digit is not 0.
        """
        ...


def decode_add(codec: Codec, frame: Tensor, acc: Tensor) -> int:
    """Check the frame at the start of ``frame``, add it to ``acc``, return its length.

    Raises:
        FormatError: no valid frame stands there; ``acc`` is untouched.
    """
    used = codec.check(frame, acc.numel())
    codec.add(frame[:used], acc)
    return used


def codec_for(device: torch.device) -> Codec:
    """Return the backend for tensors on ``device``. The only place that picks one.

    Raises:
        InputError: tensors there have no values.
    """
    if device.type == "cpu":
        from lc3.codec import cpu

        return cpu
    if device.type == "meta":
        raise InputError("tensors on the meta device have no values to encode")
    if device.type == "cuda" and torch.version.hip is None:
        return _kernels_or_operators(device)
    from lc3.codec import tensor

    return tensor


@cache
def _kernels_or_operators(device: torch.device) -> Codec:
    """Return the backend for a CUDA device; say which, once for each."""
    from lc3.codec import tensor

    try:
        from lc3.codec import cuda
    except ImportError as error:
        reason = f"{error}; pip install 'torch-lc3[cuda]'"
    else:
        reason = cuda.unusable(device)
        if not reason:
            log.info("lc3: gradients on CUDA are coded by numba-cuda kernels")
            return cuda
    log.warning(
        "lc3: gradients on CUDA are coded by torch operators, the same bytes but "
        "tens of times slower (%s)",
        reason,
    )
    return tensor


def warm_up(codec: Codec, device: torch.device | str = "cpu") -> None:
    """Run every path of ``codec`` once, so that nothing compiles during a step."""
    every: Any = codec
    out = torch.empty(max_frame_bytes(400), dtype=torch.uint8, device=device)
    spike = torch.zeros(400, device=device, dtype=torch.float32)
    spike[7] = 1
    full = torch.full_like(spike, torch.nan)
    for x in (spike, torch.arange(400.0, device=device, dtype=torch.float32), full):
        ways = product(
            (None, torch.zeros_like(x)), (None, 0.1), (None, x, x.half(), x.bfloat16())
        )
        for residual, density, source in ways:
            used, _ = codec.encode(x.clone(), 1.0, out, residual, density, source)
            decode_add(codec, out[:used], torch.zeros_like(x))
            if hasattr(every, "encode_all"):
                every.encode_all([x.clone()], 1.0, [out], [residual], [source])
                every.check_all(out[:used], [x.numel()], [True])
                every.add_all([(torch.zeros_like(x), [out[:used]])], anew=True)
