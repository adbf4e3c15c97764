"""The ``Codec`` protocol, ``codec_for(device)``, and encode/decode of one tensor."""

import logging
from functools import cache
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lc3.config import check_sparsity
from lc3.entropy import compress, decompress, is_compressed
from lc3.errors import FormatError, InputError
from lc3.format import ZSTD_MAGIC, max_frame_bytes

log = logging.getLogger("lc3")


class Encoded(NamedTuple):
    """What ``Codec.encode`` wrote: so many bytes, so many values sent as ±1."""

    frame_bytes: int
    nonzero_digits: int


class Codec(Protocol):
    """A backend: a module with these functions.

    All backends agree on every byte and on every residual. The functions may run on
    several threads at once, on tensors that do not overlap.
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
            source: float16[n] or bfloat16[n], contiguous: the values, in place of those
                of ``x``, which is then only written.

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
    out = torch.empty(max_frame_bytes(400), dtype=torch.uint8, device=device)
    spike = torch.zeros(400, device=device, dtype=torch.float32)
    spike[7] = 1
    full = torch.full_like(spike, torch.nan)
    for x in (spike, torch.arange(400.0, device=device, dtype=torch.float32), full):
        ways = product(
            (None, torch.zeros_like(x)), (None, 0.1), (None, x.half(), x.bfloat16())
        )
        for residual, density, source in ways:
            used, _ = codec.encode(x.clone(), 1.0, out, residual, density, source)
            decode_add(codec, out[:used], torch.zeros_like(x))


def encode(
    x: Tensor, sparsity: float = 1.0, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Return one tensor as a 3LC frame, and what the frame does not carry.

    For people with a transport of their own; add the residual to the next tensor before
    encoding that one (error feedback).

    Args:
        x: any floating dtype, shape, strides and device; rounded to float32 first.
            Not modified.
        sparsity: 3LC's s, 1 ≤ s < 2. Larger sends fewer values.
        entropy: whether the frame may travel as a zstd frame where that is smaller.

    Returns:
        The frame, uint8[*] on x's device, the bytes of ``lc3.format``; and the
        residual, float32 of x's shape and device, contiguous. ``decode(frame)`` plus
        the residual equals ``x`` exactly. If x is not finite somewhere the frame
        decodes to NaN and the residual is x itself: keep the one you had before.

    Raises:
        ConfigError: sparsity is outside [1, 2).
        InputError: x is complex, integer, sparse or otherwise not a dense float tensor.

    Example:
        >>> x = torch.tensor([1.0, -1.0, 0.25, 0.0, 0.75])
        >>> frame, residual = encode(x)
        >>> frame.numel(), residual.tolist()
        (5, [0.0, 0.0, 0.25, 0.0, -0.25])
    """
    check_sparsity("sparsity", sparsity)
    if not x.is_floating_point() or x.layout != torch.strided:
        raise InputError(
            f"x is a {x.layout} tensor of {x.dtype}; lc3 encodes dense floating-point "
            "tensors (for complex ones, encode torch.view_as_real(x))"
        )
    residual = x.detach().to(torch.float32, copy=True).contiguous()
    out = torch.empty(max_frame_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    used, _ = codec_for(x.device).encode(residual.view(-1), sparsity, out)
    frame = out[:used].clone()
    if entropy:
        smaller, _ = compress([[frame.cpu()]], free_before=0)
        frame = smaller.to(x.device) if smaller.numel() < used else frame
    return frame, residual


def decode(frame: Tensor, numel: int) -> Tensor:
    """Return the ``numel`` values of a frame as float32[numel], on the frame's device.

    Whether the frame went through the entropy stage is seen from its first bytes.

    Raises:
        InputError: frame is not a uint8 vector, or numel is negative.
        FormatError: the bytes are not exactly one frame of ``numel`` values.

    Example:
        >>> frame, _ = encode(torch.tensor([3.0, 0.0, 0.0]))
        >>> decode(frame, 3)
        tensor([3., 0., 0.])
    """
    if frame.dtype != torch.uint8 or frame.dim() != 1:
        raise InputError(
            f"frame is {frame.dtype}{list(frame.shape)}, but must be a uint8 vector"
        )
    if isinstance(numel, bool) or not isinstance(numel, int) or numel < 0:
        raise InputError(f"numel={numel!r} must be an integer of at least 0")
    data = frame.detach().contiguous()
    if is_compressed(data[: len(ZSTD_MAGIC)].cpu()):
        data = decompress(data.cpu(), max_frame_bytes(numel)).to(frame.device)
    values = torch.zeros(numel, dtype=torch.float32, device=frame.device)
    used = decode_add(codec_for(data.device), data, values)
    if used != data.numel():
        raise FormatError(
            f"the frame of {numel} values ends after {used} bytes, but {data.numel()} "
            "were given; is numel the same as at encoding?"
        )
    return values
