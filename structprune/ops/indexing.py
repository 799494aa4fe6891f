"""Operations that pick, cut and join channels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.ops import zeros
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.movement import VIEWS
from structprune.ops.op import Contraction, Indices, Result, Scaling, register_op
from structprune.ops.relations import UNIT, Row, Rows
from structprune.tracing.provenance import plain

# Movements of one tensor into several.
PIECES: dict[str, Any] = VIEWS | {"indices": Indices.USED}


def _last(z: zeros.ZeroContext) -> zeros.Zeros:
    """Zero in the last dimension, whose parameters are removed."""
    return (False,) * (len(z.rows) - 1) + (True,)


def _cat_shape(tensors: Any, dim: Any = 0, **named: Any) -> Tensor | None:
    first = tensors[0]
    at = int(dim) % first.dim()
    rest = (*first.shape[:at], *first.shape[at + 1 :])
    for t in tensors:
        if t.dtype != first.dtype or (*t.shape[:at], *t.shape[at + 1 :]) != rest:
            return None
    shape = (*first.shape[:at], sum(t.shape[at] for t in tensors), *first.shape[at + 1 :])
    return None if named else torch.empty(shape, dtype=first.dtype, device=first.device)


def select_row(c: Context, row: Row, index: int) -> None:
    """Index `index` of `row` is picked by number: it and all that count before it must stay."""
    index = int(index)
    if index in (0, -1) and not c.node.users:
        return  # only its other dimensions are asked for, and any row has a first and a last channel
    counted = row[: index + 1] if index >= 0 else row[row.size + index :]
    c.pin(counted, f"it is picked by number in {c.where()}")


def cut(c: Context, row: Row, piece: slice) -> Row:
    """A slice of `row`; its bounds count living channels."""
    start, stop, step = plain(piece).indices(row.size)
    if not row.free or (start == 0 and stop == row.size and step == 1):
        if row.free and isinstance(piece.stop, int):
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
        if isinstance(bound, int):
            if c.follows_input(bound):
                c.pin(row, f"how much of it is used depends on the inputs, in {c.where()}")
            counted = row[: int(bound)] if bound >= 0 else row[int(bound) :]
            c.expect(bound if bound >= 0 else -bound, counted)
    if stop - start == 1:
        c.pin(row[start:stop], f"it is taken alone in {c.where()}")  # a piece of no channels would not broadcast
    return row[start:stop]


def _expanded(x: Operand, index: Any) -> list[Any]:
    """The index as a list with one entry for each dimension, plus those that are None."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if isinstance(index, list) and not any(isinstance(item, (Operand, slice, type(None))) for item in index):
        items = [index]
    used = sum(item is not None and item is not Ellipsis and not isinstance(item, bool) for item in items)
    full = [slice(None)] * (len(x.rows) - used)
    if Ellipsis in [item for item in items if not isinstance(item, Operand)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        return [*items[:at], *full, *items[at + 1 :]]
    return items + full


def indexed(c: Context, x: Operand, index: Any, shape: Sequence[int]) -> Rows | None:
    """Rows of ``x[index]``, a tensor of `shape`; None where an index of tensors is too involved."""
    picked = index if isinstance(index, (tuple, list)) else (index,)
    if any(isinstance(item, bool) for item in picked):
        return None
    tensors = [item for item in picked if isinstance(item, (Operand, list))]
    if any(isinstance(item, Operand) and item.node.meta["dtype"].__str__() in ("torch.bool", "torch.uint8")
           for item in tensors):  # fmt: skip
        return None
    result: list[Row] = []
    places: list[int] = []
    at = 0
    for item in _expanded(x, index):
        if item is None:
            result.append(UNIT)
            continue
        row = x.rows[at]
        at += 1
        if isinstance(item, slice):
            result.append(cut(c, row, item))
        elif isinstance(item, (Operand, list)):
            if not (isinstance(item, Operand) and c.counts(item, row)):
                c.pin(row, f"it is indexed by a tensor in {c.where()}")
            places.append(len(result))
        else:
            select_row(c, row, item)
            if tensors:
                places.append(len(result))
    if tensors:
        width = len(shape) - len(result)
        adjacent = all(place == places[0] for place in places)
        first = places[0] if adjacent else 0
        reason = f"it is looked up by data in {c.where()}"
        operands = [item for item in tensors if isinstance(item, Operand)]
        found = c.broadcast([*operands, Operand(c.node, c.fresh(shape[first : first + width], reason))]
                            if len(operands) < len(tensors) else operands)  # fmt: skip
        result[first:first] = found
    return tuple(result)


@register_op("getitem", **VIEWS)
def getitem(c: Context, x: Operand, index: Any) -> Result:
    """Slices, single positions, and tensors of positions."""
    rows = indexed(c, x, index, c.shape)
    return c.pin_all([x], f"it is indexed by a mask in {c.where()}") if rows is None else rows


@register_op("setitem", zeros=zeros.moved)
def setitem(c: Context, x: Operand, index: Any, value: Any) -> Rows:
    """A write into a slice: what is written has the channels of the place."""
    if not isinstance(value, Operand):
        shape: list[int] = []
    else:
        shape = list(value.shape)
    rows = indexed(c, x, index, shape)
    if rows is None:
        c.pin_all([x, *operands_in(value)], f"it is written through a mask in {c.where()}")
    elif isinstance(value, Operand):
        c.broadcast([Operand(x.node, rows), value])
    return x.rows


@register_op("select", **VIEWS)
def select(c: Context, x: Operand, dim: int, index: int) -> Rows:
    """One position of a dimension."""
    at = x.dim(dim)
    select_row(c, x.rows[at], index)
    return (*x.rows[:at], *x.rows[at + 1 :])


@register_op("narrow", **VIEWS)
def narrow(c: Context, x: Operand, dim: int, start: int, length: int) -> Result:
    """A slice by start and length."""
    if not isinstance(start, int):
        return c.pin_all([x], f"the start of its slice is decided by data in {c.where()}")
    at = x.dim(dim)
    row = x.rows[at]
    part = row[int(start) : int(start) + int(length)]
    if row.free:
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


@register_op("chunk", "tensor_split", "unsafe_chunk", **PIECES)
def chunk(c: Context, x: Operand, chunks: Any = None, dim: int = 0, **_: Any) -> Result:
    """Equal sections keep equally many channels."""
    at = x.dim(dim)
    row = x.rows[at]
    if not isinstance(chunks, int) or row.size % int(chunks) or len(c.shape) != int(chunks):
        return _unequal(c, x, at)
    return _pieces(x, at, c.balanced(row, int(chunks)))


def _unequal(c: Context, x: Operand, at: int) -> list[Rows | None]:
    c.pin(x.rows[at], f"it is cut into unequal pieces by {c.where()}")
    bounds = np.cumsum([0, *(shape[at] for shape in c.shape)])
    return _pieces(x, at, [x.rows[at][int(a) : int(b)] for a, b in pairwise(bounds)])


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
    parts = tuple(row[int(a) : int(b)] for a, b in pairwise(bounds))
    for size, part in zip(sizes, parts, strict=True):
        c.expect(size, part)
    return _pieces(x, at, parts)


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


@register_op("stack", zeros=zeros.moved, scaling=Scaling.SUM)
def stack(c: Context, tensors: Sequence[Operand], dim: int = 0, **_: Any) -> Rows:
    """A new dimension that numbers the tensors."""
    rows = list(c.broadcast(list(tensors)))
    at = int(dim) % (len(rows) + 1)
    rows.insert(at, c.fresh([len(tensors)], f"it numbers the tensors stacked by {c.where()}")[0])
    return tuple(rows)


@register_op("index_select", zeros=zeros.moved, indices=Indices.PASSED)
def index_select(c: Context, x: Operand, dim: int, index: Operand) -> Rows:
    """Positions from a tensor."""
    at = x.dim(dim)
    if not c.counts(index, x.rows[at]):
        c.pin(x.rows[at], f"it is indexed by a tensor in {c.where()}")
    return (*x.rows[:at], *(index.rows or (UNIT,)), *x.rows[at + 1 :])


@register_op("gather", "take_along_dim", zeros=zeros.moved, indices=Indices.PASSED)
def gather(c: Context, x: Operand, dim: int, index: Operand, **_: Any) -> Rows:
    """One position for each entry of `index`."""
    at = x.dim(dim)
    reason = f"it is indexed by a tensor in {c.where()}"
    rows: list[Row] = []
    for place, (mine, theirs) in enumerate(zip(x.rows, index.rows, strict=True)):
        if place != at and mine.size == theirs.size:
            rows.append(c.same(mine, theirs))
            continue
        if place == at and c.counts(index, mine):
            rows.append(theirs)
            continue
        c.pin(mine, reason)
        rows.append(c.pin(theirs, reason))
    return tuple(rows)


def _added(z: zeros.ZeroContext) -> zeros.Zeros:
    """Rows of one tensor added to, or put in the place of, rows of another."""
    if z.node.meta["name"] not in ("index_add", "index_copy"):
        return zeros.unknown(z)
    x, source = z.of(z.tensors[0]), z.of(z.tensors[-1])
    return tuple(a and b for a, b in zip(x, source, strict=True)) if len(x) == len(source) else zeros.unknown(z)


@register_op("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", zeros=_added)
def scatter(c: Context, x: Operand, dim: int, index: Operand, *rest: Any, **kwargs: Any) -> Rows:
    """Writes at positions from a tensor."""
    at = x.dim(dim)
    reason = f"it is written at positions from a tensor in {c.where()}"
    sources = list(operands_in(rest, kwargs))
    c.pin(x.rows[at], reason)
    flat = c.node.meta["name"].startswith("index_")
    for source in [*([] if flat else [index]), *sources]:
        for place, row in enumerate(source.rows):
            if place != at and len(source.rows) == len(x.rows) and row.size == x.rows[place].size:
                c.same(x.rows[place], row)
            else:
                c.pin(row, reason)
    return x.rows


@register_op("python.embedding_bag", zeros=_last, contraction=Contraction("embedding", lambda _: ()))
def embedding_bag(
    c: Context, indices: Operand, weight: Operand, offsets: Operand | None = None, *_: Any, **named: Any
) -> Rows:
    """Sums or means of rows of the table."""
    for operand in operands_in(offsets, named):
        for row in operand.rows:
            c.pin(row, f"it counts the bags of {c.where()}")
    c.pin(weight.rows[0], "rows of an embedding table are looked up by data")
    for row in indices.rows:
        c.pin(row, f"it numbers the entries of the bags of {c.where()}")
    return (*c.fresh(c.shape[:-1], f"it numbers the bags of {c.where()}"), weight.rows[1])


@register_op("embedding", zeros=_last, contraction=Contraction("embedding", lambda _: ()))
def embedding(c: Context, weight: Operand, indices: Operand, *_: Any, **__: Any) -> Rows:
    """A row of the table for each index."""
    c.pin(weight.rows[0], "rows of an embedding table are looked up by data")
    return (*indices.rows, weight.rows[1])
