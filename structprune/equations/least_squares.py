"""Least squares from second moments: a solution with the best ridge.

Axes of features ``x`` and targets ``y`` are streamed into float64 sums, so that no more than a chunk of them is held at
a time. With 18 features and 3 outputs the sums are ``x^T x`` (18, 18) and ``x^T y`` (18, 3), for however many rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from structprune.distributed import all_reduced

RIDGES = (1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FIRST_RIDGE = 1e-4
# Another matrix to pull towards is taken if it leaves less than this share of the error: a little less may be had from
# results that vary less, which the layers behind are not used to.
CLEARLY = 0.5
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


class Equations(Protocol):
    """What `fit` needs of rows; shapes are those of `NormalEquations`."""

    @property
    def xy(self) -> Tensor:
        """The sum of ``x y^T``."""
        ...

    @property
    def yy(self) -> Tensor:
        """The sum of ``y ** 2``."""
        ...

    def plus(self, other: Self, /) -> Self:
        """The equations of the rows of both."""
        ...

    def of_outputs(self, number: int) -> Self:
        """The same for so many of the outputs."""
        ...

    def about(self, center: Tensor, /) -> Self:
        """The equations of what is left to add to `center`."""
        ...

    def error(self, solution: Tensor) -> Tensor:
        """The squared error of a solution by group and output."""
        ...

    def solve(self, ridge: float, free: int) -> Tensor | None:
        """The solution with a ridge that does not count for the last `free` features; None where there is none."""
        ...


E = TypeVar("E", bound=Equations)


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

    def about(self, center: Tensor) -> NormalEquations:
        """The same with ``y - center^T x`` in place of `y`; `center` has shape ``(groups, features, outputs)``."""
        return NormalEquations(self.xx, self.xy - self.xx @ center, self.error(center))

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
    # Infinite where it leaves float32: not factored. Both factors in one type, which takes a tenth of the time.
    scaled = matrix.float().mul_(scale.float()).mul_(scale.float().transpose(1, 2))
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


def fit(train: E, held_out: E, free: int, noise: float = 0.0, center: Tensor | None = None) -> Solution:
    """Least squares on all rows with the ridge that is best on those held out.

    Args:
        train: of the rows to solve on.
        held_out: of the rows to choose the ridge by.
        free: number of last features that are not penalised.
        noise: squared error on the held-out rows that is rounding; with no more than that nothing is solved.
        center: another matrix that the ridge may pull towards in place of zero, in the shape of the solution. It is
            taken where the error on the held-out rows is then less than half; it may be the solution itself.
    """
    before = float(held_out.yy.sum())
    found = _fitted(train, held_out, free, noise)
    if center is None or not before > noise:
        return found
    other = _fitted(train.about(center), held_out.about(center), free, noise)
    if not other.after < CLEARLY * found.after:
        return found
    return Solution(center + other.matrix, before, other.after, other.ridge, helps=True)


def _fitted(train: E, held_out: E, free: int, noise: float) -> Solution:
    """The solution about zero."""
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


def best_ridge(train: E, held_out: E, free: int) -> tuple[float, float]:
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
