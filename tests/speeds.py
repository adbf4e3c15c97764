"""What a rank that is ten times slower costs three others, by how they come together.

    make speeds

Three replicas on the loopback train for some seconds without a fourth one and for some
more with it, whose steps take ten times as long. How long their own steps take changes
with whatever else the machine does, so the share of their time that is not spent in
exchanges is told, too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.record import read_csv, stamped, write_csv
from experiments.tables import grid, insert
from tests.churn import Campaign, Row

INTERVAL_S, PAUSE_S = 4.0, 0.05
STEPS = round(INTERVAL_S / PAUSE_S * 0.8)  # a step computes something, too
FAST = 3


class Way(NamedTuple):
    """How ranks come together.

    Attributes:
        given: arguments of ``attach``.
        grace_s: see the lighthouse.
    """

    given: Mapping[str, Any]
    grace_s: float


WAYS = (
    Way({"sync_every": STEPS}, INTERVAL_S),
    Way({"sync_every_s": INTERVAL_S}, INTERVAL_S),
)


def measure(way: Way, without_s: float, with_s: float) -> Row:
    """Return the steps per second of the fast ones, without and with the slow one."""
    replica = {
        "pause_s": PAUSE_S,
        "timeout_s": 10.0,
        "quorum_s": 40.0,
        "given": dict(way.given),
    }
    folder = Path(tempfile.mkdtemp(prefix="lc3-speeds-"))
    one = Campaign(folder, replica, None, 0, grace_ms=round(1000 * way.grace_s))
    light = one.shine()
    found: dict[str, float] = {}
    training: dict[str, float] = {}

    def time_in_steps(name: str, since: float) -> float:
        """Return the share of the time that is not spent in exchanges."""
        rows = [r for r in one.rows(name, "exchange") if r["time"] > since]
        waited = sum(row["seconds"] for row in rows[1:])
        return 1 - float(waited / (rows[-1]["time"] - rows[0]["time"]))

    def pace(name: str, since: float) -> float:
        rows = [r for r in one.rows(name, "exchange") if r["time"] > since]
        if len(rows) < 2:
            return 0.0
        steps = float(rows[-1]["step"] - rows[0]["step"])
        return steps / float(rows[-1]["time"] - rows[0]["time"])

    try:
        for _ in range(FAST):
            one.join()
        one.wait_until_joined(FAST)
        for kind, seconds in (("without", without_s), ("with", with_s)):
            if kind == "with":
                # Ten steps of the others, whose computing takes a part of it.
                one.given = {**replica, "pause_s": 11 * PAUSE_S}
                one.join()
                one.wait_until_joined(FAST + 1)
            begun = time.monotonic()
            time.sleep(seconds)
            fast = [pace(live.name, begun) for live in one.live[:FAST]]
            found[kind] = statistics.mean(fast)
            training[kind] = statistics.mean(
                time_in_steps(live.name, begun) for live in one.live[:FAST]
            )
        name = one.live[FAST].name
        late = [row for row in one.rows(name, "exchange") if row["time"] > begun]
        others = [
            row
            for row in one.rows(one.live[0].name, "exchange")
            if row["time"] > begun and row["committed"]
        ]
        return {
            "by": ", ".join(f"{k}={v:g}" for k, v in way.given.items()),
            "grace s": way.grace_s,
            "steps/s without": round(found["without"], 4),
            "steps/s with": round(found["with"], 4),
            "share": round(found["with"] / found["without"], 4),
            **{f"in steps {kind}": round(s, 4) for kind, s in training.items()},
            "share in steps": round(training["with"] / training["without"], 4),
            "steps/s of the slow one": round(pace(name, begun), 4),
            "exchanges": len(others),
            "exchanges of the slow one": sum(row["committed"] for row in late),
        }
    finally:
        for live in one.live:
            live.process.kill()
            live.process.wait()
        light.kill()
        light.wait()


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as Markdown."""
    titles = [
        *("ranks exchange by", "grace", "time in steps without the slow one"),
        *("with it", "share", "steps per second without it", "with it"),
        *("exchanges", "of them with the slow one"),
    ]
    lines = [
        [
            *(f"`{row['by']}`", f"{float(row['grace s']):g} s"),
            *(
                f"{100 * float(row[f'in steps {kind}']):.1f} %"
                for kind in ("without", "with")
            ),
            f"{float(row['share in steps']):.3f}",
            *(f"{float(row[f'steps/s {kind}']):.2f}" for kind in ("without", "with")),
            *(row["exchanges"], row["exchanges of the slow one"]),
        ]
        for row in rows
    ]
    return grid(titles, lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every way, write the rows, and bring a page up to date."""
    parser = argparse.ArgumentParser(prog="tests.speeds", description=__doc__)
    parser.add_argument("--without", type=float, default=40, help="s without it")
    parser.add_argument("--with", dest="with_s", type=float, default=100, help="s")
    parser.add_argument("--out", type=Path, help="CSV")
    parser.add_argument("--docs", type=Path, help="a page with a block for the table")
    options = parser.parse_args(arguments)
    rows = []
    for way in WAYS:
        rows += stamped([measure(way, options.without, options.with_s)])
        print(rows[-1], flush=True)
    if options.out:
        write_csv(options.out, rows)
        if options.docs:
            said = table(read_csv(options.out))
            page = insert(options.docs.read_text(), "speeds", said)
            options.docs.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
