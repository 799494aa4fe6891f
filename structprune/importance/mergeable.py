"""Which groups of channels can be merged: of two channels that are the same, one with the next weights of both will do.

That is so where each channel is processed by itself, and in the same way, until layers with held weights sum over the
channels. Then the weights by which these layers take the channels are added up, and all else is averaged. It is not so
where a norm, a softmax or a mean runs over the channels, where two activations are multiplied and summed over them (the
size of an attention head), or where a weight is computed from parameters before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import fx, nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group, Member
from structprune.importance.sites import ancestors, held_nodes, pairs_of, summed_dims
from structprune.ops import kind_of, layer_of, op_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.relations import Axis
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import describe

# Contractions of which the weights of a channel can be added up.
KINDS = frozenset({"convolution", "transposed", "linear", "product"})


class Mergeable:
    """What is known of merging the channels of a graph.

    Args:
        graph: the coupled channels of a model.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._summed, self._computed = summed_dims(graph)
        self._held = held_nodes(graph)
        self._tensors = {name: held.tensor for name, held in held_tensors(graph.model).items()}
        users = {
            str(node.target): len(node.users) for node in graph.trace.all_nodes if node.meta["name"] == "parameter"
        }
        self._shared = {name for name, count in users.items() if count > 1}
        self._unreached = graph.trace.unreached(graph.model)
        self._reason = np.full(graph.components.count, -1)
        self._reasons: list[str] = []
        for reduction in graph.channels.relations.reductions:
            node = graph.trace.all_nodes[reduction.node]
            self._mark(f"{describe(node, graph.trace)} runs over them", _roots(graph, reduction.axes))
        for balanced in graph.balanced():
            for number in balanced.groups:
                paired = graph.groups()[number].components
                self._mark("they are paired with others, of which as many are kept", paired)
        for node in graph.trace.nodes:
            if node not in self._held:
                self._look(node)

    def summed(self, member: Member) -> bool:
        """Whether the entries of a member are weights by which channels are summed away."""
        return (member.tensor, member.dim) in self._summed

    def obstacle(self, group: Group) -> str | None:
        """Why the channels of a group cannot be merged; None if they can."""
        numbers = self._reason[group.components]
        if (numbers >= 0).any():
            return self._reasons[int(numbers[numbers >= 0][0])]
        for member in group.members:
            if member.tensor in self._computed:
                return f"a weight is computed from {member.tensor}"
            if member.tensor in self._unreached:
                return f"{member.tensor} takes no part in the forward in eval mode"
            if self.summed(member) and member.tensor in self._shared:
                return f"{member.tensor} is used in several places"
            if len(np.unique(np.bincount(member.channels, minlength=group.channels))) > 1:
                return f"not all of its channels have as many entries of {member.tensor}"
        if not any(self.summed(member) for member in group.members):
            return "no layer with a weight sums over them"
        if all(self.summed(member) for member in group.members if self._is_weight(member)):
            return "no weight makes them alone"
        return None

    def _is_weight(self, member: Member) -> bool:
        tensor = self._tensors[member.tensor]
        return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()

    def _mark(self, reason: str, roots: np.ndarray) -> None:
        if len(roots):
            fresh = roots[self._reason[roots] < 0]
            self._reason[fresh] = len(self._reasons)
            self._reasons.append(reason)

    def _look(self, node: fx.Node) -> None:
        """Mark channels with which an operation does more than to process each alone, or sum over them by a layer."""
        graph, known = self._graph, op_of(node.meta["name"])
        if node.meta["name"] == "part" or (known is not None and known.moves):
            return
        here = self._roots_at(node)
        self._look_at_pairs(node)
        layer = self._layer_input(node, here)
        for source in node.all_input_nodes:
            if source not in self._held and source is not layer:
                ending = np.setdiff1d(self._roots_at(source), here)
                self._mark(f"they end in {describe(node, graph.trace)}", ending)

    def _look_at_pairs(self, node: fx.Node) -> None:
        """Mark channels over which two activations are multiplied and summed."""
        operands = tensors(node)
        for pair in pairs_of(node):
            if max(pair.operand, pair.weight) < len(operands):
                one, other = operands[pair.operand], operands[pair.weight]
                if not self._held.intersection((one, other)):
                    axes = self._graph.channels.axes[one.meta["index"]]
                    reason = f"{describe(node, self._graph.trace)} multiplies and sums over them"
                    self._mark(reason, _roots(self._graph, axes[pair.dim]))

    def _layer_input(self, node: fx.Node, here: np.ndarray) -> Any:
        """What goes into a layer whose weights of a channel can be added up; None if it is no such layer."""
        layer, given, name = layer_of(node.meta["name"]), arguments(node), describe(node, self._graph.trace)
        if kind_of(node.meta["name"]) == "recurrent":  # its results are its inputs too
            self._mark(f"{name} takes its own results", here)
        if layer is None or layer.kind not in KINDS or given.get(layer.weight) not in self._held:
            return None
        if layer.kind == "transposed" and given.get("groups") not in (None, 1):
            self._mark(f"{name} has groups of its own", here)
            return None
        self._computed |= computed_from(given[layer.weight])
        return given.get(layer.input)

    def _roots_at(self, node: fx.Node) -> np.ndarray:
        return _roots(self._graph, self._graph.channels.axes[node.meta["index"]])


def computed_from(weight: fx.Node) -> frozenset[str]:
    """The parameters that a weight is computed from, unless it is one, or one that was moved."""
    source = weight
    while source.meta["name"] != "parameter":
        known, inputs = op_of(source.meta["name"]), source.all_input_nodes
        if known is None or not (known.moves or known.converts) or len(inputs) != 1:
            return frozenset(str(node.target) for node in ancestors(source) if node.meta["name"] == "parameter")
        source = inputs[0]
    return frozenset()


def _axes(axes: Any) -> Iterator[Axis]:
    """The free axes of a result, or of several."""
    if isinstance(axes, Axis):
        if axes.free:
            yield axes
    elif isinstance(axes, (tuple, list)):
        for axis in axes:
            yield from _axes(axis)


def _roots(graph: ChannelGraph, axes: Any) -> np.ndarray:
    """The components that decide about the channels of axes."""
    found = [graph.roots.of(graph.components.of(axis))[1] for axis in _axes(axes)]
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *found]))
