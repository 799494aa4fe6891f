"""Criteria that ask whether other channels of a group could stand in for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import FLAG, function, one_of, real, require, whole
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.importance.activation import ActivationCriterion, counted, wide
from structprune.importance.activations import Activation
from structprune.importance.base import REDUCTION, criterion, floating, indices, padded

_BLOCK = 1024  # channels whose distances to all others are held at once


def _check(slices: str) -> None:
    require(locals(), slices=one_of(("all", "output")))


def filters(group: Group, tensors: Mapping[str, Tensor], slices: str) -> Iterator[Tensor]:
    """The slices that go with each channel, as matrices of shape ``(channels, entries)``, one for each tensor.

    Args:
        group: the channels.
        tensors: the tensors of the model by name.
        slices: ``"output"`` takes only dimension 0 of tensors with two dimensions or more: the filters that make the
            channels (or, if there are none, whatever there is).
    """
    members = [m for m in group.members if isinstance(tensors[m.tensor], nn.Parameter)]
    members = [m for m in members if tensors[m.tensor].is_floating_point()]
    makers = [m for m in members if m.dim == 0 and tensors[m.tensor].dim() > 1]
    for member in makers if slices == "output" and makers else members:
        weight = floating(tensors[member.tensor])
        table, real = padded(*indices(member, weight.device), group.channels)
        rows = weight.movedim(member.dim, 0).reshape(weight.shape[member.dim], -1)
        yield (rows[table] * real.unsqueeze(2)).flatten(1)


def _joined(group: Group, tensors: Mapping[str, Tensor], slices: str) -> Tensor:
    parts = [part.double() if part.device.type != "mps" else part for part in filters(group, tensors, slices)]
    return torch.cat(parts, 1) if parts else torch.zeros(group.channels, 1)


@dataclass(frozen=True, slots=True)
class FPGM:
    """Sum of the distances to the other channels of the group: the nearer a channel is to all, the easier to replace.

    He et al., Filter Pruning via Geometric Median, 2019, on the weights that go with a channel.

    Args:
        slices: ``"output"``: the filters that make the channels, as in the paper; ``"all"``: everything that goes with
            them, norms and consumers included, as a channel goes with all of it.
        squared: whether the sum is squared. Within a group that changes no rank. Where groups compete, scores of
            filters that lie far apart differ too little from their mean without it (see `LnNorm`). ``"fpgm"`` is
            ``FPGM("all", squared=True)``, which ``benchmarks/criteria.py`` measures beside the filters alone.
    """

    slices: str = "output"
    squared: bool = False

    def __post_init__(self) -> None:
        _check(self.slices)
        require({"squared": self.squared}, squared=FLAG)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        rows = _joined(group, tensors, self.slices)
        sums = torch.cat([torch.cdist(block, rows, compute_mode=_EXACT).sum(1) for block in rows.split(_BLOCK)])
        return sums.square() if self.squared else sums


_EXACT = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """Distance to the geometric median of the channels of the group.

    He et al., 2019, solved as such rather than among the channels themselves: by Weiszfeld's iteration, in
    the form of Vardi and Zhang, 2000, which does not stop where the estimate meets a channel.

    Args:
        slices: see `FPGM`.
        steps: most iterations.
        tolerance: it ends when the median moves by less than this share of the mean distance.
    """

    slices: str = "output"
    steps: int = 1000
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        _check(self.slices)
        given = {"steps": self.steps, "tolerance": self.tolerance}
        require(given, steps=whole(1), tolerance=real(least=0))

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        rows = _joined(group, tensors, self.slices)
        if rows.is_meta:
            return rows.sum(1)
        return torch.linalg.vector_norm(rows - geometric_median(rows, self.steps, self.tolerance), dim=1)


def geometric_median(points: Tensor, steps: int = 1000, tolerance: float = 1e-10) -> Tensor:
    """The point with the smallest sum of distances to `points`, of shape ``(n, dimensions)``.

    Example:
        >>> import torch
        >>> geometric_median(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    median = points.mean(0)
    for _ in range(steps):
        away = points - median
        distance = torch.linalg.vector_norm(away, dim=1)
        scale = distance.mean()
        apart = distance > 1e-14 * scale
        if not bool(apart.any()):
            break
        weight = torch.where(apart, 1 / torch.where(apart, distance, 1), 0)
        pull = (away * weight.unsqueeze(1)).sum(0)
        step = pull / weight.sum()
        # A point on the spot holds the median back by at most one unit of pull for each such point.
        held = (~apart).sum() / torch.linalg.vector_norm(pull).clamp(min=torch.finfo(points.dtype).tiny)
        step = step * (1 - held).clamp(min=0)
        median = median + step
        if torch.linalg.vector_norm(step) <= tolerance * scale:
            break
    return median


@dataclass(frozen=True, slots=True)
class Cosine:
    """How unlike the other channels of the group a channel is: one minus its cosine similarity to them.

    The similarity is taken without its sign, since the next layer can absorb a factor of any sign. A channel whose
    weights are all zero can always be replaced, and scores zero.

    Args:
        against: ``"nearest"``: the channel that is most alike; ``"mean"``: all others on average.
        slices: see `FPGM`.
    """

    against: str = "nearest"
    slices: str = "output"

    def __post_init__(self) -> None:
        _check(self.slices)
        require({"against": self.against}, against=one_of(("nearest", "mean")))

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)`` in [0, 1]."""
        rows = _joined(group, tensors, self.slices)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows / torch.where(length > 0, length, 1)
        unlike: list[Tensor] = []
        for start in range(0, group.channels, _BLOCK):
            alike = (rows[start : start + _BLOCK] @ rows.T).abs()
            number = torch.arange(len(alike), device=alike.device)
            alike[number, start + number] = 0
            others = max(1, group.channels - 1)
            unlike.append(alike.amax(1) if self.against == "nearest" else alike.sum(1) / others)
        return torch.where(length[:, 0] > 0, (1 - torch.cat(unlike)).clamp(min=0), 0)


criterion("fpgm")(lambda: FPGM("all", squared=True))
criterion("geometric_median")(GeometricMedian)
criterion("cosine")(Cosine)


# -- how well channels tell classes apart ----------------------------------------------------------------------------


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
        sums: dict[str, Tensor] = {}
        for label in labels.unique().tolist():
            mine = means[labels == label]
            sums[f"sum {label}"] = mine.sum(0)
            sums[f"square {label}"] = mine.square().sum(0)
            sums[f"count {label}"] = counted(mine)
        return sums

    def _labels(self, batch: Any, samples: int) -> Tensor:
        classes: Any = None
        if self.labels is not None:
            classes = self.labels(batch)
        elif isinstance(batch, Sequence):
            classes = next(islice(batch, 1, None), None)
        if not isinstance(classes, Tensor) or tuple(classes.shape) != (samples,):
            raise PlanError(
                "TVSeparability needs the class of each sample, as a tensor of shape (samples,): let data give pairs "
                "of inputs and labels, or pass labels=, a function of the batch."
            )
        return classes

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
