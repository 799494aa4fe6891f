"""Axes of channel ids, and the relations that operations put between them.

Every dimension of every tensor in a trace is an `Axis`: one channel id for each index. Fresh ids come in runs, so that
an axis is mostly a range, and relations between whole ranges cost the same for 8 channels as for 8,192. An axis whose
channels may never be removed (batch, image and token positions) carries no ids at all, only the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from structprune.errors import RuleError
from structprune.tracing.provenance import Expression, leaves, literals

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """The channels of one dimension of one tensor.

    Attributes:
        size: number of channels.
        start: first id, when the ids are the run ``start, start + 1, ...``; -1 otherwise.
        array: the ids, when they are no run.
        pin: why these channels may not be removed, when the axis carries no ids.
    """

    size: int
    start: int = -1
    array: Ids | None = None
    pin: str | None = None

    @property
    def free(self) -> bool:
        """Whether the axis carries ids; an axis that does not is pinned as a whole."""
        return self.pin is None

    @property
    def key(self) -> object:
        """Equal for axes with the same ids."""
        return (self.start, self.size) if self.array is None else self.array.tobytes()

    def ids(self) -> Ids:
        """The ids as an array of shape ``(size,)``; the axis must be free."""
        if self.array is not None:
            return self.array
        return np.arange(self.start, self.start + self.size)

    def __getitem__(self, index: slice) -> Axis:
        """The channels in a slice of positions."""
        start, stop, step = index.indices(self.size)
        size = len(range(start, stop, step))
        if self.pin is not None:
            return Axis(size, pin=self.pin)
        if self.array is None and step == 1:
            return Axis(size, self.start + start)
        return Axis(size, array=np.ascontiguousarray(self.ids()[index]))


Axes = tuple[Axis, ...]
UNIT = Axis(1, pin="it has a single channel")


@dataclass(frozen=True, slots=True)
class ProductRelation:
    """A cell is kept exactly when its index in every factor is: cells = factor x factor x ... in C order."""

    cells: Axis
    factors: Axes


@dataclass(frozen=True, slots=True)
class Join:
    """`axis` is made of `pieces`, one after the other."""

    pieces: Axes
    axis: Axis


@dataclass(slots=True, eq=False)
class EqualSplit:
    """Equal sections `parts` of `axis`, which must keep equally many channels; while `free`, each its own choice.

    Where `shuffled` is given, the sections are interleaved into it: ``view(2, C / 2).T.flatten()``. Such a shuffle is
    a pair of `products`, which say that the sections keep the same channels; they count once the split is not free.
    """

    axis: Axis
    parts: Axes
    shuffled: Axis | None = None
    products: tuple[ProductRelation, ...] = ()
    free: bool = True


@dataclass(frozen=True, slots=True)
class SizeConstraint:
    """An int in a call that must equal the number of kept channels of `axis`."""

    expression: Expression
    axis: Axis
    node: int
    where: str

    @property
    def is_literal(self) -> bool:
        """Whether the size is a literal in the call, and nothing else."""
        return not any(True for _ in leaves(self.expression)) and sum(1 for _ in literals(self.expression)) == 1


@dataclass(frozen=True, slots=True)
class ReducesOver:
    """Node `node` reduces or normalises over free channels: over the channels kept, once some are removed.

    `dims` are the dimensions of its first tensor that are reduced, and `axes` their channels.
    """

    node: int
    dims: tuple[int, ...]
    axes: Axes


@dataclass(frozen=True, slots=True)
class Bound:
    """How many channels `axis` may keep: at least `least`, and a multiple of `step`, since `where` needs it."""

    axis: Axis
    where: str
    least: int = 1
    step: int = 1


@dataclass(frozen=True, slots=True)
class Scale:
    """Node `node` multiplies argument `argument` by ``factor``, which depends on the number of kept channels."""

    node: int
    argument: int
    expression: Expression
    axis: Axis


@dataclass(slots=True)
class Relations:
    """Everything that a trace says about its channels, as integer ranges and arrays.

    `pieces` are those of larger axes that must not be emptied, and the operations that take them.
    """

    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    total: int = 0
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    arrays: list[tuple[Ids, Ids]] = field(default_factory=list)
    pins: list[tuple[Axis, str]] = field(default_factory=list)
    products: list[ProductRelation] = field(default_factory=list)
    constraints: list[SizeConstraint] = field(default_factory=list)
    reductions: list[ReducesOver] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    movements: list[Join | EqualSplit | ProductRelation] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    pieces: list[tuple[Axis, str]] = field(default_factory=list)
    _splits: dict[object, Axes] = field(default_factory=dict)
    _merges: dict[object, Axis] = field(default_factory=dict)

    def new_axis(self, size: int) -> Axis:
        """An axis of fresh channels."""
        if size == 1:
            return UNIT
        return self.run(size)

    def run(self, size: int) -> Axis:
        """An axis of fresh channels with ids of their own, even if it is a single one."""
        axis = Axis(size, self.total)
        self.starts.append(self.total)
        self.sizes.append(size)
        self.total += size
        return axis

    def scale_of(self, node: int, argument: int, expression: Expression, axis: Axis) -> None:
        """Node number `node` multiplies its argument by `expression`, which depends on the size of `axis`."""
        if axis.free:
            self.scales.append(Scale(node, argument, expression, axis))

    def same(self, a: Axis, b: Axis) -> Axis:
        """Channel i of `a` is kept exactly when channel i of `b` is; returns one of the two."""
        if a.size != b.size:
            raise RuleError(f"axes of {a.size} and {b.size} channels cannot be the same")
        if a is b:
            return a
        if a.size == 1 and not (a.free and b.free):
            return a if a.free else b  # a single channel is never removed, so there is nothing to spread
        if a.pin is not None:
            self.pin(b, a.pin)
            return a
        if b.pin is not None:
            self.pin(a, b.pin)
            return b
        if a.array is None and b.array is None:
            if a.start != b.start:
                self.runs.append((a.start, b.start, a.size))
        else:
            self.arrays.append((a.ids(), b.ids()))
        return a

    def pin(self, axis: Axis, reason: str) -> Axis:
        """The channels of `axis` may not be removed."""
        if axis.free:
            self.pins.append((axis, reason))
        return axis

    def materialised(self, axis: Axis) -> Axis:
        """`axis` with ids, pinned if it had none."""
        if axis.free:
            return axis
        return self.pin(self.run(axis.size), axis.pin or "")

    def concatenated(self, axes: Sequence[Axis]) -> Axis:
        """The axes one after the other."""
        if len(axes) == 1:
            return axes[0]
        if not any(axis.free for axis in axes):
            return Axis(sum(axis.size for axis in axes), pin=axes[0].pin)
        axes = [self.materialised(axis) for axis in axes]
        follows = all(a.array is None and b.array is None and a.start + a.size == b.start for a, b in pairwise(axes))
        if follows:
            whole = Axis(sum(axis.size for axis in axes), axes[0].start)
        else:
            whole = Axis(sum(axis.size for axis in axes), array=np.concatenate([axis.ids() for axis in axes]))
        self.movements.append(Join(tuple(axes), whole))
        return whole

    def split(self, axis: Axis, sizes: Sequence[int]) -> Axes:
        """`axis` seen as a product of these sizes: one axis for each."""
        if not axis.free:
            return tuple(Axis(size, pin=axis.pin) for size in sizes)
        if any(size == axis.size for size in sizes):
            return tuple(axis if size == axis.size else UNIT for size in sizes)
        if 1 in sizes:
            rest = iter(self.split(axis, [size for size in sizes if size != 1]))
            return tuple(UNIT if size == 1 else next(rest) for size in sizes)
        key = (axis.key, tuple(sizes))
        if key not in self._splits:
            self._splits[key] = self._new_factors(axis, sizes)
        return self._splits[key]

    def _new_factors(self, axis: Axis, sizes: Sequence[int]) -> Axes:
        """New axes of these sizes whose product is `axis`."""
        factors = tuple(self.new_axis(size) for size in sizes)
        self.products.append(ProductRelation(axis, factors))
        self._merges[tuple(factor.key if factor.free else factor.size for factor in factors)] = axis
        return factors

    def merged(self, axes: Sequence[Axis]) -> Axis:
        """The product that has these axes as its factors, flattened into one axis."""
        axes = [axis for axis in axes if axis.size != 1]
        if not axes:
            return UNIT
        if len(axes) == 1:
            return axes[0]
        size = int(np.prod([axis.size for axis in axes]))
        if not any(axis.free for axis in axes):
            return Axis(size, pin=axes[0].pin)
        key = tuple(axis.key if axis.free else axis.size for axis in axes)
        known = self._merges.get(key)
        if known is None:
            known = self._merges[key] = self.new_axis(size)
            self.products.append(ProductRelation(known, tuple(axes)))
            self.movements.append(self.products[-1])
            self._splits[(known.key, tuple(axis.size for axis in axes))] = tuple(axes)
        return known

    def sections(self, axis: Axis, count: int) -> Axes:
        """`count` equal sections of `axis`, whose channels are used together: they keep the same ones."""
        size = axis.size // count
        parts = tuple(axis[i * size : (i + 1) * size] for i in range(count))
        for part in parts[1:]:
            self.same(parts[0], part)
        return parts

    def balanced(self, axis: Axis, count: int) -> Axes:
        """`count` equal sections of `axis` that must keep equally many channels."""
        size = axis.size // count
        parts = tuple(axis[i * size : (i + 1) * size] for i in range(count))
        if axis.free and count > 1:
            self.movements.append(EqualSplit(axis, parts))
        return parts

    def free_splits(self) -> list[EqualSplit]:
        """Sections that may still keep channels of their own choice."""
        return [movement for movement in self.movements if isinstance(movement, EqualSplit) and movement.free]

    def loosened(self) -> Iterator[tuple[Ids, Ids]]:
        """Ids of the same channels before and after a free shuffle; its sections are counted by their size."""
        for split in self.free_splits():
            if split.shuffled is not None:
                ids = split.axis.ids()
                yield ids.reshape(len(split.parts), -1).T.ravel(), split.shuffled.ids()
                yield split.parts[0].ids(), split.products[0].factors[1].ids()

    def all_pins(self) -> Iterator[tuple[Axis, str]]:
        """Axes that may not be removed, with reasons; the number of sections of a free shuffle is one."""
        yield from self.pins
        for split in self.free_splits():
            if split.shuffled is not None:
                yield split.products[0].factors[0], "it numbers the sections of a channel shuffle"

    def tie(self, split: EqualSplit) -> None:
        """The sections of `split` keep the same channels after all."""
        split.free = False
        self.products.extend(split.products)
        if not split.products:
            for part in split.parts[1:]:
                self.same(split.parts[0], part)
