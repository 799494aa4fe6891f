"""Rows of channel ids, and the relations that operations put between them.

Every dimension of every tensor in a trace is a `Row`: one channel id for each index. Fresh ids come in runs, so that a
row is mostly a range, and relations between whole ranges cost the same for 8 channels as for 8,192. A row whose
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
class Row:
    """The channels of one dimension of one tensor.

    Attributes:
        size: number of channels.
        start: first id, when the ids are the run ``start, start + 1, ...``; -1 otherwise.
        array: the ids, when they are no run.
        pin: why these channels may not be removed, when the row carries no ids.
    """

    size: int
    start: int = -1
    array: Ids | None = None
    pin: str | None = None

    @property
    def free(self) -> bool:
        """Whether the row carries ids; a row that does not is pinned as a whole."""
        return self.pin is None

    @property
    def key(self) -> object:
        """Equal for rows with the same ids."""
        return (self.start, self.size) if self.array is None else self.array.tobytes()

    def ids(self) -> Ids:
        """The ids as an array of shape ``(size,)``; the row must be free."""
        if self.array is not None:
            return self.array
        return np.arange(self.start, self.start + self.size)

    def __getitem__(self, index: slice) -> Row:
        """The channels in a slice of positions."""
        start, stop, step = index.indices(self.size)
        size = len(range(start, stop, step))
        if self.pin is not None:
            return Row(size, pin=self.pin)
        if self.array is None and step == 1:
            return Row(size, self.start + start)
        return Row(size, array=np.ascontiguousarray(self.ids()[index]))


Rows = tuple[Row, ...]
UNIT = Row(1, pin="it has a single channel")


@dataclass(frozen=True, slots=True)
class Grid:
    """One cell lives exactly while its index in every factor lives: cells = factor x factor x ... in C order."""

    cells: Row
    factors: Rows


@dataclass(frozen=True, slots=True)
class Join:
    """`row` is made of `pieces`, one after the other."""

    pieces: Rows
    row: Row


@dataclass(slots=True, eq=False)
class Balance:
    """Equal sections `parts` of `row`, which must keep equally many channels; while `free`, each its own choice.

    Where `shuffled` is given, the sections are interleaved into it: ``view(2, C / 2).T.flatten()``. Such a shuffle is
    a pair of `grids`, which say that the sections keep the same channels; they count once the balance is not free.
    """

    row: Row
    parts: Rows
    shuffled: Row | None = None
    grids: tuple[Grid, ...] = ()
    free: bool = True


@dataclass(frozen=True, slots=True)
class Expectation:
    """An int in a call that must equal the number of living channels of `row`."""

    expression: Expression
    row: Row
    node: int
    where: str

    @property
    def is_literal(self) -> bool:
        """Whether the size is a literal in the call, and nothing else."""
        return not any(True for _ in leaves(self.expression)) and sum(1 for _ in literals(self.expression)) == 1


@dataclass(frozen=True, slots=True)
class Survivors:
    """Node `node` reduces or normalises over free channels: over the survivors, once some are removed.

    `argument` counts in the node's tensor arguments, `dims` are the dimensions reduced and `rows` their channels.
    """

    node: int
    dims: tuple[int, ...]
    rows: Rows


@dataclass(frozen=True, slots=True)
class Bound:
    """How many channels `row` may keep: at least `least`, and a multiple of `step`, for the sake of `where`."""

    row: Row
    where: str
    least: int = 1
    step: int = 1


@dataclass(frozen=True, slots=True)
class Scale:
    """Node `node` multiplies argument `argument` by ``factor``, which depends on the number of living channels."""

    node: int
    argument: int
    expression: Expression
    row: Row


@dataclass(slots=True)
class Relations:
    """Everything that a trace says about its channels, as integer ranges and arrays.

    `pieces` are those of larger rows that must not be emptied, and the operations that take them.
    """

    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    total: int = 0
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    arrays: list[tuple[Ids, Ids]] = field(default_factory=list)
    pins: list[tuple[Row, str]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)
    survivors: list[Survivors] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    movements: list[Join | Balance | Grid] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    pieces: list[tuple[Row, str]] = field(default_factory=list)
    _splits: dict[object, Rows] = field(default_factory=dict)
    _merges: dict[object, Row] = field(default_factory=dict)

    def new_axis(self, size: int) -> Row:
        """A row of fresh channels."""
        if size == 1:
            return UNIT
        return self.run(size)

    def run(self, size: int) -> Row:
        """A row of fresh channels with ids of their own, even if it is a single one."""
        row = Row(size, self.total)
        self.starts.append(self.total)
        self.sizes.append(size)
        self.total += size
        return row

    def scale_of(self, node: int, argument: int, expression: Expression, row: Row) -> None:
        """Node number `node` multiplies its argument by `expression`, which depends on the size of `row`."""
        if row.free:
            self.scales.append(Scale(node, argument, expression, row))

    def same(self, a: Row, b: Row) -> Row:
        """Channel i of `a` lives exactly when channel i of `b` does; returns one of the two."""
        if a.size != b.size:
            raise RuleError(f"rows of {a.size} and {b.size} channels cannot be the same")
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

    def pin(self, row: Row, reason: str) -> Row:
        """The channels of `row` may not be removed."""
        if row.free:
            self.pins.append((row, reason))
        return row

    def materialised(self, row: Row) -> Row:
        """`row` with ids, pinned if it had none."""
        if row.free:
            return row
        return self.pin(self.run(row.size), row.pin or "")

    def concatenated(self, rows: Sequence[Row]) -> Row:
        """The rows one after the other."""
        if len(rows) == 1:
            return rows[0]
        if not any(row.free for row in rows):
            return Row(sum(row.size for row in rows), pin=rows[0].pin)
        rows = [self.materialised(row) for row in rows]
        follows = all(a.array is None and b.array is None and a.start + a.size == b.start for a, b in pairwise(rows))
        if follows:
            whole = Row(sum(row.size for row in rows), rows[0].start)
        else:
            whole = Row(sum(row.size for row in rows), array=np.concatenate([row.ids() for row in rows]))
        self.movements.append(Join(tuple(rows), whole))
        return whole

    def split(self, row: Row, sizes: Sequence[int]) -> Rows:
        """`row` seen as a grid of these sizes: one row for each."""
        if not row.free:
            return tuple(Row(size, pin=row.pin) for size in sizes)
        if any(size == row.size for size in sizes):
            return tuple(row if size == row.size else UNIT for size in sizes)
        if 1 in sizes:
            rest = iter(self.split(row, [size for size in sizes if size != 1]))
            return tuple(UNIT if size == 1 else next(rest) for size in sizes)
        key = (row.key, tuple(sizes))
        known = self._splits.get(key)
        if known is None:
            known = self._splits[key] = tuple(self.new_axis(size) for size in sizes)
            self.grids.append(Grid(row, known))
            self._merges[tuple(factor.key if factor.free else factor.size for factor in known)] = row
        return known

    def merged(self, rows: Sequence[Row]) -> Row:
        """The grid that has these rows as its factors, flattened into one row."""
        rows = [row for row in rows if row.size != 1]
        if not rows:
            return UNIT
        if len(rows) == 1:
            return rows[0]
        size = int(np.prod([row.size for row in rows]))
        if not any(row.free for row in rows):
            return Row(size, pin=rows[0].pin)
        key = tuple(row.key if row.free else row.size for row in rows)
        known = self._merges.get(key)
        if known is None:
            known = self._merges[key] = self.new_axis(size)
            self.grids.append(Grid(known, tuple(rows)))
            self.movements.append(self.grids[-1])
            self._splits[(known.key, tuple(row.size for row in rows))] = tuple(rows)
        return known

    def sections(self, row: Row, count: int) -> Rows:
        """`count` equal sections of `row`, whose channels are used together: they keep the same ones."""
        size = row.size // count
        parts = tuple(row[i * size : (i + 1) * size] for i in range(count))
        for part in parts[1:]:
            self.same(parts[0], part)
        return parts

    def balanced(self, row: Row, count: int) -> Rows:
        """`count` equal sections of `row` that must keep equally many channels."""
        size = row.size // count
        parts = tuple(row[i * size : (i + 1) * size] for i in range(count))
        if row.free and count > 1:
            self.movements.append(Balance(row, parts))
        return parts

    def free_balances(self) -> list[Balance]:
        """Sections that may still keep channels of their own choice."""
        return [movement for movement in self.movements if isinstance(movement, Balance) and movement.free]

    def loosened(self) -> Iterator[tuple[Ids, Ids]]:
        """Ids of the same channels before and after a free shuffle; its sections are counted by their size."""
        for balance in self.free_balances():
            if balance.shuffled is not None:
                ids = balance.row.ids()
                yield ids.reshape(len(balance.parts), -1).T.ravel(), balance.shuffled.ids()
                yield balance.parts[0].ids(), balance.grids[0].factors[1].ids()

    def all_pins(self) -> Iterator[tuple[Row, str]]:
        """Rows that may not be removed, with reasons; the number of sections of a free shuffle is one."""
        yield from self.pins
        for balance in self.free_balances():
            if balance.shuffled is not None:
                yield balance.grids[0].factors[0], "it numbers the sections of a channel shuffle"

    def tie(self, balance: Balance) -> None:
        """The sections of `balance` keep the same channels after all."""
        balance.free = False
        self.grids.extend(balance.grids)
        if not balance.grids:
            for part in balance.parts[1:]:
                self.same(balance.parts[0], part)
