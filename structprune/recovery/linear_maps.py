"""Calls that are linear in an input and in a weight, with their adjoints written out: no automatic differentiation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.recovery.contraction import Contraction, contraction, options_of


@dataclass(frozen=True, slots=True)
class LinearMap:
    """One call of a convolution, a linear layer or a matrix product, as a function of its input and its weight.

    Attributes:
        name: of the operation.
        form: how it contracts.
        options: its other arguments (stride, padding, ...), by name.
    """

    name: str
    form: Contraction
    options: dict[str, Any]

    def __call__(self, x: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        """The result without a bias, plus `shift` of shape ``(channels,)``."""
        function: Any = torch.matmul if self.form.layout == "in_out" else getattr(F, self.name)
        result: Tensor = function(x, weight, **self.options)
        return result if shift is None else result + shift.reshape(-1, *[1] * (-1 - self.form.channel_dim))

    def to_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The adjoint in the input: from something shaped like the result to something shaped like `x`."""
        if self.form.kernel:
            return self._convolution(grad, x, weight, (True, False))[0]
        return grad @ (weight if self.form.layout == "out_in" else weight.T)

    def to_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The adjoint in the weight: from something shaped like the result to something shaped like `weight`."""
        if self.form.kernel:
            return self._convolution(grad, x, weight, (False, True))[1]
        rows, other = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return other.T @ rows if self.form.layout == "out_in" else rows.T @ other

    def to_shift(self, grad: Tensor) -> Tensor:
        """The adjoint in the shift: the sum over all positions."""
        return grad.movedim(self.form.channel_dim, 0).flatten(1).sum(1)

    def _convolution(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> Sequence[Tensor]:
        """ATen's adjoint of a convolution, asked for the input's or the weight's part."""
        n = len(self.form.kernel)
        transposed = self.form.layout == "transposed"
        padding = self.form.before
        strides = self.form.strides
        extra = (0,) * n
        if transposed:
            reach = [d * (k - 1) for d, k in zip(self.form.dilations, self.form.kernel, strict=True)]
            padding = tuple(r - b for r, b in zip(reach, self.form.before, strict=True))
            extra = tuple(a - b for a, b in zip(self.form.after, self.form.before, strict=True))
            strides = self.form.spread
        backward: Any = torch.ops.aten.convolution_backward
        return backward(
            grad, x, weight, None, strides, padding, self.form.dilations, transposed, extra, self.form.groups,
            (*wanted, False),
        )  # fmt: skip


def linear_map(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> LinearMap | None:
    """The map of a call; None where its form is not one that `contraction` knows, or its padding is uneven."""
    form = contraction(name, args, kwargs)
    if form is None or (form.layout == "conv" and form.before != form.after):
        return None
    return LinearMap(name, form, options_of(name, args, kwargs))
