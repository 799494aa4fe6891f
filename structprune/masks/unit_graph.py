"""The units of a masked network as a graph: channels and neurons, and the weights that are left between them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, fx, nn

from structprune.coupling.graph import ChannelGraph
from structprune.importance.sites import WeightSite, weight_sites
from structprune.ops.relations import Axis
from structprune.tracing.trace import ExampleInputs

if TYPE_CHECKING:
    import networkx as nx

Unit = tuple[str, int]


def unit_graph(model: nn.Module, example_inputs: ExampleInputs, kept: Mapping[str, Tensor]) -> nx.DiGraph[Unit]:
    """The units that a path of kept weights leads through, from an input of the network to an output.

    A node is ``(layer, index)``: an output channel of the layer that makes it first, or ``("input", index)``. Channels
    that are coupled (on both sides of a residual sum, before and after a norm) are one unit. An edge says that at least
    one weight is left between two units; its attribute ``weights`` counts them.

    Args:
        model: without masks; its values do not matter.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        kept: by name of the parameter, which entries are left; parameters that are not named are whole.
    """
    import networkx as nx  # it takes longer than most graphs

    graph = ChannelGraph(model, example_inputs)
    units = _Units(graph)
    dense: nx.DiGraph[Unit] = nx.DiGraph()
    for use in weight_sites(graph):
        for source, target, weights in units.edges(use, kept.get(use.name)):
            if source == target:  # a depthwise convolution hands its channels on
                continue
            known = dense.get_edge_data(source, target, {"weights": 0})["weights"]
            dense.add_edge(source, target, weights=known + weights)
    first = {unit for unit in dense if dense.in_degree(unit) == 0}
    last = {unit for unit in dense if dense.out_degree(unit) == 0}
    left: nx.DiGraph[Unit] = nx.DiGraph()
    left.add_nodes_from(dense)
    left.add_edges_from((a, b, data) for a, b, data in dense.edges(data=True) if data["weights"])
    from_inputs, to_outputs = _reached(left, first), _reached(left.reverse(copy=False), last)
    return left.subgraph(from_inputs & to_outputs).copy()


def _reached(graph: nx.DiGraph[Unit], starts: set[Unit]) -> set[Unit]:
    reached, waiting = set(starts), list(starts)
    while waiting:
        new = set(graph.successors(waiting.pop())) - reached
        reached |= new
        waiting += new
    return reached


class _Units:
    """Names of units, the same for all dimensions of tensors that hold them."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._nodes = {node.meta["index"]: node for node in graph.trace.nodes}
        self._names: dict[object, Unit] = {}
        self._inputs = count()
        for use in weight_sites(graph):  # the layers that make units name them
            self._of(self._nodes[use.site.operation], use.site.dim, use.name.removesuffix(".weight"))

    def edges(self, use: WeightSite, kept: Tensor | None) -> list[tuple[Unit, Unit, int]]:
        """Pairs of units with the number of weights left between them, zero included."""
        node, weight = self._nodes[use.site.operation], self._graph.model.get_parameter(use.name)
        x = self._nodes[use.site.node]
        inside = weight.shape[use.dim]
        counts = np.ones(weight.shape, dtype=np.int64) if kept is None else kept.cpu().numpy().astype(np.int64)
        table = np.moveaxis(counts, use.dim, 1).reshape(weight.shape[1 - use.dim], inside, -1).sum(2)
        sources, targets = self._of(x, use.site.dim), self._of(node, use.site.dim)
        groups, outputs = use.site.size // inside, len(targets)
        pairs: list[tuple[Unit, Unit, int]] = []
        if use.dim == 1:  # (outputs, channels of a group)
            for out, row in enumerate(table):
                start = out // (outputs // groups) * inside
                pairs += [(sources[start + j], targets[out], int(c)) for j, c in enumerate(row)]
        else:  # (outputs of a group, channels), of a transposed convolution or a product
            each = use.site.size // (outputs // len(table))
            for out, row in enumerate(table):
                pairs += [(sources[j], targets[j // each * len(table) + out], int(c)) for j, c in enumerate(row)]
        return pairs

    def _of(self, node: fx.Node, dim: int, layer: str | None = None) -> list[Unit]:
        """The unit at each index of a dimension; those that nothing has named yet get the name of `layer`."""
        axis: Axis = self._graph.channels.axes[node.meta["index"]][dim]
        keys = self._keys(axis) if axis.free else [(node.meta["index"], dim, index) for index in range(axis.size)]
        for index, key in enumerate(keys):
            if key not in self._names:
                self._names[key] = ("input", next(self._inputs)) if layer is None else (layer, index)
        return [self._names[key] for key in keys]

    def _keys(self, axis: Axis) -> list[tuple[int, ...]]:
        """For each index the roots that it depends on: a column of a head depends on the head and on the column."""
        positions, roots = self._graph.roots.of(self._graph.components.of(axis))
        keys: list[tuple[int, ...]] = [() for _ in range(axis.size)]
        for position, root in zip(positions.tolist(), roots.tolist(), strict=True):
            keys[position] += (root,)
        return keys
