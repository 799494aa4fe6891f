"""Where the nodes of a layered graph are drawn: ranks from top to bottom, broken into columns like a newspaper.

The steps are those of Sugiyama, Tagawa and Toda (1981): ranks by the longest path, a chain of waypoints for each edge
that passes a rank, orders by barycentres, and positions that are least-squares best for the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Edge = tuple[int, int]

WIDTH, HEIGHT = 156.0, 36.0
GAP, PITCH = 22.0, 60.0
GUTTER = 60.0
MARGIN = 28.0
_WAYPOINT = 14.0
_SWEEPS = 8
# Columns are chosen so that the whole drawing is about so many times wider than high.
_ASPECT = 1.35
_SHORTEST = 5


Step = tuple[Literal["M", "L", "Q", "C"], tuple[Point, ...]]
"""Move to a point, a straight line there, or a curve: its control points and its end."""
Course = list[Step]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes, in pixels.

    Attributes:
        centres: of each node.
        courses: for each edge, where its line runs.
        ranks: for each rank, its nodes from left to right.
        width: of the drawing.
        height: of the drawing.
    """

    centres: list[Point]
    courses: list[Course]
    ranks: list[list[int]]
    width: float
    height: float


def layered(count: int, edges: Sequence[Edge]) -> Layout:
    """Lay out a graph without cycles whose edges go from lower to higher numbers.

    Args:
        count: number of nodes, at least one.
        edges: pairs of node numbers.
    """
    rank = _ranks(count, edges)
    chains, rank = _chains(edges, rank)
    links = list(dict.fromkeys((a, b) for chain in chains for a, b in pairwise(chain)))
    rows = _ordered(rank, links)
    widths = np.where(np.arange(len(rank)) < count, WIDTH, _WAYPOINT)
    x = _positions(rows, links, widths)
    column = _columns(rows, links, x, widths)
    return _placed(count, rows, chains, x, widths, column)


def _ranks(count: int, edges: Sequence[Edge]) -> list[int]:
    """The longest path from a source; a node without any goes right above what it feeds."""
    rank = [0] * count
    for start, end in sorted(edges, key=lambda edge: edge[1]):
        rank[end] = max(rank[end], rank[start] + 1)
    fed = {end for _, end in edges}
    for node in range(count):
        ends = [rank[end] for start, end in edges if start == node] if node not in fed else []
        rank[node] = min(ends) - 1 if ends else rank[node]
    return rank


def _chains(edges: Sequence[Edge], rank: list[int]) -> tuple[list[list[int]], list[int]]:
    """Each edge as a chain of nodes of adjacent ranks, with waypoints in between; and the ranks of all.

    Edges from one node share their waypoints, so that what goes to many places is drawn as one trunk.
    """
    rank = list(rank)
    trunks: dict[int, list[int]] = {}
    chains: list[list[int]] = []
    for start, end in edges:
        trunk = trunks.setdefault(start, [])
        between = rank[end] - rank[start] - 1
        while len(trunk) < between:
            trunk.append(len(rank))
            rank.append(rank[start] + len(trunk))
        chains.append([start, *trunk[:between], end])
    return chains, rank


def _ordered(rank: list[int], links: list[Edge]) -> list[list[int]]:
    """The nodes of each rank in an order with few crossings: barycentres, swept down and up."""
    rows: list[list[int]] = [[] for _ in range(max(rank) + 1)]
    for node, row in enumerate(rank):
        rows[row].append(node)
    above, below = _neighbours(len(rank), links)
    best, fewest = [list(row) for row in rows], _crossings(rows, above)
    for sweep in range(_SWEEPS):
        if sweep % 2 == 0:
            _sort_by_centres(rows, above)
        else:
            _sort_by_centres(rows[::-1], below)
        crossings = _crossings(rows, above)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _sort_by_centres(rows: list[list[int]], near: list[list[int]]) -> None:
    """Sort each row, in place, by the mean place of each node's neighbours in the row before it."""
    place = {node: i for row in rows for i, node in enumerate(row)}
    for row in rows:
        centre = {n: float(np.mean([place[m] for m in near[n]])) if near[n] else float(place[n]) for n in row}
        row.sort(key=lambda node, centre=centre: centre[node])
        place.update({node: i for i, node in enumerate(row)})


def _neighbours(count: int, links: list[Edge]) -> tuple[list[list[int]], list[list[int]]]:
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for start, end in links:
        above[end].append(start)
        below[start].append(end)
    return above, below


def _crossings(rows: list[list[int]], above: list[list[int]]) -> int:
    total = 0
    for upper, row in pairwise(rows):
        place = {node: i for i, node in enumerate(upper)}
        ends = np.array([place[m] for node in row for m in sorted(above[node], key=place.__getitem__)], dtype=np.int64)
        total += int(np.triu(ends[:, None] > ends[None, :], 1).sum())
    return total


def _positions(rows: list[list[int]], links: list[Edge], widths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Horizontal centres: each near the mean of its neighbours, apart by at least the gap."""
    above, below = _neighbours(len(widths), links)
    x = np.zeros(len(widths))
    for row in rows:
        x[row] = _spread(np.zeros(len(row)), widths[row])
    real = widths > _WAYPOINT
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            near = [(above if down else below)[node] for node in row]
            # Layers stand under layers, and waypoints under waypoints, so that both run straight.
            wish = [_mean(x[n], real[n] == real[node]) if n else x[node] for node, n in zip(row, near, strict=True)]
            weight = np.where(real[row], [1.0 + len(n) for n in near], 0.02)
            x[row] = _spread(np.array(wish), widths[row], weight)
    return x


def _mean(x: NDArray[np.float64], alike: NDArray[np.bool_]) -> float:
    return float(np.average(x, weights=np.where(alike, 1.0, 0.02)))


def _spread(
    wish: NDArray[np.float64], widths: NDArray[np.float64], weight: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """The positions nearest to `wish`, in this order and without overlap (pool adjacent violators)."""
    apart = (widths[1:] + widths[:-1]) / 2 + GAP
    offset = np.concatenate([[0.0], np.cumsum(apart)])
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, mass in zip(wish - offset, np.ones_like(wish) if weight is None else weight, strict=True):
        block = (float(value), float(mass), 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, heavy, length = blocks.pop()
            total = heavy + block[1]
            block = ((mean * heavy + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return np.concatenate([np.full(length, mean) for mean, _, length in blocks]) + offset


def _columns(
    rows: list[list[int]], links: list[Edge], x: NDArray[np.float64], widths: NDArray[np.float64]
) -> list[int]:
    """The column of each rank: as many as make the drawing neither too wide nor too high."""
    low = np.array([(x[row] - widths[row] / 2).min() for row in rows])
    high = np.array([(x[row] + widths[row] / 2).max() for row in rows])
    rank = {node: r for r, row in enumerate(rows) for node in row}
    # How many lines would be cut above each rank.
    cut = np.array([len(row) for row in rows])
    for start, _ in {(a, rank[b]) for a, b in links}:
        cut[rank[start] + 1] += 1
    best, nearest = [0] * len(rows), float("inf")
    for wanted in range(1, max(1, len(rows) // _SHORTEST) + 1):
        column = _broken(cut, wanted)
        parts = [np.flatnonzero(np.array(column) == c) for c in range(column[-1] + 1)]
        wide = sum(float(high[part].max() - low[part].min()) + GUTTER for part in parts)
        aspect = wide / (max(map(len, parts)) * PITCH)
        if (distance := abs(log(aspect / _ASPECT))) < nearest:
            best, nearest = column, distance
    return best


def _broken(cut: NDArray[np.int64], wanted: int) -> list[int]:
    """Ranks in columns of about equal height, broken where little is cut."""
    per = len(cut) / wanted
    breaks: list[int] = []
    for number in range(1, wanted):
        ideal, reach = round(number * per), round(per / 5)
        near = range(max(1, ideal - reach), min(len(cut), ideal + reach + 1))
        breaks.append(min(near, key=lambda r: (cut[r], abs(r - ideal))))
    return [sum(r >= start for start in breaks) for r in range(len(cut))]


def _placed(
    count: int,
    rows: list[list[int]],
    chains: list[list[int]],
    x: NDArray[np.float64],
    widths: NDArray[np.float64],
    column: list[int],
) -> Layout:
    rank = {node: r for r, row in enumerate(rows) for node in row}
    tops = {c: column.index(c) for c in set(column)}
    shift, right_edge = _column_places(rows, x, widths, column)
    point = {
        node: (float(x[node] + shift[r]), MARGIN + HEIGHT / 2 + GUTTER / 3 + PITCH * (r - tops[column[r]]))
        for node, r in rank.items()
    }
    height = max(y for _, y in point.values()) + HEIGHT / 2 + GUTTER / 3 + MARGIN
    bends = _Bends(point, rank, column, right_edge, count)
    courses = [bends.course(chain) for chain in chains]
    ranks = [[node for node in row if node < count] for row in rows]
    return Layout([point[n] for n in range(count)], courses, ranks, max(right_edge.values()) + MARGIN, height)


def _column_places(
    rows: list[list[int]], x: NDArray[np.float64], widths: NDArray[np.float64], column: list[int]
) -> tuple[NDArray[np.float64], dict[int, float]]:
    """How far the nodes of each rank move to the right into their column, and where each column ends."""
    left, shift = 0.0, np.zeros(len(rows))
    right_edge: dict[int, float] = {}
    for c in sorted(set(column)):
        ranks = [r for r in range(len(rows)) if column[r] == c]
        nodes = [node for r in ranks for node in rows[r]]
        low = float((x[nodes] - widths[nodes] / 2).min())
        high = float((x[nodes] + widths[nodes] / 2).max())
        shift[ranks] = MARGIN + left - low
        left += high - low + GUTTER
        right_edge[c] = MARGIN + left - GUTTER
    return shift, right_edge


class _Bends:
    """Turns chains of nodes into lines: curves inside a column, rounded steps from one column to the next."""

    def __init__(
        self, point: dict[int, Point], rank: dict[int, int], column: list[int], right: dict[int, float], count: int
    ) -> None:
        self._point, self._rank, self._column, self._right, self._count = point, rank, column, right, count
        self._lanes: dict[int, dict[Edge, int]] = {}

    def course(self, chain: list[int]) -> Course:
        """Where the line along a chain runs."""
        x, y = self._point[chain[0]]
        steps: list[Step] = [("M", ((x, y + HEIGHT / 2),))]
        for a, b in pairwise(chain):
            (x0, y0), (x1, y1) = self._point[a], self._point[b]
            y0 += HEIGHT / 2
            y1 -= HEIGHT / 2
            if self._column[self._rank[a]] != self._column[self._rank[b]]:
                steps += self._step((x0, y0), (x1, y1), (a, b))
            elif abs(x0 - x1) < 1:
                steps.append(("L", ((x1, y1),)))
            else:
                middle = (y0 + y1) / 2
                steps.append(("C", ((x0, middle), (x1, middle), (x1, y1))))
            if b >= self._count:
                steps.append(("L", ((x1, y1 + HEIGHT),)))
        return steps

    def _step(self, start: Point, end: Point, link: Edge) -> Course:
        """Down, right into the gutter, up, right and down: a lane of its own for each link."""
        rank = self._rank[link[0]]
        lanes = self._lanes.setdefault(rank, {})
        lane = lanes.setdefault(link, len(lanes))
        away = 12.0 + 7 * (lane % 5)
        (x0, y0), (x1, y1) = start, end
        gutter, low, high = self._right[self._column[rank]] + away, y0 + away, y1 - away
        r = 6.0
        return [
            ("L", ((x0, low - r),)),
            ("Q", ((x0, low), (x0 + r, low))),
            ("L", ((gutter - r, low),)),
            ("Q", ((gutter, low), (gutter, low - r))),
            ("L", ((gutter, high + r),)),
            ("Q", ((gutter, high), (gutter + r, high))),
            ("L", ((x1 - r, high),)),
            ("Q", ((x1, high), (x1, high + r))),
            ("L", ((x1, y1),)),
        ]
