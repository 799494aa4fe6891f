"""Operations that pick channels: by number, by slices, by tensors of positions, by masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx

from structprune.ops import zeros
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.cutting import cut
from structprune.ops.movement import VIEWS
from structprune.ops.op import Contraction, Indices, Result, Scaling, register_op
from structprune.ops.relations import UNIT, Axes, Axis
from structprune.tracing.provenance import plain

MASKS = ("torch.bool", "torch.uint8")


def _last(z: zeros.ZeroContext) -> zeros.Zeros:
    """Zero in the last dimension, whose parameters are removed."""
    return (False,) * (len(z.axes) - 1) + (True,)


def select_row(c: Context, axis: Axis, index: int) -> None:
    """Index `index` of `axis` is picked by number: it and all that count before it must stay."""
    index = int(index)
    if index in (0, -1) and not c.node.users and c.node.meta["name"] != "setitem":
        return  # only its other dimensions are asked for, and any axis has a first and a last channel
    counted = axis[: index + 1] if index >= 0 else axis[axis.size + index :]
    c.pin(counted, f"it is picked by number in {c.where()}")


def _items(x: Operand, index: Any) -> list[Any] | None:
    """The index as a list with an entry for each dimension, plus those that are None; None where it is too involved.

    A mask stands for all the dimensions that it covers, and alone among slices.
    """
    items = _entries(index)
    if _too_involved(items):
        return None
    used = sum(item is not None and item is not Ellipsis for item in items)
    used += sum(len(mask.axes) - 1 for mask in filter(is_mask, items))
    full = [slice(None)] * (len(x.axes) - used)
    dots = next((at for at, item in enumerate(items) if item is Ellipsis), len(items))
    return [*items[:dots], *full, *items[dots + 1 :]]  # x[..., 0] of rank 3: [:, :, 0]


def _entries(index: Any) -> list[Any]:
    """The entries of an index, one for each of its commas; sequences of positions are lists."""
    # A list of numbers is one entry, a list of slices and tensors is what NumPy took for a tuple.
    whole = isinstance(index, list) and not any(
        isinstance(item, (Operand, slice, list, tuple, type(None), type(Ellipsis))) for item in index
    )
    items = [index] if whole or not isinstance(index, (tuple, list)) else list(index)
    return [list(item) if isinstance(item, (tuple, range)) else item for item in items]


def _too_involved(items: list[Any]) -> bool:
    """Whether an index holds lists of truth values, a mask beside other positions, or tensors beside their bounds."""
    looked_up = [item for item in items if isinstance(item, (Operand, list))]
    if any(map(_holds_bool, items)) or (looked_up and any(map(_has_tensor_bound, items))):
        return True
    numbers = any(isinstance(item, int) for item in items)  # beside a mask they are expanded to its positions
    return any(map(is_mask, items)) and (len(looked_up) != 1 or numbers)


def is_mask(item: Any) -> TypeGuard[Operand]:
    """Whether an index says of each position whether it is taken."""
    return isinstance(item, Operand) and str(item.node.meta["dtype"]) in MASKS


def _holds_bool(item: Any) -> bool:
    return any(_holds_bool(inner) for inner in item) if isinstance(item, list) else isinstance(item, bool)


def _has_tensor_bound(item: Any) -> bool:
    return isinstance(item, slice) and any(isinstance(b, Operand) for b in (item.start, item.stop, item.step))


def indexed(c: Context, x: Operand, index: Any, shape: Sequence[int]) -> Axes | None:
    """Axes of ``x[index]``, a tensor of `shape`; None where the index is too involved."""
    items = _items(x, index)
    if items is None:
        return None
    tensors = [item for item in items if _looks_up(item)]
    result: list[Axis] = []
    places: list[int] = []  # where in the result each position that is looked up, or a number beside them, stood
    at = 0
    for item in items:
        covered = x.axes[at : at + _dims(item)]
        at += len(covered)
        if tensors and not (item is None or isinstance(item, slice) or is_mask(item)):
            places.append(len(result))
        result += _axes_of_entry(c, covered, item, shape[len(result) : len(result) + 1])
    if tensors:
        # x[:, [0, 2], i] has the positions in place of both dimensions, x[[0, 2], :, i] before all others.
        first = places[0] if all(place == places[0] for place in places) else 0
        result[first:first] = _found(c, tensors, shape[first : first + len(shape) - len(result)])
    return tuple(result)


def _looks_up(item: Any) -> bool:
    """Whether an entry of an index holds positions to look up."""
    return isinstance(item, (Operand, list)) and not is_mask(item)


def _axes_of_entry(c: Context, covered: Axes, item: Any, size: Sequence[int]) -> Axes:
    """The dimensions that one entry of an index leaves of those that it covers; `size` is theirs if it is one."""
    if item is None:
        return (UNIT,)
    if is_mask(item) or _has_tensor_bound(item):
        reason = f"a tensor says how much of it is used, in {c.where()}"
        for axis in (*covered, *(item.axes if is_mask(item) else ())):
            c.pin(axis, reason)
        return c.fresh(size, reason)
    (axis,) = covered
    if isinstance(item, slice):
        return (cut(c, axis, item),)
    if not isinstance(item, (Operand, list)):
        select_row(c, axis, item)
    elif not (isinstance(item, Operand) and c.counts(item, axis)):
        c.pin(axis, f"it is indexed by a tensor in {c.where()}")
    return ()


def _dims(item: Any) -> int:
    """How many dimensions one entry of an index covers."""
    return 0 if item is None else len(item.axes) if is_mask(item) else 1


def _found(c: Context, tensors: Sequence[Any], shape: Sequence[int]) -> Axes:
    """The dimensions, of sizes `shape`, that tensors and lists of positions make together."""
    operands = [item for item in tensors if isinstance(item, Operand)]
    if len(operands) < len(tensors):
        operands.append(Operand(c.node, c.fresh(shape, f"it is looked up by data in {c.where()}")))
    return c.broadcast(operands)


def tensors_of_index(index: Any) -> Iterator[Operand]:
    """The tensors in an index, in bounds of slices too."""
    for item in index if isinstance(index, (tuple, list)) else [index]:
        if isinstance(item, slice):
            yield from operands_in(item.start, item.stop, item.step)
        else:
            yield from operands_in(item)


@register_op("getitem", **VIEWS)
def getitem(c: Context, x: Operand, index: Any) -> Result:
    """Slices, single positions, and tensors of positions."""
    axes = indexed(c, x, index, c.shape)
    if axes is None:
        return c.pin_all([x, *tensors_of_index(index)], f"it is indexed by a mask in {c.where()}")
    return axes


@register_op("index", "_unsafe_index", zeros=zeros.moved)
def index_of(c: Context, x: Operand, indices: Sequence[Any]) -> Result:
    """``aten.index``: tensors of positions, None for a whole dimension."""
    return getitem(c, x, tuple(slice(None) if item is None else item for item in indices))


def _place(x: Operand, index: Any, value: Any) -> Sequence[int] | None:
    """The shape of the place that `value` is written to; None where no shape says it."""
    items = _items(x, index)
    if items is None or any(_has_tensor_bound(item) for item in items):
        return None

    def alike(item: Any) -> Any:
        if isinstance(item, list):
            return _first_places(item)
        return torch.empty(item.shape, dtype=torch.int64, device="meta") if isinstance(item, Operand) else plain(item)

    if masks := [item for item in items if is_mask(item)]:
        if isinstance(value, Operand):
            return None  # what is written is counted off along the mask
        at = items.index(masks[0])
        items[at : at + 1] = [slice(0, 1)] + [0] * (len(masks[0].axes) - 1)  # as many dimensions, of any size
    return torch.empty(x.shape, device="meta")[tuple(alike(item) for item in items)].shape


def _first_places(item: Any) -> Any:
    """A list of positions with 0 for each of those in tensors: ``[tensor(3), tensor(1)]`` becomes ``[0, 0]``."""
    if isinstance(item, list):
        return [_first_places(inner) for inner in item]
    return torch.zeros(item.shape, dtype=torch.int64).tolist() if isinstance(item, Operand) else plain(item)


def _written(z: zeros.ZeroContext) -> zeros.Zeros:
    """Zero where the tensor is and what is written there is: the number 0, or a tensor that is zero along it."""
    arguments: tuple[Any, ...] = z.node.args
    target, index, value = arguments
    assert isinstance(target, fx.Node)
    before = z.of(target)
    if isinstance(value, (int, float)) and value == 0:
        return before if z.put_there else _uncut(before, index)
    if not isinstance(value, fx.Node):
        return _untouched(before, index)
    result = list(_untouched(before, index))
    axes, given = z.axes_of(value), z.of(value)
    # x[i, :, 2:4] = v: from the end, dimension 2 of x is the last of v, dimension 1 the one before; i ends the walk.
    back = 0
    for dim, item in zip(range(-1, -len(before) - 1, -1), reversed(_per_dimension(index, len(before))), strict=False):
        if not isinstance(item, (int, slice)):
            break  # as far as the dimensions of the value are those of the place
        if isinstance(item, slice):
            back += 1
            whole = back <= len(axes) and axes[-back].size > 1
            result[dim] = before[dim] and whole and given[-back]
    return tuple(result)


def _uncut(before: zeros.Zeros, index: Any) -> zeros.Zeros:
    """`before` where no part of the channels is written: in ``x[:, 0, 2:4] = 0`` not along the last dimension.

    A mask or an index tensor picks whole positions.
    """
    items = _per_dimension(index, len(before))
    if len(items) != len(before):
        return before
    cut = [isinstance(item, slice) and item != slice(None) for item in items]
    return tuple(zero and not part for zero, part in zip(before, cut, strict=True))


def _per_dimension(index: Any, rank: int) -> list[Any]:
    """The entries of an index, with a slice for each dimension that it does not name: [0] of rank 3 is [0, :, :]."""
    items: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis not in [item for item in items if not isinstance(item, fx.Node)]:
        items.append(Ellipsis)
    dots = next(at for at, item in enumerate(items) if item is Ellipsis)
    items[dots : dots + 1] = [slice(None)] * (rank - sum(item is not None for item in items) + 1)
    return items


def _untouched(before: zeros.Zeros, index: Any) -> zeros.Zeros:
    """What stays zero whatever is written: a dimension of which channels are picked by number, so that they stay."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(item, (int, slice, type(Ellipsis))) for item in items):
        return (False,) * len(before)
    dots = next((at for at, item in enumerate(items) if item is Ellipsis), len(items))
    rest = items[dots + 1 :]
    by_number = [isinstance(item, int) for item in items[:dots]]
    by_number += [False] * (len(before) - dots - len(rest)) + [isinstance(item, int) for item in rest]
    return tuple(a and b for a, b in zip(before, by_number, strict=True))


@register_op("setitem", zeros=_written)
def setitem(c: Context, x: Operand, index: Any, value: Any) -> Axes:
    """A write into a slice: what is written has the channels of the place."""
    picking = list(tensors_of_index(index))
    shape = _place(x, index, value)
    axes = None if shape is None else indexed(c, x, index, shape)
    if axes is None:
        c.pin_all([x, *picking, *operands_in(value)], f"it is written through a mask in {c.where()}")
        return x.axes
    for operand in picking:
        for axis in operand.axes:
            c.pin(axis, f"it says where {c.where()} writes")
    if isinstance(value, Operand):
        c.broadcast([Operand(x.node, axes), value])
    return x.axes


@register_op("index_put", "_unsafe_index_put", "_index_put_impl", zeros=zeros.unknown)
def index_put(c: Context, x: Operand, indices: Sequence[Any], values: Operand, *_: Any, **__: Any) -> Result:
    """``x[indices] = values``, or added to what is there."""
    return setitem(c, x, tuple(slice(None) if item is None else item for item in indices), values)


@register_op("select", **VIEWS)
def select(c: Context, x: Operand, dim: int, index: int) -> Axes:
    """One position of a dimension."""
    at = x.dim(dim)
    select_row(c, x.axes[at], index)
    return (*x.axes[:at], *x.axes[at + 1 :])


@register_op("index_select", zeros=zeros.moved, indices=Indices.PASSED)
def index_select(c: Context, x: Operand, dim: int, index: Operand) -> Axes:
    """Positions from a tensor."""
    at = x.dim(dim)
    if not c.counts(index, x.axes[at]):
        c.pin(x.axes[at], f"it is indexed by a tensor in {c.where()}")
    return (*x.axes[:at], *(index.axes or (UNIT,)), *x.axes[at + 1 :])


@register_op("gather", zeros=zeros.moved, indices=Indices.PASSED)
def gather(c: Context, x: Operand, dim: int, index: Operand, **_: Any) -> Result:
    """One position for each entry of `index`, which may be shorter than `x` in the other dimensions."""
    reason = f"it is indexed by a tensor in {c.where()}"
    if len(x.axes) != len(index.axes):
        return c.pin_all([x, index], reason)
    at = x.dim(dim)
    axes: list[Axis] = []
    for place, (mine, theirs) in enumerate(zip(x.axes, index.axes, strict=True)):
        if place != at and mine.size == theirs.size:
            axes.append(c.same(mine, theirs))
            continue
        if place == at and c.counts(index, mine):
            axes.append(theirs)
            continue
        c.pin(mine, reason)
        axes.append(c.pin(theirs, reason))
    return tuple(axes)


@register_op("take_along_dim", zeros=zeros.moved)
def take_along_dim(c: Context, x: Operand, index: Operand, dim: int | None = None) -> Result:
    """`gather`, with `x` and `index` expanded to each other in the other dimensions."""
    reason = f"it is indexed by a tensor in {c.where()}"
    if dim is None:
        return c.pin_all([x, index], reason)
    at = x.dim(dim)
    c.pin(x.axes[at], reason)
    axes = list(c.broadcast([Operand(x.node, (*x.axes[:at], UNIT, *x.axes[at + 1 :])), index]))
    axes[at] = c.pin(index.axes[at], reason)
    return tuple(axes)


@register_op("take")
def take(c: Context, x: Operand, index: Operand) -> Axes:
    """Entries by their place in the flattened tensor."""
    for axis in x.axes:
        c.pin(axis, f"its entries are counted by {c.where()}")
    return index.axes


@register_op("searchsorted", "bucketize")
def searchsorted(c: Context, boundaries: Operand, x: Any, *_: Any, **named: Any) -> Axes:
    """How many of the sorted boundaries come before each value; each line of them has values of its own."""
    if c.node.meta["name"] == "bucketize":
        boundaries, x = x, boundaries
    reason = f"its entries are counted by {c.where()}"
    sorted_by = list(operands_in(named))
    for operand in (boundaries, *sorted_by):
        c.pin(operand.axes[-1], reason)
        if len(operand.axes) > 1:
            assert isinstance(x, Operand)
            for mine, theirs in zip(x.axes[:-1], operand.axes[:-1], strict=True):
                c.same(mine, theirs)
    return x.axes if isinstance(x, Operand) else ()


@register_op("python.embedding_bag", zeros=_last, contraction=Contraction("embedding", lambda _: ()))
def embedding_bag(
    c: Context, indices: Operand, weight: Operand, offsets: Operand | None = None, *rest: Any, **named: Any
) -> Axes:
    """Sums or means of rows of the table."""
    for operand in operands_in(offsets, rest, named):
        for axis in operand.axes:
            c.pin(axis, f"it counts the bags of {c.where()}")
    c.pin(weight.axes[0], "rows of an embedding table are looked up by data")
    for axis in indices.axes:
        c.pin(axis, f"it numbers the entries of the bags of {c.where()}")
    return (*c.fresh(c.shape[:-1], f"it numbers the bags of {c.where()}"), weight.axes[1])


_TABLE = Contraction("embedding", lambda _: (), weight="weight")


@register_op("embedding", zeros=_last, contraction=_TABLE, scaling=Scaling.LAYER, channel_dim=-1)
def embedding(c: Context, weight: Operand, indices: Operand, *_: Any, **__: Any) -> Axes:
    """An axis of the table for each index."""
    c.pin(weight.axes[0], "rows of an embedding table are looked up by data")
    return (*indices.axes, weight.axes[1])
