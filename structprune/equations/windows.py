"""Sums for least squares over all windows of a convolution with a large kernel, without unfolding them.

Second moments of windows are correlations of the input with itself, shifted: those of entries ``k`` and ``l`` of a
window depend on ``l - k`` alone, but for the borders. So with 64 entries there are 64 products to compute instead of
64 * 65 / 2, and each of the others follows from its neighbour: the windows' first position leaves the sum, and one more
comes in at the end (the covariance method of linear prediction; Makhoul, Linear Prediction: A Tutorial Review, 1975).

For an input (2, 3, 10, 5) and a kernel of (4, 2) there are 2 * 4 lines along the first spatial dimension, each with 10
steps of 3 * 2 = 6 values: the two neighbours of each channel. A window holds 4 steps, and there are 7 windows in each
line. Sums over 56 windows of 24 features and the intercept take 4 products of (6, 56) by (56, 6), and corrections.
"""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor

from structprune.equations.linear_maps import LinearMap


def has_window_sums(layer: LinearMap) -> bool:
    """Whether `window_sums` knows the convolution: one group, and stride 1 along its longest dimension."""
    if layer.layout != "conv" or not layer.kernel or layer.groups != 1:
        return False
    return layer.strides[_longest(layer)] == 1


def window_sums(layer: LinearMap, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``w w^T`` and ``w y^T`` over all windows ``w`` of the input with the intercept last, in float64.

    Args:
        layer: a convolution for which `has_window_sums`.
        x: its input, shape ``(batch, channels, *sizes)``.
        y: something in the shape of its result, ``(batch, outputs, *positions)``.

    Returns:
        Shapes ``(features + 1, features + 1)`` and ``(features + 1, outputs)``, with features in the order of
        `LinearMap.features_at`.
    """
    lines = _lines(layer, x)  # (lines, steps, values)
    dim = _longest(layer)
    taps, apart = layer.kernel[dim], layer.dilations[dim]
    targets = y.movedim(1, -1).movedim(1 + dim, -2).flatten(0, -3).double()  # (lines, windows, outputs)
    windows, values = targets.shape[1], lines.shape[2]
    xx = lines.new_empty(taps * values + 1, taps * values + 1)
    blocks = xx[:-1, :-1].view(taps, values, taps, values)
    xy = lines.new_empty(taps * values + 1, targets.shape[2])
    ones = lines.new_ones(lines.shape[0] * windows)
    flat_targets = targets.flatten(0, 1)
    first = lines[:, :windows].flatten(0, 1)
    for tap in range(taps):
        shifted = lines[:, tap * apart : tap * apart + windows].flatten(0, 1)
        blocks[0, :, tap] = first.T @ shifted
        xy[tap * values : (tap + 1) * values] = shifted.T @ flat_targets
        xx[-1, tap * values : (tap + 1) * values] = ones @ shifted
    for tap in range(taps - 1):
        leaving, coming = (_beside(lines, tap * apart + start, apart, taps - tap - 1) for start in (0, windows))
        blocks[tap + 1, :, tap + 1 :] = blocks[tap, :, tap:-1] + coming - leaving
    for tap in range(1, taps):
        blocks[tap, :, :tap] = blocks[:tap, :, tap].permute(2, 0, 1)
    xx[-1, -1] = len(ones)
    xy[-1] = flat_targets.sum(0)
    _reorder(layer, xx, xy)
    return xx, xy


def _beside(lines: Tensor, start: int, apart: int, count: int) -> Tensor:
    """Products of some steps of all lines with those 0, 1, ... taps further, shape ``(values, count, values)``.

    Args:
        lines: shape ``(lines, steps, values)``.
        start: the first step.
        apart: how many steps; and how far one tap is from the next.
        count: of taps.
    """
    here = lines[:, start : start + apart].flatten(0, 1)
    further = lines[:, start : start + apart * count].unflatten(1, (count, apart)).transpose(1, 2).flatten(0, 1)
    return (here.T @ further.flatten(1)).view(-1, count, lines.shape[2])


def _longest(layer: LinearMap) -> int:
    """The spatial dimension with the longest kernel."""
    return max(range(len(layer.kernel)), key=layer.kernel.__getitem__)


def _lines(layer: LinearMap, x: Tensor) -> Tensor:
    """The padded input as lines along the longest dimension of the kernel, shape ``(lines, steps, values)``.

    The windows of the other dimensions are unfolded: the values of a step are those of all channels in such a window.
    """
    dim = _longest(layer)
    padding = [side for pair in zip(reversed(layer.before), reversed(layer.after), strict=True) for side in pair]
    x = F.pad(x.double(), padding)
    x = x.movedim(2 + dim, 1)  # (batch, steps, channels, *others)
    for number, (size, stride, apart) in enumerate(zip(layer.kernel, layer.strides, layer.dilations, strict=True)):
        if number != dim:
            # The next of the other dimensions goes behind, as positions and entries of the window.
            parts = x.unfold(3, apart * (size - 1) + 1, stride)[..., ::apart]
            x = parts.movedim(3, -2)
    others = len(layer.kernel) - 1
    # (batch, steps, channels, positions, entries, positions, entries, ...)
    positions, entries = [3 + 2 * n for n in range(others)], [4 + 2 * n for n in range(others)]
    x = x.permute(0, *positions, 1, 2, *entries)
    return x.reshape(-1, x.shape[1 + others], prod(x.shape[2 + others :]))


def _reorder(layer: LinearMap, xx: Tensor, xy: Tensor) -> None:
    """Bring the features of both sums into the order of `LinearMap.features_at`, in place.

    They are numbered by channel, then by the entry of the kernel there; before by the entry along the longest
    dimension, channel, and the entry along the others.
    """
    dim, count = _longest(layer), layer.features
    others = [size for number, size in enumerate(layer.kernel) if number != dim]
    shape = (layer.kernel[dim], layer.weight_shape[1], *others)
    axes = list(range(1, len(shape)))
    axes.insert(1 + dim, 0)
    further = [len(shape) + axis for axis in axes]
    xx[:-1, :-1] = xx[:-1, :-1].view(*shape, *shape).permute(*axes, *further).reshape(count, count)
    xx[-1, :-1] = xx[-1, :-1].view(shape).permute(axes).reshape(count)
    xx[:-1, -1] = xx[-1, :-1]
    xy[:-1] = xy[:-1].view(*shape, -1).permute(*axes, len(shape)).reshape(count, -1)
