"""Which layers of a pruned model are to be solved again, and what each is to meet, read off the trace."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from structprune.channels.solver import Mask
from structprune.graph import ChannelGraph
from structprune.ops import layer_of, op_of
from structprune.ops.arguments import arguments
from structprune.ops.op import Norm
from structprune.ops.relations import Ids, Row


@dataclass(frozen=True, slots=True)
class Consumer:
    """A layer to solve: an operation with a held weight, and the sum or norm behind it whose result it answers for.

    Attributes:
        node: number of the operation.
        weight: name of its weight.
        bias: name of what can take a constant up: its own bias or that of the batch norm behind it; None if nothing.
        norms: numbers of the operations between it and `target` that scale its channels.
        target: number of the operation whose result is to meet the original's.
        diagonal: whether the weight scales each channel by itself (norms and plain products).
        own_bias: whether `bias` is added before `norms` scale.
    """

    node: int
    weight: str
    bias: str | None
    norms: tuple[int, ...]
    target: int
    diagonal: bool = False
    own_bias: bool = True

    @property
    def layer(self) -> str:
        """Path of the module that holds the weight."""
        return self.weight.rpartition(".")[0] or self.weight


def by_batch(training: Any, variance: Any) -> bool:
    """Whether a batch norm with these arguments takes its statistics from the batch."""
    return variance is None or bool(training)


def _held(value: Any) -> str | None:
    """The name of a tensor that the model holds and that is used here alone."""
    if isinstance(value, fx.Node) and value.meta["name"] == "parameter" and len(value.users) == 1:
        return str(value.target)
    return None


def kept_of(graph: ChannelGraph, dead: Mask, row: Row) -> Ids | None:
    """Original indices of a row that live, or None if all do."""
    if not row.free:
        return None
    gone = dead[graph.components.of(row)]
    return np.flatnonzero(~gone) if gone.any() else None


def affected(graph: ChannelGraph, dead: Mask, begins: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The operations whose surviving channels differ from the original's, or may.

    It begins where thinned channels are summed over: they come in and do not go out, or a norm runs over them.
    """
    found: set[fx.Node] = set()
    over = {survivors.node for survivors in graph.channels.relations.survivors}
    for node in graph.trace.nodes:
        sources = node.all_input_nodes
        if node in begins or any(source in found for source in sources):
            found.add(node)
            continue
        gone = [_gone(graph, dead, source) for source in sources]
        lost = set().union(*gone)
        if lost and (node.meta["index"] in over or not lost <= _gone(graph, dead, node)):
            found.add(node)
    return found


def _gone(graph: ChannelGraph, dead: Mask, node: fx.Node) -> set[int]:
    """The components that are gone from the rows of a node."""
    rows = graph.channels.rows[node.meta["index"]]
    found: set[int] = set()
    for row in rows if isinstance(rows, tuple) else ():
        if isinstance(row, Row) and row.free:
            parts = graph.components.of(row)
            found.update(parts[dead[parts]].tolist())
    return found


def consumers(
    graph: ChannelGraph, dead: Mask, begins: Collection[fx.Node] = (), without: Collection[fx.Node] = ()
) -> list[Consumer]:
    """The layers to solve once the components marked in `dead` are gone, in the order of the forward.

    Args:
        graph: of the original.
        dead: marks the components that are gone.
        begins: operations whose results are others though no channel of theirs is gone.
        without: operations that are gone themselves.
    """
    changed = affected(graph, dead, begins)
    found: list[Consumer] = []
    claimed: dict[int, int] = {}  # sums, and the last layer that ends in each
    for node in graph.trace.nodes:
        if layer_of(node.meta["name"]) is None or node in without:
            continue
        consumer = as_consumer(graph, node)
        if consumer is not None and graph.trace.nodes[consumer.target] in changed:
            claimed[consumer.target] = consumer.node
            found.append(consumer)
    # Of several layers that end in one sum the last corrects it; the others meet their own results.
    found = [c if claimed[c.target] == c.node else _shortened(graph, c) for c in found]
    taken = {number for consumer in found for number in consumer.norms}
    norms = [norm for norm in _norms(graph, changed) if graph.trace.nodes[norm.node] not in without]
    found += [norm for norm in norms if norm.node not in taken]
    return sorted(found, key=lambda c: c.node)


def as_consumer(graph: ChannelGraph, node: fx.Node, sums: bool = True) -> Consumer | None:
    """The operation as a layer to solve, answering for a sum behind it if `sums`; None if it holds no weight alone."""
    layer, given = layer_of(node.meta["name"]), arguments(node)
    assert layer is not None
    weight, x = _held(given.get(layer.weight)), given.get(layer.input)
    if weight is None or not isinstance(x, fx.Node):
        return None
    if node.meta["name"] == "addmm" and (node.kwargs.keys() & {"alpha", "beta"}):
        return None
    own = _held(given.get(layer.bias))
    return _followed(node, weight, own, sums)


def _followed(node: fx.Node, weight: str, own: str | None, sums: bool = True) -> Consumer:
    """Follow the result while nothing but scaling happens to it, up to the sum that it goes into."""
    bias, own_bias, norms, at = own, True, list[int](), node
    while (user := _only_user(at)) is not None:
        name = user.meta["name"]
        if name == "batch_norm" and user.args and user.args[0] is at and node.meta["name"].startswith("conv"):
            norms.append(user.meta["index"])
            shift = _held(arguments(user).get("bias"))
            if shift is not None:
                bias, own_bias = shift, False
        elif name == "add" and sums and _is_sum(user, at):
            at = user
            break
        elif not _passes(user) or user.meta.get("shape") != at.meta.get("shape"):
            break
        at = user
    return Consumer(node.meta["index"], weight, bias, tuple(norms), at.meta["index"], own_bias=own_bias)


def _shortened(graph: ChannelGraph, consumer: Consumer) -> Consumer:
    node = graph.trace.nodes[consumer.node]
    return _followed(node, consumer.weight, _own_bias(node), sums=False)


def _own_bias(node: fx.Node) -> str | None:
    layer = layer_of(node.meta["name"])
    return None if layer is None else _held(arguments(node).get(layer.bias))


def _passes(node: fx.Node) -> bool:
    """Whether a forward in eval mode passes this operation unchanged: dropout, or a copy in another layout."""
    return node.meta["name"] == "contiguous" or node.meta["name"].removesuffix("1d").removesuffix("2d").removesuffix(
        "3d"
    ).endswith("dropout")


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _is_sum(node: fx.Node, part: fx.Node) -> bool:
    """Whether `node` adds `part` to another tensor of the same shape, once."""
    others = [arg for arg in node.args if arg is not part]
    return (
        len(node.args) == 2
        and len(others) == 1
        and isinstance(others[0], fx.Node)
        and not node.kwargs
        and others[0].meta.get("shape") == part.meta["shape"] == node.meta.get("shape")
    )


def _norms(graph: ChannelGraph, changed: set[fx.Node]) -> Iterator[Consumer]:
    """Norms, and products with a held vector, of what has changed."""
    for node in graph.trace.nodes:
        if node not in changed:
            continue
        known, number = op_of(node.meta["name"]), node.meta["index"]
        if known is not None and known.norm is not None:
            given = arguments(node)
            weight, bias = _held(given.get(known.norm.weight)), _held(given.get(known.norm.bias))
            if weight is not None and _along_channels(known.norm, given):
                yield Consumer(number, weight, bias, (), number, diagonal=True)
        elif node.meta["name"] == "mul" and "writes" not in node.meta:
            weight = _factor(node)
            if weight is not None:
                yield Consumer(number, weight, None, (), number, diagonal=True)


def _along_channels(norm: Norm, given: dict[str, Any]) -> bool:
    """Whether a norm's weight has one dimension."""
    shape = given.get(norm.shape)
    return not norm.shape or (isinstance(shape, (tuple, list)) and len(shape) == 1)


def _factor(node: fx.Node) -> str | None:
    """The held vector by which a product scales the last dimension of a tensor."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for vector, x in (node.args, node.args[::-1]):
        name = _held(vector)
        if name is None or not isinstance(vector, fx.Node) or not isinstance(x, fx.Node):
            continue
        shape = vector.meta["shape"]
        if len(shape) == 1 and node.meta["shape"] == x.meta["shape"] and shape[-1] == x.meta["shape"][-1]:
            return name
    return None
