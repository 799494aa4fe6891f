"""The forward of one module, cut out of a trace as an ``fx.Graph`` that can be run and changed.

Calls of child modules stay calls, so their mode, hooks and state keep working; what the module computes itself becomes
operations, in which sizes are computed anew from the tensors. This is how a size that stands as a literal in a forward
can be changed.
"""

from __future__ import annotations

import copyreg
import inspect
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from structprune.errors import TraceError
from structprune.tracing.opaque import opaque_call
from structprune.tracing.provenance import Arithmetic, Attribute, Constant, Dim, Expression, SizeFloat, SizeInt
from structprune.tracing.recording import ModuleCall
from structprune.tracing.scripted import scripted_call
from structprune.tracing.trace import Trace

Literal = Callable[[int, tuple[int | str, ...], int], int]


def own_operations(trace: Trace, path: str) -> tuple[ModuleCall, list[fx.Node]]:
    """The only call of the module at `path`, and the operations that it runs itself, in order.

    Raises:
        TraceError: the module is called more than once, or not at all.
    """
    calls = [call for call in trace.calls if call.path == path]
    if len(calls) != 1:
        raise TraceError(f"{path or 'the model'} is called {len(calls)} times; a literal in it can't be rewritten")
    return calls[0], trace.own.get(path, [])


def layer_flow(trace: Trace) -> Iterator[tuple[str, frozenset[str]]]:
    """Paths of the modules whose tensors operations take, in order, and those whose output reaches the operation."""
    reach: dict[fx.Node, frozenset[str]] = {}
    for node in trace.nodes:
        sources = [n for n in node.all_input_nodes if n.meta["name"] != "parameter"]
        held = {str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.meta["name"] == "parameter"}
        before = frozenset().union(*(reach.get(n, frozenset()) for n in sources)) if sources else frozenset()
        for path in held:
            yield path, before
        reach[node] = frozenset(held) or before


def module_graph(trace: Trace, path: str, literal: Literal) -> fx.Graph:
    """The forward of the module at `path` as a graph.

    Args:
        trace: a trace of the model.
        path: dotted name of the module.
        literal: gives the new value of a literal int, from the number of the operation among the module's own, the
            place in its arguments and the old value.

    Raises:
        TraceError: the forward uses something that a graph cannot hold.
    """
    call, own = own_operations(trace, path)
    return _Builder(trace, call, own, literal).build()


class _Builder:
    def __init__(self, trace: Trace, call: ModuleCall, own: list[fx.Node], literal: Literal) -> None:
        self._trace, self._call, self._own, self._literal = trace, call, own, literal
        self._graph = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._prefix = f"{call.path}." if call.path else ""

    def build(self) -> fx.Graph:
        """The finished graph."""
        self._placeholders()
        number = self._trace.calls.index(self._call)
        children = [call for call in self._trace.calls if call.parent == number]
        events: list[tuple[int, int, Any]] = [(node.meta["index"], 1, node) for node in self._own]
        events += [(child.first, 0, child) for child in children]
        place = {node: i for i, node in enumerate(self._own)}
        for _, _, event in sorted(events, key=lambda e: e[:2]):
            if isinstance(event, fx.Node):
                self._operation(event, place[event])
            else:
                self._child(event)
        self._graph.output(self._map(self._call.output))
        self._graph.lint()
        return self._graph

    def _fail(self, what: str) -> TraceError:
        return TraceError(f"the forward of {self._call.path or 'the model'} {what}, which a graph cannot hold")

    def _placeholders(self) -> None:
        signature = inspect.signature(type(self._call.module).forward)
        try:
            bound = signature.bind(self._call.module, *self._call.args, **self._call.kwargs)
        except TypeError as error:
            raise self._fail(f"cannot be bound ({error})") from error
        parameters = list(signature.parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if bound.arguments.get(parameter.name):
                    raise self._fail("takes variable arguments")
                continue
            value = bound.arguments.get(parameter.name, parameter.default)
            default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
            made = self._graph.create_node("placeholder", parameter.name, default, {}, parameter.name)
            if isinstance(value, fx.Node) and value in self._made and not self._call.path:
                raise self._fail("was given one tensor twice")  # other callers of the model may give two
            if isinstance(value, fx.Node):
                self._made[value] = made
            elif isinstance(value, (tuple, list, dict)) and value:
                raise self._fail("takes tensors in containers")

    def _child(self, child: ModuleCall) -> None:
        if not child.path.startswith(self._prefix):
            raise self._fail(f"calls {child.path}, which is outside of it")
        args = tuple(self._map(item) for item in child.args)
        kwargs = {key: self._map(item) for key, item in child.kwargs.items()}
        made = self._graph.call_module(child.path[len(self._prefix) :], args, kwargs)
        self._unpack(child.output, made)

    def _unpack(self, output: Any, made: fx.Node) -> None:
        if isinstance(output, fx.Node):
            self._made[output] = made
        elif isinstance(output, dict):
            for key, item in output.items():
                self._unpack(item, self._graph.call_function(operator.getitem, (made, key)))
        elif isinstance(output, (tuple, list)):
            for position, item in enumerate(output):
                self._unpack(item, self._graph.call_function(operator.getitem, (made, position)))

    def _operation(self, node: fx.Node, number: int) -> None:
        if node.meta["name"] == "batch_norm" or node.target in (setattr, opaque_call, scripted_call):
            raise self._fail(f"calls {node.meta['name']} itself")
        args = [self._argument(item, number, (i,)) for i, item in enumerate(node.args)]
        kwargs = {key: self._argument(item, number, (key,)) for key, item in node.kwargs.items()}
        if node.meta["name"] in ("dropout", "feature_dropout", "alpha_dropout") and args[-1] is False:
            args[-1] = self._graph.get_attr("training")
        self._made[node] = self._graph.create_node(node.op, node.target, tuple(args), kwargs)

    def _argument(self, value: Any, number: int, place: tuple[int | str, ...]) -> Any:
        if isinstance(value, (SizeInt, SizeFloat)):
            return self._expression(value.expression)
        if type(value) is int:
            return self._literal(number, place, value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._argument(item, number, (*place, i)) for i, item in enumerate(value))
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return slice(*(self._argument(item, number, (*place, i)) for i, item in enumerate(parts)))
        return self._map(value)

    def _map(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, (SizeInt, SizeFloat)):
            return self._expression(value.expression)
        if isinstance(value, dict):
            return {key: self._map(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._map(item) for item in value)
        if isinstance(value, torch.device) and self._made:
            # The trace ran elsewhere: tensors are made where the first argument is.
            return self._graph.call_function(getattr, (next(iter(self._made.values())), "device"))
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, slice, type(...))):
            return value
        raise self._fail(f"uses a {type(value).__name__}")

    def _node(self, node: fx.Node) -> fx.Node:
        made = self._made.get(node)
        if made is None:
            name = str(node.target)
            if node.meta["name"] != "parameter" or not name.startswith(self._prefix):
                raise self._fail(f"uses {node.meta['name']}, which it does not get as an argument")
            made = self._made[node] = self._graph.get_attr(name[len(self._prefix) :])
        return made

    def _expression(self, expression: Expression) -> Any:
        if isinstance(expression, Constant):
            return expression.value
        if isinstance(expression, Dim):
            return self._graph.call_method("size", (self._node(self._trace.nodes[expression.node]), expression.dim))
        if isinstance(expression, Attribute):
            return self._attribute(expression)
        assert isinstance(expression, Arithmetic)
        operands = [self._expression(expression.left)]
        if expression.right is not None:
            operands.append(self._expression(expression.right))
        return self._graph.call_function(expression.function, tuple(operands))

    def _attribute(self, attribute: Attribute) -> Any:
        if attribute.module != self._call.path and not attribute.module.startswith(self._prefix):
            raise self._fail(f"uses {attribute}, which is outside of it")
        names = [step for step in attribute.chain if isinstance(step, str)]
        inner = attribute.module[len(self._prefix) :] if attribute.module != self._call.path else ""
        value = self._graph.get_attr(".".join([*filter(None, [inner]), *names]))
        for step in attribute.chain:
            if isinstance(step, int):
                value = self._graph.call_function(operator.getitem, (value, step))
        return value


def rewritten_class(base: type[nn.Module], graph: fx.Graph) -> type[nn.Module]:
    """A subclass of `base` whose forward runs `graph`; it can be pickled, together with the graph."""
    targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    made = fx.GraphModule(dict.fromkeys(targets), graph)
    body = {"forward": type(made).forward, "__doc__": f"{base.__name__} with sizes that were literals changed.",
            "structprune_graph": graph, "__module__": base.__module__, "__qualname__": base.__qualname__}  # fmt: skip
    return _metaclass(type(base))(base.__name__, (base,), body)


class _Rewritten(type):
    """The class of rewritten classes: no import finds them, so pickle has to be told what they are made of."""


@cache
def _metaclass(kind: type) -> type:
    """`kind`, or a subclass of it, of which pickle knows how its instances are made."""
    if issubclass(kind, _Rewritten):
        return kind
    found = _Rewritten if kind is type else type("_Rewritten", (_Rewritten, kind), {})
    copyreg.pickle(found, _made_of)
    return found


def _made_of(kind: Any) -> tuple[Callable[..., type[nn.Module]], tuple[type[nn.Module], fx.Graph]]:
    # A copy: the graph itself belongs to the module of which the class has its forward.
    graph = fx.Graph()
    graph.output(graph.graph_copy(kind.structprune_graph, {}))
    return rewritten_class, (kind.__bases__[0], graph)


def can_be_rebuilt(trace: Trace, call: ModuleCall) -> bool:
    """Whether the forward of the module of `call` can run as a graph with another literal in it."""
    if trace.real or trace.answers:
        return False  # surgery traces on stand-ins without values
    if call.module._forward_hooks or call.module._forward_pre_hooks:
        return False  # what hooks do is in the trace of the module, not in its forward
    try:
        module_graph(trace, call.path, lambda _number, _place, old: old)
    except TraceError:
        return False
    return True
