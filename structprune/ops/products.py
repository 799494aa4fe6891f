"""Products that are an einsum under another name, and distances, which sum over differences.

Each says its equation for a call; channels, zeros and costs follow from that as they do for ``einsum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx

from structprune.ops import zeros
from structprune.ops.along import dims_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.context import Context, Operand
from structprune.ops.einsum import Equation, Labels, product_macs, product_rows, product_zeros
from structprune.ops.op import Result, register_op
from structprune.ops.relations import UNIT, Axes
from structprune.ops.zeros import ZeroContext, Zeros
from structprune.tracing.provenance import plain

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
