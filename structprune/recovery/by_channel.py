"""A preconditioner that is exact within each hidden channel: all weights that make it in one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.ranks import all_reduced
from structprune.recovery.linear_maps import LinearMap

ENTRIES = 1 << 22  # of all blocks together
# Gathering them costs rows * features operations a weight, and a step of conjugate gradients four a position; for their
# eight steps to be worth at least twice the gathering, rows * features may be this many times the positions.
EFFORT = 16
ROWS = 4096  # positions of all batches together


@dataclass(frozen=True, slots=True)
class ChannelBlocks:
    """Inverses of the diagonal blocks of the normal equations, one a hidden channel.

    Attributes:
        producers: the linear maps, none of them grouped.
        inverse: shape ``(channels, features + producers, features + producers)``; features of all producers one behind
            the other, each with its shift last.
    """

    producers: tuple[LinearMap, ...]
    inverse: Tensor

    def __call__(
        self, weights: Sequence[Tensor], shifts: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The blocks' inverse times weights and shifts of the producers, which come back in their own shapes."""
        parts: list[Tensor] = []
        for producer, weight, shift in zip(self.producers, weights, shifts, strict=True):
            matrix = producer.form.matrix(weight)[0]
            last = matrix.new_zeros(1, matrix.shape[1]) if shift is None else shift[None]
            parts += [matrix, last]
        solved = torch.einsum("cab,bc->ac", self.inverse, torch.cat(parts))
        found = solved.split([len(part) for part in parts])
        return (
            [p.form.weight(own[None]) for p, own in zip(self.producers, found[::2], strict=True)],
            [None if old is None else new[0] for old, new in zip(shifts, found[1::2], strict=True)],
        )


def channel_blocks(
    producers: tuple[LinearMap, ...],
    passes: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    power: Tensor,
    shifted: Sequence[bool],
    damping: float,
) -> ChannelBlocks | None:
    """The blocks for what `passes` saw; None where they cost too much, or a producer is grouped.

    The result moves by ``power[c]`` for a unit of hidden channel ``c``, which moves by ``slope * (w x)``. Weights of
    one channel meet in ``power[c] * sum (slope x)(slope x)^T``, with the features of all producers side by side.

    Args:
        producers: of one and the same hidden channels.
        passes: for each batch, the inputs of the producers, and the slopes of the hidden channels by their results.
        power: squared size of what the consumer makes of each hidden channel.
        shifted: for each producer, whether it has a shift.
        damping: by what part diagonals are enlarged.
    """
    sizes = [producer.form.features + 1 for producer in producers]
    channels = len(power)
    same = all(p.form.groups == 1 and p.form.weight_outputs == channels for p in producers)
    if not same or channels * sum(sizes) ** 2 > ENTRIES:
        return None
    if not _affordable(producers[0], passes, sum(sizes)):
        return None
    blocks = torch.zeros(channels, sum(sizes), sum(sizes), dtype=torch.float64, device=power.device)
    for inputs, slopes in passes:
        total = producers[0].form.positions(slopes[0])
        wanted = _wanted(total, len(passes))
        at = torch.arange(wanted, device=power.device) * total // wanted
        features = _features(producers, inputs, slopes, shifted, at)
        blocks += (features.transpose(1, 2) @ features).double() * (total / wanted)
    blocks = all_reduced(blocks) * power.double()[:, None, None]
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # A channel that is off has nothing of its own to go by.
    mean = mean.clamp_min(1e-3 * mean.mean()).clamp_min(torch.finfo(blocks.dtype).tiny ** 0.5)
    inverse = torch.linalg.inv(blocks + torch.diag_embed(damping * diagonal + 1e-4 * mean))
    return ChannelBlocks(producers, inverse.to(power.dtype))


def _wanted(total: int, passes: int) -> int:
    """How many of the positions of one batch are looked at."""
    return max(1, min(total, ROWS // passes))


def _affordable(
    producer: LinearMap, passes: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], features: int
) -> bool:
    """Whether gathering the blocks is cheap beside solving with them; the same on all ranks."""
    totals = [producer.form.positions(slopes[0]) for _, slopes in passes]
    rows = [_wanted(total, len(passes)) for total in totals]
    counts = torch.tensor([sum(rows), sum(totals)], dtype=torch.float64, device=passes[0][1][0].device)
    looked, positions = all_reduced(counts).tolist()
    return looked * features <= EFFORT * positions


def _features(
    producers: Sequence[LinearMap],
    inputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    shifted: Sequence[bool],
    at: Tensor,
) -> Tensor:
    """Slope times features for each channel and position, shape ``(channels, positions, features)``."""
    parts: list[Tensor] = []
    for producer, x, slope, moves in zip(producers, inputs, slopes, shifted, strict=True):
        rows = producer.form.rows(x, at)[0].to(slope.dtype)
        rows = torch.cat([rows, rows.new_full((len(rows), 1), float(moves))], 1)
        across = producer.form.outputs(slope, at)[0].to(slope.dtype)
        parts.append(across.T[:, :, None] * rows)
    return torch.cat(parts, 2)
