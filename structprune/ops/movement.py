"""Operations that rearrange dimensions: views, permutations, expansions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from structprune.ops import zeros
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.elementwise import same_shape
from structprune.ops.op import Indices, Result, Scaling, register_op
from structprune.ops.relations import UNIT, Axes, Axis


def regroup(c: Context, axes: Axes, sizes: Sequence[int]) -> Axes:
    """Axes of the tensor after a view to `sizes`: runs of dimensions with equal products are merged and split."""
    if 0 in sizes:
        return c.fresh(sizes, "the tensor is empty")
    sources = [axis for axis in axes if axis.size != 1]
    targets = [size for size in sizes if size != 1]
    result: list[Axis] = []
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
    axes = regroup(c, x.axes, c.shape)
    for size, axis in zip(sizes, axes, strict=True):
        c.expect(size, axis)
    return axes


@register_op("view_as", "reshape_as", zeros=zeros.moved_first, indices=Indices.PASSED, views=True)
def view_as(c: Context, x: Operand, other: Operand) -> Axes:
    """The shape of another tensor: the sizes follow it."""
    axes = regroup(c, x.axes, c.shape)
    return tuple(c.same(axis, like) for axis, like in zip(axes, other.axes, strict=True))


@register_op("flatten", "ravel", **VIEWS)
def flatten(c: Context, x: Operand, *_: Any, **__: Any) -> Axes:
    """Neighbouring dimensions become one."""
    return regroup(c, x.axes, c.shape)


@register_op("unflatten", **VIEWS)
def unflatten(c: Context, x: Operand, dim: int, sizes: Sequence[Any], *_: Any) -> Axes:
    """One dimension becomes several."""
    at = x.dim(dim)
    parts = c.split(x.axes[at], c.shape[at : at + len(sizes)])
    for size, axis in zip(sizes, parts, strict=True):
        c.expect(size, axis)
    return (*x.axes[:at], *parts, *x.axes[at + 1 :])


@register_op("unsqueeze", **VIEWS)
def unsqueeze(c: Context, x: Operand, dim: int) -> Axes:
    """A new dimension of size 1."""
    at = int(dim) % (len(x.axes) + 1)
    return (*x.axes[:at], UNIT, *x.axes[at:])


@register_op("squeeze", **VIEWS)
def squeeze(c: Context, x: Operand, chosen: Any = None) -> Axes:
    """Dimensions of size 1 disappear."""
    which = range(len(x.axes)) if chosen is None else chosen if isinstance(chosen, (tuple, list)) else (chosen,)
    gone = {x.dim(dim) for dim in which}
    return tuple(axis for at, axis in enumerate(x.axes) if axis.size != 1 or at not in gone)


@register_op("transpose", **VIEWS)
def transpose(c: Context, x: Operand, dim0: int, dim1: int) -> Axes:
    """Two dimensions change places."""
    axes = list(x.axes)
    a, b = x.dim(dim0), x.dim(dim1)
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@register_op("permute", **VIEWS)
def permute(c: Context, x: Operand, dims: Sequence[int]) -> Axes:
    """Dimensions in another order."""
    return tuple(x.axes[x.dim(dim)] for dim in dims)


@register_op("movedim", **VIEWS)
def movedim(c: Context, x: Operand, source: Any, destination: Any) -> Axes:
    """Some dimensions move, the others keep their order."""
    sources = [x.dim(dim) for dim in (source if isinstance(source, (tuple, list)) else (source,))]
    targets = [x.dim(dim) for dim in (destination if isinstance(destination, (tuple, list)) else (destination,))]
    placed = dict(zip(targets, sources, strict=True))
    rest = iter([dim for dim in range(len(x.axes)) if dim not in sources])
    return tuple(x.axes[placed[at] if at in placed else next(rest)] for at in range(len(x.axes)))


@register_op("T", "t", "mT", "H", "mH", "adjoint", "numpy_T", **VIEWS)
def transposed(c: Context, x: Operand, *_: Any) -> Axes:
    """The last two dimensions, or all of them for ``T``, in reverse."""
    if c.node.meta["name"] in ("T", "numpy_T"):
        return x.axes[::-1]
    return (*x.axes[:-2], *x.axes[-2:][::-1])


@register_op("expand", "broadcast_to", **(VIEWS | {"zeros": zeros.repeated}))
def expand(c: Context, x: Operand, sizes: Sequence[Any], *_: Any, **__: Any) -> Axes:
    """Dimensions of size 1 are repeated; the repeats are channels that may go."""
    axes = (*([UNIT] * (len(sizes) - len(x.axes))), *x.axes)
    result: list[Axis] = []
    for size, target, axis in zip(sizes, c.shape, axes, strict=True):
        new = axis if axis.size == target else c.new_axis(target)
        c.expect(size, new)
        result.append(new)
    return tuple(result)


@register_op("expand_as", zeros=zeros.repeated, indices=Indices.PASSED, views=True)
def expand_as(c: Context, x: Operand, other: Operand) -> Axes:
    """`x` repeated to the shape of `other`."""
    return c.broadcast([x, other])


@register_op("repeat", "tile", zeros=zeros.repeated, indices=Indices.PASSED)
def repeat(c: Context, x: Operand, times: Sequence[Any]) -> Axes:
    """Copies one after the other."""
    axes = (*([UNIT] * (len(c.shape) - len(x.axes))), *x.axes)
    times = (*([1] * (len(axes) - len(times))), *times)
    result: list[Axis] = []
    for count, axis in zip(times, axes, strict=True):
        copies = c.new_axis(int(count)) if axis.free or axis.size == 1 else Axis(int(count), pin=axis.pin)
        c.expect(count, copies)
        result.append(axis if count == 1 else c.merged([copies, axis]))
    return tuple(result)


@register_op("repeat_interleave", zeros=zeros.repeated)
def repeat_interleave(c: Context, x: Operand, repeats: Any, dim: int | None = None, **_: Any) -> Result:
    """Each channel several times in an axis."""
    axes = x.axes if dim is not None else (c.merged(x.axes),)
    at = x.dim(dim) if dim is not None else 0
    axis = axes[at]
    if not isinstance(repeats, int):
        reason = f"how often it is repeated is decided by data, in {c.where()}"
        for counted in (axis, *(each for operand in operands_in(repeats) for each in operand.axes)):
            c.pin(counted, reason)
        return (*axes[:at], *c.fresh(c.shape[at : at + 1], reason), *axes[at + 1 :])
    copies = c.new_axis(int(repeats)) if axis.free or axis.size == 1 else Axis(int(repeats), pin=axis.pin)
    c.expect(repeats, copies)
    return (*axes[:at], c.merged([axis, copies]), *axes[at + 1 :])


@register_op("flip", **MOVES)
def flip(c: Context, x: Operand, dims: Sequence[int]) -> Axes:
    """Channels in reverse order."""
    chosen = {x.dim(dim) for dim in dims}
    return tuple(
        Axis(axis.size, array=axis.ids()[::-1].copy()) if at in chosen and axis.free else axis
        for at, axis in enumerate(x.axes)
    )


@register_op("roll", zeros=zeros.moved, moves=True, scaling=Scaling.MOVES, shape=same_shape)
def roll(c: Context, x: Operand, shifts: Any, dims: Any = ()) -> Result:
    """A rotation counts positions, so what it rotates must stay."""
    if dims is None or dims in ((), []):
        return c.pin_all([x], f"it is rotated by {c.where()}")
    for dim in dims if isinstance(dims, (tuple, list)) else (dims,):
        c.pin(x.axes[x.dim(dim)], f"it is rotated by {c.where()}")
    return x.axes


@register_op("pixel_shuffle", "pixel_unshuffle", zeros=zeros.moved)
def pixel_shuffle(c: Context, x: Operand, factor: int) -> Axes:
    """Channels become pixels, or pixels channels: blocks of factor x factor stay whole."""
    *batch, channels, height, width = x.axes
    reason = f"it counts pixels in {c.where()}"
    pixels = c.fresh(c.shape[-2:], reason)
    for axis in (height, width):
        c.pin(axis, reason)
    block = Axis(int(factor) ** 2, pin=reason)
    if c.node.meta["name"] == "pixel_unshuffle":
        return (*batch, c.merged([channels, block]), *pixels)
    kept, inner = c.split(channels, (channels.size // block.size, block.size))
    c.pin(inner, reason)
    return (*batch, kept, *pixels)


@register_op("channel_shuffle", "native_channel_shuffle", zeros=zeros.moved)
def channel_shuffle(c: Context, x: Operand, groups: int) -> Axes:
    """A product of groups x channels, transposed."""
    axis = x.axes[1]
    outer, inner = c.split(axis, (int(groups), axis.size // int(groups)))
    c.expect(groups, outer)
    return (x.axes[0], c.merged([inner, outer]), *x.axes[2:])
