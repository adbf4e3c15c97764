"""What the paper's tables said, as recalled, beside what was found here.

Lim, Andersen, Kaminsky, "3LC: Lightweight and Effective Traffic Compression for
Distributed Machine Learning", MLSys 2019 (arXiv 1802.07389). The figures were recalled,
not read, with about 75 % confidence for 3LC's and 65 % for the others'. ResNet-110 on
CIFAR-10, ten GPU workers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report import BASELINE, Row, grid, step_ms_by_link, summarise


@dataclass(frozen=True)
class Recalled:
    """A row of the paper's table 1, with table 2's bits where it has them.

    Attributes:
        speed: times faster than 32-bit float at 10 Mbit/s, 100 Mbit/s and 1 Gbit/s.
        accuracy: test accuracy less that of 32-bit float, in points.
        bits: per state change, mean of push and pull.
    """

    speed: tuple[float, float, float]
    accuracy: float
    bits: float | None = None


PAPER = {
    "8-bit int": Recalled((3.62, 3.47, 1.51), -0.04),
    "Stoch 3-value + QE": Recalled((12.3, 7.51, 1.53), -1.31, 1.6),
    "MQE 1-bit int": Recalled((14.6, 7.40, 1.30), -0.16),
    "25% sparsification": Recalled((3.25, 3.11, 1.33), 0.03),
    "5% sparsification": Recalled((8.98, 6.62, 1.44), -0.50),
    "2 local steps": Recalled((1.92, 1.87, 1.38), -0.34),
    "3LC s=1.00": Recalled((15.9, 7.97, 1.53), -0.05, 0.812),
    "3LC s=1.50": Recalled((20.9, 8.70, 1.53), -0.08, 0.451),
    "3LC s=1.75": Recalled((22.8, 9.04, 1.53), 0.14, 0.298),
    "3LC s=1.90": Recalled((22.8, 9.22, 1.55), -0.27),
}
HEADERS = (
    "method",
    "bits, here",
    "paper",
    "points of accuracy, here",
    "paper",
    *(f"{x} at {link}" for link in ("10 M", "100 M", "1 G") for x in ("here", "paper")),
)
TEXT = (
    "The paper's figures are as recalled: ResNet-110, CIFAR-10, ten workers with GPUs, "
    "25 600 steps. Bits are per element that the method codes, the mean of both ways, "
    "before the entropy stage. Accuracy is the difference from float32. Speed is the "
    "step time of float32 over the method's."
)


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table's rows: methods that the paper has and ``rows`` have."""
    first = [row for row in rows if row.get("rate", "") == rows[0].get("rate", "")]
    found = {summary.method: summary for summary in summarise(first)}
    if BASELINE not in found:
        return []
    times, _ = step_ms_by_link(rows)
    result = []
    for method, said in PAPER.items():
        if method not in found:
            continue
        mine = found[method]
        points = 100 * (mine.accuracy - found[BASELINE].accuracy)
        speeds = [times[BASELINE][k] / times[method][k] for k in times[method]]
        both = [
            cell
            for here, there in zip(speeds, said.speed, strict=False)
            for cell in (f"{here:.2f} ×", f"{there:.2f} ×")
        ]
        result.append(
            [
                method,
                "–" if math.isnan(mine.frame_bits) else f"{mine.frame_bits / 2:.3f}",
                "" if said.bits is None else f"{said.bits:.3f}",
                f"{points:+.2f}",
                f"{said.accuracy:+.2f}",
                *both,
            ]
        )
    return result


def markdown(rows: Sequence[Row]) -> str:
    """Return the reproduction table as Markdown."""
    return f"{grid(HEADERS, lines(rows))}\n\n{TEXT}\n"
