"""A consumer with the layers that make its channels, as one function of their weights and its linearisation.

For the MLP of a language model, ``down(silu(gate(x)) * up(x))`` with hidden width 8, the producers are `gate` and `up`,
both of weight ``(8, 6)``; `elementwise` maps their results, twice ``(batch, 8)``, to the consumer's input
``(batch, 8)``; the consumer `down` has weight ``(4, 8)``. The chain is a function of 8 * 6 + 8 * 6 + 4 * 8 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structprune.coupling.graph import ChannelGraph
from structprune.distributed import all_reduced
from structprune.equations.fixed_inputs import FixedInput
from structprune.equations.linear_maps import LinearMap
from structprune.ops import layer_of, op_of
from structprune.ops.arguments import arguments
from structprune.recovery.layers import Consumer, as_consumer
from structprune.recovery.norms import uses_batch_statistics
from structprune.recovery.samples import Samples
from structprune.tracing.provenance import plain

# From some tensors of equal shape to one of that shape, each entry from the entries at its place.
Elementwise = Callable[[Sequence[Tensor]], Tensor]

_ACTIVATIONS = """
relu relu6 hardtanh hardswish leaky_relu elu celu selu silu gelu mish softplus tanh sigmoid hardsigmoid clamp clamp_min
"""
ACTIVATIONS = frozenset(_ACTIVATIONS.split())


@dataclass(slots=True)
class ChainWeights:
    """Weights and shifts of all layers of a chain, the consumer last.

    Attributes:
        weights: in the shapes of the layers' weights.
        shifts: each of shape ``(channels,)``, or None where no parameter can hold one.
    """

    weights: list[Tensor]
    shifts: list[Tensor | None]

    def flat(self) -> Tensor:
        """All numbers in one vector: the weights, then the shifts."""
        parts = [w.flatten() for w in self.weights] + [s for s in self.shifts if s is not None]
        return torch.cat(parts)

    def like(self, vector: Tensor) -> ChainWeights:
        """The numbers of a `vector` in the order of `flat`, in these shapes."""
        have = [*self.weights, *(s for s in self.shifts if s is not None)]
        parts = iter(part.view(h.shape) for part, h in zip(vector.split([h.numel() for h in have]), have, strict=True))
        weights = [next(parts) for _ in self.weights]
        return ChainWeights(weights, [None if s is None else next(parts) for s in self.shifts])


@dataclass(frozen=True, slots=True)
class Chain:
    """A consumer behind its producers, as a function of their weights.

    Attributes:
        producers: their linear maps.
        elementwise: from the producers' results to the consumer's input.
        consumer: its linear map.
        activation: what is applied to the result before anything else uses it; errors are measured behind it. None
            where there is none.
    """

    producers: tuple[LinearMap, ...]
    elementwise: Elementwise
    consumer: LinearMap
    activation: Elementwise | None

    def producer_results(self, samples: Samples, at: ChainWeights) -> list[Tensor]:
        """The result of each producer."""
        parts = zip(self.producers, samples.inputs, at.weights[:-1], at.shifts[:-1], strict=True)
        return [producer(x, weight, shift) for producer, x, weight, shift in parts]

    def hidden(self, samples: Samples, at: ChainWeights) -> Tensor:
        """The input of the consumer."""
        return self.elementwise(self.producer_results(samples, at))

    def from_hidden(self, samples: Samples, hidden: Tensor, at: ChainWeights) -> Tensor:
        """The result for a given input of the consumer, with what is added to it."""
        return self.consumer(hidden, at.weights[-1], at.shifts[-1]).add_(samples.rest)

    def result(self, samples: Samples, at: ChainWeights) -> Tensor:
        """The result with what is added to it, before the activation."""
        return self.from_hidden(samples, self.hidden(samples, at), at)

    def error(self, parts: Sequence[Samples], at: ChainWeights) -> float:
        """Sum of squared differences from the goal, behind the activation, over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=at.weights[-1].device)
        for samples in parts:
            difference = self.activated(samples.goal) - self.activated(self.result(samples, at))
            total += difference.square_().sum(dtype=torch.float64)
        return float(all_reduced(total))

    def activated(self, result: Tensor) -> Tensor:
        """What errors are measured on."""
        return result if self.activation is None else self.activation([result])


@dataclass(slots=True)
class LinearisedChain:
    """A chain linearised at some weights, on some samples: the Jacobian, as a product with a vector from either side.

    Attributes:
        chain: what is linearised.
        samples: on what.
        at: where.
        hidden: the consumer's input.
        slopes: of the consumer's input by each producer's result, each in the shape of the hidden.
        activation_slopes: of the activation behind the result, in the shape of the result; None where there is none.
        layers: producers and consumer on their inputs; none in `parts`, which have no Jacobian of their own.
    """

    chain: Chain
    samples: Samples
    at: ChainWeights
    hidden: Tensor
    slopes: list[Tensor]
    activation_slopes: Tensor | None
    layers: tuple[FixedInput, ...] = ()

    def parts(self) -> list[LinearisedChain]:
        """The same for each batch that its samples are joined from, as views."""
        sections = self.samples.sections
        if not sections:
            return [self]
        starts = [sum(sections[:number]) for number in range(len(sections))]
        found: list[LinearisedChain] = []
        for start, count in zip(starts, sections, strict=True):
            at = slice(start, start + count)
            last = None if self.activation_slopes is None else self.activation_slopes[at]
            slopes = [slope[at] for slope in self.slopes]
            found.append(LinearisedChain(self.chain, self.samples.part(at), self.at, self.hidden[at], slopes, last))
        return found

    def jvp(self, step: ChainWeights) -> Tensor:
        """The change of the activated result for a step of the weights."""
        *producers, consumer = self.layers
        moved: Tensor | None = None
        for producer, weight, shift, slope in zip(
            producers, step.weights[:-1], step.shifts[:-1], self.slopes, strict=True
        ):
            part = producer(weight, shift).mul_(slope)
            moved = part if moved is None else moved.add_(part)
        assert moved is not None
        change = self.chain.consumer(moved, self.at.weights[-1])
        change += consumer(step.weights[-1], step.shifts[-1])
        return change if self.activation_slopes is None else change.mul_(self.activation_slopes)

    def vjp(self, grad: Tensor) -> Tensor:
        """The adjoint: from something in the shape of the result to a vector in the order of `ChainWeights.flat`."""
        (*producers, consumer), last = self.layers, self.at.weights[-1]
        weights: list[Tensor] = []
        shifts: list[Tensor | None] = []
        grad = grad if self.activation_slopes is None else grad * self.activation_slopes
        hidden_grad = self.chain.consumer.to_input(grad, self.hidden, last)
        parts = zip(producers, self.at.weights[:-1], self.at.shifts[:-1], self.slopes, strict=True)
        for producer, weight, shift, slope in parts:
            result_grad = hidden_grad * slope
            weights.append(producer.to_weight(result_grad, weight))
            shifts.append(None if shift is None else producer.map.to_shift(result_grad))
        weights.append(consumer.to_weight(grad, last))
        shifts.append(None if self.at.shifts[-1] is None else consumer.map.to_shift(grad))
        return ChainWeights(weights, shifts).flat()


def linearised(chain: Chain, samples: Samples, at: ChainWeights) -> tuple[LinearisedChain, Tensor]:
    """The chain linearised at some weights, and what its activated result lacks there."""
    hidden, slopes = elementwise_slopes(chain.elementwise, chain.producer_results(samples, at))
    result = chain.from_hidden(samples, hidden, at)
    maps, inputs = (*chain.producers, chain.consumer), (*samples.inputs, hidden)
    layers = tuple(FixedInput.of(layer, x) for layer, x in zip(maps, inputs, strict=True))
    if chain.activation is None:
        return LinearisedChain(chain, samples, at, hidden, slopes, None, layers), samples.goal - result
    result, (last,) = elementwise_slopes(chain.activation, [result])
    return LinearisedChain(chain, samples, at, hidden, slopes, last, layers), chain.activated(samples.goal) - result


def elementwise_slopes(function: Elementwise, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result of an elementwise function, and its derivative by each input, entry by entry.

    Its Jacobian is diagonal, so that the derivatives of the sum of the result are all of it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in inputs]
        result = function(leaves)
        # A comparison, or what is detached, has no slope.
        none = [None] * len(leaves)
        slopes = torch.autograd.grad(result.sum(), leaves, allow_unused=True) if result.requires_grad else none
    parts = zip(slopes, leaves, strict=True)
    return result.detach(), [torch.zeros_like(leaf) if slope is None else slope for slope, leaf in parts]


# -- read off the trace ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Producers:
    """Layers whose results meet, entry by entry, in the input of a consumer.

    Attributes:
        layers: in the order of the forward, each with the norms behind it.
        between: the operations between them and the consumer's input, in order.
    """

    layers: tuple[Consumer, ...]
    between: tuple[fx.Node, ...]


def producers_of(graph: ChannelGraph, consumer: Consumer) -> Producers | str:
    """The producers of a consumer's channels, or why they cannot be solved with it.

    Each operation between treats every entry alone and its result is used nowhere else. So a change at one position
    and channel of a producer's result changes the consumer's input at that place, and nothing besides.
    """
    if consumer.diagonal:
        return "a norm has no producers of its own"
    source = _input_of(graph.trace.nodes[consumer.node])
    if source is None:
        return "its input is none of the trace"
    behind = _behind(source)
    if isinstance(behind, str):
        return behind
    between, ends = behind
    obstacle = _obstacle([*between.values(), *ends.values()], {consumer.node, *between, *ends}, source)
    if obstacle:
        return obstacle
    layers = [as_consumer(graph, node, sums=False) for _, node in sorted(ends.items())]
    with_weight = tuple(layer for layer in layers if layer is not None)
    if not layers or len(with_weight) < len(layers):
        return "what makes its channels has no weight of its own"
    return Producers(with_weight, tuple(node for _, node in sorted(between.items())))


def _behind(source: fx.Node) -> tuple[dict[int, fx.Node], dict[int, fx.Node]] | str:
    """Backwards from a tensor: the elementwise operations up to the layers that make its channels, and those layers.

    By number; or why the walk ends at something else.
    """
    between: dict[int, fx.Node] = {}
    ends: dict[int, fx.Node] = {}
    waiting = [source]
    while waiting:
        node = waiting.pop()
        number, name = node.meta["index"], node.meta["name"]
        if number in between or number in ends:
            continue
        if layer_of(name) is not None:
            if _is_written_over(_input_of(node)):
                return f"the input of {name} in front of it is written over"
            ends[number] = node
        elif _is_elementwise(name) and node.meta.get("shape") == source.meta.get("shape"):
            between[number] = node
            waiting += [part for part in node.all_input_nodes if part.meta["name"] != "parameter"]
        else:
            return f"its channels come through {name}, which does not treat each entry alone"
    return between, ends


def _obstacle(nodes: Iterable[fx.Node], inside: set[int], source: fx.Node) -> str:
    """Why producers and operations between are no function of entries alone; empty if they are.

    Args:
        nodes: the operations between, and the producers.
        inside: their numbers and the consumer's.
        source: the consumer's input.
    """
    for node in nodes:
        name = node.meta["name"]
        if any(user.op == "output" or user.meta["index"] not in inside for user in node.users):
            return f"{name} in front of it is used elsewhere too"
        if node.meta.get("shape") != source.meta.get("shape"):
            return f"{name} in front of it has another shape"
        given = arguments(node) if name == "batch_norm" else None
        if given is not None and uses_batch_statistics(given.get("training"), given.get("running_var")):
            return "a batch norm in front of it takes its statistics from the batch"
        if layer_of(name) is None and any(_differs_by_sample(part, source) for part in node.all_input_nodes):
            return f"{name} in front of it meets a held tensor that differs from sample to sample"
    return ""


def _differs_by_sample(node: fx.Node, source: fx.Node) -> bool:
    """Whether a held tensor has several entries along the first dimension, in which samples are separated later."""
    shape, full_shape = node.meta.get("shape"), source.meta.get("shape")
    if node.meta["name"] != "parameter" or shape is None or full_shape is None:
        return False
    return len(shape) == len(full_shape) and shape[0] != 1


def _is_written_over(node: fx.Node | None) -> bool:
    return node is not None and any(user.meta.get("writes") is node for user in node.users if user.op != "output")


def _is_elementwise(name: str) -> bool:
    """Whether an operation treats each entry alone; a dropout does, since it does nothing in eval mode."""
    op = op_of(name)
    return op is not None and op.elementwise


def _input_of(node: fx.Node) -> fx.Node | None:
    """The operation that makes a layer's input."""
    layer = layer_of(node.meta["name"])
    x = None if layer is None else arguments(node).get(layer.input)
    return x if isinstance(x, fx.Node) else None


def elementwise_between(graph: ChannelGraph, producers: Producers, tensors: Mapping[str, Tensor]) -> Elementwise:
    """The function from the producers' results to the consumer's input, with tensors of the pruned model."""
    sources = [graph.trace.nodes[layer.node] for layer in producers.layers]

    def run(results: Sequence[Tensor]) -> Tensor:
        values: dict[fx.Node, Any] = dict(zip(sources, results, strict=True))
        last = results[0]
        for node in producers.between:
            values[node] = last = _run(node, values, tensors)
        return last

    return run


def activation_behind(graph: ChannelGraph, number: int) -> Elementwise | None:
    """The activation that is the only use of the result of an operation; None where there is none."""
    node = graph.trace.nodes[number]
    users = list(node.users)
    user = users[0] if len(users) == 1 else None
    if user is None or user.op == "output" or user.meta["name"] not in ACTIVATIONS or user.all_input_nodes != [node]:
        return None
    return lambda results: _run(user, {node: results[0]}, {})


def _run(node: fx.Node, values: Mapping[fx.Node, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Run one operation of the trace on the values of other operations, and tensors of the model by name."""

    def value(source: fx.Node) -> Any:
        if source in values:
            return values[source]
        tensor = tensors[str(source.target)].detach()
        return tensor.clone() if tensor.is_inference() else tensor

    args, kwargs = (plain(fx.map_arg(part, value)) for part in (node.args, node.kwargs))
    if "writes" in node.meta:  # in place in the forward, but the derivative still needs what it would write over
        args = (args[0].clone(), *args[1:])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Any = node.target
    return function(*args, **kwargs)
