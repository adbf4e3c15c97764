"""Coding all pieces of a bucket: floats stay on their device, frames are host bytes.

What travels is checked, packed, sealed and compressed on the host, and it is small: so
of a gradient on an accelerator only its frames come to the host, and only what arrived
goes back. Pieces of one call do not overlap.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lc3.codec import Codec, codec_for
from lc3.transport.workers import Workers

T = TypeVar("T")
_HOST = torch.device("cpu")


class Coder:
    """Encodes and adds up pieces, on one device.

    Args:
        codec: the backend for that device.
        threads: number of codec threads on the host.
        device: device of the values.

    Attributes:
        device: device of the values.
        threads: number of codec threads on the host.
        host: checks what arrives: a frame is host bytes until it has been.
    """

    def __init__(
        self, codec: Codec, threads: int = 1, device: torch.device = _HOST
    ) -> None:
        self.device = device
        self.host = codec if device == _HOST else codec_for(_HOST)
        self._codec = codec
        self.threads = threads
        self._workers = Workers(threads)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        # A backend that is better at all pieces at once than at one after the other.
        batch = getattr(codec, "Batch", None)
        self._batch = None if batch is None else batch(device)

    def encode(
        self,
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        sparsity: float,
        density: float | None,
        sources: Sequence[Tensor] = (),
    ) -> list[tuple[Tensor, int]]:
        """Write every piece plus its residual as a frame; see ``Codec.encode``.

        Args:
            values: float32[piece] each, contiguous; left with what their frames lack.
            residuals: float32[piece] each, or ``None``.
            sparsity: see ``Codec.encode``.
            density: see ``Codec.encode``.
            sources: every piece's half-precision source or none, see ``Codec.encode``.

        Returns:
            For each piece its frame, uint8[*] on the host, until the next call, and how
            many values it sends.
        """
        if self._batch is not None:
            for value, source in zip(values, sources, strict=False):
                value.copy_(source)
            frames_of: list[tuple[Tensor, int]] = self._batch.encode(
                values, residuals, sparsity, density
            )
            return frames_of
        sizes = [self._codec.max_frame_bytes(x.numel()) for x in values]
        if self._scratch.numel() < sum(sizes):
            self._scratch = self._scratch.new_empty(sum(sizes))
        buffers = torch.split(self._scratch[: sum(sizes)], sizes)

        def encode(index: int) -> tuple[int, int]:
            return self._codec.encode(
                values[index],
                sparsity,
                buffers[index],
                residuals[index],
                density,
                sources[index] if sources else None,
            )

        done = self.map(encode, [x.numel() for x in values])
        frames = [b[:used] for b, (used, _) in zip(buffers, done, strict=True)]
        digits = [sent for _, sent in done]
        return list(zip(self.to_host(frames), digits, strict=True))

    def add(self, sums: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        """Add checked frames to values, each value's in their order.

        Args:
            sums: values, float32[piece], contiguous, with their frames, on the host.
        """
        if self._batch is not None:
            self._batch.add(sums)
            return

        def add(index: int) -> None:
            acc, frames = sums[index]
            for frame in frames:
                self._codec.add(frame.to(self.device), acc)

        self.map(add, [len(frames) * acc.numel() for acc, frames in sums])

    def map(self, job: Callable[[int], T], weights: Sequence[int]) -> list[T]:
        """Return ``job(i)`` of every i, on the coding threads; see ``Workers.map``."""
        if self.threads == 1:
            return [job(index) for index in range(len(weights))]
        return self._workers.map(job, weights)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the bytes of some tensors, uint8[*] each, by one copy at most."""
        parts = [tensor.view(torch.uint8) for tensor in tensors]
        if self.device == _HOST or not parts:
            return parts
        whole = torch.cat(parts).cpu()
        return list(torch.split(whole, [part.numel() for part in parts]))

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        self._workers.close()
