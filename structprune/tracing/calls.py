"""How a run of a model is seen: the calls of the torch API under canonical names, and those of the model's modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from structprune.tracing.opaque import Opaque, opaque_of, scripted_call, source_of, watch_scripted
from structprune.tracing.state import modules_of
from structprune.tracing.vocabulary import HANDED_OUT, VALUES, Call, Kind, Lookup, call_of

MOVES = frozenset({"cpu", "cuda", "pin_memory"})  # a tensor on another device is the same tensor to a graph
ASKED = VALUES - HANDED_OUT  # what Python asks for: no operation of a graph, unless it is answered with a tensor

_CALL, _ABSENT = "_compiled_call_impl", object()


class Leaf(NamedTuple):
    """A call of a module that is declared opaque, standing for `original`; `forward` is what its hooks stand around."""

    opaque: Opaque
    module: nn.Module
    original: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CallMode(TorchFunctionMode, ABC):
    """Sees each call of the torch API while it is active, and each call of a model's modules while it is `watching`.

    Functions written in Python are opened: their bodies run under the mode, so that only builtins are seen. Questions
    that need no operation (``x.dim()``) are answered and not seen.

    Args:
        operations: what is known of the operation of a name; a Python function that is known is not opened.
    """

    def __init__(self, operations: Lookup) -> None:
        super().__init__()
        self._operations = operations
        self._opening: list[Call] = []
        self._away = False  # inside something that is taken as a whole: what it calls is not recorded

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call of the torch API."""
        kwargs = kwargs or {}
        call = call_of(func, self._operations)
        if call.kind is Kind.QUERY:
            return func(*args, **kwargs)
        if call.inside is not None and call not in self._opening:
            # One that hands itself over again although it was opened is seen as a single operation.
            self._opening.append(call)
            try:
                with self:
                    return call.inside(*args, **kwargs)
            finally:
                self._opening.pop()
        return self._seen(call, func, args, kwargs)

    def scripted(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the Python source of a scripted function; without one, it is an operation of its own."""
        source = source_of(function)
        if source is not None:
            return source(*args, **kwargs)
        with _pop_mode_temporarily():
            call = Call(f"torchscript.{function.name}", Kind.OPERATION, scripted_call, False)
            return self._seen(call, function, args, kwargs)

    @abstractmethod
    def _seen(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, or answer for the size of a tensor."""

    def _called(
        self, path: str, module: nn.Module, original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``module._call_impl``: the module of the model that was called, which stands for `original`."""
        del path, original
        return module._call_impl(*args, **kwargs)

    def _leaf(self, leaf: Leaf) -> Any:
        """Run the forward of a module that is declared opaque: one operation."""
        return leaf.forward(*leaf.args, **leaf.kwargs)

    @contextmanager
    def watching(self, model: nn.Module, originals: Mapping[int, nn.Module] = MappingProxyType({})) -> Generator[None]:
        """While the block runs, calls of the modules of `model` are seen; other models and threads are left alone.

        Args:
            model: what runs, in this thread only.
            originals: the modules that those of `model` stand for, by ``id`` of the latter.
        """
        before: list[tuple[dict[str, Any], Any]] = []
        for path, module in modules_of(model):
            state = module.__dict__
            before.append((state, state.get(_CALL, _ABSENT)))
            # What ``nn.Module.__call__`` runs in place of ``_call_impl``: this module's own, so no other is touched.
            state[_CALL] = partial(self._module, path, module, originals.get(id(module), module))
        watch_scripted(1)
        try:
            yield
        finally:
            watch_scripted(-1)
            for state, own in before:
                if own is _ABSENT:
                    del state[_CALL]
                else:
                    state[_CALL] = own

    def _module(self, path: str, module: nn.Module, original: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._away:
            return module._call_impl(*args, **kwargs)
        opaque = opaque_of(module)
        if opaque is None:
            return self._called(path, module, original, args, kwargs)
        with self._taken_whole(opaque, module, original):
            return self._called(path, module, original, args, kwargs)

    @contextmanager
    def _taken_whole(self, opaque: Opaque, module: nn.Module, original: nn.Module) -> Generator[None]:
        """While the block runs, the forward of a module declared opaque is one operation, its hooks are others."""
        forward, own = module.forward, module.__dict__.get("forward")

        def whole(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():  # unlike calls of the torch API, this one arrives with the mode on
                return self._leaf(Leaf(opaque, module, original, forward, args, kwargs))

        module.__dict__["forward"] = whole
        try:
            yield
        finally:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own


def holds_tensor(result: Any) -> bool:
    """Whether what an operation returned is a tensor, or several of them."""
    return isinstance(result, Tensor) or (
        isinstance(result, (tuple, list)) and any(isinstance(item, Tensor) for item in result)
    )


# -- what a recorder writes down, and by what its operations are found again -----------------------------------------


@dataclass(slots=True)
class ModuleCall:
    """One call of a module: where it stands, what went in and came out, and which nodes ran directly inside it."""

    path: str
    module: nn.Module
    first: int
    last: int = -1
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    output: Any = None
    mapping: type | None = None  # of the output, if it is one: `output` is a plain dict
    parent: int = -1


@dataclass(slots=True)
class Recording:
    """Everything that was seen: operations as nodes, in order, and the calls of modules around them.

    `graph` is what the nodes belong to; it has no list of them. `answers` are the values of tensors that Python was
    told, in order, and `asked` are those tensors.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: list[fx.Node] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    asked: list[fx.Node] = field(default_factory=list)


Group = tuple[str, int, str, tuple[str, ...]]  # of a `CallKey`: what only the order in which they run tells apart


class CallKey(NamedTuple):
    """What an operation is found again by, in any run of the model, of a copy or of a pruned copy.

    The numbers count equal things only. So other sizes, labels, a loss, or what other modules do do not shift them.

    Attributes:
        module: path of the module that runs the operation itself.
        call: which call of that module, in the order of the forward.
        name: canonical name of the operation.
        held: names of the model's tensors among its arguments, in order.
        occurrence: how many of the same four come before it.
    """

    module: str
    call: int
    name: str
    held: tuple[str, ...]
    occurrence: int

    @property
    def group(self) -> Group:
        """All but the occurrence."""
        return self[:4]


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of an operation in order, with repeats."""
    nodes: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), nodes.append)
    return nodes


def equal_calls(nodes: Sequence[fx.Node], calls: Sequence[ModuleCall]) -> dict[Group, list[int]]:
    """The numbers of the operations among `nodes` that run inside modules, by what they have in common."""
    counts: Counter[str] = Counter()
    places: list[tuple[str, int]] = []
    for call in calls:
        places.append((call.path, counts[call.path]))
        counts[call.path] += 1
    groups: dict[Group, list[int]] = {}
    for node in nodes:
        if node.op.startswith("call_") and node.meta["name"] != "part" and node.meta["call"] >= 0:
            held = tuple(str(n.target) for n in operands(node) if n.meta["name"] == "parameter")
            group = (*places[node.meta["call"]], node.meta["name"], held)
            groups.setdefault(group, []).append(node.meta["index"])
    return groups
