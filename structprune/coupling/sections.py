"""Which sections may keep channels of their own choice, and which must keep the same ones.

Sections are free while nothing but cutting, joining and shuffling looks at how they lie; see `EqualSplit`.

Example: a stem of 16 channels, cut into halves ``a, b = stem(x).chunk(2, 1)`` that pass a layer each.
    In: one `EqualSplit` of the axis with ids 0 to 15 into parts with ids 0 to 7 and 8 to 15, nothing else in between.
    Out: one `SplitGroup` of two classes, the components of either half, and ``counts`` [[1, 1], [2, 2], ..., [8, 8]].
    Had the halves been added to each other (``a + b``), ids 0 and 8 were one component already, and nothing is out.
    Had another operation read channels 0 to 3 of the stem, the halves are tied: channel 8 is removed with channel 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from structprune.coupling.equal_splits import EqualSplits, Mask, SplitGroup, SplitProgram, Step, Table, table
from structprune.coupling.propagate import Channels
from structprune.coupling.solve import Components, connected_components
from structprune.ops.relations import Axis, EqualSplit, Ids, Join, ProductRelation, Relations, SizeConstraint
from structprune.tracing.provenance import Dim, leaves

Movement = EqualSplit | Join


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """Movements that share channels, the group that they would form, and which components are in it, shape (count,)."""

    movements: list[Movement]
    group: SplitGroup
    inside: Mask


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
        in_products = {axis.key for axis in _axes_of_products(relations.products)}
        for split in relations.free_splits():
            if any(part.key in in_products for part in split.parts):
                relations.tie(split)  # heads and the like: known without solving anything
        self._axes: list[Axis] = []
        self._held: list[Axis] = []
        if relations.free_splits():
            counted = (e.axis for e in relations.constraints)
            self._axes = list({axis.key: axis for axis in (*axes, *counted) if axis.free}.values())
            self._held = [axis for axis in held if axis.free]

    def settle(self, components: Components) -> EqualSplits | None:
        """The split groups; None where something had to be tied, so that the components are to be solved anew."""
        splits = [split for split in self._relations.free_splits() if _matters(components, split)]
        if not splits:
            return EqualSplits()
        excluded = self._excluded(components)
        coupled = _coupled(components, _upstream(components, self._relations.movements, splits))
        groups = [self._split_group(components, movements, excluded) for movements in coupled]
        candidates = [
            _Candidate(movements, group, _mask(components.count, np.concatenate(group.classes)))
            for movements, group in zip(coupled, groups, strict=True)
            if group is not None
        ]
        joins, elsewhere = self._around(components, candidates)
        tied = [movements for movements, group in zip(coupled, groups, strict=True) if group is None]
        tied += [candidate.movements for candidate in candidates if (candidate.inside & elsewhere).any()]
        if not tied:
            return EqualSplits(tuple(candidate.group for candidate in candidates), joins)
        for movement in chain.from_iterable(tied):
            if isinstance(movement, EqualSplit):
                self._relations.tie(movement)
        return None

    def _around(
        self, components: Components, candidates: Sequence[_Candidate]
    ) -> tuple[tuple[tuple[tuple[Ids, ...], Ids], ...], Mask]:
        """Axes joined behind the candidates, and the components that other axes hold in an order of their own."""
        touched = np.zeros(components.count, dtype=bool)
        for candidate in candidates:
            touched |= candidate.inside
        movements = chain.from_iterable(candidate.movements for candidate in candidates)
        known = {components.of(axis).tobytes() for movement in movements for axis in _axes_of(movement)}
        joins = self._joined(components, candidates, touched, known)
        known |= {whole.tobytes() for _, whole in joins}
        return joins, self._read_elsewhere(components, touched, known)

    def _excluded(self, components: Components) -> Mask:
        """Components that take no part in a split group: pinned ones, those in products, those that no tensor holds."""
        excluded = np.ones(components.count, dtype=bool)
        for axis in self._held:
            excluded[components.of(axis)] = False
        excluded |= components.pinned
        for axis in _axes_of_products(self._relations.products):
            excluded[components.of(axis)] = True
        return excluded

    def _split_group(self, components: Components, movements: Sequence[Movement], excluded: Mask) -> SplitGroup | None:
        """The group that `movements` form; None where channels of it are excluded or lie in no order of its own."""
        axes = _NumberedAxes(components)
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

    def _joined(
        self, components: Components, candidates: Sequence[_Candidate], touched: Mask, known: Iterable[bytes]
    ) -> tuple[tuple[tuple[Ids, ...], Ids], ...]:
        """Axes joined behind the split groups, of pieces whose order is `known` or that hold none of their channels."""
        inside = {id(movement) for candidate in candidates for movement in candidate.movements}
        ordered = set(known)
        joins: list[tuple[tuple[Ids, ...], Ids]] = []
        for movement in self._relations.movements:
            if not isinstance(movement, Join) or id(movement) in inside:
                continue
            pieces = tuple(components.of(piece) for piece in movement.pieces)
            hit = [piece for piece in pieces if touched[piece].any()]
            if hit and all(piece.tobytes() in ordered for piece in hit):
                whole = components.of(movement.axis)
                ordered.add(whole.tobytes())
                joins.append((pieces, whole))
        return tuple(joins)

    def _read_elsewhere(self, components: Components, touched: Mask, known: set[bytes]) -> Mask:
        """Components of axes that hold channels of split groups in an order which is not `known`."""
        elsewhere = np.zeros(components.count, dtype=bool)
        for axis in self._axes:
            parts = components.of(axis)
            if touched[parts].any() and parts.tobytes() not in known:
                elsewhere[parts] = True
        return elsewhere


class _NumberedAxes:
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


def _mask(count: int, ids: Ids) -> Mask:
    mask = np.zeros(count, dtype=bool)
    mask[ids] = True
    return mask


def _made(steps: Sequence[Step]) -> tuple[int, ...]:
    """Axes that a step uses before one makes them.

    Of a cut of axis 0 into 1 and 2, and a join of 1 and 3 into 4, these are 0 and 3.
    """
    used_first: dict[int, bool] = {}
    for step in steps:
        for source in step.sources:
            used_first.setdefault(source, True)
        for target in step.targets:
            used_first.setdefault(target, False)
    return tuple(sorted(axis for axis, used in used_first.items() if used))


def _axes_of_products(products: Iterable[ProductRelation]) -> Iterable[Axis]:
    """The free axes that are cells or factors of products."""
    return (axis for product in products for axis in (product.cells, *product.factors) if axis.free)


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
    upstream: list[Movement] = []
    for movement in reversed(movements):
        if isinstance(movement, EqualSplit) and id(movement) in chosen:
            upstream.append(movement)
            needed.add(components.of(movement.axis).tobytes())
        elif isinstance(movement, Join) and components.of(movement.axis).tobytes() in needed:
            upstream.append(movement)
            needed |= {components.of(piece).tobytes() for piece in movement.pieces}
    return upstream[::-1]


def _coupled(components: Components, movements: list[Movement]) -> list[list[Movement]]:
    """Movements that share channels, together.

    A graph of 3 movements and 16 components has nodes 0 to 2 and 3 to 18. Movements 0 and 2, both on component 5, are
    joined by the edges (0, 8) and (2, 8).
    """
    touched = [components.of(movement.axis) for movement in movements]
    ids = np.concatenate(touched)
    number = np.repeat(np.arange(len(movements)), [len(parts) for parts in touched])
    labels = connected_components(len(movements) + components.count, number, ids + len(movements))[: len(movements)]
    return [[m for m, own in zip(movements, labels, strict=True) if own == label] for label in np.unique(labels)]


# -- channel shuffles ------------------------------------------------------------------------------------------------


def _find_shuffles(relations: Relations) -> None:
    """Take channel shuffles out of the products: ``(sections, size)`` transposed, its factors used nowhere else.

    ``x.view(n, 2, 8, h, w).transpose(1, 2).reshape(n, 16, h, w)`` says that channels 0 to 15 are the product of axes of
    2 and 8, and those of the result the product of 8 and 2. It becomes an `EqualSplit` of 0 to 15 into 0 to 7 and 8 to
    15, which lie in the result as 0, 8, 1, 9, ..., 7, 15.
    """
    products = {_factor_keys(product): product for product in relations.products if len(product.factors) == 2}
    for place, merge in enumerate(relations.movements):
        if not isinstance(merge, ProductRelation) or len(merge.factors) != 2:
            continue
        split = products.get(_factor_keys(merge)[::-1])
        if split is not None and split.cells.free and _is_shuffle(relations, split, merge):
            outer = split.factors[0].size
            size = split.cells.size // outer
            parts = tuple(split.cells[i * size : (i + 1) * size] for i in range(outer))
            relations.movements[place] = EqualSplit(split.cells, parts, merge.cells, (split, merge))
            relations.products[:] = [
                product for product in relations.products if product is not split and product is not merge
            ]


def _factor_keys(product: ProductRelation) -> tuple[object, ...]:
    return tuple(axis.key for axis in product.factors)


def _is_shuffle(relations: Relations, split: ProductRelation, merge: ProductRelation) -> bool:
    """Whether the factors of `split` serve the shuffle alone, and the ints that count them fit one.

    The number of sections must stay (a literal or an attribute), the size of a section follow the tensor's.
    """
    outer, inner = split.factors
    if not all(axis.free and axis.array is None for axis in (outer, inner)):
        return False
    if _follows(relations, outer) is True or _follows(relations, inner) is False:
        return False
    others = _other_uses(relations, split, merge)
    return not any(
        _meets_runs(relations, others, axis) or _meets_arrays(relations, others, axis) for axis in split.factors
    )


def _other_uses(relations: Relations, split: ProductRelation, merge: ProductRelation) -> list[Axis]:
    """The free axes of which anything but a shuffle of `split` and `merge` says something."""
    axes = [
        *_axes_of_products(product for product in relations.products if product is not split and product is not merge)
    ]
    axes += [axis for axis, _ in relations.pins]
    axes += [axis for reduction in relations.reductions for axis in reduction.axes]
    axes += [scale.axis for scale in relations.scales]
    return [axis for axis in axes if axis.free]


def _meets_runs(relations: Relations, others: Sequence[Axis], axis: Axis) -> bool:
    """Whether ids of `axis`, which are a run, are in a run of `others` or related as part of one.

    Ids 16 to 23 meet the run of 20 to 27, which starts before 24 and ends after 16.
    """
    first, last = axis.start, axis.start + axis.size
    runs = [(other.start, other.start + other.size) for other in others if other.array is None]
    runs += [(start, start + size) for a, b, size in relations.runs for start in (a, b)]
    return any(start < last and stop > first for start, stop in runs)


def _meets_arrays(relations: Relations, others: Sequence[Axis], axis: Axis) -> bool:
    """Whether ids of `axis`, which are a run, are among ids of `others` that are no run, or related one by one."""
    first, last = axis.start, axis.start + axis.size
    arrays = [other.ids() for other in others if other.array is not None]
    arrays += [ids for pair in relations.arrays for ids in pair]
    return any(bool(((ids >= first) & (ids < last)).any()) for ids in arrays)


def _follows(relations: Relations, axis: Axis) -> bool | None:
    """Whether the ints that count `axis` are computed from sizes of tensors; None if there are none."""
    counted: list[SizeConstraint] = [e for e in relations.constraints if e.axis.free and e.axis.key == axis.key]
    if not counted:
        return None
    return all(any(isinstance(leaf, Dim) for leaf in leaves(e.expression)) for e in counted)


# -- pieces that may not be emptied ----------------------------------------------------------------------------------


def hold_pieces(channels: Channels, components: Components) -> bool:
    """Pin a channel of each piece that could be emptied; whether there was one.

    A piece that holds all channels of a dimension of a weight, or all heads or head indices of a product, needs none:
    of those one is always kept.
    """
    pieces = {axis.key: (axis, where) for axis, where in channels.relations.pieces}
    if not pieces:
        return False
    never_emptied = _NeverEmptied(channels, components)
    pinned = False
    for axis, where in pieces.values():
        if not never_emptied.within(components.of(axis)):
            channels.relations.pin(axis[:1], f"its piece may not be left without channels, in {where}")
            pinned = True
    return pinned


class _NeverEmptied:
    """Sets of components of which one is always kept: pinned ones, dimensions of weights, factors, whole products."""

    def __init__(self, channels: Channels, components: Components) -> None:
        self._components = components
        self._held = [axis for number in channels.held for axis in channels.axes[number] if axis.free and axis.size]
        # A piece can hold a whole axis only if it holds the first channel of it: most axes need no other look.
        self._firsts = np.array([components.of(axis[:1])[0] for axis in self._held], dtype=np.int64)
        self._factors = [part for factored in components.factored_axes for part in factored.factors]
        self._products = [factored.cells for factored in components.factored_axes]

    def _is_whole(self, factor: Ids) -> bool:
        """Whether not all of the factor can go while others stay: no weight has channels both of it and others.

        Of ``x[..., :2, None] * x[..., None, :]`` the factor ``x[..., :2]`` is two of the channels of `x`.
        """
        if not self._components.roots[factor].any():
            return False
        inside = _mask(self._components.count, factor)
        held = (inside[self._components.of(axis)] for axis in self._held)
        return not any(part.any() and not part.all() for part in held)

    def within(self, parts: Ids) -> bool:
        """Whether `parts` hold such a set."""
        if self._components.pinned[parts].any():
            return True
        inside = _mask(self._components.count, parts)
        if any(inside[cells].all() for cells in self._products):
            return True
        if any(inside[factor].all() and self._is_whole(factor) for factor in self._factors):
            return True
        # One of several roots is always kept; cells of one row all go with the index of the row.
        held = (self._components.of(self._held[at]) for at in np.flatnonzero(inside[self._firsts]))
        return any(inside[part].all() and self._components.roots[part].any() for part in held)
