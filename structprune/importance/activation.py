"""Criteria that look at activations.

All of them look at a channel where it ends (`structprune.importance.sites`): at the inputs of the layers that sum it
away, which is the feature map after norm and activation. A dimension may hold a channel at several positions (a head
at each of its columns); a group may end at several layers, whose scores `reduce` joins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structprune.checking import real, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.importance.activations import Activation, Sums
from structprune.importance.base import REDUCTION, Importance, Unfitted, criterion, gathered, reduced
from structprune.importance.data import Batches, require_data
from structprune.importance.observe import look
from structprune.importance.sites import Sites, weight_sites


@dataclass(frozen=True, slots=True, eq=False)
class SiteScores:
    """Scores for each position of each site, joined for the group that is asked about.

    Attributes:
        sites: the sites.
        scores: for each site, one score a position.
        reduce: how the sites of a group are joined.
        mean: whether the positions of a channel in a site are averaged rather than summed.
        root: whether the square root is taken of what that gives.
    """

    sites: Sites
    scores: list[Tensor]
    reduce: str
    mean: bool
    root: bool = False

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        parts: list[tuple[Tensor, Tensor]] = []
        for part in self.sites.of(group):
            values = self.scores[part.site]
            positions = torch.from_numpy(part.positions).to(values.device)
            channels = torch.from_numpy(part.channels).to(values.device)
            total, here = gathered(values, positions, channels, group.channels, mean=self.mean)
            parts.append((total.sqrt() if self.root else total, here))
        return reduced(parts, self.reduce, group.channels)


class ActivationCriterion(ABC, Unfitted):
    """A statistic of each position of each site, streamed over the data in sums."""

    reduce: str
    weighted = False
    mean = True
    root = False

    def __post_init__(self) -> None:
        require({"reduce": self.reduce}, reduce=REDUCTION)

    @abstractmethod
    def gather(self, activation: Activation, batch: Any) -> Mapping[str, Tensor]:
        """Sums over the samples of a batch, by name; each of shape ``(positions,)``, or with a dimension before it."""

    def position_scores(self, sums: Mapping[str, Tensor], weight: Tensor | None) -> Tensor:
        """A score for each position, from the sums over all data; `weight` has shape ``(positions, rest)``.

        The mean, if the criterion does not say otherwise; with `root`, its root follows when positions are joined.
        """
        return sums["sum"] / sums["count"]

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data, or it does not fit the model.
        """
        batches = require_data(batches, self)
        sites = Sites(graph, each_edge=self.weighted, weighted=self.weighted)
        sums: list[Sums] = [Sums() for _ in sites.all]
        weights: list[Tensor | None] = [None] * len(sites.all)

        def visit(activation: Activation, batch: Any) -> None:
            for name, value in self.gather(activation, batch).items():
                sums[activation.number].add(name, value)
            if self.weighted and weights[activation.number] is None and activation.weight is not None:
                weights[activation.number] = columns(activation)

        look(graph, batches, sites.all, visit)
        for one in sums:
            one.reduce()
        scores = [
            self.position_scores({str(name): value for name, value in s.tensors.items()}, weight)
            for s, weight in zip(sums, weights, strict=True)
        ]
        return SiteScores(sites, scores, self.reduce, self.mean, self.root)


def columns(activation: Activation) -> Tensor:
    """The weight that sums a site's channels away as ``(positions, rest)``: what each channel is multiplied with."""
    weight = activation.weight
    assert weight is not None
    size = activation.x.shape[activation.dim]
    inside = weight.shape[activation.weight_dim]
    weight = weight.double() if weight.device.type != "mps" else weight.float()
    if inside == size:
        return weight.movedim(activation.weight_dim, 0).reshape(size, -1)
    # A grouped convolution: (groups, outputs of each, inputs of each, kernel).
    groups = size // inside
    parts = weight.unflatten(0, (groups, weight.shape[0] // groups))
    return parts.transpose(1, 2).reshape(size, -1)


def wide(x: Tensor) -> Tensor:
    """`x` in float64, where the device has it."""
    return x.double() if x.device.type != "mps" else x.float()


def counted(rows: Tensor) -> Tensor:
    """Number of rows, as a tensor."""
    return torch.tensor(float(rows.shape[0]), device=rows.device)


@dataclass(frozen=True, slots=True)
class MeanActivation(ActivationCriterion):
    """Mean of the absolute value of a channel's feature map over samples and positions.

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017
    (the "activation" criterion); after a ReLU the absolute value changes nothing.

    Args:
        reduce: how the layers at which a group ends are joined: ``"mean"``, ``"sum"``, ``"max"``, ``"prod"`` or
            ``"first"``.
    """

    reduce: str = "mean"

    def gather(self, activation: Activation, batch: Any) -> Mapping[str, Tensor]:
        """Sum of absolute values, and how many."""
        rows = wide(activation.rows())
        return {"sum": rows.abs().sum(0), "count": counted(rows)}


@dataclass(frozen=True, slots=True)
class L2Activation(ActivationCriterion):
    """Root mean square of a channel's feature map over samples and positions.

    The L2 norm, divided by the root of the number of entries so that it does not grow with the data.

    Args:
        reduce: how the layers at which a group ends are joined; see `MeanActivation`.
    """

    reduce: str = "mean"
    root = True

    def gather(self, activation: Activation, batch: Any) -> Mapping[str, Tensor]:
        """Sum of squares, and how many."""
        rows = wide(activation.rows())
        return {"sum": rows.square().sum(0), "count": counted(rows)}


@dataclass(frozen=True, slots=True)
class APoZ(ActivationCriterion):
    """One minus the average percentage of zeros in a channel's feature map.

    Hu et al., Network Trimming, 2016, equation 1. The score is the share of entries that are not zero, so that a low
    score means a channel to remove.

    Args:
        threshold: entries of at most this size count as zero, for activations that are never exactly zero.
        reduce: how the layers at which a group ends are joined; see `MeanActivation`.
    """

    threshold: float = 0.0
    reduce: str = "mean"

    def __post_init__(self) -> None:
        given = {"threshold": self.threshold, "reduce": self.reduce}
        require(given, threshold=real(), reduce=REDUCTION)

    def gather(self, activation: Activation, batch: Any) -> Mapping[str, Tensor]:
        """Number of entries above the threshold, and of all."""
        rows = activation.rows()
        return {"sum": (rows.abs() > self.threshold).sum(0), "count": counted(rows)}


@dataclass(frozen=True, slots=True)
class HRank(ActivationCriterion):
    """Average rank of a channel's feature map, taken as a matrix of height x width.

    Lin et al., HRank: Filter Pruning Using High-Rank Feature Map, 2020. Of more than two dimensions of
    positions the last two make the matrix; a single one (tokens) or none makes a matrix of one row, whose rank is one
    unless it is zero.

    Args:
        reduce: how the layers at which a group ends are joined; see `MeanActivation`.
    """

    reduce: str = "mean"

    def gather(self, activation: Activation, batch: Any) -> Mapping[str, Tensor]:
        """Sum of ranks over samples, and the number of matrices."""
        maps = wide(activation.maps())
        while maps.dim() < 4:
            maps = maps.unsqueeze(2)
        # The precision of the model's arithmetic decides, not that of this sum.
        precision = max(torch.finfo(activation.x.dtype).eps, torch.finfo(torch.float32).eps)
        ranks = torch.linalg.matrix_rank(maps, rtol=max(maps.shape[-2:]) * precision)
        ranks = ranks.movedim(1, -1).reshape(-1, maps.shape[1])
        return {"sum": ranks.sum(0), "count": counted(ranks)}


@dataclass(frozen=True, slots=True)
class Wanda(ActivationCriterion):
    """Weights times the norm of what comes in: sum over a channel's weights of ``(|w| * rms(x)) ** n``.

    Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, equation 1, summed over the
    outputs that a channel goes to. The norm is divided by the root of the number of entries, so that it does not grow
    with the data. Only layers whose weight sums the channel away count. With ``n = 2`` it is the mean square of what
    the channel adds to the layer's outputs, if its positions do not depend on each other: in one unit for all layers
    that write into the same stream, which suits ``scope="per_cost"`` in convolutional networks.

    Args:
        reduce: how the layers at which a group ends are joined; see `MeanActivation`.
        n: the power, above 0.
    """

    reduce: str = "sum"
    n: float = 1.0
    weighted = True
    mean = False

    def __post_init__(self) -> None:
        require({"reduce": self.reduce, "n": self.n}, reduce=REDUCTION, n=real(above=0))

    def gather(self, activation: Activation, batch: Any) -> Mapping[str, Tensor]:
        """Sum of squares, and how many."""
        rows = wide(activation.rows())
        return {"square": rows.square().sum(0), "count": counted(rows)}

    def position_scores(self, sums: Mapping[str, Tensor], weight: Tensor | None) -> Tensor:
        """Sum of the absolute weights times the root mean square, each to the power."""
        assert weight is not None
        return weight.abs().pow(self.n).sum(1) * (sums["square"] / sums["count"]).pow(self.n / 2)

    def weight_scores(self, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
        """Equation 1 for each weight of a layer; see `structprune.importance.base.WeightCriterion`.

        Raises:
            PlanError: there is no data, or it does not fit the model.
        """
        batches = require_data(batches, self)
        uses, sums = weight_sites(graph), Sums()

        def visit(activation: Activation, _: Any) -> None:
            name = uses[activation.number].name
            for key, value in self.gather(activation, None).items():
                sums.add((name, key), value)

        look(graph, batches, [use.site for use in uses], visit)
        sums.reduce()
        scores: dict[str, Tensor] = {}
        for use in uses:
            weight = wide(graph.model.get_parameter(use.name).detach())
            spread = (sums[use.name, "square"] / sums[use.name, "count"]).sqrt()
            scores[use.name] = (weight.abs() * use.spread(spread, weight)).pow(self.n)
        return scores


@dataclass(frozen=True, slots=True)
class FLAP(ActivationCriterion):
    """Fluctuation of what comes in, times the squared norm of the weights that it meets.

    An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, 2024, WIFV: the sample
    variance of a channel around its mean, times the sum of its squared weights. A channel that does not vary can be
    replaced by its mean in the next layer's bias. FLAP compares layers by standardised scores:
    ``PerLayer(FLAP(), "standard")``.

    Args:
        reduce: how the layers at which a group ends are joined; see `MeanActivation`.
    """

    reduce: str = "sum"
    weighted = True
    mean = False

    def gather(self, activation: Activation, batch: Any) -> Mapping[str, Tensor]:
        """Sum, sum of squares, and how many."""
        rows = wide(activation.rows())
        return {"sum": rows.sum(0), "square": rows.square().sum(0), "count": counted(rows)}

    def position_scores(self, sums: Mapping[str, Tensor], weight: Tensor | None) -> Tensor:
        """Sample variance times squared weights."""
        assert weight is not None
        count = sums["count"]
        spread = (sums["square"] - sums["sum"].square() / count).clamp(min=0) / (count - 1).clamp(min=1)
        return spread * weight.square().sum(1)


criterion("activation_mean")(MeanActivation)
criterion("activation_l2")(L2Activation)
criterion("apoz")(APoZ)
criterion("hrank")(HRank)
criterion("wanda")(Wanda)
criterion("wanda_square")(lambda: Wanda(n=2.0))
criterion("flap")(FLAP)
