"""Which ints of a forward follow its channels, and what must change for the others.

Every int that a call takes as a size is a `SizeConstraint`: it must equal the number of kept channels of an axis. Sizes
read from tensors follow by themselves; attributes are repaired; literals are rewritten. What can do none of this is
made true by tying channels together or, at last, by pinning them. Whether an expression holds is decided by trial:
random channels are removed and both sides are counted, until all hold. So planning knows before surgery.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan

import numpy as np

from structprune.coupling.propagate import Channels, Invariant
from structprune.coupling.random_removals import Counter, trials
from structprune.coupling.sections import Sections, hold_pieces
from structprune.coupling.solve import Components
from structprune.errors import PlanError
from structprune.ops.relations import Axis, Bound, SizeConstraint
from structprune.tracing.provenance import (
    Arithmetic,
    Attribute,
    Comparison,
    Constant,
    Dim,
    Expression,
    evaluated,
    inverse,
    leaves,
)

Number = float
_ROUNDS = 100  # of mending, after which what fails is pinned


@dataclass(frozen=True, slots=True)
class Sizes:
    """What must change with the channels.

    Attributes:
        attributes: the axis that each repaired attribute counts.
        literals: constraints whose int is a literal and must be rewritten.
        derived: attributes that follow from others: the constraint to be solved for them.
    """

    attributes: dict[Attribute, Axis]
    literals: list[SizeConstraint]
    derived: dict[Attribute, SizeConstraint]


class SizeSolver:
    """Makes every int of a trace follow the channels, by repair, by tying or by pinning.

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
        self._comparisons = [c for c in comparisons if any(True for x in (c.left, c.right) for _ in leaves(x))]
        self._read = read
        self._rewritable = rewritable
        self._described = described
        self._constraints = [*channels.relations.constraints, *self._promised()]
        self._attempted: set[tuple[object, ...]] = set()
        self._bounded: set[Comparison] = set()
        held = (axis for number in channels.held for axis in channels.axes[number])
        self._sections = Sections(self._relations, channels.every_row(), held)

    def _row(self, leaf: Dim) -> Axis:
        return self._channels.axes[leaf.node][leaf.dim]

    def _promised(self) -> list[SizeConstraint]:
        """Comparisons that found two numbers equal, one of them a size: after pruning they must be equal still."""
        found: list[SizeConstraint] = []
        for c in self._comparisons:
            if (c.symbol, c.outcome) not in (("==", True), ("!=", False)):
                continue
            for size, other in ((c.left, c.right), (c.right, c.left)):
                if isinstance(size, Dim) and self._row(size).free:
                    found.append(SizeConstraint(other, self._row(size), size.node, c.where))
                    break
        return found

    # -- the loop ------------------------------------------------------------------------------------------------

    def solve(self) -> tuple[Components, Sizes]:
        """Components of channels whose removal leaves every int right, and what to change."""
        before, rounds = None, 0
        while True:
            components = self._components = Components(self._relations)
            splits = self._sections.settle(components)
            if splits is None:
                continue
            components.splits = splits
            self._attributes = self._attribute_axes(components)
            self._derived: dict[Attribute, SizeConstraint] = {}
            failures = self._failures(components)
            if not failures:
                if hold_pieces(self._channels, components):
                    continue
                break
            self._mend(failures)
            # Each round must join or pin something, or try a tie that was not tried yet.
            now, rounds = (components.count, int(components.pinned.sum()), len(self._attempted)), rounds + 1
            if now == before or rounds > _ROUNDS:
                if not components.roots.any():
                    break  # nothing may go, so no int changes
                self._pin_unsettled(failures[0].where)
            before = now
        moving = {a: axis for a, axis in self._attributes.items() if self._moves(components, axis)}
        literal = [e for e in self._constraints if e.is_literal and self._moves(components, e.axis)]
        return components, Sizes(moving, literal, self._derived)

    def _pin_unsettled(self, where: str) -> None:
        """The ints that fail neither follow nor stand still with their axes: then nothing that is counted may go."""
        for axis in self._channels.every_row():
            self._relations.pin(axis, f"sizes that contradict each other are used at {where}")

    def _moves(self, components: Components, axis: Axis) -> bool:
        return axis.free and not bool(components.pinned[components.of(axis)].all())

    def _attribute_axes(self, components: Components) -> dict[Attribute, Axis]:
        """Attributes that stand alone as a size: each counts an axis."""
        found: dict[Attribute, Axis] = {}
        for e in self._constraints:
            if isinstance(e.expression, Attribute):
                known = found.get(e.expression)
                if known is None or (not self._moves(components, known) and self._moves(components, e.axis)):
                    found[e.expression] = e.axis
        for attribute in self._mentioned() - found.keys():
            axis = self._described(attribute)
            if axis is not None and self._moves(components, axis):
                found[attribute] = axis
        return found

    def _mentioned(self) -> set[Attribute]:
        """The attributes that any number of the forward was computed from."""
        numbers = [e.expression for e in self._constraints]
        numbers += [side for c in self._comparisons for side in (c.left, c.right)]
        numbers += [i.expression for i in self._channels.invariants]
        numbers += [scale.expression for scale in self._relations.scales]
        return {leaf for number in numbers for leaf in leaves(number) if isinstance(leaf, Attribute)}

    def _failures(self, components: Components) -> list[SizeConstraint | Invariant | Comparison]:
        failed: dict[int, SizeConstraint | Invariant | Comparison] = {}
        relevant = [e for e in self._constraints if self._matters(components, e)]
        checks = [i for i in self._channels.invariants if self._touched(components, i.expression)]
        compared = [c for c in self._comparisons if any(self._touched(components, x) for x in (c.left, c.right))]
        axes = [e.axis for e in relevant if e.axis.free]
        for removed in trials(components, axes, self._relations):
            count = Counter(components, components.closure(removed))
            value = self._valuation(count, relevant)
            for check in [*relevant, *checks, *compared]:
                if id(check) not in failed and not self._holds(check, count, value):
                    failed[id(check)] = check
        return list(failed.values())

    def _matters(self, components: Components, e: SizeConstraint) -> bool:
        if any(isinstance(leaf, Attribute) for leaf in leaves(e.expression)):
            return True  # an attribute may change for another layer's sake
        if not self._moves(components, e.axis):
            return self._touched(components, e.expression)
        return not (e.is_literal and self._rewritable(e.node))

    def _touched(self, components: Components, expression: Expression) -> bool:
        for leaf in leaves(expression):
            axis = self._row(leaf) if isinstance(leaf, Dim) else self._attributes.get(leaf)
            if axis is not None and self._moves(components, axis):
                return True
        return False

    def _valuation(self, count: Counter, constraints: list[SizeConstraint]) -> Callable[[Dim | Attribute], Number]:
        known = {attribute: count(axis) for attribute, axis in self._attributes.items()}

        def value(leaf: Dim | Attribute) -> Number:
            if isinstance(leaf, Dim):
                return count(self._row(leaf))
            return known[leaf] if leaf in known else self._read(leaf)

        for e in constraints:
            unknown = [leaf for leaf in leaves(e.expression) if isinstance(leaf, Attribute) and leaf not in known]
            if not unknown or evaluated(e.expression, value) == count(e.axis):
                continue
            for attribute in unknown:
                solved = inverse(e.expression, attribute, count(e.axis), value)
                if solved is not None:
                    known[attribute] = int(solved)
                    self._derived[attribute] = e
                    break
        return value

    def valuation(self, count: Counter) -> Callable[[Expression], Number]:
        """What an expression is when `count` counts the kept channels."""
        value = self._valuation(count, self._constraints)
        return lambda expression: evaluated(expression, value)

    def values(self, count: Counter) -> dict[Attribute, int]:
        """What the repaired attributes must be when `count` counts the kept channels.

        Raises:
            PlanError: some int of the forward would be wrong all the same.
        """
        value = self._valuation(count, self._constraints)
        for e in self._constraints:
            if not e.is_literal and not self._holds(e, count, value):
                raise PlanError(
                    f"{e.expression} would be {evaluated(e.expression, value)} where {count(e.axis)} channels are "
                    f"left, at {e.where}. Remove other channels, or name the layer in ignore=."
                )
        for c in self._comparisons:
            if not self._holds(c, count, value):
                raise PlanError(
                    f"{c.left} {c.symbol} {c.right} is {c.outcome} now and would not be afterwards, at {c.where}. "
                    "Remove fewer channels, or name the layer in ignore=."
                )
        for i in self._channels.invariants:
            if not self._holds(i, count, value):
                raise PlanError(f"{i.expression} would change, at {i.where}. Name the layer in ignore=.")
        changed = {a: int(value(a)) for a in {*self._attributes, *self._derived}}
        return {a: new for a, new in changed.items() if new != self._read(a)}

    def _holds(
        self,
        check: SizeConstraint | Invariant | Comparison,
        count: Counter,
        value: Callable[[Dim | Attribute], Number],
    ) -> bool:
        if isinstance(check, SizeConstraint):
            return evaluated(check.expression, value) == count(check.axis)
        if isinstance(check, Invariant):
            return evaluated(check.expression, value) == evaluated(check.expression, self._before)
        left, right = evaluated(check.left, value), evaluated(check.right, value)
        return not (isnan(left) or isnan(right)) and bool(check.function(left, right)) == check.outcome

    def _before(self, leaf: Dim | Attribute) -> Number:
        return self._row(leaf).size if isinstance(leaf, Dim) else self._read(leaf)

    # -- mending -------------------------------------------------------------------------------------------------

    def _mend(self, failures: list[SizeConstraint | Invariant | Comparison]) -> None:
        """Tie what can be tied; only where nothing more can, pin: first sizes, then what Python compared."""
        expected = [failure for failure in failures if isinstance(failure, SizeConstraint)]
        for rank in sorted({_involved(e.expression) for e in expected}):
            tied = [self._try_tie(e) for e in expected if _involved(e.expression) == rank]
            if any(tied):
                return
        for e in expected:
            self._pin(e.expression, e.where)
            self._relations.pin(e.axis, f"{e.expression} counts it at {e.where} and cannot follow")
        numbers = [failure for failure in failures if isinstance(failure, Invariant)]
        for number in numbers:
            self._pin(number.expression, number.where)
        if expected or numbers:
            return
        for failure in failures:
            if isinstance(failure, Comparison) and not self._bound(failure):
                self._pin(failure.left, failure.where)
                self._pin(failure.right, failure.where)

    def _bound(self, c: Comparison) -> bool:
        """Make a comparison keep its outcome by keeping enough channels of the one axis that it counts.

        ``if repeats == 1: return x``, with 4 repeats, stays false while 2 are left.
        """
        counted = {*leaves(c.left), *leaves(c.right)}
        if c in self._bounded or len(counted) != 1:
            return False
        self._bounded.add(c)
        (leaf,) = counted
        axis = self._row(leaf) if isinstance(leaf, Dim) else self._attributes.get(leaf)
        if axis is None or not axis.free or axis.size != self._before(leaf):
            return False

        least = c.fewest(axis.size)
        if not 1 < least < axis.size:
            return False
        self._relations.bounds.append(Bound(axis, f"the comparison of its number at {c.where}", least))
        return True

    def _try_tie(self, e: SizeConstraint) -> bool:
        key = (e.expression, e.axis.key if e.axis.free else e.axis.size, e.node)
        if key in self._attempted:
            return False
        self._attempted.add(key)
        self._where = e.where
        return self._tie(e.expression, e.axis, e.node)

    def _pin(self, expression: Expression, where: str) -> None:
        for leaf in leaves(expression):
            axis = self._row(leaf) if isinstance(leaf, Dim) else self._attributes.get(leaf)
            if axis is not None:
                self._relations.pin(axis, f"the number of its channels is used at {where}, where it cannot change")

    def _tie(self, expression: Expression, axis: Axis, node: int) -> bool:
        """Make `expression` equal the number of channels of `axis` by tying channels; whether that was possible."""
        if isinstance(expression, (Dim, Attribute)):
            counted = self._row(expression) if isinstance(expression, Dim) else self._attributes.get(expression)
            if counted is None and isinstance(expression, Attribute) and axis.free:
                return self._adopt(expression, axis, node)
            if counted is None or counted.size != axis.size:
                return False
            self._relations.same(counted, axis)
            return True
        if not isinstance(expression, Arithmetic) or expression.right is None:
            return False
        left, right = expression.left, expression.right
        if expression.symbol == "//":
            whole = self._whole(left, axis, right)
            if whole is not None:
                return self._tie(left, whole, node)
            factor = self._factor(right)
            if factor is None or self._size(left) != axis.size * factor.size:
                return False
            return self._tie(left, self._relations.merged(self._ordered(factor, axis, node)), node)
        if expression.symbol == "*":
            a, b = self._size(left), self._size(right)
            if a * b != axis.size:
                return False
            outer, inner = self._relations.split(axis, (int(a), int(b)))
            return all(
                (isinstance(part, Constant) and self._hold(piece)) or self._tie(part, piece, node)
                for part, piece in ((left, outer), (right, inner))
            )
        return False

    def _whole(self, counted: Expression, axis: Axis, divisor: Expression) -> Axis | None:
        """The channels `counted`, if a literal divides their number into pieces numbered by `axis`: its length is held.

        ``reshape(b, n, c // 32, 32)``: the second 32 could be rewritten, the first cannot, so heads go whole.
        """
        whole = self._row(counted) if isinstance(counted, Dim) else None
        if whole is None or not whole.free or not axis.free or not isinstance(divisor, Constant):
            return None
        mine = self._components.of(whole)
        for product in self._relations.products:
            others = [factor for factor in product.factors if factor.key != axis.key]
            fits = len(others) < len(product.factors) and product.cells.free
            if fits and np.array_equal(self._components.of(product.cells), mine):
                for factor in others:
                    self._hold(factor)
                return product.cells
        return None

    def _adopt(self, attribute: Attribute, axis: Axis, node: int) -> bool:
        """From now on the attribute, which stands in expressions only, is what counts `axis`."""
        if self._read(attribute) != axis.size:
            return False
        self._constraints.append(SizeConstraint(attribute, axis, node, self._where))
        self._attributes[attribute] = axis
        return True

    def _hold(self, axis: Axis) -> bool:
        self._relations.pin(axis, "a literal counts it")
        return True

    def _size(self, expression: Expression) -> Number:
        return evaluated(expression, self._before)

    def _factor(self, expression: Expression) -> Axis | None:
        if isinstance(expression, Dim):
            return self._row(expression)
        if isinstance(expression, Attribute):
            found = self._attributes.get(expression)
            return found if found is not None else Axis(int(self._read(expression)), pin="an attribute counts it")
        if isinstance(expression, Constant):
            return Axis(int(expression.value), pin="a literal counts it")
        return None

    def _ordered(self, factor: Axis, axis: Axis, node: int) -> list[Axis]:
        """The two as they stand in the tensor that `node` makes; the divisor first if that does not show it."""
        made = self._channels.axes[node]
        keys = [part.key for part in made if isinstance(part, Axis) and part.free] if isinstance(made, tuple) else []
        if axis.free and factor.free and axis.key in keys and factor.key in keys:
            return [factor, axis] if keys.index(factor.key) < keys.index(axis.key) else [axis, factor]
        return [factor, axis]


def _involved(expression: Expression) -> int:
    """How little a tie made from this expression says about the order of channels: plain sizes come first."""
    if not isinstance(expression, Arithmetic):
        return 0
    return 1 if expression.symbol == "//" else 2
