"""A mixed-integer programme: one state for each owner, so that limits on sums of tables hold and least is lost.

Two owners with 2 states each and a limit on a table ``[[1, 2], [3, 9]]`` over both: the binaries are ``x00 x01`` and
``x10 x11``, of which one each is 1, and ``y00 y01 y10 y11`` stand for the products, so that the limit is linear::

    x00 + x01 = 1      y00 + y01 = x00      y00 + y10 = x10      1 y00 + 2 y01 + 3 y10 + 9 y11 <= limit
    x10 + x11 = 1      y10 + y11 = x01      y01 + y11 = x11

Once the x are whole, so are the y. Of all ways to make the products linear this one has the tightest relaxation: where
the tables form a tree and nothing is limited, it has whole solutions alone, so that little is left to branch on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from structprune.planning.cost_tables import Table

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# A solution whose loss is within this share of the least is taken for the least one.
GAP = 1e-4
# HiGHS holds limits to about this share of them. One that is met exactly has to be found, so as much is added.
FEASIBILITY = 1e-7


@dataclass(frozen=True, slots=True)
class Limit:
    """The sum of tables and a constant that may not exceed an amount.

    Attributes:
        tables: each with the numbers of its owners, ascending, and an axis for each of them.
        constant: what is added to them.
        most: the greatest amount.
    """

    tables: Sequence[Table]
    constant: float
    most: float


@dataclass(frozen=True, slots=True)
class Solution:
    """What the solver found.

    Attributes:
        states: the state of each owner.
        proven: whether no solution loses less, but for `GAP`.
    """

    states: tuple[int, ...]
    proven: bool


def solved(losses: Sequence[NDArray[np.float64]], limits: Sequence[Limit], seconds: float) -> Solution | None:
    """The states that lose least within all limits; None if none was found in time.

    Args:
        losses: what each owner loses in each of its states.
        limits: what may not be exceeded.
        seconds: the time for the solver.

    Example:
        >>> table = np.array([[1.0, 2.0], [3.0, 9.0]])
        >>> solved([np.array([4.0, 0.0]), np.array([1.0, 0.0])], [Limit([((0, 1), table)], 0.0, 4.0)], 5.0)
        Solution(states=(1, 0), proven=True)
    """
    # Here, since it takes longer to import than all of structprune.
    from scipy.optimize import Bounds, LinearConstraint, milp

    sums = [_summed(limit) for limit in limits]
    if any(constant >= limit.most for (_, constant), limit in zip(sums, limits, strict=True)):
        return None
    columns = _Columns([len(loss) for loss in losses], [held for held, _ in sums])
    choice, marginals = columns.choice(), columns.marginals()
    # Amounts over the limit, so that all rows are of one size.
    within = [columns.row(held) / (limit.most - constant) for (held, constant), limit in zip(sums, limits, strict=True)]
    rows: list[Any] = [LinearConstraint(choice, 1, 1)]
    if marginals is not None:
        rows.append(LinearConstraint(marginals, 0, 0))
    if within:
        rows.append(LinearConstraint(np.stack(within), -np.inf, 1 + FEASIBILITY))
    objective = np.zeros(columns.count)
    scale = max((float(np.ptp(loss)) for loss in losses), default=0.0) or 1.0
    objective[: columns.binaries] = np.concatenate(losses) / scale
    whole = np.zeros(columns.count)
    whole[: columns.binaries] = 1
    options = {"time_limit": seconds, "mip_rel_gap": GAP}
    result: Any = milp(objective, integrality=whole, bounds=Bounds(0, 1), constraints=rows, options=options)
    if result.x is None:
        return None
    states = tuple(int(np.argmax(result.x[first:last])) for first, last in columns.spans)
    return Solution(states, result.status == 0)


def _summed(limit: Limit) -> tuple[dict[tuple[int, ...], NDArray[np.float64]], float]:
    """Tables over the same owners added up, those of one that adds owners taken apart, and the constant."""
    held: dict[tuple[int, ...], NDArray[np.float64]] = {}
    constant = limit.constant
    for owners, table in limit.tables:
        if not owners:
            constant += float(table)
        else:
            held[owners] = held[owners] + table if owners in held else table
    apart = {
        owners: parts for owners, table in held.items() if len(owners) > 1 and (parts := _apart(table)) is not None
    }
    for owners, parts in apart.items():
        del held[owners]
        for owner, part in zip(owners, parts, strict=True):
            held[owner,] = held[owner,] + part if (owner,) in held else part
    return held, constant


def _apart(table: NDArray[np.float64]) -> list[NDArray[np.float64]] | None:
    """A table that is a sum of one line for each axis as these lines; None if it is no such sum.

    Example:
        >>> [part.tolist() for part in _apart(np.array([[1.0, 2.0], [4.0, 5.0]]))]
        [[1.0, 4.0], [0.0, 1.0]]
        >>> _apart(np.array([[1.0, 2.0], [4.0, 8.0]])) is None
        True
    """
    origin = float(table.flat[0])
    lines: list[NDArray[np.float64]] = []
    summed = np.full([1] * table.ndim, origin)
    for axis in range(table.ndim):
        line = table[tuple(slice(None) if i == axis else 0 for i in range(table.ndim))] - origin
        summed = summed + line.reshape([-1 if i == axis else 1 for i in range(table.ndim)])
        lines.append(line + origin if axis == 0 else line)
    return lines if np.allclose(summed, table, rtol=1e-12, atol=1e-12 * float(np.abs(table).max())) else None


class _Columns:
    """The variables: a binary for each state of each owner, then one for each entry of the tables over several."""

    def __init__(self, states: Sequence[int], limits: Sequence[dict[tuple[int, ...], NDArray[np.float64]]]) -> None:
        ends = np.cumsum([0, *states]).tolist()
        self.spans = list(pairwise(ends))
        self.binaries = self.count = ends[-1]
        self._states = states
        self._first: dict[tuple[int, ...], int] = {(owner,): first for owner, (first, _) in enumerate(self.spans)}
        for limit in limits:
            for owners, table in limit.items():
                if owners not in self._first:
                    self._first[owners] = self.count
                    self.count += table.size

    def choice(self) -> csr_array:
        """One row for each owner: of its states one is chosen."""
        from scipy.sparse import csr_array

        owner = np.repeat(np.arange(len(self._states)), self._states)
        shape = (len(self._states), self.count)
        return csr_array((np.ones(self.binaries), (owner, np.arange(self.binaries))), shape=shape)

    def marginals(self) -> csr_array | None:
        """For each table over several owners and each state of one of them: its entries add up to that state's x.

        None if there are no such tables.
        """
        from scipy.sparse import csr_array

        rows: list[NDArray[np.int64]] = []
        columns: list[NDArray[np.int64]] = []
        values: list[NDArray[np.float64]] = []
        count = 0
        for owners, first in self._first.items():
            if len(owners) < 2:
                continue
            shape = [self._states[owner] for owner in owners]
            place = np.indices(shape).reshape(len(shape), -1)
            for axis, owner in enumerate(owners):
                rows += [count + place[axis], count + np.arange(shape[axis])]
                columns += [first + np.arange(place.shape[1]), self._first[owner,] + np.arange(shape[axis])]
                values += [np.ones(place.shape[1]), -np.ones(shape[axis])]
                count += shape[axis]
        if not rows:
            return None
        where = (np.concatenate(rows), np.concatenate(columns))
        return csr_array((np.concatenate(values), where), shape=(count, self.count))

    def row(self, held: dict[tuple[int, ...], NDArray[np.float64]]) -> NDArray[np.float64]:
        """The coefficients of a limit; shape ``(variables,)``."""
        coefficients = np.zeros(self.count)
        for owners, table in held.items():
            first = self._first[owners]
            coefficients[first : first + table.size] += table.reshape(-1)
        return coefficients
