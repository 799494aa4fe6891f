"""What a group of channels is to the network: the width of its residual stream, of an MLP, heads, experts.

Nothing here knows a layer's class or name. Attention is a product of two tensors that both depend on the input: what it
sums over is a head's size, what it runs over in parallel are heads. A residual stream is what additions of such tensors
carry on. Experts are the leading dimension of a stack of weight matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from structprune.channels.propagate import Channels
from structprune.channels.solver import Components
from structprune.groups import Group, Roots
from structprune.ops import op_of
from structprune.ops.arguments import tensors
from structprune.ops.op import Scaling
from structprune.ops.relations import Row
from structprune.tracing.trace import Trace

AXES = ("hidden", "mlp", "channels", "heads", "head_size", "experts")
# Dense stacks of weight matrices, one an expert, are no kernels of convolutions.
_CONVOLUTIONS = frozenset({"convolution", "transposed"})
_LEVEL = {"hidden": 1, "experts": 2, "heads": 3, "head_size": 4}


@dataclass(frozen=True, slots=True)
class Roles:
    """The parts that channels and weights play in a trace.

    Attributes:
        level: for each root, the highest of `_LEVEL` that its channels were seen in; shape ``(components,)``.
        weights: dimensions ``(tensor, dim)`` of the weights of convolutions, linear layers and matrix products.
        producers: those of them along which a layer makes channels of its own, and the widths of embedding tables.
        ranks: number of dimensions of each tensor.
    """

    level: NDArray[np.int8]
    weights: frozenset[tuple[str, int]]
    producers: frozenset[tuple[str, int]]
    ranks: dict[str, int]

    def axis(self, group: Group) -> str:
        """Which of `AXES` the channels of a group are."""
        level = int(self.level[group.components].max(initial=0))
        for name, number in _LEVEL.items():
            if number == level:
                return name
        spatial = (self.ranks[m.tensor] > 2 for m in group.members if (m.tensor, m.dim) in self.weights)
        return "channels" if any(spatial) else "mlp"

    def makers(self, group: Group) -> list[str]:
        """Tensors of the layers that make the channels of a group."""
        found = [m.tensor for m in group.members if (m.tensor, m.dim) in self.producers]
        return found or [m.tensor for m in group.members]


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
        self._computed: set[fx.Node] = set()
        self._made_of: dict[fx.Node, tuple[str, ...]] = {}
        self._held: dict[str, tuple[Row, ...]] = {}
        for node in recorded.everything:
            self._read(node)

    def _rows(self, node: fx.Node) -> tuple[Row, ...]:
        rows = self._channels.rows[node.meta["index"]]
        return rows if isinstance(rows, tuple) else ()

    def _mark(self, name: str, rows: Iterable[Row]) -> None:
        for row in rows:
            if row.free:
                _, parts = self._roots.of(self._components.of(row))
                self.level[parts] = np.maximum(self.level[parts], _LEVEL[name])

    def _read(self, node: fx.Node) -> None:
        name = node.meta["name"]
        if name == "parameter":
            self.ranks[str(node.target)] = len(node.meta["shape"])
            self._made_of[node] = (str(node.target),)
            self._held[str(node.target)] = self._rows(node)
            return
        inputs = tensors(node)
        if name == "input" or any(n in self._computed for n in inputs):
            self._computed.add(node)
        else:
            self._made_of[node] = tuple(dict.fromkeys(x for n in inputs for x in self._made_of.get(n, ())))
        known = op_of(name)
        if known is None:
            return
        if known.contraction is not None:
            _READERS.get(known.contraction.kind, _Reader.contraction)(self, node, inputs)
        elif known.elementwise and known.scaling is Scaling.SUM:
            self.sum(node, inputs)

    # -- one function for each kind of operation -----------------------------------------------------------------

    def embedding(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """The width of a table."""
        self.producers |= {(tensor, 1) for n in inputs for tensor in self._made_of.get(n, ())}

    def attention(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Query, key and value: ``(..., heads, length, size)``."""
        for node in inputs[:3]:
            rows = self._rows(node)
            self._mark("heads", rows[:-2])
            self._mark("head_size", rows[-1:])

    def sum(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Two results of the same shape added: channels that go on beside a block."""
        both = [n for n in inputs if n in self._computed]
        if len(both) == 2 and both[0].meta.get("shape") == both[1].meta.get("shape"):
            self._mark("hidden", self._rows(node))

    def product(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Attention if both factors depend on the input; experts if one is a stack of weights."""
        left, right = inputs[-2:]
        if left in self._computed and right in self._computed:
            a, b = self._rows(left), self._rows(right)
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
                    self.producers |= {(tensor, dim) for dim in self._made(node, tensor)}
                if rank == 3 and _kind(node) not in _CONVOLUTIONS and len(held.meta["shape"]) == 3:
                    self._mark("experts", self._held[tensor][:1])

    def recurrent(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """The matrices of all layers: each makes hidden channels, gate by gate."""
        for tensor in (t for held in inputs for t in self._made_of.get(held, ())):
            if self.ranks[tensor] == 2:
                self.weights |= {(tensor, 0), (tensor, 1)}
                self.producers.add((tensor, 0))

    def _made(self, node: fx.Node, tensor: str) -> Iterable[int]:
        """The dimensions of a weight whose channels are those of the result."""
        results = {self._parts(row) for row in self._rows(node) if row.free}
        return (dim for dim, row in enumerate(self._held[tensor]) if row.free and self._parts(row) in results)

    def _parts(self, row: Row) -> bytes:
        return self._components.of(row).tobytes()


_READERS: dict[str, Callable[[_Reader, fx.Node, list[fx.Node]], None]] = {
    "product": _Reader.product,
    "einsum": _Reader.product,
    "attention": _Reader.attention,
    "embedding": _Reader.embedding,
    "recurrent": _Reader.recurrent,
}


def _kind(node: fx.Node) -> str:
    known = op_of(node.meta["name"])
    return known.contraction.kind if known is not None and known.contraction is not None else ""


def _is_depthwise(node: fx.Node, weight: fx.Node) -> bool:
    """A depthwise convolution passes channels on; it makes none."""
    shape = weight.meta["shape"]
    return _kind(node) in _CONVOLUTIONS and shape[1] == 1 and tensors(node)[0].meta["shape"][1] == shape[0] > 1


def roles(recorded: Trace, channels: Channels, components: Components, roots: Roots) -> Roles:
    """What the channels of a trace are to the network."""
    read = _Reader(recorded, channels, components, roots)
    return Roles(read.level, frozenset(read.weights), frozenset(read.producers), read.ranks)
