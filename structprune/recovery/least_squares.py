"""Least squares from sums that are streamed: normal equations in float64, ridge chosen by a part held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.ranks import all_reduced

RIDGES = (1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(slots=True)
class Sums:
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
    def zeros(cls, groups: int, features: int, outputs: int, device: torch.device) -> Sums:
        """Sums of no rows."""
        shapes = (groups, features, features), (groups, features, outputs), (groups, outputs)
        xx, xy, yy = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(xx, xy, yy)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows: ``x`` of shape ``(groups, rows, features)``, ``y`` of shape ``(groups, rows, outputs)``."""
        self.xx.baddbmm_(x.transpose(1, 2), x)
        self.xy.baddbmm_(x.transpose(1, 2), y)
        self.yy.add_(y.square().sum(1))

    def reduce(self) -> None:
        """Sum over all ranks."""
        for tensor in (self.xx, self.xy, self.yy):
            all_reduced(tensor)

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        return Sums(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

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
        factor, failed = torch.linalg.cholesky_ex(self.xx + torch.diag_embed(penalty))
        if bool(failed.any()):
            return None
        solution = torch.cholesky_solve(self.xy, factor)
        return solution if bool(torch.isfinite(solution).all()) else None


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


def fit(train: Sums, held_out: Sums, free: int, noise: float = 0.0) -> Solution:
    """Least squares on all rows with the ridge that is best on those held out.

    Args:
        train: sums of the rows to solve on.
        held_out: sums of the rows to choose by.
        free: number of last features that are not penalised.
        noise: squared error on the held-out rows that is rounding; nothing is done about it.
    """
    before = float(held_out.yy.sum())
    best, after = 0.0, before
    for ridge in RIDGES if before > noise else ():
        solution = train.solve(ridge, free)
        if solution is None:
            continue
        error = float(held_out.error(solution).sum())
        if error < after:
            best, after = ridge, error
    together = train.plus(held_out).solve(best, free) if best else None
    if together is None:
        return Solution(torch.zeros_like(train.xy), before, before, 0.0, helps=False)
    return Solution(together, before, after, best, helps=True)
