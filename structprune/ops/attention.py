"""Scaled dot-product attention."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops.arguments import tensors
from structprune.ops.context import Context, Operand
from structprune.ops.op import AxesOf, Contraction, Count, Pair, register_op
from structprune.ops.relations import Axes
from structprune.ops.zeros import ZeroContext, Zeros
from structprune.tracing.provenance import Arithmetic, Constant, Dim, SizeFloat


def _zeros(z: ZeroContext) -> Zeros:
    """Scores are summed over the head's size, in which query or key must be zero."""
    query, key, value = z.tensors[:3]
    if not (z.of(query)[-1] or z.of(key)[-1]):
        z.summed(query, len(z.of(query)) - 1)
    # Where a query is zero it attends to all alike, so only values make a head or a batch entry zero.
    batch = (z.whole(value, back) and z.of(value)[back] for back in range(-len(z.axes), -2))
    return (*batch, False, z.of(value)[-1])


def _macs(node: fx.Node, axes: AxesOf, count: Count) -> int:
    """Scores of every query with every key, and sums of values by them."""
    query, key, value = (axes(n) for n in tensors(node)[:3])
    scores = prod(count(axis) for axis in query[:-1]) * count(key[-2])
    return scores * (count(query[-1]) + count(value[-1]))


def _shape(q: Any, k: Any, v: Any, mask: Any = None, *rest: Any, **named: Any) -> Tensor | None:
    plain = mask is None and named.get("attn_mask") is None and not named.get("enable_gqa") and len(rest) < 4
    if not plain or q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not q.dtype == k.dtype == v.dtype:
        return None
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        return None
    # As the fused kernels give it: heads are inner to tokens in memory.
    out = torch.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=q.dtype, device=q.device)
    return out.transpose(1, 2)


@register_op(
    "scaled_dot_product_attention", zeros=_zeros, macs=_macs, shape=_shape,
    contraction=Contraction("attention", lambda _: (Pair(0, -1, 1, -1),)),
)  # fmt: skip
def attention(
    c: Context, query: Operand, key: Operand, value: Operand, attn_mask: Operand | None = None, dropout_p: Any = 0.0,
    is_causal: Any = False, scale: Any = None, enable_gqa: Any = False,
) -> Axes:  # fmt: skip
    """Query ``(..., heads, length, size)``; the size is summed over, and scales the softmax by ``size ** -0.5``."""
    heads = query.axes[:-2]
    others = [Operand(x.node, x.axes[:-2]) for x in (key, value)]
    if enable_gqa:
        mine, theirs = query.axes[-3], key.axes[-3]
        if mine.size != theirs.size:
            group, _ = c.split(mine, (theirs.size, mine.size // theirs.size))
            c.same(group, theirs)
        c.same(theirs, value.axes[-3])
        others = []
        for x in (key, value):
            c.broadcast([Operand(x.node, x.axes[:-3]), Operand(query.node, query.axes[:-3])])
    heads = c.broadcast([Operand(query.node, heads), *others])
    c.same(query.axes[-1], key.axes[-1])
    c.same(key.axes[-2], value.axes[-2])
    reason = f"it is a position that {c.where()} attends to"
    for axis in (query.axes[-2], key.axes[-2]):
        c.pin(axis, reason)
    if attn_mask is not None:
        c.broadcast([Operand(c.node, (*heads, query.axes[-2], key.axes[-2])), attn_mask])
    if scale is None:
        size = Dim(query.node.meta["index"], len(query.axes) - 1)
        c.relations.scale_of(c.node.meta["index"], 0, Arithmetic("**", pow, size, Constant(-0.5)), query.axes[-1])
    elif isinstance(scale, SizeFloat):
        c.scale(0, scale, query.axes[-1])
    return (*heads, query.axes[-2], value.axes[-1])
