"""Layers run on constants: what channels add to the result, and which channels a layer reads at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from structprune.masks.states import FAILURES, ROUNDING, call
from structprune.ops import layer_of
from structprune.ops.arguments import arguments
from structprune.ops.relations import Axes
from structprune.tracing.provenance import plain

KINDS = frozenset({"convolution", "transposed", "linear", "product"})


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A call of an operation that sums its input's channels with a weight that the model holds.

    Attributes:
        node: the call.
        x, weight, bias: its arguments.
        dim: the dimension of the input that is summed over, counted from the end.
        shape: an input on which all positions that can differ are there: size 1 along batch and tokens; of an image as
            much as shows each way in which a kernel can stand over its border.
        options: arguments that differ from those of the call: convolutions run with stride 1, so that a window stands
            at each place where one could stand in an image of any size.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    dim: int
    shape: tuple[int, ...]
    options: dict[str, int]

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """The result without the bias; `x` is of shape `shape`, both of float64."""
        given = {self.x: x, self.weight: weight}
        if self.bias is not None:
            given[self.bias] = torch.zeros(self.bias.meta["shape"], dtype=torch.float64)
        return call(self.node, given, dict(self.options))

    def spread(self, channels: Tensor) -> Tensor:
        """A state of the input (or a part of one) at each position of `shape`."""
        return channels.expand(self.shape).contiguous()

    def added(self, constants: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What constant channels add to the result, and where that is not the same at each position.

        Args:
            constants: a state's values of the input, 0 where they are to be left out.
            weight: float64.

        Returns:
            Two tensors with size 1 along all positions of the result.
        """
        x = self.spread(constants)
        result, scale = self.run(x, weight), self.run(x.abs(), weight.abs())
        dims = [d for d in range(result.dim()) if d != self.result_dim % result.dim()]
        if not dims:
            return result, torch.zeros_like(result, dtype=torch.bool)
        low, high = result.amin(dims, keepdim=True), result.amax(dims, keepdim=True)
        uneven = (high - low) > ROUNDING * scale.amax(dims, keepdim=True)
        return result.mean(dims, keepdim=True), uneven

    @property
    def result_dim(self) -> int:
        """The dimension of the result that holds the layer's channels, counted from the end."""
        return self.dim

    def read(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The sum of the absolute weights by which each input channel reaches kept results, of shape `shape`.

        Args:
            weight: float64.
            kept: for each channel of the result, whether it is kept; shape ``(channels,)``.
        """
        with torch.enable_grad():
            x = torch.zeros(self.shape, dtype=torch.float64, requires_grad=True)
            result = self.run(x, weight.abs())
            shape = [-1 if d == self.result_dim % result.dim() else 1 for d in range(result.dim())]
            (reached,) = torch.autograd.grad((result * kept.double().view(shape)).sum(), x)
        return reached

    def uneven_channels(self, weight: Tensor, kept: Tensor) -> Tensor:
        """Input channels that, as constants, add other amounts at the border than inside; shape ``(channels,)``.

        One channel of ones goes through the kernel of each pair of channels, as if each were a filter of its own:
        weights ``(16, 8, 3, 3)`` become ``(128, 1, 3, 3)``.
        """
        size = self.shape[self.dim]
        if "stride" not in self.options:  # no plain convolution
            return torch.ones(size, dtype=torch.bool)
        space = self.shape[self.dim + 1 :]
        kernel = weight.shape[2:]
        ones = torch.ones((1, 1, *space), dtype=torch.float64)
        given = {self.x: ones, self.weight: weight.reshape(-1, 1, *kernel)}
        if self.bias is not None:
            given[self.bias] = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.float64)
        result = call(self.node, given, {**self.options, "groups": 1}).flatten(2)[0]
        uneven = (result.amax(1) - result.amin(1)) > ROUNDING * weight.abs().reshape(len(result), -1).sum(1)
        uneven = uneven.view(weight.shape[0], weight.shape[1]) & kept[:, None]
        groups = size // weight.shape[1]
        return uneven.view(groups, -1, weight.shape[1]).any(1).reshape(-1)


def layer(node: fx.Node, axes_of: Callable[[fx.Node], Axes]) -> Layer | None:
    """The call of a layer; None if the operation is none, or its weight is computed.

    Args:
        node: an operation.
        axes_of: gives the axes of a tensor.
    """
    known = layer_of(node.meta["name"])
    if known is None or known.kind not in KINDS or node.kwargs.keys() & {"alpha", "beta"}:
        return None
    given = arguments(node)
    x, weight, bias = given.get(known.input), given.get(known.weight), given.get(known.bias)
    if not isinstance(x, fx.Node) or not _is_parameter(weight) or (bias is not None and not _is_vector(bias)):
        return None
    if x is weight:
        return None
    axes, dim, options = axes_of(x), -1, dict[str, Any]()
    if known.kind != "product":
        dim = next(iter(known.pairs(node))).dim
        options = {"stride": 1} if known.kind == "convolution" else {}
    elif len(weight.meta["shape"]) != 2 or len(axes) < 2:
        return None
    if any(axis.free for axis in axes[len(axes) + dim + 1 :]):  # positions that may go themselves
        return None
    shape = (*_ahead(axes[: len(axes) + dim]), axes[dim].size, *_image(weight, given, -1 - dim))
    return Layer(node, x, weight, bias, dim, shape, options)


def _ahead(axes: Axes) -> list[int]:
    """Sizes of the dimensions before the channels: one of each batch entry and token, as they are all alike."""
    return [axis.size if axis.free else 1 for axis in axes]


def _image(weight: fx.Node, given: Mapping[str, Any], space: int) -> list[int]:
    """The smallest image that shows each way in which the kernel can stand over the border.

    A kernel of 3 x 3 with dilation 1 spans 3 positions: 7 x 7 have 2 on each side that it can hang over, and 3 inside.
    """
    kernel = weight.meta["shape"][2:] if space else ()
    dilations = plain(given.get("dilation", 1))
    dilations = [dilations] * space if isinstance(dilations, int) else list(dilations) * (space // len(dilations))
    return [2 * d * (int(k) - 1) + 3 for d, k in zip(dilations, kernel, strict=True)]


def _is_parameter(value: object) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and value.meta["name"] == "parameter"


def _is_vector(bias: object) -> TypeGuard[fx.Node]:
    return _is_parameter(bias) and len(bias.meta["shape"]) == 1


def runs(one: Layer, weight: Tensor) -> bool:
    """Whether the layer can be run on constants at all."""
    try:
        one.run(torch.zeros(one.shape, dtype=torch.float64), weight)
    except FAILURES:
        return False
    return True
