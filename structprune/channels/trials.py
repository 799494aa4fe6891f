"""Removals on paper: what is tried, and how many channels of each row are left then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from structprune.channels.solver import Components, Mask
from structprune.ops.relations import Ids, Relations, Row

# Shares of the channels that the trials remove; the last leaves one of each row, where branches and floors show.
SHARES = (0.3, 0.5, 0.8, 1.0)

Bounded = tuple[Ids, int]
"""The components of a row, and how many of its channels must be left."""


class Counter:
    """Numbers of living channels, given which components are dead."""

    def __init__(self, components: Components, dead: Mask) -> None:
        self._components = components
        self._alive = ~dead
        self._known: dict[object, int] = {}

    def __call__(self, row: Row) -> int:
        """Number of living channels of `row`."""
        if not row.free:
            return row.size
        key = row.key
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = int(np.count_nonzero(self._alive[self._components.of(row)]))
        return found

    def living(self, components: Ids) -> int:
        """Number of living ones among `components`."""
        return int(np.count_nonzero(self._alive[components]))


def trials(components: Components, rows: Sequence[Row], relations: Relations) -> Iterator[Mask]:
    """Components to remove: random shares, all but the first or the last of each row, and some of those.

    Args:
        components: which channels go together.
        rows: those that must not be emptied, as must no axis.
        relations: what the trace says.
    """
    generator = np.random.default_rng(0)
    sizes = np.asarray(relations.sizes, dtype=np.int64)
    starts = np.asarray(relations.starts, dtype=np.int64)[sizes > 0]  # a buffer may be empty
    ends = starts + sizes[sizes > 0] - 1
    rows = [row for row in rows if row.size]
    bounded = [(components.of(b.row), b.least) for b in relations.bounds if b.least > 1]
    keep = _protected(components, _ends(components, rows, bounded), starts)
    for share in SHARES:
        yield _drawn(components, keep, share, generator)
    last = _protected(components, _ends(components, rows, bounded, last=True), ends)
    yield _drawn(components, last, 1.0, generator)
    # In narrow networks the first and last channels of all rows may be all that there is.
    left = components.roots & keep & last
    for region in components.balances.regions:
        left[np.concatenate(region.classes)] = False
    for _ in range(4 if left.any() else 0):
        yield _emptying_none(components, left & (generator.random(components.count) < 0.5), rows, bounded, starts)


def _ends(components: Components, rows: Sequence[Row], bounded: Sequence[Bounded], last: bool = False) -> Ids:
    """The first (or last) component of each row, and as many as must be left of the bounded ones."""
    ends = [components.of(row)[-1 if last else 0] for row in rows]
    more = [part[-least:] if last else part[:least] for part, least in bounded]
    return np.concatenate([np.asarray(ends, dtype=np.int64), *more])


def _emptying_none(
    components: Components, dead: Mask, rows: Sequence[Row], bounded: Sequence[Bounded], starts: Ids
) -> Mask:
    """`dead`, less what would empty a row or an axis, or leave too little of a bounded row."""
    every = components.of(Row(components.ids, array=np.arange(components.ids)))
    parts = [components.of(row) for row in rows]
    while dead.any():
        gone = components.closure(dead)
        empty = starts[~np.logical_or.reduceat(~gone[every], starts)]
        firsts = [part[:1] for part in parts if gone[part].all()]
        firsts += [part[:least] for part, least in bounded if np.count_nonzero(~gone[part]) < least]
        if not len(empty) and not firsts:
            break
        keep = _protected(components, np.concatenate([np.zeros(0, dtype=np.int64), *firsts]), empty)
        if not (dead & keep).any():
            return np.zeros_like(dead)
        dead &= ~keep
    return dead


def _drawn(components: Components, keep: Mask, share: float, generator: np.random.Generator) -> Mask:
    dead = components.roots & (generator.random(components.count) < share) & ~keep
    for region in components.balances.regions:
        region.draw(dead, share, generator)
    return dead


def _protected(components: Components, chosen: Ids, ids: Ids) -> Mask:
    """Components that a trial keeps, so that no row is emptied: those chosen, those of `ids`, and what they live by."""
    keep = np.zeros(components.count, dtype=bool)
    keep[chosen] = True
    if len(ids):
        keep[components.of(Row(len(ids), array=ids))] = True
    before = -1
    while before != (before := int(keep.sum())):
        for lattice in components.lattices:
            cells = keep[lattice.cells]
            for dim, part in zip(lattice.dims, lattice.factors, strict=True):
                others = tuple(i for i in range(cells.ndim) if i != dim)
                keep[part[cells.any(axis=others)]] = True
    return keep
