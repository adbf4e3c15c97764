"""The one path a gradient takes, readable top to bottom.

``all_reduce`` is ``reduce_scatter`` (push: every rank sends each owner its slices) and
``all_gather`` (pull: every owner sends its means to everybody). Both directions are
coded with error feedback. A residual changes only when the pull has arrived and is
finite, so a step that fails, or overflows on any rank, leaves all residuals as they
were.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lc3.codec import Codec
from lc3.config import Config, EntropyStage
from lc3.entropy import AUTO_MIN_BYTES, compress, decompress
from lc3.errors import ExchangeError, FormatError, PeerError
from lc3.exchange import Exchange
from lc3.format import (
    FLAG_ENTROPY_CODED,
    HEADER_BYTES,
    SCALE_BYTES,
    Tag,
    is_nan_frame,
    is_zero_frame,
    max_frame_bytes,
    seal,
    seal_abort,
    unseal,
)
from lc3.meter import Direction, Meter
from lc3.plan import Plan, Slice
from lc3.residual import Residuals

_ABORT_TIMEOUT_S = 5.0
_ENTROPY_MIN_BYTES: dict[EntropyStage, int | None] = {
    "auto": AUTO_MIN_BYTES,
    "zstd": 0,
    "none": None,
}


@dataclass
class OwnedMean:
    """The mean over ranks of one slice that this rank owns.

    Attributes:
        slice: which slice.
        values: float32[slice].
        silent: for each piece, whether no rank said anything about it. Its owner then
            says nothing either.
        kept: for each piece, whether the owner-side residual stays as it is: silent
            pieces and, once encoded, those that are not finite.
    """

    slice: Slice
    values: Tensor
    silent: list[bool]
    kept: list[bool]


class Engine:
    """Averages gradients over the ranks of an exchange, compressed both ways.

    Not thread-safe, and every rank must make the same calls in the same order: a hook
    calls it from one worker lane.

    Args:
        plan: the same on every rank.
        config: the same on every rank.
        exchange: moves the messages.
        codec: for the device of the gradients.
        meter: is written to.
    """

    def __init__(
        self, plan: Plan, config: Config, exchange: Exchange, codec: Codec, meter: Meter
    ) -> None:
        self.plan = plan
        self.config = config
        self.exchange = exchange
        self.codec = codec
        self.meter = meter
        self.residuals = Residuals(plan, exchange.rank, torch.device("cpu"))
        self._failure: BaseException | None = None

    def all_reduce(self, grads: Mapping[str, Tensor], step: int, bucket: int) -> None:
        """Replace every gradient by its 3LC mean over ranks, the same bits everywhere.

        Args:
            grads: by parameter name, float32[numel], contiguous; overwritten. The same
                names on every rank.
            step: synchronised backward passes before this one, the same on every rank.
            bucket: its number in this step, the same on every rank.

        Raises:
            FormatError, PlanMismatch: what arrived does not fit; every other rank is
                told.
            PeerError: another rank failed and said so.
            ExchangeError: the transport failed.
        """
        names = [name for name in grads if self.plan.numel[name]]
        self.meter.buckets += 1
        if self.exchange.world == 1 or not names:
            return
        sent_before = self.exchange.sent_bytes
        with self._telling_others(step, bucket):
            means = self.reduce_scatter(names, grads, step, bucket)
            self.all_gather(names, means, grads, step, bucket)
        elements = sum(self.plan.numel[name] for name in names)
        share = (self.exchange.world - 1) / self.exchange.world
        self.meter.dense_bytes += 2 * share * 4 * elements
        self.meter.sent_bytes += self.exchange.sent_bytes - sent_before

    def pass_through(self, tensor: Tensor) -> Tensor:
        """Return the plain mean over ranks of a tensor that lc3 does not code."""
        sent_before = self.exchange.sent_bytes
        mean = self.exchange.all_reduce_mean(tensor)
        sent = self.exchange.sent_bytes - sent_before
        self.meter.buckets += 1
        self.meter.sent_bytes += sent
        self.meter.dense_bytes += sent
        self.meter.passed_through_bytes += sent
        return mean

    def reduce_scatter(
        self, names: Sequence[str], grads: Mapping[str, Tensor], step: int, bucket: int
    ) -> list[OwnedMean]:
        """Push: send every owner its slices, return the means of this rank's own.

        ``grads`` is left holding, for coded slices, gradient plus residual less what
        the frames carry: the residual to be, which ``all_gather`` makes the residual.
        """
        with self.meter.stage("encode"):
            messages = [
                self._message_to(owner, names, grads, step, bucket)
                for owner in range(self.exchange.world)
            ]
        with self.meter.stage("exchange"):
            arrived = self.exchange.all_to_all(messages)
        with self.meter.stage("decode"):
            owned = list(self.plan.slices_of(names, self.exchange.rank))
            means = [self._nothing_yet(slice_) for slice_ in owned]
            readers = [
                self._reader(message, owned, self._tag(sender, step, bucket))
                for sender, message in enumerate(arrived)
            ]
            # In rank order: float addition is not associative.
            for reader in readers:
                for mean in means:
                    for index, (start, stop) in enumerate(self.plan.pieces(mean.slice)):
                        piece = mean.values[start:stop]
                        if mean.slice.coded:
                            mean.silent[index] &= reader.says_nothing()
                            reader.add_frame(piece)
                        else:
                            piece += reader.raw(piece.numel())
                reader.finish()
            for mean in means:
                # A tensor: dividing by a Python number may multiply by 1/W on CUDA.
                mean.values /= torch.tensor(float(self.exchange.world))
        return means

    def all_gather(
        self,
        names: Sequence[str],
        means: Sequence[OwnedMean],
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
    ) -> None:
        """Pull: send the owned means to everybody, write everybody's into ``grads``.

        Every rank, the owner too, decodes the same bytes, so replicas stay
        bit-identical. Where they are finite both sides' residuals take their new
        values.
        """
        with self.meter.stage("encode"):
            message = self._message_of(means, step, bucket)
        with self.meter.stage("exchange"):
            arrived = self.exchange.all_gather(message)
        with self.meter.stage("decode"):
            slices = [
                list(self.plan.slices_of(names, owner))
                for owner in range(self.exchange.world)
            ]
            readers = [
                self._reader(message, slices[owner], self._tag(owner, step, bucket))
                for owner, message in enumerate(arrived)
            ]
            for owner, reader in enumerate(readers):
                for slice_ in slices[owner]:
                    values = grads[slice_.name][slice_.start : slice_.stop]
                    for start, stop in self.plan.pieces(slice_):
                        piece = values[start:stop]
                        if not slice_.coded:
                            piece.copy_(reader.raw(piece.numel()))
                            continue
                        if not reader.is_nan():
                            self.residuals.of_slice(slice_)[start:stop] = piece
                        piece.zero_()
                        reader.add_frame(piece)
                reader.finish()
            for mean in means:
                if not mean.slice.coded:
                    continue
                residual = self.residuals.owned[mean.slice.name]
                pieces = self.plan.pieces(mean.slice)
                for kept, (start, stop) in zip(mean.kept, pieces, strict=True):
                    if not kept:
                        residual[start:stop] = mean.values[start:stop]

    def _message_to(
        self,
        owner: int,
        names: Sequence[str],
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
    ) -> Tensor:
        """Return the push to ``owner``; coded ``grads`` become the residuals to be."""
        slices = list(self.plan.slices_of(names, owner))
        writer = _Writer(self.plan, slices, self.codec, self.meter.push)
        for slice_ in slices:
            values = grads[slice_.name][slice_.start : slice_.stop]
            for start, stop in self.plan.pieces(slice_):
                piece = values[start:stop]
                if not slice_.coded:
                    writer.raw(slice_.name, piece)
                    continue
                # A rank without a gradient here (an unused parameter) says nothing and
                # keeps its residual: DDP may throw the result away.
                nothing = not piece.any()
                piece += self.residuals.of_slice(slice_)[start:stop]
                if nothing:
                    writer.nothing(slice_.name, piece.numel())
                else:
                    writer.frame(slice_.name, piece, self.config.sparsity)
        return self._sealed(writer, step, bucket)

    def _message_of(self, means: Sequence[OwnedMean], step: int, bucket: int) -> Tensor:
        """Return the pull; coded means become the owner-side residuals to be."""
        config = self.config
        sparsity = (
            config.sparsity if config.pull_sparsity is None else config.pull_sparsity
        )
        writer = _Writer(
            self.plan, [mean.slice for mean in means], self.codec, self.meter.pull
        )
        for mean in means:
            name = mean.slice.name
            pieces = self.plan.pieces(mean.slice)
            for index, (start, stop) in enumerate(pieces):
                piece = mean.values[start:stop]
                if not mean.slice.coded:
                    writer.raw(name, piece)
                elif mean.silent[index]:
                    writer.nothing(name, piece.numel())
                    mean.kept[index] = True
                else:
                    piece += self.residuals.owned[name][start:stop]
                    mean.kept[index] = not writer.frame(name, piece, sparsity)
        return self._sealed(writer, step, bucket)

    def _sealed(self, writer: "_Writer", step: int, bucket: int) -> Tensor:
        shortest = _ENTROPY_MIN_BYTES[self.config.entropy]
        return writer.sealed(self._tag(self.exchange.rank, step, bucket), shortest)

    def _reader(self, message: Tensor, slices: Sequence[Slice], tag: Tag) -> "_Reader":
        return _Reader(message, tag, _room_for(self.plan, slices), self.codec)

    def _nothing_yet(self, slice_: Slice) -> OwnedMean:
        count = sum(1 for _ in self.plan.pieces(slice_))
        return OwnedMean(
            slice_, torch.zeros(slice_.numel), [True] * count, [False] * count
        )

    def _tag(self, sender: int, step: int, bucket: int) -> Tag:
        return Tag(sender, step, bucket, self.plan.fingerprint)

    @contextmanager
    def _telling_others(self, step: int, bucket: int) -> Iterator[None]:
        """Answer the next exchange with an abort message if this rank fails on its own.

        Both directions move bytes by the same two rounds, so the abort fits whatever
        the others are waiting in: this bucket's push, its pull, or the next bucket's
        push.
        """
        if self._failure is not None:
            raise ExchangeError(
                f"lc3 stopped at an earlier error ({self._failure}); restart the job "
                "from its last checkpoint"
            ) from self._failure
        try:
            yield
        except BaseException as error:
            self._failure = error
            if not isinstance(error, PeerError | ExchangeError):
                reason = f"{type(error).__name__}: {error}"
                abort = seal_abort(reason, self._tag(self.exchange.rank, step, bucket))
                with suppress(ExchangeError):  # the others may be gone already
                    self.exchange.all_to_all(
                        [abort] * self.exchange.world, timeout_s=_ABORT_TIMEOUT_S
                    )
            raise


@dataclass(frozen=True)
class _Room:
    """How many bytes some slices take in a message: raw exactly, coded at most."""

    raw: int
    coded: int


def _room_for(plan: Plan, slices: Sequence[Slice]) -> _Room:
    raw = sum(4 * slice_.numel for slice_ in slices if not slice_.coded)
    coded = sum(
        max_frame_bytes(stop - start)
        for slice_ in slices
        if slice_.coded
        for start, stop in plan.pieces(slice_)
    )
    return _Room(raw, coded)


class _Writer:
    """Builds one message: room for a header, then the pieces in plan order."""

    def __init__(
        self, plan: Plan, slices: Sequence[Slice], codec: Codec, direction: Direction
    ) -> None:
        room = _room_for(plan, slices)
        self._buffer = torch.empty(
            HEADER_BYTES + room.raw + room.coded, dtype=torch.uint8
        )
        self._used = HEADER_BYTES
        self._raw: list[Tensor] = []
        self._coded: list[Tensor] = []
        self._codec = codec
        self._direction = direction
        direction.header_bytes += HEADER_BYTES

    def frame(self, name: str, x: Tensor, sparsity: float) -> bool:
        """Append ``x``, float32[n], as a frame; return whether it was finite.

        ``x`` becomes the residual to be.
        """
        room = self._buffer[self._used :]
        used = self._codec.encode(x, sparsity, room)
        self._used += used
        self._coded.append(room[:used])
        self._direction.add_frame(name, x.numel(), room[:used])
        return not is_nan_frame(room[:used])

    def nothing(self, name: str, numel: int) -> None:
        """Append the frame of a rank that has nothing to say about a piece."""
        frame = self._buffer[self._used : self._used + SCALE_BYTES]
        frame.zero_()
        self._used += SCALE_BYTES
        self._coded.append(frame)
        self._direction.add_frame(name, numel, frame)

    def raw(self, name: str, x: Tensor) -> None:
        """Append ``x``, float32[n], as it is."""
        data = x.contiguous().view(torch.uint8)
        piece = self._buffer[self._used : self._used + data.numel()]
        piece.copy_(data)
        self._used += data.numel()
        self._raw.append(piece)
        self._direction.raw_bytes[name] += data.numel()

    def sealed(self, tag: Tag, entropy_min_bytes: int | None) -> Tensor:
        """Return the message, uint8[*], entropy-coded where that makes it smaller.

        Args:
            tag: what its header says.
            entropy_min_bytes: the shortest body to try it on; ``None``: none.
        """
        plain = self._buffer[: self._used]
        if entropy_min_bytes is None or self._used - HEADER_BYTES < entropy_min_bytes:
            return seal(plain, tag)
        parts = (self._raw, self._coded)
        smaller, after = compress(parts, room_before=HEADER_BYTES)
        if smaller.numel() >= self._used:
            return seal(plain, tag)
        before = [sum(piece.numel() for piece in pieces) for pieces in parts]
        self._direction.raw_saved_bytes += before[0] - after[0]
        self._direction.coded_saved_bytes += before[1] - after[1]
        return seal(smaller, tag, FLAG_ENTROPY_CODED)


@dataclass
class _Cursor:
    """Bytes, uint8[*], that are read from the front."""

    left: Tensor

    def skip(self, count: int) -> Tensor:
        """Return the next bytes, ``count`` of them or what is left."""
        skipped, self.left = self.left[:count], self.left[count:]
        return skipped


class _Reader:
    """Checks one message, then reads its pieces in plan order.

    Args:
        message: uint8[*], as it arrived.
        tag: what its header must say.
        room: what its pieces may take.
        codec: for the frames.

    Raises:
        FormatError, PlanMismatch, PeerError: see ``unseal``.
    """

    def __init__(self, message: Tensor, tag: Tag, room: _Room, codec: Codec) -> None:
        self._tag = tag
        self._codec = codec
        body, entropy_coded = unseal(message, tag)
        if entropy_coded:
            with self._blamed():
                content = _Cursor(decompress(body, room.raw + room.coded))
            self._raw = _Cursor(content.skip(room.raw))
            self._frames = content
        else:  # both kinds in one row
            self._raw = self._frames = _Cursor(body)

    def says_nothing(self) -> bool:
        """Whether the frame here is the one of a rank with nothing to say."""
        return is_zero_frame(self._frames.left)

    def is_nan(self) -> bool:
        """Whether the frame here decodes to NaN."""
        return is_nan_frame(self._frames.left)

    def add_frame(self, acc: Tensor) -> None:
        """Add the frame here to ``acc``, float32[n]."""
        with self._blamed():
            self._frames.skip(self._codec.decode_add(self._frames.left, acc))

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Say whose bytes they are."""
        try:
            yield
        except FormatError as error:
            raise FormatError(f"message from {self._tag}: {error}") from error

    def raw(self, numel: int) -> Tensor:
        """Return the raw piece here, float32[numel]."""
        data = self._raw.skip(4 * numel)
        if data.numel() != 4 * numel:
            raise FormatError(
                f"message from {self._tag} ends {4 * numel - data.numel()} bytes "
                f"inside a raw piece of {numel} values; do both ranks use the same "
                "plan?"
            )
        return data.clone().view(torch.float32)

    def finish(self) -> None:
        """Raise ``FormatError`` if bytes are left over."""
        if left := max(self._raw.left.numel(), self._frames.left.numel()):
            raise FormatError(
                f"message from {self._tag}: {left} bytes are left behind the last "
                "piece; do both ranks use the same plan?"
            )
