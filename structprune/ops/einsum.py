"""``einsum``, its equation read once: a label for each dimension.

"bhid,bhjd->bhij"        labels (b h i d), (b h j d), result (b h i j); d is summed away
"...i,ij->...j"          an ellipsis of two dimensions stands for the labels .1 and .0, counted from the right
"ij,jk"                  without an arrow: the letters that occur once, in alphabetical order, so (i k)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from structprune.ops.arguments import tensors
from structprune.ops.context import Context, operands_in
from structprune.ops.op import Contraction, Count, Pair, Result, RowsOf, Scaling, register_op
from structprune.ops.relations import UNIT, Row
from structprune.ops.zeros import ZeroContext, Zeros

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Equation:
    """Which dimensions are the same.

    Attributes:
        terms: a label for each dimension of each operand.
        result: a label for each dimension of the result.
    """

    terms: tuple[Labels, ...]
    result: Labels

    @property
    def summed(self) -> frozenset[str]:
        """The labels that are summed away."""
        return frozenset(label for term in self.terms for label in term) - frozenset(self.result)


def read(equation: Any, ranks: Sequence[int]) -> Equation | None:
    """The equation of operands with `ranks` dimensions; None if it is not given as a text."""
    if not isinstance(equation, str):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    written = inputs.split(",")
    if len(written) != len(ranks):
        return None
    terms = tuple(_labels(term, rank) for term, rank in zip(written, ranks, strict=True))
    dots = max((sum(label.startswith(".") for label in term) for term in terms), default=0)
    if not arrow:
        letters = inputs.replace(",", "").replace("...", "")
        output = "..." * ("..." in inputs) + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    named = output.replace("...", "")
    return Equation(terms, _labels(output, len(named) + (dots if "..." in output else 0)))


def _labels(term: str, rank: int) -> Labels:
    """``"a...b"`` of a tensor with four dimensions: a, .1, .0, b."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    return (*before, *(f".{back}" for back in reversed(range(hidden if dots else 0))), *after)


def _of(node: fx.Node, ranks: Sequence[int]) -> Equation | None:
    """The equation of a recorded call."""
    return read(node.args[0] if node.args else node.kwargs.get("equation"), ranks)


def _zeros(z: ZeroContext) -> Zeros:
    """A product: labels that are summed over must be zero in one of the factors."""
    operands = z.tensors
    equation = _of(z.node, [len(z.rows_of(tensor)) for tensor in operands])
    if equation is None:
        return (False,) * len(z.rows)
    zero: dict[str, bool] = {}
    size: dict[str, int] = {}
    places: dict[str, list[tuple[fx.Node, int]]] = {}
    for term, tensor in zip(equation.terms, operands, strict=True):
        for dim, (label, row, off) in enumerate(zip(term, z.rows_of(tensor), z.of(tensor), strict=True)):
            size[label] = max(size.get(label, 1), row.size)
            zero[label] = zero.get(label, False) or (off and row.size > 1)
            places.setdefault(label, []).append((tensor, dim))
    for label in equation.summed:
        if not zero[label]:
            for tensor, dim in places[label]:
                z.summed(tensor, dim)
    return tuple(zero[label] for label in equation.result)


def _macs(node: fx.Node, rows: RowsOf, count: Count) -> int:
    """One multiplication for each combination of the labels' values."""
    operands = tensors(node)
    equation = _of(node, [len(rows(tensor)) for tensor in operands])
    if equation is None or len(operands) < 2:
        return 0
    sizes: dict[str, Row] = {}
    for term, tensor in zip(equation.terms, operands, strict=True):
        for label, row in zip(term, rows(tensor), strict=True):
            if label not in sizes or sizes[label].size == 1:
                sizes[label] = row
    return prod(count(row) for row in sizes.values())


def _pairs(node: fx.Node) -> Iterator[Pair]:
    """Labels of two operands that the result lacks."""
    operands = tensors(node)
    equation = _of(node, [len(tensor.meta["shape"]) for tensor in operands])
    if equation is None or len(operands) != 2:
        return
    left, right = equation.terms
    for label in left:
        if label in right and label not in equation.result:
            at, there = left.index(label) - len(left), right.index(label) - len(right)
            yield Pair(0, at, 1, there)
            yield Pair(1, there, 0, at)


@register_op(
    "python.einsum",
    zeros=_zeros,
    macs=_macs,
    contraction=Contraction("einsum", _pairs),
    scaling=Scaling.CONTRACTION,
)
def einsum(c: Context, *arguments: Any) -> Result:
    """Dimensions with the same label are the same channels."""
    operands = list(operands_in(arguments))
    equation = read(arguments[0], [len(operand.rows) for operand in operands])
    if equation is None:
        return c.pin_all(operands, f"{c.where()} gives its subscripts as lists")
    axes: dict[str, Row] = {}
    for term, operand in zip(equation.terms, operands, strict=True):
        for label, row in zip(term, operand.rows, strict=True):
            known = axes.get(label, UNIT)
            axes[label] = row if known.size == 1 else known if row.size == 1 else c.same(known, row)
    return tuple(axes[label] for label in equation.result)
