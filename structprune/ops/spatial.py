"""Pooling, resizing, padding: operations over the positions of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Result, register_op
from structprune.ops.relations import Axes, Axis
from structprune.ops.zeros import ZeroContext, Zeros, moved, moved_first, unknown

_POOLS = "avg_pool{} adaptive_avg_pool{} lp_pool{} upsample_nearest{} reflection_pad{} replication_pad{}"
_MAXIMA = "max_pool{} max_pool{}_with_indices adaptive_max_pool{}"


def _keep_channels(c: Context, x: Operand, dims: int) -> Result:
    reason = f"it is a position that {c.where()} slides over"
    at = len(x.axes) - dims
    for axis in x.axes[at:]:
        c.pin(axis, reason)
    if isinstance(c.shape, list):
        return [None if shape is None else (*x.axes[:at], *c.fresh(shape[at:], reason)) for shape in c.shape]
    return (*x.axes[:at], *c.fresh(c.shape[at:], reason))


def _names(names: str, dims: int) -> list[str]:
    return [name.format(f"{dims}d") for name in names.split()]


@register_op(*_names(_POOLS, 1), "upsample_linear1d", "_upsample_nearest_exact1d", zeros=moved_first)
@register_op(*_names(_MAXIMA, 1), zeros=moved_first, selects=True)
def over_lines(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """The last dimension is resized; channels stay."""
    return _keep_channels(c, x, 1)


@register_op(
    *_names(_POOLS, 2), "_adaptive_avg_pool2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", zeros=moved_first,
)  # fmt: skip
@register_op(*_names(_MAXIMA, 2), zeros=moved_first, selects=True)
def over_images(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """The last two dimensions are resized; channels stay."""
    return _keep_channels(c, x, 2)


@register_op(
    *_names(_POOLS, 3),
    "_adaptive_avg_pool3d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact3d",
    zeros=moved_first,
)
@register_op(*_names(_MAXIMA, 3), zeros=moved_first, selects=True)
def over_volumes(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """The last three dimensions are resized; channels stay."""
    return _keep_channels(c, x, 3)


@register_op("python.interpolate", zeros=moved_first)
def interpolate(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """Everything but batch and channels is resized."""
    return _keep_channels(c, x, len(x.axes) - 2)


@register_op(*[f"max_unpool{dims}d" for dims in (1, 2, 3)], zeros=moved_first)
def max_unpool(c: Context, x: Operand, indices: Operand, *_: Any, **__: Any) -> Result:
    """Each entry goes where the pooling found its maximum: the channels of both are the same."""
    for mine, theirs in zip(x.axes, indices.axes, strict=True):
        c.same(mine, theirs)
    return _keep_channels(c, x, int(c.node.meta["name"][-2]))


@register_op("fractional_max_pool2d", "fractional_max_pool3d", zeros=moved_first, selects=True)
def fractional_max_pool(
    c: Context, x: Operand, kernel: Any, size: Any, samples: Operand | None = None, *_: Any, **__: Any
) -> Result:
    """Pooling over windows that random samples place, for each image and channel."""
    dims = int(c.node.meta["name"][-2])
    if samples is not None:
        c.pin(samples.axes[-1], f"it holds the coordinates of the windows of {c.where()}")
        for mine, theirs in zip(x.axes[: len(x.axes) - dims][::-1], samples.axes[-2::-1], strict=False):
            c.same(mine, theirs)
    return _keep_channels(c, x, dims)


@register_op("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", zeros=moved_first)
def grid_sample(c: Context, x: Operand, product: Operand, *_: Any, **__: Any) -> Result:
    """Positions are sampled where data says."""
    for axis in product.axes[1:]:
        c.pin(axis, f"it is a position sampled by {c.where()}")
    c.same(x.axes[0], product.axes[0])
    return _keep_channels(c, x, len(x.axes) - 2)


def _padded(z: ZeroContext) -> Zeros:
    """Padding with zeros keeps them."""
    x, before = z.of(z.tensors[0]), z.axes_of(z.tensors[0])
    if arguments(z.node).get("value") or len(x) != len(z.axes):
        return unknown(z)
    same = [axis.size == mine.size for axis, mine in zip(before, z.axes, strict=True)]
    return tuple(zero and (z.put_there or whole) for zero, whole in zip(x, same, strict=True))


@register_op("pad", "constant_pad_nd", zeros=_padded)
def pad(c: Context, x: Operand, widths: Sequence[Any], mode: Any = "constant", *_: Any, **kwargs: Any) -> Axes:
    """Constant channels before and after; in other modes the padded dimensions are positions."""
    constant = kwargs.get("mode", mode) == "constant" or not isinstance(mode, str)
    axes = list(x.axes)
    for pair in range(len(widths) // 2):
        at = len(axes) - 1 - pair
        before, after = widths[2 * pair], widths[2 * pair + 1]
        axis = axes[at]
        if not before and not after:
            continue
        if constant and before >= 0 and after >= 0 and axis.free:
            parts: list[Axis] = []
            for width in (before, None, after):
                if width is None:
                    parts.append(axis)
                elif width:
                    # Even one padded channel gets ids: it may be tied to one that goes.
                    fresh = c.relations.run(int(width))
                    c.expect(width, fresh)
                    parts.append(fresh)
            axes[at] = c.concatenated(parts)
            continue
        reason = f"it is padded by {c.where()}"
        c.pin(axis, reason)
        axes[at] = c.fresh([c.shape[at]], reason)[0]
    return tuple(axes)


@register_op("im2col", zeros=moved)
def unfold(c: Context, x: Operand, kernel: Any, *_: Any, **__: Any) -> Axes:
    """Channels x kernel positions, in one dimension."""
    reason = f"it is a position that {c.where()} slides over"
    at = len(x.axes) - 3
    for axis in x.axes[at + 1 :]:
        c.pin(axis, reason)
    block = Axis(c.shape[at] // x.axes[at].size, pin=reason)
    return (*x.axes[:at], c.merged([x.axes[at], block]), *c.fresh(c.shape[at + 1 :], reason))


@register_op("col2im", zeros=moved)
def compensation(c: Context, x: Operand, output_size: Any, kernel: Any, *_: Any, **__: Any) -> Axes:
    """The reverse of `unfold`."""
    reason = f"it is a position that {c.where()} slides over"
    at = len(x.axes) - 2
    channels, block = c.split(x.axes[at], (c.shape[at], x.axes[at].size // c.shape[at]))
    for axis in (block, x.axes[-1]):
        c.pin(axis, reason)
    return (*x.axes[:at], channels, *c.fresh(c.shape[at + 1 :], reason))


@register_op("unfold", zeros=moved)
def windows(c: Context, x: Operand, dim: int, *_: Any) -> Axes:
    """``Tensor.unfold``: one dimension becomes windows and positions in a window."""
    reason = f"it is a position that {c.where()} slides over"
    at = x.dim(dim)
    c.pin(x.axes[at], reason)
    windows, size = c.fresh([c.shape[at], c.shape[-1]], reason)
    return (*x.axes[:at], windows, *x.axes[at + 1 :], size)


@register_op("meshgrid", "python.meshgrid")
def meshgrid(c: Context, *tensors: Any, **_: Any) -> Result:
    """Coordinates of a product."""
    return c.pin_all(list(operands_in(tensors)), f"it holds coordinates in {c.where()}")
