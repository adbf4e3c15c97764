"""What compression would save and cost in a training, without changing it.

    python -m lc3 measure train.py --its --own arguments
    torchrun --nproc-per-node 2 -m lc3 measure train.py --its --own arguments

The script runs as it is. Before each step of its optimizers the gradients are copied
and go through both hops of 3LC at every sparsity, with residuals that live from step to
step; those of Adam are divided by its second moments first, as ``hooks.ddp`` does.
Where the script trains on several ranks, an all-reduce as large as its gradients is
timed between them once, since a step contains one. After some steps the program ends,
and rank 0 prints a table.
"""

import math
import os
import runpy
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lc3.codec import codec_for, warm_up
from lc3.config import Settings
from lc3.engines.direct import engine_for
from lc3.engines.engine import Engine
from lc3.errors import InputError
from lc3.meter import Meter
from lc3.module.applied import Kind, kind_of, unsuited
from lc3.plan import make_plan
from lc3.transport.loopback import Loopback
from lc3.wire.coder import Coder

LINKS_BIT_S = {"10 Mbit/s": 1e7, "100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10}
SPARSITIES = (1.0, 1.5, 1.75, 1.9)
_TIMED_STEP, _REPEATS, _MOST_ELEMENTS = 2, 3, 4_000_000  # of the all-reduce
_LEAST = 1e-4  # of the largest root of a second moment


class _Enough(SystemExit):
    """Ends the script when enough steps have been measured."""


@dataclass
class Figures:
    """What one sparsity did, summed over the steps measured.

    Attributes:
        sparsity: 3LC's s.
        meter: meter of the engine that coded.
        residual_ratio: norm of the residual over that of the gradient, after the last
            step.
    """

    sparsity: float
    meter: Meter = field(default_factory=Meter)
    residual_ratio: float = math.nan

    def bytes_per_step(self, steps: int) -> float:
        """Return the bytes of both hops of one step, headers and raw tensors too."""
        total = 0
        for way in (self.meter.push, self.meter.pull):
            total += way.coded_bytes.total() + way.raw_bytes.total() + way.header_bytes
            total -= way.coded_saved_bytes + way.raw_saved_bytes
        return total / steps

    def codec_s(self, steps: int) -> float:
        """Return the seconds of encoding and decoding of one step."""
        seconds = self.meter.seconds
        return (seconds["encode"] + seconds["decode"]) / steps


class Recorder:
    """Codes the gradients of every optimizer step on the side.

    Args:
        steps: number of steps of the first optimizer to measure.
        sparsities: sparsities to compare.
        config: settings of everything else.

    Attributes:
        figures: figures by sparsity.
        elements: parameters that had a gradient.
        measured: steps so far.
        step_s: seconds between steps, without what the measurement took.
        kinds: kinds of optimizers that have stepped, see ``kind_of``.
        world: ranks that the script trains on.
        all_reduce_s: seconds of an all-reduce of all gradients between them; 0: alone.
    """

    def __init__(
        self, steps: int, sparsities: Sequence[float], config: Settings
    ) -> None:
        self.figures = [Figures(s) for s in sparsities]
        self.elements = self.measured = 0
        self.step_s: list[float] = []
        self.kinds: dict[Kind, Optimizer] = {}
        self.world, self.all_reduce_s = 1, 0.0
        self._steps = steps
        self._config = config
        self._coder = Coder(codec_for(torch.device("cpu")))
        warm_up(self._coder.host)
        self._engines: dict[int, list[Engine]] = {}
        self._first: int | None = None
        self._left_at = math.nan

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Code the gradients that ``optimizer`` is about to apply (a pre-hook)."""
        if self._first is None:
            self._first = id(optimizer)
        if id(optimizer) == self._first:
            if self.measured == self._steps:
                raise _Enough(0)
            if self.measured:
                self.step_s.append(time.perf_counter() - self._left_at)
            self.measured += 1
        self.kinds.setdefault(kind_of(optimizer), optimizer)
        grads = _gradients(optimizer)
        if grads:
            if id(optimizer) not in self._engines:
                self._engines[id(optimizer)] = self._engines_for(optimizer)
                self.elements += sum(g.numel() for g in grads.values())
            engines = self._engines[id(optimizer)]
            for engine, figures in zip(engines, self.figures, strict=True):
                self._code(engine, figures, grads)
        if id(optimizer) == self._first and self.measured == min(
            _TIMED_STEP, self._steps
        ):
            self._time_all_reduce(next(iter(optimizer.param_groups[0]["params"])))
        if id(optimizer) == self._first:
            self._left_at = time.perf_counter()

    def _time_all_reduce(self, like: Tensor) -> None:
        """Time what the script's own steps contain, where it trains on several ranks.

        Collective over the ranks: all of them are at the same step.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        self.world = dist.get_world_size()
        if self.world == 1:
            return
        elements = min(self.elements, _MOST_ELEMENTS)
        values = torch.zeros(elements, device=like.device, dtype=torch.float32)
        times = []
        for _ in range(_REPEATS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            float(values[0])  # a device's is over then
            times.append(time.perf_counter() - began)
        slowest = torch.tensor(median(times), device=like.device, dtype=torch.float32)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        self.all_reduce_s = float(slowest) * self.elements / elements

    def _engines_for(self, optimizer: Optimizer) -> list[Engine]:
        shapes = [
            (name, tuple(parameter.shape)) for name, parameter in _named(optimizer)
        ]
        (transport,) = Loopback(1).ranks
        engines = []
        for figures in self.figures:
            knobs = {**_knobs(self._config), "sparsity": figures.sparsity}
            config = Settings(**knobs)
            plan = make_plan(shapes, 1, config)
            engines.append(
                engine_for(plan, config, transport, self._coder, figures.meter)
            )
        return engines

    def _code(self, engine: Engine, figures: Figures, grads: dict[str, Tensor]) -> None:
        mine = {name: grad.clone() for name, grad in grads.items()}
        engine.push_and_pull(engine.pieces(mine), mine, self.measured, 0)
        sent = engine.residuals.sent
        left = math.hypot(*(float(sent[name].norm()) for name in mine if name in sent))
        whole = math.hypot(*(float(g.norm()) for n, g in grads.items() if n in sent))
        figures.residual_ratio = left / whole if whole else math.nan


def _knobs(config: Settings) -> dict[str, Any]:
    return {name: getattr(config, name) for name in Settings.__dataclass_fields__}


def _named(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Return the trained parameters, by the names the optimizer knows, or numbers."""
    found: list[tuple[str, Tensor]] = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            found.append((name or f"parameter {len(found)}", parameter))
    return found


def _gradients(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return float32[numel] on the CPU, what is coded of all dense gradients, by name.

    Of Adam's, once it has second moments, the gradients over their roots.
    """
    found = {}
    for name, parameter in _named(optimizer):
        grad = parameter.grad
        dense = grad is not None and grad.layout == torch.strided and grad.numel()
        if grad is None or not dense or grad.dtype == torch.float64:
            continue
        value = grad.detach().to("cpu", torch.float32).reshape(-1).clone()
        moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
        if kind_of(optimizer) == "adam" and type(moment) is Tensor:
            root = moment.detach().to("cpu", torch.float32).reshape(-1).sqrt()
            value /= root.add_(_LEAST * float(root.max()) or 1.0)
        found[name] = value
    return found


def run_script(script: str, arguments: Sequence[str], recorder: Recorder) -> None:
    """Run a script as ``python script arguments`` would, until enough is measured.

    Raises:
        InputError: there is no such script, or it ended without an optimizer step.
    """
    if not Path(script).is_file():
        raise InputError(f"{script!r} is not a file; give the path of your script")
    handle = register_optimizer_step_pre_hook(recorder)
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except _Enough:
        pass
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    finally:
        sys.argv, sys.path[:] = argv, path
        handle.remove()
    if not recorder.measured:
        raise InputError(
            f"{script} ended without a step of a torch optimizer; lc3 measures the "
            "gradients that optimizer.step() finds"
        )


def report(recorder: Recorder, world: int) -> str:
    """Return what was found, as text for a terminal of 80 columns.

    Args:
        recorder: after some steps.
        world: ranks that a job would have; what one of them sends depends on it.
    """
    steps = recorder.measured
    share = (world - 1) / world
    dense = 2 * share * 4 * recorder.elements
    step_s = median(recorder.step_s) if recorder.step_s else math.nan
    compute_s = max(step_s - recorder.all_reduce_s, 0.0)
    lines = [
        f"{steps} steps, {recorder.elements:,} gradient elements, "
        f"{1e3 * step_s:.1f} ms a step as the script runs now",
        f"float32 all-reduce, {world} ranks: {dense:,.0f} bytes from each rank a step",
    ]
    links = dict(LINKS_BIT_S)
    if recorder.all_reduce_s:
        here = 2 * (1 - 1 / recorder.world) * 4 * recorder.elements
        links = {"this link": 8 * here / recorder.all_reduce_s, **links}
        lines.append(
            f"in {1e3 * recorder.all_reduce_s:.1f} ms between the script's "
            f"{recorder.world}; the rest of a step, {1e3 * compute_s:.1f} ms, is what"
        )
        lines.append("the times below add to, as if nothing overlapped")
    lines += [
        "",
        "   s   times fewer  bits push+pull   sent  encode+decode  residual/gradient",
    ]
    for figures in recorder.figures:
        push, pull = figures.meter.push, figures.meter.pull
        sent = share * figures.bytes_per_step(steps)
        lines.append(
            f"{figures.sparsity:5.2f} {dense / sent:11.1f}  "
            f"{push.bits_per_element:6.3f} + {pull.bits_per_element:.3f} "
            f"{100 * push.density:6.2f} % {1e3 * figures.codec_s(steps):10.1f} ms"
            f" {figures.residual_ratio:15.1f}"
        )
    width = 13 if len(links) < 5 else 11
    head = 80 - 5 * width if len(links) == 5 else 22
    lines += ["", f"{'ms a step':{head}}" + "".join(f"{k:>{width}}" for k in links)]

    def row(name: str, seconds: Callable[[float], float]) -> str:
        cells = (f"{1e3 * seconds(rate):{width},.1f}" for rate in links.values())
        return f"{name:{head}}" + "".join(cells)

    lines.append(row("float32", lambda rate: compute_s + 8 * dense / rate))
    lines.append(row("float16", lambda rate: compute_s + 4 * dense / rate))
    for figures in recorder.figures:
        sent = share * figures.bytes_per_step(steps)
        code = figures.codec_s(steps)
        lines.append(
            row(
                f"3LC s={figures.sparsity:.2f}",
                lambda rate, sent=sent, code=code: compute_s + code + 8 * sent / rate,  # type: ignore[misc]
            )
        )
    best = recorder.figures[0]
    saved = dense - share * best.bytes_per_step(steps)
    even = 8 * saved / best.codec_s(steps)
    return "\n".join(
        [
            *lines,
            "",
            f"With s = {best.sparsity:g} compressing pays on links below "
            f"{even / 1e9:.1f} Gbit/s, if nothing overlaps.",
            "Times of 3LC are of one process of this machine, and the pull is of its",
            "own gradient: a mean over ranks is denser. A residual of many times the",
            "gradient means that much of it arrives late; a larger s then needs longer",
            "training.",
            "",
            *advice(recorder),
        ]
    )


def advice(recorder: Recorder) -> list[str]:
    """Return the lines to write, for the optimizers that were seen."""
    kinds = set(recorder.kinds)
    if "other" in kinds:
        return textwrap.wrap(unsuited(recorder.kinds["other"]), 79)
    names = " and ".join(type(one).__name__ for one in recorder.kinds.values())
    lines = [f"For {names}, exchanged in every step:"]
    lines.append("    state = lc3.hooks.ddp.attach(model, optimizer)")
    if "adam" in kinds:
        lines.append("With Adam leave s at 1: more of it trains worse than it saves.")
    lines.append("Where that is not enough, in every 8th step (sends far less):")
    lines.append("    state = lc3.hooks.local_sgd.attach(model, optimizer)")
    return lines


def main(
    script: str,
    arguments: Sequence[str],
    steps: int,
    sparsities: Sequence[float],
    world: int | None,
) -> None:
    """Run ``script`` and print what was found, once.

    Args:
        script: path.
        arguments: its own.
        steps: number of steps to measure.
        sparsities: sparsities to compare.
        world: ranks that a job would have. ``None``: as many as the script trains on,
            or 4 where that is one.
    """
    recorder = Recorder(steps, sparsities, Settings())
    run_script(script, arguments, recorder)
    if os.environ.get("RANK", "0") == "0":
        ranks = world or (recorder.world if recorder.world > 1 else 4)
        print(f"\nlc3 measure: {script}\n{report(recorder, ranks)}")
