"""Producers and consumer solved together: Gauss-Newton through what stands between them.

The result of a consumer is ``y = B(f(A_1 x_1, A_2 x_2, ...))`` with linear ``A_i`` (the producers) and ``B`` and a
function ``f`` that treats each entry alone (a ReLU, a norm with fixed statistics, a gate). Around the weights at hand
its change is ``B(sum_i d_i * dA_i x_i) + dB(f)`` with the slopes ``d_i`` of ``f``: linear in all weights together. That
linear least-squares problem, damped as Marquardt has it, is solved by conjugate gradients with the operators and their
adjoints written out; then the slopes are taken anew. Nothing is differentiated but ``f``, and there is no step size to
choose: the damping follows the error on samples that the problem does not hold.

Marquardt, An Algorithm for Least-Squares Estimation of Nonlinear Parameters, 1963; Hestenes and Stiefel, Methods of
Conjugate Gradients for Solving Linear Systems, 1952.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.ranks import all_reduced
from structprune.recovery.by_channel import ChannelBlocks
from structprune.recovery.chain import Batch, Chain, Linearised, Weights
from structprune.recovery.curvature import Curvature
from structprune.recovery.pieces import slopes

DAMPING = 1e-3
GAIN = 5e-3  # a round that lowers the squared error by a smaller share is the last
EQUATIONS = 128  # for each unknown: with so many the direction is good enough for all rounds but the last ones
LAST = 1  # rounds that see all there is
THIN = 4  # the first rounds see at least one batch in so many


@dataclass(frozen=True, slots=True)
class Refit:
    """The weights found, with the squared error on the held-out batches before and after.

    `damping` is that of the last step, `gain` the share of the held-out error that it took away.
    """

    weights: Weights
    before: float
    after: float
    rounds: int
    damping: float = DAMPING
    gain: float = 0.0

    @property
    def helps(self) -> bool:
        """Whether the held-out error falls."""
        return self.after < self.before


def refit(
    chain: Chain,
    train: Sequence[Batch],
    held_out: Sequence[Batch],
    start: Weights,
    rounds: int = 4,
    steps: int = 8,
    ridge: float = 0.0,
) -> Refit:
    """Weights of producers and consumer that give the goal best: damped Gauss-Newton by conjugate gradients.

    Args:
        chain: the piece.
        train: what to solve on.
        held_out: what to judge by; a step that does not lower the error here is not taken.
        start: the weights at hand; not changed.
        rounds: how often to linearise.
        steps: of conjugate gradients in each round.
        ridge: how much it costs to move away from `start`, as in `least_squares`.
    """
    before = after = chain.error(held_out, start)
    at, damping, used, taken, gain = start, DAMPING, DAMPING, 0, 0.0
    every = _thinning(train, start)
    blocks: ChannelBlocks | None = None
    for number in range(rounds):
        every = every if number < rounds - LAST else 1
        step, blocks = _step(chain, train[::every], at, start, (damping, ridge), steps, blocks)
        best, best_error, best_size = _best(chain, held_out, at, after, step)
        if best_size == 0:
            damping *= 30
            if damping > 1:
                break
            continue
        used, damping = damping, damping * (0.3 if best_size == 1 else 3)
        gain = 1 - best_error / after
        at, after, taken = best, best_error, taken + 1
        if gain < GAIN:
            if every == 1:
                break
            every = 1  # the others may have more to say
    return Refit(at, before, after, taken, used, gain)


def settled(
    chain: Chain, batches: Sequence[Batch], start: Weights, found: Refit, steps: int = 8, ridge: float = 0.0
) -> Refit:
    """One more step from what `refit` found, on all batches, held out or not: the more samples, the better.

    The errors stay those of the held-out batches before the step. Nothing changes if the error on all does not fall.
    """
    step, _ = _step(chain, batches, found.weights, start, (found.damping, ridge), steps, None)
    tried = found.weights.like(found.weights.flat() + step)
    if not chain.error(batches, tried) < chain.error(batches, found.weights):
        return found
    return replace(found, weights=tried, rounds=found.rounds + 1)


def _thinning(train: Sequence[Batch], start: Weights) -> int:
    """Every so many-th batch is enough for the first rounds; the same on all ranks."""
    count = torch.tensor(float(sum(batch.goal.numel() for batch in train)), dtype=torch.float64)
    equations = float(all_reduced(count.to(start.weights[-1].device)))
    return int(min(THIN, max(1, equations // (EQUATIONS * start.flat().numel()))))


def _best(
    chain: Chain, held_out: Sequence[Batch], at: Weights, error: float, step: Tensor
) -> tuple[Weights, float, float]:
    """The weights, the held-out error and the size of the best part of a step; size 0 where none lowers the error."""
    best, best_size = at, 0.0
    for size in (1.0, 0.5, 0.25):
        tried = at.like(at.flat() + size * step)
        found = chain.error(held_out, tried)
        if not found < error:
            if best_size:
                break
            continue
        best, error, best_size = tried, found, size
    return best, error, best_size


def _step(
    chain: Chain,
    train: Sequence[Batch],
    at: Weights,
    start: Weights,
    damping: tuple[float, float],
    steps: int,
    blocks: ChannelBlocks | None,
) -> tuple[Tensor, ChannelBlocks | None]:
    """The damped Gauss-Newton step, by preconditioned conjugate gradients on the normal equations.

    The blocks of the preconditioner, where it has any, come back for the next step: they change little.
    """
    lines: list[Linearised] = []
    goal = torch.zeros_like(at.flat())
    for batch in train:
        hidden, found = slopes(chain.between, chain.results(batch, at))
        result, last = slopes(chain.behind, [batch.rest + chain.consumer(hidden, at.weights[-1], at.shifts[-1])])
        line = Linearised(chain, batch, at, hidden, found, last[0])
        lines.append(line)
        goal += line.adjoint(chain.behind([batch.goal]) - result)
    all_reduced(goal)
    curvature = Curvature.of(lines, sum(damping), blocks)
    goal -= damping[1] / sum(damping) * curvature.damping * (at.flat() - start.flat())

    def normal(vector: Tensor) -> Tensor:
        step = at.like(vector)
        result = torch.zeros_like(vector)
        for line in lines:
            result += line.adjoint(line.forward(step))
        return all_reduced(result) + curvature.damping * vector

    return _conjugate_gradients(normal, curvature.inverse, goal, steps), curvature.blocks


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
