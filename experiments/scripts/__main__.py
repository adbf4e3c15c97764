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

# Forms of each script, and whether a higher score is better.
FORMS = "plain", "ddp", "local_sgd"
SCRIPTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "nanogpt": (FORMS, False),
    "mingpt": (FORMS, False),
    "trainer": (FORMS, False),
    "accelerator": (FORMS, True),
    "lightning_transformer": (FORMS, False),
}
COLUMNS = "script", "form", "seed", "steps", "score", "train_loss", "ratio", "norm_gap"


def train(script: str, form: str, seed: int, text: Path, steps: int) -> dict[str, Any]:
    """Run one training on two ranks and return its figures."""
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
    found = re.search(r"^REPORT (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise SystemExit(f"{script} {form} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(found[1])
    return figures


def norm_gap(norms: Sequence[float], plain: Sequence[float]) -> float:
    """Return the mean distance of logged norms from those of the script as it is."""
    pairs = [(a, b) for a, b in zip(norms, plain, strict=True) if b]
    return statistics.mean(abs(a / b - 1) for a, b in pairs) if pairs else 0.0


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return the comparison as a Markdown table, means over seeds."""
    lines = [
        "| script | form | seeds | fewer bytes | score | beside the script as it is |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for script, (forms, _) in SCRIPTS.items():
        of = {
            form: [r for r in rows if (r["script"], r["form"]) == (script, form)]
            for form in forms
        }
        for form, mine in of.items():
            seeds = {r["seed"] for r in mine}
            plain = [r for r in of["plain"] if r["seed"] in seeds]
            if not mine or not plain:
                continue
            mean, base = (
                statistics.mean(float(r["score"]) for r in some)
                for some in (mine, plain)
            )
            ratio = statistics.mean(float(r["ratio"]) for r in mine)
            lines.append(
                f"| {script} | {form} | {len(mine)} | {ratio:.0f} × | {mean:.4f} "
                f"| {100 * (mean / base - 1):+.2f} % |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, write rows after each, print the table."""
    parser = argparse.ArgumentParser(prog="experiments.scripts", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each form")
    parser.add_argument("--steps", type=int, default=0, help="default: each script's")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "scripts.csv")
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


if __name__ == "__main__":
    main()
