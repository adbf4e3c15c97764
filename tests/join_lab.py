"""How long a joining rank loads a model over a thin link, beside plain float32.

    python -m experiments.lab.netlab --hosts 2 --rate 10mbit --each -- \
        python -m tests.join_lab 10000000 join.json

The first host serves the weights of a transformer of about so many elements; the second
fetches them as lc3 codes them, and as they are.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from experiments.harness.models import Transformer
from lc3.local.seed import Seed, fetch, warm_up

PORT, KEY, TIMEOUT_S = 29_512, 7, 120.0


def weights(elements: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    width = 64 * max(1, round((elements / (12 * 4)) ** 0.5 / 64))
    model = Transformer(256, 256, width=width, depth=4, heads=4)
    return {name: p.detach() for name, p in model.named_parameters()}


def serve(held: dict[str, Tensor]) -> None:
    seed = Seed(os.environ["HEAD"], "", TIMEOUT_S, {})
    seed.offer(KEY, {}, held)
    data = torch.cat([tensor.reshape(-1) for tensor in held.values()]).numpy().tobytes()
    with socket.create_server(("", PORT)) as listening:
        for _ in range(2):
            with listening.accept()[0] as connection:
                asked = connection.recv(1)
                connection.sendall(data if asked == b"f" else seed.address.encode())
        listening.settimeout(TIMEOUT_S)
        listening.accept()[0].close()  # the other has fetched
    seed.close()


def connect() -> socket.socket:
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return socket.create_connection((os.environ["HEAD"], PORT), TIMEOUT_S)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def read(asking: bytes) -> int:
    with connect() as connection:
        connection.sendall(asking)
        return sum(map(len, iter(lambda: connection.recv(1 << 20), b"")))


def load(held: dict[str, Tensor], out: Path) -> None:
    with connect() as connection:
        connection.sendall(b"a")
        address = connection.recv(100).decode()
    warm_up()
    start = time.monotonic()
    _, tensors = fetch(address, KEY, TIMEOUT_S)
    coded = time.monotonic() - start
    assert all(torch.equal(tensors[name], tensor) for name, tensor in held.items())
    start = time.monotonic()
    read(b"f")
    plain = time.monotonic() - start
    connect().close()
    elements = sum(tensor.numel() for tensor in held.values())
    said = {"elements": elements, "coded s": coded, "float32 s": plain}
    out.write_text(json.dumps({**said, "share": coded / plain}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = weights(int(sys.argv[1]))
    if os.environ["HOST"] == "0":
        serve(own)
    else:
        load(own, Path(sys.argv[2]))
