"""The operators under the normalisations, which give statistics as well.

The statistics are results of their own, so what they are taken over must stay; other dimensions pass.
"""

from __future__ import annotations

from typing import Any

from structprune.ops import zeros
from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Result, register_op
from structprune.ops.relations import UNIT, Axes


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
    found: list[Axes | None] = [x.axes]
    for shape in c.shape[1:]:
        each = shape is not None and tuple(shape) == (x.axes[1].size,)
        found.append(None if shape is None else (x.axes[1],) if each else c.fresh(shape, f"it is kept by {c.where()}"))
    return found


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
