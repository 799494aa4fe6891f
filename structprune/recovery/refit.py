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
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.ranks import all_reduced
from structprune.recovery.chain import Batch, Chain, Linearised, Weights
from structprune.recovery.curvature import Curvature
from structprune.recovery.pieces import slopes

DAMPING = 1e-3
GAIN = 2e-3  # a round that lowers the squared error by a smaller share is the last


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
    lines: list[Linearised] = []
    goal = torch.zeros_like(at.flat())
    for batch in train:
        hidden, found = slopes(chain.between, chain.results(batch, at))
        result, last = slopes(chain.behind, [batch.rest + chain.consumer(hidden, at.weights[-1], at.shifts[-1])])
        line = Linearised(chain, batch, at, hidden, found, last[0])
        lines.append(line)
        goal += line.adjoint(chain.behind([batch.goal]) - result)
    all_reduced(goal)
    curvature = Curvature.of(lines, damping)

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
