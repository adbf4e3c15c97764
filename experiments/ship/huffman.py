"""Deep Compression's bytes for quantized weights: Huffman codes of values and gaps.

Each weight that is not zero is its value and how many zeros stand before it; a gap of
more than 31 is cut by a zero that is sent as a value. Both streams of a layer have
Huffman codes of their own, whose tables take a byte a symbol. Source: Han, Mao, Dally,
"Deep Compression", ICLR 2016 (arXiv 1510.00149).
"""

import heapq
import itertools

import numpy as np
from numpy.typing import NDArray

LARGEST_GAP = 31
Integers = NDArray[np.int64]


def nbytes(numbers: NDArray[np.int32]) -> int:
    """Return how many bytes one layer's numbers, int32[n], take."""
    gaps, values = streams(numbers)
    bits = stream_bits(gaps) + stream_bits(values)
    return -(-bits // 8) + np.unique(gaps).size + np.unique(values).size


def streams(numbers: NDArray[np.int32]) -> tuple[Integers, Integers]:
    """Return gaps, 0 to 31, and values, of the same length."""
    places = np.flatnonzero(numbers)
    gaps = np.diff(places, prepend=-1) - 1
    fillers = gaps // (LARGEST_GAP + 1)
    ends = np.cumsum(fillers + 1) - 1
    out_gaps = np.full(int(ends[-1]) + 1 if ends.size else 0, LARGEST_GAP, np.int64)
    out_values = np.zeros(out_gaps.size, np.int64)
    out_gaps[ends] = gaps - fillers * (LARGEST_GAP + 1)
    out_values[ends] = numbers[places]
    return out_gaps, out_values


def stream_bits(symbols: Integers) -> int:
    """Return how many bits the best prefix code of a stream takes."""
    _, counts = np.unique(symbols, return_counts=True)
    if counts.size == 1:
        return int(counts[0])
    order = itertools.count()
    heap = [(int(n), next(order)) for n in counts]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap)[0] + heapq.heappop(heap)[0]
        total += both
        heapq.heappush(heap, (both, next(order)))
    return total
