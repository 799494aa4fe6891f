"""Operations that rearrange dimensions: views, permutations, expansions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from structprune.ops import zeros
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.elementwise import same_shape
from structprune.ops.op import Indices, Result, Scaling, register_op
from structprune.ops.relations import UNIT, Row, Rows


def regroup(c: Context, rows: Rows, sizes: Sequence[int]) -> Rows:
    """Rows of the tensor after a view to `sizes`: runs of dimensions with equal products are merged and split."""
    if 0 in sizes:
        return c.fresh(sizes, "the tensor is empty")
    sources = [row for row in rows if row.size != 1]
    targets = [size for size in sizes if size != 1]
    result: list[Row] = []
    i = j = 0
    while i < len(sources) and j < len(targets):
        first, start = i, j
        left, right = sources[i].size, targets[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= sources[i].size
                i += 1
            else:
                right *= targets[j]
                j += 1
        flat = c.merged(sources[first:i])
        result += [flat] if j - start == 1 else c.split(flat, targets[start:j])
    rest = iter(result)
    return tuple(UNIT if size == 1 else next(rest) for size in sizes)


# A movement of one tensor: run on other entries, it tells where each of them goes.
MOVES: dict[str, Any] = {"zeros": zeros.moved, "moves": True, "scaling": Scaling.MOVES, "indices": Indices.PASSED}
VIEWS: dict[str, Any] = MOVES | {"views": True}


@register_op("view", "reshape", **VIEWS)
def view(c: Context, x: Operand, sizes: Any) -> Result:
    """A new shape for the same entries, in the same order."""
    if isinstance(sizes, torch.dtype):
        return c.pin_all([x], f"its entries are reinterpreted by {c.where()}")
    rows = regroup(c, x.rows, c.shape)
    for size, row in zip(sizes, rows, strict=True):
        c.expect(size, row)
    return rows


@register_op("view_as", "reshape_as", zeros=zeros.moved_first, indices=Indices.PASSED, views=True)
def view_as(c: Context, x: Operand, other: Operand) -> Rows:
    """The shape of another tensor: the sizes follow it."""
    rows = regroup(c, x.rows, c.shape)
    return tuple(c.same(row, like) for row, like in zip(rows, other.rows, strict=True))


@register_op("flatten", "ravel", **VIEWS)
def flatten(c: Context, x: Operand, *_: Any, **__: Any) -> Rows:
    """Neighbouring dimensions become one."""
    return regroup(c, x.rows, c.shape)


@register_op("unflatten", **VIEWS)
def unflatten(c: Context, x: Operand, dim: int, sizes: Sequence[Any], *_: Any) -> Rows:
    """One dimension becomes several."""
    at = x.dim(dim)
    parts = c.split(x.rows[at], c.shape[at : at + len(sizes)])
    for size, row in zip(sizes, parts, strict=True):
        c.expect(size, row)
    return (*x.rows[:at], *parts, *x.rows[at + 1 :])


@register_op("unsqueeze", **VIEWS)
def unsqueeze(c: Context, x: Operand, dim: int) -> Rows:
    """A new dimension of size 1."""
    at = int(dim) % (len(x.rows) + 1)
    return (*x.rows[:at], UNIT, *x.rows[at:])


@register_op("squeeze", **VIEWS)
def squeeze(c: Context, x: Operand, chosen: Any = None) -> Rows:
    """Dimensions of size 1 disappear."""
    which = range(len(x.rows)) if chosen is None else chosen if isinstance(chosen, (tuple, list)) else (chosen,)
    gone = {x.dim(dim) for dim in which}
    return tuple(row for at, row in enumerate(x.rows) if row.size != 1 or at not in gone)


@register_op("transpose", **VIEWS)
def transpose(c: Context, x: Operand, dim0: int, dim1: int) -> Rows:
    """Two dimensions change places."""
    rows = list(x.rows)
    a, b = x.dim(dim0), x.dim(dim1)
    rows[a], rows[b] = rows[b], rows[a]
    return tuple(rows)


@register_op("permute", **VIEWS)
def permute(c: Context, x: Operand, dims: Sequence[int]) -> Rows:
    """Dimensions in another order."""
    return tuple(x.rows[x.dim(dim)] for dim in dims)


@register_op("movedim", **VIEWS)
def movedim(c: Context, x: Operand, source: Any, destination: Any) -> Rows:
    """Some dimensions move, the others keep their order."""
    sources = [x.dim(dim) for dim in (source if isinstance(source, (tuple, list)) else (source,))]
    targets = [x.dim(dim) for dim in (destination if isinstance(destination, (tuple, list)) else (destination,))]
    placed = dict(zip(targets, sources, strict=True))
    rest = iter([dim for dim in range(len(x.rows)) if dim not in sources])
    return tuple(x.rows[placed[at] if at in placed else next(rest)] for at in range(len(x.rows)))


@register_op("T", "t", "mT", "H", "mH", "adjoint", "numpy_T", **VIEWS)
def transposed(c: Context, x: Operand, *_: Any) -> Rows:
    """The last two dimensions, or all of them for ``T``, in reverse."""
    if c.node.meta["name"] in ("T", "numpy_T"):
        return x.rows[::-1]
    return (*x.rows[:-2], *x.rows[-2:][::-1])


@register_op("expand", "broadcast_to", **VIEWS)
def expand(c: Context, x: Operand, sizes: Sequence[Any], *_: Any, **__: Any) -> Rows:
    """Dimensions of size 1 are repeated; the repeats are channels that may go."""
    rows = (*([UNIT] * (len(sizes) - len(x.rows))), *x.rows)
    result: list[Row] = []
    for size, target, row in zip(sizes, c.shape, rows, strict=True):
        new = row if row.size == target else c.new_axis(target)
        c.expect(size, new)
        result.append(new)
    return tuple(result)


@register_op("expand_as", zeros=zeros.kept, indices=Indices.PASSED, views=True)
def expand_as(c: Context, x: Operand, other: Operand) -> Rows:
    """`x` repeated to the shape of `other`."""
    return c.broadcast([x, other])


@register_op("repeat", "tile", zeros=zeros.moved, indices=Indices.PASSED)
def repeat(c: Context, x: Operand, times: Sequence[Any]) -> Rows:
    """Copies one after the other."""
    rows = (*([UNIT] * (len(c.shape) - len(x.rows))), *x.rows)
    times = (*([1] * (len(rows) - len(times))), *times)
    result: list[Row] = []
    for count, row in zip(times, rows, strict=True):
        copies = c.new_axis(int(count)) if row.free or row.size == 1 else Row(int(count), pin=row.pin)
        c.expect(count, copies)
        result.append(row if count == 1 else c.merged([copies, row]))
    return tuple(result)


@register_op("repeat_interleave", zeros=zeros.moved)
def repeat_interleave(c: Context, x: Operand, repeats: Any, dim: int | None = None, **_: Any) -> Result:
    """Each channel several times in a row."""
    rows = x.rows if dim is not None else (c.merged(x.rows),)
    at = x.dim(dim) if dim is not None else 0
    row = rows[at]
    if not isinstance(repeats, int):
        reason = f"how often it is repeated is decided by data, in {c.where()}"
        for counted in (row, *(each for operand in operands_in(repeats) for each in operand.rows)):
            c.pin(counted, reason)
        return (*rows[:at], *c.fresh(c.shape[at : at + 1], reason), *rows[at + 1 :])
    copies = c.new_axis(int(repeats)) if row.free or row.size == 1 else Row(int(repeats), pin=row.pin)
    c.expect(repeats, copies)
    return (*rows[:at], c.merged([row, copies]), *rows[at + 1 :])


@register_op("flip", **MOVES)
def flip(c: Context, x: Operand, dims: Sequence[int]) -> Rows:
    """Channels in reverse order."""
    chosen = {x.dim(dim) for dim in dims}
    return tuple(
        Row(row.size, array=row.ids()[::-1].copy()) if at in chosen and row.free else row
        for at, row in enumerate(x.rows)
    )


@register_op("roll", zeros=zeros.moved, moves=True, scaling=Scaling.MOVES, shape=same_shape)
def roll(c: Context, x: Operand, shifts: Any, dims: Any = ()) -> Result:
    """A rotation counts positions, so what it rotates must stay."""
    if dims is None or dims in ((), []):
        return c.pin_all([x], f"it is rotated by {c.where()}")
    for dim in dims if isinstance(dims, (tuple, list)) else (dims,):
        c.pin(x.rows[x.dim(dim)], f"it is rotated by {c.where()}")
    return x.rows


@register_op("pixel_shuffle", "pixel_unshuffle", zeros=zeros.moved)
def pixel_shuffle(c: Context, x: Operand, factor: int) -> Rows:
    """Channels become pixels, or pixels channels: blocks of factor x factor stay whole."""
    *batch, channels, height, width = x.rows
    reason = f"it counts pixels in {c.where()}"
    pixels = c.fresh(c.shape[-2:], reason)
    for row in (height, width):
        c.pin(row, reason)
    block = Row(int(factor) ** 2, pin=reason)
    if c.node.meta["name"] == "pixel_unshuffle":
        return (*batch, c.merged([channels, block]), *pixels)
    kept, inner = c.split(channels, (channels.size // block.size, block.size))
    c.pin(inner, reason)
    return (*batch, kept, *pixels)


@register_op("channel_shuffle", "native_channel_shuffle", zeros=zeros.moved)
def channel_shuffle(c: Context, x: Operand, groups: int) -> Rows:
    """A grid of groups x channels, transposed."""
    row = x.rows[1]
    outer, inner = c.split(row, (int(groups), row.size // int(groups)))
    c.expect(groups, outer)
    return (x.rows[0], c.merged([inner, outer]), *x.rows[2:])
