"""Encode and decode one tensor, for people with a transport of their own."""

import torch
from torch import Tensor

from lc3.codec import codec_for, decode_add
from lc3.config import check_sparsity
from lc3.errors import FormatError, InputError
from lc3.format import ZSTD_MAGIC, max_frame_bytes
from lc3.wire.entropy import compress, decompress, is_compressed


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
