"""Counts of channels while widths are still being chosen: how each axis follows from the shares that groups keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group, group_numbers
from structprune.ops.relations import Axis

# So many channels of an axis are kept as long as channels of these groups (by number) are.
Term = tuple[int, tuple[int, ...]]


class Widths:
    """Axes as sums of products of the shares that groups keep.

    An axis of a residual stream follows one group, one behind a concatenation several side by side; of a product (heads
    x head size) it follows the product of both. Which channels are removed is not asked, so an axis of a product that
    loses channels unevenly is told only nearly; `structprune.coupling.graph.ChannelGraph.counter` is exact.

    Args:
        graph: the coupled channels.
        groups: the groups whose widths are chosen; all others stay whole.
    """

    def __init__(self, graph: ChannelGraph, groups: Sequence[Group]) -> None:
        self.groups = groups
        self._graph = graph
        self._number = group_numbers(graph.components, groups)
        self._mark = np.append(np.random.default_rng(0).integers(1, 2**62, len(groups)), 0)
        self._terms: dict[object, tuple[Term, ...]] = {}

    def terms(self, axis: Axis) -> tuple[Term, ...]:
        """The terms of an axis."""
        terms = self._terms.get(axis.key) if axis.free else ((axis.size, ()),)
        if terms is None:
            terms = self._terms[axis.key] = self._read(axis)
        return terms

    def _read(self, axis: Axis) -> tuple[Term, ...]:
        positions, roots = self._graph.roots.of(self._graph.components.of(axis))
        numbers = self._number[roots]
        sign = np.zeros(axis.size, dtype=np.int64)
        np.bitwise_xor.at(sign, positions, self._mark[numbers])
        _, first, counts = np.unique(sign, return_index=True, return_counts=True)
        terms: list[Term] = []
        for at, count in zip(first.tolist(), counts.tolist(), strict=True):
            mine = numbers[positions == at]
            terms.append((count, tuple(sorted(set(mine[mine >= 0].tolist())))))
        return tuple(terms)

    def groups_of(self, axes: Iterable[Axis]) -> frozenset[int]:
        """The groups (by number) that axes follow."""
        return frozenset(g for axis in axes for _, groups in self.terms(axis) for g in groups)

    def counter(self, share: Mapping[int, float] | Sequence[float]) -> Shares:
        """Counts channels of axes when each group keeps such a share of its channels."""
        return Shares(self, share)


class Shares:
    """Counts of channels for given shares; see `Widths`."""

    def __init__(self, widths: Widths, share: Mapping[int, float] | Sequence[float]) -> None:
        self._widths = widths
        self._share = share

    def __call__(self, axis: Axis) -> int:
        """How many channels of `axis` are kept."""
        if not axis.free:
            return axis.size
        total = 0.0
        for count, groups in self._widths.terms(axis):
            part = float(count)
            for group in groups:
                part *= self._share[group]
            total += part
        return round(total)
