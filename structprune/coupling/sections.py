"""Which sections may keep channels of their own choice, and which must keep the same ones.

Sections are free while nothing but cutting, joining and shuffling looks at how they lie; see `split`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from structprune.coupling.equal_splits import EqualSplits, Mask, SplitGroup, SplitProgram, Step, Table, table
from structprune.coupling.propagate import Channels
from structprune.coupling.solve import Components, connected_components
from structprune.ops.relations import Axis, EqualSplit, Ids, Join, ProductRelation, Relations, SizeConstraint
from structprune.tracing.provenance import Dim, leaves

Movement = EqualSplit | Join


class Sections:
    """The splits of a trace.

    Args:
        relations: what the trace says; splits that cannot be free are tied in it, once and for all.
        axes: every axis of every node.
        held: the axes of the tensors that the model holds.
    """

    def __init__(self, relations: Relations, axes: Iterable[Axis], held: Iterable[Axis]) -> None:
        self._relations = relations
        self._tables: dict[SplitProgram, Table | None] = {}
        _find_shuffles(relations)
        gridded = {
            axis.key for product in relations.products for axis in (product.cells, *product.factors) if axis.free
        }
        for split in relations.free_splits():
            if any(part.key in gridded for part in split.parts):
                relations.tie(split)  # heads and the like: known without solving anything
        self._axes: list[Axis] = []
        self._held: list[Axis] = []
        if relations.free_splits():
            counted = (e.axis for e in relations.constraints)
            self._axes = list({axis.key: axis for axis in (*axes, *counted) if axis.free}.values())
            self._held = [axis for axis in held if axis.free]

    def settle(self, components: Components) -> EqualSplits | None:
        """The split groups; None where something had to be tied, so that the components are to be solved anew."""
        splits = [b for b in self._relations.free_splits() if _matters(components, b)]
        if not splits:
            return EqualSplits()
        excluded = self._barred(components)
        found: list[tuple[SplitGroup, list[Movement], Mask]] = []
        invalid: list[list[Movement]] = []
        for movements in _coupled(components, _upstream(components, self._relations.movements, splits)):
            split_group = self._region(components, movements, excluded)
            if split_group is None:
                invalid.append(movements)
            else:
                inside = np.zeros(components.count, dtype=bool)
                inside[np.concatenate(split_group.classes)] = True
                found.append((split_group, movements, inside))
        touched = np.zeros(components.count, dtype=bool)
        for _, _, inside in found:
            touched |= inside
        joins, unexpected = self._elsewhere(components, [movements for _, movements, _ in found], touched)
        invalid += [movements for _, movements, inside in found if (inside & unexpected).any()]
        for movements in invalid:
            for movement in movements:
                if isinstance(movement, EqualSplit):
                    self._relations.tie(movement)
        return None if invalid else EqualSplits(tuple(split_group for split_group, _, _ in found), joins)

    def _barred(self, components: Components) -> Mask:
        """Components that take no part in a split group: pinned ones, those in products, those that no tensor holds."""
        excluded = np.ones(components.count, dtype=bool)
        for axis in self._held:
            excluded[components.of(axis)] = False
        excluded |= components.pinned
        for product in self._relations.products:
            for axis in (product.cells, *product.factors):
                if axis.free:
                    excluded[components.of(axis)] = True
        return excluded

    def _region(self, components: Components, movements: Sequence[Movement], excluded: Mask) -> SplitGroup | None:
        axes = _Rows(components)
        steps = [axes.step(movement) for movement in movements]
        made = _made(steps)
        every = np.concatenate([axes.parts[number] for number in made])
        if excluded[every].any() or len(np.unique(every)) < len(every):
            return None
        program = SplitProgram(made, tuple(len(axes.parts[number]) for number in made), tuple(steps), len(axes.parts))
        full = program.run(program.sizes)
        if full is None or not all(np.array_equal(every[a], b) for a, b in zip(full, axes.parts, strict=True)):
            return None
        if program not in self._tables:
            self._tables[program] = table(program)
        allowed = self._tables[program]
        if allowed is None:
            return None
        classes = tuple(every[allowed.classes == number] for number in range(allowed.counts.shape[1]))
        return SplitGroup(classes, allowed.counts, tuple(axes.parts), program, allowed)

    def _elsewhere(
        self, components: Components, groups: list[list[Movement]], touched: Mask
    ) -> tuple[tuple[tuple[tuple[Ids, ...], Ids], ...], Mask]:
        """Axes joined from those of split groups, and the components that other axes see."""
        known = {components.of(axis).tobytes() for group in groups for m in group for axis in _axes_of(m)}
        inside = {id(movement) for group in groups for movement in group}
        joins: list[tuple[tuple[Ids, ...], Ids]] = []
        for movement in self._relations.movements:
            if isinstance(movement, Join) and id(movement) not in inside:
                pieces = tuple(components.of(piece) for piece in movement.pieces)
                hit = [piece for piece in pieces if touched[piece].any()]
                if hit and all(piece.tobytes() in known for piece in hit):
                    whole = components.of(movement.axis)
                    known.add(whole.tobytes())
                    joins.append((pieces, whole))
        unexpected = np.zeros(components.count, dtype=bool)
        for axis in self._axes:
            parts = components.of(axis)
            if touched[parts].any() and parts.tobytes() not in known:
                unexpected[parts] = True
        return tuple(joins), unexpected


class _Rows:
    """Axes numbered by their components."""

    def __init__(self, components: Components) -> None:
        self._components = components
        self._numbers: dict[bytes, int] = {}
        self.parts: list[Ids] = []

    def _number(self, axis: Axis) -> int:
        parts = self._components.of(axis)
        number = self._numbers.setdefault(parts.tobytes(), len(self.parts))
        if number == len(self.parts):
            self.parts.append(parts)
        return number

    def step(self, movement: Movement) -> Step:
        """The movement between numbers."""
        if isinstance(movement, Join):
            return Step("join", tuple(map(self._number, movement.pieces)), (self._number(movement.axis),))
        source, parts = (self._number(movement.axis),), tuple(map(self._number, movement.parts))
        if movement.shuffled is None:
            return Step("cut", source, parts, len(parts))
        return Step("shuffle", source, (*parts, self._number(movement.shuffled)), len(parts))


def _made(steps: Sequence[Step]) -> tuple[int, ...]:
    """Axes that a step uses before one makes them."""
    found: dict[int, bool] = {}
    for step in steps:
        for source in step.sources:
            found.setdefault(source, True)
        for target in step.targets:
            found.setdefault(target, False)
    return tuple(sorted(axis for axis, first in found.items() if first))


def _axes_of(movement: Movement) -> tuple[Axis, ...]:
    if isinstance(movement, Join):
        return (movement.axis, *movement.pieces)
    shuffled = () if movement.shuffled is None else (movement.shuffled,)
    return (movement.axis, *movement.parts, *shuffled)


def _matters(components: Components, split: EqualSplit) -> bool:
    """Whether the sections would keep the same channels only because they are tied."""
    if components.pinned[components.of(split.axis)].all():
        return False
    first, *rest = (components.of(part) for part in split.parts)
    return not all(np.array_equal(first, part) for part in rest)


def _upstream(
    components: Components, movements: Sequence[Movement | ProductRelation], splits: Sequence[EqualSplit]
) -> list[Movement]:
    """The splits, and the joins that make what they cut."""
    chosen = {id(split) for split in splits}
    needed: set[bytes] = set()
    found: list[Movement] = []
    for movement in reversed(movements):
        if isinstance(movement, EqualSplit) and id(movement) in chosen:
            found.append(movement)
            needed.add(components.of(movement.axis).tobytes())
        elif isinstance(movement, Join) and components.of(movement.axis).tobytes() in needed:
            found.append(movement)
            needed |= {components.of(piece).tobytes() for piece in movement.pieces}
    return found[::-1]


def _coupled(components: Components, movements: list[Movement]) -> list[list[Movement]]:
    """Movements that share channels, together."""
    touched = [components.of(movement.axis) for movement in movements]
    ids = np.concatenate(touched)
    number = np.repeat(np.arange(len(movements)), [len(parts) for parts in touched])
    labels = connected_components(len(movements) + components.count, number, ids + len(movements))[: len(movements)]
    return [[m for m, own in zip(movements, labels, strict=True) if own == label] for label in np.unique(labels)]


# -- channel shuffles ------------------------------------------------------------------------------------------------


def _find_shuffles(relations: Relations) -> None:
    """Take channel shuffles out of the products: ``(sections, size)`` transposed, its factors used nowhere else."""
    products = {
        tuple(axis.key for axis in product.factors): product
        for product in relations.products
        if len(product.factors) == 2
    }
    for place, movement in enumerate(relations.movements):
        if not isinstance(movement, ProductRelation) or len(movement.factors) != 2:
            continue
        split = products.get(tuple(axis.key for axis in movement.factors[::-1]))
        if split is not None and split.cells.free and _is_shuffle(relations, split, movement):
            outer = split.factors[0].size
            size = split.cells.size // outer
            parts = tuple(split.cells[i * size : (i + 1) * size] for i in range(outer))
            relations.movements[place] = EqualSplit(split.cells, parts, movement.cells, (split, movement))
            relations.products[:] = [
                product for product in relations.products if product is not split and product is not movement
            ]


def _is_shuffle(relations: Relations, split: ProductRelation, merge: ProductRelation) -> bool:
    outer, inner = split.factors
    if not (outer.free and inner.free and outer.array is None and inner.array is None):
        return False
    if _follows(relations, outer) is True or _follows(relations, inner) is False:
        return False
    others = [axis for g in relations.products if g is not split and g is not merge for axis in (g.cells, *g.factors)]
    others += [axis for axis, _ in relations.pins]
    others += [axis for survivors in relations.survivors for axis in survivors.axes]
    others += [scale.axis for scale in relations.scales]
    spans = [(axis.start, axis.start + axis.size) for axis in others if axis.free and axis.array is None]
    spans += [(first, first + size) for a, b, size in relations.runs for first in (a, b)]
    arrays = [axis.ids() for axis in others if axis.free and axis.array is not None]
    arrays += [ids for pair in relations.arrays for ids in pair]
    for axis in (outer, inner):
        first, last = axis.start, axis.start + axis.size
        if any(start < last and stop > first for start, stop in spans):
            return False
        if any(((ids >= first) & (ids < last)).any() for ids in arrays):
            return False
    return True


def _follows(relations: Relations, axis: Axis) -> bool | None:
    """Whether the ints that count `axis` are computed from sizes of tensors; None if there are none."""
    counted: list[SizeConstraint] = [e for e in relations.constraints if e.axis.free and e.axis.key == axis.key]
    if not counted:
        return None
    return all(any(isinstance(leaf, Dim) for leaf in leaves(e.expression)) for e in counted)


def hold_pieces(channels: Channels, components: Components) -> bool:
    """Pin a channel of each piece that could be emptied; whether there was one.

    A piece that holds all channels of a dimension of a weight, or all heads or head indices of a product, needs none:
    of those one is always kept.
    """
    pieces = {axis.key: (axis, where) for axis, where in channels.relations.pieces}
    if not pieces:
        return False
    held = [axis for number in channels.held for axis in channels.axes[number] if axis.free and axis.size]
    firsts = np.array([components.of(axis[:1])[0] for axis in held], dtype=np.int64)
    factors = [part for factored in components.factored_axes for part in (*factored.factors, factored.cells)]
    found = False
    for axis, where in pieces.values():
        parts = components.of(axis)
        inside = np.zeros(components.count, dtype=bool)
        inside[parts] = True
        if components.pinned[parts].any() or any(inside[factor].all() for factor in factors):
            continue
        # One of several roots is always kept; cells of one row all go with the index of the row.
        holding = (components.of(held[at]) for at in np.flatnonzero(inside[firsts]))
        if any(inside[part].all() and components.roots[part].any() for part in holding):
            continue
        channels.relations.pin(axis[:1], f"its piece may not be left without channels, in {where}")
        found = True
    return found
