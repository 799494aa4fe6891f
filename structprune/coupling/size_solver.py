"""Every int of a forward is made to follow the channels: by setting attributes, by tying channels, or by pinning them.

Whether an int follows is decided by trial: random channels are removed on paper and both sides of each constraint are
counted (`coupling/size_constraints.py`). What fails is repaired, and all is solved and tried anew, until nothing fails.
So planning knows before surgery.

Example: ``y.view(2, 5, 4, n // 4)``, where n = 32 is the size of y's last dimension.
    In: the constraints "4 counts the axis of heads" and "n // 4 counts the axis of sizes" (8 channels in each head).
    Trial: with a head removed, 24 channels are left and n // 4 = 6, but each head still has 8. The second one fails.
    Repaired: the axis of heads is pinned, since a literal counts it. With a channel of every head removed, n // 4 = 7.
    Out: one group of 8 channels, each of which takes 4 of the 32 along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from structprune.coupling.propagate import Channels, Invariant
from structprune.coupling.sections import Sections, hold_pieces
from structprune.coupling.size_constraints import Check, Number, Sizes, moves
from structprune.coupling.solve import Components
from structprune.ops.relations import Axis, Bound, SizeConstraint
from structprune.tracing.provenance import (
    Arithmetic,
    Attribute,
    Comparison,
    Constant,
    Dim,
    Expression,
    evaluated,
    leaves,
)

_ROUNDS = 100  # of repairs, after which what fails is pinned


class SizeSolver:
    """Makes every int of a trace follow the channels, by setting attributes, by tying or by pinning.

    Args:
        channels: axes and relations; ties and pins are added to its relations.
        comparisons: what Python compared.
        read: value of an attribute of the model.
        rewritable: whether a literal in the arguments of this node can be rewritten.
        described: the axis that an attribute of a standard layer counts, if it describes the layer's own shape.
    """

    def __init__(
        self,
        channels: Channels,
        comparisons: tuple[Comparison, ...],
        read: Callable[[Attribute], int],
        rewritable: Callable[[int], bool],
        described: Callable[[Attribute], Axis | None],
    ) -> None:
        self._channels = channels
        self._relations = channels.relations
        self._comparisons = tuple(c for c in comparisons if any(True for x in (c.left, c.right) for _ in leaves(x)))
        self._read = read
        self._rewritable = rewritable
        self._described = described
        self._constraints = [*channels.relations.constraints, *self._promised()]
        self._attempted: set[tuple[object, ...]] = set()
        self._bounded: set[Comparison] = set()
        held = (axis for number in channels.held for axis in channels.axes[number])
        self._sections = Sections(self._relations, channels.every_axis(), held)

    def _promised(self) -> Iterator[SizeConstraint]:
        """Comparisons that found two numbers equal, one of them a size: after pruning they must be equal still."""
        for c in self._comparisons:
            if (c.symbol, c.outcome) not in (("==", True), ("!=", False)):
                continue
            for size, other in ((c.left, c.right), (c.right, c.left)):
                if isinstance(size, Dim) and (axis := self._channels.axes[size.node][size.dim]).free:
                    yield SizeConstraint(other, axis, size.node, c.where)
                    break

    # -- the loop ------------------------------------------------------------------------------------------------

    def solve(self) -> Sizes:
        """Components of channels whose removal leaves every int right, and what the ints become."""
        before, rounds = None, 0
        while True:
            sizes = self._solved()
            failures = sizes.failures(self._rewritable)
            if not failures:
                if hold_pieces(self._channels, sizes.components):
                    continue
                return sizes
            self._repair(failures, sizes)
            # Each round must join or pin something, or try a tie that was not tried yet.
            progress = (sizes.components.count, int(sizes.components.pinned.sum()), len(self._attempted))
            rounds += 1
            if progress == before or rounds > _ROUNDS:
                if not sizes.components.roots.any():
                    return sizes  # nothing may go, so no int changes
                self._pin_unsettled(failures[0].where)
            before = progress

    def _solved(self) -> Sizes:
        """The components of the relations as they are, and the attributes that count axes."""
        while True:
            components = Components(self._relations)
            splits = self._sections.settle(components)
            if splits is not None:  # otherwise sections were tied
                components.splits = splits
                attributes = self._attribute_axes(components)
                constraints = tuple(self._constraints)
                return Sizes(self._channels, components, constraints, self._comparisons, attributes, self._read)

    def _pin_unsettled(self, where: str) -> None:
        """The ints that fail neither follow nor stand still with their axes: then nothing that is counted may go."""
        for axis in self._channels.every_axis():
            self._relations.pin(axis, f"sizes that contradict each other are used at {where}")

    def _attribute_axes(self, components: Components) -> dict[Attribute, Axis]:
        """Attributes that stand alone as a size: each counts an axis."""
        counted: dict[Attribute, Axis] = {}
        for e in self._constraints:
            if isinstance(e.expression, Attribute):
                known = counted.get(e.expression)
                if known is None or (not moves(components, known) and moves(components, e.axis)):
                    counted[e.expression] = e.axis
        for attribute in self._mentioned():
            if attribute not in counted:
                axis = self._described(attribute)
                if axis is not None and moves(components, axis):
                    counted[attribute] = axis
        return counted

    def _mentioned(self) -> list[Attribute]:
        """The attributes that any number of the forward was computed from."""
        numbers = [e.expression for e in self._constraints]
        numbers += [side for c in self._comparisons for side in (c.left, c.right)]
        numbers += [i.expression for i in self._channels.invariants]
        numbers += [scale.expression for scale in self._relations.scales]
        return [*dict.fromkeys(leaf for number in numbers for leaf in leaves(number) if isinstance(leaf, Attribute))]

    # -- repairing -------------------------------------------------------------------------------------------------

    def _repair(self, failures: list[Check], sizes: Sizes) -> None:
        """Tie what can be tied; only where nothing more can, pin: first sizes, then what Python compared."""
        constraints = [failure for failure in failures if isinstance(failure, SizeConstraint)]
        ties = SizeTies(sizes)
        tied = self._tie(constraints, ties)
        self._constraints += ties.adopted
        if tied:
            return
        sizes = ties.sizes
        for e in constraints:
            self._pin(e.expression, e.where, sizes)
            self._relations.pin(e.axis, f"{e.expression} counts it at {e.where} and cannot follow")
        numbers = [failure for failure in failures if isinstance(failure, Invariant)]
        for number in numbers:
            self._pin(number.expression, number.where, sizes)
        if constraints or numbers:
            return
        for failure in failures:
            if isinstance(failure, Comparison) and not self._bound(failure, sizes):
                self._pin(failure.left, failure.where, sizes)
                self._pin(failure.right, failure.where, sizes)

    def _tie(self, constraints: list[SizeConstraint], ties: SizeTies) -> bool:
        """Make those of `constraints` true that say most about the order of channels; whether any could be."""
        for vagueness in sorted({_vagueness(e.expression) for e in constraints}):
            tied = [self._try_tie(e, ties) for e in constraints if _vagueness(e.expression) == vagueness]
            if any(tied):
                return True
        return False

    def _try_tie(self, e: SizeConstraint, ties: SizeTies) -> bool:
        key = (e.expression, e.axis.key if e.axis.free else e.axis.size, e.node)
        if key in self._attempted:
            return False
        self._attempted.add(key)
        return ties.tie(e)

    def _pin(self, expression: Expression, where: str, sizes: Sizes) -> None:
        for leaf in leaves(expression):
            axis = sizes.axis_of(leaf)
            if axis is not None:
                self._relations.pin(axis, f"the number of its channels is used at {where}, where it cannot change")

    def _bound(self, c: Comparison, sizes: Sizes) -> bool:
        """Make a comparison keep its outcome by keeping enough channels of the one axis that it counts.

        ``if repeats == 1: return x``, with 4 repeats, stays false while 2 are left.
        """
        counted = {*leaves(c.left), *leaves(c.right)}
        if c in self._bounded or len(counted) != 1:
            return False
        self._bounded.add(c)
        (leaf,) = counted
        axis = sizes.axis_of(leaf)
        if axis is None or not axis.free or axis.size != sizes.now(leaf):
            return False
        least = c.fewest(axis.size)
        if not 1 < least < axis.size:
            return False
        self._relations.bounds.append(Bound(axis, f"the comparison of its number at {c.where}", least))
        return True


def _vagueness(expression: Expression) -> int:
    """How little a tie made from this expression says about the order of channels: plain sizes come first."""
    if not isinstance(expression, Arithmetic):
        return 0
    return 1 if expression.symbol == "//" else 2


# -- channels are tied so that an int of the forward equals a number of channels after every removal -----------------
# Example: ``x.view(2, 5, 4, n // 4)``, where n = 32 is the width of a residual stream and the axes of the view are new.
#     In: the constraint that ``n // 4`` (the size of axis s, 32 channels, over a literal) counts axis b of 8 channels.
#     Out: s = a x b in C order, with an axis a of 4 that is pinned since a literal counts it. Channel i of b now takes
#     channels i, i + 8, i + 16 and i + 24 of s along, so n // 4 counts b whichever of them are removed.


class SizeTies:
    """Ties for the constraints that fail for one solution of the channels.

    Args:
        sizes: the solution; ties are added to its relations.

    Attributes:
        sizes: the same, with the attributes that count axes from now on.
        adopted: the constraints that say so.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = replace(sizes, attributes=dict(sizes.attributes))
        self.adopted: list[SizeConstraint] = []
        self._relations = sizes.channels.relations

    def tie(self, e: SizeConstraint) -> bool:
        """Make the constraint hold; whether that was possible."""
        return self._tie(e.expression, e.axis, e)

    def _tie(self, expression: Expression, axis: Axis, e: SizeConstraint) -> bool:
        """Make `expression`, a part of that of `e`, equal the number of channels of `axis`."""
        if isinstance(expression, (Dim, Attribute)):
            return self._tie_counted(expression, axis, e)
        if isinstance(expression, Arithmetic) and expression.right is not None:
            if expression.symbol == "//":
                return self._tie_quotient(expression.left, expression.right, axis, e)
            if expression.symbol == "*":
                return self._tie_factors((expression.left, expression.right), axis, e)
        return False

    def _tie_counted(self, leaf: Dim | Attribute, axis: Axis, e: SizeConstraint) -> bool:
        counted = self.sizes.axis_of(leaf)
        if counted is None and isinstance(leaf, Attribute) and axis.free:
            return self._adopt(leaf, axis, e)
        if counted is None or counted.size != axis.size:
            return False
        self._relations.same(counted, axis)
        return True

    def _adopt(self, attribute: Attribute, axis: Axis, e: SizeConstraint) -> bool:
        """From now on the attribute, which stands in expressions only, is what counts `axis`."""
        if self.sizes.read(attribute) != axis.size:
            return False
        self.adopted.append(SizeConstraint(attribute, axis, e.node, e.where))
        self.sizes.attributes[attribute] = axis
        return True

    def _tie_quotient(self, left: Expression, right: Expression, axis: Axis, e: SizeConstraint) -> bool:
        """``left // right`` counts `axis`: then `left` counts the product of `axis` and what `right` counts."""
        whole = self._whole(left, axis, right)
        if whole is not None:
            return self._tie(left, whole, e)
        factor = self._factor(right)
        if factor is None or self._size(left) != axis.size * factor.size:
            return False
        return self._tie(left, self._relations.merged(self._ordered(factor, axis, e.node)), e)

    def _tie_factors(self, parts: tuple[Expression, Expression], axis: Axis, e: SizeConstraint) -> bool:
        """``a * b`` counts `axis`: then it is a product, of which `a` counts the outer and `b` the inner factor."""
        a, b = (self._size(part) for part in parts)
        if a * b != axis.size:
            return False
        factors = self._relations.split(axis, (int(a), int(b)))
        return all(
            self._hold(factor) if isinstance(part, Constant) else self._tie(part, factor, e)
            for part, factor in zip(parts, factors, strict=True)
        )

    def _whole(self, counted: Expression, axis: Axis, divisor: Expression) -> Axis | None:
        """The channels `counted`, if a literal divides their number into pieces numbered by `axis`: its length is held.

        ``reshape(b, n, c // 32, 32)``: the second 32 could be rewritten, the first cannot, so heads go whole.
        """
        whole = self.sizes.axis_of(counted) if isinstance(counted, Dim) else None
        if whole is None or not whole.free or not axis.free or not isinstance(divisor, Constant):
            return None
        mine = self.sizes.components.of(whole)
        for product in self._relations.products:
            others = [factor for factor in product.factors if factor.key != axis.key]
            fits = len(others) < len(product.factors) and product.cells.free
            if fits and np.array_equal(self.sizes.components.of(product.cells), mine):
                for factor in others:
                    self._hold(factor)
                return product.cells
        return None

    def _hold(self, axis: Axis) -> bool:
        self._relations.pin(axis, "a literal counts it")
        return True

    def _size(self, expression: Expression) -> Number:
        return evaluated(expression, self.sizes.now)

    def _factor(self, expression: Expression) -> Axis | None:
        """The axis that a divisor counts: a pinned one for a number that counts none."""
        if isinstance(expression, (Dim, Attribute)):
            counted = self.sizes.axis_of(expression)
            return counted or Axis(int(self.sizes.now(expression)), pin="an attribute counts it")
        if isinstance(expression, Constant):
            return Axis(int(expression.value), pin="a literal counts it")
        return None

    def _ordered(self, factor: Axis, axis: Axis, node: int) -> list[Axis]:
        """The two as they stand in the tensor that `node` makes; the divisor first if that does not show it."""
        made = self.sizes.channels.axes[node]
        keys = [part.key for part in made if isinstance(part, Axis) and part.free] if isinstance(made, tuple) else []
        if axis.free and factor.free and axis.key in keys and factor.key in keys:
            return [factor, axis] if keys.index(factor.key) < keys.index(axis.key) else [axis, factor]
        return [factor, axis]
