"""How well channels tell classes apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from structprune.checking import function, one_of, require
from structprune.errors import PlanError
from structprune.importance.activation import ActivationCriterion, counted, wide
from structprune.importance.activations import Activation
from structprune.importance.base import criterion
from structprune.importance.reduce import REDUCTION


@dataclass(frozen=True, slots=True)
class TVSeparability(ActivationCriterion):
    """How well a channel tells classes apart: a lower bound on the total variation between its class distributions.

    Murti et al., TVSPrune: Pruning Non-discriminative Filters via Total Variation Separability of Intermediate
    Representations, 2023: the outputs of a filter for two classes are taken as Gaussians, and the squared Hellinger
    distance ``1 - sqrt(2 s t / (s^2 + t^2)) * exp(-(m - n)^2 / (4 (s^2 + t^2)))`` bounds their total variation from
    below. Here a filter's output is the mean of its feature map over positions.

    Args:
        pairs: ``"min"`` scores a channel by the pair of classes that it tells apart least, as the paper does,
            ``"mean"`` by the average pair.
        labels: gives the class of each sample of a batch, shape ``(samples,)``; by default the second of a pair.
        reduce: how the layers at which a group ends are joined; see `MeanActivation`.
    """

    pairs: str = "min"
    labels: Any = field(default=None)
    reduce: str = "mean"

    def __post_init__(self) -> None:
        given = {"reduce": self.reduce, "pairs": self.pairs, "labels": self.labels}
        require(given, reduce=REDUCTION, pairs=one_of(("min", "mean")), labels=function("batch").or_none)

    def gather(self, activation: Activation, batch: Any) -> Mapping[str, Tensor]:
        """Sums, squares and counts of each class, named by the class."""
        means = wide(activation.by_sample()).mean(2)
        labels = self._labels(batch, len(means)).to(means.device)
        found: dict[str, Tensor] = {}
        for label in labels.unique().tolist():
            mine = means[labels == label]
            found[f"sum {label}"] = mine.sum(0)
            found[f"square {label}"] = mine.square().sum(0)
            found[f"count {label}"] = counted(mine)
        return found

    def _labels(self, batch: Any, samples: int) -> Tensor:
        found: Any = None
        if self.labels is not None:
            found = self.labels(batch)
        elif isinstance(batch, Sequence):
            found = next(islice(batch, 1, None), None)
        if not isinstance(found, Tensor) or tuple(found.shape) != (samples,):
            raise PlanError(
                "TVSeparability needs the class of each sample, as a tensor of shape (samples,): let data give pairs "
                "of inputs and labels, or pass labels=, a function of the batch."
            )
        return found

    def position_scores(self, sums: Mapping[str, Tensor], weight: Tensor | None) -> Tensor:
        """The squared Hellinger distance of the least (or the average) pair of classes."""
        labels = [name.removeprefix("count ") for name in sums if name.startswith("count ")]
        if len(labels) < 2:
            raise PlanError("The data holds samples of a single class, so no channel can tell classes apart.")
        count = torch.stack([sums[f"count {label}"] for label in labels]).unsqueeze(1)
        mean = torch.stack([sums[f"sum {label}"] for label in labels]) / count
        variance = (torch.stack([sums[f"square {label}"] for label in labels]) / count - mean.square()).clamp(min=0)
        first, second = torch.triu_indices(len(labels), len(labels), 1).unbind()
        distance = hellinger(mean[first], variance[first], mean[second], variance[second])
        return distance.amin(0) if self.pairs == "min" else distance.mean(0)


def hellinger(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Squared Hellinger distance of Gaussians; of two that are points, whether they are different points."""
    total = variance + other_variance
    apart = (mean - other_mean).square()
    safe = torch.where(total > 0, total, 1)
    overlap = (2 * (variance * other_variance).sqrt() / safe).sqrt() * torch.exp(-apart / (4 * safe))
    return 1 - torch.where(total > 0, overlap, (apart == 0).to(overlap.dtype))


criterion("tvs")(TVSeparability)
