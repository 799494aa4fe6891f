"""What conjugate gradients are preconditioned with: one Kronecker product for each layer of a chain.

Where it is small enough, the producers' part is exact within each hidden channel instead (`by_channel`).

Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015 (section 3.1): the
second moments of a layer's features, times those of what its results do to the end of the chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from structprune.ranks import all_reduced
from structprune.recovery.by_channel import ChannelBlocks, channel_blocks
from structprune.recovery.chain import Chain, Linearised, Weights
from structprune.recovery.linear_maps import LinearMap

MOMENT_ROWS = 8192  # positions that the moments are taken of


@dataclass(slots=True)
class _Factors:
    """Of one layer: the inverses of the second moments of its features, and of the slopes of its results."""

    form: LinearMap
    features: Tensor | None  # (groups, features + 1, features + 1), the intercept last; None where there are blocks
    outputs: Tensor | None  # (groups, outputs, outputs)
    damping: Tensor  # (groups, features + 1, outputs)


@dataclass(slots=True)
class Curvature:
    """The preconditioner, and the damping of each number."""

    at: Weights
    layers: list[_Factors]
    damping: Tensor
    blocks: ChannelBlocks | None

    @classmethod
    def of(cls, lines: list[Linearised], damping: float, blocks: ChannelBlocks | None = None) -> Curvature:
        """The curvature at the weights at which a chain is linearised on all batches; older `blocks` do."""
        at, chain = lines[0].at, lines[0].chain
        if blocks is None:
            passes = [(line.batch.inputs, line.slopes) for line in lines]
            shifted = [shift is not None for shift in at.shifts[:-1]]
            blocks = channel_blocks(chain.producers, passes, _power(lines[0]), shifted, damping)
        layers: list[_Factors] = []
        for place, producer in enumerate(chain.producers):
            moments, meets = _moments(producer, lines, place)
            layers.append(_factors(producer, moments, _gram(chain, lines, place, meets), damping, blocks is None))
        moments, _ = _moments(chain.consumer, lines, None)
        layers.append(_factors(chain.consumer, moments, None, damping))
        weights, shifts = zip(*(_split(layer, layer.damping) for layer in layers), strict=True)
        kept = [None if have is None else shift for have, shift in zip(at.shifts, shifts, strict=True)]
        return cls(at, layers, Weights(list(weights), kept).flat().to(at.weights[-1].dtype), blocks)

    def inverse(self, vector: Tensor) -> Tensor:
        """What conjugate gradients are preconditioned with."""
        given = self.at.like(vector)
        weights: list[Tensor] = []
        shifts: list[Tensor | None] = []
        for layer, weight, shift in zip(self.layers, given.weights, given.shifts, strict=True):
            if layer.features is None:
                weights.append(weight)
                shifts.append(shift)
                continue
            matrix = layer.form.form.matrix(weight)
            last = matrix.new_zeros(matrix.shape[0], 1, matrix.shape[2])
            if shift is not None:
                last = shift.reshape(matrix.shape[0], 1, -1)
            matrix = layer.features.to(matrix.dtype) @ torch.cat([matrix, last], 1)
            if layer.outputs is not None:
                matrix = matrix @ layer.outputs.to(matrix.dtype)
            own, moved = _split(layer, matrix)
            weights.append(own)
            shifts.append(None if shift is None else moved)
        if self.blocks is not None:
            weights[:-1], shifts[:-1] = self.blocks(given.weights[:-1], given.shifts[:-1])
        return Weights(weights, shifts).flat()


def _power(line: Linearised) -> Tensor:
    """Squared size of what the consumer makes of a unit of each hidden channel, shape ``(channels,)``."""
    form = line.chain.consumer.form
    matrix = form.matrix(line.at.weights[-1])
    seen = form.positions(line.batch.goal) / line.chain.producers[0].form.positions(line.slopes[0])
    return matrix.reshape(matrix.shape[0], matrix.shape[1] // prod(form.kernel), -1).square().sum(2).flatten() * seen


def _split(layer: _Factors, matrix: Tensor) -> tuple[Tensor, Tensor]:
    return layer.form.form.weight(matrix[:, :-1]), matrix[:, -1].flatten()


def _positions(total: int, batches: int) -> Tensor:
    """Evenly spread positions of one batch."""
    wanted = max(1, min(total, MOMENT_ROWS // batches))
    return torch.arange(wanted) * total // wanted


def _moments(layer: LinearMap, lines: list[Linearised], place: int | None) -> tuple[Tensor, Tensor]:
    """Second moments of a layer's features (times all positions), and of the slopes of its results (their mean)."""
    xx: Tensor | None = None
    meets: Tensor | None = None
    count = torch.zeros((), dtype=torch.float64, device=lines[0].batch.goal.device)
    for line in lines:
        result = line.batch.goal if place is None else line.slopes[place]
        total = layer.form.positions(result)
        at = _positions(total, len(lines)).to(result.device)
        x = layer.form.rows(line.hidden if place is None else line.batch.inputs[place], at)
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        own = x.transpose(1, 2) @ x * (total / len(at))
        xx = own if xx is None else xx + own
        slope = layer.form.outputs(result, at) if place is not None else x[..., :0]
        own = slope.transpose(1, 2) @ slope
        count += len(at)
        meets = own if meets is None else meets + own
    assert xx is not None
    assert meets is not None
    all_reduced(xx)
    all_reduced(meets)
    return xx, meets / all_reduced(count)


def _gram(chain: Chain, lines: list[Linearised], place: int, meets: Tensor) -> Tensor:
    """How the results of a producer's outputs overlap behind the consumer, shape ``(groups, outputs, outputs)``."""
    form = chain.consumer.form
    matrix = form.matrix(lines[0].at.weights[-1]).double()
    groups, features, outputs = matrix.shape
    inputs = features // prod(form.kernel)
    rows = matrix.reshape(groups, inputs, -1, outputs).flatten(2)
    whole = torch.block_diag(*(rows @ rows.transpose(1, 2)))
    own = meets.shape[0]
    blocks = whole.reshape(own, meets.shape[1], own, meets.shape[1]).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    line = lines[0]
    seen = form.positions(line.batch.goal) / chain.producers[place].form.positions(line.slopes[place])
    return blocks * meets * seen


def _factors(
    layer: LinearMap, moments: Tensor, outputs: Tensor | None, damping: float, inverted: bool = True
) -> _Factors:
    diagonal = moments.diagonal(dim1=1, dim2=2)
    if outputs is None:
        scale = torch.ones(moments.shape[0], layer.form.weight_outputs, dtype=moments.dtype, device=moments.device)
    else:
        scale = outputs.diagonal(dim1=1, dim2=2)
    penalty = damping * (diagonal[..., None] * scale[:, None, :])
    penalty[:, -1] *= 1e-2
    if not inverted:
        return _Factors(layer, None, None, penalty)
    right = None if outputs is None else _inverse(outputs, 1e-3)
    return _Factors(layer, _inverse(moments, damping + 1e-6), right, penalty)


def _inverse(matrix: Tensor, ridge: float) -> Tensor:
    """The inverse of symmetric matrices with a ridge that keeps it finite."""
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    # A group whose channels are all off has nothing of its own to go by.
    mean = mean.clamp_min(1e-3 * mean.mean()).clamp_min(torch.finfo(matrix.dtype).tiny ** 0.5)
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.inv(matrix + ridge * mean[:, None, None] * eye)
