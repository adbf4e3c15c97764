"""One module per way to train. Always imported as ``lc3.hooks``.

    import lc3

    state = lc3.hooks.ddp.attach(model, optimizer)

A module, and the framework that it is for, is imported when it is first named.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lc3.hooks import ddp, fsdp2, local_sgd, push_pull

if __name__ != "lc3.hooks":
    raise ImportError(
        f"import lc3.hooks, not {__name__}: the folder is only mapped there"
    )

__all__ = [
    "accelerate",
    "ddp",
    "fsdp2",
    "horovod",
    "lightning",
    "local_sgd",
    "push_pull",
    "torchft",
    "transformers",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(
            f"lc3.hooks has no {name!r}; there are {', '.join(__all__)}"
        )
    return import_module(f"lc3.hooks.{name}")


def __dir__() -> list[str]:
    return __all__
