"""Which ints of a forward follow its channels, and what must change for the others.

Every int that a call takes as a size is an `Expectation`: it must equal the number of living channels of a row. Sizes
read from tensors follow by themselves; attributes are repaired; literals are rewritten. What can do none of this is
made true by tying channels together or, at last, by pinning them. Whether an expression holds is decided by trial:
random channels are removed and both sides are counted, until all hold. So planning knows before surgery.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import isnan, nan

from structprune.channels.propagate import Channels, Invariant
from structprune.channels.sections import Sections
from structprune.channels.solver import Components
from structprune.channels.trials import Counter, trials
from structprune.errors import PlanError
from structprune.ops.relations import Expectation, Row
from structprune.tracing.provenance import (
    Arithmetic,
    Attribute,
    Comparison,
    Constant,
    Dim,
    Expression,
    Literal,
    evaluate,
    leaves,
    literals,
)

Number = float
_ROUNDS = 100  # of mending, after which what fails is pinned


@dataclass(frozen=True, slots=True)
class Sizes:
    """What must change with the channels.

    Attributes:
        attributes: the row that each repaired attribute counts.
        literals: expectations whose int is a literal and must be rewritten.
        derived: attributes that follow from others: the expectation to be solved for them.
    """

    attributes: dict[Attribute, Row]
    literals: list[Expectation]
    derived: dict[Attribute, Expectation]


class SizeSolver:
    """Makes every int of a trace follow the channels, by repair, by tying or by pinning.

    Args:
        channels: rows and relations; ties and pins are added to its relations.
        comparisons: what Python compared.
        read: value of an attribute of the model.
        rewritable: whether a literal in the arguments of this node can be rewritten.
        described: the row that an attribute of a standard layer counts, if it describes the layer's own shape.
    """

    def __init__(
        self,
        channels: Channels,
        comparisons: tuple[Comparison, ...],
        read: Callable[[Attribute], int],
        rewritable: Callable[[int], bool],
        described: Callable[[Attribute], Row | None],
    ) -> None:
        self._channels = channels
        self._relations = channels.relations
        self._comparisons = [c for c in comparisons if any(True for x in (c.left, c.right) for _ in leaves(x))]
        self._read = read
        self._rewritable = rewritable
        self._described = described
        self._expectations = [*channels.relations.expectations, *self._promised()]
        self._attempted: set[tuple[object, ...]] = set()
        held = (row for number in channels.held for row in channels.rows[number])
        self._sections = Sections(self._relations, channels.every_row(), held)

    def _row(self, leaf: Dim) -> Row:
        return self._channels.rows[leaf.node][leaf.dim]

    def _promised(self) -> list[Expectation]:
        """Comparisons that found two numbers equal, one of them a size: after pruning they must be equal still."""
        found: list[Expectation] = []
        for c in self._comparisons:
            if (c.symbol, c.outcome) not in (("==", True), ("!=", False)):
                continue
            for size, other in ((c.left, c.right), (c.right, c.left)):
                if isinstance(size, Dim) and self._row(size).free:
                    found.append(Expectation(other, self._row(size), size.node, c.where))
                    break
        return found

    # -- the loop ------------------------------------------------------------------------------------------------

    def solve(self) -> tuple[Components, Sizes]:
        """Components of channels whose removal leaves every int right, and what to change."""
        before, rounds = None, 0
        while True:
            components = Components(self._relations)
            balances = self._sections.settle(components)
            if balances is None:
                continue
            components.balances = balances
            self._attributes = self._attribute_rows(components)
            self._derived: dict[Attribute, Expectation] = {}
            failures = self._failures(components)
            if not failures:
                break
            self._mend(failures)
            # Each round must join or pin something, or try a tie that was not tried yet.
            now, rounds = (components.count, int(components.pinned.sum()), len(self._attempted)), rounds + 1
            if now == before or rounds > _ROUNDS:
                if not components.roots.any():
                    break  # nothing may go, so no int changes
                self._pin_unsettled(failures[0].where)
            before = now
        moving = {a: row for a, row in self._attributes.items() if self._moves(components, row)}
        literal = [e for e in self._expectations if _is_literal(e) and self._moves(components, e.row)]
        return components, Sizes(moving, literal, self._derived)

    def _pin_unsettled(self, where: str) -> None:
        """The ints that fail neither follow nor stand still with their rows: then nothing that is counted may go."""
        for row in self._channels.every_row():
            self._relations.pin(row, f"sizes that contradict each other are used at {where}")

    def _moves(self, components: Components, row: Row) -> bool:
        return row.free and not bool(components.pinned[components.of(row)].all())

    def _attribute_rows(self, components: Components) -> dict[Attribute, Row]:
        """Attributes that stand alone as a size: each counts a row."""
        found: dict[Attribute, Row] = {}
        for e in self._expectations:
            if isinstance(e.expression, Attribute):
                known = found.get(e.expression)
                if known is None or (not self._moves(components, known) and self._moves(components, e.row)):
                    found[e.expression] = e.row
        for attribute in self._mentioned() - found.keys():
            row = self._described(attribute)
            if row is not None and self._moves(components, row):
                found[attribute] = row
        return found

    def _mentioned(self) -> set[Attribute]:
        """The attributes that any number of the forward was computed from."""
        numbers = [e.expression for e in self._expectations]
        numbers += [side for c in self._comparisons for side in (c.left, c.right)]
        numbers += [i.expression for i in self._channels.invariants]
        numbers += [scale.expression for scale in self._relations.scales]
        return {leaf for number in numbers for leaf in leaves(number) if isinstance(leaf, Attribute)}

    def _failures(self, components: Components) -> list[Expectation | Invariant | Comparison]:
        failed: dict[int, Expectation | Invariant | Comparison] = {}
        relevant = [e for e in self._expectations if self._matters(components, e)]
        checks = [i for i in self._channels.invariants if self._touched(components, i.expression)]
        compared = [c for c in self._comparisons if any(self._touched(components, x) for x in (c.left, c.right))]
        rows = [e.row for e in relevant if e.row.free]
        for dead in trials(components, rows, self._relations):
            count = Counter(components, components.closure(dead))
            value = self._valuation(count, relevant)
            for check in [*relevant, *checks, *compared]:
                if id(check) not in failed and not self._holds(check, count, value):
                    failed[id(check)] = check
        return list(failed.values())

    def _matters(self, components: Components, e: Expectation) -> bool:
        if any(isinstance(leaf, Attribute) for leaf in leaves(e.expression)):
            return True  # an attribute may change for another layer's sake
        if not self._moves(components, e.row):
            return self._touched(components, e.expression)
        return not (_is_literal(e) and self._rewritable(e.node))

    def _touched(self, components: Components, expression: Expression) -> bool:
        for leaf in leaves(expression):
            row = self._row(leaf) if isinstance(leaf, Dim) else self._attributes.get(leaf)
            if row is not None and self._moves(components, row):
                return True
        return False

    def _valuation(self, count: Counter, expectations: list[Expectation]) -> Callable[[Dim | Attribute], Number]:
        known = {attribute: count(row) for attribute, row in self._attributes.items()}

        def value(leaf: Dim | Attribute) -> Number:
            if isinstance(leaf, Dim):
                return count(self._row(leaf))
            return known[leaf] if leaf in known else self._read(leaf)

        for e in expectations:
            unknown = [leaf for leaf in leaves(e.expression) if isinstance(leaf, Attribute) and leaf not in known]
            if not unknown or _evaluated(e.expression, value) == count(e.row):
                continue
            for attribute in unknown:
                solved = inverse(e.expression, attribute, count(e.row), value)
                if solved is not None:
                    known[attribute] = int(solved)
                    self._derived[attribute] = e
                    break
        return value

    def valuation(self, count: Counter) -> Callable[[Expression], Number]:
        """What an expression is when `count` counts the living channels."""
        value = self._valuation(count, self._expectations)
        return lambda expression: _evaluated(expression, value)

    def values(self, count: Counter) -> dict[Attribute, int]:
        """What the repaired attributes must be when `count` counts the living channels.

        Raises:
            PlanError: some int of the forward would be wrong all the same.
        """
        value = self._valuation(count, self._expectations)
        for e in self._expectations:
            if not _is_literal(e) and not self._holds(e, count, value):
                raise PlanError(
                    f"{e.expression} would be {_evaluated(e.expression, value)} where {count(e.row)} channels are "
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
        check: Expectation | Invariant | Comparison,
        count: Counter,
        value: Callable[[Dim | Attribute], Number],
    ) -> bool:
        if isinstance(check, Expectation):
            return _evaluated(check.expression, value) == count(check.row)
        if isinstance(check, Invariant):
            return _evaluated(check.expression, value) == _evaluated(check.expression, self._before)
        left, right = _evaluated(check.left, value), _evaluated(check.right, value)
        return not (isnan(left) or isnan(right)) and bool(check.function(left, right)) == check.outcome

    def _before(self, leaf: Dim | Attribute) -> Number:
        return self._row(leaf).size if isinstance(leaf, Dim) else self._read(leaf)

    # -- mending -------------------------------------------------------------------------------------------------

    def _mend(self, failures: list[Expectation | Invariant | Comparison]) -> None:
        """Tie what can be tied; only where nothing more can, pin: first sizes, then what Python compared."""
        expected = [failure for failure in failures if isinstance(failure, Expectation)]
        for rank in sorted({_involved(e.expression) for e in expected}):
            tied = [self._try_tie(e) for e in expected if _involved(e.expression) == rank]
            if any(tied):
                return
        for e in expected:
            self._pin(e.expression, e.where)
            self._relations.pin(e.row, f"{e.expression} counts it at {e.where} and cannot follow")
        numbers = [failure for failure in failures if isinstance(failure, Invariant)]
        for number in numbers:
            self._pin(number.expression, number.where)
        if expected or numbers:
            return
        for failure in failures:
            if isinstance(failure, Comparison):
                self._pin(failure.left, failure.where)
                self._pin(failure.right, failure.where)

    def _try_tie(self, e: Expectation) -> bool:
        key = (e.expression, e.row.key if e.row.free else e.row.size, e.node)
        if key in self._attempted:
            return False
        self._attempted.add(key)
        self._where = e.where
        return self._tie(e.expression, e.row, e.node)

    def _pin(self, expression: Expression, where: str) -> None:
        for leaf in leaves(expression):
            row = self._row(leaf) if isinstance(leaf, Dim) else self._attributes.get(leaf)
            if row is not None:
                self._relations.pin(row, f"the number of its channels is used at {where}, where it cannot change")

    def _tie(self, expression: Expression, row: Row, node: int) -> bool:
        """Make `expression` equal the number of channels of `row` by tying channels; whether that was possible."""
        if isinstance(expression, (Dim, Attribute)):
            counted = self._row(expression) if isinstance(expression, Dim) else self._attributes.get(expression)
            if counted is None and isinstance(expression, Attribute) and row.free:
                return self._adopt(expression, row, node)
            if counted is None or counted.size != row.size:
                return False
            self._relations.same(counted, row)
            return True
        if not isinstance(expression, Arithmetic) or expression.right is None:
            return False
        left, right = expression.left, expression.right
        if expression.symbol == "//":
            factor = self._factor(right)
            if factor is None or self._size(left) != row.size * factor.size:
                return False
            return self._tie(left, self._relations.merged(self._ordered(factor, row, node)), node)
        if expression.symbol == "*":
            a, b = self._size(left), self._size(right)
            if a * b != row.size:
                return False
            outer, inner = self._relations.split(row, (int(a), int(b)))
            return all(
                (isinstance(part, Constant) and self._hold(piece)) or self._tie(part, piece, node)
                for part, piece in ((left, outer), (right, inner))
            )
        return False

    def _adopt(self, attribute: Attribute, row: Row, node: int) -> bool:
        """From now on the attribute, which stands in expressions only, is what counts `row`."""
        if self._read(attribute) != row.size:
            return False
        self._expectations.append(Expectation(attribute, row, node, self._where))
        self._attributes[attribute] = row
        return True

    def _hold(self, row: Row) -> bool:
        self._relations.pin(row, "a literal counts it")
        return True

    def _size(self, expression: Expression) -> Number:
        return _evaluated(expression, self._before)

    def _factor(self, expression: Expression) -> Row | None:
        if isinstance(expression, Dim):
            return self._row(expression)
        if isinstance(expression, Attribute):
            found = self._attributes.get(expression)
            return found if found is not None else Row(int(self._read(expression)), pin="an attribute counts it")
        if isinstance(expression, Constant):
            return Row(int(expression.value), pin="a literal counts it")
        return None

    def _ordered(self, factor: Row, row: Row, node: int) -> list[Row]:
        """The two as they stand in the tensor that `node` makes; the divisor first if that does not show it."""
        made = self._channels.rows[node]
        keys = [part.key for part in made if isinstance(part, Row) and part.free] if isinstance(made, tuple) else []
        if row.free and factor.free and row.key in keys and factor.key in keys:
            return [factor, row] if keys.index(factor.key) < keys.index(row.key) else [row, factor]
        return [factor, row]


def _evaluated(expression: Expression, value: Callable[[Dim | Attribute], Number]) -> Number:
    """Value of `expression`, or NaN, which equals nothing, where it has none: a quotient by 0, say."""
    try:
        found = evaluate(expression, value)
    except (ZeroDivisionError, OverflowError, ValueError):
        return nan
    return found if isinstance(found, (int, float)) else nan  # a root of a negative number is complex


def _is_literal(e: Expectation) -> bool:
    """Whether the size is a literal in the call, and nothing else."""
    return not any(True for _ in leaves(e.expression)) and sum(1 for _ in literals(e.expression)) == 1


def literal_for(expression: Expression, target: Number) -> Number:
    """The value of the literal in `expression`, which holds nothing else, for which it equals `target`."""
    if isinstance(expression, Arithmetic) and expression.symbol == "-" and expression.right is None:
        return literal_for(expression.left, -target)
    assert isinstance(expression, Literal), f"{expression} is not a literal"
    return target


def _involved(expression: Expression) -> int:
    """How little a tie made from this expression says about the order of channels: plain sizes come first."""
    if not isinstance(expression, Arithmetic):
        return 0
    return 1 if expression.symbol == "//" else 2


def inverse(
    expression: Expression, unknown: Attribute, target: Number, value: Callable[[Dim | Attribute], Number]
) -> Number | None:
    """The value of the attribute `unknown` for which `expression` equals `target`; None where there is no formula."""
    if expression == unknown:
        return target
    if not isinstance(expression, Arithmetic) or expression.right is None:
        return None
    in_left = unknown in set(leaves(expression.left))
    if in_left and unknown in set(leaves(expression.right)):
        return None
    known = _evaluated(expression.right if in_left else expression.left, value)
    if isnan(known):
        return None
    undo: dict[str, Callable[[Number, Number], Number]] = {"+": operator.sub, "*": operator.floordiv}
    if in_left:
        undo |= {"-": operator.add, "//": operator.mul}
    if expression.symbol not in undo or (expression.symbol == "*" and (not known or target % known)):
        return None
    return inverse(
        expression.left if in_left else expression.right, unknown, undo[expression.symbol](target, known), value
    )
