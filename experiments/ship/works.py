"""The page's first table: what each of six works brings, from the measured rows."""

from collections.abc import Callable, Iterable
from statistics import mean
from typing import NamedTuple

from experiments.ship.tables import Read
from experiments.tables import grid

NONE = "not measured"


class Work(NamedTuple):
    """One line of the table.

    Attributes:
        name: of the work, with its source.
        here: what is built of it.
        brings: what it brings, from the rows.
        not_where: where it brings nothing, from the rows.
    """

    name: str
    here: str
    brings: Callable[[list[Read]], str]
    not_where: Callable[[list[Read]], str]


def found(rows: Iterable[Read], table: str, *words: str) -> list[Read]:
    """Return the rows of a table whose network and text have all of some words."""
    return [
        r
        for r in rows
        if r["table"] == table
        and all(word in f"{r['network']}, {r['what']}" for word in words)
    ]


def span(rows: Iterable[Read], column: str, form: str = ".2f") -> str:
    """Return the least and the largest figure of rows.

    Example:
        >>> span([{"ratio": "0.5"}, {"ratio": "0.75"}, {"ratio": ""}], "ratio")
        '0.50 to 0.75'
    """
    figures = [float(r[column]) for r in rows if r[column]]
    if not figures:
        return NONE
    ends = [format(f(figures), form) for f in (min, max)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _universal(rows: list[Read]) -> str:
    moving = [r for r in found(rows, "coder", "step 1 σ") if "weights" not in r["what"]]
    still = found(rows, "coder", "weights")
    return (
        f"of the order-0 entropy gradients, momenta and deltas take "
        f"{span(moving, 'ratio')}, weights {span(still, 'ratio')}"
    )


def _dither(rows: list[Read]) -> str:
    lines = [
        float(other["drop"]) - float(plain["drop"])
        for plain in found(rows, "file", "lc3, 2 bits")
        for other in found(rows, "file", plain["network"], "lc3, dither, 2 bits")
    ]
    said = f"{mean(lines):+.2f} points at 2 bits a value" if lines else NONE
    return (
        f"dither loses more alone ({said}); it pays where errors of many senders "
        "average out. Lattices above one dimension are not built"
    )


def _saved(rows: Iterable[Read]) -> list[Read]:
    return [{**r, "bits": str(float(r["rival_bits"]) - float(r["bits"]))} for r in rows]


def _dct(rows: list[Read]) -> str:
    taken = [r for r in found(rows, "dct") if r["note"] == "taken"]
    moving = [r for r in taken if "weights" not in r["what"]]
    still = [r for r in taken if "weights" in r["what"]]
    return (
        f"bits a value saved on kernels: gradients, momenta and deltas "
        f"{span(_saved(moving), 'bits')}, weights {span(_saved(still), 'bits')}"
    )


def _dct_not(rows: list[Read]) -> str:
    every = found(rows, "dct")
    declined = sum(r["note"] == "declined" for r in every)
    counted = f"{declined} of {len(every)} kernels" if every else NONE
    return (
        f"where coding both ways says so ({counted}); it spreads the "
        "energy of dense layers, where it is not tried. Vectors are few"
    )


def _ranks(rows: list[Read]) -> str:
    return (
        "one budget in, ranks of all layers out; the published ResNet-56 ranks come "
        f"out of the published spectra. `greedy` loses "
        f"{span(found(rows, 'ranks', 'greedy'), 'ratio')} of the energy that one rank "
        "for all layers loses"
    )


def _ranks_not(rows: list[Read]) -> str:
    return (
        "equal energy is not least energy: the paper's rule loses "
        f"{span(found(rows, 'ranks', 'enc_map'), 'ratio')}, so `greedy` is the default"
    )


def _kfac(rows: list[Read]) -> str:
    above = span(found(rows, "kfac", "K-FAC"), "drop")
    return f"densities of all layers from one number; {above} points above uniform ones"


def _kfac_not(rows: list[Read]) -> str:
    above = span(found(rows, "kfac", "one threshold"), "drop")
    return (
        f"one magnitude threshold for all layers gains {above} points and costs "
        "nothing: it is the default. Whether the paper corrects the weights that "
        "survive is not known here; this does not"
    )


def _filter(rows: list[Read]) -> str:
    larger = []
    for r in found(rows, "non-zero", "filter"):
        density = r["what"].partition(",")[0]
        (coder,) = found(rows, "non-zero", r["network"], density, "context coder")
        larger.append({"ratio": str(float(r["bytes"]) / float(coder["bytes"]))})
    return (
        f"as a file it is {span(larger, 'ratio')} times the exact coder's bytes, and "
        "has false weights (`lc3.ship.bloomier.break_even`)"
    )


def _information(rows: list[Read]) -> str:
    said = [r["note"] for r in found(rows, "information") if r["note"]]
    more = sum(note.startswith("more") for note in said)
    nothing = sum(note.startswith("nothing") for note in said)
    counted = (
        f"of {len(said)} layers and estimators it differed from the trained one by "
        f"more than another seed in {more}; in {nothing} shuffled labels said as much"
        if said
        else NONE
    )
    return f"{counted}. With real widths each sample has a code of its own"


WORKS = (
    Work(
        "Universal compression, Choi and others "
        "([1802.02271](https://arxiv.org/abs/1802.02271))",
        "one step for all weights, the predictive coder, `dither_seed=`",
        _universal,
        _dither,
    ),
    Work(
        "Transform coding and clustering, Laude and others "
        "([1805.07258](https://arxiv.org/abs/1805.07258))",
        "a DCT where it is smaller at equal error, shared values for vectors",
        _dct,
        _dct_not,
    ),
    Work(
        "Efficient neural network compression, Kim and others "
        "([1811.12781](https://arxiv.org/abs/1811.12781))",
        '`ship.low_rank(rule="enc-map" \\| "enc-model" \\| "greedy")`',
        _ranks,
        _ranks_not,
    ),
    Work(
        "MLPrune, Zeng and Urtasun (OpenReview r1g5b2RcKm)",
        '`ship.prune(score="kfac")`',
        _kfac,
        _kfac_not,
    ),
    Work(
        "Weightless, Reagen and others "
        "([1711.04686](https://arxiv.org/abs/1711.04686))",
        '`indices="bloomier"`',
        lambda _: "weights that can be read in place from a small memory",
        _filter,
    ),
    Work(
        "Adaptive estimators, Chelombiev and others "
        "([1902.09037](https://arxiv.org/abs/1902.09037))",
        "`lc3.ship.information`",
        lambda _: (
            "a diagnostic with its controls, shuffled labels and another seed, "
            "beside it"
        ),
        _information,
    ),
)


def table(rows: list[Read]) -> str:
    """Return the table as Markdown."""
    titles = ("work", "here", "what it brings", "where it does not")
    lines = [[w.name, w.here, w.brings(rows), w.not_where(rows)] for w in WORKS]
    return grid(titles, lines, range(4)) + "\n"
