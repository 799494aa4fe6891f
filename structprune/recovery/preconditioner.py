"""The preconditioner of the conjugate gradients: an approximate inverse of a chain's normal equations.

Each layer has a Kronecker product: the second moments of its features, times those of what its results do to the end of
the chain (Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015, section
3.1). Where they are small enough, the producers have exact blocks instead, one for each hidden channel, over all
weights that make it: of a gated layer the rows of gate and up projection meet in one block.

Where the features of a layer are the windows of a long kernel, their moments are inverted by frequency
(`window_moments`), and not in sections.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from structprune.distributed import all_reduced
from structprune.equations.least_squares import second_moments
from structprune.equations.linear_maps import LinearMap, with_intercept
from structprune.equations.window_moments import WindowInverse, WindowMoments, has_window_moments
from structprune.recovery.chain import Chain, ChainWeights, LinearisedChain
from structprune.recovery.channel_blocks import ChannelBlocks, channel_blocks, positive_mean, spread_positions

MOMENT_POSITIONS = 8192  # of all parts of the samples together, for the moments
MAX_FEATURES = 1536  # of a matrix of moments; of more features there are several, one for each section of them

Moments = Tensor | WindowMoments  # of the features of a layer: in sections, or by frequency


@dataclass(slots=True)
class _KroneckerFactors:
    """Of one layer of a chain.

    Attributes:
        map: the layer.
        features: inverse second moments of its features with the intercept last, in sections as `_sections` makes
            them, shape ``(groups * sections, size, size)``, or by frequency; None where blocks take its place.
        outputs: inverse second moments of the slopes of its results, shape ``(groups, outputs, outputs)``; None for the
            identity.
        damping: of each weight, shape ``(groups, features + 1, outputs)``.
    """

    map: LinearMap
    features: Tensor | WindowInverse | None
    outputs: Tensor | None
    damping: Tensor

    def apply(self, weight: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The approximate inverse times a weight and a shift, which come back in their own shapes."""
        if self.features is None:
            return weight, shift
        matrix = self.map.matrix_of(weight)
        last = matrix.new_zeros(matrix.shape[0], 1, matrix.shape[2])
        if shift is not None:
            last = shift.reshape(matrix.shape[0], 1, -1)
        if isinstance(self.features, WindowInverse):
            solved, new_last = self.features.with_intercept(matrix[0], last[0, 0])
            matrix = torch.cat([solved, new_last[None]])[None]
        else:
            matrix = torch.cat([matrix, last], 1)
            size = matrix.shape[1]
            matrix = self.features.to(matrix.dtype) @ _sections(matrix)
            matrix = matrix.reshape(last.shape[0], -1, last.shape[2])[:, :size]
        if self.outputs is not None:
            matrix = matrix @ self.outputs.to(matrix.dtype)
        new_weight, new_shift = _weight_and_shift(self.map, matrix)
        return new_weight, None if shift is None else new_shift


@dataclass(slots=True)
class Preconditioner:
    """An approximate inverse of the damped normal equations.

    Attributes:
        at: the weights at which the chain is linearised.
        factors: of each layer, the consumer last.
        damping: of each number, in the order of ``at.flat()``.
        blocks: for the producers, in place of their factors; or None.
        moments: of each layer, as `_moments` gives them.
        samples: of all ranks, that these are sums over.
    """

    at: ChainWeights
    factors: list[_KroneckerFactors]
    damping: Tensor
    blocks: ChannelBlocks | None
    moments: list[tuple[Moments, Tensor]]
    samples: int

    @classmethod
    def of(cls, lines: list[LinearisedChain], damping: float, known: Preconditioner | None = None) -> Preconditioner:
        """The preconditioner for a chain.

        Args:
            lines: the chain, linearised at the same weights on each part of the samples.
            damping: by what part diagonals are enlarged.
            known: one for other weights nearby, whose blocks and moments are taken; they change little. If it is for
                a part of the samples only, the damping grows with their number, as the normal equations do.
        """
        at, chain = lines[0].at, lines[0].chain
        parts = 0 if known is not None else _parts_of_all(lines)
        blocks = None if known is None else known.blocks
        if known is None:
            shifted = [shift is not None for shift in at.shifts[:-1]]
            passes = [(line.samples.inputs, line.slopes) for line in lines]
            blocks = channel_blocks(chain.producers, passes, _consumer_power(lines[0]), shifted, damping, parts)
        factors: list[_KroneckerFactors] = []
        places = [*enumerate(chain.producers), (None, chain.consumer)]
        seen = [_moments(layer, lines, place, parts) for place, layer in places] if known is None else known.moments
        for place, producer in enumerate(chain.producers):
            moments, slope_moments = seen[place]
            overlap = _output_overlap(chain, lines[0], place, slope_moments)
            shifted = at.shifts[place] is not None
            factors.append(_factors(producer, moments, overlap, damping, shifted, blocks is None))
        factors.append(_factors(chain.consumer, seen[-1][0], None, damping, at.shifts[-1] is not None))
        weights, shifts = zip(*(_weight_and_shift(each.map, each.damping) for each in factors), strict=True)
        present = [None if have is None else shift for have, shift in zip(at.shifts, shifts, strict=True)]
        samples = int(all_reduced(torch.tensor(sum(len(line.samples.goal) for line in lines))))
        measured = samples if known is None else known.samples
        flat = ChainWeights(list(weights), present).flat().to(at.weights[-1].dtype) * (samples / max(1, measured))
        return cls(at, factors, flat, blocks, seen, measured)

    def inverse(self, vector: Tensor) -> Tensor:
        """The approximate inverse times a vector, both in the order of ``at.flat()``."""
        given = self.at.like(vector)
        weights: list[Tensor] = []
        shifts: list[Tensor | None] = []
        for each, weight, shift in zip(self.factors, given.weights, given.shifts, strict=True):
            new_weight, new_shift = each.apply(weight, shift)
            weights.append(new_weight)
            shifts.append(new_shift)
        if self.blocks is not None:
            weights[:-1], shifts[:-1] = self.blocks(given.weights[:-1], given.shifts[:-1])
        return ChainWeights(weights, shifts).flat()


def _weight_and_shift(layer: LinearMap, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix ``(groups, features + 1, outputs)`` as a weight in its own shape and a shift ``(channels,)``."""
    return layer.weight_of(matrix[:, :-1]), matrix[:, -1].flatten()


# -- Kronecker factors -----------------------------------------------------------------------------------------------


def _consumer_power(line: LinearisedChain) -> Tensor:
    """Squared size of what the consumer makes of a unit of each hidden channel, shape ``(channels,)``.

    It is per position of the producers; a consumer of stride 2 has a fourth of their positions.
    """
    consumer = line.chain.consumer
    matrix = consumer.matrix_of(line.at.weights[-1])
    share = _positions_by_sample(consumer, line.samples.goal) / _positions_by_sample(
        line.chain.producers[0], line.slopes[0]
    )
    by_channel = matrix.reshape(matrix.shape[0], matrix.shape[1] // prod(consumer.kernel), -1)
    return by_channel.square().sum(2).flatten() * share


def _parts_of_all(lines: list[LinearisedChain]) -> int:
    """How many parts the samples of all ranks have; one without samples does not count."""
    return int(all_reduced(torch.tensor(sum(len(line.samples.goal) > 0 for line in lines))))


def _positions_by_sample(layer: LinearMap, result: Tensor) -> int:
    """Positions of each sample of a layer's result, which may have none: 25 for (0, 4, 5, 5)."""
    return prod(result.shape[1:]) // result.shape[layer.channel_dim]


def _sections(features: Tensor) -> Tensor:
    """Features in sections of at most `MAX_FEATURES`: ``(groups, features, n)`` as ``(groups * sections, size, n)``.

    8193 features are 6 sections of 1366, with three zeros behind the last feature. Moments of features in different
    sections are left out: to invert the whole matrix would cost more than all that the preconditioner saves.
    """
    groups, count, n = features.shape
    number = -(-count // MAX_FEATURES)
    size = -(-count // number)
    padded = torch.nn.functional.pad(features, (0, 0, 0, number * size - count)) if number > 1 else features
    return padded.reshape(groups * number, size, n)


def _moments(layer: LinearMap, lines: list[LinearisedChain], place: int | None, parts: int) -> tuple[Moments, Tensor]:
    """Second moments of a layer's features (a sum over all positions), and of the slopes of its results (a mean).

    Args:
        layer: a producer or the consumer.
        lines: the linearised chain on each part of the samples.
        place: number of the producer; None for the consumer.
        parts: of the samples of all ranks.

    Returns:
        Shapes ``(groups * sections, size, size)``, as of `_sections`, and ``(groups, outputs, outputs)``, the latter
        empty for the consumer. Those of many features are by frequency, where the layer has spectra.
    """
    inputs = [line.hidden if place is None else line.samples.inputs[place] for line in lines]
    by_frequency = layer.features > MAX_FEATURES and has_window_moments(layer, inputs)
    device = lines[0].samples.goal.device
    count = torch.zeros((), dtype=torch.float64, device=device)
    size = 0 if place is None else layer.outputs
    slope_moments = torch.zeros(layer.groups, size, size, dtype=torch.float64, device=device)
    xx: Tensor | None = None
    for line, given in zip(lines, inputs, strict=True):
        result = line.samples.goal if place is None else line.slopes[place]
        total = layer.positions(result)
        at = spread_positions(total, MOMENT_POSITIONS // parts).to(result.device)
        if not by_frequency:
            x = with_intercept(layer.features_at(given, at, given.dtype))
            products = second_moments(_sections(x.transpose(1, 2)).transpose(1, 2)) * (total / max(1, len(at)))
            xx = products if xx is None else xx + products
        if place is not None:
            slope_moments += second_moments(layer.outputs_at(result, at, result.dtype))
        count += len(at)
    moments = WindowMoments.of(layer, inputs) if xx is None else all_reduced(xx)
    return moments, all_reduced(slope_moments) / all_reduced(count)


def _output_overlap(chain: Chain, line: LinearisedChain, place: int, slope_moments: Tensor) -> Tensor:
    """How the effects of a producer's outputs overlap behind the consumer, shape ``(groups, outputs, outputs)``.

    A consumer with two groups and weight (6, 4, 3, 3) takes 2 * 4 = 8 hidden channels: `gram` is (8, 8), with zeros
    between the groups. For a producer with four groups of 2 outputs, the result is its four diagonal blocks (2, 2).
    """
    consumer = chain.consumer
    matrix = consumer.matrix_of(line.at.weights[-1]).double()
    groups, features, outputs = matrix.shape
    rows = matrix.reshape(groups, features // prod(consumer.kernel), -1, outputs).flatten(2)
    gram = torch.block_diag(*(rows @ rows.transpose(1, 2)))
    count, size = slope_moments.shape[:2]
    blocks = gram.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    producer = chain.producers[place]
    share = _positions_by_sample(consumer, line.samples.goal) / _positions_by_sample(producer, line.slopes[place])
    return blocks * slope_moments * share


def _factors(
    layer: LinearMap, moments: Moments, overlap: Tensor | None, damping: float, shifted: bool, inverted: bool = True
) -> _KroneckerFactors:
    """The factors of a layer.

    Args:
        layer: the layer.
        moments: of its features.
        overlap: of its outputs; None for the consumer.
        damping: by what part diagonals are enlarged.
        shifted: whether there is a shift.
        inverted: whether inverses are needed.
    """
    if isinstance(moments, WindowMoments):
        diagonal = torch.cat([moments.diagonal.flatten(), moments.diagonal.new_full((1,), moments.count)])[None]
    else:
        diagonal = moments.diagonal(dim1=1, dim2=2).reshape(layer.groups, -1)[:, : layer.features + 1]
    if overlap is None:
        scale = torch.ones(layer.groups, layer.outputs, dtype=diagonal.dtype, device=diagonal.device)
    else:
        scale = overlap.diagonal(dim1=1, dim2=2)
    penalty = damping * (diagonal[..., None] * scale[:, None, :])
    penalty[:, -1] *= 1e-2
    if not inverted:
        return _KroneckerFactors(layer, None, None, penalty)
    outputs = None if overlap is None else _inverse(overlap, 1e-3)
    if isinstance(moments, WindowMoments):
        inverse = moments.inverse(moments.penalty(damping + 1e-6, shifted), shifted)
        return _KroneckerFactors(layer, inverse, outputs, penalty)
    return _KroneckerFactors(layer, _inverse(moments, damping + 1e-6), outputs, penalty)


def _inverse(matrix: Tensor, ridge: float) -> Tensor:
    """The inverse of symmetric matrices ``(groups, n, n)`` with a ridge that keeps it finite."""
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    mean = positive_mean(matrix.diagonal(dim1=1, dim2=2))
    return torch.linalg.inv(matrix + ridge * mean[:, :, None] * eye)
