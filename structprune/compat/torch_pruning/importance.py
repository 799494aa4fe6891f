"""torch-pruning's criteria: called with a `Group`, they give one score for each of the root's channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from structprune.checking import one_of, require
from structprune.compat.torch_pruning.dependency import Group
from structprune.compat.torch_pruning.function import SCORED, dim_of
from structprune.errors import PlanError
from structprune.importance.base import along, gathered, reduced

TARGET_TYPES = (_ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm)
Normalizer = str | Callable[[Tensor], Tensor] | None


def _lamp(scores: Tensor) -> Tensor:
    """Each score over the sum of those that are no smaller (Lee et al., 2021)."""
    ordered, order = scores.sort()
    before = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)[:-1]])
    return torch.zeros_like(scores).index_copy_(0, order, ordered / (scores.sum() - before))


_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda s: s / s.sum(),
    "standarization": lambda s: (s - s.min()) / (s.max() - s.min() + 1e-8),
    "mean": lambda s: s / s.mean(),
    "max": lambda s: s / s.max(),
    "gaussian": lambda s: (s - s.mean()) / (s.std() + 1e-8),
    "lamp": _lamp,
}


class Importance:
    """What scores the channels of a group: a score for each, None if nothing of the group can be scored."""

    def __call__(self, group: Group) -> Tensor | None:
        """The scores."""
        raise NotImplementedError


class GroupMagnitudeImportance(Importance):
    """The p-th powers of the weights that go with a channel, over the layers of the group."""

    def __init__(
        self,
        p: float = 2,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = TARGET_TYPES,
    ) -> None:
        require(locals(), group_reduction=one_of(("sum", "mean", "max", "prod", "first", "gate")).or_none)
        if isinstance(normalizer, str):
            require(locals(), normalizer=one_of(_NORMALIZERS))
        self.p, self.group_reduction, self.normalizer, self.bias = p, group_reduction, normalizer, bias
        self.target_types = tuple(target_types)

    def _entries(self, tensor: nn.Parameter) -> Tensor:
        return tensor.abs().pow(self.p)

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        """One number for each index of a dimension, from all entries there."""
        return along(self._entries(tensor), dim)

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """A score for each of the root's channels; None if the group has no layer of the target types."""
        # Roots may be few of the layer's channels, and any of them: [2, 6, 9] are scored as [0, 1, 2].
        place = {root: number for number, root in enumerate(sorted({r for item in group for r in item.root_idxs}))}
        parts: list[tuple[Tensor, Tensor]] = []
        for item in group:
            roots, idxs = torch.tensor([place[root] for root in item.root_idxs]), torch.tensor(item.idxs)
            scores = self._scores_of(item.dep.layer, item.dep.handler)
            parts += [self._gathered(score.float().cpu()[idxs], roots, len(place)) for score in scores]
        if not parts:
            return None
        if self.group_reduction is None:
            return torch.stack([score for score, _ in parts])
        scores = self._reduced(parts, self.group_reduction, len(place))
        normalize = _NORMALIZERS[self.normalizer] if isinstance(self.normalizer, str) else self.normalizer
        return scores if normalize is None else normalize(scores)

    def _scores_of(self, layer: Any, handler: Any) -> list[Tensor]:
        """The scores of a layer's channels: from its weight, and from its bias if that counts."""
        if handler not in SCORED or not isinstance(layer, self.target_types) or layer.weight is None:
            return []
        scores = [self._slices(layer.weight, dim_of(layer, handler.out))]
        if self.bias and handler.out and layer.bias is not None:
            scores.append(self._entries(layer.bias))
        return scores

    @staticmethod
    def _reduced(parts: list[tuple[Tensor, Tensor]], how: str, channels: int) -> Tensor:
        """One score for each channel from those of all layers."""
        if how == "gate":
            return reduced(parts[-1:], "sum", channels)
        if how == "mean":  # over all, where structprune's is over those that have the channel
            return reduced(parts, "sum", channels) / len(parts)
        return reduced(parts, how, channels)

    def _gathered(self, values: Tensor, roots: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """One value for each root from those of all its indices, and which roots have any."""
        if self.group_reduction not in ("max", "prod"):
            return gathered(values, torch.arange(len(values)), roots, channels)
        how = "amax" if self.group_reduction == "max" else "prod"
        best = torch.ones(channels).scatter_reduce(0, roots, values, how, include_self=False)
        return best, torch.bincount(roots, minlength=channels) > 0


class BNScaleImportance(GroupMagnitudeImportance):
    """The absolute scales of batch norms (Liu et al., Network Slimming, 2017)."""

    def __init__(self, group_reduction: str | None = "mean", normalizer: Normalizer = "mean") -> None:
        super().__init__(1, group_reduction, normalizer, False, (_BatchNorm,))


class LAMPImportance(GroupMagnitudeImportance):
    """Magnitude over what is left (Lee et al., Layer-adaptive Sparsity, 2021)."""

    def __init__(
        self, p: float = 2, group_reduction: str | None = "mean", normalizer: Normalizer = "lamp", bias: bool = False
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias)


class FPGMImportance(GroupMagnitudeImportance):
    """The sum of distances to the other filters (He et al., 2019), of the p-th powers of weights."""

    def __init__(
        self, p: float = 2, group_reduction: str | None = "mean", normalizer: Normalizer = "mean", bias: bool = False
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias, (_ConvNd, nn.Linear))

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        rows = self._entries(tensor).movedim(dim, 0).flatten(1)
        return torch.cdist(rows[None], rows[None])[0].sum(1)


class RandomImportance(Importance):
    """Random scores, from torch's own generator."""

    def __call__(self, group: Group) -> Tensor:
        """A score for each of the root's channels."""
        return torch.rand(len(set(group[0].root_idxs)))


class GroupTaylorImportance(GroupMagnitudeImportance):
    """Weight times gradient: call ``backward`` before (Molchanov et al., 2019)."""

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        multivariable: bool = False,
        bias: bool = False,
        target_types: Sequence[type] = TARGET_TYPES,
    ) -> None:
        super().__init__(1, group_reduction, normalizer, bias, target_types)
        self.multivariable = multivariable

    def _products(self, tensor: nn.Parameter) -> Tensor:
        if tensor.grad is None:
            raise PlanError(
                f"{type(self).__name__} looks at gradients, and there are none: call loss.backward() first."
            )
        return tensor * tensor.grad

    def _entries(self, tensor: nn.Parameter) -> Tensor:
        return self._products(tensor).abs()

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        return along(self._products(tensor), dim).abs() if self.multivariable else super()._slices(tensor, dim)


class GroupHessianImportance(GroupMagnitudeImportance):
    """Squared weight times the mean of squared gradients of samples, from `accumulate_grad` (Optimal Brain Damage)."""

    def __init__(
        self, group_reduction: str | None = "mean", normalizer: Normalizer = "mean", bias: bool = False
    ) -> None:
        super().__init__(1, group_reduction, normalizer, bias)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Begin anew."""
        self._sums: dict[nn.Parameter, tuple[Tensor, int]] = {}

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
