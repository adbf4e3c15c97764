"""``Tuning(mode="auto")``: each bucket travels in the form that should arrive first.

Choices follow from costs that all ranks share. 3LC that is chosen for a bucket has to
prove itself: after some steps its time there is compared with what a plain all-reduce
was predicted to take, again with figures that all ranks share.
"""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from statistics import median

import torch
from torch import Tensor

from lc3.engines.costs import Costs
from lc3.engines.engine import Engine
from lc3.engines.exchange import NO_HALF_GRADS, Wire, widen
from lc3.plan import Layout

log = logging.getLogger(__name__)

Bucket = tuple[str, ...]  # the names in it: numbers change when DDP rebuilds them

TRIAL_STEPS = 12  # with 3LC, before it is compared
_WARM_UP = 4  # of them that do not count
_MARGIN = 1.1  # by which an all-reduce must be predicted to win afterwards


class AutoEngine:
    """An ``Exchange`` that codes what an engine should bring sooner coded.

    Args:
        engine: codes.
        costs: the same on every rank.

    Attributes:
        choices: by bucket.
    """

    def __init__(self, engine: Engine, costs: Costs) -> None:
        self.choices = Choices(costs, engine.transport.world, direct=engine.direct)
        self.plan, self.config = engine.plan, engine.config
        self.transport, self.channel = engine.transport, engine.channel
        self.messages, self.meter = engine.messages, engine.meter
        self.residuals, self.budget = engine.residuals, engine.budget
        self.me, self.direct, self.owing = engine.me, engine.direct, engine.owing
        self.senders = engine.senders
        self._engine = engine

    def all_reduce(
        self,
        grads: Mapping[str, Tensor],
        step: int,
        bucket: int,
        half_grads: Mapping[str, Tensor] = NO_HALF_GRADS,
    ) -> None:
        """See ``Exchange.all_reduce``."""
        widen(grads, half_grads)
        pieces = self._engine.pieces(grads)
        self.meter.buckets += 1
        if self.transport.world == 1 or not any(pieces):
            return
        with self.channel.exchanging(self._engine.elements_of(pieces), step, bucket):
            names, elements = tuple(grads), sum(g.numel() for g in grads.values())
            wire = self.choices.wire(names, elements)
            if wire != "3lc":
                self._uncoded(pieces, grads, wire)
                return
            start = time.perf_counter()
            self._engine.push_and_pull(pieces, grads, step, bucket)
            self.owing.update(self.plan.coded.intersection(names))
            took = self.choices.took(names, time.perf_counter() - start)
            if took is not None:
                mine = torch.tensor([took], dtype=torch.float64)
                shared = self.channel.all_gather_bytes(mine, step, bucket)
                medians = [one.clone().view(torch.float64) for one in shared]
                self.choices.compare(names, elements, medians)

    def _uncoded(self, pieces: Layout, grads: Mapping[str, Tensor], wire: Wire) -> None:
        """Average by the transport's all-reduce; what 3LC still owed comes along."""
        owing = [name for name in grads if name in self.owing]
        for name in owing:
            grads[name].add_(self.residuals.sent[name])
        world = self.transport.world
        mine = () if self.direct else pieces[self.transport.rank]
        owned = [piece for piece in mine if piece.name in owing]
        for piece, owed in zip(owned, self.residuals.of_owned(owned)[0], strict=True):
            assert owed is not None  # it is coded
            grads[piece.name][piece.start : piece.stop].add_(owed, alpha=world)
        flat = torch.cat([grad.reshape(-1) for grad in grads.values()])
        if wire == "bfloat16":
            flat = (flat / world).bfloat16()
            with self.meter.stage("exchange"):
                self.transport.all_reduce(flat)
        else:
            with self.meter.stage("exchange"):
                self.transport.all_reduce(flat)
            flat /= world
        parts = torch.split(flat, [grad.numel() for grad in grads.values()])
        for grad, part in zip(grads.values(), parts, strict=True):
            grad.copy_(part)
        gone = {name for name in owing if grads[name].isfinite().all()}
        self.owing -= gone
        sent = [
            piece
            for piece in chain.from_iterable(self._engine.pieces(owing))
            if piece.name in gone
        ]
        self.residuals.clear_sent(sent)
        self.residuals.clear_owned([piece for piece in owned if piece.name in gone])

    def native_form(self, names: Collection[str], elements: int) -> Wire | None:
        """See ``Exchange.native_form``."""
        wire = self.choices.wire(tuple(names), elements)
        return None if wire == "3lc" or not self.owing.isdisjoint(names) else wire

    def keep_own_part(self) -> None:
        """See ``Exchange.keep_own_part``: a no-op on one level."""

    def close(self) -> None:
        """See ``Exchange.close``."""
        self._engine.close()


@dataclass
class Choices:
    """The choices of one model.

    Attributes:
        costs: the same on every rank.
        world: number of ranks.
        direct: whether 3LC is exchanged without owners.
        chosen: by bucket, so far.
    """

    costs: Costs
    world: int
    direct: bool
    chosen: dict[Bucket, Wire] = field(default_factory=dict)
    _trials: dict[Bucket, list[float]] = field(default_factory=dict)

    def wire(self, bucket: Bucket, elements: int) -> Wire:
        """Return how a bucket travels; the same on every rank."""
        if bucket not in self.chosen:
            predicted = self.costs.predict(elements, self.world, self.direct)
            self.chosen[bucket] = min(predicted, key=lambda wire: predicted[wire])
            self._say(bucket, elements, predicted)
        return self.chosen[bucket]

    def took(self, bucket: Bucket, seconds: float) -> float | None:
        """Note how long 3LC took here; return its median when it is to be shared."""
        times = self._trials.setdefault(bucket, [])
        if len(times) >= TRIAL_STEPS:
            return None
        times.append(seconds)
        return median(times[_WARM_UP:]) if len(times) == TRIAL_STEPS else None

    def compare(self, bucket: Bucket, elements: int, medians: list[Tensor]) -> None:
        """Choose again, by what every rank measured, float64[1] each.

        The shortest counts: others have waited for a rank that came late to the bucket,
        as they would with any form.
        """
        predicted = self.costs.predict(elements, self.world, self.direct)
        measured = min(float(one) for one in medians)
        plain: Wire = (
            "bfloat16" if predicted["bfloat16"] < predicted["float32"] else "float32"
        )
        if measured > _MARGIN * predicted[plain]:
            self.chosen[bucket] = plain
            self._say(bucket, elements, {**predicted, "3lc": measured})

    def _say(self, bucket: Bucket, elements: int, times: dict[Wire, float]) -> None:
        wire = self.chosen[bucket]
        figures = ", ".join(f"{form} {1e3 * s:.2f} ms" for form, s in times.items())
        link = 8 / self.costs.byte / 1e6 if self.costs.byte else float("inf")
        verdict = (
            "sends 3LC"
            if wire == "3lc"
            else f"sends {wire}: compression will not help here"
        )
        log.info(
            "lc3: bucket of %s elements (%s …) %s: %s; %.0f Mbit/s a rank, %.2f ms a "
            "round, codec %.2f GB/s",
            f"{elements:,}",
            bucket[0],
            verdict,
            figures,
            link,
            1e3 * self.costs.round,
            4e-9 / self.costs.encode,
        )
