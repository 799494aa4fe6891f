"""Where a removed channel is zero, and where that matters.

A consumer with weights of its own gives the same result whatever a removed channel holds, since its weights for the
channel go as well. For a plain sum over channels, or a product of two activations, it matters: there a channel may only
go if it is zero when it is removed. Where it is not, it is pinned. What each operation does to zeros stands in its
record.

A norm over channels runs over those that are kept, so it does not matter there either, as long as nothing of the kept
channels or the inputs is left in a removed one. ``sigmoid(x)`` is one half there, which the norm does without; after
``x + x.sum(-1, keepdim=True)`` it would do without a sum of kept channels, and the channel is pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from structprune.coupling.propagate import Channels
from structprune.ops import op_of
from structprune.ops.arguments import tensors
from structprune.ops.relations import Axes, Axis
from structprune.ops.zeros import MOVES, ZeroContext, Zeros, unknown
from structprune.tracing.trace import Trace, describe, part_of


def pin_what_is_not_zero(trace: Trace, channels: Channels) -> None:
    """Pin the channels that may not go, because an operation sums over them where they are not zero: one walk.

    With norms over channels, a second walk pins those that hold something of others where they are removed.
    """
    zeros: list[Any] = []

    def pin(axis: Axis, node: fx.Node) -> None:
        where = describe(node, trace)
        channels.relations.pin(axis, f"a channel that is off is not zero there, and is summed over by {where}")

    context = ZeroContext(channels.axes, zeros, pin)
    memory = Memory(channels.axes, zeros)
    for node in trace.all_nodes:
        zeros.append(_known(node, channels, zeros, partial(_zeros, context, node, channels.unforeseen)))
        memory.note(node)
    if channels.relations.reductions:
        _pin_what_holds_others(trace, channels)


def _pin_what_holds_others(trace: Trace, channels: Channels) -> None:
    """Pin what a norm runs over where a removed channel holds what kept channels, the inputs or the forward decide."""
    constant: list[Any] = []
    zeros: list[Any] = []
    of_constants = ZeroContext(channels.axes, constant, lambda axis, node: None)
    of_zeros = ZeroContext(channels.axes, zeros, lambda axis, node: None, put_there=False)
    memories = [Memory(channels.axes, zeros), Memory(channels.axes, constant)]
    for node in trace.all_nodes:
        zeros.append(_known(node, channels, zeros, partial(_zeros, of_zeros, node, channels.unforeseen)))
        here = _known(node, channels, constant, partial(_constant, of_constants, node, trace.held))
        constant.append(_either(here, zeros[-1]))
        for memory in memories:
            memory.note(node)
    for reduction in channels.relations.reductions:
        node = trace.all_nodes[reduction.node]
        record = op_of(node.meta["name"])
        if record is not None and record.over_kept is None:
            continue  # a sum: zeros in it change nothing, wherever they come from
        known = constant[tensors(node)[0].meta["index"]]
        for dim, axis in zip(reduction.dims, reduction.axes, strict=True):
            if not known[dim]:
                where = describe(node, trace)
                reason = f"a channel that is off holds more than its own there, and is normalised over by {where}"
                channels.relations.pin(axis, reason)


def _either(a: Any, b: Any) -> Any:
    """Which of the dimensions are true in one of two results, each of one tensor or of a list of them."""
    if isinstance(a, list):
        return [_either(mine, other) for mine, other in zip(a, b, strict=True)]
    return tuple(mine or other for mine, other in zip(a, b, strict=True))


def _constant(context: ZeroContext, node: fx.Node, held: frozenset[fx.Node], axes: Axes) -> Zeros:
    """For each dimension, whether a removed index of it holds a value that neither kept channels nor inputs decide.

    What of the arguments has the dimension must be constant there, what has not must be computed from parameters alone:

        x: (3, 8) of a linear layer                    (False, True)
        torch.sigmoid(x) + bias[0]                     (False, True)
        torch.sigmoid(x) + x[:, :1]                    (False, False)
    """
    context.node, context.axes = node, axes
    known = op_of(node.meta["name"])
    if node in held:  # numbers that index something say where it goes, not what is there
        dtype = node.meta.get("dtype", torch.float32)  # none with several results, which are cut from one
        return (dtype.is_floating_point or dtype.is_complex,) * len(axes)
    if node.meta.get("keeps_zeros") is not None:
        return context.of(node.meta["keeps_zeros"])
    if known is None:
        return unknown(context)
    if known.elementwise:
        backs = [dim - len(axes) for dim in range(len(axes))]
        return tuple(
            all(t in held or (context.whole(t, back) and context.of(t)[back]) for t in context.tensors)
            for back in backs
        )
    return known.zeros(context) if known.zeros in MOVES else unknown(context)


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
        """Take in the zeros of `node`; if it writes, fewer zeros are left in the tensors that share its memory."""
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


def _known(node: fx.Node, channels: Channels, known: list[Any], single: Callable[[Axes], Zeros]) -> Any:
    """What is known of a node's result by `single`, given its axes; a list for several results."""
    axes = channels.axes[node.meta["index"]]
    if node.meta["name"] == "part":
        parent, position = part_of(node)
        return known[parent.meta["index"]][position]
    if not isinstance(axes, list):
        return single(axes)
    parts: list[Axes | None] = axes
    zeros = single(next((part for part in parts if part is not None), ()))
    return [zeros if part is not None and len(part) == len(zeros) else (False,) * len(part or ()) for part in parts]


def _zeros(context: ZeroContext, node: fx.Node, unforeseen: frozenset[int], axes: Axes) -> Zeros:
    """For each dimension, whether all is zero at a removed index of it."""
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
