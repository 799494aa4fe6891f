"""Scaled dot-product attention."""

from __future__ import annotations

from typing import Any

from structprune.ops.context import Context, Operand, rule
from structprune.ops.relations import Rows
from structprune.tracing.provenance import Arithmetic, Constant, Dim, SizeFloat


@rule("scaled_dot_product_attention")
def attention(
    c: Context, query: Operand, key: Operand, value: Operand, attn_mask: Operand | None = None, dropout_p: Any = 0.0,
    is_causal: Any = False, scale: Any = None, enable_gqa: Any = False,
) -> Rows:  # fmt: skip
    """Query ``(..., heads, length, size)``; the size is summed over, and scales the softmax by ``size ** -0.5``."""
    heads = query.rows[:-2]
    others = [Operand(x.node, x.rows[:-2]) for x in (key, value)]
    if enable_gqa:
        mine, theirs = query.rows[-3], key.rows[-3]
        if mine.size != theirs.size:
            group, _ = c.split(mine, (theirs.size, mine.size // theirs.size))
            c.same(group, theirs)
        c.same(theirs, value.rows[-3])
        others = []
        for x in (key, value):
            c.broadcast([Operand(x.node, x.rows[:-3]), Operand(query.node, query.rows[:-3])])
    heads = c.broadcast([Operand(query.node, heads), *others])
    c.same(query.rows[-1], key.rows[-1])
    c.same(key.rows[-2], value.rows[-2])
    reason = f"it is a position that {c.where()} attends to"
    for row in (query.rows[-2], key.rows[-2]):
        c.pin(row, reason)
    if attn_mask is not None:
        c.broadcast([Operand(c.node, (*heads, query.rows[-2], key.rows[-2])), attn_mask])
    if scale is None:
        size = Dim(query.node.meta["index"], len(query.rows) - 1)
        c.relations.scale_of(c.node.meta["index"], 0, Arithmetic("**", pow, size, Constant(-0.5)), query.rows[-1])
    elif isinstance(scale, SizeFloat):
        c.scale(0, scale, query.rows[-1])
    return (*heads, query.rows[-2], value.rows[-1])
