"""Sections that must keep equally many channels, each its own choice.

``chunk`` cuts what is left into equal sections, and a channel shuffle (``view(2, C / 2).T.flatten()``) interleaves two
halves: both only count. Which numbers fit is found by carrying channels, numbered where they are made, through these
movements as the smaller network would. The channels that reach the same sections in the end form a class, and each
possible width of the network says how many channels of each class are kept. Where a shuffle pairs other channels than
before, the rows behind it hold the survivors in another order, and so must the weights that read them.

Where anything else looks at the sections (a grid of heads, a slice by number, a pinned channel), they are tied to keep
the same channels.
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
    """One movement between numbered rows.

    ``"join"`` makes one row of several, ``"cut"`` equal sections of one, ``"shuffle"`` the sections and, last, the row
    in which they are interleaved.
    """

    kind: str
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    sections: int = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """Movements between numbered rows, for any width.

    Rows that no step makes are `made`; at full width they have `sizes` channels.
    """

    made: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[Step, ...]
    rows: int

    def run(self, sizes: Sequence[int]) -> list[Ids] | None:
        """The channels in each row, numbered in the order of the made rows; None where that cannot be."""
        found: dict[int, Ids] = {}
        first = 0
        for row, size in zip(self.made, sizes, strict=True):
            found[row] = np.arange(first, first + size)
            first += size
        for step in self.steps:
            if not found.keys() >= set(step.sources):
                return None  # it is made of itself
            given = [found[source] for source in step.sources]
            if step.kind == "join":
                result = [np.concatenate(given)]
            elif len(given[0]) % step.sections:
                return None
            else:
                result = list(np.split(given[0], step.sections))
                if step.kind == "shuffle":
                    result.append(given[0].reshape(step.sections, -1).T.ravel())
            for target, row in zip(step.targets, result, strict=True):
                if target in found and not np.array_equal(found[target], row):
                    return None
                found[target] = row
        return [found[row] for row in range(self.rows)]

    def reached(self, rows: list[Ids]) -> list[bytes]:
        """For each channel, the row that made it and the rows that it reaches."""
        total = max(int(row.max()) for row in rows) + 1
        member = np.zeros((total, self.rows), dtype=bool)
        for number, row in enumerate(rows):
            member[row, number] = True
        return [line.tobytes() for line in np.packbits(member, axis=1)]

    def widths(self) -> list[tuple[int, ...]]:
        """Sizes of the made rows that keep their proportions, from the narrowest."""
        step = reduce(gcd, self.sizes)
        return [tuple(size // step * level for size in self.sizes) for level in range(1, step + 1)]


@dataclass(frozen=True, slots=True)
class Table:
    """What a machine allows: for each channel at full width its class, and for each width the same and the counts."""

    classes: Ids
    counts: Ids
    widths: tuple[tuple[int, ...], ...]


def table(machine: Machine) -> Table | None:
    """The widths at which every channel belongs to a class of the full width; None if there is only the full one."""
    full = machine.run(machine.sizes)
    if full is None:
        return None
    numbers: dict[bytes, int] = {}
    classes = np.array([numbers.setdefault(key, len(numbers)) for key in machine.reached(full)])
    available = np.bincount(classes)
    counts: list[Ids] = []
    widths: list[tuple[int, ...]] = []
    for sizes in machine.widths():
        rows = machine.run(sizes)
        if rows is None:
            continue
        found = [numbers.get(key, -1) for key in machine.reached(rows)]
        count = np.bincount(found, minlength=len(numbers)) if min(found) >= 0 else available + 1
        if (count <= available).all():
            counts.append(count)
            widths.append(sizes)
    return Table(classes, np.stack(counts), tuple(widths)) if len(counts) > 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Channels whose numbers depend on each other.

    Attributes:
        classes: the components of each class, in the order of the rows that make them.
        counts: how many channels of each class may be kept, shape ``(choices, classes)``, from the fewest to all.
        rows: the components of each row of the machine, distinct within it.
        machine: the movements.
        table: what they allow.
    """

    classes: tuple[Ids, ...]
    counts: Ids
    rows: tuple[Ids, ...]
    machine: Machine
    table: Table

    def choice(self, dead: Mask) -> int:
        """Which line of `counts` is kept when the components marked in `dead` go.

        Raises:
            PlanError: none of them.
        """
        kept = np.array([np.count_nonzero(~dead[ids]) for ids in self.classes])
        fits = np.flatnonzero((self.counts == kept).all(axis=1))
        if len(fits):
            return int(fits[0])
        near = self.counts[np.abs(self.counts - kept).sum(axis=1).argmin()]
        raise PlanError(
            "The forward cuts a tensor into equal sections, which must keep equally many channels. Of "
            f"{[len(ids) for ids in self.classes]} channels {kept.tolist()} would be left; the nearest that fits is "
            f"{near.tolist()}. DependencyGraph.balanced lists the groups and the numbers that they may keep together."
        )

    def orders(self, dead: Mask) -> list[Ids]:
        """The surviving components of each row of the machine, as the smaller network holds them."""
        full, rows = self.machine.run(self.machine.sizes), self.machine.run(self.table.widths[self.choice(dead)])
        assert full is not None
        assert rows is not None
        numbers = dict(zip(self.machine.reached(full), self.table.classes.tolist(), strict=True))
        found = np.array([numbers[key] for key in self.machine.reached(rows)])
        survivors = np.empty(len(found), dtype=np.int64)
        for number, ids in enumerate(self.classes):
            survivors[found == number] = ids[~dead[ids]]
        return [survivors[row] for row in rows]

    def draw(self, dead: Mask, share: float, generator: np.random.Generator) -> None:
        """Mark random channels as dead, about `share` of them and as many as fit together."""
        line = self.counts[round((1 - share) * (len(self.counts) - 1))]
        for ids, keep in zip(self.classes, line, strict=True):
            dead[ids] = True
            dead[generator.permutation(ids)[:keep]] = False


@dataclass(frozen=True, slots=True)
class Balances:
    """All regions, and the rows joined from theirs: the components of the pieces and of the whole."""

    regions: tuple[Region, ...] = ()
    joins: tuple[tuple[tuple[Ids, ...], Ids], ...] = ()

    def orders(self, dead: Mask) -> dict[bytes, Ids]:
        """Surviving positions in their new order, by the components of a row; rows in their old order are left out.

        Raises:
            PlanError: sections would keep different numbers of channels.
        """
        found: dict[bytes, Ids] = {}

        def positions(row: Ids) -> Ids:
            known = found.get(row.tobytes())
            return np.flatnonzero(~dead[row]) if known is None else known

        def note(row: Ids, order: Ids) -> None:
            if not (np.diff(order) > 0).all():
                found[row.tobytes()] = order

        for region in self.regions:
            for row, kept in zip(region.rows, region.orders(dead), strict=True):
                by_number = np.argsort(row)
                note(row, by_number[np.searchsorted(row, kept, sorter=by_number)])
        for pieces, whole in self.joins:
            firsts = np.cumsum([0, *map(len, pieces[:-1])])
            note(whole, np.concatenate([first + positions(p) for first, p in zip(firsts, pieces, strict=True)]))
        return found
