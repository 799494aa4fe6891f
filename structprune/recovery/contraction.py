"""Operations that are linear in a held weight, as one matrix product: rows of features times a matrix.

A convolution is a product of patches (im2col) with its kernel, grouped in as many products as it has groups; a
transposed one is a convolution over its input with zeros put in between. Only sampled positions are ever unfolded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.ops import layer_of
from structprune.ops.arguments import bind


def argument(name: str, which: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An argument of a call of a layer's operation: ``"input"``, ``"weight"``, ``"bias"``, or a name of torch's own."""
    layer = layer_of(name)
    assert layer is not None, f"{name} is no layer"
    key = {"input": layer.input, "weight": layer.weight, "bias": layer.bias}.get(which, which)
    bound = bind(name, None, args, kwargs)
    return None if bound is None else bound.get(key)


def options_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a layer's operation that are no tensors, by torch's names."""
    layer = layer_of(name)
    assert layer is not None, f"{name} is no layer"
    bound = bind(name, None, args, kwargs) or {}
    return {key: value for key, value in bound.items() if key not in (layer.input, layer.weight, layer.bias)}


def _tuple(value: Any, n: int, default: int) -> tuple[int, ...]:
    if value is None:
        return (default,) * n
    if isinstance(value, int):
        return (value,) * n
    values = tuple(int(v) for v in value)
    return values * n if len(values) == 1 else values


@dataclass(frozen=True, slots=True)
class Contraction:
    """How one call contracts its input with its weight.

    Attributes:
        groups: number of independent products.
        channel_dim: dimension of the result that holds its channels, counted from the end.
        strides, dilations, before, after: of the windows, per spatial dimension; ``before`` and ``after`` are the zeros
            put around the input (negative: cut off). Empty where there are no windows.
        kernel: size of the windows.
        spread: zeros put between neighbouring inputs, plus one: the stride of a transposed convolution.
        weight_shape: shape of the weight.
        layout: ``"conv"``, ``"transposed"``, ``"out_in"`` (linear) or ``"in_out"`` (a matrix product).
    """

    groups: int
    weight_shape: tuple[int, ...]
    layout: str
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    spread: tuple[int, ...] = ()

    @property
    def channel_dim(self) -> int:
        """Dimension of the input's and of the result's channels, counted from the end."""
        return -1 - len(self.kernel)

    @property
    def features(self) -> int:
        """Features of each group."""
        return prod(self.kernel) * (
            self.weight_shape[0] // self.groups if self.layout in ("transposed", "in_out") else self.weight_shape[1]
        )

    @property
    def weight_outputs(self) -> int:
        """Outputs of each group."""
        return prod(self.weight_shape) // (self.features * self.groups)

    def rows(self, x: Tensor, positions: Tensor) -> Tensor:
        """Features at flat `positions` of the result, shape ``(groups, len(positions), features)``, in float64."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])[positions].double()[None]
        windows = self._windows(x)
        n = len(self.kernel)
        places = torch.unravel_index(positions, (windows.shape[0], *windows.shape[2 : 2 + n]))
        taken = windows.movedim(1, 1 + n)[places]  # (positions, channels, *kernel)
        return taken.reshape(len(positions), self.groups, -1).transpose(0, 1).double()

    def _windows(self, x: Tensor) -> Tensor:
        """A view of the windows that the kernel sees, shape ``(batch, channels, *positions, *kernel)``."""
        if any(step != 1 for step in self.spread):
            sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.spread, strict=True)]
            wide = x.new_zeros((*x.shape[:2], *sizes))
            wide[(slice(None), slice(None), *(slice(None, None, step) for step in self.spread))] = x
            x = wide
        padding = [side for pair in zip(reversed(self.before), reversed(self.after), strict=True) for side in pair]
        x = F.pad(x, padding)
        parts = zip(x.shape[2:], self.kernel, self.strides, self.dilations, strict=True)
        sizes = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in parts]
        own = x.stride()
        moves = [s * stride for s, stride in zip(own[2:], self.strides, strict=True)]
        reach = [s * dilation for s, dilation in zip(own[2:], self.dilations, strict=True)]
        return x.as_strided((*x.shape[:2], *sizes, *self.kernel), (*own[:2], *moves, *reach), x.storage_offset())

    def weight(self, matrix: Tensor) -> Tensor:
        """The weight whose matrix this is: from ``(groups, features, outputs)`` to the weight's own shape."""
        if self.layout == "in_out":
            return matrix[0]
        if self.layout == "out_in":
            return matrix[0].T
        groups, _, outputs = matrix.shape
        if self.layout == "conv":
            return matrix.transpose(1, 2).reshape(self.weight_shape)
        inside = matrix.reshape(groups, self.weight_shape[0] // groups, *self.kernel, outputs)
        inside = inside.movedim(-1, 2).reshape(self.weight_shape)
        return inside.flip(list(range(2, 2 + len(self.kernel))))

    def matrix(self, weight: Tensor) -> Tensor:
        """The other way: from the weight to ``(groups, features, outputs)``."""
        if self.layout == "in_out":
            return weight[None]
        if self.layout == "out_in":
            return weight.T[None]
        if self.layout == "conv":
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).transpose(1, 2)
        weight = weight.flip(list(range(2, weight.dim())))
        inside = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return inside.movedim(2, -1).reshape(self.groups, -1, weight.shape[1])

    def positions(self, result: Tensor) -> int:
        """Number of positions of a result: all its entries but for channels."""
        return result.numel() // result.shape[self.channel_dim]

    def outputs(self, result: Tensor, positions: Tensor) -> Tensor:
        """The channels of a result at flat `positions`, shape ``(groups, len(positions), outputs)``, in float64."""
        flat = result.movedim(self.channel_dim, -1).reshape(-1, result.shape[self.channel_dim])
        return flat[positions].reshape(len(positions), self.groups, -1).transpose(0, 1).double()


def contraction(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    """How this call contracts its input; None if it is not batched, or is in a form that is not solved for."""
    x: Tensor = argument(name, "input", args, kwargs)
    weight: Tensor = argument(name, "weight", args, kwargs)
    shape = tuple(weight.shape)
    if not name.startswith("conv"):
        layout = "out_in" if name == "linear" else "in_out"
        return Contraction(1, shape, layout) if weight.dim() == 2 and x.dim() >= 2 else None
    n = weight.dim() - 2
    if x.dim() != n + 2:
        return None
    padding = argument(name, "padding", args, kwargs)
    groups = argument(name, "groups", args, kwargs) or 1
    strides = _tuple(argument(name, "stride", args, kwargs), n, 1)
    dilations = _tuple(argument(name, "dilation", args, kwargs), n, 1)
    kernel = shape[2:]
    reach = [dilation * (size - 1) for dilation, size in zip(dilations, kernel, strict=True)]
    ones = (1,) * n
    if name.startswith("conv_transpose"):
        cut = _tuple(padding, n, 0)
        extra = _tuple(argument(name, "output_padding", args, kwargs), n, 0)
        before = tuple(r - c for r, c in zip(reach, cut, strict=True))
        after = tuple(b + e for b, e in zip(before, extra, strict=True))
        return Contraction(groups, shape, "transposed", kernel, ones, dilations, before, after, strides)
    if padding == "same":  # what is left over goes behind
        before = tuple(r // 2 for r in reach)
        after = tuple(r - b for r, b in zip(reach, before, strict=True))
    else:
        before = after = _tuple(0 if padding == "valid" else padding, n, 0)
    return Contraction(groups, shape, "conv", kernel, strides, dilations, before, after, ones)


def apply_matrix(name: str, found: Contraction, matrix: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """What the call would give with the weight of `matrix` and no bias, for all positions."""
    x: Tensor = argument(name, "input", args, kwargs)
    weight = found.weight(matrix).to(x.dtype)
    if name == "linear":
        return F.linear(x, weight)
    if not name.startswith("conv"):
        return x @ weight
    function: Any = getattr(F, name)
    return function(x, weight, None, **options_of(name, args, kwargs))
