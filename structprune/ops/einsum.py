"""``einsum``, its equation read once: a label for each dimension.

"bhid,bhjd->bhij"        labels (b h i d), (b h j d), result (b h i j); d is summed away
"...i,ij->...j"          an ellipsis of two dimensions stands for the labels .1 and .0, counted from the right
"ij,jk"                  without an arrow: the letters that occur once, in alphabetical order, so (i k)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from torch import fx

from structprune.ops.arguments import tensors
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import AxesOf, Contraction, Count, Pair, Result, Scaling, register_op
from structprune.ops.relations import UNIT, Axes, Axis
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


def read(equation: str, ranks: Sequence[int]) -> Equation:
    """The equation of operands with `ranks` dimensions."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = tuple(_labels(term, rank) for term, rank in zip(inputs.split(","), ranks, strict=True))
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


def _text(given: Sequence[Any]) -> str:
    """The equation of a call as a text; subscripts may be lists: ``einsum(x, [0, 1], y, [1, 2], [0, 2])``.

    Numbers stand for letters in order, capitals first.

    Example:
        >>> _text([None, [0, 1], None, [1, ...], [0, ...]])
        'AB,B...->A...'
    """
    if isinstance(given[0], str):
        return given[0]
    lists = [
        "".join("..." if x is ... else _LETTERS[int(x)] for x in entry) for entry in given if _is_subscripts(entry)
    ]
    operands = len(given) - len(lists)
    return ",".join(lists[:operands]) + ("->" + lists[-1] if len(lists) > operands else "")


_LETTERS = ascii_uppercase + ascii_lowercase


def _is_subscripts(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(x is ... or isinstance(x, int) for x in value)


def equation_of(node: fx.Node) -> Equation:
    """The equation of a recorded call of ``einsum``."""
    return read(_text(node.args), [len(tensor.meta["shape"]) for tensor in tensors(node)])


def product_zeros(z: ZeroContext, equation: Equation, operands: Sequence[fx.Node], every: bool = False) -> Zeros:
    """Zeros of a product of `operands`: labels that are summed over must be zero in one of the factors.

    With `every`, what is summed are no products alone: it must be zero in all of them.
    """
    zero: dict[str, bool] = {}
    whole: dict[str, bool] = {}
    places: dict[str, list[tuple[fx.Node, int]]] = {}
    for term, tensor in zip(equation.terms, operands, strict=True):
        for dim, (label, axis, off) in enumerate(zip(term, z.axes_of(tensor), z.of(tensor), strict=True)):
            off = off and axis.size > 1
            zero[label] = zero.get(label, False) or off
            whole[label] = whole.get(label, True) and off
            places.setdefault(label, []).append((tensor, dim))
    for label in equation.summed:
        if not (whole if every else zero)[label]:
            for tensor, dim in places[label]:
                z.summed(tensor, dim)
    return tuple(zero.get(label, False) for label in equation.result)


def product_macs(equation: Equation, operands: Sequence[fx.Node], axes: AxesOf, count: Count) -> int:
    """One multiplication for each combination of the labels' values; none where there is a single factor."""
    if len(operands) < 2:
        return 0
    sizes: dict[str, Axis] = {}
    for term, tensor in zip(equation.terms, operands, strict=True):
        for label, axis in zip(term, axes(tensor), strict=True):
            if label not in sizes or sizes[label].size == 1:
                sizes[label] = axis
    return prod(count(axis) for axis in sizes.values())


def product_rows(c: Context, equation: Equation, operands: Sequence[Operand]) -> Axes:
    """Dimensions with the same label are the same channels; a single entry goes with any number of them."""
    by_label: dict[str, Axis] = {}
    for term, operand in zip(equation.terms, operands, strict=True):
        for label, axis in zip(term, operand.axes, strict=True):
            known = by_label.get(label, UNIT)
            by_label[label] = axis if known.size == 1 else known if axis.size == 1 else c.same(known, axis)
    return tuple(by_label.get(label, UNIT) for label in equation.result)


def _pairs(node: fx.Node) -> Iterator[Pair]:
    """Labels that two operands have and the result lacks."""
    equation = equation_of(node)
    if len(equation.terms) != 2 or any(len(set(term)) < len(term) for term in equation.terms):
        return
    left, right = equation.terms
    for label in left:
        if label in right and label not in equation.result:
            at, there = left.index(label) - len(left), right.index(label) - len(right)
            yield Pair(0, at, 1, there)
            yield Pair(1, there, 0, at)


@register_op(
    "python.einsum",
    zeros=lambda z: product_zeros(z, equation_of(z.node), z.tensors),
    macs=lambda node, axes, count: product_macs(equation_of(node), tensors(node), axes, count),
    contraction=Contraction("einsum", _pairs),
    scaling=Scaling.CONTRACTION,
)
def einsum(c: Context, *arguments: Any) -> Result:
    """Dimensions with the same label are the same channels."""
    return product_rows(c, equation_of(c.node), list(operands_in(arguments)))
