"""The same bytes from numba-cuda kernels, for all pieces of a bucket at once.

Six launches write the frames of a bucket, in two passes over its values:
``_find_peaks`` adds the residuals and finds each piece's largest magnitude;
``_quantize`` compares, packs and takes off what is sent. What follows reads a twentieth
of that, one byte for five values: ``_carry`` tells every tile where the last byte
before it was that is not five zeros, so that each can fold its zero runs by itself;
``_count`` how many bytes each tile writes; ``_place`` where; ``_emit`` writes all
frames in a row. The host waits once, for their lengths and bytes. Three
launches add up what arrived: ``_measure`` and ``_begin`` say where in a piece every
part of a frame begins, so that blocks can decode from there.

Sums over floats there are none, a maximum does not depend on order, and values are
compared, never divided: so the bytes are those of every other backend. Kernels run on
the stream that is torch's current one. Under numba's simulator (NUMBA_ENABLE_CUDASIM)
the same kernels work on tensors on the CPU, in small blocks of threads.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numba
import numba.cuda
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc3.codec import Encoded, cpu
from lc3.codec.density import choose, sample_stride
from lc3.format import (
    FLOAT32_MAX,
    RUN_BASE,
    RUN_MAX,
    RUN_MIN,
    SCALE_BYTES,
    ZERO_BYTE,
    max_frame_bytes,
    quartic_bytes,
)

__all__ = ["Batch", "add", "check", "encode", "max_frame_bytes", "unusable"]

cuda: Any = numba.cuda  # its types are those of the host's side
_config: Any = numba.config

# A simulated thread is a thread of the system, so blocks are small there.
THREADS = 8 if _config.ENABLE_CUDASIM else 256
BYTES_A_THREAD = 4
TILE = BYTES_A_THREAD * THREADS  # quartic bytes that a block encodes
RANGE = 8 * THREADS  # quartic bytes that a block decodes
_MAX = np.float32(FLOAT32_MAX)
_HALF, _NOTHING = np.float32(0.5), np.float32(0)
_META_BYTES = 16  # of a piece: where its frame starts, how many digits are not 0

# Columns of the tables of pieces.
_AT, _NUMEL, _LENGTH, _OWED, _QUARTIC, _TILE, _TILES = range(7)
_BODY, _BODY_BYTES, _START = range(3)
_SOME, _NOT_FINITE = 1, 2  # flags of a piece


def unusable(device: torch.device) -> str:
    """Return why kernels cannot run on a device, or nothing; tries them there.

    numba-cuda of one version fails with some versions of NumPy and of CUDA, and only
    when it compiles.
    """
    if not cuda.is_available():
        return "numba-cuda finds no driver; numba -s says what it looked for"
    x = torch.ones(
        5, device="cpu" if _config.ENABLE_CUDASIM else device, dtype=torch.float32
    )
    try:
        encode(x, 1.0, torch.empty(max_frame_bytes(5), dtype=torch.uint8))
    except Exception as error:  # noqa: BLE001  # whatever its compiler raises
        return (
            f"numba-cuda does not work with NumPy {np.__version__} and this CUDA: "
            f"{type(error).__name__}: {error}; pip install 'torch-lc3[cuda]' in a "
            "fresh environment takes versions that do"
        )
    return ""


@cuda.jit(device=True)
def _sum_until(buffer, thread, value):  # type: ignore[no-untyped-def]
    """Return the sum of ``value`` over the threads up to this one."""
    buffer[thread] = value
    cuda.syncthreads()
    step = 1
    while step < THREADS:
        before = buffer[thread - step] if thread >= step else 0
        cuda.syncthreads()
        buffer[thread] += before
        cuda.syncthreads()
        step *= 2
    return buffer[thread]


@cuda.jit(device=True)
def _largest_until(buffer, thread, value):  # type: ignore[no-untyped-def]
    """Return the largest ``value`` of the threads up to this one."""
    buffer[thread] = value
    cuda.syncthreads()
    step = 1
    while step < THREADS:
        before = buffer[thread - step] if thread >= step else value
        cuda.syncthreads()
        buffer[thread] = max(buffer[thread], before)
        cuda.syncthreads()
        step *= 2
    return buffer[thread]


@cuda.jit
def _find_peaks(x, owed, pieces, tiles, peaks, flags):  # type: ignore[no-untyped-def]
    """Add what is owed to a tile; find the largest magnitude, and what is special."""
    thread = cuda.threadIdx.x
    piece, start = tiles[cuda.blockIdx.x, 0], tiles[cuda.blockIdx.x, 1]
    base, numel = pieces[piece, _AT], pieces[piece, _NUMEL]
    length, owed_base = pieces[piece, _LENGTH], pieces[piece, _OWED]
    stop = min(start + TILE, length)
    peak, seen = _NOTHING, 0
    for partition in range(5):
        for j in range(start + thread, stop, THREADS):
            at = partition * length + j
            if at < numel:
                value = x[base + at]
                if value != _NOTHING:
                    seen |= _SOME
                if owed_base >= 0:
                    value = value + owed[owed_base + at]
                    x[base + at] = value
                magnitude = abs(value)
                if magnitude <= _MAX:
                    peak = max(peak, magnitude)
                else:
                    seen |= _NOT_FINITE
    block_peak = cuda.shared.array(THREADS, np.float32)
    block_seen = cuda.shared.array(THREADS, np.int32)
    block_peak[thread], block_seen[thread] = peak, seen
    step = THREADS // 2
    while step > 0:
        cuda.syncthreads()
        if thread < step:
            block_peak[thread] = max(block_peak[thread], block_peak[thread + step])
            block_seen[thread] |= block_seen[thread + step]
        step //= 2
    if thread == 0:
        cuda.atomic.max(peaks, piece, block_peak[0])
        cuda.atomic.or_(flags, piece, block_seen[0])


@cuda.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, pieces, tiles, peaks, flags, sparsity, halves, scales, quartic, lasts, counts
):
    """Write a tile's quartic bytes, and take what they send off its values.

    With sparsity 0 scales and thresholds are given; else they are written.
    """
    thread, tile = cuda.threadIdx.x, cuda.blockIdx.x
    piece, start = tiles[tile, 0], tiles[tile, 1]
    base, numel = pieces[piece, _AT], pieces[piece, _NUMEL]
    length, quartic_base = pieces[piece, _LENGTH], pieces[piece, _QUARTIC]
    scale, half = _NOTHING, _NOTHING
    if flags[piece] & _SOME:
        if flags[piece] & _NOT_FINITE:
            scale = np.float32(np.nan)
        elif peaks[piece] > _NOTHING:
            if sparsity > _NOTHING:
                scale = min(peaks[piece] * sparsity, _MAX)
                half = scale * _HALF
            else:
                scale, half = scales[piece], halves[piece]
    if start == 0 and thread == 0 and (sparsity > _NOTHING or not scale > _NOTHING):
        scales[piece] = scale
    last, digits = -1, 0
    for j in range(start + thread, min(start + TILE, length), THREADS):
        byte = 0
        for partition in range(5):
            at, digit = partition * length + j, 0
            if at < numel and scale > _NOTHING:
                value = x[base + at]
                if value > half:
                    digit = 1
                    x[base + at] = value - scale
                elif value < -half:
                    digit = -1
                    x[base + at] = value + scale
            byte = 3 * byte + digit + 1
            digits += abs(digit)
        quartic[quartic_base + j] = byte
        if byte != ZERO_BYTE:
            last = j
    block_last = cuda.shared.array(THREADS, np.int32)
    block_digits = cuda.shared.array(THREADS, np.int32)
    block_last[thread], block_digits[thread] = last, digits
    step = THREADS // 2
    while step > 0:
        cuda.syncthreads()
        if thread < step:
            block_last[thread] = max(block_last[thread], block_last[thread + step])
            block_digits[thread] += block_digits[thread + step]
        step //= 2
    if thread == 0:
        lasts[tile] = block_last[0]
        cuda.atomic.add(counts, piece, block_digits[0])


@cuda.jit
def _carry(pieces, lasts, befores):  # type: ignore[no-untyped-def]
    """Tell each tile of a piece where the last byte before it is that is not zero."""
    thread, piece = cuda.threadIdx.x, cuda.blockIdx.x
    first, count = pieces[piece, _TILE], pieces[piece, _TILES]
    buffer = cuda.shared.array(THREADS, np.int32)
    before = -1
    for start in range(0, count, THREADS):
        at = start + thread
        mine = lasts[first + at] if at < count else -1
        _largest_until(buffer, thread, mine)
        if at < count:
            befores[first + at] = before
            if thread > 0:
                befores[first + at] = max(before, buffer[thread - 1])
        before = max(before, buffer[THREADS - 1])
        cuda.syncthreads()


@cuda.jit(device=True)
def _speaks(quartic, base, length, j, last):  # type: ignore[no-untyped-def]
    """Return the byte that stands for the run that ends at j, or −1 if none does.

    ``last``: where the last byte up to j is that is not zero. The last byte of a zero
    run speaks for it, and so does every fourteenth.
    """
    byte = quartic[base + j]
    if byte != ZERO_BYTE:
        return int(byte)
    place = j - last
    ends = j + 1 == length or quartic[base + j + 1] != ZERO_BYTE
    if not ends and place % RUN_MAX != 0:
        return -1
    run = (place - 1) % RUN_MAX + 1
    return ZERO_BYTE if run < RUN_MIN else RUN_BASE - RUN_MIN + run


@cuda.jit(device=True)
def _last_before(buffer, quartic, base, length, start, thread, before):  # type: ignore[no-untyped-def]
    """Return where the last byte is that is not zero before this thread's bytes."""
    first = start + BYTES_A_THREAD * thread
    last = before
    for j in range(first, min(first + BYTES_A_THREAD, length)):
        if quartic[base + j] != ZERO_BYTE:
            last = j
    _largest_until(buffer, thread, last)
    found = buffer[thread - 1] if thread > 0 else before
    cuda.syncthreads()
    return found


@cuda.jit
def _count(pieces, tiles, scales, quartic, befores, sizes):  # type: ignore[no-untyped-def]
    """Count the bytes that a tile writes, the scale among them in the first one."""
    thread, tile = cuda.threadIdx.x, cuda.blockIdx.x
    piece, start = tiles[tile, 0], tiles[tile, 1]
    length, base = pieces[piece, _LENGTH], pieces[piece, _QUARTIC]
    buffer = cuda.shared.array(THREADS, np.int32)
    last = _last_before(buffer, quartic, base, length, start, thread, befores[tile])
    first, written = start + BYTES_A_THREAD * thread, 0
    for j in range(first, min(first + BYTES_A_THREAD, length)):
        if quartic[base + j] != ZERO_BYTE:
            last = j
        if _speaks(quartic, base, length, j, last) >= 0:
            written += 1
    total = _sum_until(buffer, thread, written)
    if thread == THREADS - 1:
        size = total if scales[piece] > _NOTHING else 0
        sizes[tile] = size + SCALE_BYTES if start == 0 else size


@cuda.jit
def _place(tiles, counts, sizes, places, meta):  # type: ignore[no-untyped-def]
    """Tell each tile where its bytes go; tell the host where each frame starts."""
    thread, count = cuda.threadIdx.x, sizes.size
    buffer = cuda.shared.array(THREADS, np.int64)
    before = 0
    for start in range(0, count, THREADS):
        tile = start + thread
        mine = sizes[tile] if tile < count else 0
        until = _sum_until(buffer, thread, mine)
        if tile < count:
            places[tile] = before + until - mine
            if tiles[tile, 1] == 0:
                piece = tiles[tile, 0]
                meta[2 * piece] = before + until - mine
                meta[2 * piece + 1] = counts[piece]
        before += buffer[THREADS - 1]
        cuda.syncthreads()
    if thread == 0:
        meta[2 * counts.size] = before


@cuda.jit
def _emit(pieces, tiles, scales, quartic, befores, places, out):  # type: ignore[no-untyped-def]
    """Write a tile's bytes."""
    thread, tile = cuda.threadIdx.x, cuda.blockIdx.x
    piece, start = tiles[tile, 0], tiles[tile, 1]
    length, base = pieces[piece, _LENGTH], pieces[piece, _QUARTIC]
    place = places[tile]
    if start == 0:
        if thread < SCALE_BYTES:
            out[place + thread] = scales.view(np.uint8)[SCALE_BYTES * piece + thread]
        place += SCALE_BYTES
    if not scales[piece] > _NOTHING:  # the same for all threads of the block
        return
    buffer = cuda.shared.array(THREADS, np.int32)
    before = _last_before(buffer, quartic, base, length, start, thread, befores[tile])
    first, written, last = start + BYTES_A_THREAD * thread, 0, before
    for j in range(first, min(first + BYTES_A_THREAD, length)):
        if quartic[base + j] != ZERO_BYTE:
            last = j
        if _speaks(quartic, base, length, j, last) >= 0:
            written += 1
    place += _sum_until(buffer, thread, written) - written
    last = before
    for j in range(first, min(first + BYTES_A_THREAD, length)):
        if quartic[base + j] != ZERO_BYTE:
            last = j
        byte = _speaks(quartic, base, length, j, last)
        if byte >= 0:
            out[place] = byte
            place += 1


@cuda.jit(device=True)
def _steps_of(byte):  # type: ignore[no-untyped-def]
    """Return for how many quartic bytes a byte of a body stands."""
    return int(byte) - RUN_BASE + RUN_MIN if byte >= RUN_BASE else 1


@cuda.jit
def _measure(frames, chunks, data, starts):  # type: ignore[no-untyped-def]
    """Write for every chunk of THREADS bytes for how many quartic bytes it stands."""
    thread, chunk = cuda.threadIdx.x, cuda.blockIdx.x
    if chunk >= chunks:  # the same for all threads of the block
        return
    low, high = 0, frames.shape[0]  # the last frame that begins with it or before
    while high - low > 1:
        middle = (low + high) // 2
        if frames[middle, _START] <= chunk:
            low = middle
        else:
            high = middle
    # Frames without a body begin where the next one does, and are passed over.
    k = (chunk - frames[low, _START]) * THREADS + thread
    steps = 0
    if k < frames[low, _BODY_BYTES]:
        steps = _steps_of(data[frames[low, _BODY] + k])
    buffer = cuda.shared.array(THREADS, np.int32)
    total = _sum_until(buffer, thread, steps)
    if thread == THREADS - 1:
        starts[chunk] = total


@cuda.jit
def _begin(frames, starts):  # type: ignore[no-untyped-def]
    """Turn each chunk's number of quartic bytes into the place of its first one."""
    thread, frame = cuda.threadIdx.x, cuda.blockIdx.x
    first = frames[frame, _START]
    count = (frames[frame, _BODY_BYTES] + THREADS - 1) // THREADS
    buffer = cuda.shared.array(THREADS, np.int32)
    before = 0
    for start in range(0, count, THREADS):
        at = start + thread
        mine = starts[first + at] if at < count else 0
        until = _sum_until(buffer, thread, mine)
        if at < count:
            starts[first + at] = before + until - mine
        before += buffer[THREADS - 1]
        cuda.syncthreads()


@cuda.jit
def _add(acc, pieces, ranges, senders, frames, scales, starts, data):  # type: ignore[no-untyped-def]
    """Add every sender's frame to a range of a piece, in their order.

    Tables: of ``frames`` (where its body is in ``data``, its bytes, its first entry in
    ``starts``); ``starts`` says for every THREADS bytes of a body at which quartic byte
    they begin.
    """
    thread = cuda.threadIdx.x
    piece, start = ranges[cuda.blockIdx.x, 0], ranges[cuda.blockIdx.x, 1]
    base, numel, length = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
    stop = min(start + RANGE, length)
    buffer = cuda.shared.array(THREADS, np.int32)
    for sender in range(senders):
        frame = piece * senders + sender
        scale = scales[frame]
        if scale != scale:
            for partition in range(5):
                for j in range(start + thread, stop, THREADS):
                    if partition * length + j < numel:
                        acc[base + partition * length + j] = scale
        body, count = frames[frame, _BODY], frames[frame, _BODY_BYTES]
        first, chunks = frames[frame, _START], (count + THREADS - 1) // THREADS
        low, high = 0, chunks  # the last chunk that begins at ``start`` or before
        while high - low > 1:
            middle = (low + high) // 2
            if starts[first + middle] <= start:
                low = middle
            else:
                high = middle
        while low < chunks and starts[first + low] < stop:
            k = low * THREADS + thread
            byte, steps = ZERO_BYTE, 0
            if k < count:
                byte = int(data[body + k])
                steps = _steps_of(byte)
            j = starts[first + low] + _sum_until(buffer, thread, steps) - steps
            if byte < RUN_BASE and byte != ZERO_BYTE and start <= j < stop:
                power = 81
                for partition in range(5):
                    digit = byte // power % 3
                    at = base + partition * length + j
                    if digit == 2:
                        acc[at] += scale
                    elif digit == 0:
                        acc[at] -= scale
                    power //= 3
            cuda.syncthreads()
            low += 1
        cuda.syncthreads()  # the next sender's values go where these went


class _Layout(NamedTuple):
    """Where the pieces of a call are: the same in every step, so made once.

    Kernels' arguments are arrays: making one of a tensor takes as long as a launch.
    """

    piece_count: int
    tile_count: int
    floats: Tensor  # peaks, scales, thresholds
    ints: Tensor  # flags, counts
    out: Tensor  # meta, then frames
    meta_bytes: int
    pieces: Any
    tiles: Any
    peaks: Any
    scales: Any
    halves: Any
    flags: Any
    counts: Any
    of_tiles: Any  # lasts, befores, sizes, places
    quartic: Any
    meta: Any
    frames: Any


class Batch:
    """Codes all pieces of a bucket at once. Keeps its tables and memory for the next.

    Args:
        device: where the values are: CUDA, or the CPU under the simulator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layouts: dict[Any, _Layout] = {}
        self._ranges: dict[Any, tuple[int, Any, Any]] = {}
        self._launchers: dict[Any, Any] = {}
        self._back = _Staging(device)
        self._forth = _Staging(device)
        self._guess: dict[Any, int] = {}
        self._starts = _array(torch.empty(1, dtype=torch.int32, device=device))

    def encode(
        self,
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        sparsity: float,
        density: float | None,
    ) -> list[tuple[Tensor, int]]:
        """See ``lc3.wire.coder.Coder.encode``."""
        found: list[tuple[Tensor, int]] = [
            (torch.empty(0, dtype=torch.float32), 0)
        ] * len(values)
        groups = list(_by_storage(values, residuals).values())
        for some in groups:
            with _current(self._device):
                frames = self._encode(
                    [values[i] for i in some],
                    [residuals[i] for i in some],
                    sparsity,
                    density,
                    keep=len(groups) > 1,
                )
            for i, frame in zip(some, frames, strict=True):
                found[i] = frame
        return found

    def _encode(
        self,
        values: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        sparsity: float,
        density: float | None,
        keep: bool,
    ) -> list[tuple[Tensor, int]]:
        key = tuple(
            (_offset(x), x.numel(), -1 if r is None else _offset(r))
            for x, r in zip(values, residuals, strict=True)
        )
        if key not in self._layouts:
            self._layouts[key] = self._lay_out(key)
        layout = self._layouts[key]
        count, tiles, pieces = layout.tile_count, layout.tiles, layout.pieces
        x = _array(_base(values[0]))
        owed = next((_array(_base(r)) for r in residuals if r is not None), x)
        layout.floats.zero_()
        layout.ints.zero_()
        peaks, scales, flags = layout.peaks, layout.scales, layout.flags
        lasts, befores, sizes, places = layout.of_tiles
        quartic, counts = layout.quartic, layout.counts
        self._launch(_find_peaks, count, x, owed, pieces, tiles, peaks, flags)
        if density is not None:
            self._choose(values, layout, density)
        s = np.float32(0 if density is not None else sparsity)
        of_piece = peaks, flags, s, layout.halves, scales
        self._launch(
            _quantize, count, x, pieces, tiles, *of_piece, quartic, lasts, counts
        )
        self._launch(_carry, layout.piece_count, pieces, lasts, befores)
        self._launch(_count, count, pieces, tiles, scales, quartic, befores, sizes)
        self._launch(_place, 1, tiles, counts, sizes, places, layout.meta)
        where_from = scales, quartic, befores, places, layout.frames
        self._launch(_emit, count, pieces, tiles, *where_from)
        meta_bytes = layout.meta_bytes
        # All that is expected in the one copy that is waited for; the rest is rare.
        hoped = min(layout.out.numel(), self._guess.get(key, meta_bytes + (1 << 16)))
        data = self._back.to_host(layout.out, hoped)
        where = data[:meta_bytes].view(torch.int64).view(-1, 2).tolist()
        used = meta_bytes + where[-1][0]
        if used > hoped:
            data = self._back.to_host(layout.out, used)
        self._guess[key] = used + used // 4
        body = data[meta_bytes:used].clone() if keep else data[meta_bytes:used]
        ends = [start for start, _ in where[1:]]
        return [
            (body[start:end], digits)
            for (start, digits), end in zip(where, ends, strict=False)
        ]

    def _choose(
        self, values: Sequence[Tensor], layout: _Layout, density: float
    ) -> None:
        """Choose thresholds and scales from samples of the values, on the host."""
        peaks, scales, halves = layout.floats
        flags = layout.ints[0]
        samples = [x[:: sample_stride(x.numel())].abs() for x in values]
        sizes = [sample.numel() for sample in samples]
        known = torch.cat([peaks, flags.float(), *samples]).cpu()
        count = len(values)
        chosen = torch.zeros(2, count, dtype=torch.float32)
        parts = torch.split(known[2 * count :], sizes)
        for i, sample in enumerate(parts):
            largest = np.float32(known[i].item())
            if int(known[count + i]) == _SOME and largest > 0:
                threshold, scale = choose(sample.numpy(), density, largest)
                chosen[0, i], chosen[1, i] = float(scale), float(threshold)
        scales.copy_(chosen[0])
        halves.copy_(chosen[1])

    def add(self, sums: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        """See ``lc3.wire.coder.Coder.add``."""
        groups: dict[Any, list[tuple[Tensor, Sequence[Tensor]]]] = {}
        for acc, frames in sums:
            place = acc.untyped_storage().data_ptr(), len(frames)
            groups.setdefault(place, []).append((acc, frames))
        for group in groups.values():
            with _current(self._device):
                self._add(group)

    def _add(self, sums: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        senders = len(sums[0][1])
        key = tuple((_offset(acc), acc.numel()) for acc, _ in sums)
        if key not in self._ranges:
            self._ranges[key] = self._lay_out_ranges(key)
        count, pieces, ranges = self._ranges[key]
        everything = [frame for _, frames in sums for frame in frames]
        sizes = np.array([frame.numel() for frame in everything])
        table = np.zeros((len(sizes), 3), np.int64)
        table[:, _BODY] = np.cumsum(sizes) - sizes + SCALE_BYTES
        table[:, _BODY_BYTES] = sizes - SCALE_BYTES
        chunks = -(-table[:, _BODY_BYTES] // THREADS)
        table[:, _START] = np.cumsum(chunks) - chunks
        frames, scales, data = self._forth.to_device(everything, table)
        chunk_count = int(chunks.sum())
        # A power of two: each number of blocks is a launch that is kept prepared.
        blocks = 1 << (chunk_count - 1).bit_length()
        if self._starts.size < blocks:
            room = torch.empty(blocks, dtype=torch.int32, device=self._device)
            self._starts = _array(room)
        if chunk_count:
            self._launch(_measure, blocks, frames, chunk_count, data, self._starts)
            self._launch(_begin, len(sizes), frames, self._starts)
        x = _array(_base(sums[0][0]))
        of_frames = frames, scales, self._starts, data
        self._launch(_add, count, x, pieces, ranges, senders, *of_frames)

    def _launch(self, kernel_: Any, blocks: int, *arguments: Any) -> None:
        """Queue a kernel on torch's current stream; a graph's is another one."""
        if self._device.type == "cpu":  # the simulator keeps no configurations apart
            kernel_[blocks, THREADS](*arguments)
            return
        handle = torch.cuda.current_stream(self._device).cuda_stream
        key = kernel_, blocks, handle
        if key not in self._launchers:
            stream = cuda.external_stream(handle) if handle else 0
            with warnings.catch_warnings():  # of few blocks: there are few values
                warnings.simplefilter("ignore")
                self._launchers[key] = kernel_[blocks, THREADS, stream]
        self._launchers[key](*arguments)

    def _lay_out(self, key: Sequence[tuple[int, int, int]]) -> _Layout:
        lengths = [quartic_bytes(numel) for _, numel, _ in key]
        tiles_of = [-(-length // TILE) for length in lengths]
        pieces = np.zeros((len(key), 7), np.int64)
        pieces[:, [_AT, _NUMEL, _OWED]] = key
        pieces[:, _LENGTH] = lengths
        pieces[:, _QUARTIC] = np.cumsum([0, *lengths[:-1]])
        pieces[:, _TILES] = tiles_of
        pieces[:, _TILE] = np.cumsum([0, *tiles_of[:-1]])
        tiles = _parts_of(lengths, TILE)
        meta_bytes = _META_BYTES * (len(key) + 1)
        most = meta_bytes + sum(max_frame_bytes(numel) for _, numel, _ in key)

        def room(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self._device)

        floats = room(3, len(key), dtype=torch.float32)
        ints = room(2, len(key), dtype=torch.int32)
        out = room(most, dtype=torch.uint8)
        peaks, scales, halves = map(_array, floats)
        flags, counts = map(_array, ints)
        return _Layout(
            piece_count=len(key),
            tile_count=len(tiles),
            floats=floats,
            ints=ints,
            out=out,
            meta_bytes=meta_bytes,
            pieces=self._table(pieces),
            tiles=self._table(tiles),
            peaks=peaks,
            scales=scales,
            halves=halves,
            flags=flags,
            counts=counts,
            of_tiles=[*map(_array, room(4, len(tiles), dtype=torch.int32))],
            quartic=_array(room(sum(lengths), dtype=torch.uint8)),
            meta=_array(out[:meta_bytes].view(torch.int64)),
            frames=_array(out[meta_bytes:]),
        )

    def _lay_out_ranges(self, key: Sequence[tuple[int, int]]) -> tuple[int, Any, Any]:
        lengths = [quartic_bytes(numel) for _, numel in key]
        pieces = np.array(
            [(*piece, length) for piece, length in zip(key, lengths, strict=True)]
        )
        ranges = _parts_of(lengths, RANGE)
        return len(ranges), self._table(pieces), self._table(ranges)

    def _table(self, rows: NDArray[np.int64]) -> Any:
        return _array(torch.from_numpy(rows).to(self._device))


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Make a device the thread's: numba takes the one whose context is current."""
    if device.type == "cpu":
        yield
    else:
        with torch.cuda.device(device):
            yield


class _Staging:
    """Pinned memory through which bytes go between host and device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = self._room(0)
        self._copied: Any = None  # the event behind the last copy to the device
        self._room_there = torch.empty(0, dtype=torch.uint8, device=device)

    def _room(self, size: int) -> Tensor:
        pinned = self._device.type != "cpu"
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def to_host(self, data: Tensor, size: int) -> Tensor:
        """Return the first bytes of ``data``, until the next call; waits for them."""
        if self._host.numel() < size:
            self._host = self._room(size + size // 2)
        self._host[:size].copy_(data[:size], non_blocking=True)
        if self._device.type != "cpu":
            torch.cuda.current_stream(self._device).synchronize()
        return self._host[:size]

    def to_device(
        self, frames: Sequence[Tensor], table: NDArray[np.int64]
    ) -> tuple[Any, Any, Any]:
        """Copy frames to the device, in one copy; until the next call.

        Args:
            frames: uint8[*] each, on the host.
            table: of them, see ``_add``.

        Returns:
            The table, the frames' scales, and their bytes in a row, as arrays.
        """
        count = len(table)
        at_scales = table.nbytes
        at_data = at_scales + 8 * -(-4 * count // 8)
        total = at_data + sum(frame.numel() for frame in frames)
        if self._copied is not None:  # it may still read the host's memory
            self._copied.synchronize()
        if self._host.numel() < total:
            self._host = self._room(2 * total)
            self._room_there = torch.empty(
                2 * total, dtype=torch.uint8, device=self._device
            )
        host, there = self._host[:total], self._room_there[:total]
        data = torch.cat([*frames], out=host[at_data:]).numpy()
        host[:at_scales].numpy()[:] = table.reshape(-1).view(np.uint8)
        places = table[:, [_BODY]] + np.arange(-SCALE_BYTES, 0)
        host[at_scales:][: 4 * count].numpy()[:] = data[places].reshape(-1)
        there.copy_(host, non_blocking=True)
        if self._device.type != "cpu":
            self._copied = torch.cuda.current_stream(self._device).record_event()
        return (
            _array(there[:at_scales].view(torch.int64).view(-1, 3)),
            _array(there[at_scales:][: 4 * count].view(torch.float32)),
            _array(there[at_data:]),
        )


def _by_storage(
    values: Sequence[Tensor], residuals: Sequence[Tensor | None]
) -> dict[Any, list[int]]:
    """Return the pieces, by their numbers, that one launch can address together."""
    groups: dict[Any, list[int]] = {}
    for i, (x, r) in enumerate(zip(values, residuals, strict=True)):
        key = (
            x.untyped_storage().data_ptr(),
            None if r is None else r.untyped_storage().data_ptr(),
        )
        groups.setdefault(key, []).append(i)
    return groups


def _base(tensor: Tensor) -> Tensor:
    """Return all of the memory that a float32 tensor is a part of, as float32[*]."""
    numel = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((numel,), (1,), 0)


def _offset(tensor: Tensor) -> int:
    return int(tensor.storage_offset())


def _array(tensor: Tensor) -> Any:
    """Return a tensor as kernels take it, without waiting for anything."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    return cuda.as_cuda_array(tensor, sync=False)


def _parts_of(lengths: Sequence[int], size: int) -> NDArray[np.int64]:
    """Return (piece, start) of every part of ``size`` quartic bytes."""
    return np.array(
        [
            (piece, start)
            for piece, length in enumerate(lengths)
            for start in range(0, length, size)
        ]
    )


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
    if x.numel() == 0:
        out[:SCALE_BYTES] = 0
        return Encoded(SCALE_BYTES, 0)
    ((frame, digits),) = Batch(x.device).encode([x], [residual], sparsity, density)
    out[: frame.numel()] = frame.to(out.device)
    return Encoded(frame.numel(), digits)


def check(frame: Tensor, numel: int) -> int:
    """See ``lc3.codec.Codec.check``: on the host, which all bytes come through."""
    return cpu.check(frame.cpu(), numel)


def add(frame: Tensor, acc: Tensor) -> None:
    """See ``lc3.codec.Codec.add``."""
    if acc.numel():
        Batch(acc.device).add([(acc, [frame.cpu()])])
