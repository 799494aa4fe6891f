"""Products that are an einsum under another name, and distances, which sum over differences.

Each says its equation for a call; channels, zeros and costs follow from that as they do for ``einsum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from torch import fx

from structprune.ops import zeros
from structprune.ops.along import dims_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import AxesOf, Contraction, Count, Pair, Result, Scaling, register_op
from structprune.ops.relations import UNIT, Axes, Axis
from structprune.ops.zeros import ZeroContext, Zeros
from structprune.tracing.provenance import plain

# -- ``einsum``, its equation read once: a label for each dimension --------------------------------------------------
# "bhid,bhjd->bhij"        labels (b h i d), (b h j d), result (b h i j); d is summed away
# "...i,ij->...j"          an ellipsis of two dimensions stands for the labels .1 and .0, counted from the right
# "ij,jk"                  without an arrow: the letters that occur once, in alphabetical order, so (i k)

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


Ranks = Sequence[int]
EquationOf = Callable[[fx.Node, Ranks], Equation]


def _operands(c: Context, nodes: Iterable[fx.Node]) -> list[Operand]:
    return [Operand(node, c.axes[node.meta["index"]]) for node in nodes]


def _ranks(nodes: Iterable[fx.Node]) -> list[int]:
    return [len(node.meta["shape"]) for node in nodes]


def _product(*names: str, added: bool = False, every: bool = False) -> Callable[[EquationOf], EquationOf]:
    """Register operations that are products by the equation that the decorated function gives for a call.

    Args:
        names: canonical names.
        added: whether the first tensor is added to the product.
        every: whether what is summed over must be zero in all factors.
    """
    first = int(added)

    def equation(node: fx.Node, of: EquationOf) -> Equation:
        return of(node, _ranks(tensors(node)[first:]))

    def register(of: EquationOf) -> EquationOf:
        def zero(z: ZeroContext) -> Zeros:
            result = product_zeros(z, equation(z.node, of), z.tensors[first:], every)
            bias = z.tensors[0]
            return (
                result
                if not added
                else tuple(
                    off and z.whole(bias, d - len(result)) and z.of(bias)[d - len(result)]
                    for d, off in enumerate(result)
                )
            )

        def coupling(c: Context, *_: Any, **__: Any) -> Result:
            """As the equation says; what is added broadcasts."""
            operands = _operands(c, tensors(c.node))
            axes = product_rows(c, equation(c.node, of), operands[first:])
            axes = axes if not added else c.broadcast([Operand(c.node, axes), operands[0]])
            return without_units(axes, c.shape)

        register_op(
            *names, zeros=zero,
            macs=lambda node, axes, count: product_macs(equation(node, of), tensors(node)[first:], axes, count),
        )(coupling)  # fmt: skip
        return of

    return register


def without_units(axes: Axes, shape: Sequence[int]) -> Axes:
    """`axes`, or as many single entries in the place of those that were summed over and kept."""
    return axes if len(axes) == len(shape) else (*axes, *[UNIT] * (len(shape) - len(axes)))


def _named(rank: int, kind: str) -> Labels:
    """A label for each dimension, counted from the end: equal for those that broadcast."""
    return tuple(f"{kind}{back}" for back in reversed(range(rank)))


def _along(node: fx.Node, ranks: Ranks, default: int) -> Equation:
    """Both broadcast, and one dimension is summed over."""
    rank = max(ranks)
    dims = dims_of(node, rank, default=default)
    if dims is None:
        raise ValueError("the dimension is no number")
    labels = _named(rank, ".")
    return Equation(
        tuple(labels[rank - each :] for each in ranks), tuple(x for at, x in enumerate(labels) if at not in dims)
    )


@_product("linalg_vecdot")
def _vecdot(node: fx.Node, ranks: Ranks) -> Equation:
    return _along(node, ranks, -1)


@_product("cosine_similarity", every=True)
def _cosine(node: fx.Node, ranks: Ranks) -> Equation:
    """The norms of both are summed over too."""
    return _along(node, ranks, 1)


@_product("inner")
def _inner(_: fx.Node, ranks: Ranks) -> Equation:
    """The last dimensions are summed over; a number multiplies all."""
    a, b = (_named(rank, side) for rank, side in zip(ranks, "ab", strict=True))
    if not a or not b:
        return Equation((a, b), a + b)
    return Equation(((*a[:-1], "sum"), (*b[:-1], "sum")), a[:-1] + b[:-1])


@_product("outer", "ger")
def _outer(_: fx.Node, ranks: Ranks) -> Equation:
    return Equation((("a",), ("b",)), ("a", "b"))


@_product("addr", added=True)
def _addr(node: fx.Node, ranks: Ranks) -> Equation:
    return _outer(node, ranks)


@_product("addbmm", added=True)
def _addbmm(_: fx.Node, ranks: Ranks) -> Equation:
    """The batch is summed over as well."""
    return Equation((("b", "i", "j"), ("b", "j", "k")), ("i", "k"))


@_product("trace", every=True)
def _trace(_: fx.Node, ranks: Ranks) -> Equation:
    """The sum over the diagonal."""
    return Equation((("i", "i"),), ())


@_product("linalg_multi_dot", "chain_matmul")
def _chain(_: fx.Node, ranks: Ranks) -> Equation:
    """A product of matrices, one after the other; the first and the last may be vectors."""
    terms = [(f"{at}", f"{at + 1}")[rank == 1 and at == 0 :][:rank] for at, rank in enumerate(ranks)]
    return Equation(tuple(terms), terms[0][:-1] + terms[-1][1:])


@_product("python.tensordot")
def _tensordot(node: fx.Node, ranks: Ranks) -> Equation:
    """Sums over the last dimensions of `a` and the first of `b`, or over two lists of dimensions."""
    given = arguments(node)
    dims = plain(given.get("dims", 2))
    if isinstance(dims, int):
        left, right = list(range(ranks[0] - dims, ranks[0])), list(range(dims))
    elif isinstance(dims, (tuple, list)):
        left, right = ([dim] if isinstance(dim, int) else list(dim) for dim in dims)
    else:
        raise ValueError("the dimensions are decided by data")
    a, b = (list(_named(rank, side)) for rank, side in zip(ranks, "ab", strict=True))
    for number, (mine, theirs) in enumerate(zip(left, right, strict=True)):
        a[mine] = b[theirs] = f"sum{number}"
    return Equation((tuple(a), tuple(b)), tuple(x for x in (*a, *b) if not x.startswith("sum")))


def _kronecker_zeros(z: ZeroContext) -> Zeros:
    """An index goes where that of either factor does, so each of them must make it zero."""
    return tuple(
        all(len(z.of(t)) < -back or z.axes_of(t)[back].size == 1 or z.of(t)[back] for t in z.tensors)
        for back in range(-len(z.axes), 0)
    )


@register_op("kron", zeros=_kronecker_zeros)
def kron(c: Context, a: Operand, b: Operand) -> Axes:
    """Each dimension of the result is a product of those of both."""
    rank = max(len(a.axes), len(b.axes))
    left, right = ((*[UNIT] * (rank - len(x.axes)), *x.axes) for x in (a, b))
    return tuple(c.merged([mine, theirs]) for mine, theirs in zip(left, right, strict=True))


@register_op("pairwise_distance")
def pairwise_distance(c: Context, a: Operand, b: Operand, *_: Any, **__: Any) -> Axes:
    """A distance with a constant in each entry, summed over the last dimension."""
    axes = c.broadcast([a, b])
    c.pin(axes[-1], f"it is summed over by {c.where()}")
    return without_units(axes[:-1], c.shape)


def _differences(z: ZeroContext) -> Zeros:
    """A sum over differences: all that it runs over must be zero in both."""
    for back in range(-max(len(z.of(t)) for t in z.tensors), 0):
        known = [len(z.of(t)) < -back or z.of(t)[back] for t in z.tensors]
        size = max(z.axes_of(t)[back].size for t in z.tensors if len(z.of(t)) >= -back)
        spread = any(len(z.of(t)) < -back or z.axes_of(t)[back].size < size for t in z.tensors)
        if spread or not all(known):
            for tensor in z.tensors:
                if len(z.of(tensor)) >= -back:
                    z.summed(tensor, back)
    return ()


def _whole_order(c: Context, axes: Axes) -> None:
    """Zeros add nothing to a norm, unless it is of negative order."""
    order = plain(arguments(c.node).get("p", 2))
    if not isinstance(order, (int, float)) or order < 0:
        for axis in axes:
            c.pin(axis, f"its channels compete in {c.where()}")


@register_op("dist", zeros=_differences)
def dist(c: Context, a: Operand, b: Operand, *_: Any) -> Axes:
    """The norm of all differences."""
    _whole_order(c, c.broadcast([a, b]))
    return ()


def _row_differences(z: ZeroContext) -> Zeros:
    source = z.tensors[0]
    if not z.of(source)[-1]:
        z.summed(source, len(z.of(source)) - 1)
    return zeros.unknown(z)


@register_op("pdist", zeros=_row_differences)
def pdist(c: Context, x: Operand, *_: Any) -> Axes:
    """Distances of all pairs of rows of a matrix."""
    reason = f"its axes are paired in {c.where()}"
    c.pin(x.axes[0], reason)
    _whole_order(c, x.axes[1:])
    return c.fresh(c.shape, reason)
