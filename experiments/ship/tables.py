"""Rows of the comparison of shipped models, and the tables of the page from them."""

import numpy as np
import torch
from torch import Tensor

from experiments.tables import grid

Row = dict[str, object]
Read = dict[str, str]
Named = dict[str, Tensor]

FIGURES = (
    *("bytes", "bits", "rival_bits", "ratio", "score", "drop", "mb_s_in"),
    *("mb_s_out", "note"),
)


def row(table: str, network: str, what: str, **figures: object) -> Row:
    """Return one line of the result file; figures that it has not are empty."""
    empty: Row = dict.fromkeys(FIGURES, "")
    named: Row = {"table": table, "network": network, "what": what}
    rounded = {
        k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()
    }
    assert rounded.keys() <= empty.keys()
    return {**named, **empty, **rounded}


def matrices(named: Named) -> Named:
    """Return the weights: tensors of two dimensions and more."""
    return {n: t for n, t in named.items() if t.ndim > 1 and t.is_floating_point()}


def deviation(named: Named) -> float:
    """Return the standard deviation of all values together."""
    flat = [t.flatten() for t in named.values() if t.is_floating_point()]
    return float(torch.cat(flat).std())


def order_0(numbers: np.ndarray) -> float:
    """Return the entropy of numbers in bits, all together."""
    _, counts = np.unique(numbers, return_counts=True)
    return float((counts * np.log2(numbers.size / counts)).sum())


TITLES = {  # of tables, in the order of the page
    "coder": "Entropy coding, real bits beside order-0 entropy of each tensor",
    "dct": "The DCT's gate on kernels, steps of 1 σ, at equal error",
    "file": "Whole files, no training afterwards",
    "equal": "Whole files beside NNCodec's at equal loss and at equal squared error",
    "pruned": "Pruned by one magnitude threshold, 400 steps of fine-tuning",
    "non-zero": "Positions and values of pruned weights",
    "kfac": "Which weights go: mean score of seeds after fine-tuning",
    "ranks": "Energy that low ranks lose, of what one rank for all layers loses",
    "information": "What layers say, in bits: the information page",
    "exact": "Nothing lost",
    "speed": "Speed on one core, of float32",
    "memory": "Peak memory",
}
_COLUMNS = {
    "network": "network",
    "what": "what",
    "bytes": "bytes",
    "bits": "bits a value",
    "rival_bits": "without",
    "ratio": "ratio",
    "score": "score, %",
    "drop": "points lost",
    "mb_s_in": "in, MB/s",
    "mb_s_out": "out, MB/s",
    "note": "note",
}
_OTHERWISE = {  # titles of columns that mean something else in a table
    "coder": {"rival_bits": "order 0"},
    "non-zero": {"bits": "bits a non-zero weight"},
    "equal": {
        "bits": "lc3, bits a value",
        "rival_bits": "NNCodec",
        "ratio": "lc3 / NNCodec",
    },
    "dct": {"drop": "saved in order 0 of each place"},
    "kfac": {"drop": "points above uniform"},
    "information": {
        "bits": "I(X; T)",
        "rival_bits": "I(T; Y)",
        "ratio": "labels shuffled",
    },
    "ranks": {"ratio": "of uniform's loss"},
    "memory": {"bytes": "peak bytes", "ratio": "of the input"},
}
_WORDS = ("network", "what", "note")
_DIGITS = {"bytes": 0, "mb_s_in": 0, "mb_s_out": 0, "bits": 3, "rival_bits": 3}


def table(rows: list[Read], name: str) -> str:
    """Return one table of the result file as Markdown; empty columns are left out."""
    mine = [r for r in rows if r["table"] == name]
    titles = {**_COLUMNS, **_OTHERWISE.get(name, {})}
    kept = [key for key in titles if any(r[key] for r in mine)]
    words = [at for at, key in enumerate(kept) if key in _WORDS]
    lines = [[_cell(key, r[key]) for key in kept] for r in mine]
    return grid([titles[key] for key in kept], lines, words) + "\n"


def _cell(key: str, value: str) -> str:
    if not value or key in _WORDS:
        return value
    return f"{float(value):,.{_DIGITS.get(key, 2)}f}"


def page(rows: list[Read]) -> str:
    """Return all tables of the result file, with what they are of."""
    there = [name for name in TITLES if any(r["table"] == name for r in rows)]
    parts = [f"**{TITLES[name]}.**\n\n{table(rows, name)}" for name in there]
    r = rows[0]
    commits = ", ".join(dict.fromkeys(one["commit"] for one in rows))
    said = (
        f"One seed unless a row says more. {r['machine']}, {r['cores']} cores, busy "
        f"with other work, one thread, seconds of the process; lc3 {r['lc3']} at "
        f"commits {commits}, torch {r['torch']}, numba {r['numba']}.\n"
    )
    return "\n".join([*parts, said])
