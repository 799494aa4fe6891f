"""The network as SVG, with what a reader may ask about each node as JSON."""

from __future__ import annotations

from html import escape
from typing import Any

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.random_removals import Counter
from structprune.reporting.layout import HEIGHT, WIDTH, Course, Layout, layered
from structprune.reporting.network import Network, Node
from structprune.reporting.text import element, kept, places, short

_NAMES = {"scaled_dot_product_attention": "attention", "add": "+", "mul": "\u00d7", "sub": "\u2212", "cat": "concat"}
_LONGEST = 21
# Neighbouring hues differ by the golden angle, so that groups near each other never look alike.
_GOLDEN = 137.508
_JOIN = 64.0


def hue(number: int) -> float:
    """The hue of a group, in degrees."""
    return round((210 + number * _GOLDEN) % 360, 1)


# What people call the kinds of channels.
AXIS_WORDS = {
    "hidden": "residual stream",
    "mlp": "inside an MLP",
    "head_size": "size of heads",
    "groups": "groups of a convolution",
}


def called(group: Group) -> str:
    """The layer that makes a group's channels; of several, the block that holds all of them, if there is one.

    Example:
        >>> import torch
        >>> graph = ChannelGraph(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.ones(1, 4))
        >>> [called(group) for group in graph.groups()]
        ['0']
    """
    makers = {m.tensor.rpartition(".")[0] for m in group.members if m.dim == 0 and m.tensor.endswith(".weight")}
    shared: list[str] = []
    for parts in zip(*(maker.split(".") for maker in makers), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) if group.axis == "hidden" and len(makers) > 1 and shared else group.name


class Drawing:
    """The network of a graph, laid out, with costs before and after.

    Args:
        graph: the coupled channels.
        network: what is drawn.
        before: counts kept channels of axes of the model as it is.
        after: the same for the model after the plan.
    """

    def __init__(self, graph: ChannelGraph, network: Network, before: Counter, after: Counter) -> None:
        self._graph, self._network, self._before, self._after = graph, network, before, after
        self._layout: Layout = layered(len(network.nodes), list(network.edges))
        self._pins: dict[str, list[tuple[str, str]]] = {}
        for place, reason in graph.pinned().items():
            tensor, _, dim = place.partition(", ")
            self._pins.setdefault(tensor, []).append((dim, places(reason)))
        self._macs = [(node.macs(graph, before), node.macs(graph, after)) for node in network.nodes]
        self._heaviest = max([1, *(macs for macs, _ in self._macs)])
        self._kinds = {path: type(m).__name__ for path, m in graph.model.named_modules(remove_duplicate=False)}
        self._params = {
            str(node.target): graph.channels.axes[node.meta["index"]]
            for node in graph.trace.nodes
            if node.meta["name"] == "parameter"
        }

    # -- data ----------------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        """What the page's script needs: nodes, groups, and which nodes are neighbours."""
        nodes = [self._node(number, node) for number, node in enumerate(self._network.nodes)]
        return {
            "nodes": nodes,
            "groups": [self._group(number, group) for number, group in enumerate(self._graph.groups())],
            "edges": [list(edge) for edge in self._network.edges],
            "ranks": self._layout.ranks,
            "centres": [[round(x, 1), round(y, 1)] for x, y in self._layout.centres],
        }

    def _node(self, number: int, node: Node) -> dict[str, Any]:
        pins = [(f"{t.rpartition('.')[2]}, {dim}", why) for t in node.tensors for dim, why in self._pins.get(t, ())]
        return {
            "label": node.label,
            "title": self._title(node),
            "kind": self._kinds.get(node.label, node.operation) if node.kind == "layer" else node.kind,
            "module": node.module,
            "merged": node.merged,
            "channels": self._width(node),
            "macs": self._macs[number],
            "params": self._params_of(node),
            "group": node.channels,
            "groups": node.groups if node.kind == "layer" or node.channels is None else [node.channels],
            "pins": _gathered(pins),
        }

    def _title(self, node: Node) -> str:
        return node.label if node.kind == "layer" else _NAMES.get(node.operation, node.label)

    def _width(self, node: Node) -> tuple[int, int] | None:
        """Output channels of the operation itself before and after: along the last dimension that could lose some."""
        if not node.operations:
            return None
        axes = self._graph.channels.axes[node.operations[0].meta["index"]]
        free = [axis for axis in axes if axis.free] if isinstance(axes, tuple) else []
        chosen = [axis for axis in free if not self._graph.components.pinned[self._graph.components.of(axis)].all()]
        axis = (chosen or free or [None])[-1]
        return None if axis is None else (self._before(axis), self._after(axis))

    def _params_of(self, node: Node) -> tuple[int, int]:
        return self._entries(node, self._before), self._entries(node, self._after)

    def _entries(self, node: Node, count: Counter) -> int:
        total = 0
        for tensor in dict.fromkeys(node.tensors):
            entries = 1
            for row in self._params[tensor]:
                entries *= count(row)
            total += entries
        return total

    def _group(self, number: int, group: Group) -> dict[str, Any]:
        layers = dict.fromkeys(member.tensor.rpartition(".")[0] or member.tensor for member in group.members)
        return {
            "number": number + 1,
            "name": called(group),
            "axis": AXIS_WORDS.get(group.axis, group.axis),
            "channels": self._group_width(group),
            "layers": list(layers),
            "hue": hue(number),
        }

    def _group_width(self, group: Group) -> tuple[int, int]:
        """Channels of a group before and after."""
        return self._before.kept(group.components), self._after.kept(group.components)

    # -- Matplotlib ----------------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[float, float]:
        """Width and height, in pixels."""
        return self._layout.width, self._layout.height

    def on_axes(self, axes: Any) -> None:
        """Draw the network on Matplotlib's axes, which are left without frame and ticks."""
        from structprune.reporting.figures import draw_box, draw_edge

        for course, group in zip(self._layout.courses, self._network.edges.values(), strict=True):
            draw_edge(axes, course, None if group is None else hue(group))
        for (x, y), node in zip(self._layout.centres, self._network.nodes, strict=True):
            pair = self._width(node)
            below = "" if pair is None or node.kind == "join" else _arrow(pair)
            title = _shortened(self._title(node))
            draw_box(axes, x, y, title, below, node.kind, None if node.channels is None else hue(node.channels))
        axes.set(xlim=(0, self._layout.width), ylim=(self._layout.height, 0), aspect="equal")
        axes.set_axis_off()

    # -- SVG -----------------------------------------------------------------------------------------------------

    def svg(self) -> str:
        """The drawing; nodes can be focused one at a time, the first one by the Tab key."""
        edges = "".join(
            self._edge(course, edge, group)
            for course, (edge, group) in zip(self._layout.courses, self._network.edges.items(), strict=True)
        )
        nodes = "".join(self._box(number, node) for number, node in enumerate(self._network.nodes))
        size = f"{self._layout.width:.0f} {self._layout.height:.0f}"
        label = f"Dependency graph of {type(self._graph.model).__name__}: {len(self._network.nodes)} nodes"
        return element(
            "svg",
            element("g", edges, class_="edges", aria_hidden="true"),
            element("g", nodes, class_="nodes"),
            id="graph",
            viewBox=f"0 0 {size}",
            style=f"--ratio:{self._layout.width / self._layout.height:.3f}",
            role="group",
            aria_label=label,
        )

    def _edge(self, course: Course, edge: tuple[int, int], group: int | None) -> str:
        colour = {"style": f"--h:{hue(group)}", "data_group": group} if group is not None else {"class_": "plain"}
        return element("path", d=svg_path(course), data_from=edge[0], data_to=edge[1], **colour)

    def _box(self, number: int, node: Node) -> str:
        x, y = self._layout.centres[number]
        pinned = node.channels is None and node.kind != "join"
        classes = " ".join(["node", node.kind, *(["pinned"] if pinned else [])])
        width = WIDTH if node.kind != "join" else _JOIN if len(self._title(node)) < 4 else _JOIN * 1.6
        parts = [_shape(width, node.kind), *self._texts(number, node, width)]
        return element(
            "g",
            *parts,
            class_=classes,
            id=f"n{number}",
            transform=f"translate({x:.1f} {y:.1f})",
            style=None if node.channels is None else f"--h:{hue(node.channels)}",
            data_node=number,
            data_groups=" ".join(map(str, node.groups)),
            role="button",
            tabindex=0 if number == 0 else -1,
            aria_pressed="false",
            aria_label=self._described(number, node),
        )

    def _texts(self, number: int, node: Node, width: float) -> list[str]:
        title = self._title(node)
        if node.kind == "join":
            return [element("text", escape(title), y="4.5", text_anchor="middle")]
        left = -width / 2
        parts = [element("text", escape(_shortened(title)), x=left + 13, y="-3.5")]
        pair = self._width(node)
        if pair is not None:
            parts.append(element("text", _arrow(pair), class_="small", x=left + 13, y="10.5"))
        macs = self._macs[number][0]
        if macs:
            parts.append(element("text", short(macs), class_="small", x=-left - 8, y="10.5", text_anchor="end"))
            share = (width - 21) * macs / self._heaviest
            parts.append(element("rect", class_="load", x=left + 13, y="14", height="1.6", width=f"{share:.1f}"))
        if node.channels is None:
            parts.append(_pin(-left - 12, -8.5))
        else:
            parts.append(
                element("text", str(node.channels + 1), class_="small", x=-left - 8, y="-4", text_anchor="end")
            )
        return parts

    def _described(self, number: int, node: Node) -> str:
        """The node in words, for screen readers."""
        said = [self._title(node) if node.kind != "join" else node.label]
        if pair := self._width(node):
            said.append(f"{pair[0]} channels" if pair[0] == pair[1] else f"{pair[0]} channels, {pair[1]} kept")
        if node.channels is not None:
            said.append(f"group {node.channels + 1}, {called(self._graph.groups()[node.channels])}")
        elif node.kind != "join":
            said.append("pinned")
        before, after = self._macs[number]
        if before:
            said.append(f"{short(before)} MACs, {kept(before, after)} left")
        return ", ".join(said)


def svg_path(course: Course) -> str:
    """The line of an edge as an SVG path: ``M10.0 0.0L10.0 20.0``."""
    return "".join(step + " ".join(f"{x:.1f} {y:.1f}" for x, y in points) for step, points in course)


def _shortened(path: str) -> str:
    """The last parts of a path that fit."""
    if len(path) <= _LONGEST:
        return path
    end = path[-_LONGEST + 1 :]
    return f"…{end.partition('.')[2] or end}"


def _gathered(pins: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Places with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for place, reason in pins:
        by_reason.setdefault(reason, []).append(place)
    return [("; ".join(where), reason) for reason, where in by_reason.items()]


def _arrow(pair: tuple[int, int]) -> str:
    return f"{pair[0]} → {pair[1]}" if pair[0] != pair[1] else f"{pair[0]}"


def _shape(width: float, kind: str) -> str:
    """The outline, with room for the keyboard's focus ring; a join stands on a line that reaches its neighbours."""
    height = HEIGHT if kind != "join" else 24.0
    box = {"x": -width / 2, "y": -height / 2, "width": width, "height": height}
    parts = [element("path", class_="stem", d=f"M0 {-HEIGHT / 2}V{HEIGHT / 2}")] if kind == "join" else []
    parts.append(element("rect", class_="box", rx=7 if kind == "layer" else 12, **box))
    if kind == "layer":
        parts.append(
            element("rect", class_="band", x=-width / 2 + 4, y=-height / 2 + 5, width=3.5, height=height - 10, rx=1.75)
        )
    return "".join(parts)


def _pin(x: float, y: float) -> str:
    """A small padlock."""
    return element(
        "g",
        element("path", class_="shackle", d="M-2.6 0V-2.2a2.6 2.6 0 0 1 5.2 0V0"),
        element("rect", x=-4, y=0, width=8, height=6, rx=1.3),
        class_="pin",
        transform=f"translate({x:.1f} {y:.1f})",
    )
