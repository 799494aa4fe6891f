"""What a coupling works with: the axes of tensors, and the relations that it states between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import fx

from structprune.ops.op import Indices, Result, op_of
from structprune.ops.relations import UNIT, Axes, Axis, Bound, ReducesOver, Relations, Scale, SizeConstraint
from structprune.tracing.containers import leaves_of
from structprune.tracing.provenance import Arithmetic, Constant, Dim, Literal, SizeInt, expression_of, leaves


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A tensor argument of an operation: its axes, one for each dimension."""

    node: fx.Node
    axes: Axes

    @property
    def rows(self) -> Axes:
        """The former name of `axes`."""
        return self.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return tuple(axis.size for axis in self.axes)

    def dim(self, dim: int) -> int:
        """A dimension, counted from the front."""
        return int(dim) % len(self.axes) if self.axes else 0


class Context:
    """What a rule uses to say how an operation relates channels."""

    def __init__(self, relations: Relations) -> None:
        self.relations = relations
        self.new_axis = relations.new_axis
        self.same = relations.same
        self.pin = relations.pin
        self.split = relations.split
        self.merged = relations.merged
        self.sections = relations.sections
        self.balanced = relations.balanced
        self.concatenated = relations.concatenated
        self.node: fx.Node
        self.shape: Any = ()
        self.claimed: set[int] = set()
        self.axes: list[Any] = []
        self.unforeseen: set[int] = set()
        self._numbers: dict[tuple[int, int | None], Axis] = {}
        self._counted: set[int] = set()

    def expect(self, value: Any, axis: Axis) -> None:
        """The int `value`, an argument of the call, must equal the number of kept channels of `axis`."""
        if not isinstance(value, int) or value < 0:
            return
        self.claimed.add(id(value))
        if axis.free or isinstance(value, SizeInt):
            meta = self.node.meta
            constraint = SizeConstraint(expression_of(value), axis, meta["index"], meta["where"])
            self.relations.constraints.append(constraint)

    def follows_input(self, value: Any) -> bool:
        """Whether `value` was computed from a size that the inputs decide."""
        return any(
            isinstance(leaf, Dim) and not self.axes[leaf.node][leaf.dim].free for leaf in leaves(expression_of(value))
        )

    def reduces_over(self, operand: Operand, dims: Sequence[int]) -> None:
        """The operation reduces or normalises `operand` over `dims`: over the channels kept, where they are free."""
        free = tuple(dim for dim in dims if operand.axes[dim].free)
        if free:
            axes = tuple(operand.axes[dim] for dim in free)
            self.relations.reductions.append(ReducesOver(self.node.meta["index"], free, axes))

    def scale(self, argument: int, value: Any, axis: Axis, *, divides: bool = False) -> None:
        """The operation multiplies (or divides) argument number `argument` by `value`, which depends on `axis`'s size.

        A division by the argument counts as one of it: either way a factor on `value` is made up for by its inverse.
        """
        self.claimed.add(id(value))
        expression = expression_of(value)
        if divides:
            expression = Arithmetic("**", pow, expression, Constant(-1))
        self.relations.scales.append(Scale(self.node.meta["index"], argument, expression, axis))

    def keeps_zeros(self, operand: Operand) -> None:
        """The result has the shape of `operand`, and is zero wherever that is: ``f(0) = 0``, entry by entry."""
        self.node.meta["keeps_zeros"] = operand.node

    def bounded(self, axis: Axis, least: int = 1, step: int = 1) -> None:
        """`axis` must keep at least `least` channels, and a multiple of `step`."""
        if axis.free:
            self.relations.bounds.append(Bound(axis, self.where(), least, step))

    def never_empty(self, axis: Axis) -> None:
        """`axis`, a piece of another, must keep a channel."""
        self.relations.pieces.append((axis, self.where()))

    # -- tensors whose values are the numbers of channels ---------------------------------------------------------

    def tracked(self, value: Any) -> bool:
        """Whether `value` is an int that follows the channels: a size or an attribute, not a literal."""
        return isinstance(value, SizeInt) and not isinstance(value.expression, Literal)

    def number(self, axis: Axis, part: int | None = None) -> None:
        """The values of the result (of part number `part` of it) are positions in `axis`."""
        self._numbers[self.node.meta["index"], part] = axis

    def numbered(self, operand: Operand) -> Axis | None:
        """The axis that the values of `operand` are positions in; None if they are other values."""
        node = operand.node
        if node.meta["name"] == "part":
            parent, position = node.args
            assert isinstance(parent, fx.Node)
            assert isinstance(position, int)
            return self._numbers.get((parent.meta["index"], position))
        return self._numbers.get((node.meta["index"], None))

    def counts(self, operand: Operand, axis: Axis) -> bool:
        """The values of `operand` look up channels of `axis`; whether they are positions in it, and follow it."""
        numbered = self.numbered(operand)
        if numbered is None or numbered.size != axis.size:
            return False
        self.same(numbered, axis)
        self._counted.add(operand.node.meta["index"])
        return True

    def settle_numbers(self, operands: Sequence[Operand]) -> None:
        """After a rule: numbers that were passed on are numbers still; those used in another way may not change."""
        known = op_of(self.node.meta["name"])
        what = Indices.USED if known is None else known.indices
        for operand in operands:
            axis = self.numbered(operand)
            if axis is None or operand.node.meta["index"] in self._counted or what is Indices.ORDERED:
                continue
            if what is Indices.PASSED and operand is operands[0]:
                self.number(axis)
            elif what is Indices.PASSED_FIRST and operand is operands[0]:
                self.number(axis, part=0)
            else:
                self.pin(axis, f"the numbers of its channels are used as values by {self.where()}")
        self._counted.clear()

    def broadcast(self, operands: Sequence[Operand]) -> Axes:
        """Axes of an elementwise result; dimensions of the same place are the same channels."""
        if len(operands) == 1:
            return operands[0].axes
        dims = max(len(operand.axes) for operand in operands)
        return tuple(self._joined(operands, -back) for back in range(dims, 0, -1))

    def _joined(self, operands: Sequence[Operand], dim: int) -> Axis:
        result = UNIT
        for operand in operands:
            if len(operand.axes) < -dim:
                continue
            axis = operand.axes[dim]
            if axis.size != 1:
                result = axis if result.size == 1 else self.same(result, axis)
        return result

    def fresh(self, shape: Sequence[int], reason: str) -> Axes:
        """Pinned axes of these sizes."""
        return tuple(UNIT if size == 1 else Axis(int(size), pin=reason) for size in shape)

    def where(self) -> str:
        """Operation and source line, for reasons."""
        return f"{self.node.meta['name'].removeprefix('python.')} at {self.node.meta['where']}"

    def pin_all(self, operands: Sequence[Operand], reason: str) -> Result:
        """Pin every channel of the operands; the result is pinned too."""
        for operand in operands:
            for axis in operand.axes:
                self.pin(axis, reason)
        shape = self.shape
        if isinstance(shape, list):
            return [None if part is None else self.fresh(part, reason) for part in shape]
        return self.fresh(shape, reason)


def operands_in(*values: Any) -> Iterator[Operand]:
    """The tensor arguments in `values`, in lists, tuples and dicts too."""
    return leaves_of(values, Operand)


# -- rules that come from outside: what they say nothing about stays whole -------------------------------------------


class Watched(tuple[Axis, ...]):
    """Axes of an operand that note which of them a rule looked at."""

    _seen: set[int]

    def __new__(cls, axes: Axes) -> Self:
        """Axes of which none has been asked for yet."""
        made = super().__new__(cls, axes)
        made._seen = set()
        return made

    def unseen(self) -> list[Axis]:
        """The axes that nobody asked for."""
        return [tuple.__getitem__(self, dim) for dim in range(len(self)) if dim not in self._seen]

    def __getitem__(self, at: Any) -> Any:
        places = range(len(self))[at]
        self._seen.update(places if isinstance(places, range) else [places])
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[Axis]:
        self._seen.update(range(len(self)))
        return super().__iter__()


def call_watched(
    c: Context, function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Result:
    """What a rule says; axes of its operands that it neither looked at nor returned are pinned."""
    seen: list[Watched] = []

    def watched(value: Any) -> Any:
        if isinstance(value, Operand):
            axes = Watched(value.axes)
            seen.append(axes)
            return Operand(value.node, axes)
        if isinstance(value, (tuple, list)):
            return type(value)(watched(item) for item in value)
        if isinstance(value, dict):
            return {key: watched(item) for key, item in value.items()}
        return value

    result = function(c, *watched(args), **watched(kwargs))
    if isinstance(result, list):
        result = [None if axes is None else tuple(axes) for axes in result]
    elif result is not None:
        result = tuple(result)
    for axes in seen:
        for axis in axes.unseen():
            c.pin(axis, f"the rule for {name} does not say what it is")
    return result
