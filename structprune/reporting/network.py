"""What is drawn of a trace: layers, the places where their results meet, and what flows between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from structprune.coupling.costs import Count, node_macs
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import group_numbers

# Nodes that hold such a tensor make channels of their own; what holds vectors only (norms, scales, biases) does not.
_MATRIX = 2


@dataclass(slots=True)
class Node:
    """A layer, a meeting of several results, or an input or output of the model.

    Attributes:
        label: path of the module or tensor; for a meeting, the operation.
        kind: ``"layer"``, ``"join"``, ``"input"`` or ``"output"``.
        operation: the operation that made the node.
        module: path of the module whose forward runs it.
        tensors: what the model holds and the node uses.
        operations: all operations that are drawn as this node.
        merged: paths of norms and the like that follow directly and are drawn as part of it.
        channels: the group of its results' channels, by number; None if they are pinned.
        groups: numbers of all groups that slice what it holds.
    """

    label: str
    kind: str
    operation: str
    module: str = ""
    tensors: list[str] = field(default_factory=list)
    operations: list[fx.Node] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    channels: int | None = None
    groups: list[int] = field(default_factory=list)

    def macs(self, graph: ChannelGraph, count: Count) -> int:
        """Multiply-accumulates of the node when `count` gives the kept channels of each axis."""
        return sum(node_macs(operation, graph.channels, count) for operation in self.operations)


@dataclass(frozen=True, slots=True)
class Network:
    """What is drawn.

    Attributes:
        nodes: in the order in which they run.
        edges: positions of two nodes in `nodes`, and the group whose channels flow between them, or None.
    """

    nodes: list[Node]
    edges: dict[tuple[int, int], int | None]


class _Groups:
    """The group that a result's channels belong to."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._group_of = group_numbers(graph.components, graph.groups())
        self.of_tensor: dict[str, set[int]] = {}
        for number, group in enumerate(graph.groups()):
            for member in group.members:
                self.of_tensor.setdefault(member.tensor, set()).add(number)

    def of(self, node: fx.Node) -> int | None:
        """The largest group that channels of a result belong to."""
        axes = self._graph.channels.axes[node.meta["index"]]
        numbers: set[int] = set()
        for axis in axes if isinstance(axes, tuple) else ():
            if axis.free:
                _, roots = self._graph.roots.of(self._graph.components.of(axis))
                numbers.update(np.unique(self._group_of[roots]).tolist())
        groups = self._graph.groups()
        return max(numbers - {-1}, key=lambda number: (groups[number].channels, number), default=None)


class _Reader:
    """One pass over the trace: each result is carried by the node that it comes from."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._groups = _Groups(graph)
        self.nodes: list[Node] = []
        self.edges: dict[tuple[int, int], int | None] = {}
        self._carrier: dict[fx.Node, int] = {}
        self._held: dict[fx.Node, tuple[str, ...]] = {}
        for node in graph.trace.nodes:
            self._read(node)
        for name, node in graph.trace.outputs.items():
            if node in self._carrier:
                end = self._add(Node(f"output {name}".strip(), "output", "output"))
                self._connect([node], end)

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _connect(self, sources: Iterable[fx.Node], end: int) -> None:
        for source in sources:
            self.edges.setdefault((self._carrier[source], end), self._groups.of(source))

    def _read(self, node: fx.Node) -> None:
        name = node.meta["name"]
        if name == "input":
            self._carrier[node] = self._add(Node("input", "input", "input", operations=[node]))
            return
        if name == "parameter":
            self._held[node] = (str(node.target),)
            return
        inputs = list(node.all_input_nodes)
        computed = [n for n in inputs if n in self._carrier]
        held = tuple(dict.fromkeys(t for n in inputs for t in self._held.get(n, ())))
        if not computed:
            self._held[node] = held
            return
        self._carrier[node] = self._place(node, computed, held)

    def _place(self, node: fx.Node, computed: list[fx.Node], held: tuple[str, ...]) -> int:
        """The node that carries the result of an operation, new or known."""
        before = list(dict.fromkeys(self._carrier[n] for n in computed))
        label = _owner(held)
        only = self.nodes[before[0]]
        works = bool(node_macs(node, self._graph.channels, lambda axis: axis.size))
        if len(before) == 1 and (only.label == label if held else not works):
            only.tensors += [t for t in held if t not in only.tensors]
            only.operations.append(node)
            return before[0]
        call = node.meta["call"]
        module = self._graph.trace.calls[call].path if call >= 0 else ""
        operation = node.meta["name"].removeprefix("python.")
        kind = "layer" if held else "join"
        new = self._add(Node(label or operation, kind, operation, module, list(held), [node]))
        self._connect(computed, new)
        return new

    def finish(self) -> Network:
        """Merge what follows directly, and note the groups."""
        result = _merged(self.nodes, self.edges)
        for node in result.nodes:
            node.channels = self._groups.of(node.operations[-1]) if node.operations else None
            node.groups = sorted(set[int]().union(*(self._groups.of_tensor.get(t, ()) for t in node.tensors)))
        for number, node in enumerate(result.nodes):
            if node.kind == "output":
                node.channels = next(group for (_, end), group in result.edges.items() if end == number)
        return result


def _owner(held: tuple[str, ...]) -> str:
    """The module that holds the tensors; a tensor of the model itself stands for itself."""
    return held[0].rpartition(".")[0] or held[0] if held else ""


def _merged(nodes: list[Node], edges: dict[tuple[int, int], int | None]) -> Network:
    """The same network with norms, biases and scales drawn as part of the layer that they directly follow."""
    ins: dict[int, list[int]] = {}
    outs: dict[int, list[int]] = {}
    for start, end in edges:
        ins.setdefault(end, []).append(start)
        outs.setdefault(start, []).append(end)
    into = list(range(len(nodes)))
    for number, node in enumerate(nodes):
        (first, *others) = ins.get(number, [-1])
        follows = first >= 0 and not others and len(outs[first]) == 1
        if follows and node.kind == "layer" and nodes[into[first]].kind == "layer" and _is_small(node):
            target = nodes[into[first]]
            into[number] = into[first]
            target.merged.append(node.label)
            target.tensors += node.tensors
            target.operations += node.operations
    kept = [number for number in range(len(nodes)) if into[number] == number]
    place = {number: position for position, number in enumerate(kept)}
    joined: dict[tuple[int, int], int | None] = {}
    for (start, end), group in edges.items():
        a, b = place[into[start]], place[into[end]]
        if a != b:
            joined.setdefault((a, b), group)
    return Network([nodes[number] for number in kept], joined)


def _is_small(node: Node) -> bool:
    """Whether a node holds vectors only, and computes nothing that counts as multiply-accumulates."""
    shapes = [n.meta["shape"] for op in node.operations for n in _parameters(op)]
    return all(len([size for size in shape if size > 1]) < _MATRIX for shape in shapes)


def _parameters(node: fx.Node) -> Iterator[fx.Node]:
    for source in node.all_input_nodes:
        if source.meta["name"] == "parameter":
            yield source


def network_of(graph: ChannelGraph) -> Network:
    """The layers of a model with what flows between them; parts that the outputs do not depend on are kept."""
    return _Reader(graph).finish()
