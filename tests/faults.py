"""Bad numbers in training: every fault under every form. ``make faults``.

A cell is a form of lc3, an optimizer that is not told of anything, and a fault: a NaN
in one gradient, an overflowing sum, a rank without gradients. It ends well if the ranks
are alike and learn on; if every rank says so by an error; or if plain DDP does not
survive it either, and lc3 learns on after the user has loaded the weights and the
optimizer of before. Nothing may stall, nor poison what comes later. 3LC's frames and
sums are up to W s² times the mean: where that is beyond float32, lc3 may overflow and
plain DDP not; then, too, it learns on from the weights of before.
"""

import argparse
import collections
import copy
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lc3 import Lc3Error
from lc3.config import Settings
from lc3.format import FLOAT32_MAX
from lc3.hooks import ddp, fsdp2, local_sgd, push_pull
from tests.ranks import Ranks

WORLD = 3
AT, STEPS = 16, 60  # when the fault comes, and how long training goes on
LEARNT = 0.75  # of the loss at the start, at most, where training has gone on
BAD_RANK = 1
SMALL = {"min_numel": 64, "min_shard": 500, "threads": 1}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.2),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=5e-3),
    "nadam": partial(torch.optim.NAdam, lr=5e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=3e-3),
    "adagrad": partial(torch.optim.Adagrad, lr=3e-2),
}


class Fault(NamedTuple):
    """What one or all ranks find in the gradient of a weight.

    Attributes:
        value: put there; on odd ranks its negative where ``signs``.
        whole: in all of the tensor, not in one value.
        ranks: "one", "all", or "in turn".
        steps: so many from ``first`` on.
        place: "gradient", "parameter" (after the step) or "input".
    """

    value: float
    whole: bool = False
    ranks: str = "one"
    steps: int = 1
    first: int = AT
    signs: bool = False
    place: str = "gradient"

    def here(self, rank: int, step: int) -> bool:
        """Return whether this rank has it at this step."""
        if not self.first <= step < self.first + self.steps:
            return False
        return (
            self.ranks == "all"
            or rank == (step % WORLD if self.ranks == "in turn" else BAD_RANK)
        )  # fmt: skip

    def into(self, values: Tensor, rank: int) -> Tensor:
        """Return ``values`` with the fault in them."""
        value = -self.value if self.signs and rank % 2 else self.value
        found = values.clone()
        if self.whole:
            return found.fill_(value)
        found.view(-1)[values.numel() // 2] = value
        return found


NAN, INF = float("nan"), float("inf")
FAULTS = {
    "nan": Fault(NAN),
    "inf": Fault(INF),
    "-inf": Fault(-INF),
    "nan, a tensor": Fault(NAN, whole=True),
    "inf, a tensor": Fault(INF, whole=True),
    "-inf, a tensor": Fault(-INF, whole=True),
    "nan, all ranks": Fault(NAN, ranks="all"),
    "inf, all ranks": Fault(INF, ranks="all"),
    "inf and -inf": Fault(INF, ranks="all", signs=True),
    "nan, three steps": Fault(NAN, steps=3),
    "nan, ranks in turn": Fault(NAN, ranks="in turn", steps=6),
    "nan, first step": Fault(NAN, first=0),
    "1e38": Fault(1e38),
    "1e38, a tensor": Fault(1e38, whole=True),
    "3e38, all ranks": Fault(3e38, ranks="all"),
    "3e38 and -3e38": Fault(3e38, whole=True, ranks="all", signs=True),
    "denormal, all ranks": Fault(1e-45, whole=True, ranks="all", steps=3),
    "zeros": Fault(0.0, whole=True, steps=5),
    "zeros, all ranks": Fault(0.0, whole=True, ranks="all", steps=5),
    "nan parameter": Fault(NAN, place="parameter"),
    "nan input": Fault(NAN, place="input"),
}
NONE = Fault(0.0, steps=0)


class Form(NamedTuple):
    """How training is attached, with what optimizer."""

    hook: str
    optimizer: str
    config: dict[str, Any]
    options: dict[str, Any]


def _forms() -> dict[str, Form]:
    table: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
        ("ddp", "ddp", " ".join(OPTIMIZERS), {}, {}),
        ("ddp, optimizer unknown", "blind", "sgd momentum adamw", {}, {}),
        ("ddp, direct", "ddp", "momentum adamw", {"topology": "direct"}, {}),
        ("ddp, s = 1.75", "ddp", "momentum", {"sparsity": 1.75}, {}),
        ("ddp, auto", "ddp", "momentum", {"mode": "auto"}, {}),
        ("push_pull", "push_pull", "sgd momentum adamw rmsprop adagrad", {}, {}),
        ("push_pull, clipped", "push_pull", "momentum adamw", {}, {"max_norm": 1.0}),
        ("fsdp2", "fsdp2", "sgd momentum adamw", {}, {}),
        ("local_sgd", "local_sgd", " ".join(OPTIMIZERS), {"density": 0.1}, {}),
        ("local_sgd, outer momentum", "local_sgd", "nadam adamw", {"density": 0.1},
         {"outer_momentum": 0.5}),
        ("local_sgd, delayed", "local_sgd", "momentum adamw", {"density": 0.1},
         {"overlap": 1}),
        ("local_sgd, each step", "local_sgd", "adamw", {"density": 0.1},
         {"sync_every": 1}),
        ("local_sgd, 3LC", "local_sgd", "momentum adamw", {}, {}),
        ("local_sgd, direct", "local_sgd", "adamw",
         {"density": 0.1, "topology": "direct"}, {}),
    ]  # fmt: skip
    return {
        f"{name}, {optimizer}": Form(hook, optimizer, {**SMALL, **config}, options)
        for name, hook, optimizers, config, options in table
        for optimizer in optimizers.split()
    }


FORMS = _forms()


class _Spoil(torch.autograd.Function):
    """The identity, whose gradient ``spoil`` may change."""

    @staticmethod
    def forward(context: Any, x: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        context.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
        return context.spoil(grad), None


class Net(nn.Module):
    """A perceptron with a BatchNorm; ``spoil`` gets the first weight's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 48)
        self.norm = nn.BatchNorm1d(48)
        self.outer = nn.Linear(48, 8)
        self.spoil: Callable[[Tensor], Tensor] = lambda grad: grad

    def forward(self, x: Tensor) -> Tensor:
        weight = _Spoil.apply(self.inner.weight, self.spoil)  # type: ignore[no-untyped-call]
        x = nn.functional.linear(x, weight, self.inner.bias)
        return torch.as_tensor(self.outer(self.norm(x).tanh()))


def batch(seed: int, count: int = 16) -> tuple[Tensor, Tensor]:
    """Return inputs and what a fixed network says to them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 24, generator=generator)
    teacher = torch.randn(24, 8, generator=torch.Generator().manual_seed(10**6))
    return x, (x @ teacher / 3).tanh()


class Training:
    """One training under a form, or under plain DDP."""

    def __init__(self, form: Form, rank: int, plain: bool) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.rank = rank
        self.state: Any = None
        make = OPTIMIZERS[form.optimizer]
        config = Settings(**form.config)
        self.model: nn.Module = self.net
        if form.hook == "fsdp2" and not plain:
            sizes = ("between", "inside")
            mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=sizes)
            fully_shard(self.net, mesh=mesh["inside"])
            self.optimizer = make(self.net.parameters())
            self.state = fsdp2.attach(self.net, mesh, config)
        elif form.hook == "local_sgd" and not plain:
            self.optimizer = make(self.net.parameters())
            options = {"sync_every": 4, **form.options}
            self.state = local_sgd.attach(self.net, self.optimizer, config, **options)
        else:
            self.model = DistributedDataParallel(self.net)
            if form.hook == "push_pull" and not plain:
                self.state = self.optimizer = push_pull.attach(
                    self.model, make, config, **form.options
                )
                return
            self.optimizer = make(self.net.parameters())
            if not plain:
                told = self.optimizer if form.hook == "ddp" else None
                self.state = ddp.attach(self.model, told, config)

    def train(self, steps: range, fault: Fault) -> None:
        for step in steps:
            here = fault.here(self.rank, step)
            x, y = batch(WORLD * step + self.rank)
            if here and fault.place == "input":
                x = fault.into(x, self.rank)
            spoils = here and fault.place == "gradient"
            spoil = partial(fault.into, rank=self.rank)
            self.net.spoil = spoil if spoils else lambda grad: grad
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
            if here and fault.place == "parameter":
                with torch.no_grad():
                    self.net.inner.weight.view(-1)[5] = fault.value

    def loss(self) -> float:
        """Return the loss of the model that ranks share, on inputs not seen."""
        x, y = batch(2 * 10**6, 256)
        self.net.eval()
        with torch.no_grad():
            loss = float(nn.functional.mse_loss(self.net(x), y))
        self.net.train()
        return loss

    def weights(self) -> Tensor:
        """Return all parameters in a row, float32."""
        found = [p.detach() for p in self.net.parameters()]
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in found]
        return torch.cat([p.reshape(-1) for p in whole]).clone()

    def snapshot(self) -> Any:
        held = self.optimizer.state_dict()
        return copy.deepcopy((self.net.state_dict(), held))

    def restore(self, taken: Any) -> None:
        """Load what was taken, as a user does whose training has gone wrong."""
        net, optimizer = copy.deepcopy(taken)
        self.net.load_state_dict(net)
        self.optimizer.load_state_dict(optimizer)

    def close(self) -> None:
        if self.state is not None:
            self.state.close()


def hash_of_bits(values: Tensor) -> int:
    """Return a digest, alike for any NaN."""
    return zlib.crc32(values.nan_to_num(nan=7e7).numpy().tobytes())


def judge(run: Training, start: float, steps: range, fault: Fault) -> str:
    """Train, and return "well" or what is wrong; alike on every rank."""
    said, then = "", run.loss()
    try:
        run.train(steps[:-8], fault)
        before = run.weights()
        run.train(steps[-8:], fault)
        if getattr(run.state, "sync", None):
            run.state.sync()
    except Lc3Error as error:
        said = f"{type(error).__name__}: {error}"
    everybody: list[Any] = [None] * WORLD
    dist.all_gather_object(everybody, said)
    if all(everybody):
        return f"told: {everybody[0]}"
    if any(everybody):
        return f"told to some ranks: {everybody}"
    weights = run.weights()
    found: list[Any] = [None] * WORLD
    dist.all_gather_object(found, (hash_of_bits(weights), run.loss()))
    loss = found[0][1]  # under DDP, rank 0's BatchNorm statistics count
    if any(bits != found[0][0] for bits, _ in found):
        return f"apart: {found}"
    if not weights.isfinite().all() or not loss < float("inf"):
        return "poisoned"
    if torch.equal(weights, before):
        return "stalled"
    learns = loss <= min(LEARNT * start, then)
    return (
        "well" if learns else f"loss {loss:.3g}; {then:.3g} before, {start:.3g} first"
    )


def cell(rank: int, form: Form, fault: Fault, plain: bool = False) -> str:
    """Return how a training with a fault ends."""
    run = Training(form, rank, plain)
    try:
        start = run.loss()
        early = range(min(AT, fault.first))
        run.train(early, NONE)
        taken = run.snapshot() if form.hook in ("ddp", "blind", "fsdp2") else None
        verdict = judge(run, start, range(early.stop, STEPS), fault)
        if verdict == "well" or plain or taken is None or verdict.startswith("told"):
            return verdict
        run.restore(taken)
        after = judge(run, start, range(STEPS, 2 * STEPS - AT), NONE)
        return f"{verdict}; restored: {after}"
    finally:
        run.close()


def cells(
    rank: int, world: int, form: Form, faults: Sequence[str], plain: bool = False
) -> dict[str, str]:
    """Return how the trainings of a form end, by fault; runs on every rank."""
    return {
        name: cell(rank, form, FAULTS.get(name, NONE), plain=plain) for name in faults
    }


def campaign(
    pool: Ranks, forms: Sequence[str], faults: Callable[[int], Sequence[str]]
) -> dict[str, int]:
    """Run cells; return how many ended how.

    Raises:
        AssertionError: some did not end well, all of them named.
    """
    plain: dict[tuple[str, str], str] = {}
    counted: collections.Counter[str] = collections.Counter()
    wrong = []
    for index, name in enumerate(track(forms, "faults", transient=True)):
        form, tried = FORMS[name], ["none", *faults(index)]
        found = pool.run(cells, form, tried, timeout_s=600)[0]
        without = found.pop("none")
        assert without == "well", (name, without)
        for fault, verdict in found.items():
            kind = verdict.split(":")[0]
            if kind not in ("well", "told") and form.hook != "local_sgd":
                key = (form.optimizer, fault)
                if key not in plain:
                    (said,) = pool.run(cells, form, [fault], True)[0].values()
                    plain[key] = said
                if verdict.endswith("restored: well"):
                    if plain[key] != "well":
                        kind = "as plain DDP"
                    elif FLOAT32_MAX < WORLD * 1.75**2 * FAULTS[fault].value < INF:
                        kind = "beyond float32"
            counted[kind] += 1
            if kind not in ("well", "told", "as plain DDP", "beyond float32"):
                wrong.append(f"{name}; {fault}: {verdict}")
            elif kind == "told":
                wrong += [] if "rank" in verdict or "'" in verdict else [verdict]
    assert not wrong, "\n".join(wrong)
    return dict(counted)


def main() -> None:
    """Run all cells and print how many ended how."""
    parser = argparse.ArgumentParser(prog="tests.faults", description=__doc__)
    parser.add_argument("--form", nargs="*", default=list(FORMS))
    parser.add_argument("--fault", nargs="*", default=list(FAULTS))
    options = parser.parse_args()
    pool = Ranks(WORLD)
    try:
        found = campaign(pool, options.form, lambda index: options.fault)
    finally:
        pool.close()
    print(f"{sum(found.values())} cells: {found}")


if __name__ == "__main__":
    main()
