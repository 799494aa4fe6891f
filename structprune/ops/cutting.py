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
from structprune.ops.relations import UNIT, Row, Rows
from structprune.tracing.provenance import plain

# Movements of one tensor into several.
PIECES: dict[str, Any] = VIEWS | {"indices": Indices.USED}


def piece_of(c: Context, row: Row, start: int | None, stop: int | None) -> Row:
    """Channels `start` to `stop` of `row`: a piece that keeps at least one channel.

    A piece of none would broadcast against nothing, have no mean, and be everything where it counts from the end:
    ``x[-2:]`` of which both go would be ``x[0:]``.
    """
    part = row[start:stop]
    if row.free and 0 < part.size < row.size:
        if part.size == 1:
            c.pin(part, f"it is taken alone in {c.where()}")
        else:
            c.never_empty(part)
    return part


def cut(c: Context, row: Row, piece: slice) -> Row:
    """A slice of `row`; its bounds count living channels.

    Of 8 channels, ``x[2:6]`` counts those before 2 and before 6, ``x[-3:]`` those from 5 on.
    """
    start, stop, step = plain(piece).indices(row.size)
    if not row.free or (start == 0 and stop == row.size and step == 1):
        if row.free and c.tracked(piece.stop):
            c.expect(piece.stop, row)
        return row[start:stop:step]
    if step > 1 and row.size % step == 0 and start < step and stop == row.size:
        outer, inner = c.split(row, (row.size // step, step))
        c.pin(inner, f"every {step}th channel is taken in {c.where()}")
        return outer
    if step != 1:
        c.pin(row, f"every {step}th channel is taken in {c.where()}")
        return row[plain(piece)]
    for bound in (piece.start, piece.stop):
        if not isinstance(bound, int) or (abs(bound) >= row.size and not c.tracked(bound)):
            continue  # beyond the end it stays so
        if c.follows_input(bound):
            c.pin(row, f"how much of it is used depends on the inputs, in {c.where()}")
        if bound >= 0:
            c.expect(bound, row[: int(bound)])
        else:
            c.expect(-bound, piece_of(c, row, int(bound), None))
    return piece_of(c, row, start, stop)


@register_op("slice", **VIEWS)
def slice_of(c: Context, x: Operand, dim: int, start: Any = None, stop: Any = None, step: Any = 1) -> Rows:
    """``aten.slice``: a slice of one dimension."""
    at = x.dim(dim)
    return (*x.rows[:at], cut(c, x.rows[at], slice(start, stop, step)), *x.rows[at + 1 :])


@register_op("narrow", **VIEWS)
def narrow(c: Context, x: Operand, dim: int, start: Any, length: int) -> Rows:
    """A slice by start and length."""
    at = x.dim(dim)
    row = x.rows[at]
    if isinstance(start, Operand):
        c.pin(row, f"the start of its slice is decided by data in {c.where()}")
        return (*x.rows[:at], Row(int(length), pin=row.pin or "its start is data"), *x.rows[at + 1 :])
    first = int(start) % row.size if row.size else 0
    part = piece_of(c, row, first, first + int(length))
    if row.free:
        if start < 0:
            c.expect(-start, piece_of(c, row, int(start), None))
        else:
            c.expect(start, row[: int(start)])
        c.expect(length, part)
    return (*x.rows[:at], part, *x.rows[at + 1 :])


@register_op("unbind", **PIECES)
def unbind(c: Context, x: Operand, dim: int = 0) -> list[Rows | None]:
    """Every position of a dimension as a tensor of its own."""
    at = x.dim(dim)
    c.pin(x.rows[at], f"its positions are taken apart by {c.where()}")
    return [(*x.rows[:at], *x.rows[at + 1 :])] * x.rows[at].size


def _pieces(x: Operand, at: int, parts: Sequence[Row]) -> list[Rows | None]:
    return [(*x.rows[:at], part, *x.rows[at + 1 :]) for part in parts]


def _unequal(c: Context, x: Operand, at: int) -> list[Rows | None]:
    c.pin(x.rows[at], f"it is cut into unequal pieces by {c.where()}")
    bounds = np.cumsum([0, *(shape[at] for shape in c.shape)])
    return _pieces(x, at, [x.rows[at][int(a) : int(b)] for a, b in pairwise(bounds)])


@register_op("chunk", "unsafe_chunk", **PIECES)
def chunk(c: Context, x: Operand, chunks: Any = None, dim: int = 0, **_: Any) -> Result:
    """Equal sections keep equally many channels."""
    at = x.dim(dim)
    row = x.rows[at]
    if not isinstance(chunks, int) or row.size % int(chunks) or len(c.shape) != int(chunks):
        return _unequal(c, x, at)
    return _pieces(x, at, c.balanced(row, int(chunks)))


@register_op("tensor_split", "hsplit", "vsplit", "dsplit", **PIECES)
def tensor_split(c: Context, x: Operand, where: Any, dim: int = 0) -> Result:
    """Equal sections, or cuts before given positions."""
    name = c.node.meta["name"]
    if name != "tensor_split":
        dim = {"vsplit": 0, "dsplit": 2}.get(name, min(1, len(x.rows) - 1))
    at = x.dim(dim)
    if isinstance(where, int):
        return chunk(c, x, where, dim)
    if isinstance(where, Operand):
        c.pin_all([where], f"it says where {c.where()} cuts")
        return _unequal(c, x, at)
    bounds = [None, *where, None]
    return _pieces(x, at, [cut(c, x.rows[at], slice(a, b)) for a, b in pairwise(bounds)])


@register_op("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "python.split", **PIECES)
def split(c: Context, x: Operand, sizes: Any, dim: int = 0) -> Result:
    """Sections of one size, or of sizes of their own."""
    at = x.dim(dim)
    row = x.rows[at]
    if isinstance(sizes, int):
        if row.size % int(sizes):
            return _unequal(c, x, at)
        parts = c.balanced(row, row.size // int(sizes))
        c.expect(sizes, parts[0])
        return _pieces(x, at, parts)
    bounds = np.cumsum([0, *(int(size) for size in sizes)])
    parts = tuple(piece_of(c, row, int(a), int(b)) for a, b in pairwise(bounds))
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
def cat(c: Context, tensors: Sequence[Operand], dim: int = 0, **_: Any) -> Rows:
    """One after the other along `dim`; the same in every other dimension."""
    tensors = [tensor for tensor in tensors if tensor.shape != (0,)]
    at = tensors[0].dim(dim)
    rows = list(tensors[0].rows)
    for other in range(len(rows)):
        if other != at:
            for tensor in tensors[1:]:
                rows[other] = c.same(rows[other], tensor.rows[other])
    rows[at] = c.concatenated([tensor.rows[at] for tensor in tensors])
    return tuple(rows)


@register_op("hstack", "vstack", "dstack", "column_stack", zeros=zeros.moved, scaling=Scaling.SUM)
def cat_at_least(c: Context, tensors: Sequence[Operand], *_: Any) -> Result:
    """``cat``, of tensors with too few dimensions made up to as many as it takes."""
    name = c.node.meta["name"]
    flat = max(len(tensor.rows) for tensor in tensors) <= 1

    def padded(rows: Rows) -> Rows:
        if name == "hstack":
            return rows or (UNIT,)
        if name == "column_stack":
            return (*rows, *[UNIT] * (2 - len(rows)))
        # One dimension becomes (1, n) and (1, n, 1), two become (m, n, 1).
        rows = (*[UNIT] * (2 - len(rows)), *rows)
        return (*rows, UNIT) if name == "dstack" and len(rows) == 2 else rows

    dim = {"vstack": 0, "dstack": 2, "column_stack": 1}.get(name, 0 if flat else 1)
    return cat(c, [Operand(tensor.node, padded(tensor.rows)) for tensor in tensors], dim)


@register_op("stack", zeros=zeros.moved, scaling=Scaling.SUM)
def stack(c: Context, tensors: Sequence[Operand], dim: int = 0, **_: Any) -> Rows:
    """A new dimension that numbers the tensors."""
    rows = list(c.broadcast(list(tensors)))
    at = int(dim) % (len(rows) + 1)
    rows.insert(at, c.fresh([len(tensors)], f"it numbers the tensors stacked by {c.where()}")[0])
    return tuple(rows)


@register_op("block_diag", zeros=zeros.moved)
def block_diag(c: Context, tensors: Sequence[Operand]) -> Rows:
    """Matrices one after the other in both dimensions, and zeros around them."""
    matrices = [(*[UNIT] * (2 - len(tensor.rows)), *tensor.rows) for tensor in tensors]
    return tuple(c.concatenated([rows[dim] for rows in matrices]) for dim in range(2))
