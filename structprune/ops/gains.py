"""Norms that a layer's weights are divided by, and the parameters that make up for a change of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gain:
    """`tensor` makes up for the smaller norm that what is left of `weight` is divided by.

    With no `vectors`, each index along `dim` of `weight` is divided by its own norm, and `tensor` holds the lengths
    that they get instead (``g * v / |v|``). With two, `weight`, as a matrix with an axis for each index of `dim`, is
    divided by ``vectors[0] @ weight @ vectors[1]``, and `tensor` is one of them. The factors are computed when a plan
    is applied, since they depend on the weights.
    """

    tensor: str
    weight: str
    dim: int
    vectors: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that take part."""
        return (self.tensor, self.weight, *self.vectors)


def divisors(gain: Gain, tensors: Mapping[str, Tensor]) -> Tensor:
    """What the weight is divided by, in float64: of size 1 in all dimensions but its own, or a single number.

    Args:
        gain: which norm.
        tensors: the tensors that it names, all of the original or all of the smaller model.
    """
    weight = tensors[gain.weight].detach().double()
    if not gain.vectors:
        return torch.norm_except_dim(weight, 2, gain.dim)
    left, right = (tensors[name].detach().double() for name in gain.vectors)
    return left @ (as_matrix(weight, gain.dim) @ right)


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """One axis for each index of `dim`: of shape ``(out, in, 3, 3)`` and dimension 0, ``(out, 9 * in)``."""
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def effective(gain: Gain, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that a layer computes from these tensors, in float64."""
    weight = tensors[gain.weight].detach().double()
    divided = weight / divisors(gain, tensors)
    if gain.vectors:
        return divided
    length = tensors[gain.tensor].detach().double()
    return divided * length.reshape([-1 if at == gain.dim else 1 for at in range(weight.dim())])
