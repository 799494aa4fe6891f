"""Criteria that look at weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from structprune.errors import PlanError
from structprune.groups import Group
from structprune.importance.base import criterion


@dataclass(frozen=True, slots=True)
class LnNorm:
    """The Ln norm of everything that goes with a channel, over the whole coupled group.

    The score of channel i is the n-th root of the sum of ``|w| ** n`` over all parameter entries that removing it
    removes: its filter, its bias and norm entries, and the columns of its consumers. An entry that belongs to several
    dimensions of the group counts once for each.

    Li et al., Pruning Filters for Efficient ConvNets, 2017 (section 3.1, for n = 1 and the filter alone); Fang et al.,
    DepGraph, 2023 (equation 4, for n = 2 over the group).

    Args:
        n: the order of the norm, above 0; ``math.inf`` takes the largest entry.
    """

    n: float = 2.0
    _sums: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _spaces: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.n > 0:
            raise PlanError(f"The order of a norm must be above 0, not {self.n}.")

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``, in float32 or the weights' own type if that is wider."""
        total: Tensor | None = None
        for member in group.members:
            weight = tensors[member.tensor]
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                continue
            sums = self._along(member.tensor, weight, member.dim)
            if total is None:
                total = torch.zeros(group.channels, dtype=sums.dtype, device=sums.device)
            channels = torch.from_numpy(member.channels).to(sums.device)
            entries = sums[torch.from_numpy(member.positions).to(sums.device)].to(total.dtype)
            if math.isinf(self.n):
                total.scatter_reduce_(0, channels, entries, "amax")
            else:
                total.index_add_(0, channels, entries)
        if total is None:
            return torch.zeros(group.channels)
        return total if math.isinf(self.n) else total.pow(1 / self.n)

    def _along(self, name: str, weight: Tensor, dim: int) -> Tensor:
        """Sum (for n = inf: largest) of ``|w| ** n`` for each index of `dim`, shape ``(weight.shape[dim],)``."""
        known = self._sums.get((name, dim))
        if known is None:
            powers = self._powers(weight.detach())
            # One pass over the weight serves its first two dimensions, which are asked for one after the other.
            for place in {dim, 0, 1} & set(range(weight.dim())):
                self._sums[(name, place)] = self._reduced(powers, place)
            known = self._sums[(name, dim)]
        return known

    def _powers(self, weight: Tensor) -> Tensor:
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.float()
        powers = self._workspace(weight)
        if self.n == 2:
            return torch.mul(weight, weight, out=powers)
        torch.abs(weight, out=powers)
        return powers if self.n == 1 or math.isinf(self.n) else powers.pow_(self.n)

    def _workspace(self, like: Tensor) -> Tensor:
        """Memory for one weight at a time: fresh memory for each costs more than the arithmetic."""
        key = (like.dtype, like.device)
        space = self._spaces.get(key)
        if space is None or space.numel() < like.numel():
            space = self._spaces[key] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return space[: like.numel()].view(like.shape)

    def _reduced(self, powers: Tensor, dim: int) -> Tensor:
        if math.isinf(self.n):
            return powers.amax([d for d in range(powers.dim()) if d != dim]) if powers.dim() > 1 else powers.clone()
        if dim == 1:  # summing rows first keeps to the order of memory
            return powers.flatten(1).sum(0).view(powers.shape[1], -1).sum(1)
        return powers.movedim(dim, 0).reshape(powers.shape[dim], -1).sum(1)


@dataclass(frozen=True, slots=True)
class Random:
    """Uniform random scores from a generator of its own: the baseline, and a way to test everything else.

    Args:
        seed: of the generator; the global random state is not touched.
    """

    seed: int = 0
    _generator: torch.Generator = field(default_factory=torch.Generator, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._generator.manual_seed(self.seed)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)`` in [0, 1)."""
        return torch.rand(group.channels, generator=self._generator)


criterion("l1")(lambda: LnNorm(1.0))
criterion("l2")(lambda: LnNorm(2.0))
criterion("linf")(lambda: LnNorm(math.inf))
criterion("random")(Random)
