"""Which channels of which tensors do not depend on the inputs, and their values: one walk over the trace.

An output channel whose weights are all zero is its bias; after a batch norm and a ReLU it is another constant; a layer
that reads nothing but such channels makes constants in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from structprune.coupling.graph import ChannelGraph
from structprune.masks.layer_calls import Layer, layer, runs
from structprune.masks.probing import may_move, moved_states, passed_state, passes
from structprune.masks.states import FAILURES, State, call, collapse, collapsed, unknown
from structprune.ops import op_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.relations import Axes, Axis
from structprune.ops.zeros import gives_zero
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import part_of


class Constants:
    """The constants of a network in eval mode.

    Args:
        graph: its coupled channels.

    Attributes:
        layers: the layers whose weight the model holds, by node.
        made: what is known of their results when they are made, before an activation in place overwrites them.
        apart: the operations of which it is known that they treat every channel alone: elementwise ones, movements,
            batch norms, pooling.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._tensors = {name: held.tensor for name, held in held_tensors(graph.model).items()}
        self.layers: dict[fx.Node, Layer] = {}
        self.made: dict[fx.Node, State] = {}
        self.apart: set[fx.Node] = set()
        self._states: dict[fx.Node, Any] = {}
        views = _Memory()
        with torch.no_grad():
            for node in graph.trace.nodes:
                self._states[node] = self._state(node)
                if node in self.layers:
                    self.made[node] = self._states[node]
                for other in views.overwritten(node):
                    self._states[other] = self._nothing(other)

    def of(self, node: fx.Node) -> State:
        """What is known of a tensor."""
        return self._states[node]

    def axes(self, node: fx.Node) -> Axes:
        """The axes of a tensor."""
        return self._results(node)

    def _results(self, node: fx.Node) -> Any:
        """The axes of an operation's result; a list of them for several results."""
        return self._graph.channels.axes[node.meta["index"]]

    def weight(self, node: fx.Node) -> Tensor:
        """A parameter in float64."""
        return self._tensors[str(node.target)].detach().double().cpu()

    def _nothing(self, node: fx.Node) -> Any:
        axes = self._results(node)
        if isinstance(axes, list):
            return [unknown(part or ()) for part in axes]
        return unknown(axes)

    def _state(self, node: fx.Node) -> Any:
        axes = self._results(node)
        name = node.meta["name"]
        if name == "part":
            parent, position = part_of(node)
            return self._states[parent][position] if isinstance(self._states[parent], list) else self._nothing(node)
        if name == "parameter":
            return self._of_parameter(node, axes)
        if not self._is_function(node):
            return self._nothing(node)
        if isinstance(axes, list):
            state = moved_states(node, self._states, axes) if may_move(node) else None
            if state is not None:
                self.apart.add(node)
            return state or self._nothing(node)
        state = self._single(node, axes)
        return self._nothing(node) if state is None else state

    def _of_parameter(self, node: fx.Node, axes: Axes) -> State:
        if not _is_floating(node):
            return unknown(axes)
        value = self.weight(node)
        return collapse(value, torch.ones_like(value, dtype=torch.bool), axes)

    def _is_function(self, node: fx.Node) -> bool:
        """Whether the result of an operation follows from its arguments alone, and the arguments are known."""
        known = op_of(node.meta["name"])
        if known is None or not node.op.startswith("call_") or not self._foreseen(node):
            return False
        return not known.creates and (not known.random or _at_rest(node))

    def _foreseen(self, node: fx.Node) -> bool:
        """Whether the record of its operation foresees this call, and all its arguments have been walked over."""
        given = tensors(node)
        return (
            node.meta["index"] not in self._graph.channels.unforeseen
            and bool(given)
            and all(isinstance(self._states.get(source), State) for source in given)
        )

    def _single(self, node: fx.Node, axes: Axes) -> State | None:
        known = op_of(node.meta["name"])
        assert known is not None
        if known.norm is not None:
            return self._batch_norm(node, axes) if known.norm.statistics and known.elementwise else None
        if known.contraction is not None:
            return self._layer(node, axes)
        if may_move(node):
            states = moved_states(node, self._states, [axes])
            if states is not None:
                self.apart.add(node)
                return states[0]
        if known.elementwise:
            self.apart.add(node)
            return self._elementwise(node, axes)
        sources = set(tensors(node))
        if known.own and len(sources) == 1 and not self._over_kept(node):
            (source,) = sources
            if passes(node, self.axes(source), axes) is not None:
                self.apart.add(node)
                return passed_state(self.of(source), self.axes(source), axes)
        return None

    def _over_kept(self, node: fx.Node) -> bool:
        return any(s.node == node.meta["index"] for s in self._graph.channels.relations.reductions)

    def _batch_norm(self, node: fx.Node, axes: Axes) -> State | None:
        """``(x - mean) / sqrt(var + eps) * scale + shift``; where the scale is zero, `x` does not matter."""
        given = arguments(node)
        parts = {name: given.get(name) for name in ("weight", "bias", "running_mean", "running_var")}
        x = given.get("input")
        held = all(p is None or (isinstance(p, fx.Node) and p.meta["name"] == "parameter") for p in parts.values())
        if given.get("training") or parts["running_var"] is None or not held or not isinstance(x, fx.Node):
            return None
        self.apart.add(node)
        state = self.of(x)
        values: dict[fx.Node, Tensor] = {p: self.weight(p) for p in parts.values() if p is not None}
        if state.value.shape[1] != axes[1].size:
            return None
        value = call(node, {x: state.value, **values})
        known = state.known
        if parts["weight"] is not None:
            shape = [-1 if dim == 1 else 1 for dim in range(len(axes))]
            known = known | (values[parts["weight"]] == 0).view(shape)
        return State(torch.where(known, value, 0.0), known)

    def _layer(self, node: fx.Node, axes: Axes) -> State | None:
        """A result is constant where all that its weights read is."""
        made = layer(node, self.axes)
        if made is None:
            return None
        weight = self.weight(made.weight)
        if not runs(made, weight):
            return None
        self.layers[node] = made
        state = self.of(made.x)
        added, uneven = made.added(state.value, weight)
        reached = made.run(made.spread((~state.known).double()), weight.abs())
        dims = [d for d in range(reached.dim()) if d != made.result_dim % reached.dim()]
        unread = (reached.amax(dims, keepdim=True) if dims else reached) == 0
        known = unread & ~uneven
        if made.bias is not None:
            added = added + self.weight(made.bias).view(
                [-1 if d == made.result_dim % reached.dim() else 1 for d in range(reached.dim())]
            )
        shape = collapsed(axes)
        if not axes[made.result_dim].free:  # constants are told channel by channel
            return None
        return State(torch.where(known, added, 0.0).expand(shape), known.expand(shape))

    def _elementwise(self, node: fx.Node, axes: Axes) -> State | None:
        sources = tensors(node)
        if not all(map(_is_floating, (node, *sources))) or len(axes) != len(node.meta["shape"]):
            return None
        shape = collapsed(axes)
        places = [self._aligned(source, axes) for source in sources]
        value = self._run(node, shape) if None not in places else None
        if value is None:
            return None
        states = [(self.of(source), place) for source, place in zip(sources, places, strict=True) if place is not None]
        constant = torch.stack([state.known.view(place).expand(shape) for state, place in states]).all(0)
        for number, (state, place) in enumerate(states if len(sources) > 1 else ()):
            off = state.zero.view(place).expand(shape)
            if bool((off & ~constant).any()) and gives_zero(node, frozenset({number})):
                value = torch.where(off & ~constant, 0.0, value)
                constant = constant | off
        constant = constant & value.isfinite()
        return State(torch.where(constant, value, 0.0), constant)

    def _run(self, node: fx.Node, shape: list[int]) -> Tensor | None:
        """The result on the constants of its arguments, in float64; None if it does not run, or has another shape."""
        try:
            value = call(node, {source: self.of(source).value for source in tensors(node)})
        except FAILURES:
            return None
        if not isinstance(value, Tensor) or value.is_meta or list(value.shape) != shape:
            return None
        return value.double()

    def _aligned(self, source: fx.Node, axes: Axes) -> list[int] | None:
        """The shape by which the state of an argument is broadcast to the result; None if that cannot be told.

        A scale for each channel, (8,), of ``prelu`` stands at dimension 1 of a result (2, 8, 5, 5): (1, 8, 1, 1).
        """
        mine = self.axes(source)
        if len(mine) <= len(axes) and all(
            self._alike(a, b) for a, b in zip(mine, axes[len(axes) - len(mine) :], strict=True)
        ):
            return [1] * (len(axes) - len(mine)) + collapsed(mine)
        if len(mine) == 1 and mine[0].free:
            places = [dim for dim, axis in enumerate(axes) if axis.free and self._alike(mine[0], axis)]
            if len(places) == 1:
                return [mine[0].size if dim == places[0] else 1 for dim in range(len(axes))]
        return None

    def _alike(self, mine: Axis, result: Axis) -> bool:
        if not mine.free:
            return True
        parts = self._graph.components
        return result.free and mine.size == result.size and bool((parts.of(mine) == parts.of(result)).all())


class _Memory:
    """Tensors that share memory: after a write into one of them nothing is known of the others."""

    def __init__(self) -> None:
        self._owner: dict[fx.Node, fx.Node] = {}
        self._shared: dict[fx.Node, list[fx.Node]] = {}

    def overwritten(self, node: fx.Node) -> list[fx.Node]:
        """The tensors walked over before that `node` writes into without being their new value."""
        source = node.meta.get("writes")
        if source is None and node.meta["name"] == "part":
            source = part_of(node)[0]
        elif source is None:
            known = op_of(node.meta["name"])
            given = tensors(node) if known is not None and known.views else []
            source = given[0] if given else None
        owner = node if source is None else self._owner[source]
        self._owner[node] = owner
        shared = self._shared.setdefault(owner, [])
        others = list(shared) if "writes" in node.meta else []
        shared.append(node)
        return others


def _is_floating(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


def _at_rest(node: fx.Node) -> bool:
    """Whether a dropout is off."""
    given = arguments(node)
    return "train" in given and not given["train"]
