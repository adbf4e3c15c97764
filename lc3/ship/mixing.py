"""SplitMix64's output function: random-looking bits of a number, the same anywhere.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014.
"""

import numpy as np

from lc3.codec.compiled import kernel


@kernel(inline="always")
def mixed(seed: np.uint64, number: np.uint64) -> np.uint64:
    """Return 64 bits of a seed and a number from 0 on."""
    z = seed + (number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
