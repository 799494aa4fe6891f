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
from structprune.compat.torch_pruning.functions import CONV_IN, CONV_OUT, LINEAR_IN, LINEAR_OUT, NORMS, dim_of
from structprune.errors import PlanError

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
    """What scores the channels of a group."""

    def __call__(self, group: Group) -> Tensor | None:
        """A score for each of the root's channels; None if nothing of the group can be scored."""
        raise NotImplementedError


class GroupMagnitudeImportance(Importance):
    """The p-th powers of the weights that go with a channel, over the layers of the group."""

    def __init__(
        self,
        p: float = 2,
        group_reduction: str = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = TARGET_TYPES,
    ) -> None:
        require(locals(), group_reduction=one_of(("sum", "mean", "max", "prod", "first")))
        if isinstance(normalizer, str):
            require(locals(), normalizer=one_of(_NORMALIZERS))
        self.p, self.group_reduction, self.normalizer, self.bias = p, group_reduction, normalizer, bias
        self.target_types = tuple(target_types)

    def _entries(self, tensor: nn.Parameter) -> Tensor:
        return tensor.abs().pow(self.p)

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        """One number for each index of a dimension, from all entries there."""
        return self._entries(tensor).movedim(dim, 0).flatten(1).sum(1) if tensor.dim() > 1 else self._entries(tensor)

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """A score for each of the root's channels; None if the group has no layer of the target types."""
        found: list[tuple[Tensor, Tensor]] = []
        for item in group:
            layer, handler = item.dep.layer, item.dep.handler
            scored = handler in (CONV_OUT, CONV_IN, LINEAR_OUT, LINEAR_IN, *NORMS)
            if not scored or not isinstance(layer, self.target_types) or layer.weight is None:
                continue
            roots = torch.tensor(item.root_idxs, device=layer.weight.device)
            found.append((self._slices(layer.weight, dim_of(layer, handler))[item.idxs], roots))
            if self.bias and handler.out and layer.bias is not None:
                found.append((self._entries(layer.bias)[item.idxs], roots))
        if not found:
            return None
        # Roots may be few of the layer's channels, and any of them: [2, 6, 9] are scored as [0, 1, 2].
        known, place = torch.cat([roots.cpu() for _, roots in found]).unique(return_inverse=True)
        places = place.split([len(roots) for _, roots in found])
        scores = self._reduced([score.float().cpu() for score, _ in found], list(places), len(known))
        if self.normalizer is None:
            return scores
        return (_NORMALIZERS[self.normalizer] if isinstance(self.normalizer, str) else self.normalizer)(scores)

    def _reduced(self, scores: list[Tensor], places: list[Tensor], channels: int) -> Tensor:
        if self.group_reduction == "first":
            return torch.zeros(channels).scatter_(0, places[0], scores[0])
        how = {"max": "amax", "prod": "prod"}.get(self.group_reduction, "sum")
        start = {"amax": torch.full((channels,), -torch.inf), "prod": torch.ones(channels)}.get(
            how, torch.zeros(channels)
        )
        total = start.scatter_reduce(0, torch.cat(places), torch.cat(scores), how)
        return total / len(scores) if self.group_reduction == "mean" else total


class BNScaleImportance(GroupMagnitudeImportance):
    """The absolute scales of batch norms (Liu et al., Network Slimming, 2017)."""

    def __init__(self, group_reduction: str = "mean", normalizer: Normalizer = "mean") -> None:
        super().__init__(1, group_reduction, normalizer, False, (_BatchNorm,))


class LAMPImportance(GroupMagnitudeImportance):
    """Magnitude over what is left (Lee et al., Layer-adaptive Sparsity, 2021)."""

    def __init__(
        self, p: float = 2, group_reduction: str = "mean", normalizer: str = "lamp", bias: bool = False
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias)


class FPGMImportance(GroupMagnitudeImportance):
    """The sum of distances to the other filters (He et al., 2019), of the p-th powers of weights."""

    def __init__(
        self, p: float = 2, group_reduction: str = "mean", normalizer: Normalizer = "mean", bias: bool = False
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias, (_ConvNd, nn.Linear))

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        if tensor.dim() == 1:
            return self._entries(tensor)
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
        group_reduction: str = "mean",
        normalizer: Normalizer = "mean",
        multivariable: bool = False,
        bias: bool = False,
        target_types: Sequence[type] = TARGET_TYPES,
    ) -> None:
        super().__init__(1, group_reduction, normalizer, bias, target_types)
        self.multivariable = multivariable

    def _gradient(self, tensor: nn.Parameter) -> Tensor:
        if tensor.grad is None:
            raise PlanError(
                f"{type(self).__name__} looks at gradients, and there are none: call loss.backward() first."
            )
        return tensor.grad

    def _entries(self, tensor: nn.Parameter) -> Tensor:
        return (tensor * self._gradient(tensor)).abs()

    def _slices(self, tensor: nn.Parameter, dim: int) -> Tensor:
        if not self.multivariable or tensor.dim() == 1:
            return super()._slices(tensor, dim)
        return (tensor * self._gradient(tensor)).movedim(dim, 0).flatten(1).sum(1).abs()


class GroupHessianImportance(GroupTaylorImportance):
    """Squared weight times the sum of squared gradients of samples, from `accumulate_grad` (Optimal Brain Damage)."""

    def __init__(self, group_reduction: str = "mean", normalizer: Normalizer = "mean", bias: bool = False) -> None:
        super().__init__(group_reduction, normalizer, False, bias)
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._counts: dict[nn.Parameter, int] = {}

    def zero_grad(self) -> None:
        """Begin anew."""
        self._sums.clear()
        self._counts.clear()

    def accumulate_grad(self, model: nn.Module) -> None:
        """Add the squares of the gradients that the model holds; call it after the ``backward`` of each sample."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._sums[parameter] = self._sums.get(parameter, 0) + parameter.grad.detach().square()
                self._counts[parameter] = self._counts.get(parameter, 0) + 1

    def _entries(self, tensor: nn.Parameter) -> Tensor:
        if tensor not in self._sums:
            raise PlanError("GroupHessianImportance has no gradients: call accumulate_grad(model) after backward().")
        return tensor.square() * self._sums[tensor] / self._counts[tensor]


MagnitudeImportance, TaylorImportance, HessianImportance = (
    GroupMagnitudeImportance,
    GroupTaylorImportance,
    GroupHessianImportance,
)
_ELSEWHERE = {"OBDCImportance": "kfac", "ActivationImportance": "activation_l2"}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise AttributeError(
            f"{name} is not here: use structprune.plan(model, x, importance={_ELSEWHERE[name]!r}, data=...), which "
            "gathers what it needs by itself."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
