"""Runs every script as it is, with lc3's lines, and with those of local steps.

    make evaluate EXPERIMENT=scripts TEXT=tinyshakespeare.txt

Needs an environment with Lightning, Accelerate and Transformers. Trainings that have
rows in the results are not run again.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.record import RESULTS, read_csv, stamped, write_csv
from experiments.tables import insert

# Forms of each script, and whether a higher score is better.
FORMS = "plain", "ddp", "local_sgd"
SCRIPTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "nanogpt": (FORMS, False),
    "mingpt": (FORMS, False),
    "trainer": (FORMS, False),
    "accelerator": (FORMS, True),
    "lightning_transformer": (FORMS, False),
}
TITLES = {
    "nanogpt": "nanoGPT: AdamW, cosine, clipping; test loss",
    "mingpt": "minGPT: AdamW, clipping; test loss",
    "trainer": "HF Trainer: AdamW, cosine, clipping; test loss",
    "accelerator": "Accelerate: AdamW, clipping; test accuracy",
    "lightning_transformer": "Lightning: SGD, clipping; training loss",
}
COLUMNS = "script", "form", "seed", "steps", "score", "train_loss", "ratio", "norm_gap"


def run(script: str, form: str, seed: int, text: Path, steps: int) -> str:
    """Run one training on two ranks and return what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", f"experiments.scripts.{script}", form]
    command += ["--text", str(text), "--seed", str(seed)]
    command += ["--steps", str(steps)] if steps else []
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=RESULTS.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    if done.returncode:
        raise SystemExit(f"{script} {form} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def train(script: str, form: str, seed: int, text: Path, steps: int) -> dict[str, Any]:
    """Run one training on two ranks and return its figures."""
    said = run(script, form, seed, text, steps)
    found = re.search(r"^REPORT (.*)$", said, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{script} {form} has reported nothing:\n{said[-3000:]}")
    figures: dict[str, Any] = json.loads(found[1])
    return figures


def norm_gap(norms: Sequence[float], plain: Sequence[float]) -> float:
    """Return the mean distance of logged norms from those of the script as it is."""
    pairs = [(a, b) for a, b in zip(norms, plain, strict=True) if b]
    return statistics.mean(abs(a / b - 1) for a, b in pairs) if pairs else 0.0


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return the comparison as a Markdown table, means over the seeds of both."""
    lines = [
        "| script | lines | seeds | fewer bytes | as it is | with lines | difference |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    scores = {
        (row["script"], row["form"], row["seed"]): float(row["score"]) for row in rows
    }
    for script, (forms, is_share) in SCRIPTS.items():
        for form in forms[1:]:
            mine = [r for r in rows if (r["script"], r["form"]) == (script, form)]
            pairs = [
                (scores[script, "plain", r["seed"]], float(r["score"]))
                for r in mine
                if (script, "plain", r["seed"]) in scores
            ]
            if not pairs:
                continue
            plain, coded = map(statistics.mean, zip(*pairs, strict=True))
            ratio = statistics.mean(float(r["ratio"]) for r in mine)
            gaps = sorted(100 * (theirs / own - 1) for own, theirs in pairs)
            digits = "{:.2%}" if is_share else "{:.4f}"
            lines.append(
                f"| {TITLES[script]} | `{form}` | {len(pairs)} | {ratio:.0f} × "
                f"| {digits.format(plain)} | {digits.format(coded)} "
                f"| {100 * (coded / plain - 1):+.1f} % "
                f"({gaps[0]:+.1f} … {gaps[-1]:+.1f}) |"
            )
    return "\n".join(lines)


def page_block(rows: Sequence[dict[str, str]]) -> str:
    """Return the table, and what it was measured with, for a page."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    row = rows[-1]
    return (
        f"{table(rows)}\n\n2 ranks on one machine, {row['machine']}, {row['cores']} "
        f"cores; means of the seeds, and of each seed's difference the lowest and the "
        f"highest. lc3 {row['lc3']} at commit {commits}, torch {row['torch']}, Python "
        f"{row['python']}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, write rows after each, print the table."""
    parser = argparse.ArgumentParser(prog="experiments.scripts", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each form")
    parser.add_argument("--steps", type=int, default=0, help="default: each script's")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "scripts.csv")
    parser.add_argument("--docs", type=Path, help="a page with a block for the table")
    options = parser.parse_args(arguments)
    if not options.text.is_file():
        parser.error(f"{options.text} is no file; give any text of a megabyte or so")
    rows = read_csv(options.out) if options.out.exists() else []
    plain_norms: list[float] = []
    for seed in range(options.seeds):
        for script in options.scripts:
            for form in SCRIPTS[script][0]:
                key = script, form, str(seed)
                if key in {(r["script"], r["form"], r["seed"]) for r in rows}:
                    continue
                text = options.text.resolve()
                figures = train(script, form, seed, text, options.steps)
                norms = figures.pop("norms")
                plain_norms = norms if form == "plain" else plain_norms
                gap = 0.0
                if len(plain_norms) == len(norms):
                    gap = norm_gap(norms, plain_norms)
                row = {"script": script, **figures, "norm_gap": gap}
                kept = {column: row[column] for column in COLUMNS}
                rows += [{k: str(v) for k, v in one.items()} for one in stamped([kept])]
                write_csv(options.out, rows)
                print(f"{script}, {form}, seed {seed}: {figures['score']:.4f}")
    print(table(rows))
    if options.docs is not None:
        page = options.docs.read_text()
        options.docs.write_text(insert(page, "scripts", page_block(rows)))


if __name__ == "__main__":
    main()
