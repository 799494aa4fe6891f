"""A rehearsal: the forward runs once more, at the widths that a plan makes, and must ask for what was foreseen.

The trace says how every int of the forward follows the channels, as far as it could follow them: an int that passed
through ``int()``, ``math.log``, ``range``, NumPy or a string has lost where it came from. So the model's own Python
runs again on stand-ins of the planned widths. Each call of the torch API must be that which was recorded, on the same
tensors, with the numbers that the trace foresees at those widths; what is not shows what no expression explains.
Results are made in the shape that is foreseen, without computing, and layers of torch itself are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isclose, isnan
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.tracing.calls import Leaf, ModuleCall
from structprune.tracing.comparing import alike, equal, is_number, items, known_layer, raised_at
from structprune.tracing.describe import describe_layers, owner
from structprune.tracing.opaque import opaque_call
from structprune.tracing.provenance import (
    Attribute,
    Expression,
    SizeFloat,
    SizeInt,
    plain,
    source_line,
)
from structprune.tracing.recorder import Recorder
from structprune.tracing.shadow import Shadow, shadow_of
from structprune.tracing.state import eager, held_tensors, meta_like, module_finder
from structprune.tracing.trace import (
    ExampleInputs,
    Trace,
    as_call,
    buffer_of_indices,
    distinct_tensors,
    map_tensors,
    named_tensors,
    preserved_random_state,
    tensors_in,
    two_samples,
)
from structprune.tracing.vocabulary import HANDED_OUT, Call, Kind, Lookup

_DEVICE: Any = Tensor.device.__get__


@dataclass(frozen=True, slots=True)
class Widths:
    """What a trace foresees of a smaller model.

    Attributes:
        shape: the shape of the result of node number `n`, or of its parts.
        number: the value of an expression.
        attributes: the attributes that surgery sets.
    """

    shape: Callable[[int], Any]
    number: Callable[[Expression], float]
    attributes: Mapping[Attribute, int]


@dataclass(frozen=True, slots=True)
class Deviation:
    """Something in the forward that is not what the trace foresees.

    Attributes:
        what: what it is.
        where: a source line.
        place: where it is in the trace: the number of the operation, and the way to one of its arguments.
        ends: whether nothing could be compared from there on.
        numbers: what was foreseen of a number, and what it became.
    """

    what: str
    where: str
    place: tuple[int | str, ...] = ()
    ends: bool = False
    numbers: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.what} at {self.where}" if self.where else self.what


class _DeviatesError(Exception):
    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what, self.where = what, source_line()


def rehearse(
    model: nn.Module,
    trace: Trace,
    example_inputs: ExampleInputs,
    operations: Lookup,
    widths: Widths,
) -> list[Deviation]:
    """What the forward of `model` does otherwise than `trace` foresees at `widths`; nothing, if all is as foreseen.

    Args:
        model: the model that was traced.
        trace: what was recorded.
        example_inputs: those of the trace.
        operations: what is known of the operation of a name.
        widths: what is foreseen.
    """
    parameters = {str(node.target): node for node in trace.all_nodes if node.meta["name"] == "parameter"}

    changed: set[str] = set()

    def replace(name: str, tensor: Tensor) -> Tensor:
        node = parameters.get(name)
        shape = tensor.shape if node is None else widths.shape(node.meta["index"])
        if tuple(shape) == tuple(tensor.shape):
            return meta_like(tensor)
        changed.add(owner(name.rpartition(".")[0]))
        smaller = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(smaller, requires_grad=False) if isinstance(tensor, nn.Parameter) else smaller

    shadow = shadow_of(model, replace, tracked=False)
    find = module_finder(shadow.model)
    for attribute, value in widths.attributes.items():
        _set(find(attribute.module), attribute.chain, value)
    describe_layers(shadow.model, changed, [])
    rehearsal = _Rehearsal(model, trace, shadow, operations, widths)
    with preserved_random_state(), torch.no_grad(), eager():
        try:
            rehearsal.run(shadow.model, example_inputs)
        except _DeviatesError as error:
            rehearsal.deviations.append(Deviation(error.what, error.where, rehearsal.place, ends=True))
        except Exception as error:  # the user's forward may raise anything at other widths
            what = f"the forward raises {type(error).__name__} ({error})"
            rehearsal.deviations.append(Deviation(what, raised_at(error), rehearsal.place, ends=True))
    return rehearsal.deviations


def _set(owner: Any, chain: tuple[str | int, ...], value: int) -> None:
    """Set the attribute at `chain`; a last int in it is a position in a tuple or list."""
    name, *rest = chain
    if rest and isinstance(rest[0], str):
        _set(getattr(owner, str(name)), tuple(rest), value)
    else:
        vars(owner)[str(name)] = _replaced(vars(owner)[str(name)], rest, value)


def _replaced(old: Any, steps: list[str | int], new: int) -> Any:
    if not steps:
        return new
    items = list(old)
    items[int(steps[0])] = _replaced(items[int(steps[0])], steps[1:], new)
    return type(old)(items)


class _Rehearsal(Recorder):
    def __init__(self, model: nn.Module, trace: Trace, shadow: Shadow, operations: Lookup, widths: Widths) -> None:
        super().__init__(shadow.names, operations, True, self._buffer, shadow.stands_for)
        self._model = model
        self.deviations: list[Deviation] = []
        self._trace, self._widths, self._shadow = trace, widths, shadow
        self._steps = [n for n in trace.all_nodes if n.op.startswith("call_") and n.meta["name"] != "part"]
        self._place = {node: number for number, node in enumerate(self._steps)}
        self._at = 0
        self._first: dict[fx.Node, fx.Node] = {}
        self._parameters = {str(n.target): n for n in trace.all_nodes if n.meta["name"] == "parameter"}
        self._answered = 0

    @property
    def place(self) -> tuple[int | str, ...]:
        """How far the rehearsal came: the number of the operation that is due."""
        return (self._steps[self._at].meta["index"] if self._at < len(self._steps) else len(self._trace.all_nodes),)

    def _buffer(self, name: str) -> Tensor | None:
        return buffer_of_indices(held_tensors(self._model)[name].tensor)

    def run(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        """Both forwards, if both were recorded."""
        args, kwargs = as_call(example_inputs)
        given = distinct_tensors((args, kwargs))
        args, kwargs = map_tensors(meta_like, (args, kwargs))
        inputs = iter([n for n in self._trace.all_nodes if n.meta["name"] == "input"])
        for training in (False, True) if self._trace.training_outputs else (False,):
            if training:
                args, kwargs = map_tensors(two_samples, (args, kwargs))
            model.train(training)
            for tensor, original in zip(distinct_tensors((args, kwargs)), given, strict=True):
                node = self.input_node()
                self.remember(tensor, node)
                self._first[node] = next(inputs)
                self.values.give(node, two_samples(original) if training else original)
            with self.watching(model, self._shadow.originals), self:
                result = model(*args, **kwargs)
            expected = self._trace.training_outputs if training else tuple(self._trace.outputs.values())
            returned = [self._first.get(self.node_of(tensor)) for _, tensor in named_tensors(result)]
            if returned != list(expected):
                raise _DeviatesError("other tensors are returned")
        if self._at < len(self._steps):
            raise _DeviatesError(f"{self._steps[self._at].meta['name']} is not called")

    # -- what was recorded ---------------------------------------------------------------------------------------

    def _next(self, name: str) -> fx.Node:
        """The recorded operation in whose place one of this name is called now."""
        if not self._is_next(name):
            due = f" in place of {self._steps[self._at].meta['name']}" if self._at < len(self._steps) else ""
            raise _DeviatesError(f"{name} is called{due}")
        return self._steps[self._at]

    def _is_next(self, name: str) -> bool:
        return self._at < len(self._steps) and self._steps[self._at].meta["name"] == name

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of `tensor`, with the recorded one that it stands for."""
        node = super().node_of(tensor)
        if node.op == "get_attr" and node not in self._first:
            recorded = self._parameters.get(str(node.target))
            if recorded is not None:
                self._first[node] = recorded
        return node

    def _made(self, node: fx.Node, shape: Any) -> Tensor:
        """A result of `node`, in the shape that is foreseen, laid out as the recorded one."""
        if shape == node.meta["shape"]:
            return torch.empty_strided(shape, node.meta["stride"], dtype=node.meta["dtype"], device="meta")
        strides = node.meta["stride"]
        order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim))
        if order == list(range(len(shape))):
            return torch.empty(shape, dtype=node.meta["dtype"], device="meta")
        back = sorted(range(len(shape)), key=order.__getitem__)
        return torch.empty([shape[dim] for dim in order], dtype=node.meta["dtype"], device="meta").permute(back)

    # -- the calls -----------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call. A stand-in is where the tensor was that it stands for: packed sequences ask for that."""
        known = self._known.get(id(args[0])) if func == _DEVICE else None
        return (
            self._first[known].meta["device"]
            if known in self._first
            else super().__torch_function__(func, types, args, kwargs)
        )

    def _size(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _execute(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = self._next(call.name)
        kind, shape = node.meta["kind"], node.meta.get("shape")
        if shape is None:
            return None if call.name == "setitem" else super()._execute(call, func, args, kwargs)
        again = node.meta["again"]
        if again is not None:
            same = next((t for t in tensors_in((args, kwargs)) if self._first.get(self.node_of(t)) is again), None)
            if same is not None:
                return same
        foreseen = self._widths.shape(node.meta["index"])
        if not isinstance(shape, list):
            return self._made(node, foreseen)
        parts = {user.args[1]: user for user in node.users if user.meta.get("name") == "part"}
        items = [
            None if item is None or i not in parts else self._made(parts[i], tuple(item))
            for i, item in enumerate(foreseen)
        ]
        return kind(items)

    def _value(self, call: Call, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        computed = self._computed(func, args, kwargs)
        if computed is not None:
            return computed[0]
        if call.name not in HANDED_OUT and self._is_next(call.name):
            return self._execute(call, func, (), {})  # positions, as many as there are
        answers = self._trace.answers
        place = len(self.recording.answers)
        if place < len(answers):
            return answers[place]
        raise _DeviatesError(f"{call.name} is called")

    def _record(self, call: Call, args: list[Any], kwargs: dict[str, Any], result: Any) -> None:
        before = len(self.recording.nodes)
        super()._record(call, args, kwargs, result)
        if len(self.recording.nodes) == before:
            return
        made, node = self.recording.nodes[before:], self._next(call.name)
        self._at += 1
        recorded = list(node.args)
        if node.target is getattr:
            recorded.pop()  # the name of the property
        if node.target is opaque_call:
            recorded, args = recorded[2:], args[2:]  # what the module holds
        self._compare(recorded, args, node, ("args",))
        self._compare(dict(node.kwargs), kwargs, node, ("kwargs",))
        self._first[made[0]] = node
        parts = {user.args[1]: user for user in node.users if user.meta.get("name") == "part"}
        for part in made[1:]:
            if part.args[1] in parts:
                self._first[part] = parts[part.args[1]]

    def _compare(self, recorded: Any, now: Any, node: fx.Node, way: tuple[int | str, ...]) -> None:
        """`now`, what a `way` leads to in a call, must be what was recorded, with each number as it is foreseen."""
        if isinstance(recorded, fx.Node):
            if not self._is_recorded(now, recorded):
                raise _DeviatesError(f"{node.meta['name']} is called on another tensor")
        elif isinstance(recorded, (tuple, list, slice, dict)):
            self._all(items(recorded), items(now), node, way)
        elif isinstance(recorded, (SizeInt, SizeFloat)):
            self._number(self._widths.number(recorded.expression), now, node, way)
        elif is_number(recorded):
            self._number(recorded, now, node, way)
        elif not alike(recorded, now) and not (isinstance(now, str) and node.meta["kind"] is type(None)):
            what = f"an argument of {node.meta['name']} becomes {now} in place of {recorded}"
            self.deviations.append(Deviation(what, source_line(), (node.meta["index"], *way)))

    def _all(self, recorded: Any, now: Any, node: fx.Node, way: tuple[int | str, ...]) -> None:
        if len(recorded) != len(now):
            raise _DeviatesError(f"{node.meta['name']} is called with another number of arguments")
        for position, (old, new) in enumerate(zip(recorded, now, strict=True)):
            self._compare(old, new, node, (*way, position))

    def _number(self, foreseen: float, now: Any, node: fx.Node, way: tuple[int | str, ...]) -> None:
        """A number that is another does not end the rehearsal: results have the shapes that are foreseen."""
        becomes = float(now) if is_number(now) else None
        alike = becomes is not None and (
            foreseen == becomes or isclose(foreseen, becomes, rel_tol=1e-9) or (isnan(foreseen) and isnan(becomes))
        )
        if not alike:
            what = f"a number in {node.meta['name']} becomes {now}, where {plain(foreseen)} is foreseen"
            numbers = None if becomes is None else (foreseen, becomes)
            self.deviations.append(Deviation(what, source_line(), (node.meta["index"], *way), numbers=numbers))

    def _is_recorded(self, now: Any, recorded: fx.Node) -> bool:
        if not isinstance(now, fx.Node):
            return False
        known = self._first.get(now)
        if known is None and recorded.meta["name"] == "constant" and now.meta["name"] == "constant":
            self._first[now] = known = recorded
            old, new = recorded.meta.get("value"), self.values.of(now)
            if old is not None and (new is None or not equal(old, new)):
                raise _DeviatesError("a constant has other values")
        return known is recorded

    def _leaf(self, leaf: Leaf) -> Any:
        call = Call(leaf.opaque.name, Kind.OPERATION, opaque_call, False)
        args, kwargs = self._on_meta(leaf.args), self._on_meta(leaf.kwargs)
        before = [{}, {}, *(self._argument(value) for value in args)]
        keywords = {key: self._argument(value) for key, value in kwargs.items()}
        result = self._execute(call, leaf.forward, args, kwargs)
        self._record(call, before, keywords, result)
        return result

    # -- layers that are passed over -----------------------------------------------------------------------------

    def _called(
        self, path: str, module: nn.Module, original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        number = len(self.recording.calls)
        call = self._trace.every_call[number] if number < len(self._trace.every_call) else None
        if call is None or call.path != path:
            raise _DeviatesError(f"{path or 'the model'} is called")
        passed = self._passed(call, module, args, kwargs) if known_layer(module) else None
        return super()._called(path, module, original, args, kwargs) if passed is None else passed

    def _takes_the_same(self, call: ModuleCall, args: tuple[Any, ...]) -> bool:
        """Whether a layer gets one tensor, and it stands for the one that it got when `call` was recorded."""
        if len(args) != 1 or len(call.args) != 1 or not isinstance(args[0], Tensor):
            return False
        source = self._known.get(id(args[0]))
        return source is not None and self._first.get(source) is call.args[0]

    def _steps_inside(self, call: ModuleCall) -> list[fx.Node]:
        """The recorded operations of a layer, if they come next and each makes a tensor of its own; else none."""
        steps = [node for node in self._trace.all_nodes[call.first : call.last] if node in self._place]
        if any("writes" in node.meta or node.meta["again"] is not None for node in steps):
            return []
        return steps if steps and self._place[steps[0]] == self._at else []

    def _passed(self, call: ModuleCall, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
        """The result of a layer of torch; None where its operations have to be looked at."""
        output = call.output
        if kwargs or not isinstance(output, fx.Node) or not self._takes_the_same(call, args):
            return None
        steps = self._steps_inside(call)
        if not steps or output.meta["index"] < call.first:
            return None
        self._at += len(steps)
        self.recording.calls.append(call)
        node = self._node("placeholder", f"passed_{len(self.recording.nodes)}", (), {}, "passed")
        with torch._C.DisableTorchFunction():  # unlike calls of the torch API, this one arrives with the mode on
            result = self._made(output, self._widths.shape(output.meta["index"]))
        self.remember(result, node)
        self._first[node] = output
        return result
