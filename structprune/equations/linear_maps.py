"""Operations that are linear in their input and in a held weight, as one matrix product with explicit adjoints.

A convolution is a product of patches (im2col) with its kernel, in as many independent products as it has groups. A
transposed one is a convolution over its input with zeros put in between. Only sampled positions are ever unfolded.

``conv2d`` of an input ``(2, 4, 7, 7)`` with a weight ``(6, 2, 3, 3)``, ``groups=2`` and no padding gives a result
``(2, 6, 5, 5)``. It has 2 * 5 * 5 = 50 positions. Each group multiplies features ``(50, 2 * 3 * 3)`` with a matrix
``(18, 3)``: ``features_at`` gives ``(2, 50, 18)``, ``matrix_of(weight)`` ``(2, 18, 3)``, and ``outputs_at(result)``
their product ``(2, 50, 3)``. Feature ``9 * c + k`` is entry ``k`` of the window in input channel ``c`` of the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.equations.fourier import TYPES, Spectra
from structprune.ops import kind_of, layer_of
from structprune.ops.arguments import bind
from structprune.ops.op import CONVOLUTIONS


def argument(name: str, which: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An argument of a call of a layer's operation: ``"input"``, ``"weight"``, ``"bias"``, or a name of torch's own."""
    layer = layer_of(name)
    assert layer is not None, f"{name} is no layer"
    key = {"input": layer.input, "weight": layer.weight, "bias": layer.bias}.get(which, which)
    bound = bind(name, None, args, kwargs)
    return None if bound is None else bound.get(key)


@dataclass(frozen=True, slots=True)
class LinearMap:
    """One call of a convolution, a linear layer or a matrix product, as a function of its input and its weight.

    Attributes:
        name: canonical name of the operation.
        options: arguments other than input, weight and bias (stride, padding, ...), by name.
        groups: number of independent products.
        weight_shape: shape of the weight.
        layout: of the weight: ``"conv"``, ``"transposed"``, ``"out_in"`` (linear) or ``"in_out"`` (matrix product).
        kernel: size of the windows, per spatial dimension; empty where there are no windows.
        strides, dilations: of the windows.
        before, after: zeros put around the input; negative: entries cut off.
        spread: distance at which the input's entries are put, with zeros in between: the stride of a transposed
            convolution.
    """

    name: str
    options: dict[str, Any]
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
        """Features of each group: input channels times entries of a window."""
        inputs_first = self.layout in ("transposed", "in_out")
        inputs = self.weight_shape[0] // self.groups if inputs_first else self.weight_shape[1]
        return prod(self.kernel) * inputs

    @property
    def outputs(self) -> int:
        """Output channels of each group."""
        return prod(self.weight_shape) // (self.features * self.groups)

    @property
    def channels(self) -> int:
        """Output channels of all groups."""
        return self.outputs * self.groups

    @property
    def has_adjoints(self) -> bool:
        """Whether `to_input` and `to_weight` know the call; they do not where a convolution is padded unevenly."""
        return self.layout != "conv" or self.before == self.after

    # -- the map and its adjoints ----------------------------------------------------------------------------------

    def __call__(self, x: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        """The result without a bias, plus `shift` of shape ``(channels,)``."""
        if self.layout == "in_out":
            result = torch.matmul(x, weight)
            return result if shift is None else result.add_(shift)
        spectra = self.spectra(x)
        if spectra is not None:
            result = spectra(x, weight)
            return result if shift is None else result.add_(self.along_channels(shift))
        function: Any = getattr(F, self.name)
        return function(x, weight, shift, **self.options)

    def along_channels(self, vector: Tensor) -> Tensor:
        """A vector of shape ``(channels,)`` in a shape that broadcasts with the result, ``(channels, 1, 1)`` in 2-D."""
        return vector.reshape(-1, *[1] * len(self.kernel))

    def to_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The adjoint in the input: from something shaped like the result to something shaped like `x`."""
        spectra = self.spectra(x)
        if spectra is not None:
            return spectra.to_input(grad, weight)
        if self.kernel:
            return self._convolution_backward(grad, x, weight, (True, False))[0]
        return grad @ (weight if self.layout == "out_in" else weight.T)

    def to_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The adjoint in the weight: from something shaped like the result to something shaped like `weight`."""
        spectra = self.spectra(x)
        if spectra is not None:
            return spectra.to_weight(grad, x)
        if self.kernel:
            return self._convolution_backward(grad, x, weight, (False, True))[1]
        inputs, outputs = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return outputs.T @ inputs if self.layout == "out_in" else inputs.T @ outputs

    def spectra(self, x: Tensor) -> Spectra | None:
        """How it is computed by Fourier transforms, for such an input; None where that saves no time."""
        if self.layout != "conv" or self.groups != 1 or x.dtype not in TYPES:
            return None
        return Spectra.of(x.shape[2:], self.weight_shape, self.strides, self.dilations, self.before, self.after)

    def to_shift(self, grad: Tensor) -> Tensor:
        """The adjoint in the shift: the sum over all positions, shape ``(channels,)``."""
        channels = grad.dim() + self.channel_dim
        return grad.sum([dim for dim in range(grad.dim()) if dim != channels])

    def _convolution_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, asked: tuple[bool, bool]
    ) -> Sequence[Tensor]:
        """ATen's adjoint of a convolution; `asked` tells whether the input's and the weight's part are computed."""
        transposed = self.layout == "transposed"
        padding, strides = self.before, self.strides
        output_padding = (0,) * len(self.kernel)
        if transposed:  # from the zeros around the spread input back to torch's padding: a window's reach less those
            reach = [d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True)]
            padding = tuple(r - b for r, b in zip(reach, self.before, strict=True))
            output_padding = tuple(a - b for a, b in zip(self.after, self.before, strict=True))
            strides = self.spread
        backward: Any = torch.ops.aten.convolution_backward
        return backward(
            grad, x, weight, None, strides, padding, self.dilations, transposed, output_padding, self.groups,
            (*asked, False),
        )  # fmt: skip

    # -- as a matrix product ---------------------------------------------------------------------------------------

    def features_at(self, x: Tensor, positions: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Features at flat `positions` of the result, shape ``(groups, len(positions), features)``, as `dtype`.

        With a result of shape ``(2, 6, 5, 5)``, position 27 is entry ``[1, :, 0, 2]``: 27 = (1 * 5 + 0) * 5 + 2.
        """
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])[positions].to(dtype)[None]
        windows = self._windows(x)
        n = len(self.kernel)
        places = torch.unravel_index(positions, (windows.shape[0], *windows.shape[2 : 2 + n]))
        chosen = windows.movedim(1, 1 + n)[places]  # (positions, channels, *kernel)
        return chosen.reshape(len(positions), self.groups, self.features).transpose(0, 1).to(dtype)

    def _windows(self, x: Tensor) -> Tensor:
        """A view of the windows that the kernel sees, shape ``(batch, channels, *positions, *kernel)``.

        In one dimension, with stride 2, dilation 3, a kernel of 2 and an input of 9 entries there are
        (9 - 3 * (2 - 1) - 1) // 2 + 1 = 3 windows: entries (0, 3), (2, 5) and (4, 7). The view has strides (2, 3).
        """
        if any(step != 1 for step in self.spread):
            sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.spread, strict=True)]
            wide = x.new_zeros((*x.shape[:2], *sizes))
            wide[(slice(None), slice(None), *(slice(None, None, step) for step in self.spread))] = x
            x = wide
        padding = [side for pair in zip(reversed(self.before), reversed(self.after), strict=True) for side in pair]
        x = F.pad(x, padding)
        parts = zip(x.shape[2:], self.kernel, self.strides, self.dilations, strict=True)
        sizes = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in parts]
        strides = x.stride()
        to_next_window = [s * stride for s, stride in zip(strides[2:], self.strides, strict=True)]
        within_window = [s * dilation for s, dilation in zip(strides[2:], self.dilations, strict=True)]
        return x.as_strided(
            (*x.shape[:2], *sizes, *self.kernel), (*strides[:2], *to_next_window, *within_window), x.storage_offset()
        )

    def weight_of(self, matrix: Tensor) -> Tensor:
        """The weight with this matrix: from ``(groups, features, outputs)`` to the weight's own shape."""
        if self.layout == "in_out":
            return matrix[0]
        if self.layout == "out_in":
            return matrix[0].T
        groups, _, outputs = matrix.shape
        if self.layout == "conv":
            return matrix.transpose(1, 2).reshape(self.weight_shape)
        # Transposed: (inputs, outputs of a group, *kernel), and the kernel runs backwards over the spread input.
        inside = matrix.reshape(groups, self.weight_shape[0] // groups, *self.kernel, outputs)
        inside = inside.movedim(-1, 2).reshape(self.weight_shape)
        return inside.flip(list(range(2, 2 + len(self.kernel))))

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The matrix of a weight, shape ``(groups, features, outputs)``: the inverse of `weight_of`."""
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
        """Number of positions of a result: its entries in one channel."""
        return result.numel() // result.shape[self.channel_dim]

    def outputs_at(self, result: Tensor, positions: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The channels of a result at flat `positions`, shape ``(groups, len(positions), outputs)``, as `dtype`."""
        flat = result.movedim(self.channel_dim, -1).reshape(-1, result.shape[self.channel_dim])
        return flat[positions].reshape(len(positions), self.groups, self.outputs).transpose(0, 1).to(dtype)


def with_intercept(features: Tensor, value: float = 1.0) -> Tensor:
    """Features of shape ``(groups, positions, features)`` with one more, the last, that is `value` everywhere."""
    return torch.cat([features, features.new_full((*features.shape[:2], 1), value)], 2)


def linear_map(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> LinearMap | None:
    """The map of a call of a layer's operation; None if its input is not batched, or its weight is no matrix."""
    x: Tensor = argument(name, "input", args, kwargs)
    weight: Tensor = argument(name, "weight", args, kwargs)
    kind, options = kind_of(name), _options(name, args, kwargs)
    if kind in CONVOLUTIONS:
        return _convolution(name, options, x, weight, kind == "transposed") if x.dim() == weight.dim() else None
    layout = "out_in" if kind == "linear" else "in_out"
    return LinearMap(name, options, 1, tuple(weight.shape), layout) if weight.dim() == 2 and x.dim() >= 2 else None


def _options(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call other than input, weight and bias, by torch's names."""
    layer = layer_of(name)
    assert layer is not None, f"{name} is no layer"
    bound = bind(name, None, args, kwargs) or {}
    return {key: value for key, value in bound.items() if key not in (layer.input, layer.weight, layer.bias)}


def _convolution(name: str, options: dict[str, Any], x: Tensor, weight: Tensor, transposed: bool) -> LinearMap:
    """The map of a convolution or of a transposed one.

    A transposed convolution with a kernel of 3, dilation 2 and padding 1 reaches 2 * (3 - 1) = 4 entries over; the
    convolution over the spread input that gives the same puts 4 - 1 = 3 zeros in front.
    """
    n = weight.dim() - 2
    shape = tuple(weight.shape)
    kernel = shape[2:]
    groups = options.get("groups") or 1
    strides = _per_dimension(options.get("stride"), n, 1)
    dilations = _per_dimension(options.get("dilation"), n, 1)
    padding = options.get("padding")
    reach = [dilation * (size - 1) for dilation, size in zip(dilations, kernel, strict=True)]
    ones = (1,) * n
    if transposed:
        cut = _per_dimension(padding, n, 0)
        extra = _per_dimension(options.get("output_padding"), n, 0)
        before = tuple(r - c for r, c in zip(reach, cut, strict=True))
        after = tuple(b + e for b, e in zip(before, extra, strict=True))
        return LinearMap(name, options, groups, shape, "transposed", kernel, ones, dilations, before, after, strides)
    if padding == "same":  # an odd number of zeros has one more behind
        before = tuple(r // 2 for r in reach)
        after = tuple(r - b for r, b in zip(reach, before, strict=True))
    else:
        before = after = _per_dimension(0 if padding == "valid" else padding, n, 0)
    return LinearMap(name, options, groups, shape, "conv", kernel, strides, dilations, before, after, ones)


def _per_dimension(value: Any, n: int, default: int) -> tuple[int, ...]:
    """One number for each of `n` spatial dimensions: 2 becomes (2, 2), and so does (2,)."""
    if value is None:
        return (default,) * n
    if isinstance(value, int):
        return (value,) * n
    values = tuple(int(v) for v in value)
    return values * n if len(values) == 1 else values
