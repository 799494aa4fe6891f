"""Where in a forward the channels of a group can be looked at.

A channel is looked at where it *ends*: at the input of each convolution, linear layer or matrix product whose weight
sums it away. There it has been through its norm and its activation, so the map is the one that the papers mean
(APoZ counts zeros after the ReLU); and the channel is off exactly when it is zero at all of its ends, whatever
residual sums it went through, so that a gate on all ends is a gate on the channel. A depthwise convolution hands its
channel on and is no end. A channel that no weight sums away (the size of a query head) is looked at where it is
contracted with another activation, and what is left (the hidden state of a stacked LSTM apart, which no operation
shows) at the last tensor that carries it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.ops import kind_of, layer_of, op_of
from structprune.ops.arguments import tensors
from structprune.ops.op import Pair
from structprune.ops.relations import Axis, Ids
from structprune.tracing.trace import describe, part_of


@dataclass(frozen=True, slots=True)
class Site:
    """A dimension of a tensor in the forward.

    Attributes:
        operation: number of the operation in the trace that takes or makes the tensor.
        operand: which of the operation's tensor arguments; -1 for its result.
        part: which of several results.
        dim: the dimension, counted from the end.
        size: number of channels there.
        weight: which tensor argument sums the channels away, or -1 if none does.
        weight_dim: the dimension of it that does.
        node: number of the node in the trace that holds the tensor.
        where: operation, module and source line, for messages.
    """

    operation: int
    operand: int
    part: int
    dim: int
    size: int
    weight: int
    weight_dim: int
    node: int
    where: str


@dataclass(frozen=True, slots=True)
class SiteChannels:
    """What a site shows of a group: position ``positions[i]`` of it belongs to channel ``channels[i]`` of the group."""

    site: int
    positions: Ids
    channels: Ids


def pairs_of(node: fx.Node) -> Iterable[Pair]:
    """The pairs of dimensions that an operation sums away, both ways round where neither side is the weight as such."""
    known = op_of(node.meta["name"])
    return () if known is None or known.contraction is None else known.contraction.pairs(node)


def summed_dims(graph: ChannelGraph) -> tuple[frozenset[tuple[str, int]], frozenset[str]]:
    """The dimensions of parameters that an operation sums away, and the parameters that weights are computed from.

    The first are names and dimensions of weights that are used as they are, or transposed. The second (weight norms,
    masks) are in products with others before they are used, so that their dimensions are not listed.
    """
    held = held_nodes(graph)
    summed: set[tuple[str, int]] = set()
    computed: set[str] = set()
    for node in graph.trace.nodes:
        arguments = tensors(node)
        for c in pairs_of(node):
            if max(c.operand, c.weight) >= len(arguments) or arguments[c.weight] not in held:
                continue
            if arguments[c.operand] in held:
                continue
            weight = source = arguments[c.weight]
            while source.meta["name"] != "parameter" and len(source.all_input_nodes) == 1:
                source = source.all_input_nodes[0]
            if source.meta["name"] != "parameter":
                computed |= {str(n.target) for n in ancestors(source) if n.meta["name"] == "parameter"}
                continue
            axis = graph.channels.axes[weight.meta["index"]][c.weight_dim]
            axes = graph.channels.axes[source.meta["index"]]
            summed |= {
                (str(source.target), dim) for dim, r in enumerate(axes) if r.free and axis.free and r.key == axis.key
            }
    return frozenset(summed), frozenset(computed)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    ancestors, left = {node}, [node]
    while left:
        new = set(left.pop().all_input_nodes) - ancestors
        ancestors |= new
        left += new
    return ancestors


class Sites:
    """The sites of a graph, and which of their positions belong to which channel.

    Args:
        graph: the coupled channels of a model.
        each_edge: one site for each operation that takes a tensor, rather than one for each tensor.
        weighted: only ends at a weight; a group without one then has no sites.
    """

    def __init__(self, graph: ChannelGraph, *, each_edge: bool = False, weighted: bool = False) -> None:
        self._graph = graph
        self._covered = np.zeros(graph.components.count, dtype=bool)
        self._known: dict[tuple[object, object], tuple[Ids, Ids]] = {}
        self._places: set[tuple[int, int]] = set()
        self._each_edge = each_edge
        self._entries: list[tuple[Ids, Ids]] = []
        self.all: list[Site] = []
        held = held_nodes(graph)
        pairs = [(node, c) for node in graph.trace.nodes for c in pairs_of(node)]
        for node, c in pairs:
            if self._side(node, c.weight) in held and self._side(node, c.operand) not in held:
                self._end(node, c)
        if not weighted:
            self._without_weight(pairs)
            self._last_tensors()
        self._sort()

    @staticmethod
    def _side(node: fx.Node, operand: int) -> fx.Node | None:
        arguments = tensors(node)
        return arguments[operand] if 0 <= operand < len(arguments) else None

    # -- finding -------------------------------------------------------------------------------------------------

    def _axis_at(self, node: fx.Node, operand: int, dim: int) -> tuple[fx.Node, Axis, int] | None:
        """The tensor, the axis of its dimension and that dimension from the end; None if there is none that may go."""
        side = self._side(node, operand)
        if side is None:
            return None
        axes = self._graph.channels.axes[side.meta["index"]]
        if not -len(axes) <= dim < len(axes) or not axes[dim].free:
            return None
        return side, axes[dim], dim if dim < 0 else dim - len(axes)

    def _members(self, axis: Axis, against: Axis | None) -> tuple[Ids, Ids]:
        """Positions of `axis` and prunable roots there, those only that `against` has too."""
        key = (axis.key, against.key if against is not None and against.free else None)
        known = self._known.get(key)
        if known is None:
            components = self._graph.components
            positions, roots = self._graph.roots.of(components.of(axis))
            keep = components.roots[roots]
            if against is not None and against is not axis:
                ends = np.zeros(components.count, dtype=bool)
                if against.free:
                    ends[self._graph.roots.of(components.of(against))[1]] = True
                keep = keep & ends[roots]
            known = self._known[key] = positions[keep], roots[keep]
        return known

    def _end(self, node: fx.Node, c: Pair, uncovered: bool = False) -> None:
        mine = self._axis_at(node, c.operand, c.dim)
        other = self._axis_at(node, c.weight, c.weight_dim)
        if mine is None or other is None:
            return
        side, axis, dim = mine
        positions, roots = self._members(axis, other[1])
        if kind_of(node.meta["name"]) == "transposed":
            positions, roots = self._not_handed_on(node, c, positions, roots)
        if uncovered:
            positions, roots = self._only_uncovered(positions, roots)
        if not len(roots):
            return
        place = (side.meta["index"], dim)
        if not self._each_edge and place in self._places:
            return
        self._places.add(place)
        self._add(node, c.operand, 0, dim, axis.size, side, positions, roots, c.weight, other[2])

    def _not_handed_on(self, node: fx.Node, c: Pair, positions: Ids, roots: Ids) -> tuple[Ids, Ids]:
        """Without the groups of a transposed convolution: its weight has them on the side that is summed away."""
        out = self._graph.channels.axes[node.meta["index"]][c.dim]
        weight = self._side(node, c.weight)
        assert weight is not None
        if not out.free or self._graph.channels.axes[weight.meta["index"]][1].size == out.size:
            return positions, roots
        keep = ~np.isin(roots, self._graph.roots.of(self._graph.components.of(out))[1])
        return positions[keep], roots[keep]

    def _add(
        self, node: fx.Node, operand: int, part: int, dim: int, size: int, side: fx.Node, positions: Ids, roots: Ids,
        weight: int = -1, weight_dim: int = 0,
    ) -> None:  # fmt: skip
        where = describe(node, self._graph.trace)
        number, at = node.meta["index"], side.meta["index"]
        self.all.append(Site(number, operand, part, dim, size, weight, weight_dim, at, where))
        self._entries.append((positions, roots))

    def _cover(self) -> None:
        for _, roots in self._entries:
            self._covered[roots] = True

    def _only_uncovered(self, positions: Ids, roots: Ids) -> tuple[Ids, Ids]:
        keep = ~self._covered[roots]
        return positions[keep], roots[keep]

    def _without_weight(self, pairs: list[tuple[fx.Node, Pair]]) -> None:
        """Channels that end at no weight: the first operand of a contraction of two activations."""
        self._cover()
        for node, c in pairs:
            if c.operand < c.weight:
                self._end(node, c, uncovered=True)

    def _last_tensors(self) -> None:
        """Channels that end at no contraction: the last tensor that carries them."""
        self._cover()
        wanted = np.zeros(self._graph.components.count, dtype=bool)
        for group in self._graph.groups():
            wanted[group.components] = True
        if not (wanted & ~self._covered).any():
            return
        self._covered |= ~wanted
        for node in reversed(self._graph.trace.nodes):
            if node.op.startswith("call_") and isinstance(node.meta.get("shape"), tuple):
                self._result(node)

    def _result(self, node: fx.Node) -> None:
        axes = self._graph.channels.axes[node.meta["index"]]
        made, part = part_of(node) if node.meta["name"] == "part" else (node, 0)
        for dim, axis in enumerate(axes):
            if axis.free:
                positions, roots = self._only_uncovered(*self._members(axis, None))
                if len(roots):
                    self._add(made, -1, part, dim - len(axes), axis.size, node, positions, roots)
                    self._covered[roots] = True

    # -- looking up ----------------------------------------------------------------------------------------------

    def _sort(self) -> None:
        roots = [roots for _, roots in self._entries]
        sites = [np.full(len(part), number) for number, part in enumerate(roots)]
        root = np.concatenate([np.zeros(0, dtype=np.int64), *roots])
        order = np.argsort(root, kind="stable")
        self._root = root[order]
        self._site = np.concatenate([np.zeros(0, dtype=np.int64), *sites])[order]
        self._position = np.concatenate([np.zeros(0, dtype=np.int64), *(p for p, _ in self._entries)])[order]

    def show(self, group: Group) -> bool:
        """Whether any site shows channels of the group."""
        first = np.searchsorted(self._root, group.components, side="left")
        return bool((first < np.searchsorted(self._root, group.components, side="right")).any())

    def of(self, group: Group) -> list[SiteChannels]:
        """What each site shows of the group, in the order of the model.

        Raises:
            PlanError: no site shows any of it.
        """
        first = np.searchsorted(self._root, group.components, side="left")
        last = np.searchsorted(self._root, group.components, side="right")
        counts = last - first
        channels = np.repeat(np.arange(group.channels), counts)
        entries = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
        sites = self._site[entries]
        if not len(sites):
            raise PlanError(
                f"The channels of {group.name!r} show in no tensor of the forward that this criterion can look at. "
                "Name the layer in ignore=, or choose a criterion of weights, such as 'l2'."
            )
        order = np.argsort(sites, kind="stable")
        numbers, starts = np.unique(sites[order], return_index=True)
        pieces = np.split(order, starts[1:])
        return [
            SiteChannels(int(number), self._position[entries[piece]], channels[piece])
            for number, piece in zip(numbers, pieces, strict=True)
        ]


def held_nodes(graph: ChannelGraph) -> set[fx.Node]:
    """Tensors that the model holds, and what is computed from them alone: the weights."""
    held: set[fx.Node] = set()
    for node in graph.trace.nodes:
        inputs = node.all_input_nodes
        if node.meta["name"] == "parameter" or (node.op != "placeholder" and inputs and held.issuperset(inputs)):
            held.add(node)
    return held


# -- where the weights of layers meet their inputs, for criteria that score each weight ------------------------------
# `structprune.importance.sites` lists channels that may go; here every input counts, the model's own among them.


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A use of a parameter as the weight of a layer.

    Attributes:
        name: of the parameter.
        site: the layer's input.
        dim: the dimension of the weight, 0 or 1, that meets the input.
    """

    name: str
    site: Site
    dim: int

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """A value for each entry of the weight from one for each feature of the input.

        The input of a convolution with 4 channels in 2 groups, of kernel 3, has 12 features, 3 of each channel; its
        weight of shape ``(6, 2, 3)`` reads channels 0 and 1 in rows 0 to 2, and channels 2 and 3 in rows 3 to 5.

        Args:
            values: shape ``(channels,)`` or ``(channels * kernel,)``.
            weight: of shape ``(outputs, channels of a group, *kernel)``, or with the first two exchanged.
        """
        kernel = weight.shape[2:]
        if values.numel() == self.site.size:
            values = values.view(self.site.size, *[1] * len(kernel))
        else:
            values = values.view(self.site.size, *kernel)
        inside = weight.shape[self.dim]
        if inside == self.site.size:
            return values.unsqueeze(1 - self.dim).expand(weight.shape)
        groups = self.site.size // inside
        rows = values.unflatten(0, (groups, inside)).unsqueeze(1)
        return rows.expand(groups, weight.shape[0] // groups, inside, *kernel).reshape(weight.shape)


def weight_sites(graph: ChannelGraph) -> list[WeightSite]:
    """All uses of parameters as weights of convolutions and matrix products.

    Parameters that a weight is computed from (a weight norm) are not among them.
    """
    held = held_nodes(graph)
    uses: list[WeightSite] = []
    for node in graph.trace.nodes:
        given = tensors(node)
        for pair in pairs_of(node):
            if max(pair.operand, pair.weight) >= len(given):
                continue
            x, weight = given[pair.operand], given[pair.weight]
            shape = weight.meta["shape"]
            if weight.meta["name"] != "parameter" or x in held or not _is_layer(node, len(shape)):
                continue
            sizes = x.meta["shape"]
            site = Site(
                node.meta["index"], pair.operand, 0, pair.dim if pair.dim < 0 else pair.dim - len(sizes),
                int(sizes[pair.dim]), pair.weight, pair.weight_dim, x.meta["index"], describe(node, graph.trace),
            )  # fmt: skip
            uses.append(WeightSite(str(weight.target), site, pair.weight_dim % len(shape)))
    return uses


def _is_layer(node: fx.Node, dims: int) -> bool:
    known = layer_of(node.meta["name"])
    kind = None if known is None else known.kind
    return kind in ("convolution", "transposed") or (kind in ("linear", "product") and dims == 2)
