"""Sites attach: every rank takes its place in a site, or none does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lc3.config import Settings
from lc3.local.ends import InSite
from lc3.local.held import Shares, holders_of, parts_of
from lc3.local.local_steps import Choose
from lc3.local.site import ranks_of_sites, sites_of
from lc3.session.attaching import attaching, attaching_everywhere
from lc3.session.checks import check_module
from lc3.transport.handshake import agree, threads_for
from lc3.version import __version__


class Closes(Protocol):
    """What a rank makes of its place."""

    def close(self) -> None:
        """Leave it."""


Made = TypeVar("Made", bound=Closes)


def join_sites(
    model: nn.Module,
    mesh: DeviceMesh | int,
    chosen: Callable[[], tuple[list[Optimizer], Settings, Choose]],
    make: Callable[[nn.Module, list[Optimizer], Settings, Choose, InSite], Made],
) -> Made:
    """Return what is made of this rank's place among the sites; collective.

    Args:
        model: of a site, or what this rank holds of it.
        mesh: see ``hooks.local_sgd.attach``.
        chosen: returns the optimizers, the settings, and how knobs are chosen.
        make: makes it, given the model, what was chosen, and this rank's side.

    Raises:
        Lc3Error: a rank could not; nothing is left of what others have made.
    """
    made: Made | None = None
    try:
        with attaching_everywhere() as everybody:
            optimizers, settings, choose = chosen()
            knobs, _ = choose(optimizers)
            check_module(model)
            ranks = ranks_of_sites(mesh)
            shapes, parts = parts_of(model, ranks)
            facts = {"mesh": ranks, "parameters": shapes, **knobs.said()}
            threads = threads_for(everybody, settings)
            agree(everybody, __version__, settings, [], lambda: None, facts)
            holders = holders_of(parts, ranks, everybody)
            sites = sites_of(mesh)
            with attaching(lambda: (sites.between, sites.leave)):
                logs = settings.log_every if dist.get_rank() == 0 else None
                settings = replace(settings, threads=threads, log_every=logs)
                end = InSite(sites, Shares(sites.site, holders))
                made = make(model, optimizers, settings, choose, end)
    except BaseException:
        if made is not None:
            made.close()
        raise
    return made
