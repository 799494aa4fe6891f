"""A consumer and its producers solved together: Gauss-Newton through the operations between them.

The result of a consumer is ``y = B(f(A_1 x_1, A_2 x_2, ...))`` with linear ``A_i`` (the producers) and ``B`` (the
consumer), and a function ``f`` that treats each entry alone (a ReLU, a norm with fixed statistics, a gate). Around the
current weights its change is ``B(sum_i d_i * dA_i x_i) + dB(f)`` with the slopes ``d_i`` of ``f``: linear in all
weights together. This linear least-squares problem, with Marquardt's damping, is solved by conjugate gradients with the
operators and their adjoints written out; then the slopes are computed again. Only ``f`` is differentiated, and there is
no step size to choose: the damping follows the error on samples that the problem does not hold.

Marquardt, An Algorithm for Least-Squares Estimation of Nonlinear Parameters, 1963; Hestenes and Stiefel, Methods of
Conjugate Gradients for Solving Linear Systems, 1952.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.distributed import all_reduced
from structprune.recovery.chain import Chain, ChainWeights, LinearisedChain, linearised
from structprune.recovery.preconditioner import Preconditioner
from structprune.recovery.samples import Samples

DAMPING = 1e-3
MIN_GAIN = 5e-3  # a round that lowers the squared error by a smaller share is the last
EQUATIONS = 64  # for each unknown: with so many, the direction is good enough for all rounds but the final step
# Conjugate gradients end after so many steps, one behind the other, that gain less than this share of all gains so far.
SMALL_STEPS, ENOUGH = 2, 0.01
MAX_STRIDE = 4  # earlier rounds use at least every fourth batch; a power of two


@dataclass(frozen=True, slots=True)
class ChainFit:
    """Weights for a chain, and how good they are.

    Attributes:
        weights: the best ones.
        before: squared error on the held-out samples at the start.
        after: the same with `weights`.
        rounds: number of steps that were taken.
        damping: of the last step.
        gain: share of the held-out error that the last step removed.
        preconditioner: of the last step, which serves for more of them.
    """

    weights: ChainWeights
    before: float
    after: float
    rounds: int
    damping: float = DAMPING
    gain: float = 0.0
    preconditioner: Preconditioner | None = None

    @property
    def helps(self) -> bool:
        """Whether the held-out error falls."""
        return self.after < self.before


def fit_chain(
    chain: Chain,
    train: Sequence[Samples],
    held_out: Sequence[Samples],
    start: ChainWeights,
    rounds: int = 4,
    steps: int = 8,
    ridge: float = 0.0,
) -> ChainFit:
    """Weights of producers and consumer that meet the goal best: damped Gauss-Newton by conjugate gradients.

    Args:
        chain: producers and consumer.
        train: what to solve on.
        held_out: what to judge by; a step that does not lower the error here is not taken.
        start: the current weights; not changed.
        rounds: how often to linearise.
        steps: of conjugate gradients in each round.
        ridge: how much it costs to move away from `start`, as in `least_squares`.
    """
    before = after = chain.error(held_out, start)
    at, damping, last_damping, taken, gain = start, DAMPING, DAMPING, 0, 0.0
    stride = _stride(train, start)
    preconditioner: Preconditioner | None = None
    for number in range(rounds):
        # Each round sees other batches than the one before.
        some = [samples for samples in train if (samples.place - number) % stride == 0] or [train[0].part(slice(0))]
        step, preconditioner = _step(chain, some, at, start, (damping, ridge), steps, preconditioner)
        best, best_error, best_size = _best_part(chain, held_out, at, after, step)
        if best_size == 0 and stride > 1:
            stride = 1  # what these batches ask for is wrong for others
            continue
        if best_size == 0:
            damping *= 30
            if damping > 1:
                break
            continue
        last_damping, damping = damping, damping * (0.3 if best_size == 1 else 3)
        gain = 1 - best_error / after
        at, after, taken = best, best_error, taken + 1
        if gain < MIN_GAIN:
            if stride == 1:
                break
            stride = 1  # the samples that were left out may lead further
    return ChainFit(at, before, after, taken, last_damping, gain, preconditioner)


def final_step(
    chain: Chain, samples: Sequence[Samples], start: ChainWeights, fit: ChainFit, steps: int = 8, ridge: float = 0.0
) -> ChainFit:
    """One more step from the weights of a `fit`, on all samples, held out or not: more samples fit less noise.

    The errors stay those on the held-out samples before the step. If the error on all samples does not fall, `fit` is
    returned as it is.
    """
    step, _ = _step(chain, samples, fit.weights, start, (fit.damping, ridge), steps, fit.preconditioner)
    moved = fit.weights.like(fit.weights.flat() + step)
    if not chain.error(samples, moved) < chain.error(samples, fit.weights):
        return fit
    return replace(fit, weights=moved, rounds=fit.rounds + 1)


def _stride(train: Sequence[Samples], start: ChainWeights) -> int:
    """With a stride of 2 the first rounds use the batches 0, 2, 4, ... of all ranks. The same on all of them.

    It is the power of two that leaves `EQUATIONS` equations for each unknown: 7800 numbers of the goal and 40 weights
    leave 195, which is enough for a stride of 2.
    """
    count = torch.tensor(float(sum(samples.goal.numel() for samples in train)), dtype=torch.float64)
    equations = float(all_reduced(count.to(start.weights[-1].device)))
    enough = int(equations // (EQUATIONS * start.flat().numel()))
    return min(MAX_STRIDE, 1 << max(0, enough.bit_length() - 1))


def _best_part(
    chain: Chain, held_out: Sequence[Samples], at: ChainWeights, error: float, step: Tensor
) -> tuple[ChainWeights, float, float]:
    """The best of the whole step, its half and its quarter: weights, held-out error, and size.

    The size is 0, and the weights are `at`, if none lowers the `error` there.
    """
    best, best_size = at, 0.0
    for size in (1.0, 0.5, 0.25):
        moved = at.like(at.flat() + size * step)
        moved_error = chain.error(held_out, moved)
        if not moved_error < error:
            if best_size:
                break
            continue
        best, error, best_size = moved, moved_error, size
    return best, error, best_size


def _step(
    chain: Chain,
    train: Sequence[Samples],
    at: ChainWeights,
    start: ChainWeights,
    damping: tuple[float, float],
    steps: int,
    known: Preconditioner | None,
) -> tuple[Tensor, Preconditioner]:
    """The damped Gauss-Newton step, by preconditioned conjugate gradients on the normal equations.

    Args:
        chain: producers and consumer.
        train: what to solve on.
        at: the current weights.
        start: the weights towards which the ridge pulls.
        damping: Marquardt's, and the ridge.
        steps: of conjugate gradients.
        known: the preconditioner of an earlier step.

    Returns:
        The step, in the order of `ChainWeights.flat`, and the preconditioner.
    """
    lines: list[LinearisedChain] = []
    goal = torch.zeros_like(at.flat())
    for samples in train:
        line, missing = linearised(chain, samples, at)
        lines.append(line)
        goal += line.vjp(missing)
    all_reduced(goal)
    by_batch = [part for line in lines for part in line.parts()]
    preconditioner = Preconditioner.of(by_batch, sum(damping), known)
    goal -= damping[1] / sum(damping) * preconditioner.damping * (at.flat() - start.flat())

    def normal(vector: Tensor) -> Tensor:
        step = at.like(vector)
        result = torch.zeros_like(vector)
        for line in lines:
            result += line.vjp(line.jvp(step))
        return all_reduced(result) + preconditioner.damping * vector

    return _conjugate_gradients(normal, preconditioner.inverse, goal, steps), preconditioner


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], goal: Tensor, steps: int
) -> Tensor:
    """An approximate solution of ``product(x) = goal``; inner products in float64.

    Each step lowers ``x product(x) / 2 - x goal`` by half of its length times the size of the residual. The slopes
    change with the next round, so that the last percents of a round are not worth a pass over the data.

    Args:
        product: a symmetric positive definite matrix times a vector.
        inverse: the preconditioner: about the inverse of that matrix, times a vector.
        goal: the right side, shape ``(unknowns,)``.
        steps: how many at most.
    """
    x, residual = torch.zeros_like(goal), goal.clone()
    direction = preconditioned = inverse(residual)
    size = torch.dot(residual.double(), preconditioned.double())
    gained, small = 0.0, 0
    for _ in range(steps):
        image = product(direction)
        curvature = torch.dot(direction.double(), image.double())
        if not (float(curvature) > 0 and float(size) > 0):
            break
        length = float(size / curvature)
        gain = length * float(size)
        gained += gain
        x = x + length * direction
        residual = residual - length * image
        small = small + 1 if gain < ENOUGH * gained else 0
        if small == SMALL_STEPS:
            break
        preconditioned = inverse(residual)
        new_size = torch.dot(residual.double(), preconditioned.double())
        direction = preconditioned + float(new_size / size) * direction
        size = new_size
    return x
