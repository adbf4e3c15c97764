"""Machines that come and go, for as long as one likes: kills, stops, cut links, joins.

    make churn
    python -m tests.churn --minutes 30 --rate 100mbit --seeds 0 1 2 --out churn.csv

Every 20 to 60 seconds a random replica is killed (-9), stopped or cut off for 5 to 40
seconds, or a new one joins; 2 to 6 are there. With ``--rate`` each has a network
namespace of its own (root), without it all share the loopback and no link is cut. A
replica that ends by itself is started again, as a launcher would. Then the same number
of tokens is trained by replicas that nobody disturbs, as many as there were on average
and with a batch of what is left over, so that exchanges are as many, too. The learning
rate falls to zero over either. The loss is that of the model that ranks share. Rows of
a file that are of the same campaign are replaced.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.lab import netlab
from experiments.record import read_whole, stamped, write_csv
from experiments.tables import grid, insert
from tests.torchft_cases import BATCH, CONTEXT, Replica, tell_done

HOSTS, LEAST, AT_FIRST = 6, 2, 4
GRACE_S = 5.0
LIGHTHOUSE = "10.77.0.254"
METHODS = {
    "lc3": "`hooks.torchft`",
    "lc3_taken": '`hooks.torchft`, `optimizer_state="taken"`',
    "local_sgd": "torchft's LocalSGD",
    "diloco": "torchft's DiLoCo",
}
# What tells one campaign from another, in a file of several.
CAMPAIGN = "method", "seed", "minutes", "event every s", "kind"
EVENTS = "kill", "stop", "cut", "join", "ended", "hung"
Row = dict[str, Any]


@dataclass
class Live:
    """One replica that runs.

    Attributes:
        name: unique.
        host: its number of a host.
        process: it.
        until: when it is let go on, or connected again; 0: nothing is wrong.
        cut: whether that is its link.
    """

    name: str
    host: int
    process: subprocess.Popen[bytes]
    until: float = 0.0
    cut: bool = False


@dataclass
class Event:
    """Something that was done to a replica."""

    kind: str
    name: str
    time: float
    seconds: float = 0.0


@dataclass
class Campaign:
    """A training under churn, and what was done to it.

    Attributes:
        folder: for what replicas write.
        given: see ``Replica``.
        lab: hosts of their own, or ``None``.
        seed: of what happens, and of the data.
        every_s: bounds of the time between two events.
        away_s: the longest time that a replica is stopped or cut off.
        heartbeat_ms: see the lighthouse.
        grace_ms: see the lighthouse.
        at_first: replicas that begin.
        events: what happened.
        sent_bytes: by all hosts.
    """

    folder: Path
    given: dict[str, Any]
    lab: netlab.Lab | None
    seed: int
    every_s: tuple[float, float] = (20.0, 60.0)
    away_s: float = 40.0
    heartbeat_ms: int = 2000
    grace_ms: int = 1000
    at_first: int = AT_FIRST
    events: list[Event] = field(default_factory=list)
    live: list[Live] = field(default_factory=list)
    started: int = 0
    sent_bytes: int = 0

    def run(self, seconds: float, *, churn: bool, tokens: int = 0) -> None:
        """Train for some time, or until so many tokens have counted."""
        chance = random.Random(self.seed)
        sent_before = self._sent()
        light = self.shine()
        try:
            for _ in range(self.at_first):
                self.join()
            self.wait_until_joined(self.at_first)
            began = time.monotonic()
            end = began + seconds
            due = time.monotonic() + chance.uniform(*self.every_s)
            while time.monotonic() < end:
                time.sleep(0.2)
                self._look_after()
                if churn and time.monotonic() > due:
                    self.disturb(chance)
                    due = time.monotonic() + chance.uniform(*self.every_s)
                done = (time.monotonic() - began) / seconds
                if tokens:
                    done = self.counted() / tokens
                    if done >= 1:
                        break
                tell_done(self.folder, done)
            for one in self.live:
                self._heal(one)
            (self.folder / "stop").touch()
            deadline = time.monotonic() + 90
            for one in self.live:
                left = max(1.0, deadline - time.monotonic())
                try:
                    one.process.wait(left)
                except subprocess.TimeoutExpired:
                    self.events.append(Event("hung", one.name, time.monotonic()))
            self.sent_bytes = self._sent() - sent_before
        finally:
            for one in self.live:
                one.process.kill()
                one.process.wait()
            light.kill()
            light.wait()

    def _sent(self) -> int:
        """Return the bytes that hosts of a lab have sent so far."""
        return sum(t.sent_bytes for t in self.lab.traffic()) if self.lab else 0

    def shine(self) -> subprocess.Popen[bytes]:
        """Start a lighthouse."""
        address = "127.0.0.1" if self.lab is None else LIGHTHOUSE
        if self.lab is not None:
            subprocess.run(
                ["ip", "addr", "replace", f"{LIGHTHOUSE}/24", "dev", "switch"],
                check=True,
            )
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://{address}:{port}"
        command = [
            str(Path(sys.executable).with_name("torchft_lighthouse")),
            *("--bind", f"{address}:{port}", "--min_replicas", "1"),
            *("--join_timeout_ms", str(self.grace_ms), "--quorum_tick_ms", "20"),
            *("--heartbeat_timeout_ms", str(self.heartbeat_ms)),
        ]
        with (self.folder / "lighthouse.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def join(self) -> None:
        """Start a replica on a free host."""
        taken = {one.host for one in self.live}
        host = next(h for h in range(HOSTS) if h not in taken)
        name = f"r{self.started}"
        address = "127.0.0.1" if self.lab is None else netlab.address(host)
        replica = Replica(
            name=name,
            lighthouse=self.url,
            folder=str(self.folder),
            number=self.started,
            host=address,
            seed=self.seed,
            **self.given,
        )
        command = [sys.executable, "-m", "tests.torchft_cases"]
        command.append(json.dumps(asdict(replica)))
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.lab is not None:  # torchft names a host by what it calls itself
            script = f'hostname {address}; exec "$@"'
            command = ["unshare", "--uts", "sh", "-c", script, "sh", *command]
            command = self.lab.on(host, *command)
            variables["GLOO_SOCKET_IFNAME"] = "eth0"
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, start_new_session=True
            )
        self.live.append(Live(name, host, process))
        self.events.append(Event("join", name, time.monotonic()))
        self.started += 1

    def disturb(self, chance: random.Random) -> None:
        """Do something to some replica."""
        well = [one for one in self.live if not one.until]
        kinds = ["join"] if len(self.live) < HOSTS else []
        if len(well) > LEAST:
            kinds += ["kill", "stop"] + ["cut"] * (self.lab is not None)
        if not kinds:
            return
        kind = chance.choice(kinds)
        if kind == "join":
            self.join()
            return
        one = chance.choice(well)
        seconds = 0.0 if kind == "kill" else chance.uniform(5, self.away_s)
        now = time.monotonic()
        self.events.append(Event(kind, one.name, now, seconds))
        if kind == "kill":
            self._signal(one, signal.SIGKILL)
            one.process.wait()
            self.live.remove(one)
            return
        one.until, one.cut = now + seconds, kind == "cut"
        if one.cut:
            subprocess.run(["ip", "link", "set", f"port{one.host}", "down"], check=True)
        else:
            self._signal(one, signal.SIGSTOP)

    def _heal(self, one: Live) -> None:
        if one.until:
            one.until = 0.0
            if one.cut:
                port = f"port{one.host}"
                subprocess.run(["ip", "link", "set", port, "up"], check=True)
            else:
                self._signal(one, signal.SIGCONT)

    def _look_after(self) -> None:
        """Let go on what has waited, and start what has ended anew."""
        for one in list(self.live):
            if one.until and time.monotonic() > one.until:
                self._heal(one)
            if one.process.poll() is not None:
                self._heal(one)
                self.live.remove(one)
                self.events.append(Event("ended", one.name, time.monotonic()))
                self.join()

    def _signal(self, one: Live, number: int) -> None:
        os.killpg(one.process.pid, number)

    def wait_until_joined(self, count: int) -> None:
        """Wait for that many replicas to have joined."""
        end = time.monotonic() + 400
        while sum(bool(self.rows(one.name, "joined")) for one in self.live) < count:
            time.sleep(0.2)
            if time.monotonic() > end or any(
                one.process.poll() is not None for one in self.live
            ):
                logs = [(self.folder / f"{o.name}.log").read_text() for o in self.live]
                raise TimeoutError("\n".join(log[-2000:] for log in logs))

    def rows(self, name: str, event: str) -> list[Row]:
        """Return what a replica has written of some kind."""
        path = self.folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row for row in rows if row["event"] == event]

    @property
    def names(self) -> list[str]:
        """Names of all replicas that there ever were."""
        return [f"r{number}" for number in range(self.started)]

    def counted(self) -> int:
        """Return the tokens in exchanges that have succeeded."""
        last = [self.rows(name, "exchange")[-1:] for name in self.names]
        return sum(row["counted"] for rows in last for row in rows)

    def report(self) -> Row:
        """Return the figures."""
        rows = {name: self.rows(name, "exchange") for name in self.names}
        good = {n: [r for r in some if r["committed"]] for n, some in rows.items()}
        models: dict[Any, set[str]] = {}
        for some in good.values():
            for row in some:
                models.setdefault((row["exchanges"], row["entry"]), set()).add(
                    row["hash"]
                )
        killed = [e for e in self.events if e.kind == "kill"]
        gone = [e for e in self.events if e.kind in ("kill", "ended", "hung")]
        trained = sum(some[-1]["trained"] for some in rows.values() if some)
        # What one that is gone had trained since its last line is not known: the most.
        trained += len(gone) * self.given["sync_every"] * BATCH * CONTEXT
        # For a quorum, then to connect, and then for those who are connected.
        limit = self.given["quorum_s"] + 2 * self.given["timeout_s"] + GRACE_S
        waits = [
            (row["seconds"] - self._away(name, row), name, row["exchanges"])
            for name, some in rows.items()
            for row in some
        ]
        joined = []
        for name in self.names[self.at_first :]:
            begun = self.rows(name, "joined")
            if begun and good[name]:
                joined.append(good[name][0]["time"] - begun[0]["time"])
        last = max(
            (row["exchanges"] for some in good.values() for row in some), default=0
        )
        there = [
            n for n, some in good.items() if some and some[-1]["exchanges"] >= last - 2
        ]
        ends = [row for n in there for row in self.rows(n, "end")]
        losses = [float(row["loss"]) for row in ends if row.get("loss") is not None]
        kinds = [event.kind for event in self.events]
        return {
            "events": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "exchanges": last,
            "failed attempts": sum(
                some[-1]["failed"] for some in rows.values() if some
            ),
            "models alike": all(len(found) == 1 for found in models.values()),
            "models compared": len(models),
            "hangs": [w for w in waits if w[0] > limit] + self._hung(),
            "longest wait s": round(max(waits)[0], 2),
            "tokens trained": trained,
            "tokens counted": self.counted(),
            "goodput": round(self.counted() / trained, 4),
            "batch": self.given.get("batch", BATCH),
            "rate": "falling",
            "loss": round(statistics.mean(losses), 4) if losses else None,
            "kill to next exchange s": _spread(
                [self._next_after(event, good) for event in killed]
            ),
            "joined to first exchange s": _spread(joined),
            "bytes": self.sent_bytes,
            "ends by itself": self._reasons(),
        }

    def _hung(self) -> list[Any]:
        return [(e.name, "did not end") for e in self.events if e.kind == "hung"]

    def _reasons(self) -> list[str]:
        ended = {event.name for event in self.events if event.kind == "ended"}
        said = []
        for name in sorted(ended):
            rows = self.rows(name, "end")
            said.append(f"{name}: {rows[-1]['error'][:200] if rows else 'no word'}")
        return said

    def _away(self, name: str, row: Row) -> float:
        """Return for how long of an exchange a replica was stopped itself."""
        start, end = row["time"] - row["seconds"], row["time"]
        away = 0.0
        for event in self.events:
            if event.name == name and event.kind == "stop":
                both = min(end, event.time + event.seconds) - max(start, event.time)
                away += max(0.0, both)
        return away

    def _next_after(self, event: Event, good: dict[str, list[Row]]) -> float:
        later = [
            row["time"]
            for some in good.values()
            for row in some
            if row["time"] > event.time
        ]
        return min(later, default=float("nan")) - event.time


def _spread(seconds: Sequence[float]) -> Row:
    found = [s for s in seconds if s == s]
    if not found:
        return {"count": 0}
    return {
        "count": len(found),
        "median": round(statistics.median(found), 2),
        "most": round(max(found), 2),
    }


def flat(report: Mapping[str, Any]) -> Row:
    """Return a report as columns of a result file."""
    found = dict(report)
    events = found.pop("events")
    for kind in EVENTS:
        found[f"events: {kind}"] = events.get(kind, 0)
    for name in ("kill to next exchange s", "joined to first exchange s"):
        spread = found.pop(name)
        for of in ("count", "median", "most"):
            found[f"{name}, {of}"] = spread.get(of, "")
    found["hangs"] = len(found["hangs"])
    found["ends by itself"] = "; ".join(found["ends by itself"])
    return found


def together(old: Sequence[Mapping[str, object]], new: Sequence[Row]) -> list[Row]:
    """Return ``old`` rows and ``new`` ones, which replace those of their campaign."""

    def of(row: Mapping[str, object]) -> list[str]:
        return [str(row[name]) for name in CAMPAIGN]

    replaced = [of(row) for row in new]
    return [dict(row) for row in old if of(row) not in replaced] + list(new)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return what came of each campaign, as Markdown: means over its seeds."""
    titles = [
        *("method", "minutes", "events every", "seeds", "kills, stops, cuts, joins"),
        *("million tokens trained", "goodput", "hangs"),
        *("learning rate", "loss", "undisturbed, replicas × batch", "beside it"),
        *("MB sent per million tokens", "ended with an error"),
    ]
    lines = []
    campaigns = dict.fromkeys(
        tuple(row[n] for n in CAMPAIGN if n != "seed") for row in rows
    )
    for method, minutes, every, kind in campaigns:
        if kind != "churn":
            continue
        some = {}
        for one in ("churn", "undisturbed"):
            key = method, minutes, every, one
            some[one] = [
                row
                for row in rows
                if tuple(row[n] for n in CAMPAIGN if n != "seed") == key
            ]
        churn = some["churn"]

        def mean(column: str, of: Sequence[Mapping[str, str]] = churn) -> float:
            return statistics.mean(float(row[column]) for row in of)

        def total(column: str, of: Sequence[Mapping[str, str]] = churn) -> int:
            return sum(int(row[column]) for row in of)

        beside = mean("loss") / mean("loss", some["undisturbed"]) - 1
        replicas = [
            "{} × {}".format(row["events: join"], row["batch"])
            for row in some["undisturbed"]
        ]
        undisturbed = f"{mean('loss', some['undisturbed']):.4f} ({', '.join(replicas)})"
        lines.append(
            [
                *(METHODS[method], minutes, f"{every} s", str(len(churn))),
                ", ".join(str(total(f"events: {kind}")) for kind in EVENTS[:4]),
                f"{mean('tokens trained') / 1e6:.2f}",
                *(f"{100 * mean('goodput'):.1f} %", str(total("hangs"))),
                *(churn[0]["rate"], f"{mean('loss'):.4f}", undisturbed),
                f"{100 * beside:+.1f} %",
                f"{total('bytes') / total('tokens counted'):,.0f}",
                str(total("events: ended")),
            ]
        )
    return grid(titles, lines, words=(0,)) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.churn", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", help="of each link, like 100mbit; as root")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lc3"])
    parser.add_argument("--sync-every", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.1, help="s, that a step takes")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument(
        "--every",
        type=float,
        nargs=2,
        default=(20.0, 60.0),
        metavar=("LEAST", "MOST"),
        help="s between two events",
    )
    parser.add_argument("--away", type=float, default=40, help="s, the longest absence")
    parser.add_argument("--grace-ms", type=int, default=1000)
    parser.add_argument("--alone", action="store_true", help="no undisturbed training")
    parser.add_argument(
        "--beside",
        action="store_true",
        help="only the undisturbed one, of rows in --out",
    )
    parser.add_argument("--out", type=Path, help="CSV, that others' rows may be in")
    parser.add_argument("--docs", type=Path, help="a page with a block for the table")
    parser.add_argument("--table", action="store_true", help="only that of --out")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def campaigns(options: argparse.Namespace, lab: netlab.Lab | None) -> bool:
    """Run what the options ask for, and return whether all figures are good."""
    good = True
    for method, seed in itertools.product(options.methods, options.seeds):
        every = "{:g} to {:g}".format(*options.every)
        named = method, str(seed), f"{options.minutes:g}", every
        old = read_whole(options.out) if options.out and options.out.exists() else []
        rows = []
        if options.beside:
            (churned,) = (
                row for row in old if [row[n] for n in CAMPAIGN] == [*named, "churn"]
            )
        else:
            churned = flat(train(options, lab, method, seed))
            rows.append(dict(zip(CAMPAIGN, (*named, "churn"), strict=True)) | churned)
        if not options.alone:
            beside = flat(train(options, lab, method, seed, churned))
            key = *named, "undisturbed"
            rows.append(dict(zip(CAMPAIGN, key, strict=True)) | beside)
        if options.out:
            write_csv(options.out, together(old, stamped(rows)))
        good = good and not any(row["hangs"] for row in rows)
        good = good and all(row["models alike"] for row in rows)
    return good


def train(
    options: argparse.Namespace,
    lab: netlab.Lab | None,
    method: str,
    seed: int,
    churned: Mapping[str, Any] | None = None,
) -> Row:
    """Train under churn, or undisturbed as much as a training that was ``churned``."""
    given = {
        "sync_every": options.sync_every,
        "pause_s": 0.0 if churned else options.pause,
        "timeout_s": 10.0,
        "quorum_s": 15.0,
        "method": method.removesuffix("_taken"),
        "width": options.width,
    }
    if method.endswith("_taken"):
        given["given"] = {"optimizer_state": "taken"}
    tokens, ranks, batch = 0, AT_FIRST, BATCH
    if churned is not None:
        tokens = int(churned["tokens counted"])
        of_all = tokens / options.sync_every / CONTEXT / int(churned["exchanges"])
        ranks = max(1, round(of_all / BATCH))
        batch = round(of_all / ranks)
    given["batch"] = batch
    folder = Path(tempfile.mkdtemp(prefix="lc3-churn-"))
    one = Campaign(
        *(folder, given, lab, seed, tuple(options.every), options.away),
        grace_ms=options.grace_ms,
        at_first=ranks,
    )
    one.run(options.minutes * 60, churn=churned is None, tokens=tokens)
    report = one.report()
    print(
        method, seed, ranks, "ranks at first", json.dumps(report, indent=1), flush=True
    )
    return report


def main() -> int:
    """Run campaigns, print their figures, and return whether they are good."""
    options = parse()
    if options.table:
        said = table(read_whole(options.out))
        print(said)
        if options.docs:
            page = insert(options.docs.read_text(), "churn", said)
            options.docs.write_text(page)
        return 0
    if options.rate and not options.inside:
        if reason := netlab.missing():
            print(f"tests.churn: {reason}", file=sys.stderr)
            return 2
        apart = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        again = [sys.executable, "-m", "tests.churn", "--inside", *sys.argv[1:]]
        return subprocess.run([*apart, *again], check=False).returncode
    lab = None
    if options.rate:
        lab = netlab.Lab(HOSTS, netlab.rate_bits(options.rate))
    try:
        return int(not campaigns(options, lab))
    finally:
        if lab is not None:
            lab.close()


if __name__ == "__main__":
    sys.exit(main())
