"""`fold`: what was removed, merged into what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structprune.checking import FLAG, INPUTS, MODEL, ON_BATCH, one_of, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group, Member
from structprune.coupling.solve import Mask
from structprune.distributed import failing_together
from structprune.errors import RecoveryError, VerificationError
from structprune.importance.base import indices, padded
from structprune.importance.clustering import nearest_clusters, shares
from structprune.importance.data import Batches, Forward
from structprune.importance.folding import Folding, Likeness, NormedLayer, likeness, normed_layers
from structprune.importance.mergeable import Mergeable
from structprune.planning.plan import Plan, plans_of
from structprune.recovery.history import removed_between
from structprune.surgery.apply import _memo
from structprune.surgery.verify import TOLERANCE, removed_components
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import ExampleInputs, run_once, tensors_in
from structprune.wrapping import prunable, rewrapped


def fold(
    slim: nn.Module,
    original: nn.Module,
    example_inputs: ExampleInputs,
    *,
    how: str = "scaled",
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    verify: bool = True,
) -> nn.Module:
    """The smaller model with channels that stand in for those that were removed: no training, and no data is needed.

    Each removed channel joins the kept channel of its group that it is most like, or none, if it is nearer to nothing.
    The weights by which the next layers take the channels of a cluster are added up. Where the channels of each cluster
    are equal, the result computes exactly what `original` does. The channel that a cluster becomes is one of:

    - ``how="scaled"``: the kept channel as it is. A removed channel is taken for a multiple of it, by least squares,
      and the weights by which the next layers take it are multiplied so. Kim et al., Neuron Merging: Compensating for
      Pruned Neurons, 2020 (there by cosines).
    - ``how="mean"``: the mean over the cluster, weighted by how much the next layers take of each. The clusters are
      those of k-means, begun at the kept channels (`structprune.importance.Folding` chooses them, and says what like
      means). The mean of channels that are not equal varies less than each of them: in a batch norm behind it, the
      variance is what it is for inputs that are not correlated, by the cosines of the filters. Wang et al., Forget the
      Data and Fine-Tuning! Just Fold the Network to Compress, 2025 (where that is called approximate repair; here
      means are weighted, and nothing is a cluster too).

    Groups whose channels cannot be merged are left as `slim` has them: those that a norm runs over, that two
    activations are multiplied over (the size of attention heads), or whose weights are computed
    (`structprune.importance.mergeable`).

    Args:
        slim: a pruned model: what `structprune.prune` or ``plan.apply`` made of `original`, in one round or several.
            Its weights are not looked at, only which channels are left.
        original: the model before the first pruning.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the models accept.
        how: ``"scaled"`` or ``"mean"``.
        data: batches as for `structprune.recover`. If given, channels are alike if their values on it are; else if the
            filters are that make them.
        forward: called with the model and a batch, as for `structprune.plan`.
        verify: compare with the original whose clusters have equal channels, on the example inputs. It takes another
            copy of the original.

    Returns:
        A new model, of which `structprune.recover` and `recalibrate` can begin; `slim` and `original` are as they were.

    Raises:
        RecoveryError: `slim` was not made of `original`, or lost branches; there are no weights; or another rank of
            ``torch.distributed``, where it is in use, has failed.
        PlanError: the data does not fit the model.
        VerificationError: the result is not what it should be.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> _ = model[0].weight.data[2].copy_(model[0].weight[0]), model[0].bias.data[2].copy_(model[0].bias[0])
        >>> x = torch.randn(8, 4)
        >>> slim = structprune.prune(model, x, importance="folding", ratio=0.3, round_to=1)
        >>> slim = structprune.fold(slim, model, x)
        >>> slim[0].out_features, torch.allclose(slim(x), model(x), atol=1e-6)
        (2, True)
    """
    named = {"example_inputs": INPUTS, "how": one_of(_HOW), "forward": ON_BATCH.or_none, "verify": FLAG}
    require(locals(), RecoveryError, slim=MODEL, original=MODEL, **named)
    inner = prunable(original)
    plans = plans_of(slim)[len(plans_of(inner)) :]
    if not all(isinstance(plan, Plan) for plan in plans):
        raise RecoveryError("Branches were removed from this model. Fold it before they are: prune and fold, then cut.")
    if any(tensor.is_meta for tensor in _tensors(inner).values()):
        raise RecoveryError("original is on the meta device, so there are no weights to merge. Load real weights.")
    with torch.no_grad():
        removed, graph = removed_between(slim, inner), ChannelGraph(inner, example_inputs)
        alike = Folding("weights" if data is None else "activations")
        with nullcontext() if data is None else failing_together(RecoveryError, "fold"):
            found = likeness(graph, alike, None if data is None else Batches(data, forward))
        merged = _merged(graph, _Merging(graph, found, how), removed_components(graph, removed), verify)
        for plan in plans:
            plan.apply(merged, inplace=True)
    return rewrapped(original, merged)


def _merged(graph: ChannelGraph, merging: _Merging, gone: Mask, verify: bool) -> nn.Module:
    """A copy of the graph's model, at its full width, in which the components that are gone are merged into others."""
    merged, tied = _copy(graph.model), _copy(graph.model) if verify else None
    models = [_tensors(model) for model in (merged, tied) if model is not None]
    for group in graph.groups():
        merging.merge(group, gone[group.components], models)
    if tied is not None:
        _compare(merged, tied, graph.example_inputs)
    return merged


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, _memo(held_tensors(model), {}))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: held.tensor for name, held in held_tensors(model).items()}


def _compare(merged: nn.Module, tied: nn.Module, example_inputs: ExampleInputs) -> None:
    """Whether a model computes what the one does whose clusters have equal channels.

    Raises:
        VerificationError: it does not.
    """
    ours, theirs = (list(tensors_in(run_once(model, example_inputs))) for model in (merged, tied))
    for one, other in zip(ours, theirs, strict=True):
        if one.is_meta or not one.is_floating_point() or not one.numel():
            continue
        error = float((one.double() - other.double()).abs().max()) / max(float(other.double().abs().max()), 1e-12)
        tolerance = TOLERANCE.get(one.dtype, 5e-2)
        if not error <= tolerance:
            raise VerificationError(
                f"Merged channels differ from equal ones by {error:.2e} of the largest output, where {tolerance:g} is "
                "allowed. Please report the model; name layers in ignore= of the plan to find the one that is wrong."
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Clusters:
    """The clusters of a group's channels.

    Attributes:
        of: for each channel the number of its cluster, -1 for none; shape ``(channels,)``.
        stays: whether it stays, shape ``(channels,)``.
        means: what each channel has of what makes each cluster's, shape ``(clusters, channels)``.
        slopes: how many times its cluster's the channel is taken to be; 0 for those of none; shape ``(channels,)``.
    """

    of: Tensor
    stays: Tensor
    means: Tensor
    slopes: Tensor

    def mean(self, rows: Tensor) -> Tensor:
        """What is made for each cluster, shape ``(clusters, ...)``, of rows of shape ``(channels, ...)``."""
        return torch.einsum("ki,i...->k...", self.means.to(rows), rows)

    def spread(self, values: Tensor, old: Tensor) -> Tensor:
        """The value of its cluster for each channel; those of none keep theirs."""
        return torch.where(_beside(self.of >= 0, old), values[self.of.clamp(min=0).to(old.device)], old)

    def switched_off(self, rows: Tensor) -> Tensor:
        """Zero for the channels that go."""
        return torch.where(_beside(self.stays, rows), rows, 0)

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows of shape ``(channels, ...)``, each times its slope."""
        return rows * _beside(self.slopes, rows)

    def summed(self, rows: Tensor) -> Tensor:
        """For each channel that stays the sum over its cluster of rows times slopes, zero for the others."""
        inside = self.of == torch.arange(len(self.means))[:, None]
        sums = torch.einsum("ki,i...->k...", inside.to(rows), self.scaled(rows))
        return torch.where(_beside(self.stays, rows), sums[self.of.clamp(min=0).to(rows.device)], 0)


def _beside(vector: Tensor, rows: Tensor) -> Tensor:
    """A vector with an entry a channel, shaped to meet rows of shape ``(channels, ...)``."""
    return vector.to(rows.device).view(-1, *[1] * (rows.dim() - 1))


def _averaged(products: np.ndarray, mass: np.ndarray, gone: np.ndarray) -> _Clusters:
    """Clusters of k-means, each of which becomes its mean."""
    stay = np.flatnonzero(~gone)
    found = nearest_clusters(products, mass, stay)
    means = torch.from_numpy(shares(found, mass, len(stay)))
    of = torch.from_numpy(found)
    return _Clusters(of, torch.from_numpy(~gone), means, (of >= 0).double())


def _scaled(products: np.ndarray, mass: np.ndarray, gone: np.ndarray) -> _Clusters:
    """Channels that stay as they are, each with those that are best told as multiples of it."""
    stay, squares = np.flatnonzero(~gone), products.diagonal()
    slopes = np.maximum(products[stay], 0) / np.maximum(squares[stay], 1e-300)[:, None]
    told = slopes * products[stay]  # of the square of each channel
    best = told.argmax(0)
    slope = slopes[best, np.arange(len(squares))]
    best[stay], slope[stay] = np.arange(len(stay)), 1.0
    of = torch.from_numpy(np.where(slope > 0, best, -1))
    own = torch.from_numpy((np.arange(len(squares)) == stay[:, None]).astype(np.float64))
    return _Clusters(of, torch.from_numpy(~gone), own, torch.from_numpy(slope))


_HOW = {"mean": _averaged, "scaled": _scaled}


class _Merging:
    """Merges the channels of groups in models of the form that a graph is of."""

    def __init__(self, graph: ChannelGraph, alike: Likeness, how: str) -> None:
        self._alike, self._how = alike, how
        self._mergeable = Mergeable(graph)
        self._layers = normed_layers(graph)
        self._first = _tensors(graph.model)

    def merge(self, group: Group, gone: np.ndarray, models: Sequence[Mapping[str, Tensor]]) -> None:
        """Merge the channels of a group that are `gone` into others.

        Args:
            group: the channels.
            gone: which go, shape ``(channels,)``.
            models: the tensors of the model to be merged, in which those that go are switched off; then those of a
                model, if there is one, in which all channels of a cluster are made equal.
        """
        if not gone.any() or self._mergeable.obstacle(group) is not None:
            return
        products, mass = (part.cpu().numpy() for part in self._alike(group, self._first))
        clusters = _HOW[self._how](products, mass, gone)
        ready = self._normed(group, clusters) if self._how == "mean" else {}
        for number, tensors in enumerate(models):
            for member in group.members:
                tensor = tensors[member.tensor]
                if not tensor.is_floating_point():
                    continue
                table, _ = padded(*indices(member, tensor.device), group.channels)
                along = tensor.data.movedim(member.dim, 0)
                rows = along[table].double()
                if self._mergeable.summed(member):
                    new = clusters.scaled(rows) if number else clusters.summed(rows)
                else:
                    new = clusters.spread(self._made(member, rows, clusters, ready), rows)
                    if not number and isinstance(tensor, nn.Parameter):
                        new = clusters.switched_off(new)
                along[table] = new.to(tensor.dtype)

    def _made(self, member: Member, rows: Tensor, clusters: _Clusters, ready: Mapping[str, _Normed | Tensor]) -> Tensor:
        """What makes the channel that each cluster becomes, shape ``(clusters, entries of a channel, ...)``."""
        known = ready.get(member.tensor)
        if isinstance(known, Tensor):
            return known
        if known is None or member.dim:
            return clusters.mean(rows)
        shape = (*known.gain.shape, *[1] * (rows.dim() - 2))
        means = clusters.mean(rows * known.gain.view(shape))
        return means * known.factor.view(*known.factor.shape, *[1] * (rows.dim() - 2))

    def _normed(self, group: Group, clusters: _Clusters) -> dict[str, _Normed | Tensor]:
        """For weights in front of batch norms what scales them, and the new vectors of layer and norm, by name."""
        ready: dict[str, _Normed | Tensor] = {}
        for member in group.members:
            layer = self._layers.get(member.tensor) if member.dim == 0 else None
            if layer is not None:
                table, _ = padded(*indices(member, self._first[member.tensor].device), group.channels)
                ready |= _merged_norm(layer, self._first, table, clusters)
        return ready


@dataclass(frozen=True, slots=True, eq=False)
class _Normed:
    """What scales the weight of a layer in front of a batch norm while clusters are merged.

    Attributes:
        gain: what the norm multiplies each channel by, shape ``(channels, entries of each)``.
        factor: by what the mean over a cluster of the weights times gain is multiplied, shape ``(clusters, entries)``.
    """

    gain: Tensor
    factor: Tensor


def _merged_norm(
    layer: NormedLayer, tensors: Mapping[str, Tensor], table: Tensor, clusters: _Clusters
) -> dict[str, _Normed | Tensor]:
    """How a layer and the batch norm behind it are merged; see `fold`.

    With ``r_i`` the filter of channel i times what the norm multiplies it by, the channel that a cluster becomes has
    the filter ``r = sum of m_i r_i``. Its deviation is to be ``t = sum of m_i s_i`` of the deviations ``s_i`` behind
    the norm, and that of ``r x`` is taken for ``s = |sum of m_i s_i r_i / |r_i||``. The norm gets the variance v that
    the cluster has on average and the scale t, so the filter is ``r * sqrt(v) / s``.
    """

    def of(name: str | None, default: float) -> Tensor:
        vector = torch.full_like(tensors[layer.mean], default) if name is None else tensors[name]
        return vector.detach().double()[table]

    gain, variance = layer.gain(tensors)[table], of(layer.variance, 1)
    filters = tensors[layer.weight].detach().double()[table].flatten(2) * gain.unsqueeze(2)
    lengths = torch.linalg.vector_norm(filters, dim=2, keepdim=True)
    deviation = of(layer.scale, 1).abs() * (variance / (variance + layer.eps)).sqrt()
    wanted = clusters.mean(deviation)
    directions = filters / torch.where(lengths > 0, lengths, 1)
    got = torch.linalg.vector_norm(clusters.mean(directions * deviation.unsqueeze(2)), dim=2)
    kept_variance = clusters.mean(variance)
    fitting = torch.where(got > 0, (kept_variance + layer.eps).sqrt() / torch.where(got > 0, got, 1), 0)
    factor = fitting if layer.scale is not None else fitting * wanted
    new: dict[str, _Normed | Tensor] = {
        layer.weight: _Normed(gain, factor),
        layer.mean: factor * clusters.mean(gain * of(layer.mean, 0)),
        layer.variance: kept_variance,
    }
    if layer.bias is not None:
        new[layer.bias] = factor * clusters.mean(gain * of(layer.bias, 0))
    if layer.scale is not None:
        new[layer.scale] = wanted
    if layer.shift is not None:
        new[layer.shift] = clusters.mean(of(layer.shift, 0))
    return new
