"""Exact blocks of a chain's normal equations, one for each hidden channel, to precondition conjugate gradients by.

With two producers of 6 features and shifts for 8 hidden channels, the blocks have shape (8, 14, 14): for each channel
the 6 weights and the shift of the first producer, then those of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.distributed import all_reduced
from structprune.equations.linear_maps import LinearMap, with_intercept

BLOCK_POSITIONS = 4096  # of all parts of the samples together
MAX_BLOCK_ENTRIES = 1 << 22  # of all blocks together
# Blocks cost ``positions looked at * features`` operations a weight, and a step of conjugate gradients four a position.
# For its eight steps to be worth at least twice the blocks, the former may be this many times the positions.
MAX_EFFORT = 16


@dataclass(frozen=True, slots=True)
class ChannelBlocks:
    """Inverses of the diagonal blocks of the normal equations, one for each hidden channel.

    Attributes:
        producers: the linear maps, none of them grouped.
        inverse: shape ``(channels, features + producers, features + producers)``, where the features of all producers
            follow each other, each with its shift last.
    """

    producers: tuple[LinearMap, ...]
    inverse: Tensor

    def __call__(
        self, weights: Sequence[Tensor], shifts: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The blocks' inverse times weights and shifts of the producers, which come back in their own shapes."""
        parts: list[Tensor] = []
        for producer, weight, shift in zip(self.producers, weights, shifts, strict=True):
            matrix = producer.matrix_of(weight)[0]
            last = matrix.new_zeros(1, matrix.shape[1]) if shift is None else shift[None]
            parts += [matrix, last]
        solved = torch.einsum("cab,bc->ac", self.inverse, torch.cat(parts))
        split = solved.split([len(part) for part in parts])
        return (
            [p.weight_of(matrix[None]) for p, matrix in zip(self.producers, split[::2], strict=True)],
            [None if old is None else new[0] for old, new in zip(shifts, split[1::2], strict=True)],
        )


# For each part of the samples: inputs of the producers, and slopes of the hidden channels by the producers' results.
Passes = Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]


def channel_blocks(
    producers: tuple[LinearMap, ...],
    passes: Passes,
    power: Tensor,
    shifted: Sequence[bool],
    damping: float,
    parts: int,
) -> ChannelBlocks | None:
    """The blocks for the samples in `passes`; None where they cost too much, or a producer is grouped.

    The result moves by ``power[c]`` for a unit of hidden channel ``c``, which moves by ``slope * (w x)``. Weights of
    one channel meet in ``power[c] * sum (slope x)(slope x)^T``, with the features of all producers side by side.

    Args:
        producers: of one and the same hidden channels.
        passes: inputs and slopes.
        power: squared size of what the consumer makes of each hidden channel, shape ``(channels,)``.
        shifted: for each producer, whether it has a shift.
        damping: by what part diagonals are enlarged.
        parts: passes of all ranks.
    """
    size = sum(producer.features + 1 for producer in producers)
    channels = len(power)
    same = all(p.groups == 1 and p.outputs == channels for p in producers)
    if not same or channels * size**2 > MAX_BLOCK_ENTRIES or not _is_affordable(producers[0], passes, size, parts):
        return None
    blocks = torch.zeros(channels, size, size, dtype=torch.float64, device=power.device)
    for inputs, slopes in passes:
        total = producers[0].positions(slopes[0])
        at = spread_positions(total, BLOCK_POSITIONS // parts).to(power.device)
        features = _sloped_features(producers, inputs, slopes, shifted, at)
        blocks += (features.transpose(1, 2) @ features).double() * (total / max(1, len(at)))
    blocks = all_reduced(blocks) * power.double()[:, None, None]
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    inverse = torch.linalg.inv(blocks + torch.diag_embed(damping * diagonal + 1e-4 * positive_mean(diagonal)))
    return ChannelBlocks(producers, inverse.to(power.dtype))


def _is_affordable(producer: LinearMap, passes: Passes, features: int, parts: int) -> bool:
    """Whether the blocks are cheap beside the solve; the same on all ranks."""
    totals = [producer.positions(slopes[0]) for _, slopes in passes]
    counts = [len(spread_positions(total, BLOCK_POSITIONS // parts)) for total in totals]
    sums = torch.tensor([sum(counts), sum(totals)], dtype=torch.float64, device=passes[0][1][0].device)
    used, positions = all_reduced(sums).tolist()
    return used * features <= MAX_EFFORT * positions


def _sloped_features(
    producers: Sequence[LinearMap],
    inputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    shifted: Sequence[bool],
    at: Tensor,
) -> Tensor:
    """Slope times features for each channel and position, shape ``(channels, positions, features)``.

    The features of all producers follow each other, each with its intercept last: 1 where it has a shift, else 0.
    """
    parts: list[Tensor] = []
    for producer, x, slope, has_shift in zip(producers, inputs, slopes, shifted, strict=True):
        features = with_intercept(producer.features_at(x, at, slope.dtype), float(has_shift))[0]
        by_channel = producer.outputs_at(slope, at, slope.dtype)[0]
        parts.append(by_channel.T[:, :, None] * features)
    return torch.cat(parts, 2)


def spread_positions(total: int, limit: int) -> Tensor:
    """At most `limit` positions of `total`, at equal distances: 4 of 10 are 0, 2, 5, 7."""
    count = min(total, max(1, limit))
    return torch.arange(count) * total // max(1, count)


def positive_mean(diagonal: Tensor) -> Tensor:
    """The mean of each row of ``(groups, n)``, shape ``(groups, 1)``, raised where a group is all zeros.

    The weights of channels that are off have no effect, so that nothing in their own rows tells a scale.
    """
    mean = diagonal.mean(1, keepdim=True)
    return mean.clamp_min(1e-3 * mean.mean()).clamp_min(torch.finfo(diagonal.dtype).tiny ** 0.5)
