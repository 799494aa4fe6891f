"""The forward of one module, cut out of a trace as an ``fx.Graph`` that can be run and changed.

Calls of child modules stay calls, so their mode, hooks and state keep working; what the module computes itself becomes
operations, in which sizes are computed anew from the tensors. This is how a size that stands as a literal in a forward
can be changed.
"""

from __future__ import annotations

import copyreg
import inspect
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from structprune.errors import TraceError
from structprune.tracing.calls import ModuleCall
from structprune.tracing.opaque import opaque_call, scripted_call
from structprune.tracing.provenance import (
    Arithmetic,
    Attribute,
    Constant,
    Dim,
    Expression,
    SizeFloat,
    SizeInt,
    plain,
)
from structprune.tracing.trace import Trace

Literal = Callable[[int, tuple[int | str, ...], int], int]


def as_written(_number: int, _place: tuple[int | str, ...], old: int) -> int:
    """The literal that keeps all numbers."""
    return old


class Change:
    """What a forward that is cut out of a trace does otherwise than in the trace; as it stands, nothing.

    Attributes:
        zeros: whether a tensor that nothing computes any more is given back as zeros, in the shape of an argument,
            rather than as None.
        guarded: whether the forward refuses other plain arguments (flags, None) than it was traced with.
    """

    zeros = False
    guarded = False

    def value(self, node: fx.Node) -> fx.Node | None:
        """The tensor that takes the place of `node`; None where there is none."""
        return node

    def runs(self, node: fx.Node) -> bool:
        """Whether the module still runs this operation itself."""
        return True

    def calls(self, child: ModuleCall) -> bool:
        """Whether it still calls this module."""
        return True

    def reads(self, node: fx.Node) -> bool:
        """Whether something read this result of the module."""
        return True


def own_operations(trace: Trace, path: str) -> tuple[ModuleCall, list[fx.Node]]:
    """The only call of the module at `path`, and the operations that it runs itself, in order.

    Raises:
        TraceError: the module is called more than once, or not at all.
    """
    calls = [call for call in trace.calls if call.path == path]
    if len(calls) != 1:
        raise TraceError(f"{path or 'the model'} is called {len(calls)} times; a literal in it can't be rewritten")
    return calls[0], trace.own.get(path, [])


def changed_graph(trace: Trace, call: ModuleCall, change: Change) -> fx.Graph:
    """The forward of a module, as `call` ran it, with a change.

    Unlike `module_graph` it takes what the module takes, containers and any further arguments included.

    Raises:
        TraceError: the forward uses something that a graph cannot hold.
    """
    number = trace.calls.index(call)
    own = [node for node in trace.own.get(call.path, []) if node.meta["call"] == number]
    return _Builder(trace, call, own, as_written, change).build()


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
    def __init__(
        self, trace: Trace, call: ModuleCall, own: list[fx.Node], literal: Literal, change: Change | None = None
    ) -> None:
        self._trace, self._call, self._own, self._literal = trace, call, own, literal
        self._changed, self._change = change is not None, change or Change()
        self._objects: dict[int, fx.Node] = {}
        self._graph = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._numbers: dict[Expression, fx.Node] = {}  # sizes that come as plain numbers, from a caller or a child
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
            if not isinstance(event, fx.Node):
                if self._change.calls(event):
                    self._child(event)
            elif self._change.runs(event):
                self._operation(event, place[event])
        self._graph.output(self._result(self._call.output))
        for node in reversed(self._graph.nodes):
            if node.target is operator.getitem and node.meta.get("unpacked") and not node.users:
                self._graph.erase_node(node)
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
                self._variable(parameter, bound.arguments.get(parameter.name))
                continue
            value = bound.arguments.get(parameter.name, parameter.default)
            default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
            made = self._graph.create_node("placeholder", parameter.name, default, {}, parameter.name)
            if isinstance(value, fx.Node) and value in self._made and not self._call.path:
                raise self._fail("was given one tensor twice")  # other callers of the model may give two
            if isinstance(value, fx.Node):
                self._remember(value, made)
            elif self._changed:
                self._unpack(value, made)
                if self._change.guarded and _is_plain(value):
                    self._graph.call_function(as_traced, (made, plain(value), f"{parameter.name} of {self._call.path}"))
            elif isinstance(value, (tuple, list, dict)) and value:
                raise self._fail("takes tensors in containers")

    def _variable(self, parameter: inspect.Parameter, given: Any) -> None:
        """A placeholder for ``*args`` or ``**kwargs``, which only a graph with a change can hold."""
        if self._changed:
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            made = self._graph.create_node("placeholder", stars + parameter.name, (), {}, parameter.name)
            self._unpack(given, made)
        elif given:
            raise self._fail("takes variable arguments")

    def _result(self, output: Any) -> Any:
        """What the module returns; with a change, a tensor that is gone is None, or zeros where they are asked for."""
        if not self._changed or not isinstance(output, (fx.Node, dict, tuple, list)):
            return self._map(output)
        if isinstance(output, fx.Node):
            value = self._change.value(output)
            computed = value in self._made or (value is not None and value.meta["name"] == "parameter")
            return self._map(output) if computed else self._substitute(output)
        if isinstance(output, dict):
            kind = self._call.mapping if output is self._call.output else None
            if kind is None or not all(isinstance(key, str) for key in output):
                raise self._fail("returns a mapping of a kind of its own")
            return self._graph.call_function(kind, (), {key: self._result(item) for key, item in output.items()})
        return type(output)(self._result(item) for item in output)

    def _substitute(self, output: fx.Node) -> Any:
        """What is returned in place of a tensor that is gone."""
        if output in self._made:
            return self._made[output]
        return self._zeros(output) if self._change.zeros and self._change.reads(output) else None

    def _zeros(self, output: fx.Node) -> fx.Node:
        """Zeros: in the shape of an argument like `output`, else of one entry, which does for a sum of any shape."""
        given = [(n, made) for n, made in self._made.items() if isinstance(n.meta.get("shape"), tuple)]
        if not given:
            raise self._fail("takes no tensor")
        shape, dtype = output.meta["shape"], output.meta["dtype"]
        for node, made in given:
            if node.meta["shape"] == shape:
                return self._graph.call_function(torch.zeros_like, (made,), {"dtype": dtype})
        return self._graph.call_method("new_zeros", (given[0][1], (1,) * len(shape)), {"dtype": dtype})

    def _child(self, child: ModuleCall) -> None:
        if not child.path.startswith(self._prefix):
            raise self._fail(f"calls {child.path}, which is outside of it")
        args = tuple(self._map(item) for item in child.args)
        kwargs = {key: self._map(item) for key, item in child.kwargs.items()}
        made = self._graph.call_module(child.path[len(self._prefix) :], args, kwargs)
        self._unpack(child.output, made)

    def _unpack(self, output: Any, made: fx.Node) -> None:
        if isinstance(output, fx.Node):
            self._remember(output, made)
        elif isinstance(output, dict):
            for key, item in output.items():
                self._unpack(item, self._item(made, key))
        elif isinstance(output, (tuple, list)):
            for position, item in enumerate(output):
                self._unpack(item, self._item(made, position))
        elif isinstance(output, SizeInt):
            self._numbers.setdefault(output.expression, made)
        elif self._changed and not _is_plain(output):
            self._objects.setdefault(id(output), made)

    def _remember(self, node: fx.Node, made: fx.Node) -> None:
        self._made[node] = made
        value = self._change.value(node)
        if value is not None:
            self._made.setdefault(value, made)

    def _item(self, made: fx.Node, key: Any) -> fx.Node:
        item = self._graph.call_function(operator.getitem, (made, key))
        item.meta["unpacked"] = self._changed
        return item

    def _operation(self, node: fx.Node, number: int) -> None:
        if node.meta["name"] == "batch_norm" or node.target in (setattr, opaque_call, scripted_call):
            raise self._fail(f"calls {node.meta['name']} itself")
        args = [self._argument(item, number, (i,)) for i, item in enumerate(node.args)]
        kwargs = {key: self._argument(item, number, (key,)) for key, item in node.kwargs.items()}
        if node.meta["name"] == "stack" and self._changed:
            args = [[item for item in part if item is not None] if isinstance(part, list) else part for part in args]
        known = self._trace.operations(node.meta["name"])
        if known is not None and known.training_only and args[-1] is False:
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
        if id(value) in self._objects:
            return self._objects[id(value)]
        if isinstance(value, torch.device) and self._made:
            # The trace ran elsewhere: tensors are made where the first argument is.
            return self._graph.call_function(getattr, (next(iter(self._made.values())), "device"))
        if _is_plain(value):
            return value
        raise self._fail(f"uses a {type(value).__name__}")

    def _node(self, node: fx.Node) -> fx.Node | None:
        made = self._made.get(node)
        if made is None and self._changed:
            value = self._change.value(node)
            if value is None:
                return None
            node, made = value, self._made.get(value)
        if made is None:
            name = str(node.target)
            if node.meta["name"] != "parameter" or not name.startswith(self._prefix):
                raise self._fail(f"uses {node.meta['name']}, which it does not get as an argument")
            made = self._made[node] = self._graph.get_attr(name[len(self._prefix) :])
        return made

    def _expression(self, expression: Expression) -> Any:
        if isinstance(expression, Constant):
            return expression.value
        if expression in self._numbers and not self._is_known(expression):
            return self._numbers[expression]
        if isinstance(expression, Dim):
            sized = self._node(self._trace.nodes[expression.node])
            if sized is None:
                raise self._fail("uses the size of a tensor that is gone")
            return self._graph.call_method("size", (sized, expression.dim))
        if isinstance(expression, Attribute):
            return self._attribute(expression)
        assert isinstance(expression, Arithmetic)
        operands = [self._expression(expression.left)]
        if expression.right is not None:
            operands.append(self._expression(expression.right))
        return self._graph.call_function(expression.function, tuple(operands))

    def _is_known(self, expression: Expression) -> bool:
        """Whether a size can be taken where the forward itself took it, rather than from a number that it was given."""
        if isinstance(expression, Dim):
            node = self._trace.nodes[expression.node]
            value = self._change.value(node)
            return node in self._made or value in self._made or node.meta["name"] == "parameter"
        return isinstance(expression, Attribute) and f"{expression.module}.".startswith(self._prefix)

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


def as_traced(value: Any, traced: Any, what: str) -> None:
    """Refuse an argument that a rewritten forward was not made for.

    Raises:
        TraceError: it is another than it was when the forward was traced.
    """
    if value is not traced and value != traced:
        raise TraceError(
            f"The argument {what} is {value!r:.60}, and its forward was rewritten for {traced!r}. Remove the branches "
            "with example inputs for which it is called like this."
        )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, slice, type(...)))


def rewritten_class(base: type[nn.Module], graph: fx.Graph) -> type[nn.Module]:
    """A subclass of `base` whose forward runs `graph`; it can be pickled, together with the graph."""
    targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    made = fx.GraphModule(dict.fromkeys(targets), graph)
    body = {"forward": type(made).forward, "__doc__": f"{base.__name__} with a changed forward.",
            "structprune_graph": graph, "__module__": base.__module__, "__qualname__": base.__qualname__}  # fmt: skip
    return _metaclass(type(base))(base.__name__, (base,), body)


class _Rewritten(type):
    """The class of rewritten classes: no import finds them, so pickle has to be told what they are made of."""


@cache
def _metaclass(kind: type) -> type:
    """`kind`, or a subclass of it, of which pickle knows how its instances are made."""
    if issubclass(kind, _Rewritten):
        return kind
    rewritten = _Rewritten if kind is type else type("_Rewritten", (_Rewritten, kind), {})
    copyreg.pickle(rewritten, _made_of)
    return rewritten


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
