"""Producers and consumer solved together: Gauss-Newton through what stands between them.

The result of a consumer is ``y = B(f(A_1 x_1, A_2 x_2, ...))`` with linear ``A_i`` (the producers) and ``B`` and a function
``f`` that treats each entry alone (a ReLU, a norm with fixed statistics, a gate). Around the weights at hand its change is
``B(sum_i d_i * dA_i x_i) + dB(f)`` with the slopes ``d_i`` of ``f``: linear in all weights together. That linear least-squares
problem, damped as Marquardt has it, is solved by conjugate gradients with the operators and their adjoints written out;
then the slopes are taken anew. Nothing is differentiated but ``f``, and no step size has to be chosen: the damping follows
the error on samples that the problem does not hold.

Marquardt, An Algorithm for Least-Squares Estimation of Nonlinear Parameters, 1963; Hestenes and Stiefel, Methods of
Conjugate Gradients for Solving Linear Systems, 1952; the preconditioner is the Kronecker product of Martens and Grosse,
Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015 (section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from structprune.recovery.least_squares import all_reduced
from structprune.recovery.linear_maps import LinearMap
from structprune.recovery.pieces import slopes

Between = Callable[[Sequence[Tensor]], Tensor]
DAMPING = 1e-3
GAIN = 2e-3  # a round that lowers the squared error by a smaller share is the last
MOMENT_ROWS = 8192  # positions that the preconditioner is estimated on


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
class _Linear:
    """A chain linearised at some weights: one batch's hidden features and slopes."""

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


@dataclass(frozen=True, slots=True)
class Refit:
    """The weights found, with the squared error on the held-out batches before and after."""

    weights: Weights
    before: float
    after: float
    rounds: int

    @property
    def helps(self) -> bool:
        """Whether the held-out error falls."""
        return self.after < self.before


def refit(
    chain: Chain, train: Sequence[Batch], held_out: Sequence[Batch], start: Weights, rounds: int = 4, steps: int = 8
) -> Refit:
    """Weights of producers and consumer that give the goal best: damped Gauss-Newton by conjugate gradients.

    Args:
        chain: the piece.
        train: what to solve on.
        held_out: what to judge by; a step that does not lower the error here is not taken.
        start: the weights at hand; not changed.
        rounds: how often to linearise.
        steps: of conjugate gradients in each round.
    """
    before = after = chain.error(held_out, start)
    at, damping, taken = start, DAMPING, 0
    for _ in range(rounds):
        step = _step(chain, train, at, damping, steps)
        best, best_error, best_size = at, after, 0.0
        for size in (1.0, 0.5, 0.25):
            tried = at.like(at.flat() + size * step)
            error = chain.error(held_out, tried)
            if not error < best_error:
                if best_size:
                    break
                continue
            best, best_error, best_size = tried, error, size
        if best_size == 0:
            damping *= 30
            if damping > 1:
                break
            continue
        damping *= 0.3 if best_size == 1 else 3
        gain = 1 - best_error / after
        at, after, taken = best, best_error, taken + 1
        if gain < GAIN:
            break
    return Refit(at, before, after, taken)


def _step(chain: Chain, train: Sequence[Batch], at: Weights, damping: float, steps: int) -> Tensor:
    """The damped Gauss-Newton step, by preconditioned conjugate gradients on the normal equations."""
    lines: list[_Linear] = []
    goal = torch.zeros_like(at.flat())
    for batch in train:
        hidden, found = slopes(chain.between, chain.results(batch, at))
        result, last = slopes(chain.behind, [batch.rest + chain.consumer(hidden, at.weights[-1], at.shifts[-1])])
        line = _Linear(chain, batch, at, hidden, found, last[0])
        lines.append(line)
        goal += line.adjoint(chain.behind([batch.goal]) - result)
    all_reduced(goal)
    curvature = _Curvature.of(lines, damping)

    def normal(vector: Tensor) -> Tensor:
        step = at.like(vector)
        result = torch.zeros_like(vector)
        for line in lines:
            result += line.adjoint(line.forward(step))
        return all_reduced(result) + curvature.damping * vector

    return _conjugate_gradients(normal, curvature.inverse, goal, steps)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], goal: Tensor, steps: int
) -> Tensor:
    """An approximate solution of ``product(x) = goal``; inner products in float64."""
    x, rest = torch.zeros_like(goal), goal.clone()
    search = ready = inverse(rest)
    size = torch.dot(rest.double(), ready.double())
    for _ in range(steps):
        image = product(search)
        curve = torch.dot(search.double(), image.double())
        if not (float(curve) > 0 and float(size) > 0):
            break
        length = float(size / curve)
        x = x + length * search
        rest = rest - length * image
        ready = inverse(rest)
        new = torch.dot(rest.double(), ready.double())
        search = ready + float(new / size) * search
        size = new
    return x


@dataclass(slots=True)
class _Factors:
    """Of one layer: the inverses of the second moments of its features, and of the slopes of its results."""

    form: LinearMap
    features: Tensor  # (groups, features + 1, features + 1), the intercept last
    outputs: Tensor | None  # (groups, outputs, outputs)
    damping: Tensor  # (groups, features + 1, outputs)


@dataclass(slots=True)
class _Curvature:
    """The preconditioner, and the damping of each number."""

    at: Weights
    layers: list[_Factors]
    damping: Tensor

    @classmethod
    def of(cls, lines: list[_Linear], damping: float) -> _Curvature:
        at, chain = lines[0].at, lines[0].chain
        layers: list[_Factors] = []
        for place, producer in enumerate(chain.producers):
            moments, meets = _moments(producer, lines, place)
            layers.append(_factors(producer, moments, _gram(chain, lines, place, meets), damping))
        moments, _ = _moments(chain.consumer, lines, None)
        layers.append(_factors(chain.consumer, moments, None, damping))
        weights, shifts = zip(*(_split(layer, layer.damping) for layer in layers), strict=True)
        kept = [None if have is None else shift for have, shift in zip(at.shifts, shifts, strict=True)]
        dtype = at.weights[-1].dtype
        return cls(at, layers, Weights(list(weights), kept).flat().to(dtype))

    def inverse(self, vector: Tensor) -> Tensor:
        """What conjugate gradients are preconditioned with."""
        given = self.at.like(vector)
        weights: list[Tensor] = []
        shifts: list[Tensor | None] = []
        for layer, weight, shift in zip(self.layers, given.weights, given.shifts, strict=True):
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
        return Weights(weights, shifts).flat()


def _split(layer: _Factors, matrix: Tensor) -> tuple[Tensor, Tensor]:
    return layer.form.form.weight(matrix[:, :-1]), matrix[:, -1].flatten()


def _positions(total: int, batches: int) -> Tensor:
    """Evenly spread positions of one batch."""
    wanted = max(1, min(total, MOMENT_ROWS // batches))
    return torch.arange(wanted) * total // wanted


def _moments(layer: LinearMap, lines: list[_Linear], place: int | None) -> tuple[Tensor, Tensor]:
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


def _gram(chain: Chain, lines: list[_Linear], place: int, meets: Tensor) -> Tensor:
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


def _factors(layer: LinearMap, moments: Tensor, outputs: Tensor | None, damping: float) -> _Factors:
    diagonal = moments.diagonal(dim1=1, dim2=2)
    if outputs is None:
        scale = torch.ones(moments.shape[0], layer.form.weight_outputs, dtype=moments.dtype, device=moments.device)
    else:
        scale = outputs.diagonal(dim1=1, dim2=2)
    penalty = damping * (diagonal[..., None] * scale[:, None, :])
    penalty[:, -1] *= 1e-2
    right = None if outputs is None else _inverse(outputs, 1e-3)
    return _Factors(layer, _inverse(moments, damping + 1e-6), right, penalty)


def _inverse(matrix: Tensor, ridge: float) -> Tensor:
    """The inverse of symmetric matrices with a ridge that keeps it finite."""
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    # A group whose channels are all off has nothing of its own to go by.
    mean = mean.clamp_min(1e-3 * mean.mean()).clamp_min(torch.finfo(matrix.dtype).tiny ** 0.5)
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.inv(matrix + ridge * mean[:, None, None] * eye)
