"""Channels are tied so that an int of the forward equals a number of channels after every removal.

Example: ``x.view(2, 5, 4, n // 4)``, where n = 32 is the width of a residual stream and the axes of the view are new.
    In: the constraint that ``n // 4`` (a size, of axis s with 32 channels, over a literal) counts axis b of 8 channels.
    Out: s = a x b in C order, with an axis a of 4 that is pinned since a literal counts it. Channel i of b now takes
    channels i, i + 8, i + 16 and i + 24 of s along, so n // 4 counts b whichever of them are removed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from structprune.coupling.size_constraints import Number, Sizes
from structprune.ops.relations import Axis, SizeConstraint
from structprune.tracing.provenance import Arithmetic, Attribute, Constant, Dim, Expression, evaluated


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
