"""What stands in for operations of the original while its removed channels are switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.coupling.computed_weights import Normalised
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.ops.gains import Gain, effective
from structprune.ops.relations import ReducesOver
from structprune.tracing.replay import FoundCall

_WITH_SHAPE = frozenset({"layer_norm", "rms_norm"})
_SAME_SHAPE = _WITH_SHAPE | {"_weight_norm", "batch_norm", "instance_norm", "softmax", "_softmax", "python.softmax"}
# What these give does not change with channels that are zero.
SUMS = frozenset({
    "sum", "nansum", "count_nonzero", "any", "norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm",
    "frobenius_norm", "nuclear_norm", "renorm",
})  # fmt: skip


def norms_over_kept(graph: ChannelGraph, removed: Mask) -> Iterator[tuple[ReducesOver, list[Mask]]]:
    """The norms and means that run over what stays once `removed` is removed, with what is kept of their axes."""
    weights = {part.meta["index"] for normalised in graph.normalised for part in normalised.parts}
    for reduction in graph.channels.relations.reductions:
        if reduction.node not in weights and graph.trace.all_nodes[reduction.node].meta["name"] not in SUMS:
            masks = [~removed[graph.components.of(axis)] for axis in reduction.axes]
            if not all(mask.all() for mask in masks):
                yield reduction, masks


def over_kept_channels(dims: tuple[int, ...], masks: list[Mask], operation: FoundCall) -> Any:
    """Run a norm or a mean over the channels kept of axes that lose channels."""
    args, kwargs, name = operation.args, operation.kwargs, operation.call.name
    x: Tensor = args[0] if args else kwargs["input"]
    keep = [torch.from_numpy(np.flatnonzero(mask)).to(x.device) for mask in masks]
    rest: list[Any] = list(args[1:])
    if name == "group_norm":
        return _group_norm(operation.func, x, rest, kwargs, keep[0])
    small = _selected(x, dims, keep)
    if name in _WITH_SHAPE:
        first = x.dim() - len(rest[0])
        rest[0] = tuple(small.shape[first:])
        inner = [dim - first for dim in dims]
        rest[1:3] = [_selected(t, inner, keep) if isinstance(t, Tensor) else t for t in rest[1:3]]
    if name == "_weight_norm":
        length: Tensor = args[1]
        rest[0] = _selected(length, *_present(length, dims, keep))
    result = operation.func(small, *rest, **{key: value for key, value in kwargs.items() if key != "input"})
    if name == "topk":  # the choices are numbered as the original numbers them
        return torch.return_types.topk((result[0], keep[0][result[1]]))
    same = isinstance(result, Tensor) and result.dim() == x.dim() and name in _SAME_SHAPE
    return _scattered(result, x, dims, keep) if same else result


def _group_norm(func: Any, x: Tensor, rest: list[Any], kwargs: dict[str, Any], keep: Tensor) -> Tensor:
    size = x.shape[1] // int(rest[0])
    rest[0] = len(torch.unique(keep // size))
    rest[1:3] = [t.index_select(0, keep) if isinstance(t, Tensor) else t for t in rest[1:3]]
    return _scattered(func(x.index_select(1, keep), *rest, **kwargs), x, (1,), [keep])


def weights_kept(graph: ChannelGraph, removed: Mask) -> Iterator[tuple[int, Normalised, list[tuple[int, Mask]]]]:
    """The operations that give weights which are normalised, by number, with what is removed of their dimensions."""
    for normalised in graph.normalised:
        axes = graph.channels.axes[normalised.node.meta["index"]]
        gone = [(dim, removed[graph.components.of(axis)]) for dim, axis in enumerate(axes) if axis.free]
        if any(mask.any() for _, mask in gone):
            yield normalised.node.meta["index"], normalised, gone


def weight_kept(
    gain: Gain, tensors: Mapping[str, Tensor], gone: list[tuple[int, Mask]], operation: FoundCall
) -> Tensor:
    """The weight that the original computes, with those of removed channels zero."""
    like: Tensor = operation.args[0]
    result = effective(gain, tensors).to(like.dtype)
    for dim, mask in gone:
        result.index_fill_(dim, torch.from_numpy(np.flatnonzero(mask)).to(like.device), 0)
    return result


def off_over_off(operation: FoundCall) -> Any:
    """A quotient in which nothing over nothing is nothing: both belong to a channel that is off."""
    result, operands = operation(), operation.args
    if operation.call.inplace or len(operands) < 2 or not all(isinstance(operand, Tensor) for operand in operands[:2]):
        return result
    return torch.where((operands[0] == 0) & (operands[1] == 0), 0, result)


def nothing_of_nothing(operation: FoundCall) -> Tensor:
    """A weight over its norm, of which both are zero where the channel is off."""
    return operation().nan_to_num(0.0)


def _present(x: Tensor, dims: Sequence[int], keep: list[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Those of `dims` in which `x` is not broadcast."""
    pairs = [(dim, index) for dim, index in zip(dims, keep, strict=True) if x.shape[dim] != 1]
    return [dim for dim, _ in pairs], [index for _, index in pairs]


def _selected(x: Tensor, dims: Sequence[int], keep: list[Tensor]) -> Tensor:
    for dim, index in zip(dims, keep, strict=True):
        x = x.index_select(dim, index)
    return x


def _scattered(small: Tensor, like: Tensor, dims: Sequence[int], keep: list[Tensor]) -> Tensor:
    for dim, index in zip(dims, keep, strict=True):
        shape = list(small.shape)
        shape[dim] = like.shape[dim]
        small = small.new_zeros(shape).index_copy(dim, index, small)
    return small
