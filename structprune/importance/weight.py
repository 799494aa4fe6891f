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
        """Sum of ``|w| ** n`` for each index of `dim`, shape ``(weight.shape[dim],)``."""
        known = self._sums.get((name, dim))
        if known is None:
            others = [d for d in range(weight.dim()) if d != dim]
            values = weight.detach()
            if values.dtype in (torch.float16, torch.bfloat16):
                values = values.float()
            norm = torch.linalg.vector_norm(values, self.n, dim=others) if others else values.abs()
            known = self._sums[(name, dim)] = norm if math.isinf(self.n) else norm.pow(self.n)
        return known


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
