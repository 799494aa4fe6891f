"""Channels that others like them can stand in for: how alike they are, and the criterion by which they are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.checking import FLAG, one_of, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group, Member
from structprune.errors import PlanError
from structprune.importance.activation import columns, wide
from structprune.importance.activations import Activation, Sums
from structprune.importance.base import Importance, Unfitted, criterion, floating, indices, padded
from structprune.importance.clustering import merging_costs
from structprune.importance.data import Batches, require_data
from structprune.importance.mergeable import Mergeable
from structprune.importance.observe import look
from structprune.importance.sites import Sites
from structprune.ops import kind_of
from structprune.ops.arguments import arguments

# Inner products of the channels of a group, shape ``(channels, channels)``, and their masses, shape ``(channels,)``.
Likeness = Callable[[Group, Mapping[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Folding(Unfitted):
    """What is lost when a channel is merged into others that are like it, or is left out if it is near to nothing.

    Wang et al., Forget the Data and Fine-Tuning! Just Fold the Network to Compress, 2025: the channels of a group are
    clustered, and each cluster becomes one channel (`structprune.fold`). Here the clusters are Ward's, which grow by
    merging: the score of a channel is what the squared error grows by as it is merged. So there is an order, and scopes
    and targets say how many clusters each group has. An error counts as much as the next layers' weights of the channel
    are large, and nothing is a cluster too: a channel may be merged into zero, which is plain pruning. Of groups whose
    channels cannot be merged (`structprune.importance.mergeable`), merging into zero is all there is.

    Args:
        of: ``"weights"``: channels are alike if the filters that make them are, which count by the scale of a batch
            norm behind them, and the shifts; no data is needed. ``"activations"``: if their values on data are.
        centred: whether values count without their means; what is constant, batch norms behind can make up for.

    Example:
        >>> import torch
        >>> from structprune.importance.base import fitted
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> _ = model[0].weight.data[1].copy_(model[0].weight[0]), model[0].bias.data[1].copy_(model[0].bias[0])
        >>> graph = ChannelGraph(model, torch.randn(1, 2))
        >>> float(fitted(Folding(), graph)(graph.groups()[0], dict(model.named_parameters())).min())
        0.0
    """

    of: str = "weights"
    centred: bool = True

    def __post_init__(self) -> None:
        require({"of": self.of, "centred": self.centred}, of=one_of(("weights", "activations")), centred=FLAG)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data, if activations are asked for; the model is left as it was.

        Raises:
            PlanError: there is no data, or it does not fit the model.
        """
        return _Costs(likeness(graph, self, batches), Mergeable(graph))


def likeness(graph: ChannelGraph, folding: Folding, batches: Batches | None) -> Likeness:
    """How alike the channels of groups are.

    Raises:
        PlanError: data is needed and missing, or does not fit the model.
    """
    if folding.of == "weights":
        return _WeightLikeness(normed_layers(graph), Mergeable(graph))
    batches = require_data(batches, folding)
    sites = Sites(graph, each_edge=True)
    sums = Sums()
    weights: dict[int, Tensor] = {}

    def visit(activation: Activation, _: object) -> None:
        rows = wide(activation.rows())
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)  # the same product holds sums and number
        sums.add(activation.number, rows.T @ rows)
        if activation.weight is not None and activation.number not in weights:
            weights[activation.number] = columns(activation).square().sum(1)

    look(graph, batches, sites.all, visit)
    sums.reduce()
    for number, site in enumerate(sites.all):
        if number in sums and not bool(torch.isfinite(sums[number]).all()):
            raise PlanError(f"The inputs of {site.where} are NaN or infinite on data. Check it and the weights.")
    moments = {site: _moments(sums[site], folding.centred) for site in range(len(sites.all)) if site in sums}
    return _ActivationLikeness(sites, moments, weights)


def _moments(sums: Tensor, centred: bool) -> Tensor:
    """Second moments by position, about the mean or about zero."""
    moments = sums / sums[-1, -1]
    mean = moments[:-1, -1]
    return moments[:-1, :-1] - (torch.outer(mean, mean) if centred else 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Costs:
    """Scores by what merging costs."""

    likeness: Likeness
    mergeable: Mergeable

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        products, mass = self.likeness(group, tensors)
        if products.is_meta or self.mergeable.obstacle(group) is not None:
            return products.diagonal() * mass
        costs = merging_costs(products.cpu().numpy(), mass.cpu().numpy())
        return torch.from_numpy(costs).to(products.device)


# -- by weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NormedLayer:
    """A layer with a batch norm right behind it: names of the tensors of both, None where there is none.

    Attributes:
        weight, bias: of the layer; dimension 0 holds its outputs.
        scale, shift, mean, variance: of the norm.
        eps: of the norm.
    """

    weight: str
    bias: str | None
    scale: str | None
    shift: str | None
    mean: str
    variance: str
    eps: float

    @property
    def others(self) -> tuple[str, ...]:
        """All of its tensors but the weight."""
        return tuple(name for name in (self.bias, self.scale, self.shift, self.mean, self.variance) if name)

    def gain(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the norm multiplies each channel by, shape ``(channels,)``, in float64."""
        gain = (wide(tensors[self.variance].detach()) + self.eps).rsqrt()
        return gain if self.scale is None else gain * wide(tensors[self.scale].detach())

    def behind(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Deviation, with the sign of the scale, and mean of each channel behind the norm, both ``(channels,)``."""
        like = wide(tensors[self.mean].detach())
        scale = torch.ones_like(like) if self.scale is None else wide(tensors[self.scale].detach())
        return scale, torch.zeros_like(like) if self.shift is None else wide(tensors[self.shift].detach())


def normed_layers(graph: ChannelGraph) -> dict[str, NormedLayer]:
    """Convolutions and linear layers with a batch norm behind them that nothing else reads, by their weights."""
    norms = [arguments(node) for node in graph.trace.nodes if node.meta["name"] == "batch_norm"]
    layers = [layer for norm in norms if (layer := _normed_layer(norm)) is not None]
    return {layer.weight: layer for layer in layers}


def _normed_layer(norm: Mapping[str, Any]) -> NormedLayer | None:
    source = norm.get("input")
    if not isinstance(source, fx.Node) or norm.get("training") or len(source.users) != 1:
        return None
    kind = kind_of(source.meta["name"])
    if kind != "convolution" and not (kind == "linear" and len(source.meta["shape"]) == 2):
        return None
    layer = arguments(source)
    weight, mean, variance = (_own(given) for given in (layer.get("weight"), norm["running_mean"], norm["running_var"]))
    bias, scale, shift = (_own(given) for given in (layer.get("bias"), norm.get("weight"), norm.get("bias")))
    if not (weight and mean and variance) or "" in (bias, scale, shift):
        return None
    return NormedLayer(weight, bias, scale, shift, mean, variance, float(norm.get("eps") or 1e-5))


def _own(given: Any) -> str | None:
    """The name of a tensor that one operation alone uses; empty if it is none, None if nothing is given."""
    if given is None:
        return None
    held = isinstance(given, fx.Node) and given.meta["name"] == "parameter" and len(given.users) == 1
    return str(given.target) if held else ""


@dataclass(frozen=True, slots=True, eq=False)
class _WeightLikeness:
    """Channels as the filters that make them."""

    layers: Mapping[str, NormedLayer]
    mergeable: Mergeable

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Inner products and masses."""
        covered = {name for layer in self.layers.values() for name in layer.others}
        ones = torch.ones(group.channels, dtype=torch.float64, device=tensors[group.members[0].tensor].device)
        made: list[Tensor] = []
        taken: list[Tensor] = []
        for member in group.members:
            tensor = tensors[member.tensor]
            if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or member.tensor in covered:
                continue
            if self.mergeable.summed(member):
                taken.append(_rows(member, floating(tensor), group.channels).square().sum(1))
            else:
                rows = self._made(member, tensors, group.channels)
                made.append(rows @ rows.T)
        # Channels that nothing makes are all equally far apart; those that nothing takes count alike.
        products = torch.stack(made).sum(0) if made else torch.diag(ones)
        return products, torch.stack(taken).sum(0) if taken else ones

    def _made(self, member: Member, tensors: Mapping[str, Tensor], channels: int) -> Tensor:
        """What makes each channel, shape ``(channels, entries)``.

        Of a layer with a norm: filters as long as the deviation behind the norm, and the mean there.
        """
        rows = _rows(member, floating(tensors[member.tensor]), channels)
        layer = self.layers.get(member.tensor) if member.dim == 0 else None
        if layer is None:
            return rows
        deviation, mean = (_rows(member, part, channels) for part in layer.behind(tensors))
        filters = rows.view(*deviation.shape, -1)
        length = torch.linalg.vector_norm(filters, dim=2, keepdim=True)
        filters = filters * deviation.unsqueeze(2) / torch.where(length > 0, length, 1)
        return torch.cat([filters.flatten(1), mean], 1)


def _rows(member: Member, tensor: Tensor, channels: int) -> Tensor:
    """The entries of a tensor that go with each channel, shape ``(channels, entries)``, in float64."""
    tensor = wide(tensor)
    table, real = padded(*indices(member, tensor.device), channels)
    rows = tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1) if tensor.dim() > 1 else tensor[:, None]
    return (rows[table] * real.unsqueeze(2)).flatten(1)


# -- by activations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _ActivationLikeness:
    """Channels as their values on data, at all places where they end.

    Attributes:
        sites: the places.
        moments: for each, second moments of its positions, shape ``(positions, positions)``.
        weights: for each that has one, the square of the weights by position.
    """

    sites: Sites
    moments: Mapping[int, Tensor]
    weights: Mapping[int, Tensor]

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Inner products and masses."""
        products: Tensor | None = None
        mass: Tensor | None = None
        for part in self.sites.of(group):
            moments = self.moments[part.site]
            placed = torch.from_numpy(part.channels), torch.from_numpy(part.positions)
            table, real = padded(placed[1].to(moments.device), placed[0].to(moments.device), group.channels)
            for column in range(table.shape[1]):
                at = table[:, column]
                both = real[:, column, None] & real[None, :, column]
                here = moments[at][:, at] * both
                products = here if products is None else products + here
            if part.site in self.weights:
                met = (self.weights[part.site][table] * real).sum(1)
                mass = met if mass is None else mass + met
        assert products is not None
        return products, torch.ones_like(products[0]) if mass is None else mass.to(products)


criterion("folding")(Folding)
criterion("folding_activations")(lambda: Folding("activations"))
