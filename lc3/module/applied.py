"""What becomes of a gradient between the hook and the optimizer.

A script looks at ``.grad``: it clips it by its norm, unscales it, skips the step,
throws it away. What 3LC decodes is large and rare, with a norm many times the
gradient's. So the hook hands it out with the norm of the mean gradient. Right before
the optimizer steps it gets its own size back, times whatever the script has multiplied
it by.
Residuals and second moments take in as much of the exchange as was applied: all of it,
a clipped part, or, if no optimizer steps, nothing.

Clipping has to come before coding. Once the script is seen to clip at one norm, or
``max_norm`` says so, every step's norm is exchanged before its gradients are pushed,
and they are pushed clipped.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, NAdam, Optimizer, RAdam
from torch.optim.optimizer import register_optimizer_step_post_hook

from lc3 import private
from lc3.errors import AttachError
from lc3.module.model import flat_view
from lc3.module.moments import Moments
from lc3.residual import Residuals

log = logging.getLogger(__name__)

Kind = Literal["adam", "sgd", "other"]
_UNTOUCHED = 1e-5
_ALIKE = 1e-3
_DECAY = 0.99  # of means of squared norms
ACCUMULATES = (
    "a second synchronised backward pass adds to a gradient that no optimizer has "
    "applied; put all passes but the last of a step under model.no_sync(), or call "
    "zero_grad() first if it is thrown away"
)
# Optimizers of other libraries that keep a second moment as torch's Adam does.
_ADAMS = re.compile(r"(N|R|Fused)?AdamW?(Legacy|4bit|8bit|Fp8)?")
_HIDES = ("optimizer", "base_optimizer")  # attributes of wrappers around optimizers


class Given(NamedTuple):
    """What was handed out of one parameter: its norm, and its own size over that."""

    norm: float
    restore: float
    coded: bool


class Applied:
    """Follows the optimizers of one model, and settles what they apply.

    Args:
        optimizers: optimizers that step the model's parameters, each some of them.
        names: names of the parameters that are exchanged.
        residuals: are settled.
        moments: are settled, too, and become the optimizers' own second moments.
            ``None``: the optimizers have none.
        max_norm: clips what is applied by its global norm. ``None``: the script may.

    Attributes:
        norm: the mean gradient's, estimated by ``lc3.module.sketch``; nan before the
            first.
        expected: share of a gradient that this step is expected to apply.
        clips: see ``Clipping``.
    """

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        names: Mapping[Tensor, str],
        residuals: Residuals,
        moments: Moments | None,
        max_norm: float | None,
    ) -> None:
        self.norm = math.nan
        self.expected = 1.0
        self.clips = Clipping(max_norm)
        # Means of squared norms, of the mean gradient and of the ranks' own.
        self.square, self.own_square = 0.0, 0.0
        self._names = names
        self._residuals = residuals
        self._moments = moments
        self._max_norm = max_norm
        self._given: dict[str, Given] = {}
        self._squares = (0.0, 0.0)
        self._said = False
        self._clip: float | None = None
        self._optimizers = list(optimizers)
        # A second moment that was inf before lc3 sets it; a loaded state's may be.
        self._may_hold_inf = set(self._optimizers)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step)
            for optimizer in self._optimizers
        ]
        self._handles.append(register_optimizer_step_post_hook(self._after_any))
        # Gradients that are added to what was handed out would be of two sizes.
        self._first = smallest(names)
        self._handed: Tensor | None = None

    @property
    def noise(self) -> float:
        """Squared norm of the mean gradient over the mean of the ranks' own, ≤ 1."""
        if not self.own_square or not math.isfinite(self.square):
            return 1.0
        return min(1.0, self.square / self.own_square)

    def watch_accumulation(self) -> list[Any]:
        """Check every gradient of one parameter; return handles to stop it."""
        return watch_accumulation(self._first, self._is_handed)

    def _is_handed(self) -> bool:
        grad, handed = self._first.grad, self._handed
        if handed is None or grad is None or grad.layout != torch.strided:
            return False
        return torch.equal(flat_view(grad), handed)

    def drop(self) -> None:
        """Undo what no optimizer has applied of the last exchange."""
        self._given.clear()
        self._handed = None
        undone = dict.fromkeys(self._names.values(), 0.0)
        self._residuals.settle(undone)
        if self._moments is not None:
            self._moments.settle(undone)

    @torch.no_grad()
    def release(self) -> None:
        """Give gradients their own size now, and take the exchange for applied."""
        for parameter, name in self._names.items():
            if name in self._given and parameter.grad is not None:
                parameter.grad.mul_(self._given[name].restore)
        self._settle(dict.fromkeys(self._given, 1.0))
        self._given.clear()
        self._handed = None

    def expect(self, square: float | None = None) -> None:
        """Foretell what the script will apply of a gradient.

        Args:
            square: its squared norm, if it is known before it is pushed.
        """
        norm = None if square is None else math.sqrt(square)
        self.expected = self.clips.expected(norm)

    def hand_out(
        self,
        coded: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        square: float,
        own_square: float,
    ) -> None:
        """Give what was decoded the norm of the mean gradient, in place.

        Args:
            coded: by parameter name, what arrived of the gradients times ``expected``.
            others: gradients that are exact.
            square: squared norm of the mean gradient, of both.
            own_square: mean over ranks of the squared norms of their gradients.
        """
        self._squares = square, own_square
        self._clip = None
        self.norm = math.sqrt(square) if square >= 0 else math.nan
        exact = _norms(others.values())
        norms = _norms(coded.values())
        of_coded = math.hypot(*norms)
        of_exact = math.hypot(*exact)
        left = max(square - of_exact**2, 0.01 * square)
        factor = math.sqrt(left) / of_coded if of_coded else 1.0
        if not math.isfinite(factor) or not factor:
            factor = 1.0
        if coded:
            private.multiply(list(coded.values()), factor)
        for name, norm in zip(coded, norms, strict=True):
            self._given[name] = Given(norm * factor, 1 / factor, coded=True)
        for name, norm in zip(others, exact, strict=True):
            self._given[name] = Given(norm, 1.0, coded=False)
        first = {**others, **coded}.get(self._names[self._first])
        self._handed = first.clone() if first is not None and first.any() else None

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.apply(optimizer)
            return None

        def then_apply() -> Any:
            loss = closure()
            self.apply(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_apply}
        return (args[0], then_apply, *args[2:]), kwargs

    def _after_any(self, optimizer: Optimizer, *_: Any) -> None:
        """Raise ``AttachError`` if an optimizer has stepped that nobody knows."""
        for group in optimizer.param_groups if self._given else ():
            for parameter in group["params"]:
                name = self._names.get(parameter)
                if name in self._given and parameter.grad is not None:
                    raise AttachError(
                        f"a {type(optimizer).__name__} has stepped parameter {name!r}, "
                        "and it is not the optimizer that attach was given; close() "
                        "the state, and attach(model, optimizer) with the new one"
                    )

    @torch.no_grad()
    def apply(self, optimizer: Optimizer) -> None:
        """Give gradients their own size, as the optimizer is about to apply them."""
        grads = {
            name: parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (name := self._names.get(parameter)) in self._given
            and parameter.grad is not None
        }
        if not grads:
            return
        given = {name: self._given.pop(name) for name in grads}
        self._handed = None
        # A fused Adam unscales by itself, and skips by itself.
        scale = float(getattr(optimizer, "grad_scale", None) or 1.0)
        overflowed = float(getattr(optimizer, "found_inf", None) or 0.0)
        norms = dict(zip(grads, _norms(grads.values()), strict=True))
        norm = math.hypot(*norms.values())
        norm_given = math.hypot(*(one.norm for one in given.values()))
        if overflowed or not math.isfinite(norm):
            self._settle(dict.fromkeys(grads, 0.0))
            if not overflowed:
                self._may_hold_inf.update(self._optimizers)
            return
        clip = 1.0
        if self._max_norm is not None:
            if self._clip is None:  # of what other optimizers step, too
                others = [
                    parameter.grad
                    for parameter, name in self._names.items()
                    if name in self._given and parameter.grad is not None
                ]
                total = math.hypot(norm, *_norms(others)) / scale
                self._clip = min(1.0, self._max_norm / (total + 1e-6))
            clip = self._clip
        whole = _snap(norm / norm_given) if norm_given else 1.0
        fractions: dict[str, float] = {}
        factors: dict[str, float] = {}
        for name, (of_given, restore, coded) in given.items():
            ratio = norms[name] / of_given if of_given else whole
            ratio = whole if abs(ratio - whole) < _ALIKE * whole else _snap(ratio)
            wanted = ratio * clip / scale  # of the gradient
            fraction = _snap(min(1.0, min(1.0, wanted) / self.expected), _ALIKE)
            if coded:
                fractions[name] = fraction
                size = fraction * max(1.0, wanted) * scale * restore
                factors[name] = size / ratio if ratio else 1.0
            else:
                factors[name] = clip
        private.multiply(list(grads.values()), list(factors.values()))
        if self._moments is not None:
            self._set_second_moments(self._moments, optimizer, fractions, scale)
            if optimizer in self._may_hold_inf and not _holds_inf(optimizer):
                self._may_hold_inf.discard(optimizer)
        fraction = min(1.0, whole * clip / scale)
        self._settle(fractions)
        self.clips.saw(fraction, self.norm)
        square, own_square = (fraction**2 * value for value in self._squares)
        if not math.isfinite(square + own_square):
            return  # moments have left it out, too
        self.square += (1 - _DECAY) * (square - self.square)
        self.own_square += (1 - _DECAY) * (own_square - self.own_square)

    def _settle(self, fractions: Mapping[str, float]) -> None:
        self._residuals.settle(fractions)
        if self._moments is not None:
            self._moments.settle(fractions)

    def _set_second_moments(
        self,
        moments: Moments,
        optimizer: Optimizer,
        names: Mapping[str, float],
        scale: float,
    ) -> None:
        """Let the step divide by the moments that all ranks have alike.

        Adam's own become, after it has added the square of this gradient, what the
        gradient was divided by before it was coded.
        """
        for group in optimizer.param_groups:
            beta2 = float(group["betas"][1])
            for parameter in group["params"]:
                name = self._names.get(parameter)
                state = optimizer.state.get(parameter)
                if name is None or name not in names or not state:
                    continue  # not exchanged, or the first step
                moment = state.get("exp_avg_sq")
                if moment is None:
                    self._warn(optimizer)
                    return
                steps = float(state.get("step", group.get("step", 0))) + 1
                square = flat_view(parameter.grad).float() / scale
                target = moments.of_elements(name) * self.noise
                decay = group.get("weight_decay", 0)
                if decay and not _decoupled(optimizer, group):
                    # A part of the gradient for Adam, so of its second moment, too.
                    decayed = flat_view(parameter.detach()).float() * decay
                    target = target.add(decayed.square())
                    square = square.neg() if group.get("maximize") else square
                    square = square.add(decayed)
                square = square.square_().mul_(1 - beta2)
                target = target * (1 - beta2**steps)
                target = torch.maximum(target, 1e-5 * square)
                target.sub_(square).div_(beta2)
                if type(moment) is not Tensor or moment.dtype != torch.float32:
                    target.clamp_(min=0)  # it rounds
                if type(moment) is Tensor:
                    kept = flat_view(moment)
                    if (
                        optimizer in self._may_hold_inf
                    ):  # such elements stay as they are
                        target = torch.where(kept.isinf(), kept, target)
                    kept.copy_(target)
                else:
                    moment.copy_(target.view(moment.shape))

    def _warn(self, optimizer: Optimizer) -> None:
        if not self._said:
            self._said = True
            log.warning("lc3: %s", unsuited(optimizer))

    def counters(self) -> dict[str, float]:
        """Return what is the same on every rank and goes on from a checkpoint."""
        return {
            "square": self.square,
            "own_square": self.own_square,
            **self.clips.counters(),
        }

    def load(self, counters: Mapping[str, int | float]) -> None:
        """Go on from what ``counters`` returned."""
        self.drop()
        self._may_hold_inf.update(self._optimizers)
        self.square = float(counters["square"])
        self.own_square = float(counters["own_square"])
        self.clips.load(counters)

    def close(self) -> None:
        """Follow the optimizers no longer."""
        for handle in self._handles:
            handle.remove()


class Clipping:
    """Finds out what a script multiplies its gradients by, and foretells it.

    Args:
        limit: the norm that gradients are clipped to; ``None``: it may turn out.

    Attributes:
        limit: the same, so far.
        scale: factor of gradients that are not clipped.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.scale = 1.0
        self._unexplained: tuple[float, float] | None = None

    def expected(self, norm: float | None) -> float:
        """Return what a gradient will be multiplied by, of which the norm is known."""
        if not self.limit or not norm or not math.isfinite(norm):
            return self.scale
        return min(self.scale, self.limit / norm)

    def saw(self, fraction: float, norm: float) -> None:
        """Take in that a gradient of this norm was multiplied by ``fraction``."""
        before, self._unexplained = self._unexplained, None
        clipped = fraction * norm
        if _alike(fraction, self.scale):
            if self.limit is not None and clipped > 1.01 * self.limit:
                self.limit = None  # it clips no longer
        elif self.limit is None or not _alike(clipped, self.limit):
            if before is not None and _alike(clipped, before[0] * before[1]):
                self.limit = clipped
            elif before is not None and _alike(fraction, before[0]):
                self.scale = fraction
            else:
                self._unexplained = fraction, norm

    def counters(self) -> dict[str, float]:
        """Return what goes on from a checkpoint, the same on every rank."""
        fraction, norm = self._unexplained or (0.0, 0.0)
        return {
            "clip_limit": self.limit or 0.0,
            "clip_scale": self.scale,
            "clip_share": fraction,
            "clip_norm": norm,
        }

    def load(self, counters: Mapping[str, int | float]) -> None:
        """Go on from what ``counters`` returned."""
        self.limit = float(counters["clip_limit"]) or None
        self.scale = float(counters["clip_scale"])
        seen = float(counters["clip_share"]), float(counters["clip_norm"])
        self._unexplained = seen if seen[0] else None


def watch_accumulation(parameter: Tensor, is_handed: Callable[[], bool]) -> list[Any]:
    """Raise ``AttachError`` where a gradient is added to one that was handed out.

    What ``autograd.grad`` computes is not added to anything.

    Args:
        parameter: the parameter whose gradients are looked at.
        is_handed: returns whether ``parameter.grad`` is what was handed out.

    Returns:
        Handles to stop it.
    """
    was_handed = False

    def before(_: Tensor) -> None:
        nonlocal was_handed
        was_handed = is_handed()

    def after(_: Tensor) -> None:
        if was_handed:
            raise AttachError(ACCUMULATES)

    return [
        parameter.register_hook(before),
        parameter.register_post_accumulate_grad_hook(after),
    ]


def smallest(parameters: Iterable[Tensor]) -> Tensor:
    """Return the parameter with the fewest elements, but some if any has."""
    return min(parameters, key=lambda parameter: parameter.numel() or math.inf)


def unwrapped(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """Return the optimizers that step: one or several, without what wraps them.

    Raises:
        AttachError: one of them is none, or there are none.
    """
    given = [optimizer] if not isinstance(optimizer, list | tuple) else list(optimizer)
    found: list[Optimizer] = []
    for one in given:
        inner: Any = one
        while nested := next(
            (v for a in _HIDES if isinstance(v := getattr(inner, a, None), Optimizer)),
            None,
        ):
            inner = nested
        if not isinstance(inner, Optimizer):
            raise AttachError(
                f"optimizer is a {type(one).__name__}, not a torch.optim.Optimizer; "
                "attach takes attach(model, optimizer, config)"
            )
        found.append(inner)
    if not found:
        raise AttachError("no optimizer was given; attach(model, optimizer)")
    return found


def kind_of(optimizer: Optimizer) -> Kind:
    """Return which form of 3LC suits an optimizer: "other": none."""
    if isinstance(optimizer, Adam | NAdam | RAdam):
        return "adam"
    kind = type(optimizer)
    known = _ADAMS.fullmatch(kind.__name__) is not None
    if (
        known
        and "betas" in optimizer.defaults
        and "bitsandbytes" not in kind.__module__
    ):
        return "adam"
    return "sgd" if isinstance(optimizer, SGD) else "other"


def kind_of_all(optimizers: Sequence[Optimizer]) -> Kind | None:
    """Return which form of 3LC suits several together; ``None``: there are none."""
    kinds = {kind_of(one) for one in optimizers}
    return kinds.pop() if len(kinds) == 1 else "other" if kinds else None


def unsuited(optimizer: Optimizer) -> str:
    """Return the sentence about an optimizer that no form of every step suits."""
    return (
        f"{type(optimizer).__name__} trains worse on gradients that 3LC has decoded, "
        "which come late and in jumps; take local steps, which suit any optimizer: "
        "state = lc3.hooks.local_sgd.attach(module, optimizer) in place of "
        "DistributedDataParallel"
    )


def _decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    given = group.get("decoupled_weight_decay")
    return bool(given) if given is not None else "AdamW" in type(optimizer).__name__


def _holds_inf(optimizer: Optimizer) -> bool:
    """Return whether a second moment is inf: of plain tensors, 8-bit ones are not."""
    moments = (state.get("exp_avg_sq") for state in optimizer.state.values())
    return any(bool(m.isinf().any()) for m in moments if type(m) is Tensor)


def _norms(tensors: Iterable[Tensor]) -> list[float]:
    """Return the norms of dense tensors, by one copy to the host."""
    listed = list(tensors)
    if not listed:
        return []
    found = torch.stack(list(private.norms(listed)))
    return [float(norm) for norm in found.tolist()]


def _snap(ratio: float, near: float = _UNTOUCHED) -> float:
    """Return 1 where rounding only has made it something else."""
    return 1.0 if abs(ratio - 1) < near else ratio


def _alike(one: float, other: float) -> bool:
    return abs(one - other) < _ALIKE * abs(other)
