"""Joins the process group of whatever has started this process.

torchrun says who is who by its variables; horovodrun, mpirun and srun have others for
the same. Gloo needs to know the interface where there are several.
"""

import fcntl
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

TIMEOUT = timedelta(minutes=5)
CONNECT_TIMEOUT_S = 120.0
DEFAULT_PORT = "29500"
_SIOCGIFADDR = 0x8915
# Variables of (rank, world size, local rank), by launcher.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK"),
    "mpirun": (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


class LaunchError(Exception):
    """A process that cannot join the others, and why."""


def init(backend: str = "gloo") -> str:
    """Join the process group; return the launcher's name.

    Raises:
        LaunchError: no launcher has started this process, it does not say where rank 0
            is, or there are several interfaces and none was chosen.
    """
    if dist.is_initialized():
        return "ray"  # or another that joins by itself
    launcher = next(
        (name for name, known in LAUNCHERS.items() if known[0] in os.environ), None
    )
    if launcher is None:
        raise LaunchError(
            "no launcher has started this process: none of "
            f"{', '.join(known[0] for known in LAUNCHERS.values())} is set; use one of "
            "the files in launch/, for example launch/torchrun.sh"
        )
    for ours, theirs in zip(LAUNCHERS["torchrun"], LAUNCHERS[launcher], strict=True):
        os.environ[ours] = os.environ[theirs]
    if "MASTER_ADDR" not in os.environ:
        local = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get(
            "HOROVOD_LOCAL_SIZE"
        )
        if local != os.environ["WORLD_SIZE"]:
            raise LaunchError(
                f"{launcher} has not said where rank 0 is; set MASTER_ADDR to the "
                "first machine's address on every rank"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", DEFAULT_PORT)
    check_interface(os.environ["MASTER_ADDR"])
    with connecting():
        dist.init_process_group(backend, timeout=TIMEOUT)
    return launcher


@contextmanager
def connecting(timeout_s: float = CONNECT_TIMEOUT_S) -> Iterator[None]:
    """End this process, for its launcher to start it anew, if ranks do not connect.

    Around what makes process groups. Gloo's listening side waits without any timeout
    when the other rank dies at the wrong moment (pytorch/gloo#520); nothing in Python
    can interrupt it.
    """

    def give_up() -> None:
        print(
            f"the ranks did not connect within {timeout_s:g} s; one has died, or "
            "cannot reach another's address. This one ends",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_interface(master: str) -> None:
    """Raise ``LaunchError`` if gloo would have to guess its interface."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        chosen = os.environ["GLOO_SOCKET_IFNAME"]
        known = [name for _, name in socket.if_nameindex()]
        for name in chosen.split(","):
            if name not in known:
                raise LaunchError(
                    f"GLOO_SOCKET_IFNAME={chosen}: there is no interface {name!r} "
                    f"here, only {', '.join(known)}"
                )
        return
    if master in ("localhost", socket.gethostname()) or master.startswith("127."):
        return
    if len(found := interfaces()) > 1:
        raise LaunchError(
            "this machine has several interfaces with addresses "
            f"({', '.join(f'{name} {address}' for name, address in found.items())}); "
            "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the one that reaches "
            f"{master}"
        )


def interfaces() -> dict[str, str]:
    """Return the IPv4 addresses of interfaces that are up, loopback left out."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            state = Path(f"/sys/class/net/{name}/operstate")
            if name == "lo" or (state.exists() and state.read_text().strip() == "down"):
                continue
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
            except OSError:  # no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
