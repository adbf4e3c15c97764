"""The same bytes from plain torch operators, for a device without kernels of its own.

Zero runs are folded and unfolded by scans. Slower than a kernel by the number of times
it walks over the values, but no float leaves the device.
"""

import math

import numpy as np
import torch
from torch import Tensor

from lc3.codec import Encoded
from lc3.codec.density import choose, sample_stride
from lc3.errors import FormatError
from lc3.format import (
    FLOAT32_MAX,
    NAN_SCALE,
    RUN_BASE,
    RUN_MAX,
    RUN_MIN,
    SCALE_BYTES,
    ZERO_BYTE,
    ZERO_SCALE,
    has_body,
    max_frame_bytes,
    quartic_bytes,
)

__all__ = ["add", "check", "encode", "max_frame_bytes"]

_POWERS = (81, 27, 9, 3, 1)


def encode(
    x: Tensor,
    sparsity: float,
    out: Tensor,
    residual: Tensor | None = None,
    density: float | None = None,
    source: Tensor | None = None,
) -> Encoded:
    """See ``lc3.codec.Codec.encode``."""
    if source is not None:
        x.copy_(source)
    if residual is not None:
        nothing = not x.any()
        x += residual
        if nothing:
            return _write(ZERO_SCALE, out)
    largest = x.abs().max() if x.numel() else x.new_zeros(())
    scale = (largest * x.new_tensor(sparsity)).clamp(max=FLOAT32_MAX)
    if not math.isfinite(largest.item()):  # the maximum of a NaN is NaN
        return _write(NAN_SCALE, out)
    if largest.item() == 0:
        return _write(ZERO_SCALE, out)
    threshold = scale * 0.5
    if density is not None:
        sample = x[:: sample_stride(x.numel())].abs().cpu().numpy()
        chosen = choose(sample, density, np.float32(largest.item()))
        threshold, scale = x.new_tensor(np.array(chosen))
    digits = (x > threshold).to(torch.int8) - (x < -threshold).to(torch.int8)
    x -= digits * scale
    body = _fold(_quartic(digits))
    out[:SCALE_BYTES] = scale.view(1).view(torch.uint8)
    out[SCALE_BYTES : SCALE_BYTES + body.numel()] = body
    return Encoded(SCALE_BYTES + body.numel(), int(digits.count_nonzero()))


def check(frame: Tensor, numel: int) -> int:
    """See ``lc3.codec.Codec.check``."""
    if not has_body(bytes(frame[:SCALE_BYTES].tolist())):
        return SCALE_BYTES
    length = quartic_bytes(numel)
    body = frame[SCALE_BYTES : max_frame_bytes(numel)]
    ends = _steps(body).cumsum(0)
    reached = int(ends[-1]) if body.numel() else 0
    if reached < length:
        raise FormatError(
            f"frame ends after {reached} of {length} quartic bytes; was it cut?"
        )
    used = int(torch.searchsorted(ends, length)) + 1
    if int(ends[used - 1]) > length:
        raise FormatError(
            f"a zero run crosses the end of a frame of {length} quartic bytes; do both "
            "ranks use the same plan?"
        )
    places, _ = _nonzero_digits(body[:used], length)
    if places.numel() and int(places.max()) >= numel:
        raise FormatError(
            f"padding behind the {numel} values of a frame is not zero; do both ranks "
            "use the same plan?"
        )
    return SCALE_BYTES + used


def add(frame: Tensor, acc: Tensor) -> None:
    """See ``lc3.codec.Codec.add``."""
    scale = frame[:SCALE_BYTES].clone().view(torch.float32)
    if frame.numel() > SCALE_BYTES:
        places, digits = _nonzero_digits(
            frame[SCALE_BYTES:], quartic_bytes(acc.numel())
        )
        acc[places] += digits * scale
    elif scale.isnan():
        acc.fill_(math.nan)


def _quartic(digits: Tensor) -> Tensor:
    """Return five digits a byte, taken from five equal consecutive partitions."""
    length = quartic_bytes(digits.numel())
    padded = torch.ones(5 * length, dtype=torch.uint8, device=digits.device)
    padded[: digits.numel()] = digits + 1
    bytes_ = torch.zeros(length, dtype=torch.uint8, device=digits.device)
    for partition in padded.view(5, length):
        bytes_ = bytes_ * 3 + partition
    return bytes_


def _fold(quartic: Tensor) -> Tensor:
    """Replace runs of 2 to 14 zero bytes by one byte each, cutting longer ones.

    A byte's place in its run is its distance from the last byte that is not zero. The
    last byte of a run, and every fourteenth, speaks for those before it.
    """
    zero = quartic == ZERO_BYTE
    at = torch.arange(quartic.numel(), device=quartic.device, dtype=torch.int64)
    last = torch.where(zero, -1, at).cummax(0).values
    place = at - last
    ends = torch.ones_like(zero)
    ends[:-1] = ~zero[1:]
    ends |= place % RUN_MAX == 0
    run = (place - 1) % RUN_MAX + 1
    code = torch.where(run < RUN_MIN, ZERO_BYTE, RUN_BASE - RUN_MIN + run)
    folded = torch.where(zero, code, quartic.long())
    return folded[~zero | ends].to(torch.uint8)


def _steps(body: Tensor) -> Tensor:
    """Return how many quartic bytes each byte of a body stands for, int64[*]."""
    wide = body.long()
    return torch.where(wide >= RUN_BASE, wide - RUN_BASE + RUN_MIN, 1)


def _nonzero_digits(body: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return where the digits of a body are not 0, int64[*], and those, float32[*]."""
    steps = _steps(body)
    literal = (body < RUN_BASE) & (body != ZERO_BYTE)
    starts = (steps.cumsum(0) - steps)[literal]
    bytes_ = body[literal].long()
    offsets = torch.arange(5, device=body.device, dtype=torch.int64) * length
    powers = torch.tensor(_POWERS, device=body.device, dtype=torch.int64)
    places = starts[:, None] + offsets
    digits = bytes_[:, None] // powers % 3 - 1
    some = digits != 0
    return places[some], digits[some].float()


def _write(scale: bytes, out: Tensor) -> Encoded:
    out[:SCALE_BYTES] = torch.tensor(list(scale), dtype=torch.uint8)
    return Encoded(SCALE_BYTES, 0)
