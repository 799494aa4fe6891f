"""Where a removed channel is zero, and where that matters.

A consumer with weights of its own does not care what a removed channel holds, since its weights for the channel go as
well. A plain sum over channels, or a product of two activations, does: there a channel may only go if it is zero when
it is removed. Where it is not, it is pinned. What each operation does to zeros stands in its record.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from structprune.channels.propagate import Channels
from structprune.ops import op_of
from structprune.ops.relations import Row, Rows
from structprune.ops.zeros import ZeroContext, Zeros, unknown
from structprune.tracing.trace import Trace, describe, part_of


def pin_what_is_not_zero(trace: Trace, channels: Channels) -> None:
    """Pin the channels that may not go, because an operation sums over them where they are not zero: one walk."""
    zeros: list[Any] = []

    def pin(row: Row, node: fx.Node) -> None:
        where = describe(node, trace)
        channels.relations.pin(row, f"a channel that is off is not zero there, and is summed over by {where}")

    context = ZeroContext(channels.rows, zeros, pin)
    for node in trace.everything:
        zeros.append(_zeros(context, node, channels, zeros))


def _zeros(context: ZeroContext, node: fx.Node, channels: Channels, zeros: list[Any]) -> Any:
    """Zeros of a node's result, or a list of them for several results."""
    rows = channels.rows[node.meta["index"]]
    if node.meta["name"] == "part":
        parent, position = part_of(node)
        return zeros[parent.meta["index"]][position]
    if not isinstance(rows, list):
        return _single(context, node, rows, channels.unforeseen)
    parts: list[Rows | None] = rows
    single = _single(context, node, next((part for part in parts if part is not None), ()), channels.unforeseen)
    return [single if part is not None and len(part) == len(single) else (False,) * len(part or ()) for part in parts]


def _single(context: ZeroContext, node: fx.Node, rows: Rows, unforeseen: frozenset[int]) -> Zeros:
    context.node, context.rows = node, rows
    name = node.meta["name"]
    if name == "parameter":
        dtype = node.meta["dtype"]
        return (dtype.is_floating_point or dtype.is_complex,) * len(rows)
    source = node.meta.get("keeps_zeros")
    if source is not None:
        return context.of(source)
    known = op_of(name)
    return unknown(context) if known is None or node.meta["index"] in unforeseen else known.zeros(context)
