"""From entries of tensors and positions of sites to one score a channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from structprune.checking import Check, one_of, require
from structprune.coupling.groups import Group, Member

REDUCTIONS = ("sum", "mean", "max", "prod", "first")


REDUCTION: Check = one_of(REDUCTIONS)


def reduced(parts: Sequence[tuple[Tensor, Tensor]], how: str, channels: int) -> Tensor:
    """One score a channel from several.

    Args:
        parts: pairs of scores, shape ``(channels,)``, and whether each channel has one there, same shape.
        how: ``"sum"``, ``"mean"``, ``"max"``, ``"prod"`` or ``"first"``, over those parts that have a score.
        channels: how many there are.

    Example:
        >>> import torch
        >>> here = torch.tensor([True, True])
        >>> reduced([(torch.tensor([1.0, 2.0]), here), (torch.tensor([5.0, 0.0]), here)], "max", 2)
        tensor([5., 2.])
    """
    require(locals(), how=REDUCTION)
    if not parts:
        return torch.zeros(channels)
    device, kind = parts[0][0].device, parts[0][0].dtype
    scores = torch.stack([score.to(device, kind) for score, _ in parts])
    here = torch.stack([present.to(device) for _, present in parts])
    if how == "max":
        best = scores.masked_fill(~here, -torch.inf).amax(0)
        return torch.where(here.any(0), best, 0)
    if how == "prod":
        return torch.where(here.any(0), scores.masked_fill(~here, 1).prod(0), 0)
    if how == "first":
        first = here.to(torch.uint8).argmax(0, keepdim=True)
        return torch.where(here.any(0), scores.gather(0, first)[0], 0)
    total = scores.masked_fill(~here, 0).sum(0)
    return total / here.sum(0).clamp(min=1) if how == "mean" else total


def gathered(
    values: Tensor, positions: Tensor, channels: Tensor, count: int, *, mean: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum (or mean) of `values` at the positions of each channel, and which channels have any."""
    number = torch.bincount(channels, minlength=count)
    total = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, channels, values[positions])
    return (total / number.clamp(min=1).to(total.dtype) if mean else total), number > 0


def indices(member: Member, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions and channels of a member as tensors."""
    return torch.from_numpy(member.positions).to(device), torch.from_numpy(member.channels).to(device)


def along(entries: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but `dim`."""
    return entries.movedim(dim, 0).flatten(1).sum(1) if entries.dim() > 1 else entries


def member_sums(group: Group, entries: Callable[[str], Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each member, the sum over each channel's slice of the entries, and which channels have a slice.

    Args:
        group: the channels.
        entries: entries of the tensor of this name, in its shape; None to leave it out.
    """
    for member in group.members:
        found = entries(member.tensor)
        if found is not None:
            positions, channels = indices(member, found.device)
            yield gathered(along(found, member.dim), positions, channels, group.channels)


def padded(positions: Tensor, channels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The positions of each channel as a rectangle, shape ``(count, most)``, and which of its entries are real."""
    order = torch.argsort(channels, stable=True)
    number = torch.bincount(channels, minlength=count)
    start = torch.cumsum(number, 0) - number
    rank = torch.arange(len(order), device=order.device) - start[channels[order]]
    most = int(number.max()) if len(order) else 0
    table = torch.zeros(count, most, dtype=torch.int64, device=positions.device)
    real = torch.zeros(count, most, dtype=torch.bool, device=positions.device)
    table[channels[order], rank] = positions[order]
    real[channels[order], rank] = True
    return table, real


def floating(weight: Tensor) -> Tensor:
    """`weight` without gradient, in float32 if it is narrower."""
    weight = weight.detach()
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
