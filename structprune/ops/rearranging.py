"""Movements that are run, as the real operation, on the positions of a tensor: where they come out is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops import zeros
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Result, register_op
from structprune.ops.relations import UNIT, Axes, Axis
from structprune.ops.scattering import diag_embed
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
    result: list[Axes | None] = [_rows(c, shape, found, reason) for shape, found in zip(parts, drivers, strict=True)]
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
    for size, found in zip(shape, drivers, strict=True):
        if found and all(axis.size == size for axis in found):
            axis = found[0]
            for other in found[1:]:
                axis = c.same(axis, other)
        else:
            for other in found:  # one of them does not run along it whole: none may shift
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
        found = function(*(args[1:] if node.op == "call_method" else args), **kwargs)
    return list(found) if isinstance(found, (tuple, list)) else [found]
