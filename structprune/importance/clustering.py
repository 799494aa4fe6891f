"""Clusters of points that are known by their inner products, and the nothing that points may be merged into.

A point that is left out is merged into zero: a cluster of its own, at the origin, which never moves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def merging_costs(products: Floats, mass: Floats) -> Floats:
    """What merging each point into another, or into zero, adds to the squared error of Ward's clusters.

    Ward, Hierarchical Grouping to Optimize an Objective Function, 1963: clusters A and B of masses a and b, whose means
    are d apart, lose ``a * b / (a + b) * d^2`` when they are merged, and the two that lose least are merged first. With
    zero, A loses ``a * |mean|^2``. Of two clusters, the point that stays is the one nearer to the mean of both. So the
    points that stay at any number are one of each cluster but that of zero.

    Args:
        products: inner products of the points, shape ``(points, points)``.
        mass: not negative, shape ``(points,)``.

    Returns:
        Shape ``(points,)``; what comes first is least.

    Example:
        >>> points = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 3.0], [0.01, 0.0]])
        >>> merging_costs(points @ points.T, np.array([2.0, 1.0, 1.0, 1.0])).argsort().tolist()[:2]
        [3, 1]
    """
    count = len(products)
    costs, heights = np.zeros(count), np.zeros(count)
    clusters = _Stayers(products, mass)
    for step, (height, first, second) in enumerate(_merges(products, mass)):
        # Never less than before, and of equal costs the one that went first stays first.
        heights[step] = max(height, heights[step - 1] if step else 0.0)
        costs[clusters.merge(first, second)] = heights[step] * (1 + 1e-9 * step)
    return costs


def _merges(products: Floats, mass: Floats) -> list[tuple[float, int, int]]:
    """Costs, and a point of each of the two clusters that are merged, -1 for zero; the cheapest first.

    By chains of nearest neighbours (Murtagh, 1983), in time and memory of the square of the points.
    """
    count = len(products)
    mass = np.append(mass, np.inf)
    squares = products.diagonal()
    between = np.full((count + 1, count + 1), np.inf)
    distances = np.maximum(squares[:, None] + squares[None] - 2 * products, 0)
    # Of masses that are all zero, merging costs nothing.
    harmonic = mass[:-1, None] * mass[None, :-1] / np.maximum(mass[:-1, None] + mass[None, :-1], 1e-300)
    between[:-1, :-1] = harmonic * distances
    between[-1, :-1] = between[:-1, -1] = mass[:-1] * squares
    np.fill_diagonal(between, np.inf)
    alive = np.ones(count + 1, dtype=bool)
    merges: list[tuple[float, int, int]] = []
    chain: list[int] = []
    while len(merges) < count:
        if not chain:
            chain.append(int(np.flatnonzero(alive)[0]))
        here = chain[-1]
        near = int(between[here].argmin())
        if len(chain) > 1 and between[here, chain[-2]] <= between[here, near]:
            near = chain[-2]
            del chain[-2:]
            merges.append((float(between[here, near]), here if here < count else -1, near if near < count else -1))
            _join(between, mass, alive, here, near)
        else:
            chain.append(near)
    order = np.argsort([height for height, _, _ in merges], kind="stable")
    return [merges[number] for number in order]


def _join(between: Floats, mass: Floats, alive: NDArray[np.bool_], first: int, second: int) -> None:
    """Let the cluster with the larger mass be both, by the formula of Lance and Williams, 1967."""
    stays, goes = (first, second) if mass[first] >= mass[second] else (second, first)
    height, others = between[stays, goes], alive.copy()
    others[[stays, goes]] = False
    if np.isinf(mass[stays]):  # zero stays where it is
        row = between[stays, others]
    else:
        a, b, c = mass[stays], mass[goes], mass[others]
        total = np.maximum(a + b + c, 1e-300)
        with np.errstate(invalid="ignore"):
            row = ((a + c) * between[stays, others] + (b + c) * between[goes, others] - c * height) / total
        # As c grows to infinity: what each loses with zero, less what they lost with each other.
        apart = between[stays, others] + between[goes, others] - height
        row = np.maximum(np.where(np.isinf(c), apart, row), 0)
    between[stays, others] = between[others, stays] = row
    between[goes] = between[:, goes] = np.inf
    mass[stays] += mass[goes]
    alive[goes] = False


class _Stayers:
    """Which point of each cluster stays while clusters are merged."""

    def __init__(self, products: Floats, mass: Floats) -> None:
        count = len(products)
        self._products, self._mass = products, mass
        self._parent = np.arange(count + 1)  # the last is zero
        self._stays = np.arange(count + 1)
        self._members = [[number] for number in range(count)] + [[]]

    def _root(self, point: int) -> int:
        while self._parent[point] != point:
            point = self._parent[point]
        return int(point)

    def merge(self, first: int, second: int) -> int:
        """Merge the clusters of two points, of which -1 is zero; the point that goes."""
        zero = len(self._products)
        one, other = self._root(first if first >= 0 else zero), self._root(second if second >= 0 else zero)
        if zero in (one, other):
            goes = other if one == zero else one
            self._parent[goes] = zero
            return int(self._stays[goes])
        members = self._members[one] + self._members[other]
        points = self._stays[[one, other]]
        to_mean = self._products[points].take(members, axis=1) @ self._mass[members]
        # |point - mean|^2 without what is the same for both.
        away = self._products[points, points] * max(self._mass[members].sum(), 1e-300) - 2 * to_mean
        self._parent[other], self._members[one], self._members[other] = one, members, []
        stays, goes = points if away[0] <= away[1] else points[::-1]
        self._stays[one] = stays
        return int(goes)


def nearest_clusters(products: Floats, mass: Floats, stay: Ids, *, rounds: int = 50) -> Ids:
    """K-means from the points that stay, each of which remains in its own cluster; zero is one more.

    Lloyd, Least Squares Quantization in PCM, 1982.

    Args:
        products: inner products of the points, shape ``(points, points)``.
        mass: not negative, shape ``(points,)``.
        stay: the points that stay, shape ``(clusters,)``.
        rounds: at most.

    Returns:
        For each point the number of its cluster, -1 for zero; shape ``(points,)``.

    Example:
        >>> points = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 3.0], [0.01, 0.0]])
        >>> nearest_clusters(points @ points.T, np.ones(4), np.array([0, 2])).tolist()
        [0, 0, 1, -1]
    """
    count, squares = len(products), products.diagonal()
    found = np.full(count, -1)
    found[stay] = np.arange(len(stay))
    for _ in range(rounds):
        share = shares(found, mass, len(stay))
        to_means = share @ products
        away = squares - 2 * to_means + (to_means * share).sum(1)[:, None]
        best = away.argmin(0)
        nearest = np.where(away[best, np.arange(count)] < squares, best, -1)
        nearest[stay] = np.arange(len(stay))
        if np.array_equal(nearest, found):
            break
        found = nearest
    return found


def shares(clusters: Ids, mass: Floats, count: int) -> Floats:
    """What each point has of the mean of each cluster, shape ``(count, points)``; rows add up to one.

    Example:
        >>> shares(np.array([0, 1, 0, -1]), np.array([1.0, 1.0, 3.0, 1.0]), 2).tolist()
        [[0.25, 0.0, 0.75, 0.0], [0.0, 1.0, 0.0, 0.0]]
    """
    inside = clusters == np.arange(count)[:, None]
    weighted = inside * mass
    total = weighted.sum(1, keepdims=True)
    return np.where(total > 0, weighted / np.where(total > 0, total, 1), inside / inside.sum(1, keepdims=True))
