"""A trained network through the same thin link: models, checkpoints and deltas.

``save`` writes a state dict to one file, exact or as small as it may be; ``load`` reads
it, or single tensors of it, and checks every byte. ``fit`` searches the smallest file
whose score is good enough; ``low_rank`` and ``prune`` make a model smaller before.
``python -m lc3 ship``, ``unship`` and ``inspect`` do the same with files. The bytes are
specified in ``lc3.ship.format``.
"""

from lc3.ship import information
from lc3.ship.factoring import low_rank
from lc3.ship.fitting import Plan, fit
from lc3.ship.model import Row, load, rows, save, unship
from lc3.ship.pruning import Masks, prune

__all__ = [
    "Masks",
    "Plan",
    "Row",
    "fit",
    "information",
    "load",
    "low_rank",
    "prune",
    "rows",
    "save",
    "unship",
]
