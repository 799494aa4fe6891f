"""Removals on paper: what is tried, and how many channels of each axis are left then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from structprune.coupling.solve import Components, Mask
from structprune.ops.relations import Axis, Ids, Relations

# Shares of the channels that the trials remove; the last leaves one of each axis, where branches and floors show.
SHARES = (0.3, 0.5, 0.8, 1.0)

Bounded = tuple[Ids, int]
"""The components of an axis, and how many of its channels must be left."""


class Counter:
    """Numbers of kept channels, given which components are removed."""

    def __init__(self, components: Components, removed: Mask) -> None:
        self._components = components
        self._kept = ~removed
        self._known: dict[object, int] = {}

    def __call__(self, axis: Axis) -> int:
        """Number of kept channels of `axis`."""
        if not axis.free:
            return axis.size
        key = axis.key
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = int(np.count_nonzero(self._kept[self._components.of(axis)]))
        return number

    def kept(self, components: Ids) -> int:
        """Number of kept ones among `components`."""
        return int(np.count_nonzero(self._kept[components]))


def trials(components: Components, axes: Sequence[Axis], relations: Relations) -> Iterator[Mask]:
    """Components to remove: random shares, all but the first or the last of each axis, and some of those.

    Args:
        components: which channels go together.
        axes: those that must not be emptied, as must no axis.
        relations: what the trace says.
    """
    generator = np.random.default_rng(0)
    sizes = np.asarray(relations.sizes, dtype=np.int64)
    starts = np.asarray(relations.starts, dtype=np.int64)[sizes > 0]  # a buffer may be empty
    ends = starts + sizes[sizes > 0] - 1
    axes = [axis for axis in axes if axis.size]
    bounded = [(components.of(b.axis), b.least) for b in relations.bounds if b.least > 1]
    keep = _protected(components, _ends(components, axes, bounded), starts)
    for share in SHARES:
        yield _drawn(components, keep, share, generator)
    last = _protected(components, _ends(components, axes, bounded, last=True), ends)
    yield _drawn(components, last, 1.0, generator)
    # In narrow networks the first and last channels of all axes may be all that there is.
    left = components.roots & keep & last
    for split_group in components.splits.split_groups:
        left[np.concatenate(split_group.classes)] = False
    for _ in range(4 if left.any() else 0):
        yield _emptying_none(components, left & (generator.random(components.count) < 0.5), axes, bounded, starts)


def _ends(components: Components, axes: Sequence[Axis], bounded: Sequence[Bounded], last: bool = False) -> Ids:
    """The first (or last) component of each axis, and as many as must be left of the bounded ones."""
    ends = [components.of(axis)[-1 if last else 0] for axis in axes]
    more = [part[-least:] if last else part[:least] for part, least in bounded]
    return np.concatenate([np.asarray(ends, dtype=np.int64), *more])


def _emptying_none(
    components: Components, removed: Mask, axes: Sequence[Axis], bounded: Sequence[Bounded], starts: Ids
) -> Mask:
    """`removed`, less what would empty an axis or a piece of one, or leave too little of a bounded axis."""
    every = components.of(Axis(components.ids, array=np.arange(components.ids)))
    parts = [components.of(axis) for axis in axes]
    while removed.any():
        gone = components.closure(removed)
        empty = starts[~np.logical_or.reduceat(~gone[every], starts)]
        firsts = [part[:1] for part in parts if gone[part].all()]
        firsts += [part[:least] for part, least in bounded if np.count_nonzero(~gone[part]) < least]
        if not len(empty) and not firsts:
            break
        keep = _protected(components, np.concatenate([np.zeros(0, dtype=np.int64), *firsts]), empty)
        if not (removed & keep).any():
            return np.zeros_like(removed)
        removed &= ~keep
    return removed


def _drawn(components: Components, keep: Mask, share: float, generator: np.random.Generator) -> Mask:
    removed = components.roots & (generator.random(components.count) < share) & ~keep
    for split_group in components.splits.split_groups:
        split_group.draw(removed, share, generator)
    return removed


def _protected(components: Components, chosen: Ids, ids: Ids) -> Mask:
    """Components that a trial keeps, so that none is emptied: those chosen, those of `ids`, and their factors."""
    keep = np.zeros(components.count, dtype=bool)
    keep[chosen] = True
    if len(ids):
        keep[components.of(Axis(len(ids), array=ids))] = True
    before = -1
    while before != (before := int(keep.sum())):
        for factored in components.factored_axes:
            cells = keep[factored.cells]
            for dim, part in zip(factored.dims, factored.factors, strict=True):
                others = tuple(i for i in range(cells.ndim) if i != dim)
                keep[part[cells.any(axis=others)]] = True
    return keep
