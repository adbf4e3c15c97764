"""The scripts of experiments/scripts, a few steps of them, with lc3's lines.

``make evaluate EXPERIMENT=scripts`` is the long form.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.scripts import __main__ as scripts
from experiments.scripts.__main__ import SCRIPTS, norm_gap, run, table
from tests import forked

Trained = Callable[[str, str], dict[str, Any]]
pytestmark = pytest.mark.timeout(300)
STEPS = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a text of words that follow from each other, without a download."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = [f"{i * i % 97:02d} and {chr(97 + i % 26) * 3} " for i in range(20_000)]
    path.write_text("".join(words))
    return path


@pytest.fixture(scope="module")
def trained(text: Path) -> Trained:
    """Give ``trained(script, form)``: figures of forked ranks, trained once."""

    @functools.cache
    def of(script: str, form: str) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scripts, "subprocess", SimpleNamespace(run=forked.run))
            return scripts.train(script, form, 0, text, STEPS)

    return of


@pytest.mark.parametrize("script", ["nanogpt", "mingpt"])
def test_the_lines_train_what_the_script_trains(script: str, trained: Trained) -> None:
    plain, coded = (trained(script, form) for form in ("plain", "ddp"))
    assert coded["score"] < 1.02 * plain["score"]
    assert coded["ratio"] > 25  # the first ten steps exchange their moments
    assert norm_gap(coded["norms"][:1], plain["norms"][:1]) < 0.2


def test_local_steps_train_what_the_script_trains(trained: Trained) -> None:
    plain, local = (trained("nanogpt", form) for form in ("plain", "local_sgd"))
    # Five exchanges: the losses of a whole training are the long form's.
    assert local["score"] < 1.15 * plain["score"]
    assert local["ratio"] > 300


def test_the_norm_is_that_of_plain_ddp_at_every_tenth_step(text: Path) -> None:
    said = run("norms", "ddp", 0, text, STEPS)
    found = re.search(r"largest gap (\d+\.\d)% of (\d+) steps", said)
    assert found, said
    assert float(found[1]) < 20
    assert int(found[2]) == STEPS // 10


def test_the_table_compares_means_over_the_seeds_of_both() -> None:
    def row(form: str, seed: str, score: str) -> dict[str, str]:
        given = {"script": "nanogpt", "form": form, "seed": seed, "score": score}
        return {**given, "ratio": "50"}

    rows = [row("plain", "0", "2.0"), row("plain", "1", "9.0"), row("ddp", "0", "2.1")]
    (line,) = table(rows).splitlines()[2:]
    assert line.startswith("| nanoGPT: AdamW")
    assert line.endswith("| 1 | 50 × | 2.0000 | 2.1000 | +5.0 % (+5.0 … +5.0) |")
    assert set(SCRIPTS) >= {"trainer", "accelerator", "lightning_transformer"}
