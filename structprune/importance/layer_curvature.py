"""Criteria that hold the second moments of a layer's inputs, and of the gradients of its outputs.

A layer computes ``y = sum over positions p and kernel offsets k of W[p, :, k] * f[p, k]``, where the features f are its
inputs, or for a convolution its patches. Removing a channel removes the columns S of W that its features meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from structprune.checking import FLAG, real, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.importance.activation import columns
from structprune.importance.activations import Activation, Sums
from structprune.importance.base import REDUCTION, Importance, Unfitted, criterion, padded, reduced
from structprune.importance.data import Batches, require_data
from structprune.importance.observe import descend, look
from structprune.importance.sites import Sites, weight_sites
from structprune.ops import kind_of
from structprune.ops.op import CONVOLUTIONS

_NAMES = {
    False: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
_CHUNK = 1 << 22  # entries of patches that are held at once


@dataclass(frozen=True, slots=True, eq=False)
class ObservedLayer:
    """An observed layer: its weight by channel, and how its features are made.

    Attributes:
        weight: shape ``(positions, outputs of a group, kernel)``.
        groups: of a grouped convolution.
        call: arguments of a convolution other than input, weight and bias; None for a matrix product.
        output_dim: the dimension of the outputs, counted from the end.
    """

    weight: Tensor
    groups: int
    call: dict[str, Any] | None
    kernel: tuple[int, ...]
    transposed: bool
    output_dim: int

    @staticmethod
    def of(activation: Activation) -> ObservedLayer:
        """The layer at a site.

        Raises:
            PlanError: it is neither a convolution nor a product with a matrix.
        """
        weight = activation.weight
        assert weight is not None
        size, kind = activation.x.shape[activation.dim], kind_of(activation.operation.call.name)
        if kind in CONVOLUTIONS:
            transposed = kind == "transposed"
            args, kwargs = activation.operation.args, activation.operation.kwargs
            given = {**dict(zip(_NAMES[transposed], args, strict=False)), **kwargs}
            rest = {key: value for key, value in given.items() if key not in ("input", "weight", "bias")}
            groups = int(rest.pop("groups", 1))
            kernel = tuple(weight.shape[2:])
            by_channel = columns(activation).reshape(size, -1, prod(kernel))
            return ObservedLayer(by_channel, groups, rest, kernel, transposed, activation.dim)
        if weight.dim() != 2 or kind in ("bilinear", "einsum"):
            raise PlanError(
                f"The second moments of {activation.where} are not known: it is neither a convolution nor a product "
                "with one matrix. Name the layer in ignore=, or choose another criterion, such as 'wanda'."
            )
        # A weight on the left of its input gives its outputs in the dimension before the last.
        return ObservedLayer(columns(activation).unsqueeze(2), 1, None, (), False, -1 if activation.dim == -1 else -2)

    def moments(self, activation: Activation) -> tuple[Tensor, int]:
        """Sum of outer products of features, shape ``(groups, n, n)``, and how many."""
        total: Tensor | None = None
        count = 0
        for rows in self.rows(activation):
            products = rows.transpose(1, 2) @ rows
            total = products if total is None else total + products
            count += rows.shape[1]
        assert total is not None
        return total, count

    def rows(self, activation: Activation, drawn: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """Features by group and position, shape ``(groups, rows, n)``, in parts.

        Args:
            activation: the observed tensor.
            drawn: take so many positions of each sample, the same of all, drawn by a generator of this seed.
        """
        size = activation.x.shape[activation.dim]
        step = size
        if self.call is not None and activation.x.dim() == len(self.kernel) + 2:
            step = max(1, _CHUNK * len(activation.x) // max(1, activation.x.numel() * prod(self.kernel)))
        for piece in activation.x.detach().split(step) if self.call is not None else (activation.x.detach(),):
            features = self._features(activation, piece, size)
            if drawn is not None and len(features) % len(piece) == 0 and len(features) > drawn[0] * len(piece):
                by_sample = features.reshape(len(piece), -1, features.shape[1])
                order = torch.randperm(by_sample.shape[1], generator=torch.Generator().manual_seed(drawn[1]))
                features = by_sample[:, order[: drawn[0]].to(features.device)].flatten(0, 1)
            features = features.double() if features.device.type != "mps" else features
            yield features.reshape(len(features), self.groups, -1).transpose(0, 1)

    def _features(self, activation: Activation, x: Tensor, size: int) -> Tensor:
        """Shape ``(rows, positions * kernel)``."""
        if self.call is None:
            return x.movedim(activation.dim, -1).reshape(-1, size)
        # A kernel that is one at a single offset hands that offset on: its results are the patches.
        entries = prod(self.kernel)
        one = torch.eye(entries, dtype=x.dtype, device=x.device).reshape(entries, 1, *self.kernel)
        eye = (
            one.transpose(0, 1).repeat(size, *[1] * (one.dim() - 1))
            if self.transposed
            else one.repeat(size, *[1] * (one.dim() - 1))
        )
        patches: Tensor = activation.operation.func(x, eye, None, groups=size, **self.call)
        return patches.movedim(activation.dim, -1).reshape(-1, size * entries)

    def full(self) -> Tensor:
        """The weight with a row for each output of the whole layer, shape ``(positions, outputs, kernel)``."""
        if self.groups == 1:
            return self.weight
        size, out, kernel = self.weight.shape
        result = self.weight.new_zeros(self.groups, size // self.groups, self.groups, out, kernel)
        each = torch.arange(self.groups, device=result.device)
        result[each, :, each] = self.weight.reshape(self.groups, size // self.groups, out, kernel)
        return result.reshape(size, self.groups * out, kernel)


@dataclass(frozen=True, slots=True, eq=False)
class _QuadraticScores:
    """For each channel ``trace(G W_S M W_S^T)`` over the columns S that it takes along."""

    sites: Sites
    layers: list[ObservedLayer]
    inputs: list[Tensor]
    outputs: list[Tensor] | None
    inverse: bool
    damping: float
    factor: float
    reduce: str
    inverses: dict[int, Tensor] = field(default_factory=dict)

    def _inverse(self, number: int) -> Tensor:
        if number not in self.inverses:
            self.inverses[number] = _inverse(self.inputs[number], self.damping)
        return self.inverses[number]

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        parts: list[tuple[Tensor, Tensor]] = []
        for part in self.sites.of(group):
            device = self.inputs[part.site].device
            positions = torch.from_numpy(part.positions).to(device)
            table, real = padded(positions, torch.from_numpy(part.channels).to(device), group.channels)
            parts.append((self._site(part.site, table, real) * self.factor, real.any(1)))
        return reduced(parts, self.reduce, group.channels)

    def _site(self, number: int, table: Tensor, real: Tensor) -> Tensor:
        layer, moments = self.layers[number], self.inputs[number]
        kernel = layer.weight.shape[2]
        inside = layer.weight.shape[0] // layer.groups
        offsets = torch.arange(kernel, device=table.device)
        local = ((table % inside).unsqueeze(2) * kernel + offsets).flatten(1)  # (channels, most * kernel)
        number_of = (table // inside).repeat_interleave(kernel, 1)
        there = real.repeat_interleave(kernel, 1)
        matrix = self._inverse(number) if self.inverse else moments
        block = matrix[number_of.unsqueeze(2), local.unsqueeze(2), local.unsqueeze(1)]
        pairs = (number_of.unsqueeze(2) == number_of.unsqueeze(1)) & there.unsqueeze(2) & there.unsqueeze(1)
        block = block.masked_fill(~pairs, 0)
        if self.inverse:
            block = torch.linalg.inv(block + torch.diag_embed((~there).to(block.dtype)))
        weight = layer.weight if self.outputs is None else layer.full()
        taken = weight[table].transpose(1, 2).flatten(2)  # (channels, outputs, most * kernel)
        # What no input ever reaches costs nothing, whatever the damping.
        reached = torch.diagonal(moments, dim1=1, dim2=2)[number_of, local] > 0
        taken = taken * (there & reached).unsqueeze(1)
        product = taken @ block
        if self.outputs is not None:
            # One product for all channels: a product for each would read the whole of G as often.
            product = torch.einsum("op,cpk->cok", self.outputs[number], product)
        return (product * taken).sum((1, 2))


def _inverse(moments: Tensor, damping: float) -> Tensor:
    """Inverse of each matrix, with `damping` times its mean diagonal added to the diagonal."""
    mean = torch.diagonal(moments, dim1=1, dim2=2).mean(1)
    added = torch.where(mean > 0, mean * damping, 1)
    return torch.linalg.inv(moments + torch.diag_embed(added.unsqueeze(1).expand(-1, moments.shape[1])))


def _check(reduce: str, damping: float) -> None:
    # Inputs that depend on each other are common, so there is no way without damping.
    require(locals(), reduce=REDUCTION, damping=real(above=0))


@dataclass(frozen=True, slots=True)
class OBS(Unfitted):
    """Optimal Brain Surgeon on a layer's own error: what its outputs lose once the remaining weights make up for it.

    Hassibi and Stork, 1993; structured as in Kurtic et al., ZipLM, 2023: with H the second moments of the
    layer's inputs (patches, for a convolution), the mean squared change of its outputs is
    ``sum over rows i of W[i, S] ((H^-1)[S, S])^-1 W[i, S]^T``. It needs data and no loss. A layer's H
    has as many rows as the layer has inputs x kernel.

    Args:
        damping: share of the mean diagonal of H that is added to its diagonal.
        reduce: how the layers at which a group ends are joined: ``"sum"``, ``"mean"``, ``"max"``, ``"prod"`` or
            ``"first"``.
    """

    damping: float = 1e-2
    reduce: str = "sum"

    def __post_init__(self) -> None:
        _check(self.reduce, self.damping)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data, it does not fit the model, or a layer is neither convolution nor product.
        """
        batches = require_data(batches, self)
        sites = Sites(graph, each_edge=True, weighted=True)
        moments = _Moments(sites)
        look(graph, batches, sites.all, lambda activation, _: moments.add(activation))
        moments.sums.reduce()
        return _QuadraticScores(sites, moments.layers(), moments.inputs(), None, True, self.damping, 1.0, self.reduce)

    def weight_scores(self, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
        """``w^2 / (H^-1)[q, q]`` for each weight of a layer; see `structprune.importance.base.WeightCriterion`.

        Hassibi and Stork, 1993, equation 5, without the half: the mean squared change of the layer's outputs.

        Raises:
            PlanError: there is no data, it does not fit the model, or a layer is neither convolution nor product.
        """
        batches = require_data(batches, self)
        uses, sums = weight_sites(graph), Sums()

        def visit(activation: Activation, _: Any) -> None:
            moments, count = ObservedLayer.of(activation).moments(activation)
            sums.add((uses[activation.number].name, "moments"), moments)
            sums.add((uses[activation.number].name, "count"), torch.tensor(float(count)))

        with torch.no_grad():
            look(graph, batches, [use.site for use in uses], visit)
        sums.reduce()
        scores: dict[str, Tensor] = {}
        for use in uses:
            weight = graph.model.get_parameter(use.name).detach()
            moments = sums[use.name, "moments"] / float(sums[use.name, "count"])
            diagonal = torch.diagonal(_inverse(moments, self.damping), dim1=1, dim2=2).reshape(-1)
            reached = torch.diagonal(moments, dim1=1, dim2=2).reshape(-1) > 0
            # What no input ever reaches costs nothing, whatever the damping.
            each = torch.where(reached, 1 / diagonal, 0)
            scores[use.name] = weight.to(each.dtype).square() * use.spread(each, weight)
        return scores


class _Moments:
    """Second moments of the inputs of observed layers."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.sums = Sums()
        self._layers: dict[int, ObservedLayer] = {}

    def layer(self, activation: Activation) -> ObservedLayer:
        """The layer at a site."""
        known = self._layers.get(activation.number)
        if known is None:
            known = self._layers[activation.number] = ObservedLayer.of(activation)
        return known

    def add(self, activation: Activation) -> None:
        """Count in what comes into a layer."""
        with torch.no_grad():
            moments, count = self.layer(activation).moments(activation)
        self.sums.add(("input", activation.number), moments)
        self.sums.add(("count", activation.number), torch.tensor(float(count)))
        self.sums.add(("samples", activation.number), torch.tensor(float(activation.samples)))

    def layers(self) -> list[ObservedLayer]:
        """The layers of all sites."""
        return [self._layers[number] for number in range(len(self.sites.all))]

    def inputs(self, over: str = "count") -> list[Tensor]:
        """Second moments of each site: mean over rows (``"count"``), or over ``"samples"`` of the sum over rows."""
        return [self.sums["input", number] / float(self.sums[over, number]) for number in range(len(self.sites.all))]


@dataclass(frozen=True, slots=True)
class KFAC(Unfitted):
    """A layer's curvature as a Kronecker product: second moments of inputs x second moments of output gradients.

    Martens and Grosse, Optimizing Neural Networks with Kronecker-factored axis Approximate Curvature, 2015; Grosse and
    Martens, 2016, for convolutions (A sums over positions, G is their mean); used for channels by Wang et al.,
    EigenDamage, 2019. The loss changes by ``1/2 trace(G W_S A[S, S] W_S^T)`` (C-OBD), or with the
    remaining weights making up for it ``1/2 trace(G W_S ((A^-1)[S, S])^-1 W_S^T)`` (C-OBS). The paper takes a filter's
    row away where it is made; here its columns go where it is consumed, which is the same switch behind a batch norm
    too. Gradients are those of the data's own labels (the empirical Fisher matrix).

    Args:
        inverse: C-OBS in place of C-OBD.
        damping: share of the mean diagonal that is added to it, for `inverse`.
        reduce: how the layers at which a group ends are joined; see `OBS`.
    """

    inverse: bool = False
    damping: float = 1e-2
    reduce: str = "sum"

    def __post_init__(self) -> None:
        _check(self.reduce, self.damping)
        require({"inverse": self.inverse}, inverse=FLAG)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data or no loss, they do not fit the model, or a layer is neither convolution nor
                product.
        """
        batches = require_data(batches, self)
        batches.require_loss(self)
        sites = Sites(graph, each_edge=True, weighted=True)
        moments = _Moments(sites)
        shifts: list[tuple[int, int, Tensor]] = []

        def shifted(activation: Activation, y: Tensor) -> Tensor:
            shift = torch.zeros_like(y, requires_grad=True)
            shifts.append((activation.number, moments.layer(activation).output_dim, shift))
            return y + shift

        def after(value: Tensor, samples: int) -> None:
            gradients = torch.autograd.grad(
                value, [shift for *_, shift in shifts], allow_unused=True, materialize_grads=True
            )
            for (number, dim, _), gradient in zip(shifts, gradients, strict=True):
                rows = gradient.detach().movedim(dim, -1).reshape(-1, gradient.shape[dim])
                rows = rows.double() if rows.device.type != "mps" else rows
                moments.sums.add(("output", number), rows.T @ rows)
            shifts.clear()

        descend(graph, batches, sites.all, moments.add, shifted, after)
        moments.sums.reduce()
        outputs = [moments.sums["output", n] / float(moments.sums["count", n]) for n in range(len(sites.all))]
        return _QuadraticScores(
            sites, moments.layers(), moments.inputs("samples"), outputs, self.inverse, self.damping, 0.5, self.reduce
        )


criterion("obs")(OBS)
criterion("kfac")(KFAC)
criterion("kfac_obs")(lambda: KFAC(inverse=True))
