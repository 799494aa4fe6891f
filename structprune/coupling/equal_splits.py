"""Sections that must keep equally many channels, each its own choice.

``chunk`` cuts what is left into equal sections, and a channel shuffle (``view(2, C / 2).T.flatten()``) interleaves two
halves: both only count. Which numbers fit is found by carrying channels, numbered where they are made, through these
movements as the smaller network would. The channels that reach the same sections in the end form a class, and each
possible width of the network says how many channels of each class are kept. Where a shuffle pairs other channels than
before, the axes behind it hold what is kept in another order, and so must the weights that read them.

Where anything else looks at the sections (a product of heads, a slice by number, a pinned channel), they are tied
to keep the same channels.

Example: 8 channels (axis 0) are cut into halves (axes 1 and 2), which a shuffle interleaves (axis 3).
    >>> halves = SplitProgram(made=(0,), sizes=(8,), steps=(Step("shuffle", (0,), (1, 2, 3), 2),), axes=4)
    >>> [axis.tolist() for axis in halves.run((8,))]
    [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7]]
    >>> allowed = table(halves)  # two classes, of which equally many are kept
    >>> allowed.classes.tolist(), allowed.counts.tolist()
    ([0, 0, 0, 0, 1, 1, 1, 1], [[1, 1], [2, 2], [3, 3], [4, 4]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd

import numpy as np
from numpy.typing import NDArray

from structprune.errors import PlanError
from structprune.ops.relations import Ids

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Step:
    """One movement between numbered axes.

    ``"join"`` makes one axis of several, ``"cut"`` equal sections of one, ``"shuffle"`` the sections and, last, the
    axis in which they are interleaved.
    """

    kind: str
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    sections: int = 0


@dataclass(frozen=True, slots=True)
class SplitProgram:
    """Movements between numbered axes, for any width.

    Axes that no step makes are `made`; at full width they have `sizes` channels.
    """

    made: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[Step, ...]
    axes: int

    def run(self, sizes: Sequence[int]) -> list[Ids] | None:
        """The channels in each axis, numbered in the order of the made axes; None where that cannot be."""
        held: dict[int, Ids] = {}
        first = 0
        for axis, size in zip(self.made, sizes, strict=True):
            held[axis] = np.arange(first, first + size)
            first += size
        for step in self.steps:
            if not held.keys() >= set(step.sources):
                return None  # it is made of itself
            given = [held[source] for source in step.sources]
            if step.kind == "join":
                result = [np.concatenate(given)]
            elif len(given[0]) % step.sections:
                return None
            else:
                result = list(np.split(given[0], step.sections))
                if step.kind == "shuffle":
                    result.append(given[0].reshape(step.sections, -1).T.ravel())
            for target, axis in zip(step.targets, result, strict=True):
                if target in held and not np.array_equal(held[target], axis):
                    return None
                held[target] = axis
        return [held[axis] for axis in range(self.axes)]

    def holders(self, axes: list[Ids]) -> list[bytes]:
        """For each channel, the axes that hold it, as bits: above, 0 and 1 and 3 for channels 0 to 3, else 0, 2, 3."""
        total = max(int(axis.max()) for axis in axes) + 1
        member = np.zeros((total, self.axes), dtype=bool)
        for number, axis in enumerate(axes):
            member[axis, number] = True
        return [line.tobytes() for line in np.packbits(member, axis=1)]

    def widths(self) -> list[tuple[int, ...]]:
        """Sizes of the made axes that keep their proportions, from the narrowest."""
        step = reduce(gcd, self.sizes)
        return [tuple(size // step * level for size in self.sizes) for level in range(1, step + 1)]


@dataclass(frozen=True, slots=True)
class Table:
    """What a program allows: for each channel at full width its class, and for each width the same and the counts."""

    classes: Ids
    counts: Ids
    widths: tuple[tuple[int, ...], ...]


def table(program: SplitProgram) -> Table | None:
    """The widths at which every channel belongs to a class of the full width; None if there is only the full one."""
    full = program.run(program.sizes)
    if full is None:
        return None
    numbers: dict[bytes, int] = {}
    classes = np.array([numbers.setdefault(key, len(numbers)) for key in program.holders(full)])
    available = np.bincount(classes)
    counts: list[Ids] = []
    widths: list[tuple[int, ...]] = []
    for sizes in program.widths():
        axes = program.run(sizes)
        if axes is None:
            continue
        of_channel = [numbers.get(key, -1) for key in program.holders(axes)]
        count = np.bincount(of_channel, minlength=len(numbers)) if min(of_channel) >= 0 else available + 1
        if (count <= available).all():
            counts.append(count)
            widths.append(sizes)
    return Table(classes, np.stack(counts), tuple(widths)) if len(counts) > 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class SplitGroup:
    """Channels whose numbers depend on each other.

    Attributes:
        classes: the components of each class, in the order of the axes that make them.
        counts: how many channels of each class may be kept, shape ``(choices, classes)``, from the fewest to all.
        axes: the components of each axis of the program, distinct within it.
        program: the movements.
        table: what they allow.
    """

    classes: tuple[Ids, ...]
    counts: Ids
    axes: tuple[Ids, ...]
    program: SplitProgram
    table: Table

    def choice(self, removed: Mask) -> int:
        """Which line of `counts` is kept when the components marked in `removed` go.

        Raises:
            PlanError: none of them.
        """
        kept = np.array([np.count_nonzero(~removed[ids]) for ids in self.classes])
        fits = np.flatnonzero((self.counts == kept).all(axis=1))
        if len(fits):
            return int(fits[0])
        near = self.counts[np.abs(self.counts - kept).sum(axis=1).argmin()]
        raise PlanError(
            "The forward cuts a tensor into equal sections, which must keep equally many channels. Of "
            f"{[len(ids) for ids in self.classes]} channels {kept.tolist()} would be left; the nearest that fits is "
            f"{near.tolist()}. DependencyGraph.balanced lists the groups and the numbers that they may keep together."
        )

    def orders(self, removed: Mask) -> list[Ids]:
        """The surviving components of each axis of the program, as the smaller network holds them."""
        full, axes = self.program.run(self.program.sizes), self.program.run(self.table.widths[self.choice(removed)])
        assert full is not None
        assert axes is not None
        numbers = dict(zip(self.program.holders(full), self.table.classes.tolist(), strict=True))
        # At width 4 of the example with channels 1, 2, 4 and 7 kept, the smaller network numbers them 0 to 3. The first
        # two are of class 0, which keeps [1, 2], the others of class 1, which keeps [4, 7]; axis 3 is [1, 4, 2, 7].
        class_of = np.array([numbers[key] for key in self.program.holders(axes)])
        kept = np.empty(len(class_of), dtype=np.int64)
        for number, ids in enumerate(self.classes):
            kept[class_of == number] = ids[~removed[ids]]
        return [kept[axis] for axis in axes]

    def draw(self, removed: Mask, share: float, generator: np.random.Generator) -> None:
        """Mark random channels as removed, about `share` of them and as many as fit together."""
        line = self.counts[round((1 - share) * (len(self.counts) - 1))]
        for ids, keep in zip(self.classes, line, strict=True):
            removed[ids] = True
            removed[generator.permutation(ids)[:keep]] = False


@dataclass(frozen=True, slots=True)
class EqualSplits:
    """All split groups, and the axes joined from theirs: the components of the pieces and of the whole."""

    split_groups: tuple[SplitGroup, ...] = ()
    joins: tuple[tuple[tuple[Ids, ...], Ids], ...] = ()

    def orders(self, removed: Mask) -> dict[bytes, Ids]:
        """Surviving positions in their new order, by the components of an axis; axes in their old order are left out.

        Raises:
            PlanError: sections would keep different numbers of channels.
        """
        orders: dict[bytes, Ids] = {}

        def positions(axis: Ids) -> Ids:
            known = orders.get(axis.tobytes())
            return np.flatnonzero(~removed[axis]) if known is None else known

        def note(axis: Ids, order: Ids) -> None:
            if not (np.diff(order) > 0).all():
                orders[axis.tobytes()] = order

        for split_group in self.split_groups:
            for axis, kept in zip(split_group.axes, split_group.orders(removed), strict=True):
                by_number = np.argsort(axis)  # the position of each component: of axis [7, 5, 6], 5 stands at 1
                note(axis, by_number[np.searchsorted(axis, kept, sorter=by_number)])
        for pieces, whole in self.joins:
            firsts = np.cumsum([0, *map(len, pieces[:-1])])
            note(whole, np.concatenate([first + positions(p) for first, p in zip(firsts, pieces, strict=True)]))
        return orders
