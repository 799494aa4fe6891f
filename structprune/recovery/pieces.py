"""The layers that make a consumer's channels, with what stands in between: a piece of the trace, found by its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structprune.graph import ChannelGraph
from structprune.ops import layer_of, op_of
from structprune.ops.arguments import arguments
from structprune.recovery.consumers import Consumer, as_consumer, by_batch
from structprune.tracing.provenance import plain

_ACTIVATIONS = """
relu relu6 hardtanh hardswish leaky_relu elu celu selu silu gelu mish softplus tanh sigmoid hardsigmoid clamp clamp_min
"""
ACTIVATIONS = frozenset(_ACTIVATIONS.split())


@dataclass(frozen=True, slots=True)
class Piece:
    """Producers whose results meet, entry by entry, in the input of a consumer.

    Attributes:
        producers: the layers, each with the norms behind it.
        middle: the operations between the producers and the consumer's input, in order.
    """

    producers: tuple[Consumer, ...]
    middle: tuple[fx.Node, ...]

    def between(self, graph: ChannelGraph, tensors: dict[str, Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
        """The function from the producers' results to the consumer's input, with tensors of the pruned model."""
        nodes = [graph.trace.nodes[producer.node] for producer in self.producers]

        def run(results: Sequence[Tensor]) -> Tensor:
            known: dict[fx.Node, Any] = dict(zip(nodes, results, strict=True))
            last = results[0]
            for node in self.middle:
                known[node] = last = _run(node, known, tensors)
            return last

        return run


def _run(node: fx.Node, known: dict[fx.Node, Any], tensors: dict[str, Tensor]) -> Any:
    def value(source: fx.Node) -> Any:
        if source in known:
            return known[source]
        tensor = tensors[str(source.target)].detach()
        return tensor.clone() if tensor.is_inference() else tensor

    args, kwargs = (plain(fx.map_arg(part, value)) for part in (node.args, node.kwargs))
    if "writes" in node.meta:  # in place in the forward; here the derivative still needs what it would write over
        args = (args[0].clone(), *args[1:])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Any = node.target
    return function(*args, **kwargs)


def piece_of(graph: ChannelGraph, consumer: Consumer) -> Piece | str:
    """The producers of a consumer's channels, or why they cannot be refitted.

    Each operation in between treats every entry alone and its result goes nowhere else; so what a producer changes at
    one position and channel changes the consumer's input there and nothing besides.
    """
    nodes = graph.trace.nodes
    if consumer.diagonal:
        return "a norm has no producers of its own"
    source = _input(nodes[consumer.node])
    if source is None:
        return "its input is none of the trace"
    middle: dict[int, fx.Node] = {}
    ends: dict[int, fx.Node] = {}
    waiting = [source]
    inside = {consumer.node}
    while waiting:
        node = waiting.pop()
        number = node.meta["index"]
        if number in inside:
            continue
        name = node.meta["name"]
        if layer_of(name) is not None:
            if _written(_input(node)):
                return f"the input of {name} in front of it is written over"
            ends[number] = node
        elif _by_entry(name) and node.meta.get("shape") == source.meta.get("shape"):
            middle[number] = node
            waiting += [part for part in node.all_input_nodes if part.meta["name"] != "parameter"]
        else:
            return f"its channels come through {name}, which does not treat each entry alone"
        inside.add(number)
    fault = _fault([*middle.values(), *ends.values()], inside, source)
    if fault:
        return fault
    producers = [as_consumer(graph, node, sums=False) for _, node in sorted(ends.items())]
    if not producers or any(producer is None for producer in producers):
        return "what makes its channels has no weight of its own"
    return Piece(tuple(p for p in producers if p is not None), tuple(node for _, node in sorted(middle.items())))


def behind(graph: ChannelGraph, target: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """What is done to each entry of a result before anything else sees it: an activation, or nothing."""
    node = graph.trace.nodes[target]
    users = list(node.users)
    user = users[0] if len(users) == 1 else None
    if user is None or user.op == "output" or user.meta["name"] not in ACTIVATIONS or user.all_input_nodes != [node]:
        return lambda results: results[0]
    return lambda results: _run(user, {node: results[0]}, {})


def _fault(nodes: Iterable[fx.Node], inside: set[int], source: fx.Node) -> str:
    for node in nodes:
        if any(user.op == "output" or user.meta["index"] not in inside for user in node.users):
            return f"{node.meta['name']} in front of it is used elsewhere too"
        if node.meta.get("shape") != source.meta.get("shape"):
            return f"{node.meta['name']} in front of it has another shape"
        if node.meta["name"] == "batch_norm" and by_batch(
            arguments(node).get("training"), arguments(node).get("running_var")
        ):
            return "a batch norm in front of it takes its statistics from the batch"
        if layer_of(node.meta["name"]) is None and any(_by_sample(part, source) for part in node.all_input_nodes):
            return f"{node.meta['name']} in front of it meets a held tensor that differs from sample to sample"
    return ""


def _by_sample(node: fx.Node, source: fx.Node) -> bool:
    """Whether a held tensor has an entry for each place of the first dimension, along which samples are taken apart."""
    shape, wide = node.meta.get("shape"), source.meta.get("shape")
    if node.meta["name"] != "parameter" or shape is None or wide is None:
        return False
    return len(shape) == len(wide) and shape[0] != 1


def _written(node: fx.Node | None) -> bool:
    return node is not None and any(user.meta.get("writes") is node for user in node.users if user.op != "output")


def _by_entry(name: str) -> bool:
    """Whether an operation treats each entry alone; a dropout does, since it does nothing in eval mode."""
    known = op_of(name)
    return known is not None and known.elementwise


def _input(node: fx.Node) -> fx.Node | None:
    layer = layer_of(node.meta["name"])
    found = None if layer is None else arguments(node).get(layer.input)
    return found if isinstance(found, fx.Node) else None


def slopes(between: Callable[[Sequence[Tensor]], Tensor], results: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The consumer's input, and its derivative by each producer's result, entry by entry.

    What is in between treats each entry alone, so its Jacobian is diagonal, and the sum's derivatives are all of it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [result.clone().requires_grad_() for result in results]
        hidden = between(leaves)
        # A comparison, or what is detached, has no slope.
        flat = [None] * len(leaves)
        found = torch.autograd.grad(hidden.sum(), leaves, allow_unused=True) if hidden.requires_grad else flat
    parts = zip(found, leaves, strict=True)
    return hidden.detach(), [torch.zeros_like(leaf) if own is None else own for own, leaf in parts]
