"""Measures methods on rate-limited links: one lab run for each method and rate.

    sudo .venv/bin/python -m experiments.links --hosts 4 --rates 10mbit 100mbit

Step times are measured, bytes are counted by the interfaces.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.methods import METHODS
from experiments.record import RESULTS, read_csv, write_csv
from experiments.report import insert
from experiments.train import at_least
from launch import netlab

SHOWN = (
    *("float32", "fp16", "PowerSGD rank 1", "top-k 1%", "8-bit int"),
    *("3LC s=1.00", "3LC s=1.75", "push-pull s=1.00", "local H=8"),
)
HEADERS = ("method", "bytes per step, interface", "bytes per step, counted by lc3")


def measure(
    method: str, rate: str, hosts: int, steps: int, folder: Path
) -> dict[str, object]:
    """Train digits with one method in a lab of its own; return its last row.

    Raises:
        RuntimeError: the run failed; its output has been shown.
    """
    out = folder / "row.csv"
    job = ["-m", "experiments.train", "--methods", method, "--steps", str(steps)]
    command = [sys.executable, "-m", "launch.netlab", "--hosts", str(hosts)]
    command += ["--rate", rate, "--", *job, "--seeds", "1", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env=environment,
        cwd=RESULTS.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{method} at {rate} failed:\n{done.stdout}{done.stderr}")
    row = read_csv(out)[-1]
    columns = ("task", "method", "ranks", "steps", "sent_bytes", "link_bytes")
    kept = {column: row[column] for column in columns}
    measured = {column: row[column] for column in ("step_ms", "compute_ms", "codec_ms")}
    return {"rate": rate, **kept, **measured}


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return measured step times by method and rate, with bytes of the lowest rate."""
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    titles = [*HEADERS, *(f"step at {rate}" for rate in rates)]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = {row["rate"]: row for row in rows if row["method"] == method}
        first = mine[rates[0]]
        per_step = [
            int(first[c]) / int(first["steps"]) for c in ("link_bytes", "sent_bytes")
        ]
        times = [f"{float(mine[rate]['step_ms']):,.1f} ms" for rate in rates]
        lines.append([method, *(f"{b:,.0f}" for b in per_step), *times])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    row = rows[0]
    return (
        f"{table}\n\nTask {row['task']}, {row['ranks']} hosts of one rank each on one "
        f"machine of {row['cores']} cores, {row['steps']} steps, one run. Measured, "
        "start-up and evaluation left out; an interface counts the headers of TCP, IP "
        f"and Ethernet too. lc3 {row['lc3']} at commit {row['commit']}, torch "
        f"{row['torch']}.\n"
    )


def main() -> int:
    """Measure everything, write the result file, bring README up to date."""
    parser = argparse.ArgumentParser(prog="experiments.links", description=__doc__)
    parser.add_argument("--hosts", type=at_least(2), default=4)
    parser.add_argument("--rates", nargs="+", default=["10mbit", "100mbit", "1000mbit"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(SHOWN))
    parser.add_argument("--steps", type=at_least(8), default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "local" / "links.csv")
    parser.add_argument("--readme", type=Path, help="Markdown file with markers")
    options = parser.parse_args()
    if reason := netlab.missing():
        parser.error(f"{reason}; without a lab, make demo computes times from bytes")
    console = Console()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in options.rates:
            for method in options.methods:
                row = measure(method, rate, options.hosts, options.steps, Path(folder))
                rows.append(row)
                console.print(
                    f"{rate:>9} {method:20} {row['step_ms']:>9} ms a step",
                    highlight=False,
                )
    write_csv(options.out, rows)
    content = markdown(read_csv(options.out))
    console.print(content, soft_wrap=True, highlight=False)
    if options.readme:
        options.readme.write_text(insert(options.readme.read_text(), "links", content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
