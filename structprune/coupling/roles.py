"""What a group of channels is to the network: the width of its residual stream, of an MLP, heads, experts.

Nothing here knows a layer's class or name. Attention is a product of two tensors that both depend on the input: what it
sums over is a head's size, what it runs over in parallel are heads. A residual stream is what additions of such tensors
carry on, each with something of a layer's that the other has not; a layer and a low-rank update beside it are one
layer. Experts are the leading dimension of a stack of weight matrices, used as it stands or looked up for each token.
Groups are those of a convolution in groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np
from numpy.typing import NDArray
from torch import fx

from structprune.coupling.groups import Group, Roots
from structprune.coupling.propagate import Channels
from structprune.coupling.solve import Components
from structprune.ops import kind_of, op_of
from structprune.ops.arguments import tensors
from structprune.ops.op import CONVOLUTIONS, Scaling
from structprune.ops.relations import Axis
from structprune.tracing.trace import Trace

AXES = ("hidden", "mlp", "channels", "groups", "heads", "head_size", "experts")
# Operations that take entries of their first tensor at places that another one names.
_LOOK_UPS = frozenset({"getitem", "index_select", "gather", "take_along_dim"})
_LEVEL = {"hidden": 1, "groups": 2, "experts": 3, "heads": 4, "head_size": 5}


@dataclass(frozen=True, slots=True)
class Roles:
    """The parts that channels and weights play in a trace.

    Attributes:
        level: for each root, the highest of `_LEVEL` that its channels were seen in; shape ``(components,)``.
        weights: dimensions ``(tensor, dim)`` of the weights of convolutions, linear layers and matrix products.
        producers: those of them along which a layer makes channels of its own, and the widths of embedding tables.
        ranks: number of dimensions of each tensor.
        kernels: weights of convolutions that make channels of their own, not passing them on one by one.
    """

    level: NDArray[np.int8]
    weights: frozenset[tuple[str, int]]
    producers: frozenset[tuple[str, int]]
    ranks: dict[str, int]
    kernels: frozenset[str]

    def axis(self, group: Group) -> str:
        """Which of `AXES` the channels of a group are."""
        level = int(self.level[group.components].max(initial=0))
        for name, number in _LEVEL.items():
            if number == level:
                return name
        return "channels" if any(member.tensor in self.kernels for member in group.members) else "mlp"

    def makers(self, group: Group) -> list[str]:
        """Tensors of the layers that make the channels of a group."""
        made_by = [m.tensor for m in group.members if (m.tensor, m.dim) in self.producers]
        return made_by or [m.tensor for m in group.members]


class _Reader:
    """One pass over a trace."""

    def __init__(self, recorded: Trace, channels: Channels, components: Components, roots: Roots) -> None:
        self._channels = channels
        self._components = components
        self._roots = roots
        self.level = np.zeros(components.count, dtype=np.int8)
        self.ranks: dict[str, int] = {}
        self.weights: set[tuple[str, int]] = set()
        self.producers: set[tuple[str, int]] = set()
        self.kernels: set[str] = set()
        # For each tensor that depends on the input the layers it comes from without another between: a bit for each.
        self._layers: dict[fx.Node, int] = {}
        # For each tensor that layers without anything between them make of another, the latter.
        self._linear_in: dict[fx.Node, fx.Node] = {}
        self._count = 0
        self._made_of: dict[fx.Node, tuple[str, ...]] = {}
        self._held: dict[str, tuple[Axis, ...]] = {}
        for node in recorded.all_nodes:
            self._read(node)

    def _axes(self, node: fx.Node) -> tuple[Axis, ...]:
        axes = self._channels.axes[node.meta["index"]]
        return axes if isinstance(axes, tuple) else ()

    def _mark(self, name: str, axes: Iterable[Axis]) -> None:
        for axis in axes:
            if axis.free:
                _, parts = self._roots.of(self._components.of(axis))
                self.level[parts] = np.maximum(self.level[parts], _LEVEL[name])

    def _read(self, node: fx.Node) -> None:
        name = node.meta["name"]
        if name == "parameter":
            self.ranks[str(node.target)] = len(node.meta["shape"])
            self._made_of[node] = (str(node.target),)
            self._held[str(node.target)] = self._axes(node)
            return
        inputs = tensors(node)
        known = op_of(name)
        self._note_source(node, inputs, contracts=known is not None and known.contraction is not None)
        if known is None:
            return
        if known.contraction is not None:
            _READERS.get(known.contraction.kind, _Reader.contraction)(self, node, inputs)
        elif known.elementwise and known.scaling is Scaling.SUM:
            self.sum(node, inputs)

    def _note_source(self, node: fx.Node, inputs: list[fx.Node], *, contracts: bool) -> None:
        """Note the layers that `node` comes from, or the parameters if it does not depend on the input."""
        before = [self._layers[n] for n in inputs if n in self._layers]
        if node.meta["name"] == "input":
            self._layers[node] = self._bit()
        elif before and not self._looked_up(node, inputs):
            # A product of two tensors that depend on the input passes channels on; one with a weight makes them.
            is_layer = contracts and len(before) < len(inputs)
            self._layers[node] = self._bit() if is_layer else reduce(or_, before)
            self._note_line(node, [n for n in inputs if n in self._layers], is_layer)
        else:
            self._made_of[node] = tuple(dict.fromkeys(x for n in inputs for x in self._made_of.get(n, ())))

    def _note_line(self, node: fx.Node, before: list[fx.Node], is_layer: bool) -> None:
        """Note what `node` is linear in, by layers: a layer's result, and what numbers or weights scale it to."""
        if len(before) != 1:
            return
        known = op_of(node.meta["name"])
        passes = known is not None and known.scaling in (Scaling.HOMOGENEOUS, Scaling.PRODUCT)
        if is_layer:
            self._linear_in[node] = self._linear_in.get(before[0], before[0])
        elif passes and node.meta["name"] != "relu" and before[0] in self._linear_in:
            self._linear_in[node] = self._linear_in[before[0]]

    def _bit(self) -> int:
        self._count += 1
        return 1 << self._count

    def _looked_up(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        """Whether the result holds matrices of a stack of weights, chosen by the input.

        Axes of a table that are looked up are activations.
        """
        return node.meta["name"] in _LOOK_UPS and any(self.ranks[t] > 2 for t in self._made_of.get(inputs[0], ()))

    # -- one function for each kind of operation -----------------------------------------------------------------

    def embedding(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """The width of a table."""
        self.producers |= {(tensor, 1) for n in inputs for tensor in self._made_of.get(n, ())}

    def attention(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Query, key and value: ``(..., heads, length, size)``."""
        for node in inputs[:3]:
            axes = self._axes(node)
            self._mark("heads", axes[:-2])
            self._mark("head_size", axes[-1:])

    def sum(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Two results of the same shape added, each with a layer's channels of its own: they go on beside a block.

        A rotation of heads or the step of a scan adds what comes from the same layers: nothing goes on there. Where
        both are linear in one tensor they are one layer in two parts, such as a weight and its low-rank update.
        """
        both = [n for n in inputs if n in self._layers]
        sources = {self._linear_in.get(n) for n in both}
        if len(both) == 2 and len(sources) == 1 and (source := sources.pop()) is not None:
            self._linear_in[node] = source
        elif len(both) == 2 and both[0].meta.get("shape") == both[1].meta.get("shape"):
            left, right = (self._layers[n] for n in both)
            if left & ~right and right & ~left:
                self._mark("hidden", self._axes(node))

    def product(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Attention if both factors depend on the input; experts if one is a stack of weights."""
        if len(inputs) > 1 and all(factor in self._layers for factor in inputs[-2:]):
            a, b = (self._axes(factor) for factor in inputs[-2:])
            self._mark("heads", (*a[:-2], *b[:-2]))
            self._mark("head_size", (*a[-1:], *b[-2:]))
        else:
            self.contraction(node, inputs)

    def contraction(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """A layer with a weight: note its dimensions, and those along which it makes channels."""
        for held in inputs:
            for tensor in self._made_of.get(held, ()):
                rank = self.ranks[tensor]
                if rank < 2:
                    continue
                self.weights |= {(tensor, dim) for dim in range(rank)}
                if not _is_depthwise(node, held):
                    if kind_of(node.meta["name"]) in CONVOLUTIONS:
                        self.kernels.add(tensor)
                        self._groups(node, inputs[0], held)
                    self.producers |= {(tensor, dim) for dim in self._made(node, tensor)}
                # Dense stacks of weight matrices, one an expert, are no kernels of convolutions.
                if rank == 3 and kind_of(node.meta["name"]) not in CONVOLUTIONS and len(held.meta["shape"]) > 2:
                    self._mark("experts", self._held[tensor][:1])

    def _groups(self, node: fx.Node, x: fx.Node, weight: fx.Node) -> None:
        """Of a convolution in groups, what its input and its result share, and no channel in a group is."""
        dims = len(weight.meta["shape"]) - 1
        axes = [self._axes(x)[-dims], self._axes(node)[-dims], self._axes(weight)[1]]
        if axes[0].size != self._axes(weight)[kind_of(node.meta["name"]) == "convolution"].size and all(
            axis.free for axis in axes[:2]
        ):
            left, right = (self._roots.of(self._components.of(axis))[1] for axis in axes[:2])
            inside = self._roots.of(self._components.of(axes[2]))[1] if axes[2].free else np.zeros(0, dtype=np.int64)
            shared = np.setdiff1d(np.intersect1d(left, right), inside)
            self.level[shared] = np.maximum(self.level[shared], _LEVEL["groups"])

    def recurrent(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """The matrices of all layers: each makes hidden channels, gate by gate."""
        for tensor in (t for held in inputs for t in self._made_of.get(held, ())):
            if self.ranks[tensor] == 2:
                self.weights |= {(tensor, 0), (tensor, 1)}
                self.producers.add((tensor, 0))

    def _made(self, node: fx.Node, tensor: str) -> Iterable[int]:
        """The dimensions of a weight whose channels are those of the result."""
        results = {self._parts(axis) for axis in self._axes(node) if axis.free}
        return (dim for dim, axis in enumerate(self._held[tensor]) if axis.free and self._parts(axis) in results)

    def _parts(self, axis: Axis) -> bytes:
        return self._components.of(axis).tobytes()


_READERS: dict[str, Callable[[_Reader, fx.Node, list[fx.Node]], None]] = {
    "product": _Reader.product,
    "einsum": _Reader.product,
    "attention": _Reader.attention,
    "embedding": _Reader.embedding,
    "recurrent": _Reader.recurrent,
}


def _is_depthwise(node: fx.Node, weight: fx.Node) -> bool:
    """A depthwise convolution passes channels on; it makes none."""
    shape, kind = weight.meta["shape"], kind_of(node.meta["name"])
    return kind in CONVOLUTIONS and shape[1] == 1 and tensors(node)[0].meta["shape"][1] == shape[0] > 1


def roles(recorded: Trace, channels: Channels, components: Components, roots: Roots) -> Roles:
    """What the channels of a trace are to the network."""
    read = _Reader(recorded, channels, components, roots)
    return Roles(read.level, frozenset(read.weights), frozenset(read.producers), read.ranks, frozenset(read.kernels))
