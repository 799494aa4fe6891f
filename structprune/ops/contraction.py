"""Operations that sum over channels: convolutions, linear layers, matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from structprune.ops.context import Context, Operand, Result, operands_in, rule
from structprune.ops.relations import UNIT, Row, Rows


def _bias(c: Context, bias: Operand | None, row: Row) -> None:
    if bias is not None:
        c.same(row, bias.rows[0])


def _pointwise(weight: Operand, stride: Any, padding: Any) -> bool:
    """Whether each position is computed from itself alone."""

    def every(value: Any, wanted: int) -> bool:
        return all(item == wanted for item in (value if isinstance(value, (tuple, list)) else (value,)))

    return all(row.size == 1 for row in weight.rows[2:]) and every(stride, 1) and every(padding, 0)


def _spatial(c: Context, weight: Operand, x_rows: Sequence[Row], shape: Sequence[int]) -> Rows:
    reason = f"it is a position that {c.where()} slides over"
    for row in (*weight.rows[2:], *x_rows):
        c.pin(row, reason)
    return c.fresh(shape, reason)


@rule("conv1d", "conv2d", "conv3d", "convolution_overrideable")
def convolution(
    c: Context, x: Operand, weight: Operand, bias: Operand | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Rows:  # fmt: skip
    """Weight ``(out, in / groups, *kernel)``: grouped, it is a grid of groups x channels in a group on both sides."""
    at = len(x.rows) - (len(weight.rows) - 2) - 1
    channels, out = x.rows[at], weight.rows[0]
    if groups == 1:
        c.same(channels, weight.rows[1])
    else:
        count = int(groups)
        group_in, inside = c.split(channels, (count, channels.size // count))
        group_out, _ = c.split(out, (count, out.size // count))
        c.same(group_in, group_out)
        c.same(inside, weight.rows[1])
        c.expect(groups, group_in)
    _bias(c, bias, out)
    if _pointwise(weight, stride, padding):
        return (*x.rows[:at], out, *x.rows[at + 1 :])
    return (*x.rows[:at], out, *_spatial(c, weight, x.rows[at + 1 :], c.shape[at + 1 :]))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    c: Context, x: Operand, weight: Operand, bias: Operand | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Rows:  # fmt: skip
    """Weight ``(in, out / groups, *kernel)``."""
    at = len(x.rows) - (len(weight.rows) - 2) - 1
    c.same(x.rows[at], weight.rows[0])
    out = weight.rows[1]
    if groups != 1:
        count = int(groups)
        group, _ = c.split(weight.rows[0], (count, weight.rows[0].size // count))
        c.expect(groups, group)
        out = c.merged([group, out])
    _bias(c, bias, out)
    return (*x.rows[:at], out, *_spatial(c, weight, x.rows[at + 1 :], c.shape[at + 1 :]))


@rule("linear")
def linear(c: Context, x: Operand, weight: Operand, bias: Operand | None = None) -> Rows:
    """Weight ``(out, in)``."""
    c.same(x.rows[-1], weight.rows[-1])
    if len(weight.rows) == 1:
        return x.rows[:-1]
    _bias(c, bias, weight.rows[0])
    return (*x.rows[:-1], weight.rows[0])


@rule("bilinear")
def bilinear(c: Context, left: Operand, right: Operand, weight: Operand, bias: Operand | None = None) -> Rows:
    """Weight ``(out, in1, in2)``."""
    c.same(left.rows[-1], weight.rows[1])
    c.same(right.rows[-1], weight.rows[2])
    _bias(c, bias, weight.rows[0])
    batch = c.broadcast([Operand(left.node, left.rows[:-1]), Operand(right.node, right.rows[:-1])])
    return (*batch, weight.rows[0])


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner_")
def matmul(c: Context, a: Operand, b: Operand, *_: Any, **__: Any) -> Rows:
    """Rows of `a` times columns of `b`; leading dimensions broadcast."""
    return _product(c, a, b)


def _product(c: Context, a: Operand, b: Operand) -> Rows:
    c.same(a.rows[-1], b.rows[max(0, len(b.rows) - 2)])
    batch = c.broadcast([Operand(a.node, a.rows[:-2]), Operand(b.node, b.rows[:-2])])
    return (*batch, *a.rows[-2:-1], *(b.rows[-1:] if len(b.rows) > 1 else ()))


@rule("addmm", "addmv", "baddbmm")
def addmm(c: Context, bias: Operand, *factors: Any, **named: Any) -> Rows:
    """A product plus a tensor that broadcasts to it."""
    a, b = operands_in(factors, named)
    return c.broadcast([Operand(c.node, _product(c, a, b)), bias])


@rule("outer", "ger")
def outer(c: Context, a: Operand, b: Operand) -> Rows:
    """Every entry of `a` times every entry of `b`."""
    return (a.rows[0], b.rows[0])


@rule("python.einsum")
def einsum(c: Context, equation: Any, *operands: Any) -> Result:
    """Dimensions with the same letter are the same channels."""
    tensors = list(operands_in(operands))
    if not isinstance(equation, str):
        return c.pin_all([*operands_in(equation), *tensors], f"{c.where()} gives its subscripts as lists")
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters: dict[str, Row] = {}
    ellipsis: Rows = ()
    for term, tensor in zip(inputs.split(","), tensors, strict=True):
        named = term.replace("...", "")
        dots = len(tensor.rows) - len(named)
        start = term.find("...")
        rows = list(tensor.rows)
        if start >= 0:
            hidden = tuple(rows[start : start + dots])
            rows[start : start + dots] = []
            ellipsis = c.broadcast([Operand(c.node, ellipsis), Operand(c.node, hidden)]) if ellipsis else hidden
        for letter, row in zip(named, rows, strict=True):
            known = letters.get(letter, UNIT)
            letters[letter] = row if known.size == 1 else known if row.size == 1 else c.same(known, row)
    if not arrow:
        flat = inputs.replace(",", "").replace("...", "")
        output = ("..." if "..." in inputs else "") + "".join(sorted(x for x in set(flat) if flat.count(x) == 1))
    before, dots_there, after = output.partition("...")
    return (
        *(letters[x] for x in before),
        *(ellipsis if dots_there else ()),
        *(letters[x] for x in after),
    )


@rule("python.tensordot")
def tensordot(c: Context, a: Operand, b: Operand, dims: Any = 2, *_: Any) -> Result:
    """Sums over the last dimensions of `a` and the first of `b`, or over two lists of dimensions."""
    if isinstance(dims, int):
        mine, theirs = list(range(len(a.rows) - dims, len(a.rows))), list(range(dims))
    elif isinstance(dims, (tuple, list)):
        mine, theirs = ([dim] if isinstance(dim, int) else list(dim) for dim in dims)
    else:
        return c.pin_all([a, b], f"the dimensions of {c.where()} are decided by data")
    mine, theirs = [a.dim(dim) for dim in mine], [b.dim(dim) for dim in theirs]
    for left, right in zip(mine, theirs, strict=True):
        c.same(a.rows[left], b.rows[right])
    kept = [row for at, row in enumerate(a.rows) if at not in mine]
    return (*kept, *(row for at, row in enumerate(b.rows) if at not in theirs))


@rule("cdist")
def cdist(c: Context, a: Operand, b: Operand, *_: Any, **__: Any) -> Rows:
    """Distances between the rows of two matrices: a sum over the last dimension."""
    c.same(a.rows[-1], b.rows[-1])
    batch = c.broadcast([Operand(a.node, a.rows[:-2]), Operand(b.node, b.rows[:-2])])
    return (*batch, a.rows[-2], b.rows[-2])
