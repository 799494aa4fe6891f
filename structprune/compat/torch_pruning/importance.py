"""torch-pruning's criteria: called with a `Group`, they give one score for each of the root's channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from structprune.checking import one_of, require
from structprune.compat.torch_pruning.dependency import Group
from structprune.errors import PlanError
from structprune.importance.base import REDUCTIONS, along, member_scores, reduced
from structprune.importance.weight import tail_shares

_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda s: s / s.sum(),
    "standarization": lambda s: (s - s.min()) / (s.max() - s.min() + 1e-8),
    "mean": lambda s: s / s.mean(),
    "max": lambda s: s / s.max(),
    "gaussian": lambda s: (s - s.mean()) / (s.std() + 1e-8),
    "lamp": tail_shares,
}


class Importance:
    """What scores the channels of a group: a score for each, None if nothing of the group can be scored."""

    def __call__(self, group: Group) -> Tensor | None:
        """The scores."""
        raise NotImplementedError


@dataclass(eq=False)
class GroupMagnitudeImportance(Importance):
    """The p-th powers of the weights that go with a channel, over the layers of the group."""

    p: float = 2
    group_reduction: str | None = "mean"
    normalizer: str | Callable[[Tensor], Tensor] | None = "mean"
    bias: bool = False
    target_types: Sequence[type] = (_ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm)

    def __post_init__(self) -> None:
        require(vars(self), group_reduction=one_of((*REDUCTIONS, "gate")).or_none)
        if isinstance(self.normalizer, str):
            require(vars(self), normalizer=one_of(_NORMALIZERS))

    def _entries(self, tensor: nn.Parameter) -> Tensor:
        return tensor.abs().pow(self.p)

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        """One number for each index of a dimension, from all entries there."""
        return along(self._entries(tensor), dim)

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """A score for each of the root's channels; None if the group has no layer of the target types."""
        weights = group.weights(("conv", "linear", "batchnorm", "layernorm"), self.bias, self.target_types)

        def scores_of(name: str, dim: int) -> Tensor | None:
            tensor = weights.get(name)
            return None if tensor is None else self._slices(tensor, dim).float().cpu()

        parts = list(member_scores(group.coupled, scores_of))
        if not parts:
            return None
        if self.group_reduction is None:
            return torch.stack([score for score, _ in parts])
        last = self.group_reduction == "gate"
        scores = parts[-1][0] if last else reduced(parts, self.group_reduction, group.coupled.channels)
        normalize = _NORMALIZERS[self.normalizer] if isinstance(self.normalizer, str) else self.normalizer
        return scores if normalize is None else normalize(scores)


@dataclass(eq=False)
class BNScaleImportance(GroupMagnitudeImportance):
    """The absolute scales of batch norms (Liu et al., Network Slimming, 2017)."""

    p: float = field(default=1, init=False)
    target_types: Sequence[type] = field(default=(_BatchNorm,), init=False)


@dataclass(eq=False)
class LAMPImportance(GroupMagnitudeImportance):
    """Magnitude over what is left (Lee et al., Layer-adaptive Sparsity, 2021)."""

    normalizer: str | Callable[[Tensor], Tensor] | None = "lamp"


@dataclass(eq=False)
class FPGMImportance(GroupMagnitudeImportance):
    """The sum of distances to the other filters (He et al., 2019), of the p-th powers of weights."""

    target_types: Sequence[type] = (_ConvNd, nn.Linear)

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        rows = self._entries(tensor).movedim(dim, 0).flatten(1)
        return torch.cdist(rows[None], rows[None])[0].sum(1)


class RandomImportance(Importance):
    """Random scores, from torch's own generator."""

    def __call__(self, group: Group) -> Tensor:
        """A score for each of the root's channels."""
        return torch.rand(group.coupled.channels)


class GroupTaylorImportance(GroupMagnitudeImportance):
    """Weight times gradient: call ``backward`` before (Molchanov et al., 2019)."""

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Any = "mean",
        multivariable: bool = False,
        bias: bool = False,
        target_types: Sequence[type] = GroupMagnitudeImportance.target_types,
    ) -> None:
        super().__init__(1, group_reduction, normalizer, bias, target_types)
        self.multivariable = multivariable

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        if tensor.grad is None:
            raise PlanError(
                f"{type(self).__name__} looks at gradients, and there are none: call loss.backward() first."
            )
        product = tensor * tensor.grad
        return along(product, dim).abs() if self.multivariable else along(product.abs(), dim)


@dataclass(eq=False)
class GroupHessianImportance(GroupMagnitudeImportance):
    """Squared weight times the mean of squared gradients of samples, from `accumulate_grad` (Optimal Brain Damage)."""

    p: float = field(default=2, init=False)
    _sums: dict[nn.Parameter, tuple[Tensor, int]] = field(default_factory=dict, init=False, repr=False)

    def zero_grad(self) -> None:
        """Begin anew."""
        self._sums.clear()

    def accumulate_grad(self, model: nn.Module) -> None:
        """Add the squares of the gradients that the model holds; call it after the ``backward`` of each sample."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                total, count = self._sums.get(parameter, (torch.zeros_like(parameter), 0))
                self._sums[parameter] = total + parameter.grad.detach().square(), count + 1

    def _entries(self, tensor: nn.Parameter) -> Tensor:
        if tensor not in self._sums:
            raise PlanError("GroupHessianImportance has no gradients: call accumulate_grad(model) after backward().")
        total, count = self._sums[tensor]
        return tensor.square() * total / count


MagnitudeImportance, TaylorImportance = GroupMagnitudeImportance, GroupTaylorImportance
HessianImportance = GroupHessianImportance
_ELSEWHERE = {"OBDCImportance": "kfac", "ActivationImportance": "activation_l2"}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise AttributeError(
            f"{name} is not here: use structprune.plan(model, x, importance={_ELSEWHERE[name]!r}, data=...), which "
            "gathers what it needs by itself."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
