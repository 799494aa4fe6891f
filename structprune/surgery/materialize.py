"""`materialize_weights`: what a forward computes as a weight becomes a plain parameter.

    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = (self.weight - self.weight.mean((1, 2, 3), True)) / self.weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias)

Removing an input of such a layer would change the mean and the deviation, and so the weights for all other inputs. As
nothing in the layer makes up for that, its inputs are pinned. With ``w`` itself as the parameter, they may go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from structprune.checking import FLAG, INPUTS, MODEL, require
from structprune.coupling.compensation_ahead import run_movement
from structprune.coupling.computed_weights import normalised_together
from structprune.coupling.graph import ChannelGraph
from structprune.errors import TraceError
from structprune.ops.arguments import tensors
from structprune.surgery.edits import install, rewritten_forward
from structprune.tracing.calls import ModuleCall
from structprune.tracing.subgraph import Change, changed_graph
from structprune.tracing.trace import ExampleInputs, Trace
from structprune.wrapping import prunable, rewrapped


def materialize_weights(model: nn.Module, example_inputs: ExampleInputs, *, inplace: bool = False) -> nn.Module:
    """Hold as plain parameters the weights that layers compute by normalising a parameter over their inputs.

    Weight standardisation (Qiao et al., 2019), cosine layers and the like. The result computes what `model` computes,
    and its layers lose inputs like any other. What only went into such a weight, a gain say, is gone. Fine-tuning then
    trains the weights themselves, without the normalisation. Layers that run more than once, and weights for which a
    gain makes up anyway (``weight_norm``, ``spectral_norm``), stay as they are.

    Args:
        model: the trained model.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword), as for `structprune.plan`.
        inplace: change `model` itself.

    Returns:
        `model`, or a copy.

    Raises:
        PlanError: an argument is of the wrong type.
        TraceError: the model does not run on `example_inputs`.

    Example:
        >>> import structprune
        >>> class Cosine(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Cosine(8, 2)), torch.randn(1, 4)
        >>> structprune.DependencyGraph(model, x).explain("0")[:23]
        '0: 8 channels, pinned: '
        >>> plain = structprune.materialize_weights(model, x)
        >>> torch.allclose(plain(x), model(x))
        True
        >>> len(structprune.plan(plain, x, ratio=0.5).removed["2.weight"][1])
        4
    """
    require(locals(), model=MODEL, example_inputs=INPUTS, inplace=FLAG)
    inner = prunable(model, inplace=inplace)
    graph = ChannelGraph(inner, example_inputs)
    made = inner if inplace else copy.deepcopy(inner)
    # All is computed before anything changes: a model in place is as it was if some of it cannot be.
    by_layer: dict[str, list[_Computed]] = {}
    for weight in _computed_weights(graph):
        by_layer.setdefault(weight.call.path, []).append(weight)
    for change in [_change(made, graph.trace, weights) for weights in by_layer.values()]:
        change()
    return model if inplace else rewrapped(model, made)


@dataclass(frozen=True)
class _Computed:
    """A weight that a module computes from its parameters alone.

    Attributes:
        call: the only call of the module that computes it.
        node: the operation that gives the weight as it is used.
        parameter: the parameter of the same shape that it is made of, and that nothing else uses.
        parts: the operations and tensors that only take part in making it, in order; without `parameter`.
    """

    call: ModuleCall
    node: fx.Node
    parameter: fx.Node
    parts: tuple[fx.Node, ...]


def _computed_weights(graph: ChannelGraph) -> Iterator[_Computed]:
    trace = graph.trace
    for node in normalised_together(trace, graph.channels):
        if node.meta["index"] >= len(trace.nodes):
            continue  # of layers that run in training alone
        parts = _only_for(node)
        parameter = _made_from(graph.model, node, parts)
        if parameter is not None:
            call = _holder(trace, node, str(parameter.target))
            computed = _Computed(call, node, parameter, tuple(part for part in parts if part is not parameter))
            if trace.counts[call.path] == 1 and _rewritable(trace, computed):
                yield computed


def _made_from(model: nn.Module, node: fx.Node, parts: Sequence[fx.Node]) -> fx.Node | None:
    """The only trained parameter of the shape of `node` among `parts`, if these read nothing but parameters."""
    read = {source for part in parts for source in part.all_input_nodes} | {*parts}
    alike = [part for part in parts if part.meta["shape"] == node.meta["shape"] and _trained(model, part)]
    only_parameters = all(part.meta["name"] == "parameter" for part in read if part.op == "get_attr")
    return alike[0] if len(alike) == 1 and only_parameters else None


def _holder(trace: Trace, node: fx.Node, parameter: str) -> ModuleCall:
    """The call around `node` of the innermost module that holds `parameter`."""
    call = trace.every_call[node.meta["call"]]
    while not parameter.startswith(f"{call.path}." if call.path else ""):
        call = trace.every_call[call.parent]
    return call


def _trained(model: nn.Module, node: fx.Node) -> bool:
    return str(node.target) in dict(model.named_parameters(remove_duplicate=False))


def _only_for(node: fx.Node) -> tuple[fx.Node, ...]:
    """`node` and all that is used for nothing but it, in the order of the trace."""
    part_of, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in part_of and all(user in part_of for user in source.users):
                part_of.add(source)
                waiting.append(source)
    return tuple(sorted(part_of, key=lambda part: part.meta["index"]))


class _Held(Change):
    """The weights of a module are its parameters, and what made them is not run."""

    def __init__(self, trace: Trace, weights: Sequence[_Computed]) -> None:
        self._trace = trace
        self._parameters = {weight.node: weight.parameter for weight in weights}
        self._parts = {part for weight in weights for part in weight.parts}

    def value(self, node: fx.Node) -> fx.Node | None:
        return self._parameters.get(node, node)

    def runs(self, node: fx.Node) -> bool:
        return node not in self._parts

    def calls(self, child: ModuleCall) -> bool:
        inside = self._trace.all_nodes[child.first : child.last]
        return not inside or any(node.op != "get_attr" and node not in self._parts for node in inside)


def _rewritable(trace: Trace, weight: _Computed) -> bool:
    try:
        changed_graph(trace, weight.call, _Held(trace, [weight]))
    except TraceError:
        return False
    return True


def _change(model: nn.Module, trace: Trace, weights: Sequence[_Computed]) -> Callable[[], None]:
    """Makes the weights that one module computes its parameters."""
    values: dict[fx.Node, Tensor] = {}
    nodes = {node for weight in weights for node in (*weight.parts, weight.parameter)}
    with torch.no_grad():
        for node in sorted(nodes, key=lambda node: node.meta["index"]):
            for source in node.all_input_nodes:
                if source not in values:
                    values[source] = _tensor(model, source)
            values[node] = run_movement(node, values) if tensors(node) else _tensor(model, node)
    call = weights[0].call
    module = model.get_submodule(call.path)
    forward = rewritten_forward(module, call.path, changed_graph(trace, call, _Held(trace, weights)))

    def change() -> None:
        for weight in weights:
            with torch.no_grad():
                model.get_parameter(str(weight.parameter.target)).copy_(values[weight.node])
            for part in weight.parts:
                if part.meta["name"] == "parameter":
                    owner, _, name = str(part.target).rpartition(".")
                    delattr(model.get_submodule(owner), name)
        install(module, forward, [])

    return change


def _tensor(model: nn.Module, node: fx.Node) -> Tensor:
    """A copy of the parameter, buffer or constant `node`: what computes a weight may write to its arguments."""
    path, _, name = str(node.target).rpartition(".")
    return getattr(model.get_submodule(path), name).detach().clone()
