"""The mode that writes down each call of the torch API while a model runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.errors import TraceError
from structprune.tracing.calls import ASKED, MOVES, CallMode, Leaf, ModuleCall, Recording, holds_tensor
from structprune.tracing.opaque import holdings, opaque_call, untracked
from structprune.tracing.provenance import Dim, SizeFloat, SizeInt, plain, source_line
from structprune.tracing.values import Values
from structprune.tracing.vocabulary import VALUES, Call, Kind, Lookup

# Constants of more entries are not compared between a forward and its rehearsal.
_LARGEST_KEPT = 2**20


class Recorder(CallMode):
    """Records calls of the torch API into an ``fx.Graph`` while it is active.

    Args:
        names: the names of the model's tensors, by ``id``.
        operations: what is known of the operation of a name; a Python function that is known is not opened.
        meta: whether the model runs on stand-ins on the ``meta`` device.
        buffer: the real tensor of this name, if a forward on stand-ins may ask for its values.
        stands_for: what the model's own tensors, by ``id``, are replaced by where the forward reaches them nevertheless
            (through a global, say).
    """

    def __init__(
        self,
        names: dict[int, str],
        operations: Lookup,
        meta: bool,
        buffer: Callable[[str], Tensor | None] = lambda _: None,
        stands_for: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        super().__init__(operations)
        self.recording = Recording()
        self._names = names
        self._stands_for = stands_for
        self._meta = meta
        self.values = Values(self.recording.nodes, buffer, operations)
        self._known: dict[int, fx.Node] = {}
        self._referenced: list[Tensor] = []
        self._constants: dict[int, Tensor] = {}
        self._originals: dict[int, Tensor] = {}
        self._stack: list[int] = []
        self._tracked: list[SizeInt | SizeFloat] = []

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _node(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        number = len(self.recording.nodes)
        # Not by the graph's own methods: lists hold the order, and nobody asks for names that Python could take.
        node = fx.Node(self.recording.graph, f"{name}_{number}", op, target, args, kwargs)
        node.meta.update(index=number, name=name, call=self._stack[-1] if self._stack else -1)
        self.recording.nodes.append(node)
        return node

    def input_node(self) -> fx.Node:
        """A node for the next example input."""
        return self._node("placeholder", f"input_{len(self.recording.nodes)}", (), {}, "input")

    def remember(self, tensor: Tensor, node: fx.Node) -> None:
        """From now on `tensor` is what `node` made."""
        node.meta["shape"] = tuple(tensor.shape)
        node.meta["dtype"] = tensor.dtype
        node.meta["stride"] = tensor.stride()
        node.meta["device"] = tensor.device
        self._known[id(tensor)] = node
        self._referenced.append(tensor)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made `tensor`; a parameter, buffer or constant gets its node on first use."""
        node = self._known.get(id(tensor))
        if node is not None:
            return node
        name = self._names.get(id(tensor))
        if name is not None:
            node = self._node("get_attr", name, (), {}, "parameter")
        elif self._meta and tensor.is_meta and id(tensor) not in self._constants:
            raise TraceError(
                f"A tensor of shape {tuple(tensor.shape)} was made by an operation that the tracer cannot see, before "
                f"{source_line()}. Write it with torch operations, register the operation with torch.library, or "
                "declare the module that it is in with structprune.register_module_rule."
            )
        else:
            node = self._node("get_attr", f"_constant_{len(self._constants)}", (), {}, "constant")
            original = self._originals.get(id(tensor), tensor)
            if original.numel() <= _LARGEST_KEPT and not original.is_meta:
                node.meta["value"] = original.detach()
            if self._meta:
                self.values.give(node, original)
        node.meta["where"] = source_line()
        node.meta["call"] = -1
        self.remember(tensor, node)
        return node

    def _argument(self, value: Any) -> Any:
        """`value` as an argument of a node: tensors become the nodes that made them."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        kind = type(value)
        if kind in (int, float, bool, str, type(None)):
            return value
        if kind is SizeInt or kind is SizeFloat:
            self._tracked.append(value)
            return value
        if isinstance(value, (tuple, list)):
            items = [self._argument(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if kind is slice:
            return slice(self._argument(value.start), self._argument(value.stop), self._argument(value.step))
        if kind is dict:
            return {key: self._argument(item) for key, item in value.items()}
        return value

    def _on_meta(self, value: Any) -> Any:
        """Arguments with tensors from outside the model moved to the ``meta`` device."""
        if isinstance(value, Tensor):
            double = self._stands_for.get(id(value))
            if double is not None or value.is_meta:
                return value if double is None else double
            moved = self._constants.get(id(value))
            if moved is None:
                moved = self._constants[id(value)] = value.detach().to("meta")
                self._constants[id(moved)] = moved
                self._originals[id(moved)] = value
                self._referenced += [value, moved]
            return moved
        if type(value) in (tuple, list):
            return type(value)(self._on_meta(item) for item in value)
        if type(value) is dict:
            return {key: self._on_meta(item) for key, item in value.items()}
        if isinstance(value, torch.device):
            return torch.device("meta")
        return value

    # -- the mode ------------------------------------------------------------------------------------------------

    def _to_meta(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that makes or moves a tensor, with the ``meta`` device as the place."""
        known = self._operations(call.name)
        if known is not None and known.creates:
            return args, kwargs | {"device": torch.device("meta")}
        if call.name == "to":
            return tuple("meta" if isinstance(a, str) else a for a in args), kwargs
        return args, kwargs

    def _seen(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the torch API and write it down."""
        if call.kind is Kind.SIZE:
            return self._size(call, func, args, kwargs)
        if self._meta:
            args, kwargs = self._on_meta(args), self._on_meta(kwargs)
        if call.name in MOVES:
            return self._moved(func, args, kwargs)
        self._tracked = []
        before = [self._argument(value) for value in args]
        keywords = {key: self._argument(value) for key, value in kwargs.items()}
        if self._meta and call.name in VALUES:
            result = self._value(call, func, before, keywords)
        elif self._meta:
            result = self._execute(call, func, *self._to_meta(call, args, kwargs))
        else:
            result = self._execute(call, func, args, kwargs)
        self._record(call, before, keywords, result)
        if call.name in VALUES and not isinstance(result, Tensor):
            self.recording.answers.append(result)
            self.recording.asked += [value for value in before if isinstance(value, fx.Node)]
        return result

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor on another device is the same tensor to the graph."""
        if self._meta:
            return args[0]
        result = func(*args, **kwargs)
        if result is not args[0]:
            self._known[id(result)] = self.node_of(args[0])
            self._referenced.append(result)
        return result

    def _execute(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation that becomes the next node."""
        if not self._meta:
            return func(*args, **kwargs)
        result = self._shape(call, args, kwargs)
        if result is not None:
            return result
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            shaped = self._shaped_by_values(call, func, args, kwargs)
            if shaped is None:
                raise
            del error
            return shaped

    def _shape(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result on the ``meta`` device where the operation's record tells it, without running the operation.

        There many operations find the shape of their result in Python, which takes most of the time of a trace.
        """
        known = self._operations(call.name)
        if known is None or known.shape is None or not args:
            return None
        result = known.shape(*args, **kwargs)
        return args[0] if call.inplace and result is not None else result

    def _value(self, call: Call, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What Python asks of a stand-in, if that is decided by the inputs alone."""
        result = self._computed(func, args, kwargs)
        if result is None:
            raise TraceError(
                f"The forward asks for the value of a tensor that depends on weights ({call.name} at {source_line()}), "
                "which a model on the meta device cannot tell."
            )
        return result[0]

    def _computed(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The result of `func` on real values, with tensors on the ``meta`` device; None where they are unknown."""
        sources: list[fx.Node] = []
        fx.map_arg((args, kwargs), sources.append)
        if not sources or any(self.values.of(node) is None for node in sources):
            return None
        result = self.values.compute("call_function", func, args, kwargs)
        return (self._on_meta_fresh(result),)

    @staticmethod
    def _on_meta_fresh(result: Any) -> Any:
        if isinstance(result, Tensor):
            return result.to("meta")
        return tuple(t.to("meta") for t in result) if isinstance(result, tuple) else result

    def _shaped_by_values(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A result whose shape depends on values (``x[mask]``), where the inputs alone decide them; else None."""
        computed = self._computed(func, [self._argument(a) for a in args], self._argument(kwargs))
        if computed is not None:
            return computed[0]
        if call.name not in ("getitem", "setitem", "masked_select"):
            return None
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        positions: list[Any] = []
        for item in index:
            if isinstance(item, Tensor) and item.dtype is torch.bool:
                known = self.values.of(self.node_of(item))
                if known is None:
                    return None
                positions += [part.to("meta") for part in known.nonzero(as_tuple=True)]
            else:
                positions.append(item)
        return func(args[0], tuple(positions), *args[2:]) if call.name != "masked_select" else None

    def _size(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = func(*args, **kwargs)
        tensor = args[0]
        index = self.node_of(tensor).meta["index"]
        if call.name in ("numel", "nelement"):
            total: Any = 1
            for dim, size in enumerate(tensor.shape):
                total = SizeInt(size, Dim(index, dim)) * total
            return total
        if isinstance(answer, int):
            dim = plain(args[1] if len(args) > 1 else kwargs["dim"])
            return SizeInt(answer, Dim(index, dim % tensor.dim()))
        return torch.Size([SizeInt(size, Dim(index, dim)) for dim, size in enumerate(answer)])

    def _record(self, call: Call, args: list[Any], kwargs: dict[str, Any], result: Any) -> None:
        op = "call_method" if call.method else "call_function"
        target = call.target
        if target is getattr and not call.method:
            args = [*args, call.name]
        tensors = holds_tensor(result)
        if not tensors and call.name in ASKED:
            self._compared(call, args, kwargs)
            return  # its value went to Python: only possible on real tensors, where Python follows the real branch
        node = self._node(op, target, tuple(args), kwargs, call.name)
        node.meta["where"] = source_line()
        if self._tracked:
            node.meta["tracked"] = self._tracked
        if call.inplace and isinstance(args[0], fx.Node):
            node.meta["writes"] = args[0]
        node.meta["again"] = self._known.get(id(result))
        node.meta["kind"] = type(result)
        if isinstance(result, Tensor):
            self.remember(result, node)
        elif tensors:
            node.meta["shape"] = [tuple(t.shape) if isinstance(t, Tensor) else None for t in result]
            self._unpack(node, result)

    def _compared(self, call: Call, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Two tensors that Python compares as a whole must go on having the same shape."""
        sources: list[fx.Node] = []
        fx.map_arg((args, kwargs), sources.append)
        if len(sources) > 1:
            for source in sources:
                source.meta["compared"] = f"{call.name} at {source_line()}"

    def _unpack(self, node: fx.Node, result: Any) -> None:
        for position, item in enumerate(result):
            if isinstance(item, Tensor):
                part = self._node("call_function", operator.getitem, (node, position), {}, "part")
                part.meta["where"] = node.meta["where"]
                self.remember(item, part)

    # -- modules -------------------------------------------------------------------------------------------------

    def _called(
        self, path: str, module: nn.Module, original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note which module is called, and what goes in and comes out."""
        calls = self.recording.calls
        number = len(calls)
        entry = ModuleCall(path, original, len(self.recording.nodes))
        entry.parent = self._stack[-1] if self._stack else -1
        entry.args, entry.kwargs = self._known_only(args), self._known_only(kwargs)
        calls.append(entry)
        self._stack.append(number)
        try:
            output = module._call_impl(*args, **kwargs)
        finally:
            self._stack.pop()
        entry.last = len(self.recording.nodes)
        entry.output = self._known_only(output)
        entry.mapping = type(output) if isinstance(output, dict) else None
        return output

    def _leaf(self, leaf: Leaf) -> Any:
        """Run an opaque module, or what tells its results' shape, and write it down as one operation."""
        opaque, module, original, forward, args, kwargs = leaf
        if self._meta:
            args, kwargs = self._on_meta(args), self._on_meta(kwargs)
        self._tracked = []
        before = [self._argument(value) for value in (*holdings(module), *args)]
        keywords = {key: self._argument(value) for key, value in kwargs.items()}
        tracked, self._away = self._tracked, True
        try:
            with untracked(module):
                shape = opaque.shape if self._meta else None
                result = forward(*args, **kwargs) if shape is None else shape(module, *args, **kwargs)
        finally:
            self._away = False
        if not (isinstance(result, Tensor) or (isinstance(result, (tuple, list)) and result)):
            raise TraceError(
                f"{opaque.kind.__name__} is taken as a whole, but gives a {type(result).__name__}. Such a module must "
                "return a tensor, or a tuple of tensors."
            )
        self._tracked = tracked
        self._record(Call(opaque.name, Kind.OPERATION, opaque_call, False), before, keywords, result)
        node = next(node for node in reversed(self.recording.nodes) if node.target is opaque_call)
        node.meta["module"] = original
        return result

    def _known_only(self, value: Any) -> Any:
        """`value` with tensors replaced by their nodes; a tensor not seen yet stays as it is."""
        if isinstance(value, Tensor):
            return self._known.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._known_only(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(self._known_only(item) for item in value)
        return value
