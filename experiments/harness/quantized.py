"""Values as codes of a few bits, each with a table of what codes stand for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lc3.transport.protocol import Transport

# From float32[n], n > 0, its codes, int64[n], and what each stands for,
# float32[2 ** bits]; of one bit: - and + the same.
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]

_SIGMAS = 6  # that codes by statistics span


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return numbers of some bits each in a row, uint8[ceil(n × bits / 8)]."""
    places = torch.arange(bits)
    stream = (codes.reshape(-1, 1) >> places & 1).reshape(-1)
    stream = nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8)).sum(1).to(torch.uint8)


def unpacked(data: Tensor, bits: int, count: int) -> Tensor:
    """Return ``count`` numbers of what ``packed`` returned, int64[count]."""
    stream = (data.long().reshape(-1, 1) >> torch.arange(8) & 1).reshape(-1)
    codes = stream[: count * bits].reshape(count, bits)
    return (codes << torch.arange(bits)).sum(1)


def statistical(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes by how many σ values are from their mean, and what they stand for.

    As SparseLoCo's and MuLoCo's authors do: 2 ** bits codes span six σ, and each stands
    for the mean of its values.

    Args:
        x: float32[*].
        bits: bits of a code.

    Returns:
        codes: int64[n], 0 to 2 ** bits - 1.
        table: float32[2 ** bits], less the mean.
        mean: float32[].
    """
    count = 2**bits
    mean = x.mean()
    centred = (x - mean).reshape(-1)
    sigma = centred.norm() / max(1, centred.numel() - 1) ** 0.5
    scale = _SIGMAS * sigma / count
    if not (scale > 0 and scale.isfinite()):
        scale = torch.ones_like(scale)
    codes = (centred / scale + count // 2).round().clamp(0, count - 1).long()
    sums = centred.new_zeros(count).index_add_(0, codes, centred)
    return codes, sums / codes.bincount(minlength=count).clamp(min=1), mean


def two_hops(
    transport: Transport,
    tensors: Sequence[Tensor],
    quantize: Quantize,
    owed: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return means over ranks that travel quantized, to owners and from them.

    Rank r owns the r-th part of every tensor. Collective.

    Args:
        transport: between the ranks.
        tensors: float32[*], contiguous; what a code does not say is left in them.
        quantize: quantizer of a tensor, and of an owner's part of a mean.
        owed: float32[part], what owners have left; added, and left anew. Default: what
            owners lose is lost.

    Returns:
        means: means in the shapes of ``tensors``, the same on every rank.
        push: the message to each rank.
        pull: the message to all.
    """
    world, rank = transport.world, transport.rank
    messages: list[list[Tensor]] = [[] for _ in range(world)]
    bits = 0
    for tensor in tensors:
        codes, table = quantize(tensor.reshape(-1))
        bits = len(table).bit_length() - 1
        tensor.view(-1).sub_(table[codes])
        for message, part in zip(messages, codes.tensor_split(world), strict=True):
            if part.numel():
                message += [packed(part, bits), _sent(table)]
    nothing = torch.empty(0, dtype=torch.uint8)
    push = [torch.cat([nothing, *message]) for message in messages]
    parts = [[p.numel() for p in t.view(-1).tensor_split(world)] for t in tensors]
    mine = [sizes[rank] for sizes in parts]
    sums = [torch.zeros(size) for size in mine]
    for arrived in transport.all_to_all(push):
        for total, values in zip(sums, _values(arrived, bits, mine), strict=True):
            total += values
    pulled: list[Tensor] = []
    for index, total in enumerate(sums):
        total /= world
        if owed:
            total += owed[index]
        if not total.numel():
            continue
        codes, table = quantize(total)
        pulled += [packed(codes, bits), _sent(table)]
        if owed:
            owed[index].copy_(total).sub_(table[codes])
    pull = torch.cat([nothing, *pulled])
    found: list[list[Tensor]] = [[] for _ in tensors]
    for owner, said in enumerate(transport.all_gather(pull)):
        sizes = [of_tensor[owner] for of_tensor in parts]
        for place, values in zip(found, _values(said, bits, sizes), strict=True):
            place.append(values)
    means = [
        torch.cat(place).view_as(tensor)
        for place, tensor in zip(found, tensors, strict=True)
    ]
    return means, push, pull


def _sent(table: Tensor) -> Tensor:
    """Return the bytes of a table; of one bit one magnitude is enough."""
    return (table[1:] if len(table) == 2 else table).contiguous().view(torch.uint8)


def _values(message: Tensor, bits: int, sizes: Sequence[int]) -> list[Tensor]:
    """Return the values of the parts in a message, of these sizes."""
    found, at = [], 0
    for size in sizes:
        if not size:
            found.append(torch.empty(0))
            continue
        middle = at + -(-size * bits // 8)
        end = middle + 4 * (1 if bits == 1 else 2**bits)
        table = message[middle:end].clone().view(torch.float32)
        if bits == 1:
            table = torch.cat([-table, table])
        found.append(table[unpacked(message[at:middle], bits, size)])
        at = end
    return found
