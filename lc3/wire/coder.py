"""Coding all pieces of a bucket: floats stay on their device, frames are host bytes.

What travels is checked, packed, sealed and compressed on the host, and it is small: so
of a gradient on an accelerator only its frames come to the host, and only what arrived
goes back. Pieces of one call do not overlap.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lc3.codec import Codec, Encoded, codec_for
from lc3.transport.workers import Workers

T = TypeVar("T")
Sums = Sequence[tuple[Tensor, Sequence[Tensor]]]  # values with their frames
_SEVERAL_CALLS_FROM = 1 << 18  # on one thread; of less a call takes too much
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
        several_calls_from: elements of a bucket, from which messages had better be made
            by a call each, so that they leave earlier.
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
        # Backends that are better at all pieces at once than at one after the other.
        batch = getattr(codec, "Batch", None)
        self._batch = None if batch is None else batch(device)
        one_call = threads > 1 or batch is not None
        self.several_calls_from = sys.maxsize if one_call else _SEVERAL_CALLS_FROM
        self._encode_all = getattr(codec, "encode_all", None)
        self._add_all = getattr(codec, "add_all", self._add_one_by_one)

    def encode(
        self,
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        sparsity: float,
        density: float | None,
        sources: Sequence[Tensor | None] = (),
    ) -> list[tuple[Tensor, int]]:
        """Write every piece plus its residual as a frame; see ``Codec.encode``.

        Args:
            values: float32[piece] each, contiguous; left with what their frames lack.
            residuals: float32[piece] each, or ``None``.
            sparsity: see ``Codec.encode``.
            density: see ``Codec.encode``.
            sources: every piece's source or ``None``, see ``Codec.encode``; or none.

        Returns:
            For each piece its frame, uint8[*] on the host, until the next call, and how
            many values it sends.
        """
        if not sources:
            sources = [None] * len(values)
        if self._batch is not None:
            for value, source in zip(values, sources, strict=True):
                if source is not None:
                    value.copy_(source)
            frames_of: list[tuple[Tensor, int]] = self._batch.encode(
                values, residuals, sparsity, density
            )
            return frames_of
        numels = [x.numel() for x in values]
        sizes = [self._codec.max_frame_bytes(n) for n in numels]
        room = sum(sizes)
        if self._scratch.numel() < room:
            self._scratch = self._scratch.new_empty(room)
        buffers = torch.split(self._scratch[:room], sizes)

        def encode(some: Sequence[int]) -> list[Encoded]:
            x, out = _some(values, some), _some(buffers, some)
            owed, read = _some(residuals, some), _some(sources, some)
            if density is None and self._encode_all is not None:
                found: list[Encoded] = self._encode_all(x, sparsity, out, owed, read)
                return found
            return [
                self._codec.encode(piece, sparsity, frame, residual, density, source)
                for piece, frame, residual, source in zip(
                    x, out, owed, read, strict=True
                )
            ]

        if self.threads == 1:
            done = encode(range(len(values)))
        else:
            done = self._workers.share(encode, numels)
        frames = [b[:used] for b, (used, _) in zip(buffers, done, strict=True)]
        if self.device != _HOST:
            frames = self.to_host(frames)
        digits = [sent for _, sent in done]
        return list(zip(frames, digits, strict=True))

    def add(self, sums: Sums) -> None:
        """Add checked frames to values, each value's in their order.

        Args:
            sums: values, float32[piece], contiguous, with their frames, on the host.
        """
        self._sum(sums, anew=False)

    def sum(self, sums: Sums) -> None:
        """Do what ``add`` does, to values that are set to 0 before."""
        self._sum(sums, anew=True)

    def _sum(self, sums: Sums, *, anew: bool) -> None:
        if self._batch is not None:
            for acc, _ in sums if anew else ():
                acc.zero_()
            self._batch.add(sums)
            return

        def add(some: Sequence[int]) -> list[None]:
            self._add_all(_some(sums, some), anew=anew)
            return [None] * len(some)

        if self.threads == 1:
            self._add_all(sums, anew=anew)
        else:
            sizes = [len(frames) * acc.numel() for acc, frames in sums]
            self._workers.share(add, sizes)

    def _add_one_by_one(self, sums: Sums, *, anew: bool) -> None:
        for acc, frames in sums:
            if anew:
                acc.zero_()
            for frame in frames:
                self._codec.add(frame.to(self.device), acc)

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


def _some(everything: Sequence[T], which: Sequence[int]) -> Sequence[T]:
    """Return the elements at some places."""
    if isinstance(which, range):
        return everything  # all of them, in their order
    return [everything[index] for index in which]
