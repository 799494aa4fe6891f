"""Routing: experts that a router chooses by number, and products with the weights of the chosen ones.

The numbers that a top-k gives are channels of the axis that it looked through: they count experts. Where they only look
up, count or sort by that axis, a whole expert may go: the others are renumbered in order, and the router chooses among
those that are left. Where a number is used in any other way, the experts are pinned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops.along import competing, dimension
from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.kept import choices_kept
from structprune.ops.op import Contraction, Indices, Result, op_of, register_op
from structprune.ops.relations import Axes
from structprune.ops.zeros import ZeroContext, Zeros, unknown


def _chosen_from(node: fx.Node) -> bool:
    """Whether a top-k chooses from the result of `node`."""
    return any(
        user.meta["name"] == "topk" or (_is_cast(user) and _chosen_from(user))
        for user in node.users
        if user.op != "output"
    )


def _is_cast(node: fx.Node) -> bool:
    """Whether the operation changes no more than the type: numbers of channels stay what they are."""
    known = op_of(node.meta["name"])
    return known is not None and known.elementwise and known.indices is Indices.PASSED


def _softened(z: ZeroContext) -> Zeros:
    """A channel that a softmax leaves out takes no share; in other dimensions zero becomes a share like any other."""
    dim = arguments(z.node).get("dim", -1)
    return tuple(isinstance(dim, int) and place == dim % len(z.axes) for place in range(len(z.axes)))


def _routed(z: ZeroContext) -> Zeros:
    """An expert that is removed takes no share, and no token."""
    return tuple(axis.free for axis in z.axes)


def _grouped_zeros(z: ZeroContext) -> Zeros:
    """Tokens times the weights of their experts."""
    x, weight = z.tensors[:2]
    left, right = z.of(x), z.of(weight)
    if len(left) != 2 or len(right) != 3:
        return unknown(z)
    if not (left[1] or right[1]):
        z.summed(x, 1)
    return (False, right[2])


def _grouped_shape(x: Any, weight: Any, offs: Any = None, **named: Any) -> Tensor | None:
    """On ``meta`` the operation insists on half precision."""
    rest = any(value is not None for value in named.values())
    if rest or offs is None or x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1]:
        return None
    same = x.dtype == weight.dtype and offs.shape == weight.shape[:1]
    return torch.empty((x.shape[0], weight.shape[2]), dtype=x.dtype, device=x.device) if same else None


@register_op("softmax", "_softmax", "python.softmax", zeros=_softened)
def softmax(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Result:
    """Channels compete; where experts do, to be chosen from, those that are removed take no share."""
    dim = dimension(x, kwargs.get("dim", args[0] if args else -1))
    if dim is None or not x.axes[dim].free or not _chosen_from(c.node):
        return competing(c, x, dim)
    c.reduces_over(x, (dim,))
    return x.axes


@register_op("topk", over_kept=choices_kept)
def topk(c: Context, x: Operand, k: int, dim: int = -1, *_: Any, **__: Any) -> Result:
    """The largest along `dim`: their values, and their numbers, which count the channels of `dim`."""
    at = dimension(x, dim)
    if at is None or not x.axes[at].free or not isinstance(k, int):
        return competing(c, x, at)
    axis = x.axes[at]
    c.reduces_over(x, (at,))
    c.bounded(axis, least=int(k))
    chosen = c.fresh([int(k)], f"it numbers the choices of {c.where()}")
    c.expect(k, chosen[0])
    axes = (*x.axes[:at], *chosen, *x.axes[at + 1 :])
    c.number(axis, part=1)
    return [axes, axes]


@register_op("histc", zeros=_routed)
def histc(c: Context, x: Operand, bins: Any = 100, min: Any = 0, max: Any = 0, **_: Any) -> Result:
    """How often each number occurs, where there is one bin for each channel that they number."""
    axis = c.numbered(x)
    whole = axis is not None and isinstance(max, int) and bins == axis.size and min == 0 and max == axis.size - 1
    if axis is None or not whole or not c.tracked(max):
        return c.pin_all([x], f"its values are counted by {c.where()}")
    c.counts(x, axis)
    c.expect(bins, axis)
    c.expect(max + 1, axis)
    c.claimed.add(id(max))
    return (axis,)


@register_op("bincount", zeros=_routed)
def bincount(c: Context, x: Operand, weights: Any = None, minlength: Any = 0) -> Result:
    """How often each number occurs, where there is one bin for each channel that they number."""
    axis = c.numbered(x)
    if axis is None or weights is not None or minlength != axis.size:
        return c.pin_all(list(operands_in(x, weights)), f"its values are counted by {c.where()}")
    c.counts(x, axis)
    c.expect(minlength, axis)
    return (axis,)


@register_op("one_hot", zeros=_routed)
def one_hot(c: Context, x: Operand, num_classes: Any = -1) -> Result:
    """A new dimension with one entry for each channel that the numbers count."""
    axis = c.numbered(x)
    if axis is None or num_classes != axis.size:
        return c.pin_all([x], f"its values count positions, made by {c.where()}")
    c.counts(x, axis)
    c.expect(num_classes, axis)
    return (*x.axes, axis)


@register_op(
    "_grouped_mm", "transformers::grouped_mm_fallback", zeros=_grouped_zeros, shape=_grouped_shape,
    contraction=Contraction("grouped", lambda _: ()),
)  # fmt: skip
def grouped_mm(c: Context, x: Operand, weight: Operand, offs: Any = None, *rest: Any, **named: Any) -> Axes | Result:
    """Tokens ``(n, in)`` sorted by expert times ``(experts, in, out)``; `offs` says where each expert's tokens end."""
    others = list(operands_in(rest, named))
    if not isinstance(offs, Operand) or len(x.axes) != 2 or len(weight.axes) != 3 or others:
        given = list(operands_in(x, weight, offs, others))
        return c.pin_all(given, f"its groups are not those of tokens sorted by expert, in {c.where()}")
    c.same(weight.axes[0], offs.axes[0])
    c.same(x.axes[1], weight.axes[1])
    for axis in weight.axes[1:]:  # the kernel wants lines to begin at multiples of 16 bytes, in half precision too
        c.bounded(axis, step=8)
    return (x.axes[0], weight.axes[2])
