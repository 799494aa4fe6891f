"""Routing: experts that a router chooses by number, and products with the weights of the chosen ones.

The numbers that a top-k gives are channels of the row that it looked through: they count experts. Where they only look
up, count or sort by that row, a whole expert may go: the others are renumbered in order, and the router chooses among
those that are left. Where a number is used in any other way, the experts are pinned.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from structprune.ops.context import Context, Operand, Result, operands_in, rule
from structprune.ops.normalisation import competing, dimension
from structprune.ops.relations import Rows

# What a softmax passes through on its way to the top-k.
_CASTS = frozenset({"float", "to", "type_as", "half", "bfloat16", "double", "detach", "contiguous"})


def _chosen_from(node: fx.Node) -> bool:
    """Whether a top-k chooses from the result of `node`."""
    return any(
        user.meta["name"] == "topk" or (user.meta["name"] in _CASTS and _chosen_from(user))
        for user in node.users
        if user.op != "output"
    )


@rule("softmax", "_softmax", "python.softmax")
def softmax(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Result:
    """Channels compete; where experts do, to be chosen from, those that are off take no share."""
    dim = dimension(x, kwargs.get("dim", args[0] if args else -1))
    if dim is None or not x.rows[dim].free or not _chosen_from(c.node):
        return competing(c, x, dim)
    c.survivors(x, (dim,))
    return x.rows


@rule("topk")
def topk(c: Context, x: Operand, k: int, dim: int = -1, *_: Any, **__: Any) -> Result:
    """The largest along `dim`: their values, and their numbers, which count the channels of `dim`."""
    at = dimension(x, dim)
    if at is None or not x.rows[at].free or not isinstance(k, int):
        return competing(c, x, at)
    row = x.rows[at]
    c.survivors(x, (at,))
    c.bounded(row, least=int(k))
    chosen = c.fresh([int(k)], f"it numbers the choices of {c.where()}")
    c.expect(k, chosen[0])
    rows = (*x.rows[:at], *chosen, *x.rows[at + 1 :])
    c.number(row, part=1)
    return [rows, rows]


@rule("histc")
def histc(c: Context, x: Operand, bins: Any = 100, min: Any = 0, max: Any = 0, **_: Any) -> Result:
    """How often each number occurs, where there is one bin for each channel that they number."""
    row = c.numbered(x)
    whole = row is not None and isinstance(max, int) and bins == row.size and min == 0 and max == row.size - 1
    if row is None or not whole or not c.tracked(max):
        return c.pin_all([x], f"its values are counted by {c.where()}")
    c.counts(x, row)
    c.expect(bins, row)
    c.expect(max + 1, row)
    c.claimed.add(id(max))
    return (row,)


@rule("bincount")
def bincount(c: Context, x: Operand, weights: Any = None, minlength: Any = 0) -> Result:
    """How often each number occurs, where there is one bin for each channel that they number."""
    row = c.numbered(x)
    if row is None or weights is not None or minlength != row.size:
        return c.pin_all(list(operands_in(x, weights)), f"its values are counted by {c.where()}")
    c.counts(x, row)
    c.expect(minlength, row)
    return (row,)


@rule("one_hot")
def one_hot(c: Context, x: Operand, num_classes: Any = -1) -> Result:
    """A new dimension with one entry for each channel that the numbers count."""
    row = c.numbered(x)
    if row is None or num_classes != row.size:
        return c.pin_all([x], f"its values count positions, made by {c.where()}")
    c.counts(x, row)
    c.expect(num_classes, row)
    return (*x.rows, row)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(c: Context, x: Operand, weight: Operand, offs: Any = None, *rest: Any, **named: Any) -> Rows | Result:
    """Tokens ``(n, in)`` sorted by expert times ``(experts, in, out)``; `offs` says where each expert's tokens end."""
    others = list(operands_in(rest, named))
    if not isinstance(offs, Operand) or len(x.rows) != 2 or len(weight.rows) != 3 or others:
        given = list(operands_in(x, weight, offs, others))
        return c.pin_all(given, f"its groups are not those of tokens sorted by expert, in {c.where()}")
    c.same(weight.rows[0], offs.rows[0])
    c.same(x.rows[1], weight.rows[1])
    for row in weight.rows[1:]:  # the kernel wants lines to begin at multiples of 16 bytes, in half precision too
        c.bounded(row, step=8)
    return (x.rows[0], weight.rows[2])
