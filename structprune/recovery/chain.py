"""Producers and a consumer as one function of their weights, and its linearisation with the adjoint written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.ranks import all_reduced
from structprune.recovery.linear_maps import LinearMap

Between = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """What the piece is solved on: the inputs of the producers, what is added to the result, and what it has to be."""

    inputs: tuple[Tensor, ...]
    rest: Tensor
    goal: Tensor


@dataclass(slots=True)
class Weights:
    """Weights and shifts of all layers of a piece, the consumer last; a shift is None where nothing can take it up."""

    weights: list[Tensor]
    shifts: list[Tensor | None]

    def flat(self) -> Tensor:
        """All numbers in one vector."""
        parts = [w.flatten() for w in self.weights] + [s for s in self.shifts if s is not None]
        return torch.cat(parts)

    def like(self, vector: Tensor) -> Weights:
        """The numbers of `vector` in the same places."""
        have = [*self.weights, *(s for s in self.shifts if s is not None)]
        parts = iter(part.view(h.shape) for part, h in zip(vector.split([h.numel() for h in have]), have, strict=True))
        weights = [next(parts) for _ in self.weights]
        return Weights(weights, [None if s is None else next(parts) for s in self.shifts])


@dataclass(frozen=True, slots=True)
class Chain:
    """A piece as a function of its weights.

    Attributes:
        producers: their linear maps.
        between: from the producers' results to the consumer's input, entry by entry.
        consumer: its linear map.
        behind: what is done to each entry of the result before anything else sees it.
    """

    producers: tuple[LinearMap, ...]
    between: Between
    consumer: LinearMap
    behind: Between

    def results(self, batch: Batch, at: Weights) -> list[Tensor]:
        """What the producers give."""
        parts = zip(self.producers, batch.inputs, at.weights[:-1], at.shifts[:-1], strict=True)
        return [producer(x, weight, shift) for producer, x, weight, shift in parts]

    def whole(self, batch: Batch, at: Weights) -> Tensor:
        """The result with what is added to it."""
        return batch.rest + self.consumer(self.between(self.results(batch, at)), at.weights[-1], at.shifts[-1])

    def error(self, batches: Sequence[Batch], at: Weights) -> float:
        """Sum of squares of what is missing, over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=at.weights[-1].device)
        for batch in batches:
            total += (self.behind([batch.goal]) - self.behind([self.whole(batch, at)])).double().square().sum()
        return float(all_reduced(total))


@dataclass(slots=True)
class Linearised:
    """A chain linearised at some weights, on one batch.

    Attributes:
        chain, batch, at: what is linearised, on what, and where.
        hidden: the consumer's input.
        slopes: of the consumer's input, by each producer's result.
        last: slopes of what is behind the result.
    """

    chain: Chain
    batch: Batch
    at: Weights
    hidden: Tensor
    slopes: list[Tensor]
    last: Tensor

    def forward(self, step: Weights) -> Tensor:
        """The change of the result."""
        parts = zip(
            self.chain.producers, self.batch.inputs, step.weights[:-1], step.shifts[:-1], self.slopes, strict=True
        )
        moved = torch.stack([producer(x, w, s) * slope for producer, x, w, s, slope in parts]).sum(0)
        consumer = self.chain.consumer
        change = consumer(moved, self.at.weights[-1]) + consumer(self.hidden, step.weights[-1], step.shifts[-1])
        return change * self.last

    def adjoint(self, grad: Tensor) -> Tensor:
        """From something like the result to a vector of all weights."""
        consumer, last = self.chain.consumer, self.at.weights[-1]
        weights: list[Tensor] = []
        shifts: list[Tensor | None] = []
        grad = grad * self.last
        back = consumer.to_input(grad, self.hidden, last)
        parts = zip(
            self.chain.producers, self.batch.inputs, self.at.weights[:-1], self.at.shifts[:-1], self.slopes, strict=True
        )
        for producer, x, weight, shift, slope in parts:
            own = back * slope
            weights.append(producer.to_weight(own, x, weight))
            shifts.append(None if shift is None else producer.to_shift(own))
        weights.append(consumer.to_weight(grad, self.hidden, last))
        shifts.append(None if self.at.shifts[-1] is None else consumer.to_shift(grad))
        return Weights(weights, shifts).flat()
