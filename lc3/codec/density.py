"""Which values to send at a target density, and as what: the same on every backend.

3LC's scale, the largest magnitude times s, drains the outliers of heavy-tailed
gradients. What local steps change has light tails: there a fixed share of the largest
values, each sent as their mean magnitude, carries more for its bytes. Both numbers come
from a sample at fixed places and a sum that is rounded once, to a double, so that they
do not depend on who computes them; the format does not know how they were chosen.
"""

import math

import numpy as np
from numpy.typing import NDArray

SAMPLES = 4096


def sample_stride(numel: int) -> int:
    """Return the distance between sampled values: odd, to meet every column."""
    return numel // SAMPLES | 1


def choose(
    sample: NDArray[np.float32], density: float, largest: np.float32
) -> tuple[np.float32, np.float32]:
    """Return (threshold, scale): magnitudes above the one are sent as the other.

    Args:
        sample: float32[1 ≤ n], magnitudes of every ``sample_stride``-th value.
        density: share of values to send, 0 < density < 1.
        largest: the largest of all magnitudes, finite and > 0.
    """
    ordered = np.sort(sample)
    count = max(1, round(density * ordered.size))
    threshold = ordered[-count - 1] if count < ordered.size else np.float32(0)
    sent = ordered[ordered > threshold]
    if sent.size == 0 and threshold > 0:  # as large as each other: send all of them
        threshold = np.float32(0)
        sent = ordered[ordered > threshold]
    if sent.size == 0:  # the sample met only zeros
        return np.float32(largest * np.float32(0.5)), largest
    return threshold, np.float32(math.fsum(sent.tolist()) / sent.size)
