"""Which sections may keep channels of their own choice, and which must keep the same ones.

Sections are free while nothing but cutting, joining and shuffling looks at how they lie; see `balance`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from structprune.channels.balance import Balances, Machine, Mask, Region, Step, Table, table
from structprune.channels.joining import joined
from structprune.channels.propagate import Channels
from structprune.channels.solver import Components
from structprune.ops.relations import Balance, Expectation, Grid, Ids, Join, Relations, Row
from structprune.tracing.provenance import Dim, leaves

Movement = Balance | Join


class Sections:
    """The balances of a trace.

    Args:
        relations: what the trace says; balances that cannot be free are tied in it, once and for all.
        rows: every row of every node.
        held: the rows of the tensors that the model holds.
    """

    def __init__(self, relations: Relations, rows: Iterable[Row], held: Iterable[Row]) -> None:
        self._relations = relations
        self._tables: dict[Machine, Table | None] = {}
        _find_shuffles(relations)
        gridded = {row.key for grid in relations.grids for row in (grid.cells, *grid.factors) if row.free}
        for balance in relations.free_balances():
            if any(part.key in gridded for part in balance.parts):
                relations.tie(balance)  # heads and the like: known without solving anything
        self._rows: list[Row] = []
        self._held: list[Row] = []
        if relations.free_balances():
            counted = (e.row for e in relations.expectations)
            self._rows = list({row.key: row for row in (*rows, *counted) if row.free}.values())
            self._held = [row for row in held if row.free]

    def settle(self, components: Components) -> Balances | None:
        """The regions; None where something had to be tied, so that the components are to be solved anew."""
        balances = [b for b in self._relations.free_balances() if _matters(components, b)]
        if not balances:
            return Balances()
        barred = self._barred(components)
        found: list[tuple[Region, list[Movement], Mask]] = []
        spoilt: list[list[Movement]] = []
        for movements in _coupled(components, _upstream(components, self._relations.movements, balances)):
            region = self._region(components, movements, barred)
            if region is None:
                spoilt.append(movements)
            else:
                inside = np.zeros(components.count, dtype=bool)
                inside[np.concatenate(region.classes)] = True
                found.append((region, movements, inside))
        touched = np.zeros(components.count, dtype=bool)
        for _, _, inside in found:
            touched |= inside
        joins, strange = self._elsewhere(components, [movements for _, movements, _ in found], touched)
        spoilt += [movements for _, movements, inside in found if (inside & strange).any()]
        for movements in spoilt:
            for movement in movements:
                if isinstance(movement, Balance):
                    self._relations.tie(movement)
        return None if spoilt else Balances(tuple(region for region, _, _ in found), joins)

    def _barred(self, components: Components) -> Mask:
        """Components that take no part in a region: pinned ones, those in grids, those that no tensor holds."""
        barred = np.ones(components.count, dtype=bool)
        for row in self._held:
            barred[components.of(row)] = False
        barred |= components.pinned
        for grid in self._relations.grids:
            for row in (grid.cells, *grid.factors):
                if row.free:
                    barred[components.of(row)] = True
        return barred

    def _region(self, components: Components, movements: Sequence[Movement], barred: Mask) -> Region | None:
        rows = _Rows(components)
        steps = [rows.step(movement) for movement in movements]
        made = _made(steps)
        every = np.concatenate([rows.parts[number] for number in made])
        if barred[every].any() or len(np.unique(every)) < len(every):
            return None
        machine = Machine(made, tuple(len(rows.parts[number]) for number in made), tuple(steps), len(rows.parts))
        full = machine.run(machine.sizes)
        if full is None or not all(np.array_equal(every[a], b) for a, b in zip(full, rows.parts, strict=True)):
            return None
        if machine not in self._tables:
            self._tables[machine] = table(machine)
        allowed = self._tables[machine]
        if allowed is None:
            return None
        classes = tuple(every[allowed.classes == number] for number in range(allowed.counts.shape[1]))
        return Region(classes, allowed.counts, tuple(rows.parts), machine, allowed)

    def _elsewhere(
        self, components: Components, groups: list[list[Movement]], touched: Mask
    ) -> tuple[tuple[tuple[tuple[Ids, ...], Ids], ...], Mask]:
        """Rows joined from those of regions, and the components seen by other rows that know nothing of sections."""
        known = {components.of(row).tobytes() for group in groups for m in group for row in _rows_of(m)}
        inside = {id(movement) for group in groups for movement in group}
        joins: list[tuple[tuple[Ids, ...], Ids]] = []
        for movement in self._relations.movements:
            if isinstance(movement, Join) and id(movement) not in inside:
                pieces = tuple(components.of(piece) for piece in movement.pieces)
                hit = [piece for piece in pieces if touched[piece].any()]
                if hit and all(piece.tobytes() in known for piece in hit):
                    whole = components.of(movement.row)
                    known.add(whole.tobytes())
                    joins.append((pieces, whole))
        strange = np.zeros(components.count, dtype=bool)
        for row in self._rows:
            parts = components.of(row)
            if touched[parts].any() and parts.tobytes() not in known:
                strange[parts] = True
        return tuple(joins), strange


class _Rows:
    """Rows numbered by their components."""

    def __init__(self, components: Components) -> None:
        self._components = components
        self._numbers: dict[bytes, int] = {}
        self.parts: list[Ids] = []

    def _number(self, row: Row) -> int:
        parts = self._components.of(row)
        number = self._numbers.setdefault(parts.tobytes(), len(self.parts))
        if number == len(self.parts):
            self.parts.append(parts)
        return number

    def step(self, movement: Movement) -> Step:
        """The movement between numbers."""
        if isinstance(movement, Join):
            return Step("join", tuple(map(self._number, movement.pieces)), (self._number(movement.row),))
        source, parts = (self._number(movement.row),), tuple(map(self._number, movement.parts))
        if movement.shuffled is None:
            return Step("cut", source, parts, len(parts))
        return Step("shuffle", source, (*parts, self._number(movement.shuffled)), len(parts))


def _made(steps: Sequence[Step]) -> tuple[int, ...]:
    """Rows that a step uses before one makes them."""
    found: dict[int, bool] = {}
    for step in steps:
        for source in step.sources:
            found.setdefault(source, True)
        for target in step.targets:
            found.setdefault(target, False)
    return tuple(sorted(row for row, first in found.items() if first))


def _rows_of(movement: Movement) -> tuple[Row, ...]:
    if isinstance(movement, Join):
        return (movement.row, *movement.pieces)
    shuffled = () if movement.shuffled is None else (movement.shuffled,)
    return (movement.row, *movement.parts, *shuffled)


def _matters(components: Components, balance: Balance) -> bool:
    """Whether the sections would keep the same channels only because they are tied."""
    if components.pinned[components.of(balance.row)].all():
        return False
    first, *rest = (components.of(part) for part in balance.parts)
    return not all(np.array_equal(first, part) for part in rest)


def _upstream(
    components: Components, movements: Sequence[Movement | Grid], balances: Sequence[Balance]
) -> list[Movement]:
    """The balances, and the joins that make what they cut."""
    chosen = {id(balance) for balance in balances}
    needed: set[bytes] = set()
    found: list[Movement] = []
    for movement in reversed(movements):
        if isinstance(movement, Balance) and id(movement) in chosen:
            found.append(movement)
            needed.add(components.of(movement.row).tobytes())
        elif isinstance(movement, Join) and components.of(movement.row).tobytes() in needed:
            found.append(movement)
            needed |= {components.of(piece).tobytes() for piece in movement.pieces}
    return found[::-1]


def _coupled(components: Components, movements: list[Movement]) -> list[list[Movement]]:
    """Movements that share channels, together."""
    touched = [components.of(movement.row) for movement in movements]
    ids = np.concatenate(touched)
    number = np.repeat(np.arange(len(movements)), [len(parts) for parts in touched])
    labels = joined(len(movements) + components.count, number, ids + len(movements))[: len(movements)]
    return [[m for m, own in zip(movements, labels, strict=True) if own == label] for label in np.unique(labels)]


# -- channel shuffles ------------------------------------------------------------------------------------------------


def _find_shuffles(relations: Relations) -> None:
    """Take channel shuffles out of the grids: ``(sections, size)`` transposed, where nothing else uses the factors."""
    grids = {tuple(row.key for row in grid.factors): grid for grid in relations.grids if len(grid.factors) == 2}
    for place, movement in enumerate(relations.movements):
        if not isinstance(movement, Grid) or len(movement.factors) != 2:
            continue
        split = grids.get(tuple(row.key for row in movement.factors[::-1]))
        if split is not None and split.cells.free and _is_shuffle(relations, split, movement):
            outer = split.factors[0].size
            size = split.cells.size // outer
            parts = tuple(split.cells[i * size : (i + 1) * size] for i in range(outer))
            relations.movements[place] = Balance(split.cells, parts, movement.cells, (split, movement))
            relations.grids[:] = [grid for grid in relations.grids if grid is not split and grid is not movement]


def _is_shuffle(relations: Relations, split: Grid, merge: Grid) -> bool:
    outer, inner = split.factors
    if not (outer.free and inner.free and outer.array is None and inner.array is None):
        return False
    if _follows(relations, outer) is True or _follows(relations, inner) is False:
        return False
    others = [row for g in relations.grids if g is not split and g is not merge for row in (g.cells, *g.factors)]
    others += [row for row, _ in relations.pins]
    others += [row for survivors in relations.survivors for row in survivors.rows]
    others += [scale.row for scale in relations.scales]
    spans = [(row.start, row.start + row.size) for row in others if row.free and row.array is None]
    spans += [(first, first + size) for a, b, size in relations.runs for first in (a, b)]
    arrays = [row.ids() for row in others if row.free and row.array is not None]
    arrays += [ids for pair in relations.arrays for ids in pair]
    for row in (outer, inner):
        first, last = row.start, row.start + row.size
        if any(start < last and stop > first for start, stop in spans):
            return False
        if any(((ids >= first) & (ids < last)).any() for ids in arrays):
            return False
    return True


def _follows(relations: Relations, row: Row) -> bool | None:
    """Whether the ints that count `row` are computed from sizes of tensors; None if there are none."""
    counted: list[Expectation] = [e for e in relations.expectations if e.row.free and e.row.key == row.key]
    if not counted:
        return None
    return all(any(isinstance(leaf, Dim) for leaf in leaves(e.expression)) for e in counted)


def hold_pieces(channels: Channels, components: Components) -> bool:
    """Pin a channel of each piece that could be emptied; whether there was one.

    A piece that holds all channels of a dimension of a weight, or all heads or head indices of a grid, needs none:
    of those one is always kept.
    """
    pieces = {row.key: (row, where) for row, where in channels.relations.pieces}
    if not pieces:
        return False
    held = [row for number in channels.held for row in channels.rows[number] if row.free and row.size]
    firsts = np.array([components.of(row[:1])[0] for row in held], dtype=np.int64)
    factors = [part for lattice in components.lattices for part in (*lattice.factors, lattice.cells)]
    found = False
    for row, where in pieces.values():
        parts = components.of(row)
        inside = np.zeros(components.count, dtype=bool)
        inside[parts] = True
        if components.pinned[parts].any() or any(inside[factor].all() for factor in factors):
            continue
        if any(inside[components.of(held[at])].all() for at in np.flatnonzero(inside[firsts])):
            continue
        channels.relations.pin(row[:1], f"its piece may not be left without channels, in {where}")
        found = True
    return found
