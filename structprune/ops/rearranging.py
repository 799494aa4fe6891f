"""Movements that are run, as the real operation, on the positions of a tensor: where they come out is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops import zeros
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.cutting import cut
from structprune.ops.indexing import select_row
from structprune.ops.op import Result, register_op
from structprune.ops.relations import UNIT, Axes, Axis
from structprune.tracing.provenance import plain

# Larger tensors are not worth it; their channels stay.
LARGEST = 2**24


@register_op(
    *["rot90", "fliplr", "flipud", "diagonal", "linalg_diagonal", "atleast_1d", "atleast_2d", "atleast_3d"],
    zeros=zeros.moved,
)
def rearranged(c: Context, *args: Any, **named: Any) -> Result:
    """Dimensions that come out whole, in order or reversed; a diagonal runs along two at once.

    Only for operations whose arguments are no sizes or positions: those would have to follow the channels.

    Example: ``rot90`` of 2 x 3 positions; coordinates of the first dimension, then of the second::

        0 0 0    ->   0 1        0 1 2    ->   2 2
        1 1 1         0 1        0 1 2         1 1
                      0 1                      0 0

    The first dimension comes out as the second, in order; the second as the first, reversed.
    """
    operands = list(operands_in(args, named))
    if sum(prod(operand.shape) for operand in operands) > LARGEST:
        return c.pin_all(operands, f"it is too large for its entries to be followed through {c.where()}")
    if any(0 in operand.shape for operand in operands):
        return c.pin_all(operands, "it is empty")
    parts = c.shape if isinstance(c.shape, list) else [c.shape]
    # For each dimension of each result, the axes that run along it.
    drivers: list[list[list[Axis]]] = [[[] for _ in shape] for shape in parts]
    reason = f"its position counts in {c.where()}"
    for number, operand in enumerate(operands):
        for dim, axis in enumerate(operand.axes):
            if axis.size > 1:
                _follow(c, operands, number, dim, drivers, reason)
    result: list[Axes | None] = [
        _rows(c, shape, along_each, reason) for shape, along_each in zip(parts, drivers, strict=True)
    ]
    return result if isinstance(c.shape, list) else result[0]


def _follow(
    c: Context, operands: list[Operand], number: int, dim: int, drivers: list[list[list[Axis]]], reason: str
) -> None:
    """Note along which dimensions of the results dimension `dim` of operand `number` runs, whole or in pieces."""
    axis = operands[number].axes[dim]
    for part, coordinates in enumerate(_run(c.node, operands, number, dim)):
        runs = _runs_along(coordinates, axis.size)
        if runs is not None:
            at, backwards = runs
            drivers[part][at].append(_reversed(axis) if backwards else axis)
        elif not bool((coordinates == -1).all()):  # a piece of it, or shifted
            c.pin(axis, reason)
            for at in _varies_along(coordinates):
                drivers[part][at].append(axis)


@register_op("diag", zeros=zeros.moved)
def diag(c: Context, x: Operand, diagonal: int = 0) -> Result:
    """The diagonal of a matrix, or a matrix with a diagonal."""
    return diag_embed(c, x, diagonal) if len(x.axes) == 1 else rearranged(c, x)


def _rows(c: Context, shape: Sequence[int], drivers: list[list[Axis]], reason: str) -> Axes:
    axes: list[Axis] = []
    for size, along in zip(shape, drivers, strict=True):
        if along and all(axis.size == size for axis in along):
            axis = along[0]
            for other in along[1:]:
                axis = c.same(axis, other)
        else:
            for other in along:  # one of them does not run along it whole: none may shift
                c.pin(other, reason)
            axis = UNIT if size == 1 else Axis(int(size), pin=reason)
        axes.append(axis)
    return tuple(axes)


def _reversed(axis: Axis) -> Axis:
    return Axis(axis.size, array=axis.ids()[::-1].copy()) if axis.free else axis


def _runs_along(coordinates: Tensor, size: int) -> tuple[int, bool] | None:
    """The dimension along which coordinates run from 0 to `size` - 1, and whether backwards; None if there is none."""
    for at in range(coordinates.dim()):
        if coordinates.shape[at] == size:
            line = torch.arange(size).reshape([-1 if dim == at else 1 for dim in range(coordinates.dim())])
            for backwards in (False, True):
                if bool((coordinates == (line.flip(at) if backwards else line)).all()):
                    return at, backwards
    return None


def _varies_along(coordinates: Tensor) -> list[int]:
    """The dimensions along which coordinates change."""
    dims = range(coordinates.dim())
    return [at for at in dims if bool((coordinates != coordinates.narrow(at, 0, 1)).any())]


def _run(node: fx.Node, operands: Sequence[Operand], number: int, dim: int) -> list[Tensor]:
    """The results of `node` on the coordinates of dimension `dim` of operand `number`; -1 stands for the others."""
    places = iter(range(len(operands)))

    def value(_: fx.Node) -> Tensor:
        place = next(places)
        shape = operands[place].shape
        if place != number:
            return torch.full(shape, -1)
        line = torch.arange(shape[dim]).reshape([-1 if at == dim else 1 for at in range(len(shape))])
        return line.expand(shape)

    args, kwargs = plain(fx.map_arg((node.args, node.kwargs), value))
    function: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    with torch.device("cpu"):
        results = function(*(args[1:] if node.op == "call_method" else args), **kwargs)
    return list(results) if isinstance(results, (tuple, list)) else [results]


# -- operations that write at positions: from a tensor, or of a slice, a diagonal, a place in memory -----------------


def _added(z: zeros.ZeroContext) -> zeros.Zeros:
    """Entries of one tensor added to, or put in the place of, those of another of as many dimensions."""
    tensors = z.tensors
    if len(tensors) < (2 if z.node.meta["name"] == "slice_scatter" else 3):  # a number is written
        return zeros.unknown(z)
    x, source = z.of(tensors[0]), z.of(tensors[-1])
    return tuple(a and b for a, b in zip(x, source, strict=True)) if len(x) == len(source) else zeros.unknown(z)


def _tied(c: Context, x: Operand, other: Operand, at: int, reason: str) -> None:
    """`other` runs along `x` in all dimensions but `at`; where it is shorter, it meets the first channels of `x`."""
    for place, axis in enumerate(other.axes):
        if place == at or len(other.axes) != len(x.axes):
            c.pin(axis, reason)
        elif axis.size == x.axes[place].size:
            c.same(x.axes[place], axis)
        else:
            c.pin(axis, reason)
            c.pin(x.axes[place][: axis.size], reason)


@register_op("scatter", "scatter_add", "scatter_reduce", zeros=_added)
def scatter(c: Context, x: Operand, dim: int, index: Operand, *rest: Any, **named: Any) -> Axes:
    """Writes each entry of a source at the position that the index has there."""
    at = x.dim(dim)
    reason = f"it is written at positions from a tensor in {c.where()}"
    if x.axes:
        c.pin(x.axes[at], reason)
    _tied(c, x, index, at, reason)
    for source in operands_in(rest, named):
        _tied(c, index, source, -1, reason)  # the source may be longer, and is then read in part
        if source.axes and len(source.axes) == len(index.axes):
            c.pin(source.axes[at], reason)
    return x.axes


@register_op("index_add", "index_copy", "index_reduce", zeros=_added)
def index_add(c: Context, x: Operand, dim: int, index: Operand, source: Operand, *_: Any, **__: Any) -> Axes:
    """Whole slices added to, or put in the place of, those that the index names."""
    at = x.dim(dim)
    reason = f"it is written at positions from a tensor in {c.where()}"
    for axis in (*x.axes[at : at + 1], *index.axes):
        c.pin(axis, reason)
    _tied(c, x, source, at, reason)
    return x.axes


@register_op("index_fill")
def index_fill(c: Context, x: Operand, dim: int, index: Operand, value: Any) -> Axes:
    """One value in all slices that the index names."""
    at = x.dim(dim)
    for axis in (*x.axes[at : at + 1], *index.axes):
        c.pin(axis, f"it is written at positions from a tensor in {c.where()}")
    return x.axes


@register_op("slice_scatter", zeros=_added)
def slice_scatter(
    c: Context, x: Operand, source: Operand, dim: int = 0, start: Any = None, stop: Any = None, step: Any = 1
) -> Axes:
    """A copy with a slice written over."""
    at = x.dim(dim)
    piece = cut(c, x.axes[at], slice(start, stop, step))
    c.broadcast([Operand(x.node, (*x.axes[:at], piece, *x.axes[at + 1 :])), source])
    return x.axes


@register_op("select_scatter")
def select_scatter(c: Context, x: Operand, source: Operand, dim: int, index: int) -> Axes:
    """A copy with one position of a dimension written over."""
    at = x.dim(dim)
    select_row(c, x.axes[at], index)
    c.pin(x.axes[at][:1] if index >= 0 else x.axes[at][-1:], f"it is written by number in {c.where()}")
    c.broadcast([Operand(x.node, (*x.axes[:at], *x.axes[at + 1 :])), source])
    return x.axes


@register_op("diagonal_scatter", zeros=zeros.moved)
def diagonal_scatter(c: Context, x: Operand, source: Operand, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Axes:
    """A copy with a diagonal written over: channel i of both dimensions, if they have equally many."""
    first, second = x.axes[x.dim(dim1)], x.axes[x.dim(dim2)]
    line = _diagonal(c, first, second, int(offset))
    if line is None:
        c.pin(source.axes[-1], f"it is written on a diagonal in {c.where()}")
    else:
        c.same(line, source.axes[-1])
    rest = [axis for at, axis in enumerate(x.axes) if at not in (x.dim(dim1), x.dim(dim2))]
    for mine, theirs in zip(rest, source.axes[:-1], strict=True):
        c.same(mine, theirs)
    return x.axes


def _diagonal(c: Context, first: Axis, second: Axis, offset: int) -> Axis | None:
    """The two dimensions of a main diagonal, which keep the same channels; None where it is none, and they stay."""
    if offset == 0 and first.size == second.size:
        return c.same(first, second)
    for axis in (first, second):
        c.pin(axis, f"its position counts on the diagonal of {c.where()}")
    return None


@register_op("diag_embed", zeros=zeros.moved)
def diag_embed(c: Context, x: Operand, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Axes:
    """The last dimension on the diagonal of two, with zeros around."""
    axis = x.axes[-1]
    if offset:
        reason = f"its position counts on the diagonal of {c.where()}"
        c.pin(axis, reason)
        axis = Axis(c.shape[int(dim1)], pin=reason)
    axes = list(x.axes[:-1])
    for at in sorted(int(dim) % len(c.shape) for dim in (dim1, dim2)):
        axes.insert(at, axis)
    return tuple(axes)


@register_op(
    *["as_strided", "as_strided_scatter", "put", "masked_scatter", "masked_select", "resize", "resize_as"],
    *["_chunk_cat", "nonzero_static"],
)
def counted(c: Context, *args: Any, **named: Any) -> Result:
    """Entries are found by counting all of them."""
    return c.pin_all(list(operands_in(args, named)), f"its entries are counted by {c.where()}")
