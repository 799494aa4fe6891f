"""Operations that cut a dimension into pieces, or join tensors along one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.ops import zeros
from structprune.ops.context import Context, Operand
from structprune.ops.movement import VIEWS
from structprune.ops.op import Indices, Result, Scaling, register_op
from structprune.ops.relations import UNIT, Axes, Axis
from structprune.tracing.provenance import plain

# Movements of one tensor into several.
PIECES: dict[str, Any] = VIEWS | {"indices": Indices.USED}


def piece_of(c: Context, axis: Axis, start: int | None, stop: int | None) -> Axis:
    """Channels `start` to `stop` of `axis`: a piece that keeps at least one channel.

    A piece of none would broadcast against nothing, have no mean, and be everything where it counts from the end:
    ``x[-2:]`` of which both go would be ``x[0:]``.
    """
    part = axis[start:stop]
    if axis.free and 0 < part.size < axis.size:
        if part.size == 1:
            c.pin(part, f"it is taken alone in {c.where()}")
        else:
            c.never_empty(part)
    return part


def cut(c: Context, axis: Axis, piece: slice) -> Axis:
    """A slice of `axis`; its bounds count kept channels.

    Of 8 channels, ``x[2:6]`` counts those before 2 and before 6, ``x[-3:]`` those from 5 on.
    """
    start, stop, step = plain(piece).indices(axis.size)
    if not axis.free or (start == 0 and stop == axis.size and step == 1):
        if axis.free and c.tracked(piece.stop):
            c.expect(piece.stop, axis)
        return axis[start:stop:step]
    if step != 1:
        return _every(c, axis, plain(piece))
    for bound in (piece.start, piece.stop):
        if isinstance(bound, int) and (abs(bound) < axis.size or c.tracked(bound)):  # beyond the end it stays so
            _count_bound(c, axis, bound)
    return piece_of(c, axis, start, stop)


def _every(c: Context, axis: Axis, piece: slice) -> Axis:
    """Channels with a step: ``x[1::2]`` of 8 are those of 4 pairs, whose number in the pair stays."""
    start, stop, step = piece.indices(axis.size)
    reason = f"every {step}th channel is taken in {c.where()}"
    if step > 1 and axis.size % step == 0 and start < step and stop == axis.size:
        outer, inner = c.split(axis, (axis.size // step, step))
        c.pin(inner, reason)
        return outer
    c.pin(axis, reason)
    return axis[piece]


def _count_bound(c: Context, axis: Axis, bound: int) -> None:
    if c.follows_input(bound):
        c.pin(axis, f"how much of it is used depends on the inputs, in {c.where()}")
    if bound >= 0:
        c.expect(bound, axis[: int(bound)])
    else:
        c.expect(-bound, piece_of(c, axis, int(bound), None))


@register_op("slice", **VIEWS)
def slice_of(c: Context, x: Operand, dim: int, start: Any = None, stop: Any = None, step: Any = 1) -> Axes:
    """``aten.slice``: a slice of one dimension."""
    at = x.dim(dim)
    return (*x.axes[:at], cut(c, x.axes[at], slice(start, stop, step)), *x.axes[at + 1 :])


@register_op("narrow", **VIEWS)
def narrow(c: Context, x: Operand, dim: int, start: Any, length: int) -> Axes:
    """A slice by start and length."""
    at = x.dim(dim)
    axis = x.axes[at]
    if isinstance(start, Operand):
        c.pin(axis, f"the start of its slice is decided by data in {c.where()}")
        return (*x.axes[:at], Axis(int(length), pin=axis.pin or "its start is data"), *x.axes[at + 1 :])
    first = int(start) % axis.size if axis.size else 0
    part = piece_of(c, axis, first, first + int(length))
    if axis.free:
        if start < 0:
            c.expect(-start, piece_of(c, axis, int(start), None))
        else:
            c.expect(start, axis[: int(start)])
        c.expect(length, part)
    return (*x.axes[:at], part, *x.axes[at + 1 :])


@register_op("unbind", **PIECES)
def unbind(c: Context, x: Operand, dim: int = 0) -> list[Axes | None]:
    """Every position of a dimension as a tensor of its own."""
    at = x.dim(dim)
    c.pin(x.axes[at], f"its positions are taken apart by {c.where()}")
    return [(*x.axes[:at], *x.axes[at + 1 :])] * x.axes[at].size


def _pieces(x: Operand, at: int, parts: Sequence[Axis]) -> list[Axes | None]:
    return [(*x.axes[:at], part, *x.axes[at + 1 :]) for part in parts]


def _unequal(c: Context, x: Operand, at: int) -> list[Axes | None]:
    c.pin(x.axes[at], f"it is cut into unequal pieces by {c.where()}")
    bounds = np.cumsum([0, *(shape[at] for shape in c.shape)])
    return _pieces(x, at, [x.axes[at][int(a) : int(b)] for a, b in pairwise(bounds)])


@register_op("chunk", "unsafe_chunk", **PIECES)
def chunk(c: Context, x: Operand, chunks: Any = None, dim: int = 0, **_: Any) -> Result:
    """Equal sections keep equally many channels."""
    at = x.dim(dim)
    axis = x.axes[at]
    if not isinstance(chunks, int) or axis.size % int(chunks) or len(c.shape) != int(chunks):
        return _unequal(c, x, at)
    return _pieces(x, at, c.balanced(axis, int(chunks)))


@register_op("tensor_split", "hsplit", "vsplit", "dsplit", **PIECES)
def tensor_split(c: Context, x: Operand, where: Any, dim: int = 0) -> Result:
    """Equal sections, or cuts before given positions."""
    name = c.node.meta["name"]
    if name != "tensor_split":
        dim = {"vsplit": 0, "dsplit": 2}.get(name, min(1, len(x.axes) - 1))
    at = x.dim(dim)
    if isinstance(where, int):
        return chunk(c, x, where, dim)
    if isinstance(where, Operand):
        c.pin_all([where], f"it says where {c.where()} cuts")
        return _unequal(c, x, at)
    bounds = [None, *where, None]
    return _pieces(x, at, [cut(c, x.axes[at], slice(a, b)) for a, b in pairwise(bounds)])


@register_op("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "python.split", **PIECES)
def split(c: Context, x: Operand, sizes: Any, dim: int = 0) -> Result:
    """Sections of one size, or of sizes of their own."""
    at = x.dim(dim)
    axis = x.axes[at]
    if isinstance(sizes, int):
        if axis.size % int(sizes):
            return _unequal(c, x, at)
        parts = c.balanced(axis, axis.size // int(sizes))
        c.expect(sizes, parts[0])
        return _pieces(x, at, parts)
    bounds = np.cumsum([0, *(int(size) for size in sizes)])
    parts = tuple(piece_of(c, axis, int(a), int(b)) for a, b in pairwise(bounds))
    for size, part in zip(sizes, parts, strict=True):
        c.expect(size, part)
    return _pieces(x, at, parts)


# -- joining ---------------------------------------------------------------------------------------------------------


def _cat_shape(tensors: Any, dim: Any = 0, **named: Any) -> Tensor | None:
    first = tensors[0]
    at = int(dim) % first.dim()
    rest = (*first.shape[:at], *first.shape[at + 1 :])
    for t in tensors:
        if t.dtype != first.dtype or (*t.shape[:at], *t.shape[at + 1 :]) != rest:
            return None
    shape = (*first.shape[:at], sum(t.shape[at] for t in tensors), *first.shape[at + 1 :])
    return None if named else torch.empty(shape, dtype=first.dtype, device=first.device)


@register_op("cat", zeros=zeros.moved, scaling=Scaling.SUM, shape=_cat_shape)
def cat(c: Context, tensors: Sequence[Operand], dim: int = 0, **_: Any) -> Axes:
    """One after the other along `dim`; the same in every other dimension."""
    tensors = [tensor for tensor in tensors if tensor.shape != (0,)]
    at = tensors[0].dim(dim)
    axes = list(tensors[0].axes)
    for other in range(len(axes)):
        if other != at:
            for tensor in tensors[1:]:
                axes[other] = c.same(axes[other], tensor.axes[other])
    axes[at] = c.concatenated([tensor.axes[at] for tensor in tensors])
    return tuple(axes)


@register_op("hstack", "vstack", "dstack", "column_stack", zeros=zeros.moved, scaling=Scaling.SUM)
def cat_at_least(c: Context, tensors: Sequence[Operand], *_: Any) -> Result:
    """``cat``, of tensors with too few dimensions made up to as many as it takes."""
    name = c.node.meta["name"]
    flat = max(len(tensor.axes) for tensor in tensors) <= 1

    def padded(axes: Axes) -> Axes:
        if name == "hstack":
            return axes or (UNIT,)
        if name == "column_stack":
            return (*axes, *[UNIT] * (2 - len(axes)))
        # One dimension becomes (1, n) and (1, n, 1), two become (m, n, 1).
        axes = (*[UNIT] * (2 - len(axes)), *axes)
        return (*axes, UNIT) if name == "dstack" and len(axes) == 2 else axes

    dim = {"vstack": 0, "dstack": 2, "column_stack": 1}.get(name, 0 if flat else 1)
    return cat(c, [Operand(tensor.node, padded(tensor.axes)) for tensor in tensors], dim)


@register_op("stack", zeros=zeros.moved, scaling=Scaling.SUM)
def stack(c: Context, tensors: Sequence[Operand], dim: int = 0, **_: Any) -> Axes:
    """A new dimension that numbers the tensors."""
    axes = list(c.broadcast(list(tensors)))
    at = int(dim) % (len(axes) + 1)
    axes.insert(at, c.fresh([len(tensors)], f"it numbers the tensors stacked by {c.where()}")[0])
    return tuple(axes)


@register_op("block_diag", zeros=zeros.moved)
def block_diag(c: Context, tensors: Sequence[Operand]) -> Axes:
    """Matrices one after the other in both dimensions, and zeros around them."""
    matrices = [(*[UNIT] * (2 - len(tensor.axes)), *tensor.axes) for tensor in tensors]
    return tuple(c.concatenated([axes[dim] for axes in matrices]) for dim in range(2))
