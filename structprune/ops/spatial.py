"""Pooling, resizing, padding: operations over the positions of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Result, register_op
from structprune.ops.relations import Row, Rows
from structprune.ops.zeros import ZeroContext, Zeros, moved, moved_first, unknown

POOLS = """
avg_pool{} max_pool{} max_pool{}_with_indices adaptive_avg_pool{} adaptive_max_pool{} lp_pool{} max_unpool{}
upsample_nearest{} reflection_pad{} replication_pad{}
"""


def _keep_channels(c: Context, x: Operand, dims: int) -> Result:
    reason = f"it is a position that {c.where()} slides over"
    at = len(x.rows) - dims
    for row in x.rows[at:]:
        c.pin(row, reason)
    if isinstance(c.shape, list):
        return [None if shape is None else (*x.rows[:at], *c.fresh(shape[at:], reason)) for shape in c.shape]
    return (*x.rows[:at], *c.fresh(c.shape[at:], reason))


def _names(dims: int) -> list[str]:
    return [name.format(f"{dims}d") for name in POOLS.split()]


@register_op(*_names(1), "upsample_linear1d", "_upsample_nearest_exact1d", zeros=moved_first)
def over_lines(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """The last dimension is resized; channels stay."""
    return _keep_channels(c, x, 1)


@register_op(
    *_names(2), "fractional_max_pool2d", "_adaptive_avg_pool2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", zeros=moved_first,
)  # fmt: skip
def over_images(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """The last two dimensions are resized; channels stay."""
    return _keep_channels(c, x, 2)


@register_op(
    *_names(3),
    "fractional_max_pool3d",
    "_adaptive_avg_pool3d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact3d",
    zeros=moved_first,
)
def over_volumes(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """The last three dimensions are resized; channels stay."""
    return _keep_channels(c, x, 3)


@register_op("python.interpolate", zeros=moved_first)
def interpolate(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """Everything but batch and channels is resized."""
    return _keep_channels(c, x, len(x.rows) - 2)


@register_op("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(c: Context, x: Operand, grid: Operand, *_: Any, **__: Any) -> Result:
    """Positions are sampled where data says."""
    for row in grid.rows[1:]:
        c.pin(row, f"it is a position sampled by {c.where()}")
    c.same(x.rows[0], grid.rows[0])
    return _keep_channels(c, x, len(x.rows) - 2)


def _padded(z: ZeroContext) -> Zeros:
    """Padding with zeros keeps them."""
    x = z.of(z.tensors[0])
    value = arguments(z.node).get("value")
    return x if not value and len(x) == len(z.rows) else unknown(z)


@register_op("pad", "constant_pad_nd", zeros=_padded)
def pad(c: Context, x: Operand, widths: Sequence[Any], mode: Any = "constant", *_: Any, **kwargs: Any) -> Rows:
    """Constant channels before and after; in other modes the padded dimensions are positions."""
    constant = kwargs.get("mode", mode) == "constant" or not isinstance(mode, str)
    rows = list(x.rows)
    for pair in range(len(widths) // 2):
        at = len(rows) - 1 - pair
        before, after = widths[2 * pair], widths[2 * pair + 1]
        row = rows[at]
        if not before and not after:
            continue
        if constant and before >= 0 and after >= 0 and row.free:
            parts: list[Row] = []
            for width in (before, None, after):
                if width is None:
                    parts.append(row)
                elif width:
                    # Even one padded channel gets ids: it may be tied to one that goes.
                    fresh = c.relations.run(int(width))
                    c.expect(width, fresh)
                    parts.append(fresh)
            rows[at] = c.concatenated(parts)
            continue
        reason = f"it is padded by {c.where()}"
        c.pin(row, reason)
        rows[at] = c.fresh([c.shape[at]], reason)[0]
    return tuple(rows)


@register_op("im2col", zeros=moved)
def unfold(c: Context, x: Operand, kernel: Any, *_: Any, **__: Any) -> Rows:
    """Channels x kernel positions, in one dimension."""
    reason = f"it is a position that {c.where()} slides over"
    at = len(x.rows) - 3
    for row in x.rows[at + 1 :]:
        c.pin(row, reason)
    block = Row(c.shape[at] // x.rows[at].size, pin=reason)
    return (*x.rows[:at], c.merged([x.rows[at], block]), *c.fresh(c.shape[at + 1 :], reason))


@register_op("col2im", zeros=moved)
def fold(c: Context, x: Operand, output_size: Any, kernel: Any, *_: Any, **__: Any) -> Rows:
    """The reverse of `unfold`."""
    reason = f"it is a position that {c.where()} slides over"
    at = len(x.rows) - 2
    channels, block = c.split(x.rows[at], (c.shape[at], x.rows[at].size // c.shape[at]))
    for row in (block, x.rows[-1]):
        c.pin(row, reason)
    return (*x.rows[:at], channels, *c.fresh(c.shape[at + 1 :], reason))


@register_op("unfold", zeros=moved)
def windows(c: Context, x: Operand, dim: int, *_: Any) -> Rows:
    """``Tensor.unfold``: one dimension becomes windows and positions in a window."""
    reason = f"it is a position that {c.where()} slides over"
    at = x.dim(dim)
    c.pin(x.rows[at], reason)
    windows, size = c.fresh([c.shape[at], c.shape[-1]], reason)
    return (*x.rows[:at], windows, *x.rows[at + 1 :], size)


@register_op("meshgrid", "python.meshgrid")
def meshgrid(c: Context, *tensors: Any, **_: Any) -> Result:
    """Coordinates of a grid."""
    return c.pin_all(list(operands_in(tensors)), f"it holds coordinates in {c.where()}")
