"""Removals on paper: what is tried, and how many channels of each row are left then."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from structprune.channels.relations import Row
from structprune.channels.solver import Components, Mask

# Shares of the channels that the trials remove; the last leaves one of each row, where branches and floors show.
SHARES = (0.3, 0.5, 0.8, 1.0)


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


def trials(components: Components, keep: Mask) -> Iterator[Mask]:
    """What is removed on paper: random shares, and the last index of factors that `keep` would keep whole."""
    generator = np.random.default_rng(0)
    for share in SHARES:
        dead = components.roots & (generator.random(components.count) < share) & ~keep
        for region in components.balances.regions:
            region.draw(dead, share, generator)
        yield dead
    dead = np.zeros(components.count, dtype=bool)
    for lattice in components.lattices:
        for part in lattice.factors:
            if len(part) > 1 and keep[part].all() and components.roots[part].all():
                dead[part[-1]] = True
    yield dead


def protected(components: Components, rows: list[Row], starts: list[int]) -> Mask:
    """Components that a trial keeps, so that no row is emptied: the first channel of each, and what it lives by."""
    keep = np.zeros(components.count, dtype=bool)
    for row in rows:
        keep[components.of(row)[0]] = True
    for start in starts:
        keep[components.of(Row(1, start))] = True
    before = -1
    while before != (before := int(keep.sum())):
        for lattice in components.lattices:
            cells = keep[lattice.cells]
            for axis, part in zip(lattice.axes, lattice.factors, strict=True):
                others = tuple(i for i in range(cells.ndim) if i != axis)
                keep[part[cells.any(axis=others)]] = True
    return keep
