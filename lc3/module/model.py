"""A module as it is now: between its training steps people do things to it.

They load weights, unfreeze layers, swap averaged weights in and out, move memory,
replace buffers. So parameters are looked up by name whenever they are exchanged.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lc3 import private
from lc3.errors import AttachError
from lc3.transport.protocol import Transport

_MESSAGE_BYTES = 1 << 25
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: a view of its shard, or all of it."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            shard: Tensor = tensor.to_local()
        return shard
    return tensor.detach()


def like(
    parameter: Tensor, share: slice | None = None, device: str | None = None
) -> Tensor:
    """Return what stands for this rank's part of a parameter, by shape and dtype.

    Args:
        parameter: a parameter, whole or sharded.
        share: the elements of its part that it exchanges, if not all. Of as many
            dimensions, the others of size 1; of a number, of one.
        device: the device where it is exchanged. Default: its own.
    """
    alike = device is None or parameter.device == torch.device(device)
    if share is None and alike and not isinstance(parameter, DTensor):
        return parameter
    shard = local(parameter)
    shape = list(shard.shape)
    if share is not None:
        shape = [1] * (len(shape) - 1) + [share.stop - share.start]
    return shard.new_empty(1, device=device).expand(shape)


def reshard(module: nn.Module) -> None:
    """Let FSDP2's modules hold shards again, where a forward pass has gathered them."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters by the names that they have without ``torch.compile``."""
    for name, parameter in module.named_parameters():
        yield name.replace("_orig_mod.", ""), parameter


class Frozen:
    """The parameters that were not trained at attach: nobody exchanges them.

    Args:
        named: parameters by name, of which some are frozen.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._frozen = [(name, p) for name, p in named if not p.requires_grad]

    def check(self, next_step: str) -> None:
        """Raise ``AttachError``, which says what to do, if one is trained now."""
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise AttachError(
                    f"parameter {name!r} was frozen when lc3 was attached, and nobody "
                    f"exchanges its gradient; {next_step}, on every rank"
                )


class Model:
    """The parameters that ranks exchange, and the buffers beside them.

    Args:
        module: the module that is trained.
        names: names of its parameters that ranks exchange.
        shares: by name the elements, in memory order, that this rank exchanges of what
            it holds, where that is not all.

    Attributes:
        last_seen: the parameters by name, when somebody last looked them up.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        shares: Mapping[str, slice] = MappingProxyType({}),
    ) -> None:
        self.module = module
        self._names = names
        self._shares = shares
        self._known = set(names)
        self._sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
        self.last_seen: dict[str, nn.Parameter] = {}
        self._marks: list[tuple[int, int]] = []
        self._buffer_sums: dict[str, int] = {}

    def holds_one_of(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether one of these is exchanged, whatever else is in the model."""
        for part in self._sharded:
            part.reshard()
        now = dict(named_parameters(self.module))
        mine = {id(now[name]) for name in self._names if name in now}
        return any(id(p) in mine for p in parameters)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return them as they are now, by name, in the order of attach.

        Raises:
            AttachError: one is gone, or others can be trained since then.
        """
        for part in self._sharded:
            part.reshard()
        now = dict(named_parameters(self.module))
        for name in self._names:
            if name not in now:
                raise AttachError(
                    f"parameter {name!r} is no longer in the model; close the state, "
                    "and attach again"
                )
        for name, parameter in now.items():
            if parameter.requires_grad and name not in self._known:
                raise AttachError(
                    f"parameter {name!r} can be trained since attach, and nobody "
                    "exchanges it; close the state, and attach again, on every rank"
                )
        self.last_seen = {name: now[name] for name in self._names}
        return self.last_seen

    def flats(self) -> dict[str, Tensor]:
        """Return views of what is exchanged, by name: [numel] of their dtypes.

        Raises:
            AttachError: see ``wholes``.
        """
        wholes = self.wholes()
        for name, share in self._shares.items():
            wholes[name] = wholes[name][share]
        return wholes

    def wholes(self) -> dict[str, Tensor]:
        """Return views of all that this rank holds, in memory order; see ``flats``.

        Raises:
            AttachError: see ``parameters``; or one is not in one block of memory.
        """
        return {name: flat_view(local(p)) for name, p in self.parameters().items()}

    def mark(self) -> None:
        """Take what parameters hold now for what training made of them.

        Looks at those that were seen last: a walk through a module takes longer than a
        small step.
        """
        self._marks = [_mark_of(p) for p in self.last_seen.values()]

    def touched(self, *, look_up: bool = False) -> bool:
        """Return whether parameters were written, or moved, since ``mark``.

        What ``parameter.data`` was used to write to is not seen.

        Args:
            look_up: whether the module may hold other parameters by now.
        """
        before = self.last_seen
        now = self.parameters() if look_up else before
        if any(now[name] is not before[name] for name in now):
            return True
        return any(
            _mark_of(p) != mark
            for p, mark in zip(now.values(), self._marks, strict=True)
        )

    def float_buffers(self) -> dict[str, Tensor]:
        """Return buffers with statistics, tables and masks, by name.

        Not those that were expanded, to which nobody can write.
        """
        return {
            name: buffer
            for name, buffer in self.module.named_buffers()
            if buffer.is_floating_point() and buffer.numel() and not _expanded(buffer)
        }

    def mark_buffers(self) -> None:
        """Take what float buffers hold now for what all ranks have seen."""
        buffers = self.float_buffers()
        sums = checksums(buffers.values()).tolist()
        self._buffer_sums = dict(zip(buffers, sums, strict=True))

    def changed_buffers(self) -> list[bool]:
        """Return which float buffers do not hold what ``mark_buffers`` has seen."""
        buffers = self.float_buffers()
        sums = checksums(buffers.values()).tolist()
        pairs = zip(buffers, sums, strict=True)
        return [self._buffer_sums.get(name) != value for name, value in pairs]

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers, frozen and of whole numbers, too."""
        parameters = dict(self.module.named_parameters())
        return {**parameters, **dict(self.module.named_buffers())}

    def copy_from_first(self, transport: Transport) -> None:
        """Give all ranks what the first one holds, where they differ; collective.

        Parameters and buffers of every dtype, bit for bit.

        Raises:
            AttachError: ranks differ in a tensor that cannot be written.
        """
        if transport.world == 1:
            return
        tensors = [local(t) for t in self.tensors().values()]
        tensors = [tensor for tensor in tensors if tensor.numel()]
        mine = zlib.crc32(b"")
        for tensor in tensors:
            mine = zlib.crc32(_bytes_of(tensor).numpy(), mine)  # type: ignore[arg-type]
        said = transport.all_gather(
            torch.tensor([mine], dtype=torch.int64).view(torch.uint8)
        )
        if len({bytes(one.numpy()) for one in said}) == 1:
            return
        for some in _portions(tensors):
            parts = [_bytes_of(tensor) for tensor in some]
            whole = torch.cat(parts)
            first = torch.cat(
                [
                    transport.all_gather(part if transport.rank == 0 else part[:0])[0]
                    for part in whole.split(_MESSAGE_BYTES)
                ]
            )
            sizes = [part.numel() for part in parts]
            wanted = torch.split(first, sizes)
            for tensor, part, data in zip(some, parts, wanted, strict=True):
                if not torch.equal(part, data):
                    _write(tensor, data)


def flat_view(parameter: Tensor) -> Tensor:
    """Return a view of all elements in memory order.

    Raises:
        AttachError: they do not lie in one block of memory.
    """
    view = parameter.as_strided((parameter.numel(),), (1,))
    by_stride = sorted(zip(parameter.stride(), parameter.shape, strict=True))
    expected = 1
    for stride, size in by_stride:
        if size != 1 and stride != expected:
            raise AttachError(
                f"a parameter of shape {list(parameter.shape)} has strides "
                f"{parameter.stride()}; make it contiguous before attach"
            )
        expected *= size
    return view


def _mark_of(parameter: Tensor) -> tuple[int, int]:
    """Return what changes when a parameter is written, or moved."""
    here = local(parameter) if isinstance(parameter, DTensor) else parameter
    return here.data_ptr(), private.version_of(here)


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Return int64[n]: sums of the bits of tensors, where they are; no host waits."""
    sums = [_words(tensor).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def together(sums: Mapping[str, Tensor]) -> int:
    """Return one number for what all tensors hold, the same for the same bits."""
    listed = checksums(sums.values()).tolist()
    text = ",".join(map(str, listed)).encode()
    return zlib.crc32(text)


def _expanded(tensor: Tensor) -> bool:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and not stride for size, stride in sizes)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    at = flat.storage_offset() * flat.element_size()
    if flat.nbytes % 8 == 0 and at % 8 == 0 and flat.element_size() < 8:
        return flat.view(torch.int64)
    return flat.view(_BITS[flat.element_size()])


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's elements in the order of its shape, uint8[*], on the CPU."""
    return tensor.contiguous().view(-1).view(torch.uint8).cpu()


def _write(tensor: Tensor, data: Tensor) -> None:
    try:
        tensor.copy_(data.clone().view(tensor.dtype).view(tensor.shape))
    except RuntimeError as error:
        raise AttachError(
            f"a tensor of shape {list(tensor.shape)} differs between the ranks and "
            f"cannot be written ({error}); make it the same everywhere before attach"
        ) from error


def _portions(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in lists of at most a message's bytes, or of one."""
    some: list[Tensor] = []
    for tensor in tensors:
        if some and sum(t.nbytes for t in some) + tensor.nbytes > _MESSAGE_BYTES:
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some
