"""Channels taken out one after the other, by what the layers behind miss once all of those are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.checking import FLAG, SEED, require, whole
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.importance.activations import Activation, Sums
from structprune.importance.base import Importance, Unfitted, criterion
from structprune.importance.data import Batches, require_data
from structprune.importance.layer_curvature import ObservedLayer
from structprune.importance.observe import look
from structprune.importance.sites import Sites

# Share of the channels left that may go in one step, where it comes to more than one.
AT_ONCE = 1 / 128


@dataclass(frozen=True, slots=True)
class ThiNet(Unfitted):
    """What the outputs of the layers behind lose when a channel goes, with all that went before it.

    Luo et al., ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression, 2017, algorithm 1: with
    ``z_c`` what channel c adds to a layer's outputs, the set T that goes grows by the channel that leaves
    ``E |sum over c in T of z_c|^2`` (equation 6) smallest. Channels that cancel each other go together, and of two that
    are alike only one is cheap, which scores of single channels cannot say. The score is by how much that mean square
    grows as the channel goes, never less than for those before it; the scores of all groups are in one unit, which
    suits ``scope="per_cost"`` in convolutional networks. Here the mean square is not that of sampled outputs but
    follows from the second moments of the layer's inputs, as it does for `OBS`. Of many channels a few go at once. The
    paper solves the remaining weights again afterwards: `structprune.recover`.

    Args:
        centred: whether the mean square is taken about its mean. A constant that is missing can be made up for by a
            bias, and is by batch norms that are calibrated again; so An et al., FLAP, 2024, for single channels.
        positions: of each sample (pixels, tokens) that are looked at, drawn once for all samples; None for all.
        seed: of that draw; the global random state is not touched.

    Example:
        >>> import torch
        >>> from structprune.importance.base import fitted
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> graph = ChannelGraph(model, torch.randn(1, 2))
        >>> fitted(ThiNet(), graph, [torch.randn(8, 2)])(graph.groups()[0], {}).shape
        torch.Size([3])
    """

    centred: bool = True
    positions: int | None = 64
    seed: int = 0

    def __post_init__(self) -> None:
        given = {"centred": self.centred, "positions": self.positions, "seed": self.seed}
        require(given, centred=FLAG, positions=whole(1).or_none, seed=SEED)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Look at the data; the model is left as it was.

        Raises:
            PlanError: there is no data, it does not fit the model, or a layer is neither convolution nor product.
        """
        batches = require_data(batches, self)
        sites = Sites(graph, each_edge=True, weighted=True)
        layers: dict[int, ObservedLayer] = {}
        sums = Sums()

        def visit(activation: Activation, _: object) -> None:
            if activation.number not in layers:
                layers[activation.number] = ObservedLayer.of(activation)
            for rows in layers[activation.number].rows(activation, self._drawn(activation)):
                # With a one behind the features, the same product holds their sums and their number.
                wide = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
                sums.add(activation.number, wide.transpose(1, 2) @ wide)

        look(graph, batches, sites.all, visit)
        sums.reduce()
        return _Eliminated(sites, [self._products(layers[n], sums[n]) for n in range(len(sites.all))])

    def _drawn(self, activation: Activation) -> tuple[int, int] | None:
        return None if self.positions is None else (self.positions, self.seed + activation.number)

    def _products(self, layer: ObservedLayer, sums: Tensor) -> Tensor:
        """``E <z_p, z_q>`` for each two positions of a site, summed over the layer's outputs."""
        moments = sums / sums[:, -1:, -1:]
        mean, moments = moments[:, :-1, -1], moments[:, :-1, :-1]
        if self.centred:
            moments = moments - mean.unsqueeze(2) * mean.unsqueeze(1)
        size, outputs, kernel = layer.weight.shape
        inside = size // layer.groups
        weight = layer.weight.reshape(layer.groups, inside, outputs, kernel).transpose(2, 3).flatten(1, 2)
        products = (weight @ weight.transpose(1, 2)) * moments
        products = products.reshape(layer.groups, inside, kernel, inside, kernel).sum((2, 4))
        return torch.block_diag(*products.unbind())


@dataclass(frozen=True, slots=True, eq=False)
class _Eliminated:
    """Scores from the products of what positions add to each site's layer.

    Attributes:
        sites: the sites.
        products: for each site, shape ``(positions, positions)``.
    """

    sites: Sites
    products: list[Tensor]

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        total: Tensor | None = None
        for part in self.sites.of(group):
            products = self.products[part.site]
            positions = torch.from_numpy(part.positions).to(products.device)
            channels = torch.from_numpy(part.channels).to(products.device)
            met = products.new_zeros(group.channels, len(products))
            met[channels, positions] = 1
            here = met @ products @ met.T
            total = here if total is None else total + here.to(total.device)
        assert total is not None
        return eliminated(total)


def eliminated(products: Tensor) -> Tensor:
    """By how much ``sum of products[c, d] over c and d in T`` grows as T takes in each channel, least growth first.

    Args:
        products: symmetric, shape ``(channels, channels)``.

    Returns:
        Shape ``(channels,)``; rising in the order in which channels go.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 3.0], [0.0, -3.5]])
        >>> eliminated(z @ z.T).argsort()
        tensor([0, 1, 2, 3])
    """
    costs = products.diagonal().clone()
    left = torch.arange(len(costs), device=costs.device)
    scores = torch.zeros_like(costs)
    highest, gone = costs.new_zeros(()), 0
    while len(left):
        number = max(1, int(len(left) * AT_ONCE))
        picked, which = torch.topk(costs[left], number, largest=False)
        chosen = left[which]
        # Growth may fall again where channels cancel; of equal scores the one that went first stays first.
        rising = torch.cummax(torch.cat([highest.reshape(1), picked]), 0).values[1:]
        scores[chosen] = rising * (1 + 1e-9 * torch.arange(gone, gone + number, device=costs.device))
        highest, gone = rising[-1], gone + number
        costs += 2 * products[:, chosen].sum(1)
        stays = torch.ones(len(left), dtype=torch.bool, device=costs.device)
        stays[which] = False
        left = left[stays]
    return scores


criterion("thinet")(ThiNet)
