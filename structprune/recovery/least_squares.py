"""Least squares from second moments: a solution with the best ridge, and the order in which features are missed least.

Axes of features ``x`` and targets ``y`` are streamed into float64 sums, so that no more than a chunk of them is held at
a time. With 18 features and 3 outputs the sums are ``x^T x`` (18, 18) and ``x^T y`` (18, 3), for however many rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from structprune.distributed import all_reduced

RIDGES = (1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FIRST_RIDGE = 1e-4
# The ridge of a layer with more outputs than this is chosen on so many of them, evenly spaced.
CHOSEN_ON = 256


# With more features than this, matrices are factored in float32, which takes half the time.
IN_FLOAT32, REFINEMENTS, RESIDUAL = 1536, 6, 1e-9

# Columns of a symmetric product that are computed together: what lies above them is the transpose of what lies below.
BLOCKS, FEWEST_COLUMNS = 8, 64


def add_second_moments(to: Tensor, x: Tensor) -> None:
    """Add the sum of ``x x^T`` over rows, of shape ``(groups, rows, features)``, to ``(groups, features, features)``.

    Products are computed in the type of `x`. In float32 some thousand rows at a time are exact to about 1e-7 of the
    diagonal, which is enough where a ridge of far more is added. Blocks above the diagonal are those below it.
    """
    features = x.shape[2]
    columns = max(FEWEST_COLUMNS, -(-features // BLOCKS))
    for start in range(0, features, columns):
        stop = min(features, start + columns)
        product = x[..., start:stop].transpose(1, 2) @ x[..., :stop]
        to[:, start:stop, :stop] += product
        to[:, :start, start:stop] += product[..., :start].transpose(1, 2)


def second_moments(x: Tensor) -> Tensor:
    """The sum of ``x x^T`` over rows in float64, shape ``(groups, features, features)``: see `add_second_moments`."""
    result = x.new_zeros((x.shape[0], x.shape[2], x.shape[2]), dtype=torch.float64)
    add_second_moments(result, x)
    return result


@dataclass(slots=True)
class NormalEquations:
    """What least squares needs of rows ``x`` (features) and ``y`` (targets), for each of several groups.

    Attributes:
        xx: sum of ``x x^T``, shape ``(groups, features, features)``.
        xy: sum of ``x y^T``, shape ``(groups, features, outputs)``.
        yy: sum of ``y ** 2``, shape ``(groups, outputs)``.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, groups: int, features: int, outputs: int, device: torch.device) -> NormalEquations:
        """Sums of no rows."""
        shapes = (groups, features, features), (groups, features, outputs), (groups, outputs)
        xx, xy, yy = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(xx, xy, yy)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: ``x`` of shape ``(groups, rows, features)``, ``y`` of shape ``(groups, rows, outputs)``."""
        add_second_moments(self.xx, x)
        self.xy.add_(x.transpose(1, 2) @ y)
        self.yy.add_(y.square().sum(1, dtype=torch.float64))

    def add_products(self, xx: Tensor, xy: Tensor, yy: Tensor) -> None:
        """Add the sums over some rows of a single group, in the shapes of the attributes without their first."""
        self.xx.add_(xx)
        self.xy.add_(xy)
        self.yy.add_(yy)

    def reduce(self) -> None:
        """Sum over all ranks."""
        for tensor in (self.xx, self.xy, self.yy):
            all_reduced(tensor)

    def plus(self, other: NormalEquations) -> NormalEquations:
        """The sums over the rows of both."""
        return NormalEquations(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def of_outputs(self, number: int) -> NormalEquations:
        """The same for so many of the outputs, evenly spaced: 0, 3, 6, 9 for 4 of 12."""
        outputs = self.xy.shape[2]
        if outputs <= number:
            return self
        chosen = torch.arange(number, device=self.xy.device) * outputs // number
        return NormalEquations(self.xx, self.xy[..., chosen], self.yy[..., chosen])

    def error(self, solution: Tensor) -> Tensor:
        """Sum of ``(y - solution^T x) ** 2`` by group and output, shape ``(groups, outputs)``."""
        quadratic = (solution * (self.xx @ solution)).sum(1)
        return (self.yy - 2 * (solution * self.xy).sum(1) + quadratic).clamp_min(0)

    def solve(self, ridge: float, free: int) -> Tensor | None:
        """The minimiser of squared error plus ``ridge * diag(xx) * solution ** 2``; None where it is singular.

        The last `free` features (the intercept) are not penalised.
        """
        diagonal = self.xx.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        penalty = ridge * (diagonal + 1e-3 * mean)
        if free:
            penalty[:, -free:] = 1e-12 * mean
        matrix = self.xx + torch.diag_embed(penalty)
        solution = _solved_in_float32(matrix, self.xy) if len(matrix[0]) > IN_FLOAT32 else None
        if solution is None:
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if bool(failed.any()):
                return None
            solution = torch.cholesky_solve(self.xy, factor)
        return solution if bool(torch.isfinite(solution).all()) else None


def _solved_in_float32(matrix: Tensor, right: Tensor) -> Tensor | None:
    """The solution for symmetric positive definite matrices, factored in float32 and refined in float64.

    With a condition of 1e5 each refinement removes all but a hundredth of the error (Wilkinson, Rounding Errors in
    Algebraic Processes, 1963). None where the residual is not down to `RESIDUAL` after `REFINEMENTS`: it is too
    ill-conditioned.

    Args:
        matrix: shape ``(groups, n, n)``, in float64; scaled to a diagonal of ones before it is rounded.
        right: shape ``(groups, n, m)``.
    """
    scale = matrix.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()[..., None]
    scaled = matrix.float().mul_(scale).mul_(scale.transpose(1, 2))  # infinite where it leaves float32: not factored
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if bool(failed.any()):
        return None
    size = (right * scale).norm()
    solution, residual = torch.zeros_like(right), right
    for _ in range(REFINEMENTS):
        solution = solution + torch.cholesky_solve((residual * scale).float(), factor).double() * scale
        residual = right - matrix @ solution
        if bool((residual * scale).norm() <= RESIDUAL * size):
            return solution
    return None


@dataclass(frozen=True, slots=True)
class Solution:
    """What to add to a layer's matrix.

    Attributes:
        matrix: shape ``(groups, features, outputs)``.
        before: error on the held-out rows if nothing is changed.
        after: error on the held-out rows with a matrix solved on the other rows; not above ``before`` if `helps`.
        ridge: the one chosen.
        helps: whether the held-out error falls.
    """

    matrix: Tensor
    before: float
    after: float
    ridge: float
    helps: bool


def fit(train: NormalEquations, held_out: NormalEquations, free: int, noise: float = 0.0) -> Solution:
    """Least squares on all rows with the ridge that is best on those held out.

    Args:
        train: of the rows to solve on.
        held_out: of the rows to choose the ridge by.
        free: number of last features that are not penalised.
        noise: squared error on the held-out rows that is rounding; with no more than that nothing is solved.
    """
    before = float(held_out.yy.sum())
    best, after = best_ridge(train, held_out, free) if before > noise else (0.0, before)
    if best and train.xy.shape[2] > CHOSEN_ON:
        solution = train.solve(best, free)
        after = before if solution is None else float(held_out.error(solution).sum())
    together = train.plus(held_out).solve(best, free) if best and after < before else None
    if together is None:
        return Solution(torch.zeros_like(train.xy), before, before, 0.0, helps=False)
    return Solution(together, before, after, best, helps=True)


def intercept(train: NormalEquations, held_out: NormalEquations, noise: float = 0.0) -> Solution:
    """The constant alone that all rows lack on average: the last feature is 1, and the others count for nothing.

    Args:
        train: of the rows to take the mean of.
        held_out: of the rows that tell whether it helps; then the mean is of all of them.
        noise: as for `fit`.
    """

    def mean(rows: NormalEquations) -> Tensor:
        matrix = torch.zeros_like(rows.xy)
        matrix[:, -1] = rows.xy[:, -1] / rows.xx[:, -1, -1:]
        return matrix

    before, after = float(held_out.yy.sum()), float(held_out.error(mean(train)).sum())
    if not noise < before > after:
        return Solution(torch.zeros_like(train.xy), before, before, 0.0, helps=False)
    return Solution(mean(train.plus(held_out)), before, after, 0.0, helps=True)


def best_ridge(train: NormalEquations, held_out: NormalEquations, free: int) -> tuple[float, float]:
    """The ridge with the least error on the held-out rows, and that error; 0 if each is worse than no change.

    Errors fall towards the best ridge from either side, so that it is looked for from `FIRST_RIDGE` on, as long as a
    neighbour is better. A layer with more than `CHOSEN_ON` outputs is looked at in some of them: solving for all at
    each ridge would take most of the time, and the ridge that is best for some is hardly different from that for all.
    """
    some, others = train.of_outputs(CHOSEN_ON), held_out.of_outputs(CHOSEN_ON)

    @cache
    def error(number: int) -> float:
        solution = some.solve(RIDGES[number], free) if 0 <= number < len(RIDGES) else None
        return float("inf") if solution is None else float(others.error(solution).sum())

    at = RIDGES.index(FIRST_RIDGE)
    if error(at) == float("inf"):  # singular without a larger one
        at = len(RIDGES) - 1
    while (better := min((at, at - 1, at + 1), key=error)) != at:
        at = better
    unchanged = float(others.yy.sum())
    return (RIDGES[at], error(at)) if error(at) < unchanged else (0.0, unchanged)


# -- backward elimination --------------------------------------------------------------------------------------------

ELIMINATION_RIDGE = 1e-4


@dataclass(slots=True)
class ConsumerMoments:
    """What elimination needs of one layer that consumes the channels of a group.

    For a consumer with a weight of shape (5, 4, 3, 3) there are 4 * 9 = 36 features and the intercept. Where the group
    is its 4 input channels, `places` has shape (4, 9), and ``places[1]`` is 9, 10, ..., 17.

    Attributes:
        xx: second moments of its features, with the intercept last, shape ``(features + 1, features + 1)``.
        matrix: its weight as a matrix, with a last row of zeros for the intercept, shape ``(features + 1, outputs)``.
        places: the features that each channel of the group makes, shape ``(channels, features of a channel)``.
    """

    xx: Tensor
    matrix: Tensor
    places: Tensor

    def penalised(self) -> Tensor:
        """`xx` with a small ridge, so that it has an inverse."""
        diagonal = self.xx.diagonal()
        penalty = ELIMINATION_RIDGE * (diagonal + 1e-2 * diagonal.mean())
        penalty[-1] = 1e-10 * diagonal.mean()
        return self.xx + torch.diag(penalty)

    def power(self) -> Tensor:
        """Sum of squares of the consumer's result about its mean, shape ``()``."""
        mean = self.xx[-1] @ self.matrix / self.xx[-1, -1]
        return ((self.matrix * (self.xx @ self.matrix)).sum(0) - self.xx[-1, -1] * mean.square()).sum().clamp_min(0)

    def change(self, removed: Tensor) -> Tensor:
        """What to add to `matrix`, in its shape, so that the consumer does best without the channels `removed`."""
        kept = torch.ones(len(self.xx), dtype=torch.bool, device=self.xx.device)
        kept[self.places[removed].flatten()] = False
        solved = torch.linalg.solve(self.penalised()[kept][:, kept], self.xx[kept] @ self.matrix)
        change = -self.matrix
        change[kept] += solved
        return change


@dataclass(slots=True)
class _Elimination:
    """One consumer while channels are removed.

    Attributes:
        inverse: of its penalised moments over the remaining features, shape ``(features, features)``.
        solution: its best matrix on the remaining features, shape ``(features, outputs)``.
        places: the features of each remaining channel, numbered among the remaining ones.
        weight: of its error beside that of other consumers, shape ``()``.
    """

    inverse: Tensor
    solution: Tensor
    places: Tensor
    weight: Tensor

    def costs(self) -> Tensor:
        """How far the error rises if a channel alone is removed, for each remaining one, shape ``(channels,)``."""
        # (channels, features of a channel, features of a channel)
        blocks = self.inverse[self.places[:, :, None], self.places[:, None, :]]
        rows = self.solution[self.places]  # (channels, features of a channel, outputs)
        return self.weight * (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))

    def remove(self, channels: Tensor) -> None:
        """Remove channels; the inverse and the solution for the remaining features follow by a block update.

        With features 0 to 5 in three channels, ``places`` is [[0, 1], [2, 3], [4, 5]]. Without channel 1 features 0, 1,
        4, 5 remain, which are numbered 0 to 3 from then on, and ``places`` is [[0, 1], [2, 3]].
        """
        removed = self.places[channels].flatten()
        remaining = torch.ones(len(self.inverse), dtype=torch.bool, device=removed.device)
        remaining[removed] = False
        across = self.inverse[remaining][:, removed]
        factor = torch.linalg.solve(self.inverse[removed][:, removed], torch.cat([self.solution[removed], across.T], 1))
        outputs = self.solution.shape[1]
        self.solution = self.solution[remaining] - across @ factor[:, :outputs]
        self.inverse = self.inverse[remaining][:, remaining] - across @ factor[:, outputs:]
        self.places = (torch.cumsum(remaining, 0) - 1)[self.places[_without(len(self.places), channels)]]


def eliminate(consumers: list[ConsumerMoments], at_once: float = 1 / 128) -> tuple[Tensor, Tensor]:
    """Backward elimination: the channel that costs least once all is solved again is removed, until one is left.

    Each step is exact for the remaining features (Hassibi and Stork, Optimal Brain Surgeon, 1993, equation 5, for
    blocks of features and several outputs): the error rises by ``w^T [(H^-1)_cc]^-1 w``. Errors of several consumers
    are added, each over the power of its own result.

    Args:
        consumers: of one and the same channels.
        at_once: share of the remaining channels that may be removed in one step, where it is more than one channel.

    Returns:
        Channels in the order of their removal, the one that is kept last; and how far the error has risen once each is
        removed, shape ``(channels - 1,)``.
    """
    states: list[_Elimination] = []
    for consumer in consumers:
        inverse = torch.linalg.inv(consumer.penalised())
        weight = 1 / consumer.power().clamp_min(torch.finfo(torch.float64).tiny)
        states.append(_Elimination(inverse, inverse @ (consumer.xx @ consumer.matrix), consumer.places, weight))
    remaining = torch.arange(len(consumers[0].places), device=consumers[0].xx.device)
    order: list[Tensor] = []
    rises: list[Tensor] = []
    while len(remaining) > 1:
        costs = torch.stack([state.costs() for state in states]).sum(0)
        number = min(len(remaining) - 1, max(1, int(len(remaining) * at_once)))
        chosen = torch.topk(costs, number, largest=False).indices
        order.append(remaining[chosen])
        rises.append(costs[chosen].clamp_min(0))
        for state in states:
            state.remove(chosen)
        remaining = remaining[_without(len(remaining), chosen)]
    empty = torch.zeros(0, dtype=torch.float64, device=remaining.device)
    return torch.cat([*order, remaining]), torch.cat([empty, *rises]).cumsum(0)


def _without(count: int, removed: Tensor) -> Tensor:
    """A mask of shape ``(count,)`` that is False at `removed`."""
    mask = torch.ones(count, dtype=torch.bool, device=removed.device)
    mask[removed] = False
    return mask
