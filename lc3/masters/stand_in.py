"""What stands for gradients in ``.grad`` while the gradients are at their owners.

One number everywhere, so that the norm of all of it is the gradient's. What a script
multiplies it by (clipping, a GradScaler, a scale), the owners multiply by.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lc3.errors import AttachError
from lc3.module.applied import smallest, watch_accumulation


class StandIn:
    """What one step's gradients are replaced by.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._buckets: list[Tensor] = []
        self._before: list[int] = []
        self._shared = torch.empty(0)
        self._number = 0.0
        self._first = smallest(parameters.values())
        self._watched = watch_accumulation(self._first, self._is_handed)

    def begin(self) -> None:
        """Take the buckets of another step."""
        self._before = [bucket.numel() for bucket in self._buckets[:1]]
        self._buckets, self._number = [], 0.0

    def instead_of(self, bucket: Tensor, keep: bool) -> Tensor:
        """Return what DDP gets for a bucket: all zero until ``fill``.

        Args:
            bucket: of this step.
            keep: whether it stays what it is; it is overwritten otherwise.

        Returns:
            The bucket, or memory that all kept ones share: they are all one number.
        """
        if keep:
            numel = bucket.numel()
            if not self._buckets and self._before != [numel]:
                self._shared = bucket[:0]  # DDP has made other buckets
            if self._shared.numel() < numel:
                self._shared = torch.empty_like(bucket)
            bucket = self._shared[:numel]
        self._buckets.append(bucket.zero_())
        return bucket

    def fill(self, norm: float) -> None:
        """Let all buckets of this step have a norm together."""
        elements = sum(bucket.numel() for bucket in self._buckets)
        self._number = norm / math.sqrt(max(elements, 1))
        for bucket in self._buckets:
            bucket.fill_(self._number)

    def take_factors(self, scale: float) -> dict[str, float]:
        """Return what the script has multiplied gradients by, where there are any.

        Args:
            scale: of a GradScaler, by which they are to be divided in any case.

        Raises:
            AttachError: single elements were changed; the gradients are elsewhere.
        """
        factors: dict[str, float] = {}
        grads = {
            name: parameter.grad
            for name, parameter in self._parameters.items()
            if parameter.grad is not None and parameter.grad.numel()
        }
        ends = [torch.stack(grad.aminmax()).float() for grad in grads.values()]
        found = torch.stack(ends).tolist() if ends else []
        for (name, grad), (least, most) in zip(grads.items(), found, strict=True):
            if most - least > 1e-3 * abs(most):
                raise AttachError(
                    f"elements of the gradient of {name!r} were changed one by one "
                    "before step(), but hooks.push_pull keeps gradients at their "
                    "owners: change them by a hook on the parameter "
                    "(parameter.register_hook), which runs before they are pushed"
                )
            given = float(torch.tensor(self._number, dtype=grad.dtype))
            ratio = most / given if given else 1 / scale
            near = 1e-5 if grad.dtype == torch.float32 else 1e-2  # of rounding
            untouched = abs(ratio * scale - 1) < near
            factors[name] = 1 / scale if untouched else ratio
        self._number = 0.0
        return factors

    def _is_handed(self) -> bool:
        grad, number = self._first.grad, self._number
        return grad is not None and bool(number) and bool((grad == number).all())

    def close(self) -> None:
        """Watch no longer."""
        for watched in self._watched:
            watched.remove()
