"""Criteria that look at first derivatives of the loss.

A *gate* is a factor of one on a channel. Its derivative for a sample is the sum of gradient x activation over the
positions of the channel. Here the gate stands on every layer that sums the channel away, and nowhere else, so that
setting it to zero is switching the channel off; derivatives at the several ends of a group are therefore added before
anything is squared or its absolute value taken. The gradients of a mean over a batch are scaled back to those of its
samples, so that how the data is cut into batches does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structprune.checking import one_of, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.importance.activations import Activation, Sums
from structprune.importance.base import REDUCTION, Importance, Unfitted, criterion, member_sums, reduced
from structprune.importance.data import Batches, require_data
from structprune.importance.observe import descend, losses, trained
from structprune.importance.sites import Sites
from structprune.ops.relations import Ids


class Gates:
    """One gate for each channel of each group, on all of the channel's ends.

    Attributes:
        count: how many gates there are.
        sites: the sites that they stand on.
        at: for each site, pairs of its positions and the gates that stand there.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.sites = Sites(graph, each_edge=True)
        self.at: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.sites.all]
        self.count = 0
        self._of = np.full(graph.components.count, -1, dtype=np.int64)
        for group in graph.groups():
            if not self.sites.show(group):
                continue
            self._of[group.components] = self.count + np.arange(group.channels)
            for part in self.sites.of(group):
                channels = torch.from_numpy(part.channels) + self.count
                self.at[part.site].append((torch.from_numpy(part.positions), channels))
            self.count += group.channels

    def scores(self, values: Tensor) -> Importance:
        """The criterion that gives each channel the value of its gate, from values of shape ``(count,)``."""
        return GateScores(self.sites, self._of, values)


class _SampleGates:
    """Derivatives with respect to gates that each sample has for itself."""

    def __init__(self, gates: Gates) -> None:
        self._gates = gates
        self._placed: list[tuple[int, Tensor]] = []

    def place(self, activation: Activation) -> Tensor:
        """The observed tensor times a fresh gate."""
        kind = torch.promote_types(activation.x.dtype, torch.float32)
        gate = torch.ones(
            activation.samples,
            activation.x.shape[activation.dim],
            dtype=kind,
            device=activation.x.device,
            requires_grad=True,
        )
        self._placed.append((activation.number, gate))
        return activation.gated(gate)

    def derivatives(self, value: Tensor) -> Tensor:
        """Shape ``(samples, gates)``; the placed gates are forgotten."""
        placed, self._placed = self._placed, []
        gradients = torch.autograd.grad(value, [gate for _, gate in placed], allow_unused=True, materialize_grads=True)
        samples = max(len(gate) for _, gate in placed)
        total = torch.zeros(samples, self._gates.count, dtype=torch.float64)
        for (number, _), gradient in zip(placed, gradients, strict=True):
            wide = gradient.detach().cpu().double()
            for positions, channels in self._gates.at[number]:
                total[: len(wide)].index_add_(1, channels, wide[:, positions])
        return total


@dataclass(frozen=True, slots=True, eq=False)
class GateScores:
    """A score for each gate, and the gate of each component of the graph (-1 for none)."""

    sites: Sites
    gate_of: Ids
    scores: Tensor

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        self.sites.of(group)  # raises where no site shows the group
        return self.scores[torch.from_numpy(self.gate_of[group.components])]


def gate_sums(graph: ChannelGraph, batches: Batches, function: Callable[[Tensor], Tensor]) -> tuple[Gates, Tensor]:
    """The mean over samples of a function of the derivatives of the gates, shape ``(gates,)``.

    Args:
        graph: the graph of the model.
        batches: data and loss.
        function: takes derivatives of shape ``(samples, gates)``, gives a tensor of that shape.
    """
    gates = Gates(graph)
    placed = _SampleGates(gates)
    sums = Sums()

    def after(value: Tensor, samples: int) -> None:
        derivatives = placed.derivatives(value)
        sums.add("sum", function(derivatives).sum(0))
        sums.add("count", torch.tensor(float(samples)))

    descend(graph, batches, gates.sites.all, placed.place, None, after)
    sums.reduce()
    return gates, sums["sum"] / sums["count"]


@dataclass(frozen=True, slots=True)
class Taylor(Unfitted):
    """First-order estimate of how much the loss changes when a channel is switched off.

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017, equation 8:
    the absolute value of the sum over positions of gradient x activation, averaged over samples. The paper divides by
    the number of positions and normalises each layer by its L2 norm; the sum is what estimates the change, and the
    normalisation is ``PerLayer(Taylor(), "l2")``.

    Args:
        average: ``"after"`` averages the absolute values of the samples, as in the paper; ``"before"`` averages first,
            which estimates the change of the mean loss, where samples may cancel.

    Example:
        >>> import torch
        >>> from structprune.importance.base import fitted
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> graph = ChannelGraph(model, torch.randn(1, 2))
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> fitted(Taylor(), graph, [torch.randn(8, 2)], loss)(graph.groups()[0], {}).shape
        torch.Size([3])
    """

    average: str = "after"

    def __post_init__(self) -> None:
        require({"average": self.average}, average=one_of(("after", "before")))

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data or no loss, or they do not fit the model.
        """
        batches = require_data(batches, self)
        batches.require_loss(self)
        each = torch.abs if self.average == "after" else torch.clone
        gates, mean = gate_sums(graph, batches, each)
        return gates.scores(mean.abs())


def weight_gradients(graph: ChannelGraph, batches: Batches, *, squares: bool = False) -> dict[str, Tensor]:
    """The gradient of the mean loss over all samples for each parameter, by name.

    Args:
        graph: the graph of the model.
        batches: data and loss.
        squares: instead, the mean over samples of the square of each sample's gradient (the diagonal of the empirical
            Fisher matrix). Samples are run one by one, since only so a layer of any kind shows its own.
    """
    sums = Sums()
    with trained(graph) as (parameters, watch):
        tensors = list(parameters.values())
        for value, samples in losses(graph.model, batches, watch, "looking at gradients", by_sample=squares):
            gradients = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                wide = gradient.double() if gradient.device.type != "mps" else gradient
                sums.add(name, wide.square() if squares else wide)
            sums.add("", torch.tensor(float(samples)))
        sums.reduce()
        return {name: sums[name] / float(sums[""]) for name in parameters}


@dataclass(frozen=True, slots=True, eq=False)
class EntryScores:
    """Saliencies of single entries of parameters, joined over the slices of a group.

    Attributes:
        entries: by name, the saliency of each entry, in the shape of the parameter.
        form: ``"element"`` sums them; ``"multivariable"`` takes the absolute value of each slice's sum; ``"group"``
            sums over all slices before the absolute value is taken.
        reduce: how the slices of a group are joined; of no effect for ``"group"``.
    """

    entries: Mapping[str, Tensor]
    form: str = "element"
    reduce: str = "sum"

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        parts = list(member_sums(group, self.entries.get))
        if self.form == "group":
            return reduced(parts, "sum", group.channels).abs()
        if self.form == "multivariable":
            parts = [(total.abs(), here) for total, here in parts]
        return reduced(parts, self.reduce, group.channels)


@dataclass(frozen=True, slots=True)
class WeightTaylor(Unfitted):
    """First-order estimate of the change of the loss from the weights that go with a channel.

    Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, with the absolute value
    in place of the square, which ranks alike within a sum of one term. The gradient is that of the mean loss over all
    data. Of a channel that a network without norms makes and consumes, the slices on both sides give the same sum.

    Args:
        form: ``"element"``: sum over entries of ``|w * g|``; ``"multivariable"``: sum over the slices of the group of
            ``|sum of w * g|``; ``"group"``: ``|sum of w * g|`` over the whole group.
        reduce: how the slices of a group are joined for the first two forms: ``"sum"``, ``"mean"``, ``"max"``,
            ``"prod"`` or ``"first"``.
    """

    form: str = "multivariable"
    reduce: str = "sum"

    def __post_init__(self) -> None:
        forms = one_of(("element", "multivariable", "group"))
        require({"reduce": self.reduce, "form": self.form}, reduce=REDUCTION, form=forms)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data or no loss, or they do not fit the model.
        """
        products = self.weight_scores(graph, batches) if self.form == "element" else _products(self, graph, batches)
        return EntryScores(products, self.form, self.reduce)

    def weight_scores(self, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
        """``|w * g|`` for each weight; see `structprune.importance.base.WeightCriterion`."""
        return {name: product.abs() for name, product in _products(self, graph, batches).items()}


def _products(importance: object, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
    """Weight x gradient for each entry of each parameter."""
    batches = require_data(batches, importance)
    batches.require_loss(importance)
    gradients = weight_gradients(graph, batches)
    weights = dict(graph.model.named_parameters())
    return {name: weights[name].detach().to(gradient.dtype) * gradient for name, gradient in gradients.items()}


@dataclass(frozen=True, slots=True)
class SNIP(Unfitted):
    """Connection sensitivity of the weights that go with a channel.

    Lee et al., SNIP: Single-shot Network Pruning Based on Connection Sensitivity, 2019, equation 6:
    ``|w * g|`` over the sum of that over all weights, summed over a channel's weights. Scores of all groups are shares
    of one whole.

    Args:
        reduce: how the slices of a group are joined; see `WeightTaylor`.
    """

    reduce: str = "sum"

    def __post_init__(self) -> None:
        require({"reduce": self.reduce}, reduce=REDUCTION)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data or no loss, or they do not fit the model.
        """
        return EntryScores(self.weight_scores(graph, batches), "element", self.reduce)

    def weight_scores(self, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
        """Equation 6 for each weight; see `structprune.importance.base.WeightCriterion`."""
        products = {name: product.abs() for name, product in _products(self, graph, batches).items()}
        whole = sum(float(product.sum()) for product in products.values())
        return {name: product / whole if whole else product for name, product in products.items()}


criterion("taylor")(Taylor)
criterion("taylor_signed")(lambda: Taylor("before"))
criterion("weight_taylor")(WeightTaylor)
criterion("weight_taylor_element")(lambda: WeightTaylor("element"))
criterion("weight_taylor_group")(lambda: WeightTaylor("group"))
criterion("snip")(SNIP)
