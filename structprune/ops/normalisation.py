"""Normalisations and reductions: over removed channels they run over the channels kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops import zeros
from structprune.ops.along import competing, dims_of, without
from structprune.ops.arguments import arguments
from structprune.ops.by_hand import normalises
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.kept import groups_kept, lengths_kept, shape_kept
from structprune.ops.op import Norm, Result, Scaling, like, register_op
from structprune.ops.relations import UNIT, Axes
from structprune.tracing.provenance import Arithmetic, Constant, Dim, plain


def _batch_norm_shape(x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, *_: Any) -> Tensor | None:
    parts = [part for part in (weight, bias, mean, var) if part is not None]
    if training or x.dim() < 2 or any(part.shape != x.shape[1:2] for part in parts):
        return None
    return like(x) if all(part.dtype == x.dtype for part in parts) else None


def _layer_norm_shape(x: Any, shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Tensor | None:
    parts = [part for part in (weight, bias) if isinstance(part, Tensor)]
    inner = tuple(x.shape[x.dim() - len(shape) :])
    if inner != tuple(int(size) for size in shape) or any(part.shape != inner for part in parts):
        return None
    same = all(part.dtype == x.dtype for part in parts)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if same else None


def _normalised(at: int, keeps: bool = False) -> zeros.ZeroRule:
    """Channels of dimension `at` whose scale and shift are removed are zero; without those, as they came in."""

    def rule(z: zeros.ZeroContext) -> zeros.Zeros:
        x, parameters = z.of(z.tensors[0]), z.tensors[1:]
        place = at % len(z.axes)
        zero = x[place] if not parameters else all(z.of(p)[-1] for p in parameters)
        rest = keeps or not parameters
        return tuple(zero if d == place else rest and x[d] for d in range(len(z.axes)))

    return rule


_STATISTICS = Norm("weight", "bias", statistics=("running_mean", "running_var"))


@register_op(
    "batch_norm", zeros=_normalised(1), norm=_STATISTICS, elementwise=True, scaling=Scaling.LAYER,
    shape=_batch_norm_shape,
)  # fmt: skip
@register_op("instance_norm", zeros=_normalised(1), norm=_STATISTICS)
def batch_norm(c: Context, x: Operand, *statistics: Any, **named: Any) -> Axes:
    """Weight, bias, running mean and running variance have one entry a channel."""
    for operand in operands_in(statistics, named):
        c.same(x.axes[1], operand.axes[0])
    given = arguments(c.node)
    if given.get("training", given.get("use_input_stats")):
        # Standardised weights are normalised over their input channels by a batch norm over "positions".
        first = 2 if c.node.meta["name"] == "instance_norm" else 0
        c.reduces_over(x, [at for at in range(first, len(x.axes)) if at != 1])
    return x.axes


_SHAPED = Norm("weight", "bias", "normalized_shape")


@register_op(
    "layer_norm", zeros=_normalised(-1), norm=_SHAPED, scaling=Scaling.LAYER, channel_dim=-1, over_kept=shape_kept,
    shape=_layer_norm_shape,
)  # fmt: skip
@register_op(
    "rms_norm", zeros=_normalised(-1, keeps=True), norm=Norm("weight", shape="normalized_shape"), scaling=Scaling.LAYER,
    channel_dim=-1, over_kept=shape_kept,
)  # fmt: skip
def layer_norm(c: Context, x: Operand, shape: Sequence[Any], *affine: Any, **named: Any) -> Axes:
    """Normalises over the last ``len(shape)`` dimensions; weight and bias have that shape."""
    first = len(x.axes) - len(shape)
    for operand in operands_in(affine, named):
        for axis, other in zip(x.axes[first:], operand.axes, strict=True):
            c.same(axis, other)
    for size, axis in zip(shape, x.axes[first:], strict=True):
        c.expect(size, axis)
    c.reduces_over(x, range(first, len(x.axes)))
    return x.axes


@register_op("group_norm", zeros=_normalised(1), norm=Norm("weight", "bias"), over_kept=groups_kept)
def group_norm(c: Context, x: Operand, groups: int, *affine: Any, **named: Any) -> Axes:
    """Channels are a product of groups x channels in a group."""
    axis = x.axes[1]
    for operand in operands_in(affine, named):
        c.same(axis, operand.axes[0])
    if groups != 1:
        outer, _ = c.split(axis, (int(groups), axis.size // int(groups)))
        c.expect(groups, outer)
    for position in x.axes[2:]:
        c.pin(position, f"it is a position that {c.where()} averages over")
    c.reduces_over(x, (1,))
    return x.axes


@register_op("_weight_norm", zeros=zeros.everywhere, over_kept=lengths_kept)
def weight_norm(c: Context, v: Operand, g: Operand, dim: int = 0) -> Axes:
    """``g * v / |v|``, with one norm for each index of `dim`."""
    if g.axes[v.dim(dim)].size > 1:
        c.same(v.axes[v.dim(dim)], g.axes[v.dim(dim)])
    c.reduces_over(v, [at for at in range(len(v.axes)) if at != v.dim(dim)])
    return v.axes


def _largest_or_reduced(z: zeros.ZeroContext) -> zeros.Zeros:
    """``torch.max(a, b)`` compares entry by entry."""
    return zeros.by_value(z) if len(z.tensors) > 1 else zeros.unknown(z)


def _order(node: fx.Node) -> Any:
    """The order of a norm: a number, or the name of a norm of matrices."""
    given = arguments(node)
    return plain(given.get("ord", given.get("p", 2)))


def _adds_up(node: fx.Node) -> bool:
    """Whether entries that are zero change nothing in a norm: all but those of negative order."""
    order = _order(node)
    return order is None or isinstance(order, str) or (isinstance(order, (int, float)) and order >= 0)


# Entries that are zero add nothing to these.
_SUMMED: dict[str, Any] = {"zeros": zeros.reduced, "over_kept": None}


@register_op("max", "min", zeros=_largest_or_reduced)
def largest(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Result:
    """``torch.max(a, b)`` compares entry by entry; else the largest along a dimension."""
    if args and isinstance(args[0], Operand):
        return c.broadcast([x, args[0]])
    return competing(c, x, dims_of(c.node, len(x.axes)))


@register_op("mean", zeros=zeros.reduced, scaling=Scaling.CONTRACTION)
@register_op("sum", **_SUMMED, scaling=Scaling.CONTRACTION)
@register_op("nansum", "count_nonzero", "any", "frobenius_norm", "nuclear_norm", **_SUMMED)
@register_op("norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm", **_SUMMED)
def reduction(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """Dimensions disappear, or keep size 1.

    A sum over the channels that stay is the sum with the others at zero. A mean is such a sum times a factor, which
    parameters take up; as a part of a norm that the forward writes out it runs over the channels that stay.
    A norm of a matrix without rows and columns of zeros is what it was: they add no singular value but zero.
    """
    name = c.node.meta["name"]
    dims = dims_of(c.node, len(x.axes), default=(-2, -1) if name == "linalg_matrix_norm" else None)
    if dims is None or (name.endswith("norm") and not _adds_up(c.node)):
        return competing(c, x, dims)
    if name == "mean" and not normalises(c.node):
        for at in dims:
            size = Dim(x.node.meta["index"], at)
            c.relations.scale_of(c.node.meta["index"], 0, Arithmetic("**", pow, size, Constant(-1)), x.axes[at])
    else:
        c.reduces_over(x, dims)
    return without(x.axes, dims, len(c.shape))


@register_op("var", "std", "var_mean", "std_mean", "nanmean", zeros=zeros.reduced)
def spread(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """The spread of what a forward normalises by it is over the channels kept; any other counts all channels."""
    dims = dims_of(c.node, len(x.axes))
    if dims is None or not normalises(c.node):
        return competing(c, x, dims, f"it is averaged over by {c.where()}")
    c.reduces_over(x, dims)
    axes = without(x.axes, dims, len(c.shape[0] if isinstance(c.shape, list) else c.shape))
    return [axes for _ in c.shape] if isinstance(c.shape, list) else axes


@register_op("python.local_response_norm")
def local_response_norm(c: Context, x: Operand, *_: Any, **__: Any) -> Axes:
    """Every channel is divided by a norm over its neighbours."""
    c.pin(x.axes[1], f"its neighbours take part in {c.where()}")
    return x.axes


# -- the operators under the normalisations, which give statistics as well -------------------------------------------
# The statistics are results of their own, so what they are taken over must stay; other dimensions pass.


def _pinned(c: Context, axes: Axes) -> None:
    for axis in axes:
        c.pin(axis, f"its statistics are a result of {c.where()}")


@register_op("native_layer_norm")
def native_layer_norm(c: Context, x: Operand, shape: Any, *affine: Any) -> Result:
    """Normalises over the last ``len(shape)`` dimensions."""
    first = len(x.axes) - len(shape)
    _pinned(c, x.axes[first:])
    for operand in operands_in(affine):
        _pinned(c, operand.axes)
    statistics = (*x.axes[:first], *[UNIT] * len(shape))
    return [x.axes, statistics, statistics]


def _scaled_zeros(z: zeros.ZeroContext) -> zeros.Zeros:
    """A channel whose scale and shift are removed is zero."""
    zero = [z.of(parameter)[-1] for parameter in z.tensors[1:]]
    return tuple(place == 1 and bool(zero) and all(zero) for place in range(len(z.axes)))


@register_op("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", zeros=_scaled_zeros)
def native_batch_norm(c: Context, x: Operand, *parts: Any, **named: Any) -> Result:
    """Weight, bias and statistics have one entry a channel; what a batch is averaged over must stay."""
    for operand in operands_in(parts, named):
        c.same(x.axes[1], operand.axes[0])
    if arguments(c.node).get("training", True):
        _pinned(c, (x.axes[0], *x.axes[2:]))
    axes: list[Axes | None] = [x.axes]
    for shape in c.shape[1:]:
        each = shape is not None and tuple(shape) == (x.axes[1].size,)
        axes.append(None if shape is None else (x.axes[1],) if each else c.fresh(shape, f"it is kept by {c.where()}"))
    return axes


@register_op("native_group_norm")
def native_group_norm(c: Context, x: Operand, weight: Any, bias: Any, n: Any, *_: Any) -> Result:
    """Normalises over groups of channels and all positions; it is told their numbers."""
    _pinned(c, x.axes[1:])
    for operand in operands_in(weight, bias):
        _pinned(c, operand.axes)
    c.expect(n, x.axes[0])
    groups = c.fresh(c.shape[1][1:], f"it counts the groups of {c.where()}")
    return [x.axes, (x.axes[0], *groups), (x.axes[0], *groups)]


def _slope_zeros(z: zeros.ZeroContext) -> zeros.Zeros:
    """``y * (g - sum(g * y))``: zero where `y` is, and where `g` is along the dimensions that are not summed over."""
    grad, output = (z.of(tensor) for tensor in z.tensors[:2])
    dim = arguments(z.node).get("dim")
    at = dim % len(z.axes) if isinstance(dim, int) else None
    if at is None or not (grad[at] or output[at]):
        for place in range(len(z.axes)) if at is None else (at,):
            z.summed(z.tensors[0], place)
    return tuple(y or (g and place != at) for place, (g, y) in enumerate(zip(grad, output, strict=True)))


@register_op("_softmax_backward_data", zeros=_slope_zeros)
def softmax_backward(c: Context, grad: Operand, output: Operand, *_: Any) -> Result:
    """The derivative of a softmax: a product, from which its sum along a dimension is taken off."""
    return c.broadcast([grad, output])
