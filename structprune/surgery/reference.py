"""What replaces operations of the original while its removed channels are switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.coupling.computed_weights import Normalised
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.ops import op_of
from structprune.ops.gains import Gain, effective
from structprune.ops.kept import entries_kept
from structprune.ops.relations import ReducesOver
from structprune.tracing.replay import Hook, ReplayedCall


def norms_over_kept(graph: ChannelGraph, removed: Mask) -> Iterator[tuple[ReducesOver, list[Mask]]]:
    """The norms and means that run over what stays once `removed` is removed, with what is kept of their axes."""
    weights = {part.meta["index"] for normalised in graph.normalised for part in normalised.parts}
    for reduction in graph.channels.relations.reductions:
        known = op_of(graph.trace.all_nodes[reduction.node].meta["name"])
        if reduction.node not in weights and (known is None or known.over_kept is not None):
            masks = [~removed[graph.components.of(axis)] for axis in reduction.axes]
            if not all(mask.all() for mask in masks):
                yield reduction, masks


def over_kept_channels(graph: ChannelGraph, reduction: ReducesOver, masks: list[Mask]) -> Hook:
    """What runs a norm or a mean over the channels kept: those that `masks` keep of each axis."""
    axes = graph.channels.axes[reduction.node]
    known = op_of(graph.trace.all_nodes[reduction.node].meta["name"])
    run = entries_kept if known is None or known.over_kept is None else known.over_kept

    def hook(operation: ReplayedCall) -> Any:
        x: Tensor = operation.args[0] if operation.args else operation.kwargs["input"]
        indices = [torch.from_numpy(np.flatnonzero(mask)).to(x.device) for mask in masks]
        # A reduction leaves size 1, or nothing, of what it runs over.
        same = isinstance(axes, tuple) and len(axes) == x.dim() and all(axes[dim].free for dim in reduction.dims)
        return run(operation, dict(zip(reduction.dims, indices, strict=True)), same)

    return hook


def weights_kept(graph: ChannelGraph, removed: Mask) -> Iterator[tuple[int, Normalised, list[tuple[int, Mask]]]]:
    """The operations that give weights which are normalised, by number, with what is removed of their dimensions."""
    for normalised in graph.normalised:
        axes = graph.channels.axes[normalised.node.meta["index"]]
        gone = [(dim, removed[graph.components.of(axis)]) for dim, axis in enumerate(axes) if axis.free]
        if any(mask.any() for _, mask in gone):
            yield normalised.node.meta["index"], normalised, gone


def weight_kept(
    gain: Gain, tensors: Mapping[str, Tensor], gone: list[tuple[int, Mask]], operation: ReplayedCall
) -> Tensor:
    """The weight that the original computes, with those of removed channels zero."""
    like: Tensor = operation.args[0]
    result = effective(gain, tensors).to(like.dtype)
    for dim, mask in gone:
        result.index_fill_(dim, torch.from_numpy(np.flatnonzero(mask)).to(like.device), 0)
    return result


def zero_over_zero(operation: ReplayedCall) -> Any:
    """A quotient in which 0 / 0 is 0: both belong to a channel that is off."""
    result, operands = operation(), operation.args
    if operation.call.inplace or len(operands) < 2 or not all(isinstance(operand, Tensor) for operand in operands[:2]):
        return result
    return torch.where((operands[0] == 0) & (operands[1] == 0), 0, result)


def zero_weight_over_zero_norm(operation: ReplayedCall) -> Tensor:
    """A weight over its norm, of which both are zero where the channel is off."""
    return operation().nan_to_num(0.0)
