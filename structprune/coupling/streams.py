"""Which residual streams could be turned by a rotation that only weights know of, and what would have to change.

A stream of width d is written by embeddings and linear layers, added up, normalised by its root mean square, and read
by linear layers. With an orthogonal ``Q`` of shape ``(d, d)``, let all that writes it write ``x Q``, and let all that
reads it undo that. Sums, factors for whole positions, and root mean squares are the same for ``x Q``; only the gains of
norms stand in the way, since they are by channel, and so they go into the layers that read:

    norm(x) * g, read by W of shape (outputs, d)  ->  norm(x Q), read by W diag(g) Q

(Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, 2024, section 3.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.ops import op_of
from structprune.ops.arguments import arguments
from structprune.ops.relations import Axis
from structprune.tracing.trace import describe

# What a tensor holds of a stream, besides the name of the gain that its channels are multiplied by.
PLAIN, SQUARES = "", "squares of it"


@dataclass(frozen=True, slots=True)
class Stream:
    """What a rotation of the channels of a group has to change.

    Attributes:
        channels: the width of the stream.
        written: tensors whose entries along a dimension make its channels, as ``(name, dimension)``.
        read: for each weight of shape ``(outputs, channels)`` the gain that its input is multiplied by; empty for none.
        gains: vectors of shape ``(channels,)`` that become ones.
        seen: operations at which the stream goes into a gain, or into a layer without one, with the place of that
            argument.
    """

    channels: int
    written: frozenset[tuple[str, int]]
    read: dict[str, str]
    gains: frozenset[str]
    seen: dict[int, int | str]


def stream_of(graph: ChannelGraph, group: Group) -> Stream:
    """How the channels of a group can be rotated.

    Raises:
        PlanError: they cannot; the message names the operation that needs them one by one.
    """
    walk = _Walk(graph, group)
    for node in graph.trace.nodes:
        walk.visit(node)
    return walk.found()


@dataclass(slots=True)
class _Walk:
    """Follows a stream through the operations, in their order."""

    graph: ChannelGraph
    group: Group
    holds: dict[fx.Node, str] = field(default_factory=dict)  # tensors that hold the stream: PLAIN, SQUARES, or a gain
    held: dict[fx.Node, int] = field(default_factory=dict)  # parameters along a dimension of which its channels are
    written: set[tuple[str, int]] = field(default_factory=set)
    read: dict[str, str] = field(default_factory=dict)
    gains: set[str] = field(default_factory=set)
    seen: dict[int, int | str] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> None:
        """Note what an operation makes of the stream."""
        if node.meta["name"] == "parameter":
            self._parameter(node)
            return
        if any(source in self.holds or source in self.held for source in node.all_input_nodes):
            known = op_of(node.meta["name"])
            if node.meta["name"] in _RULES:
                _RULES[node.meta["name"]](self, node)
            elif known is not None and (known.moves or known.converts or known.training_only):
                self._passed(node)
            else:
                raise self._refused(node, "needs its channels one by one")
        if node not in self.holds and self._dims(node):
            raise self._refused(node, "makes its channels in an unknown way")

    def found(self) -> Stream:
        """What was noted, once all operations were visited."""
        for node in self.graph.trace.outputs.values():
            if node in self.holds:
                raise self._refused(node, "is an output of the model")
        known = {*self.written, *((name, 1) for name in self.read), *((name, 0) for name in self.gains)}
        for member in self.group.members:
            if (member.tensor, member.dim) not in known:
                raise self._impossible(f"dimension {member.dim} of {member.tensor!r} takes part in an unknown way")
        for name, gain in self.read.items():
            if gain and (name, 1) in self.written:
                raise self._impossible(
                    f"{name!r} writes it, and reads it behind the gain {gain!r}; give the model two tensors there "
                    "(tie_word_embeddings=False)"
                )
        return Stream(self.group.channels, frozenset(self.written), self.read, frozenset(self.gains), self.seen)

    # -- what tensors hold ------------------------------------------------------------------------------------------

    def _parameter(self, node: fx.Node) -> None:
        dims = self._dims(node)
        if len(dims) == 1:
            self.held[node] = dims[0]
        elif len(dims) == 2 and len(node.meta["shape"]) == 2:
            self.held[node] = 0  # a square layer that writes what it reads
        elif dims:
            raise self._refused(node, "holds its channels in several dimensions")

    def _dims(self, node: fx.Node) -> list[int]:
        """The dimensions of a result that are the channels of the stream, all of them in their order.

        Raises:
            PlanError: one holds some of them, or in another order.
        """
        axes = self.graph.channels.axes[node.meta["index"]]
        dims: list[int] = []
        for dim, axis in enumerate(axes if isinstance(axes, tuple) else ()):
            if not isinstance(axis, Axis):  # of several tensors
                if node in self.holds or any(source in self.holds for source in node.all_input_nodes):
                    raise self._refused(node, "takes it apart")
            elif axis.free:
                components = self.graph.components.of(axis)
                if np.array_equal(components, self.group.components):
                    dims.append(dim)
                elif np.isin(components, self.group.components).any():
                    raise self._refused(node, "holds some of its channels, or in another order")
        return dims

    def _keeps(self, node: fx.Node, held: str) -> None:
        """A result holds the stream in its last dimension."""
        if self._dims(node) != [len(node.meta["shape"]) - 1]:
            raise self._refused(node, "holds its channels in another dimension than the last")
        self.holds[node] = held

    def _of(self, value: Any) -> str | None:
        """What an argument holds of the stream; None if nothing."""
        return self.holds.get(value) if isinstance(value, fx.Node) else None

    def _writes(self, source: Any) -> bool:
        """Whether a tensor is a parameter whose last dimension is the stream, which then writes it."""
        dim = self.held.get(source) if isinstance(source, fx.Node) else None
        if dim is None or dim != len(source.meta["shape"]) - 1:
            return False
        self.written.add((str(source.target), dim))
        return True

    def _sees(self, node: fx.Node, source: fx.Node) -> None:
        """Note at which argument the stream goes into a gain or a layer."""
        given: dict[int | str, Any] = {**dict(enumerate(node.args)), **node.kwargs}
        self.seen[node.meta["index"]] = next(place for place, value in given.items() if value is source)

    # -- operations -------------------------------------------------------------------------------------------------

    def _passed(self, node: fx.Node) -> None:
        """Entries of the first argument, moved over positions."""
        found = {self._of(source) for source in node.all_input_nodes if source in self.holds or source in self.held}
        held = found.pop()
        if found or held is None:
            raise self._refused(node, "joins it with something else")
        self._keeps(node, held)

    def embedding(self, node: fx.Node) -> None:
        given = arguments(node)
        if given.get("max_norm") is not None or not self._writes(given["weight"]):
            raise self._refused(node, "does not write it from a plain table")
        self._keeps(node, PLAIN)

    def linear(self, node: fx.Node) -> None:
        given = arguments(node)
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        dims = self._dims(weight) if weight.meta["name"] == "parameter" else []
        if dims != ([0] if 0 in dims else []) + ([1] if x in self.holds else []) or self.holds.get(x) == SQUARES:
            raise self._refused(node, "reads it other than by the inputs of a weight that the model holds")
        name = str(weight.target)
        if x in self.holds:
            if self.read.setdefault(name, self.holds[x]) != self.holds[x]:
                raise self._refused(node, f"reads it by {name!r}, which also reads it behind another norm")
            if self.holds[x] == PLAIN:  # else it was seen in front of the gain
                self._sees(node, x)
        if 0 in dims:
            self.written.add((name, 0))
            if bias is not None and not self._writes(bias):
                raise self._refused(node, "writes it with a bias that is computed")
            self._keeps(node, PLAIN)

    def add(self, node: fx.Node) -> None:
        parts = node.args[:2]
        if len(parts) != 2 or not all(self._of(part) == PLAIN or self._writes(part) for part in parts):
            raise self._refused(node, "adds something else to it")
        self._keeps(node, PLAIN)

    def mul(self, node: fx.Node) -> None:
        first, second = node.args[:2]
        if first is second:
            self.square(node)
            return
        stream, other = (second, first) if self._of(first) is None else (first, second)
        held = self._of(stream)
        if held == PLAIN and isinstance(other, fx.Node) and other in self.held:
            self._gain(node, stream, other)
        elif held is None or held == SQUARES or not self._by_position(other):
            raise self._refused(node, "multiplies its channels by what is not a gain")
        else:
            self._keeps(node, held)

    def div(self, node: fx.Node) -> None:
        stream, other = node.args[:2]
        held = self._of(stream)
        if held is None or held == SQUARES or not self._by_position(other):
            raise self._refused(node, "divides by it, or by what differs from channel to channel")
        self._keeps(node, held)

    def power(self, node: fx.Node) -> None:
        if node.args[1:] != (2,):
            raise self._refused(node, "raises its channels to another power than two")
        self.square(node)

    def square(self, node: fx.Node) -> None:
        if self._of(node.args[0]) != PLAIN:
            raise self._refused(node, "squares its channels behind a gain")
        self._keeps(node, SQUARES)

    def total(self, node: fx.Node) -> None:
        """The sum or the mean of the squares, over all channels, is the same for a rotated stream."""
        given = arguments(node)
        last = len(given["self"].meta["shape"]) - 1
        dims = given.get("dim")
        over = [dim % (last + 1) for dim in (dims if isinstance(dims, (tuple, list)) else [dims]) if dim is not None]
        if self.holds.get(given["self"]) != SQUARES or over != [last]:
            raise self._refused(node, "adds up its channels other than as squares")

    def rms_norm(self, node: fx.Node) -> None:
        given = arguments(node)
        stream, gain, shape = given["input"], given.get("weight"), given["normalized_shape"]
        if self.holds.get(stream) != PLAIN or len(shape) != 1:
            raise self._refused(node, "normalises it together with something else")
        if gain is None:
            self._keeps(node, PLAIN)
        else:
            self._gain(node, stream, gain)

    def _gain(self, node: fx.Node, stream: Any, gain: Any) -> None:
        if gain not in self.held or len(gain.meta["shape"]) != 1 or len(gain.users) != 1:
            raise self._refused(node, "multiplies its channels by what is not a gain of its own")
        self.gains.add(str(gain.target))
        self._sees(node, stream)
        self._keeps(node, str(gain.target))

    def _by_position(self, other: Any) -> bool:
        """Whether a factor is one number for all channels of a position."""
        if isinstance(other, fx.Node):
            shape = other.meta["shape"]
            return other not in self.held and other not in self.holds and (not shape or shape[-1] == 1)
        return isinstance(other, (int, float))

    # -- refusals ---------------------------------------------------------------------------------------------------

    def _impossible(self, why: str) -> PlanError:
        return PlanError(
            f"The residual stream of {self.group.name!r} cannot be rotated: {why}. Prune its width as it is."
        )

    def _refused(self, node: fx.Node, why: str) -> PlanError:
        return self._impossible(f"{describe(node, self.graph.trace)} {why}")


_RULES: dict[str, Callable[[_Walk, fx.Node], None]] = {
    "embedding": _Walk.embedding,
    "linear": _Walk.linear,
    "add": _Walk.add,
    "mul": _Walk.mul,
    "div": _Walk.div,
    "pow": _Walk.power,
    "square": _Walk.square,
    "mean": _Walk.total,
    "sum": _Walk.total,
    "rms_norm": _Walk.rms_norm,
}
