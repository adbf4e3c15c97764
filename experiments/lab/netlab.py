"""N hosts with rate-limited links on one Linux machine, and a torchrun job across them.

    sudo python -m experiments.lab.netlab --hosts 4 --rate 100mbit -- train.py --mine

Each host is a network namespace behind a switch; ``tc tbf`` limits what it sends and
what it receives. Everything lives in namespaces of one process: when that ends, however
it ends, the kernel takes interfaces, processes and limits away. Several labs may run
side by side. What follows ``--`` is started on every host as one node of a torchrun
job; the output of the first is shown.

    sudo python -m experiments.lab.netlab --sites 2 --ranks 2 --rate 10mbit -- train.py

makes two sites of two hosts with one rank each: links inside of a site are as fast as
the machine, and ``tc tbf`` limits the one between each site and the others. With
``--delay 20ms`` a packet is 20 ms on its way over each limited link, so that it is 40
from one host, or site, to another, and an answer takes 80.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.lab.delay import DelayedLink

TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
PORT = 29_500
BURST_S = 0.004  # of the rate, that may pass at once
LATENCY_MS = 50  # that a packet may wait for its turn
START_TIMEOUT_S = 10.0
_SAMPLE_S = 0.05
_PR_SET_PDEATHSIG = 1
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class LabError(Exception):
    """The lab cannot be set up here, and why."""


@dataclass(frozen=True)
class Traffic:
    """What one host's interface counted, headers of TCP, IP and Ethernet included.

    Attributes:
        host: its number.
        sent_bytes: bytes that the host sent.
        received_bytes: bytes that the host received.
    """

    host: int
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True)
class Between:
    """What passed the limited link of a host, or of a site.

    Attributes:
        link: number of the host, or the site.
        sent_bytes: bytes that left it, headers included.
        received_bytes: bytes that came.
        most_in_a_second: bytes sent in the second in which they were most.
    """

    link: int
    sent_bytes: int
    received_bytes: int
    most_in_a_second: int


def missing() -> str | None:
    """Return why there can be no lab on this machine, or ``None``."""
    if sys.platform != "linux":
        return f"a lab needs Linux's network namespaces, this is {sys.platform}"
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"{tool} is not installed; apt-get install {package}"
    if os.geteuid() != 0:
        return "only root may make network namespaces; run it with sudo"
    return None


def rate_bits(text: str) -> int:
    """Return bits per second of a rate as tc writes it: 10mbit, 1gbit.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if found is None or not 1e4 <= float(found[1]) * _UNITS[found[2]] <= 1e11:
        raise ValueError(f"{text!r} is not a rate from 10kbit to 100gbit, like 100mbit")
    return int(float(found[1]) * _UNITS[found[2]])


def delay_seconds(text: str) -> float:
    """Return seconds of a delay as tc writes it: 20ms.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)ms", text)
    if found is None or float(found[1]) > 1000:
        raise ValueError(f"{text!r} is not a delay from 0ms to 1000ms, like 20ms")
    return float(found[1]) / 1000


def burst_bytes(rate: int) -> int:
    """Return how many bytes a link of ``rate`` bits per second lets pass at once."""
    return max(16_384, int(rate / 8 * BURST_S))


class Lab:
    """The hosts. Made inside the namespaces that ``main`` enters first.

    Args:
        hosts: how many, in each site if there are sites.
        rate: bits per second of every host's link, or every site's, in each direction.
        sites: how many; 0: all hosts are on one switch.
        delay_s: that a packet is on its way over such a link.
    """

    def __init__(
        self, hosts: int, rate: int, sites: int = 0, delay_s: float = 0.0
    ) -> None:
        self._delay_s = delay_s
        self._delayed: list[DelayedLink] = []
        self.holders: list[subprocess.Popen[bytes]] = []
        self._samples: list[tuple[float, dict[str, tuple[int, int]]]] = []
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        _run("ip", "link", "set", "lo", "up")
        _add_switch("switch")
        limits = _limits(rate)
        self._links = [f"port{host}" for host in range(hosts)]
        if not sites:
            for host in range(hosts):
                self._add(host, "switch", limits)
        else:
            self._links = [f"down{site}" for site in range(sites)]
        for site in range(sites):
            inside, up, down = f"site{site}", f"up{site}", f"down{site}"
            _add_switch(inside)
            self._link(up, down, delay_s)
            _run("ip", "link", "set", up, "master", inside, "up")
            _run("ip", "link", "set", down, "master", "switch", "up")
            for end in (up, down):
                _run("tc", "qdisc", "add", "dev", end, *limits)
            for host in range(site * hosts, (site + 1) * hosts):
                self._add(host, inside, ())
        self._sampler.start()

    def _add(self, host: int, switch: str, limits: Sequence[str]) -> None:
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self.holders.append(holder)
        mine = Path("/proc/self/ns/net").readlink()
        deadline = time.monotonic() + START_TIMEOUT_S
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == mine:
            if time.monotonic() > deadline or holder.poll() is not None:
                raise LabError(f"host {host} got no network namespace")
            time.sleep(0.01)
        port = f"port{host}"
        end = f"end{host}"
        self._link(port, end, self._delay_s if limits else 0.0)
        _run("ip", "link", "set", end, "netns", str(holder.pid), "name", "eth0")
        _run("ip", "link", "set", port, "master", switch, "up")
        _run(*self.on(host, "ip", "link", "set", "lo", "up"))
        _run(*self.on(host, "ip", "addr", "add", f"{address(host)}/24", "dev", "eth0"))
        _run(*self.on(host, "ip", "link", "set", "eth0", "up"))
        if limits:
            _run(*self.on(host, "tc", "qdisc", "add", "dev", "eth0", *limits))
            _run("tc", "qdisc", "add", "dev", port, *limits)

    def _link(self, one: str, other: str, delay_s: float) -> None:
        """Make two interfaces that are joined."""
        if not delay_s:
            _run("ip", "link", "add", one, "type", "veth", "peer", "name", other)
            return
        try:
            self._delayed.append(DelayedLink((one, other), delay_s))
        except OSError as error:
            raise LabError(
                f"no interface of /dev/net/tun for a delay: {error}"
            ) from error

    def on(self, host: int, *command: str) -> list[str]:
        """Return the command that runs ``command`` on a host."""
        namespace = f"--net=/proc/{self.holders[host].pid}/ns/net"
        return ["nsenter", namespace, *command]

    def traffic(self) -> list[Traffic]:
        """Return what every host's interface has counted so far."""
        result = []
        for host in range(len(self.holders)):
            command = self.on(host, "ip", "-json", "-stats", "link", "show", "eth0")
            said = subprocess.run(command, check=True, capture_output=True).stdout
            stats = json.loads(said)[0]["stats64"]
            counted = stats["tx"]["bytes"], stats["rx"]["bytes"]
            result.append(Traffic(host, *counted))
        return result

    def _sample(self) -> None:
        """Note what links have counted, until the lab is closed."""
        while not self._ended.wait(_SAMPLE_S):
            self._samples.append((time.monotonic(), _counted()))

    def between(self) -> list[Between]:
        """Return what has passed every limited link so far."""
        samples = [*self._samples, (time.monotonic(), _counted())]
        found = []
        for number, link in enumerate(self._links):  # what comes in here was sent there
            sent = [(at, counted[link][0]) for at, counted in samples]
            received = samples[-1][1][link][1]
            found.append(Between(number, sent[-1][1], received, _most_in(sent, 1.0)))
        return found

    def torchrun(self, arguments: Sequence[str], ranks: int) -> int:
        """Run a torchrun job, one node a host; return the first bad exit status."""
        start = [sys.executable, "-m", "torch.distributed.run"]
        start += ["--nnodes", str(len(self.holders)), "--nproc-per-node", str(ranks)]
        start += ["--master-addr", address(0), "--master-port", str(PORT)]
        return self._run(
            [
                [*start, "--node-rank", str(host), *arguments]
                for host in range(len(self.holders))
            ]
        )

    def each(self, command: Sequence[str]) -> int:
        """Run a command on every host; return the first bad exit status."""
        return self._run([list(command)] * len(self.holders))

    def _run(self, commands: Sequence[Sequence[str]]) -> int:
        """Run each host's command, with what launch/torchrun_nodes.sh wants to know."""
        known = {"HEAD": address(0), "NODES": str(len(commands)), "INTERFACE": "eth0"}
        nodes = [
            subprocess.Popen(
                self.on(host, *command),
                env={
                    **os.environ,
                    **known,
                    "HOST": str(host),
                    "GLOO_SOCKET_IFNAME": "eth0",
                },
                stdout=None if host == 0 else subprocess.DEVNULL,
            )
            for host, command in enumerate(commands)
        ]
        statuses = [node.wait() for node in nodes]
        return next((status for status in statuses if status), 0)

    def close(self) -> None:
        """End the hosts; their interfaces go with them."""
        self._ended.set()
        self._sampler.join()
        for holder in self.holders:
            holder.kill()
            holder.wait()
        for link in self._delayed:
            link.close()


def _add_switch(name: str) -> None:
    _run("ip", "link", "add", name, "type", "bridge")
    _run("ip", "link", "set", name, "up")


def _limits(rate: int) -> list[str]:
    """Return what tc is told of a link of so many bits per second."""
    burst = str(burst_bytes(rate))
    limit = ["root", "tbf", "rate", f"{rate}bit", "burst", burst]
    return [*limit, "latency", f"{LATENCY_MS}ms"]


def _counted() -> dict[str, tuple[int, int]]:
    """Return bytes received and sent by each interface here, by name."""
    found = {}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        columns = numbers.split()
        found[name.strip()] = int(columns[0]), int(columns[8])
    return found


def _most_in(counts: Sequence[tuple[float, int]], seconds: float) -> int:
    """Return the most that a count has grown within so many seconds."""
    most = first = 0
    for at, count in counts:
        while at - counts[first][0] > seconds:
            first += 1
        most = max(most, count - counts[first][1])
    return most


def address(host: int) -> str:
    """Return a host's address, known only inside the lab."""
    return f"10.77.0.{host + 1}"


def _inside_namespaces(arguments: Sequence[str]) -> int:
    """Run this program again in namespaces that end with it, and it with us."""
    apart = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    again = [sys.executable, "-m", "experiments.lab.netlab", "--inside", *arguments]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen([*apart, *again], preexec_fn=_end_with_parent)
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked command line; a bad one ends the program with its reason."""
    parser = argparse.ArgumentParser(prog="experiments.lab.netlab", description=__doc__)
    parser.add_argument("--hosts", type=int, default=2, help="2 to 64")
    parser.add_argument("--ranks", type=int, default=1, help="per host, or per site")
    parser.add_argument("--sites", type=int, default=0, help="instead of hosts, 2 to 8")
    parser.add_argument("--rate", default="100mbit", help="of each link, both ways")
    parser.add_argument("--delay", default="0ms", help="of each link, one way")
    parser.add_argument(
        "--each",
        action="store_true",
        help="run the job as a command on every host; HOST, HEAD and NODES are set",
    )
    parser.add_argument("--report", type=Path, help="JSON file for the traffic")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("job", nargs=argparse.REMAINDER, metavar="-- SCRIPT …")
    options = parser.parse_args(arguments)
    options.job = options.job[1:] if options.job[:1] == ["--"] else options.job
    if not options.job:
        parser.error("there is no job; end with: -- train.py, or -- -m a.module")
    if not 2 <= options.hosts <= 64 or options.ranks < 1:
        parser.error(f"--hosts {options.hosts} must be 2 to 64, --ranks 1 or more")
    if options.sites and not (2 <= options.sites <= 8 and options.ranks <= 8):
        parser.error(f"--sites {options.sites} must be 2 to 8, --ranks at most 8")
    try:
        options.rate = rate_bits(options.rate)
        options.delay = delay_seconds(options.delay)
    except ValueError as error:
        parser.error(str(error))
    if reason := missing():
        parser.error(reason)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a lab in namespaces of its own, run the job there, say what it sent."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    if not options.inside:
        return _inside_namespaces(given)
    try:
        hosts = options.ranks if options.sites else options.hosts
        lab = Lab(hosts, options.rate, options.sites, options.delay)
        start = time.perf_counter()
        if options.each:
            status = lab.each(options.job)
        else:
            status = lab.torchrun(options.job, 1 if options.sites else options.ranks)
        seconds = time.perf_counter() - start
        traffic = lab.traffic()
        between = lab.between()
    except LabError as error:
        print(f"experiments.lab.netlab: {error}", file=sys.stderr)
        return 1
    for host in traffic:
        print(
            f"host {host.host}: {host.sent_bytes:,} bytes sent, "
            f"{host.received_bytes:,} received, in {seconds:.1f} s",
            file=sys.stderr,
        )
    for one in between if options.sites else ():
        print(
            f"site {one.link}: {one.sent_bytes:,} bytes sent to others, "
            f"{one.received_bytes:,} received, {one.most_in_a_second:,} at most sent "
            "in a second",
            file=sys.stderr,
        )
    if options.report:
        report = {
            "seconds": seconds,
            "hosts": [asdict(host) for host in traffic],
            "between": [asdict(one) for one in between],
        }
        options.report.write_text(json.dumps(report))
    lab.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
