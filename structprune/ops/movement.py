"""Operations that rearrange dimensions: views, permutations, expansions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from structprune.ops.context import Context, Operand, Result, rule
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


def _sizes(args: tuple[Any, ...]) -> Sequence[Any]:
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


@rule("view", "reshape")
def view(c: Context, x: Operand, *shape: Any, **kwargs: Any) -> Result:
    """A new shape for the same entries, in the same order."""
    sizes = kwargs.get("shape", kwargs.get("size")) or _sizes(shape)
    if any(isinstance(size, torch.dtype) for size in sizes) or "dtype" in kwargs:
        return c.pin_all([x], f"its entries are reinterpreted by {c.where()}")
    rows = regroup(c, x.rows, c.shape)
    for size, row in zip(sizes, rows, strict=True):
        c.expect(size, row)
    return rows


@rule("view_as", "reshape_as")
def view_as(c: Context, x: Operand, other: Operand) -> Rows:
    """The shape of another tensor: the sizes follow it."""
    rows = regroup(c, x.rows, c.shape)
    return tuple(c.same(row, like) if row.free else row for row, like in zip(rows, other.rows, strict=True))


@rule("flatten", "ravel")
def flatten(c: Context, x: Operand, *_: Any, **__: Any) -> Rows:
    """Neighbouring dimensions become one."""
    return regroup(c, x.rows, c.shape)


@rule("unflatten")
def unflatten(c: Context, x: Operand, dim: int, sizes: Sequence[Any], *_: Any) -> Rows:
    """One dimension becomes several."""
    at = x.dim(dim)
    parts = c.split(x.rows[at], c.shape[at : at + len(sizes)])
    for size, row in zip(sizes, parts, strict=True):
        c.expect(size, row)
    return (*x.rows[:at], *parts, *x.rows[at + 1 :])


@rule("unsqueeze")
def unsqueeze(c: Context, x: Operand, dim: int) -> Rows:
    """A new dimension of size 1."""
    at = int(dim) % (len(x.rows) + 1)
    return (*x.rows[:at], UNIT, *x.rows[at:])


@rule("squeeze")
def squeeze(c: Context, x: Operand, *dims: Any, **kwargs: Any) -> Rows:
    """Dimensions of size 1 disappear."""
    chosen = kwargs.get("dim", dims[0] if dims else None)
    which = range(len(x.rows)) if chosen is None else chosen if isinstance(chosen, (tuple, list)) else (chosen,)
    gone = {x.dim(dim) for dim in which}
    return tuple(row for at, row in enumerate(x.rows) if row.size != 1 or at not in gone)


@rule("transpose")
def transpose(c: Context, x: Operand, dim0: int, dim1: int) -> Rows:
    """Two dimensions change places."""
    rows = list(x.rows)
    a, b = x.dim(dim0), x.dim(dim1)
    rows[a], rows[b] = rows[b], rows[a]
    return tuple(rows)


@rule("permute")
def permute(c: Context, x: Operand, *dims: Any, **kwargs: Any) -> Rows:
    """Dimensions in another order."""
    return tuple(x.rows[x.dim(dim)] for dim in kwargs.get("dims") or _sizes(dims))


@rule("movedim")
def movedim(c: Context, x: Operand, source: Any, destination: Any) -> Rows:
    """Some dimensions move, the others keep their order."""
    sources = [x.dim(dim) for dim in (source if isinstance(source, (tuple, list)) else (source,))]
    targets = [x.dim(dim) for dim in (destination if isinstance(destination, (tuple, list)) else (destination,))]
    placed = dict(zip(targets, sources, strict=True))
    rest = iter([dim for dim in range(len(x.rows)) if dim not in sources])
    return tuple(x.rows[placed[at] if at in placed else next(rest)] for at in range(len(x.rows)))


@rule("T", "t", "mT", "H", "mH", "adjoint", "numpy_T")
def transposed(c: Context, x: Operand, *_: Any) -> Rows:
    """The last two dimensions, or all of them for ``T``, in reverse."""
    if c.node.meta["name"] in ("T", "numpy_T"):
        return x.rows[::-1]
    return (*x.rows[:-2], *x.rows[-2:][::-1])


@rule("expand", "broadcast_to")
def expand(c: Context, x: Operand, *shape: Any, **kwargs: Any) -> Rows:
    """Dimensions of size 1 are repeated; the repeats are channels that may go."""
    sizes = kwargs.get("size") or _sizes(shape)
    rows = (*([UNIT] * (len(sizes) - len(x.rows))), *x.rows)
    result: list[Row] = []
    for size, target, row in zip(sizes, c.shape, rows, strict=True):
        new = row if row.size == target else c.axis(target)
        c.expect(size, new)
        result.append(new)
    return tuple(result)


@rule("repeat", "tile")
def repeat(c: Context, x: Operand, *counts: Any, **kwargs: Any) -> Rows:
    """Copies one after the other."""
    times = kwargs.get("repeats", kwargs.get("dims")) or _sizes(counts)
    rows = (*([UNIT] * (len(c.shape) - len(x.rows))), *x.rows)
    times = (*([1] * (len(rows) - len(times))), *times)
    result: list[Row] = []
    for count, row in zip(times, rows, strict=True):
        copies = c.axis(int(count)) if row.free or row.size == 1 else Row(int(count), pin=row.pin)
        c.expect(count, copies)
        result.append(row if count == 1 else c.merged([copies, row]))
    return tuple(result)


@rule("repeat_interleave")
def repeat_interleave(c: Context, x: Operand, repeats: Any, dim: int | None = None, **_: Any) -> Result:
    """Each channel several times in a row."""
    if dim is None or not isinstance(repeats, int):
        return c.pin_all([x], f"how often it is repeated is decided by data, in {c.where()}")
    at = x.dim(dim)
    row = x.rows[at]
    copies = c.axis(int(repeats)) if row.free or row.size == 1 else Row(int(repeats), pin=row.pin)
    c.expect(repeats, copies)
    return (*x.rows[:at], c.merged([row, copies]), *x.rows[at + 1 :])


@rule("flip")
def flip(c: Context, x: Operand, *dims: Any, **kwargs: Any) -> Rows:
    """Channels in reverse order."""
    chosen = {x.dim(dim) for dim in kwargs.get("dims") or _sizes(dims)}
    return tuple(
        Row(row.size, array=row.ids()[::-1].copy()) if at in chosen and row.free else row
        for at, row in enumerate(x.rows)
    )


@rule("roll")
def roll(c: Context, x: Operand, shifts: Any, dims: Any = None) -> Result:
    """A rotation counts positions, so what it rotates must stay."""
    if dims is None:
        return c.pin_all([x], f"it is rotated by {c.where()}")
    for dim in dims if isinstance(dims, (tuple, list)) else (dims,):
        c.pin(x.rows[x.dim(dim)], f"it is rotated by {c.where()}")
    return x.rows


@rule("pixel_shuffle", "pixel_unshuffle")
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


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(c: Context, x: Operand, groups: int) -> Rows:
    """A grid of groups x channels, transposed."""
    row = x.rows[1]
    outer, inner = c.split(row, (int(groups), row.size // int(groups)))
    c.expect(groups, outer)
    return (x.rows[0], c.merged([inner, outer]), *x.rows[2:])
