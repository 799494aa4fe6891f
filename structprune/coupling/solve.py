"""From relations to components: one search for what hangs together, and products brought to a form that can be trusted.

The solution numbers the classes of channels that live and die together (components). What remains as a `FactoredAxis`
is a product with at least two prunable factors: its cells follow from its factors. Every component that is a cell of no
factored axis is a root: a channel that one may choose to remove.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from structprune.coupling.equal_splits import EqualSplits, Mask
from structprune.ops.relations import Axis, Ids, Relations

__all__ = ["Components", "FactoredAxis", "Mask"]


@dataclass(frozen=True, slots=True)
class FactoredAxis:
    """Components of the cells, shaped like the product, and of each prunable factor with its dim in that shape."""

    cells: Ids
    factors: tuple[Ids, ...]
    dims: tuple[int, ...]


class Components:
    """Which channels live and die together.

    Attributes:
        ids: number of ids in the relations.
        count: number of components.
        pinned: for each component, whether it may not be removed.
        factored axes: the products whose cells follow from two factors or more.
        roots: for each component, whether it may be chosen for removal.
        splits: which of them must be removed in equal numbers.
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
        for axis, reason in relations.all_pins():
            number = numbers.setdefault(reason, len(numbers))
            ids = self._compact(axis.ids())
            fresh = self._pin_reason[ids] < 0
            self._pin_reason[ids[fresh]] = number
        self.reasons = list(numbers)
        self._relations = relations
        self.splits = EqualSplits()
        self._fixpoint()

    # -- ids -----------------------------------------------------------------------------------------------------

    def _compact(self, ids: Ids) -> Ids:
        dims = np.searchsorted(self._starts, ids, side="right") - 1
        return self._offset[dims] + ids - self._starts[dims]

    def of(self, axis: Axis) -> Ids:
        """Component of each channel of a free axis, shape ``(size,)``."""
        if axis.array is None:
            dim = int(np.searchsorted(self._starts, axis.start, side="right")) - 1
            first = int(self._offset[dim] + axis.start - self._starts[dim])
            return self._component[first : first + axis.size]
        return self._component[self._compact(axis.array)]

    @property
    def pinned_ids(self) -> int:
        """How many ids may not be removed; it grows with each pin, while components may be joined by one."""
        return int(self.pinned[self._component].sum())

    # -- solving -------------------------------------------------------------------------------------------------

    def _fixpoint(self) -> None:
        products = [
            (product.cells, product.factors, [False] * len(product.factors)) for product in self._relations.products
        ]
        while True:
            self.count = int(self._component.max()) + 1 if self._total else 0
            self._first = np.zeros(self.count, dtype=np.int64)
            self._first[self._component[::-1]] = np.arange(self._total)[::-1]
            self.pinned, self.reason = self._pins()
            edges, factored_axes, conflicts = self._reduce(products)
            if not edges and not conflicts:
                break
            if edges:
                merged = _components(self.count, edges)
                self._component = merged[self._component]
        self.factored_axes = factored_axes
        self.roots = ~self.pinned
        for factored in factored_axes:
            self.roots[factored.cells.ravel()] = False

    def _pins(self) -> tuple[Mask, Ids]:
        reason = np.full(self.count, -1, dtype=np.int64)
        where = np.flatnonzero(self._pin_reason >= 0)[::-1]
        reason[self._component[where]] = self._pin_reason[where]
        return reason >= 0, reason

    def _spread(self, components: Ids, reason: Ids) -> bool:
        """Pin these components, for these reasons; whether that is changed."""
        changed = ~self.pinned[components]
        if not changed.any():
            return False
        ids, numbers = components[changed], reason[changed]
        self.pinned[ids] = True
        self.reason[ids] = numbers
        self._pin_reason[self._first[ids]] = numbers
        return True

    def _number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)

    def _reduce(
        self, products: list[tuple[Axis, tuple[Axis, ...], list[bool]]]
    ) -> tuple[list[tuple[Ids, Ids]], list[FactoredAxis], bool]:
        """One round: spread pins, tie products of a single free factor, join equal products, find conflicts."""
        edges: list[tuple[Ids, Ids]] = []
        factored_axes: list[tuple[FactoredAxis, list[bool]]] = []
        seen_cells: dict[object, FactoredAxis] = {}
        seen_factors: dict[object, FactoredAxis] = {}
        changed = False
        for cells_row, factors, closed in products:
            shape = tuple(axis.size for axis in factors)
            cells = self.of(cells_row).reshape(shape)
            changed |= self._spread_pins(cells, factors, closed)
            prunable = [
                i for i, axis in enumerate(factors) if axis.free and not closed[i] and not self._all_pinned(axis)
            ]
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
            factored = FactoredAxis(cells, parts, tuple(prunable))
            by_cells, by_factors = (shape, cells.tobytes()), tuple(part.tobytes() for part in parts)
            twin = seen_cells.setdefault(by_cells, factored)
            if twin is not factored and twin.dims == factored.dims:
                edges += [(a, b) for a, b in zip(parts, twin.factors, strict=True) if not np.array_equal(a, b)]
                continue
            twin = seen_factors.setdefault((shape, by_factors), factored)
            if twin is not factored and twin.dims == factored.dims:
                if not np.array_equal(twin.cells, cells):
                    edges.append((cells.ravel(), twin.cells.ravel()))
                continue
            factored_axes.append((factored, closed))
        if edges or changed:
            return edges, [], changed
        return [], [factored for factored, _ in factored_axes], self._conflicts(factored_axes)

    def _all_pinned(self, axis: Axis) -> bool:
        return bool(self.pinned[self.of(axis)].all())

    def _spread_pins(self, cells: Ids, factors: tuple[Axis, ...], closed: list[bool]) -> bool:
        """A pinned cell pins its indices; a cell with all its indices pinned is pinned."""
        changed = False
        pinned = self.pinned[cells]
        everywhere = np.ones(cells.shape, dtype=bool)
        reason = np.full(cells.shape, -1, dtype=np.int64)
        for dim, axis in enumerate(factors):
            others = tuple(i for i in range(cells.ndim) if i != dim)
            if not axis.free or closed[dim]:
                continue
            part = self.of(axis)
            if pinned.any():
                hit = pinned.any(axis=others)
                changed |= self._spread(part[hit], np.where(pinned, self.reason[cells], -1).max(axis=others)[hit])
            along = [-1 if i == dim else 1 for i in range(cells.ndim)]
            everywhere &= self.pinned[part].reshape(along)
            reason = np.maximum(reason, self.reason[part].reshape(along))
        if everywhere.any():
            if (reason[everywhere] < 0).any():
                reason[everywhere & (reason < 0)] = self._number("its position is fixed")
            changed |= self._spread(cells[everywhere], reason[everywhere])
        return changed

    def _conflicts(self, factored_axes: list[tuple[FactoredAxis, list[bool]]]) -> bool:
        """Where products of other shapes share cells, or one holds a cell twice, only the finest factor may go."""
        owner = np.full(self.count, -1, dtype=np.int64)
        at_fault: set[int] = set()
        for number, (factored, _) in enumerate(factored_axes):
            flat = factored.cells.ravel()
            if len(np.unique(flat)) < len(flat):
                at_fault.add(number)
            others = owner[flat]
            at_fault.update(int(other) for other in np.unique(others[others >= 0]))
            if (others >= 0).any():
                at_fault.add(number)
            owner[flat] = number
            for part in factored.factors:
                # A factor that is also a cell of its own product would decide about itself.
                if np.isin(part, flat).any() or len(np.unique(part)) < len(part):
                    at_fault.add(number)
        for number in at_fault:
            factored, closed = factored_axes[number]
            left = [(self._classes(factored.cells, dim), dim) for dim in factored.dims]
            keep = max(left)[1]
            for dim, part in zip(factored.dims, factored.factors, strict=True):
                if dim != keep:
                    closed[dim] = True
                    reason = self._number("its channels are seen in groups of different sizes by different operations")
                    self._spread(part, np.full(len(part), reason))
        return bool(at_fault)

    def _classes(self, cells: Ids, dim: int) -> int:
        """How many indices along `dim` would still go one by one if only they could."""
        along = np.arange(cells.shape[dim]).reshape([-1 if i == dim else 1 for i in range(cells.ndim)])
        _, compact = np.unique(cells, return_inverse=True)
        index = np.broadcast_to(along, cells.shape).ravel() + int(compact.max()) + 1
        return len(np.unique(_components(int(index.max()) + 1, [(compact.ravel(), index)])))

    # -- removing ------------------------------------------------------------------------------------------------

    def removed(self, chosen: Ids) -> Mask:
        """Which components are gone once `chosen` and all that is coupled to them are; shape ``(count,)``."""
        mask = np.zeros(self.count, dtype=bool)
        mask[chosen] = True
        return self.closure(mask)

    def closure(self, removed: Mask) -> Mask:
        """Everything that dies with the components marked in `removed`, shape ``(count,)``."""
        removed = removed.copy()
        before = -1
        while before != (before := int(removed.sum())):
            for factored in self.factored_axes:
                cells = np.zeros(factored.cells.shape, dtype=bool)
                for dim, part in zip(factored.dims, factored.factors, strict=True):
                    cells |= removed[part].reshape([-1 if i == dim else 1 for i in range(cells.ndim)])
                removed[factored.cells[cells]] = True
        return removed


def _distinct(
    cells: Ids, parts: tuple[Ids, ...], dims: list[int]
) -> tuple[Ids, tuple[Ids, ...], list[tuple[Ids, Ids]]]:
    """The product with each index of a factor once; cells of equal indices are to be joined."""
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
        parent = connected_components(count, a[whole], b[whole])
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
    return connected_components(count, np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))


def connected_components(count: int, left: Ids, right: Ids) -> Ids:
    """A number for each of `count` things, equal for those that the pairs of `left` and `right` join: shape (count,).

    Example:
        >>> import numpy as np
        >>> connected_components(4, np.array([0, 2]), np.array([2, 3])).tolist()
        [0, 1, 0, 0]
    """
    # Here, since importing them takes longer than solving most models.
    from scipy.sparse import coo_array, csgraph

    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    return csgraph.connected_components(graph, directed=False)[1].astype(np.int64)
