"""Where a removed channel is zero, and where that matters.

A consumer with weights of its own does not care what a removed channel holds, since its weights for the channel go as
well. A plain sum over channels, or a product of two activations, does: there a channel may only go if it is zero when
it is removed. Where it is not, it is pinned. What each operation does to zeros stands in its record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from structprune.coupling.propagate import Channels
from structprune.ops import op_of
from structprune.ops.arguments import tensors
from structprune.ops.relations import Axes, Axis
from structprune.ops.zeros import ZeroContext, Zeros, unknown
from structprune.tracing.trace import Trace, describe, part_of


def pin_what_is_not_zero(trace: Trace, channels: Channels) -> None:
    """Pin the channels that may not go, because an operation sums over them where they are not zero: one walk."""
    zeros: list[Any] = []

    def pin(axis: Axis, node: fx.Node) -> None:
        where = describe(node, trace)
        channels.relations.pin(axis, f"a channel that is off is not zero there, and is summed over by {where}")

    context = ZeroContext(channels.axes, zeros, pin)
    memory = Memory(channels.axes, zeros)
    for node in trace.all_nodes:
        zeros.append(_zeros(context, node, channels, zeros))
        memory.note(node)


class Memory:
    """Which tensors share memory: a write into one of them changes what is known of all.

    Args:
        axes: the axes of every node, by number.
        zeros: what is known of every node so far, by number; changed in place.
    """

    def __init__(self, axes: list[Any], zeros: list[Any]) -> None:
        self._axes, self._zeros = axes, zeros
        self._owner: dict[int, int] = {}
        self._views: dict[int, list[int]] = {}

    def note(self, node: fx.Node) -> None:
        """The zeros of `node` are known now; if it writes, those of the tensors that share its memory are fewer."""
        number, source = node.meta["index"], _shares_with(node)
        owner = number if source is None else self._owner[source.meta["index"]]
        self._owner[number] = owner
        views = self._views.setdefault(owner, [])
        views.append(number)
        written = self._zeros[number]
        if "writes" not in node.meta or not isinstance(written, tuple) or all(written):
            return
        for other in views[:-1]:
            if isinstance(self._zeros[other], tuple):
                self._zeros[other] = tuple(
                    zero
                    and any(
                        kept and _overlap(axis, mine) for mine, kept in zip(self._axes[number], written, strict=True)
                    )
                    for axis, zero in zip(self._axes[other], self._zeros[other], strict=True)
                )


def _shares_with(node: fx.Node) -> fx.Node | None:
    """The tensor whose memory `node` has; None if it has its own."""
    if "writes" in node.meta:
        return node.meta["writes"]
    if node.meta["name"] == "part":
        return part_of(node)[0]
    known = op_of(node.meta["name"])
    sources = tensors(node) if known is not None and known.views else []
    return sources[0] if sources else None


def _overlap(a: Axis, b: Axis) -> bool:
    """Whether two axes have channels in common."""
    if not a.free or not b.free:
        return False
    if a.array is None and b.array is None:
        return a.start < b.start + b.size and b.start < a.start + a.size
    return bool(np.isin(a.ids(), b.ids()).any())


def _zeros(context: ZeroContext, node: fx.Node, channels: Channels, zeros: list[Any]) -> Any:
    """Zeros of a node's result, or a list of them for several results."""
    axes = channels.axes[node.meta["index"]]
    if node.meta["name"] == "part":
        parent, position = part_of(node)
        return zeros[parent.meta["index"]][position]
    if not isinstance(axes, list):
        return _single(context, node, axes, channels.unforeseen)
    parts: list[Axes | None] = axes
    single = _single(context, node, next((part for part in parts if part is not None), ()), channels.unforeseen)
    return [single if part is not None and len(part) == len(single) else (False,) * len(part or ()) for part in parts]


def _single(context: ZeroContext, node: fx.Node, axes: Axes, unforeseen: frozenset[int]) -> Zeros:
    context.node, context.axes = node, axes
    name = node.meta["name"]
    if name == "parameter":
        dtype = node.meta["dtype"]
        return (dtype.is_floating_point or dtype.is_complex,) * len(axes)
    source = node.meta.get("keeps_zeros")
    if source is not None:
        return context.of(source)
    known = op_of(name)
    return unknown(context) if known is None or node.meta["index"] in unforeseen else known.zeros(context)
