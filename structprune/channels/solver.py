"""From relations to components: one search for what hangs together, and grids brought to a form that can be trusted.

The solution numbers the classes of channels that live and die together (components). What remains as a `Lattice` is a
grid with at least two prunable factors: its cells follow from its factors. Every component that is a cell of no
lattice is a root: a channel that one may choose to remove.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from structprune.channels.balance import Balances, Mask
from structprune.channels.joining import joined
from structprune.ops.relations import Ids, Relations, Row

__all__ = ["Components", "Lattice", "Mask"]


@dataclass(frozen=True, slots=True)
class Lattice:
    """Components of the cells, shaped like the grid, and of each prunable factor with its dim in that shape."""

    cells: Ids
    factors: tuple[Ids, ...]
    dims: tuple[int, ...]


class Components:
    """Which channels live and die together.

    Attributes:
        ids: number of ids in the relations.
        count: number of components.
        pinned: for each component, whether it may not be removed.
        lattices: the grids whose cells follow from two factors or more.
        roots: for each component, whether it may be chosen for removal.
        balances: which of them must be removed in equal numbers.
    """

    def __init__(self, relations: Relations) -> None:
        self._starts = np.asarray([*relations.starts], dtype=np.int64)
        self._axis_of, self._offset, total = _aliased(relations)
        self._total = total
        self.ids = relations.total
        pairs = [(self._compact(a), self._compact(b)) for a, b in _arrays(relations)]
        self._component = _components(total, pairs)
        self.reasons: list[str] = []
        self._pin_reason = np.full(total, -1, dtype=np.int64)
        numbers: dict[str, int] = {}
        for row, reason in relations.all_pins():
            number = numbers.setdefault(reason, len(numbers))
            ids = self._compact(row.ids())
            fresh = self._pin_reason[ids] < 0
            self._pin_reason[ids[fresh]] = number
        self.reasons = list(numbers)
        self._relations = relations
        self.balances = Balances()
        self._fixpoint()

    # -- ids -----------------------------------------------------------------------------------------------------

    def _compact(self, ids: Ids) -> Ids:
        dims = np.searchsorted(self._starts, ids, side="right") - 1
        return self._offset[dims] + ids - self._starts[dims]

    def of(self, row: Row) -> Ids:
        """Component of each channel of a free row, shape ``(size,)``."""
        if row.array is None:
            dim = int(np.searchsorted(self._starts, row.start, side="right")) - 1
            first = int(self._offset[dim] + row.start - self._starts[dim])
            return self._component[first : first + row.size]
        return self._component[self._compact(row.array)]

    # -- solving -------------------------------------------------------------------------------------------------

    def _fixpoint(self) -> None:
        grids = [(grid.cells, grid.factors, [False] * len(grid.factors)) for grid in self._relations.grids]
        while True:
            self.count = int(self._component.max()) + 1 if self._total else 0
            self._first = np.zeros(self.count, dtype=np.int64)
            self._first[self._component[::-1]] = np.arange(self._total)[::-1]
            self.pinned, self.reason = self._pins()
            edges, lattices, conflicts = self._reduce(grids)
            if not edges and not conflicts:
                break
            if edges:
                merged = _components(self.count, edges)
                self._component = merged[self._component]
        self.lattices = lattices
        self.roots = ~self.pinned
        for lattice in lattices:
            self.roots[lattice.cells.ravel()] = False

    def _pins(self) -> tuple[Mask, Ids]:
        reason = np.full(self.count, -1, dtype=np.int64)
        where = np.flatnonzero(self._pin_reason >= 0)[::-1]
        reason[self._component[where]] = self._pin_reason[where]
        return reason >= 0, reason

    def _spread(self, components: Ids, reason: Ids) -> bool:
        """Pin these components, for these reasons; whether that is news."""
        news = ~self.pinned[components]
        if not news.any():
            return False
        ids, numbers = components[news], reason[news]
        self.pinned[ids] = True
        self.reason[ids] = numbers
        self._pin_reason[self._first[ids]] = numbers
        return True

    def _number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)

    def _reduce(
        self, grids: list[tuple[Row, tuple[Row, ...], list[bool]]]
    ) -> tuple[list[tuple[Ids, Ids]], list[Lattice], bool]:
        """One round: spread pins, turn grids of a single free factor into ties, join equal grids, find conflicts."""
        edges: list[tuple[Ids, Ids]] = []
        lattices: list[tuple[Lattice, list[bool]]] = []
        seen_cells: dict[object, Lattice] = {}
        seen_factors: dict[object, Lattice] = {}
        news = False
        for cells_row, factors, closed in grids:
            shape = tuple(row.size for row in factors)
            cells = self.of(cells_row).reshape(shape)
            news |= self._spread_pins(cells, factors, closed)
            prunable = [i for i, row in enumerate(factors) if row.free and not closed[i] and not self._all_pinned(row)]
            parts = tuple(self.of(factors[i]) for i in prunable)
            if len(prunable) == 1:
                dim = prunable[0]
                along = np.broadcast_to(parts[0].reshape([-1 if i == dim else 1 for i in range(len(shape))]), shape)
                if not np.array_equal(along, cells):
                    edges.append((cells.ravel(), along.ravel()))
                continue
            if not prunable:
                continue
            cells, parts, repeats = _distinct(cells, parts, prunable)
            edges += repeats
            shape = cells.shape
            lattice = Lattice(cells, parts, tuple(prunable))
            by_cells, by_factors = (shape, cells.tobytes()), tuple(part.tobytes() for part in parts)
            twin = seen_cells.setdefault(by_cells, lattice)
            if twin is not lattice and twin.dims == lattice.dims:
                edges += [(a, b) for a, b in zip(parts, twin.factors, strict=True) if not np.array_equal(a, b)]
                continue
            twin = seen_factors.setdefault((shape, by_factors), lattice)
            if twin is not lattice and twin.dims == lattice.dims:
                if not np.array_equal(twin.cells, cells):
                    edges.append((cells.ravel(), twin.cells.ravel()))
                continue
            lattices.append((lattice, closed))
        if edges or news:
            return edges, [], news
        return [], [lattice for lattice, _ in lattices], self._conflicts(lattices)

    def _all_pinned(self, row: Row) -> bool:
        return bool(self.pinned[self.of(row)].all())

    def _spread_pins(self, cells: Ids, factors: tuple[Row, ...], closed: list[bool]) -> bool:
        """A pinned cell pins its indices; a cell with all its indices pinned is pinned."""
        news = False
        pinned = self.pinned[cells]
        everywhere = np.ones(cells.shape, dtype=bool)
        reason = np.full(cells.shape, -1, dtype=np.int64)
        for dim, row in enumerate(factors):
            others = tuple(i for i in range(cells.ndim) if i != dim)
            if not row.free or closed[dim]:
                continue
            part = self.of(row)
            if pinned.any():
                hit = pinned.any(axis=others)
                news |= self._spread(part[hit], np.where(pinned, self.reason[cells], -1).max(axis=others)[hit])
            along = [-1 if i == dim else 1 for i in range(cells.ndim)]
            everywhere &= self.pinned[part].reshape(along)
            reason = np.maximum(reason, self.reason[part].reshape(along))
        if everywhere.any():
            if (reason[everywhere] < 0).any():
                reason[everywhere & (reason < 0)] = self._number("its position is fixed")
            news |= self._spread(cells[everywhere], reason[everywhere])
        return news

    def _conflicts(self, lattices: list[tuple[Lattice, list[bool]]]) -> bool:
        """Where grids of different shape share cells, or a grid holds a cell twice, only the finest factor may go."""
        owner = np.full(self.count, -1, dtype=np.int64)
        guilty: set[int] = set()
        for number, (lattice, _) in enumerate(lattices):
            flat = lattice.cells.ravel()
            if len(np.unique(flat)) < len(flat):
                guilty.add(number)
            others = owner[flat]
            guilty.update(int(other) for other in np.unique(others[others >= 0]))
            if (others >= 0).any():
                guilty.add(number)
            owner[flat] = number
            for part in lattice.factors:
                # A factor that is also a cell of its own grid would decide about itself.
                if np.isin(part, flat).any() or len(np.unique(part)) < len(part):
                    guilty.add(number)
        for number in guilty:
            lattice, closed = lattices[number]
            left = [(self._classes(lattice.cells, dim), dim) for dim in lattice.dims]
            keep = max(left)[1]
            for dim, part in zip(lattice.dims, lattice.factors, strict=True):
                if dim != keep:
                    closed[dim] = True
                    reason = self._number("its channels are seen in groups of different sizes by different operations")
                    self._spread(part, np.full(len(part), reason))
        return bool(guilty)

    def _classes(self, cells: Ids, dim: int) -> int:
        """How many indices along `dim` would still go one by one if only they could."""
        along = np.arange(cells.shape[dim]).reshape([-1 if i == dim else 1 for i in range(cells.ndim)])
        _, compact = np.unique(cells, return_inverse=True)
        index = np.broadcast_to(along, cells.shape).ravel() + int(compact.max()) + 1
        joined = _components(int(index.max()) + 1, [(compact.ravel(), index)])
        return len(np.unique(joined))

    # -- removing ------------------------------------------------------------------------------------------------

    def dead(self, chosen: Ids) -> Mask:
        """Which components are gone once `chosen` and all that is coupled to them are; shape ``(count,)``."""
        mask = np.zeros(self.count, dtype=bool)
        mask[chosen] = True
        return self.closure(mask)

    def closure(self, dead: Mask) -> Mask:
        """Everything that dies with the components marked in `dead`, shape ``(count,)``."""
        dead = dead.copy()
        before = -1
        while before != (before := int(dead.sum())):
            for lattice in self.lattices:
                cells = np.zeros(lattice.cells.shape, dtype=bool)
                for dim, part in zip(lattice.dims, lattice.factors, strict=True):
                    cells |= dead[part].reshape([-1 if i == dim else 1 for i in range(cells.ndim)])
                dead[lattice.cells[cells]] = True
        return dead


def _distinct(
    cells: Ids, parts: tuple[Ids, ...], dims: list[int]
) -> tuple[Ids, tuple[Ids, ...], list[tuple[Ids, Ids]]]:
    """The grid with each index of a factor once; cells of equal indices are to be joined."""
    edges: list[tuple[Ids, Ids]] = []
    result: list[Ids] = []
    for dim, part in zip(dims, parts, strict=True):
        _, first, inverse = np.unique(part, return_index=True, return_inverse=True)
        if len(first) < len(part):
            rank = np.argsort(np.argsort(first))
            kept = cells.take(np.sort(first), dim)
            again = kept.take(rank[inverse], dim)
            if not np.array_equal(again, cells):
                edges.append((again.ravel(), cells.ravel()))
            cells, part = kept, part[np.sort(first)]
        result.append(part)
    return cells, tuple(result), edges


def _aliased(relations: Relations) -> tuple[Ids, Ids, int]:
    """Join dims that are the same as a whole: dim -> representative, dim -> first compact id, number of ids."""
    starts = np.asarray(relations.starts, dtype=np.int64)
    sizes = np.asarray(relations.sizes, dtype=np.int64)
    count = len(starts)
    parent = np.arange(count)
    if relations.runs:
        runs = np.asarray(relations.runs, dtype=np.int64)
        a = np.searchsorted(starts, runs[:, 0], side="right") - 1
        b = np.searchsorted(starts, runs[:, 1], side="right") - 1
        whole = _is_whole(runs, a, b, starts, sizes)
        parent = joined(count, a[whole], b[whole])
    _, first, inverse = np.unique(parent, return_index=True, return_inverse=True)
    length = sizes[first]
    offsets = np.concatenate([[0], np.cumsum(length)])
    return inverse, offsets[:-1][inverse], int(offsets[-1])


def _is_whole(runs: Ids, a: Ids, b: Ids, starts: Ids, sizes: Ids) -> Mask:
    whole = (starts[a] == runs[:, 0]) & (starts[b] == runs[:, 1])
    return whole & (sizes[a] == runs[:, 2]) & (sizes[b] == runs[:, 2])


def _arrays(relations: Relations) -> Iterable[tuple[Ids, Ids]]:
    """The relations that do not join whole dims, as arrays of ids."""
    yield from relations.arrays
    yield from relations.loosened()
    if relations.runs:
        starts = np.asarray(relations.starts, dtype=np.int64)
        sizes = np.asarray(relations.sizes, dtype=np.int64)
        runs = np.asarray(relations.runs, dtype=np.int64)
        a = np.searchsorted(starts, runs[:, 0], side="right") - 1
        b = np.searchsorted(starts, runs[:, 1], side="right") - 1
        for left, right, size in runs[~_is_whole(runs, a, b, starts, sizes)]:
            yield np.arange(left, left + size), np.arange(right, right + size)


def _components(count: int, pairs: list[tuple[Ids, Ids]]) -> Ids:
    if not pairs:
        return np.arange(count)
    return joined(count, np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))
