"""What each int of a forward is once channels are removed, and whether it is what the forward needs.

Every int that a call takes as a size is a `SizeConstraint`: it must equal the number of kept channels of an axis. Sizes
read from tensors follow by themselves; attributes are set anew; literals are rewritten. What can do none of this is
made true by tying channels together or, at last, by pinning them (`coupling/size_solver.py`).

Example: ``q(x).view(2, 5, self.heads, self.width // self.heads)`` with 32 channels in 4 heads of 8 channels.
    In: the constraints "heads counts the axis of heads" (4) and "width // heads counts the axis of sizes" (8).
    With a head removed, 3 and 8 are counted. The attribute that stands alone becomes 3; the expression, solved for the
    one that does not, gives width = 24. All hold, so out come {heads: 3, width: 24}.
    Were ``self.width`` the literal 32, then 32 // 3 = 10 is not 8: the constraint fails, and the channels are pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isnan

from structprune.coupling.propagate import Channels, Invariant
from structprune.coupling.random_removals import Counter, trials
from structprune.coupling.solve import Components
from structprune.errors import PlanError
from structprune.ops.relations import Axis, SizeConstraint
from structprune.tracing.provenance import (
    Attribute,
    Comparison,
    Dim,
    Expression,
    evaluated,
    inverse,
    leaves,
)

Number = float
Check = SizeConstraint | Invariant | Comparison


@dataclass(frozen=True, slots=True)
class Valuation:
    """The values of sizes and attributes at some widths.

    Attributes:
        leaf: the value of a single size or attribute.
        solved: the attributes that stand in expressions only, and were solved for.
    """

    leaf: Callable[[Dim | Attribute], Number]
    solved: tuple[Attribute, ...]

    def __call__(self, expression: Expression) -> Number:
        """Value of a whole expression; not a number where it divides by zero."""
        return evaluated(expression, self.leaf)


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """The ints of a forward for one solution of its channels.

    Attributes:
        channels: axes and relations of the trace.
        components: which channels go together.
        constraints: the ints that must equal a number of channels.
        comparisons: what Python compared; the outcome must stay.
        attributes: the axis whose channels each attribute counts.
    read: the value that an attribute of the model has now.
    """

    channels: Channels
    components: Components
    constraints: tuple[SizeConstraint, ...]
    comparisons: tuple[Comparison, ...]
    attributes: dict[Attribute, Axis]
    read: Callable[[Attribute], int] = field(repr=False)

    @property
    def literals(self) -> list[SizeConstraint]:
        """Constraints whose int is a literal and must be rewritten."""
        return [e for e in self.constraints if e.is_literal and self.moves(e.axis)]

    def moves(self, axis: Axis) -> bool:
        """Whether channels of `axis` may be removed."""
        return moves(self.components, axis)

    def axis_of(self, leaf: Dim | Attribute) -> Axis | None:
        """The axis whose channels a size or an attribute counts."""
        return self.channels.axes[leaf.node][leaf.dim] if isinstance(leaf, Dim) else self.attributes.get(leaf)

    def depends(self, expression: Expression) -> bool:
        """Whether anything in `expression` changes when channels are removed."""
        axes = (self.axis_of(leaf) for leaf in leaves(expression))
        return any(axis is not None and self.moves(axis) for axis in axes)

    def now(self, leaf: Dim | Attribute) -> Number:
        """The value of a size or an attribute before anything is removed."""
        return self.channels.axes[leaf.node][leaf.dim].size if isinstance(leaf, Dim) else self.read(leaf)

    # -- at other widths -----------------------------------------------------------------------------------------

    def valuation(self, count: Counter, constraints: Sequence[SizeConstraint] | None = None) -> Valuation:
        """What sizes and attributes are when `count` counts the kept channels.

        Attributes that count an axis are counted. Others are solved for, one after the other, in `constraints` (all of
        them by default) that would not hold with their present value.
        """
        known: dict[Attribute, Number] = {attribute: count(axis) for attribute, axis in self.attributes.items()}
        solved: list[Attribute] = []

        def value(leaf: Dim | Attribute) -> Number:
            if isinstance(leaf, Dim):
                return count(self.channels.axes[leaf.node][leaf.dim])
            return known[leaf] if leaf in known else self.read(leaf)

        for e in self.constraints if constraints is None else constraints:
            unknown = [leaf for leaf in leaves(e.expression) if isinstance(leaf, Attribute) and leaf not in known]
            if not unknown or evaluated(e.expression, value) == count(e.axis):
                continue
            for attribute in unknown:
                solution = inverse(e.expression, attribute, count(e.axis), value)
                if solution is not None:
                    known[attribute] = int(solution)
                    solved.append(attribute)
                    break
        return Valuation(value, tuple(solved))

    def holds(self, check: Check, count: Counter, value: Valuation) -> bool:
        """Whether a number is right at the widths that `count` counts."""
        if isinstance(check, SizeConstraint):
            return value(check.expression) == count(check.axis)
        if isinstance(check, Invariant):
            return value(check.expression) == evaluated(check.expression, self.now)
        left, right = value(check.left), value(check.right)
        return not (isnan(left) or isnan(right)) and bool(check.function(left, right)) == check.outcome

    def failures(self, rewritable: Callable[[int], bool]) -> list[Check]:
        """The numbers that are wrong after one of several random removals.

        Args:
            rewritable: whether a literal in the arguments of a node can be rewritten.
        """
        constraints = [e for e in self.constraints if self._matters(e, rewritable)]
        checks: list[Check] = [*constraints]
        checks += [i for i in self.channels.invariants if self.depends(i.expression)]
        checks += [c for c in self.comparisons if self.depends(c.left) or self.depends(c.right)]
        failed: dict[int, Check] = {}
        axes = [e.axis for e in constraints if e.axis.free]
        for removed in trials(self.components, axes, self.channels.relations):
            count = Counter(self.components, self.components.closure(removed))
            value = self.valuation(count, constraints)
            for check in checks:
                if id(check) not in failed and not self.holds(check, count, value):
                    failed[id(check)] = check
        return list(failed.values())

    def _matters(self, e: SizeConstraint, rewritable: Callable[[int], bool]) -> bool:
        if any(isinstance(leaf, Attribute) for leaf in leaves(e.expression)):
            return True  # an attribute may change because another layer needs it
        if not self.moves(e.axis):
            return self.depends(e.expression)
        return not (e.is_literal and rewritable(e.node))

    def values(self, count: Counter) -> dict[Attribute, int]:
        """What the attributes that change must be when `count` counts the kept channels.

        Raises:
            PlanError: some int of the forward would still be wrong.
        """
        value = self.valuation(count)
        for e in self.constraints:
            if not e.is_literal and not self.holds(e, count, value):
                raise PlanError(
                    f"{e.expression} would be {value(e.expression)} where {count(e.axis)} channels are "
                    f"left, at {e.where}. Remove other channels, or name the layer in ignore=."
                )
        for c in self.comparisons:
            if not self.holds(c, count, value):
                raise PlanError(
                    f"{c.left} {c.symbol} {c.right} is {c.outcome} now and would not be afterwards, at {c.where}. "
                    "Remove fewer channels, or name the layer in ignore=."
                )
        for i in self.channels.invariants:
            if not self.holds(i, count, value):
                raise PlanError(f"{i.expression} would change, at {i.where}. Name the layer in ignore=.")
        changed = {a: int(value.leaf(a)) for a in (*self.attributes, *value.solved)}
        return {a: new for a, new in changed.items() if new != self.read(a)}


def moves(components: Components, axis: Axis) -> bool:
    """Whether channels of `axis` may be removed."""
    return axis.free and not bool(components.pinned[components.of(axis)].all())
