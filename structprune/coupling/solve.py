"""From relations to components: connected components, and products brought to a form that can be trusted.

The solution numbers the classes of channels that are removed or kept together (components). What remains as a
`FactoredAxis` is a product with at least two prunable factors: its cells follow from its factors. Every component that
is a cell of no factored axis is a root: a channel that one may choose to remove.

Example: 6 channels, read by a layer whose weight numbers them anew, and viewed as 2 heads of 3 channels.
    >>> relations = Relations()
    >>> made, read = relations.new_axis(6), relations.new_axis(6)  # ids 0 to 5 and 6 to 11
    >>> heads, sizes = relations.split(relations.same(made, read), (2, 3))  # ids 12 and 13, and 14 to 16
    >>> solved = Components(relations)
    >>> solved.of(read).tolist(), solved.of(heads).tolist(), solved.of(sizes).tolist()
    ([0, 1, 2, 3, 4, 5], [6, 7], [8, 9, 10])
    >>> np.flatnonzero(solved.roots).tolist(), np.flatnonzero(solved.removed(solved.of(heads)[1:])).tolist()
    ([6, 7, 8, 9, 10], [3, 4, 5, 7])
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np

from structprune.coupling.equal_splits import EqualSplits, Mask
from structprune.coupling.factored import FactoredAxis, along, distinct, followed, twins
from structprune.errors import RuleError
from structprune.ops.relations import Axis, Ids, Relations

__all__ = ["Components", "FactoredAxis", "Mask"]

# (product, dim): factors that may not go one by one, since products of other shapes share their cells.
Closed = frozenset[tuple[int, int]]


class Components:
    """Which channels are removed or kept together.

    Attributes:
        ids: number of ids in the relations.
        count: number of components.
        pinned: for each component, whether it may not be removed.
        factored_axes: the products whose cells follow from two factors or more.
        roots: for each component, whether it may be chosen for removal.
        splits: which of them must be removed in equal numbers.
    """

    def __init__(self, relations: Relations) -> None:
        self._starts = np.asarray([*relations.starts], dtype=np.int64)
        self._first_ids = [*relations.starts]  # of an axis that is a run, the place is looked up in plain Python
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
        self.factored_axes = self._settle()
        self.roots = ~self.pinned
        for factored in self.factored_axes:
            self.roots[factored.cells.ravel()] = False

    # -- ids -----------------------------------------------------------------------------------------------------

    def _compact(self, ids: Ids) -> Ids:
        """Ids without those of axes that equal another as a whole: in the example, 6 to 11 are 0 to 5, and 12 is 6."""
        dims = np.searchsorted(self._starts, ids, side="right") - 1
        return self._offset[dims] + ids - self._starts[dims]

    def of(self, axis: Axis) -> Ids:
        """Component of each channel of a free axis, shape ``(size,)``."""
        if axis.array is None:
            dim = bisect_right(self._first_ids, axis.start) - 1
            first = int(self._offset[dim]) + axis.start - self._first_ids[dim]
            return self._component[first : first + axis.size]
        return self._component[self._compact(axis.array)]

    @property
    def pinned_ids(self) -> int:
        """How many ids may not be removed; it grows with each pin, while components may be joined by one."""
        return int(self.pinned[self._component].sum())

    # -- solving -------------------------------------------------------------------------------------------------

    def _settle(self) -> list[FactoredAxis]:
        """Pass over the products, from the first pass again wherever one changes something, until none does.

        Pins spread; then cells and indices that follow from each other are joined; then conflicts are closed.
        """
        closed: Closed = frozenset()
        while True:
            self._number_components()
            while self._spread_pins(closed):
                pass
            products = self._prunable_products(closed)
            several = [distinct(product) for product in products if len(product.factors) > 1]
            again, factored_axes = twins([product for product, _ in several])
            edges = [*followed(products), *(edge for _, repeats in several for edge in repeats), *again]
            if edges:
                self._component = _components(self.count, edges)[self._component]
                continue
            conflicts = self._conflicts(factored_axes)
            if not conflicts:
                return factored_axes
            closed |= self._close(conflicts)

    def _number_components(self) -> None:
        self.count = int(self._component.max()) + 1 if self._total else 0
        self._first = np.zeros(self.count, dtype=np.int64)
        self._first[self._component[::-1]] = np.arange(self._total)[::-1]  # the first id is written last, and stays
        self.pinned, self.reason = self._pins()

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

    def _prunable_products(self, closed: Closed) -> list[FactoredAxis]:
        """The products with those factors that may go, if there are any."""
        products: list[FactoredAxis] = []
        for number, product in enumerate(self._relations.products):
            dims = tuple(
                dim
                for dim, axis in enumerate(product.factors)
                if axis.free and (number, dim) not in closed and not self._all_pinned(axis)
            )
            if dims:
                cells = self.of(product.cells).reshape([axis.size for axis in product.factors])
                products.append(FactoredAxis(cells, tuple(self.of(product.factors[dim]) for dim in dims), dims, number))
        return products

    def _all_pinned(self, axis: Axis) -> bool:
        return bool(self.pinned[self.of(axis)].all())

    def _spread_pins(self, closed: Closed) -> bool:
        """One round of pins between the cells and the indices of each product; whether that pinned anything more."""
        changed = False
        for number, product in enumerate(self._relations.products):
            cells = self.of(product.cells).reshape([axis.size for axis in product.factors])
            factors = [
                (dim, self.of(axis))
                for dim, axis in enumerate(product.factors)
                if axis.free and (number, dim) not in closed
            ]
            changed |= self._pin_indices(cells, factors)
            changed |= self._pin_cells(cells, factors)
        return changed

    def _pin_indices(self, cells: Ids, factors: list[tuple[int, Ids]]) -> bool:
        """A pinned cell pins its indices: of 2 heads of 3, cell 4 pins head 1 and position 1 of all heads."""
        pinned = self.pinned[cells]
        if not pinned.any():
            return False
        changed = False
        for dim, part in factors:
            others = tuple(i for i in range(cells.ndim) if i != dim)
            hit = pinned.any(axis=others)
            changed |= self._spread(part[hit], np.where(pinned, self.reason[cells], -1).max(axis=others)[hit])
        return changed

    def _pin_cells(self, cells: Ids, factors: list[tuple[int, Ids]]) -> bool:
        """A cell with all its indices pinned is pinned."""
        everywhere = np.ones(cells.shape, dtype=bool)
        reason = np.full(cells.shape, -1, dtype=np.int64)
        for dim, part in factors:
            everywhere &= along(self.pinned[part], dim, cells.ndim)
            reason = np.maximum(reason, along(self.reason[part], dim, cells.ndim))
        if not everywhere.any():
            return False
        if (reason[everywhere] < 0).any():
            reason[everywhere & (reason < 0)] = self._number("its position is fixed")
        return self._spread(cells[everywhere], reason[everywhere])

    def _conflicts(self, factored_axes: Sequence[FactoredAxis]) -> list[FactoredAxis]:
        """Products that share cells with one of another shape, hold a cell twice, or decide about themselves."""
        owner = np.full(self.count, -1, dtype=np.int64)
        at_fault: set[int] = set()
        for number, factored in enumerate(factored_axes):
            flat = factored.cells.ravel()
            others = owner[flat]
            at_fault.update(int(other) for other in np.unique(others[others >= 0]))
            owner[flat] = number
            # A factor that is also a cell of its own product would decide about itself.
            own = any(np.isin(part, flat).any() or len(np.unique(part)) < len(part) for part in factored.factors)
            if own or (others >= 0).any() or len(np.unique(flat)) < len(flat):
                at_fault.add(number)
        return [factored_axes[number] for number in sorted(at_fault)]

    def _close(self, conflicts: Sequence[FactoredAxis]) -> Closed:
        """Pin all factors of these products but the finest; the pinned ones, which are closed from now on.

        Of 12 channels seen as 2 x 6 by one operation and as 3 x 4 by another, the factors of 6 and 4 stay. The first
        ties channel i to i + 6, the other to i + 4 and i + 8: the even channels go together, and so do the odd ones.
        """
        closed: set[tuple[int, int]] = set()
        reason = self._number("its channels are seen in groups of different sizes by different operations")
        for factored in conflicts:
            _, finest = max((self._classes(factored.cells, dim), dim) for dim in factored.dims)
            for dim, part in zip(factored.dims, factored.factors, strict=True):
                if dim != finest:
                    closed.add((factored.product, dim))
                    self._spread(part, np.full(len(part), reason))
        return frozenset(closed)

    def _classes(self, cells: Ids, dim: int) -> int:
        """How many indices along `dim` would still go one by one if only they could."""
        _, compact = np.unique(cells, return_inverse=True)
        numbers = np.arange(cells.shape[dim]) + int(compact.max()) + 1
        index = np.broadcast_to(along(numbers, dim, cells.ndim), cells.shape).ravel()
        return len(np.unique(_components(int(index.max()) + 1, [(compact.ravel(), index)])))

    # -- removing ------------------------------------------------------------------------------------------------

    def removed(self, chosen: Ids) -> Mask:
        """Which components are removed once `chosen` and all that is coupled to them are; shape ``(count,)``."""
        mask = np.zeros(self.count, dtype=bool)
        mask[chosen] = True
        return self.closure(mask)

    def closure(self, removed: Mask) -> Mask:
        """Everything that is removed with the components marked in `removed`, shape ``(count,)``."""
        removed = removed.copy()
        before = -1
        while before != (before := int(removed.sum())):
            for factored in self.factored_axes:
                cells = np.zeros(factored.cells.shape, dtype=bool)
                for dim, part in zip(factored.dims, factored.factors, strict=True):
                    cells |= along(removed[part], dim, cells.ndim)
                removed[factored.cells[cells]] = True
        return removed


def _aliased(relations: Relations) -> tuple[Ids, Ids, int]:
    """Join dims that are the same as a whole: dim -> representative, dim -> first compact id, number of ids.

    Dims of 6, 6, 2 and 3 ids, of which the first two are the same, give [0, 0, 1, 2], [0, 0, 6, 8] and 11.
    """
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

    # Older versions of scipy take only these ints, and on others go on without an error, joining nothing.
    ends = (left.astype(np.int32), right.astype(np.int32)) if count < 2**31 else (left, right)
    graph = coo_array((np.ones(len(left), dtype=np.int8), ends), shape=(count, count))
    number, labels = csgraph.connected_components(graph, directed=False)
    if count and (int(labels.min()) != 0 or int(labels.max()) != number - 1 or (labels[left] != labels[right]).any()):
        raise RuleError("scipy did not join what it was given. Install a later one: pip install -U scipy.")
    return labels.astype(np.int64)
