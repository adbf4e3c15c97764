"""One replica of a training on machines that come and go, and a lighthouse for it.

    python -m tests.torchft_cases '{"name": "r0", "lighthouse": "http://…", …}'

Trains a small transformer on this repository's own text and writes a line of JSON for
each exchange. ``tests/test_torchft.py`` and ``tests/churn.py`` start and end them.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.harness.models import Transformer
from experiments.harness.train import loss_of

ROOT = Path(__file__).parents[1]
BATCH, CONTEXT = 8, 32


@dataclass(frozen=True)
class Replica:
    """What one replica does.

    Attributes:
        name: unique; ranks are in the order of names.
        lighthouse: URL of the lighthouse.
        folder: where its lines go, ``NAME.jsonl``, and where the file ``stop`` ends it.
        number: of the replica, for its own data.
        steps: after which it ends; 0: when there is a ``stop``.
        sync_every: steps between two exchanges.
        pause_s: that each step takes longer.
        seed: of the data and the model; replicas have other models before they join.
        timeout_s: of an exchange.
        quorum_s: of a quorum.
        least: replicas that an exchange needs.
        method: "lc3", "local_sgd" or "diloco", the last two torchft's own.
        given: arguments of ``attach``.
        fault: what goes wrong in it, see ``Faults``.
        host: address under which the others reach it.
        width: of the transformer.
        batch: windows of a step.
        lr: of AdamW, at first: it falls as ``tell_done`` says.
        tokens: what ``tokens_of`` steps is reckoned from; 0: nothing is said.
        mass: whether to write, at each exchange, where the mass is: see ``Mass``.
    """

    name: str
    lighthouse: str
    folder: str
    number: int = 0
    steps: int = 0
    sync_every: int = 4
    pause_s: float = 0.0
    seed: int = 0
    timeout_s: float = 8.0
    quorum_s: float = 20.0
    least: int = 1
    method: str = "lc3"
    given: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    host: str = "127.0.0.1"
    width: int = 32
    batch: int = BATCH
    lr: float = 4e-3
    tokens: int = 0
    mass: bool = False


def text() -> Tensor:
    """Return this repository's sources as codes, int64[*]."""
    paths = sorted([*ROOT.glob("lc3/**/*.py"), *ROOT.glob("docs/**/*.md")])
    whole = "".join(path.read_text(encoding="utf-8") for path in paths)
    return torch.tensor([min(ord(c), 127) for c in whole])


def batches(codes: Tensor, replica: Replica) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a replica's own windows of the first nine tenths, for ever."""
    generator = torch.Generator().manual_seed(1000 * replica.seed + replica.number)
    last = len(codes) * 9 // 10 - CONTEXT - 1
    while True:
        starts = torch.randint(last, (replica.batch,), generator=generator).tolist()
        yield (
            torch.stack([codes[s : s + CONTEXT] for s in starts]),
            torch.stack([codes[s + 1 : s + CONTEXT + 1] for s in starts]),
        )


def tell_done(folder: Path, share: float) -> None:
    """Tell replicas what share of the training is done."""
    new = folder / "done.new"
    new.write_text(f"{share}")
    new.replace(folder / "done")


def let_fall(optimizer: torch.optim.Optimizer, replica: Replica) -> None:
    """Set the learning rate for what is done of the training, if that is told."""
    told = Path(replica.folder) / "done"
    if told.exists():
        left = max(0.0, 1 - float(told.read_text()))
        optimizer.param_groups[0]["lr"] = replica.lr * left


def tokens_of(tokens: int, step: int) -> int:
    """Return what a step weighs, so that ranks differ, from one to the next too."""
    return tokens * step % 11 + 1 if tokens else 0


def test_loss(model: nn.Module, codes: Tensor) -> float:
    """Return the mean loss on the last tenth."""
    part = codes[len(codes) * 9 // 10 :]
    count = (len(part) - 1) // CONTEXT
    inputs = part[: count * CONTEXT].view(count, CONTEXT)
    labels = part[1 : count * CONTEXT + 1].view(count, CONTEXT)
    with torch.no_grad():
        return float(loss_of(model(inputs), labels))


def make_model(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return Transformer(128, CONTEXT, width=width, depth=2, heads=4)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))


def make_manager(replica: Replica) -> Any:
    import torchft

    store = dist.TCPStore(replica.host, 0, is_master=True, wait_for_workers=False)
    return torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=replica.timeout_s)),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=replica.least,
        use_async_quorum=False,
        timeout=timedelta(seconds=replica.timeout_s),
        quorum_timeout=timedelta(seconds=replica.quorum_s),
        connect_timeout=timedelta(seconds=replica.quorum_s),
        rank=0,
        world_size=1,
        store_addr=replica.host,
        store_port=store.port,
        lighthouse_addr=replica.lighthouse,
        replica_id=replica.name,
        hostname=replica.host,
    ), store


def optimizer_hash(optimizer: torch.optim.Optimizer) -> str:
    """Return a hash of all that an optimizer keeps; "" of nothing."""
    states = optimizer.state_dict()["state"]
    return hash_of({f"{i} {k}": v for i, s in states.items() for k, v in s.items()})


def hash_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Mass:
    """Follows how far a rank has walked, and how far it has brought the others.

    As numbers: the products of moves with random vectors, in float64.
    """

    def __init__(self, state: Any, model: nn.Module) -> None:
        self._state, self._model = state, model
        generator = torch.Generator().manual_seed(7)
        self._vectors = {
            name: torch.randn(3, p.numel(), generator=generator, dtype=torch.float64)
            for name, p in model.named_parameters()
        }
        self.walked = torch.zeros(3, dtype=torch.float64)

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        return sum(  # type: ignore[return-value]  # there are some
            self._vectors[name] @ tensor.detach().reshape(-1).double()
            for name, tensor in tensors.items()
        )

    def held(self) -> Tensor:
        return self.of(dict(self._model.named_parameters()))

    def owed(self) -> Tensor:
        """Return what this rank has moved and not sent, if it is sure of that."""
        residuals = self._state._residuals.sent
        since = self._state._from or self._state.owners.replica
        return self.of(since) - self.held() + self.of(residuals)


class Line:
    """Writes lines of JSON, each whole."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, **said: object) -> None:
        said["time"] = time.monotonic()
        self._file.write(json.dumps(said) + "\n")
        self._file.flush()


def main() -> None:
    """Train as the first argument says."""
    replica = Replica(**json.loads(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(1)
    line = Line(Path(replica.folder) / f"{replica.name}.jsonl")
    line.write(event="start", pid=os.getpid())
    try:
        (train if replica.method == "lc3" else train_as_torchft_does)(replica, line)
    except BaseException as error:
        line.write(event="end", error=f"{type(error).__name__}: {error}")
        raise


def train(replica: Replica, line: Line) -> None:
    from lc3.hooks import torchft as hook

    codes = text()
    model = make_model(replica.seed + 100 * replica.number, replica.width)
    optimizer = make_optimizer(model, replica.lr)
    manager, _store = make_manager(replica)
    began = time.monotonic()
    by_steps = "sync_every_s" not in replica.given
    state = hook.attach(
        *(model, optimizer, manager),
        **{
            **({"sync_every": replica.sync_every} if by_steps else {}),
            "hostname": replica.host,
            "bind": replica.host,
            **replica.given,
        },
    )
    mass = Mass(state, model) if replica.mass else None
    line.write(
        event="joined",
        model=None if mass is None else mass.of(state.owners.replica).tolist(),
        seconds=time.monotonic() - began,
        exchanges=state.exchanges,
        hash=hash_of(state.owners.replica),
        optimizer=optimizer_hash(optimizer),
        world=state.world,
    )
    faults(replica, state)
    stop = Path(replica.folder) / "stop"
    trained = counted = 0
    since = 0
    for step, (inputs, labels) in enumerate(batches(codes, replica), start=1):
        before = state.exchanges, state.failed
        if mass is not None:
            held = mass.held()
            state.tokens = 1  # all weigh the same
        let_fall(optimizer, replica)
        optimizer.zero_grad()
        loss = loss_of(model(inputs), labels)
        loss.backward()
        if replica.pause_s:
            time.sleep(replica.pause_s)
        if replica.fault == f"nan at {step}":
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(torch.nan)
        if replica.fault == f"killed at {step}":
            os.kill(os.getpid(), signal.SIGKILL)
        trained += inputs.numel()
        since += inputs.numel()
        started = time.monotonic()
        state.tokens += tokens_of(replica.tokens, step)
        optimizer.step()
        walked: dict[str, Any] = {}
        if mass is not None:
            mass.walked += held - mass.held()
            if step % replica.sync_every == 0:
                state.exchange(weight=1)
            walked = {
                "walked": mass.walked.tolist(),
                "owed": mass.owed().tolist(),
                "model": mass.of(state.owners.replica).tolist(),
                "unsure": bool(state._open),
            }
        if (state.exchanges, state.failed) != before:
            if state.committed:
                counted += since
                since = 0
            line.write(
                event="exchange",
                step=step,
                exchanges=state.exchanges,
                entry=state._history[-1] if state._history else 0,
                committed=state.committed,
                failed=state.failed,
                world=state.world,
                ranks=state.counted,
                hash=hash_of(state.owners.replica),
                optimizer=optimizer_hash(optimizer),
                loss=float(loss),
                trained=trained,
                counted=counted,
                seconds=time.monotonic() - started,
                sent=state.meter.sent_bytes,
                **walked,
            )
        if step == replica.steps or (not replica.steps and stop.exists()):
            break
    with state.shared_model():
        loss_of_all = test_loss(model, codes)
    line.write(
        event="end",
        error="",
        loss=loss_of_all,
        hash=hash_of(dict(model.named_parameters())),
        steps=state.steps,
        left_out=state.left_out,
        trained=trained,
        counted=counted,
    )
    state.close()
    manager.shutdown(wait=False)
    line._file.close()
    os._exit(0)  # nothing of torchft's servers has to be waited for


def train_as_torchft_does(replica: Replica, line: Line) -> None:
    """Train by torchft's own ``LocalSGD`` or ``DiLoCo``, with its defaults."""
    from torchft.local_sgd import DiLoCo, LocalSGD

    codes = text()
    model = make_model(replica.seed, replica.width)
    optimizer = make_optimizer(model, replica.lr)
    manager, _store = make_manager(replica)
    healed: list[int] = []

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        healed.append(1)

    manager.register_state_dict_fn(
        *("training", load),
        lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
    )
    if replica.method == "diloco":
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        given = manager, [model], optimizer, outer, replica.sync_every
        method: Any = DiLoCo(*given)
    else:
        method = LocalSGD(manager, model, optimizer, replica.sync_every)
    line.write(event="joined", seconds=0.0)
    stop = Path(replica.folder) / "stop"
    trained = counted = since = failed = 0
    with method:
        for step, (inputs, labels) in enumerate(batches(codes, replica), start=1):
            let_fall(optimizer, replica)
            optimizer.zero_grad()
            loss = loss_of(model(inputs), labels)
            loss.backward()
            time.sleep(replica.pause_s)
            trained += inputs.numel()
            since += inputs.numel()
            before, started = manager.current_step(), time.monotonic()
            optimizer.step()
            if step % replica.sync_every == 0:
                committed = manager.current_step() != before
                if healed or (not committed and replica.method == "diloco"):
                    since = 0  # what it had moved is overwritten
                    healed.clear()
                failed += not committed
                counted, since = counted + committed * since, since * (not committed)
                line.write(
                    event="exchange",
                    step=step,
                    exchanges=manager.current_step(),
                    entry=0,
                    committed=committed,
                    failed=failed,
                    world=manager.num_participants(),
                    hash=hash_of(dict(model.named_parameters())),
                    loss=float(loss),
                    trained=trained,
                    counted=counted,
                    seconds=time.monotonic() - started,
                )
            if step == replica.steps:
                break
            if not replica.steps and step % replica.sync_every == 0 and stop.exists():
                break  # with the model that all share
    line.write(event="end", error="", loss=test_loss(model, codes), trained=trained)
    os._exit(0)


def faults(replica: Replica, state: Any) -> None:
    """Let something go wrong in this replica."""
    if replica.fault.startswith("unsure of "):  # whether that exchange counts
        number = int(replica.fault.split()[-1])
        commit = state._membership.commit
        times: list[int] = []

        def unsure(error: Exception | None) -> bool:
            said: bool = commit(error)
            times.append(1)
            return said and len(times) != number

        state._membership.commit = unsure
    if replica.fault == "damaged":  # whatever it sends of its moves, from now on
        go_over_to = state.session.go_over_to

        def damaged(*given: Any) -> None:
            go_over_to(*given)
            damage()

        def damage() -> None:
            messages = state.session.engine.messages
            make = messages.make

            def make_damaged(*args: Any, **named: Any) -> list[Tensor]:
                made: list[Tensor] = make(*args, **named)
                for message in made:
                    message[-1] ^= 1
                return made

            messages.make = make_damaged

        state.session.go_over_to = damaged
        damage()


@contextmanager
def lighthouse(
    port: int = 0, join_ms: int = 500, heartbeat_ms: int = 1500, least: int = 1
) -> Iterator[Any]:
    """Lend a lighthouse in a process of its own; it has ``url`` and ``kill``."""
    from tests import forked

    here, there = forked.context().Pipe()
    process = forked.context().Process(
        target=_shine, args=(there, port, join_ms, heartbeat_ms, least), daemon=True
    )
    process.start()
    there.close()
    if not here.poll(60):
        raise TimeoutError("the lighthouse has not begun")
    found = here.recv()
    try:
        yield Lighthouse(process, found)
    finally:
        process.kill()
        process.join()


@dataclass
class Lighthouse:
    process: Any
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _shine(pipe: Any, port: int, join_ms: int, heartbeat_ms: int, least: int) -> None:
    from torchft.coordination import LighthouseServer

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a line for each request

    server = LighthouseServer(
        bind=f"127.0.0.1:{port}",
        min_replicas=least,
        join_timeout_ms=join_ms,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=heartbeat_ms,
    )
    pipe.send(int(server.address().rpartition(":")[2]))
    signal.pause()


def local_sgd_alone(
    rank: int,
    world: int,
    steps: int,
    sync_every: int,
    tokens: Sequence[int] = (),
    skipped: int = 0,
) -> list[str]:
    """Return the hash of the replica after each exchange of ``hooks.local_sgd``.

    Args:
        rank: of this one.
        world: how many there are.
        steps: of each.
        sync_every: steps between two exchanges.
        tokens: see ``Replica``, of each rank; none: nothing is said.
        skipped: number of an exchange, from 1, that there is none of.
    """
    import lc3
    from lc3.hooks import local_sgd

    replica = Replica("", "", "", number=rank)
    codes = text()
    model = make_model(replica.seed + 100 * rank, replica.width)
    optimizer = make_optimizer(model, replica.lr)
    direct = lc3.Config(density=0.12, tuning=lc3.Tuning(topology="direct"))
    found = []
    since = 0
    with local_sgd.attach(model, optimizer, direct, sync_every="manual") as state:
        data = batches(codes, replica)
        for step in range(1, steps + 1):
            inputs, labels = next(data)
            optimizer.zero_grad()
            loss_of(model(inputs), labels).backward()
            optimizer.step()
            since += tokens_of(tokens[rank], step) if tokens else 0
            if step % sync_every == 0 and step != skipped * sync_every:
                state.exchange(weight=since if tokens else None)
                since = 0
                found.append(hash_of(state.owners.replica))
    return found


if __name__ == "__main__":
    main()
