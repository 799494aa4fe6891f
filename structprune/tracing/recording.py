"""What a recorder writes down, and how it sees the calls of modules."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn

_CALL, _ABSENT = "_compiled_call_impl", object()


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
    parent: int = -1


@dataclass(slots=True)
class Recording:
    """Everything that was seen: the graph, its nodes in order, the calls of modules around them.

    `answers` are the values of tensors that Python was told, in order, and `asked` are those tensors.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: list[fx.Node] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    asked: list[fx.Node] = field(default_factory=list)


class ModuleWatcher:
    """Sees the calls of modules, and writes them into its `recording`."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self._known: dict[int, fx.Node] = {}
        self._stack: list[int] = []
        self._in_leaf = False

    @contextmanager
    def watching(self, model: nn.Module, live: Mapping[int, nn.Module] = MappingProxyType({})) -> Generator[None]:
        """Note which module of `model` each call happens in, while the block runs.

        Args:
            model: what runs.
            live: the modules to be written down in place of those that run, by ``id`` of the latter.
        """
        before: list[tuple[dict[str, Any], Any]] = []
        for path, module in model.named_modules():
            state = module.__dict__
            before.append((state, state.get(_CALL, _ABSENT)))
            # What ``nn.Module.__call__`` runs in place of ``_call_impl``: this module's own, so no other is touched.
            state[_CALL] = partial(self._call, path, module, live.get(id(module), module))
        try:
            yield
        finally:
            for state, own in before:
                if own is _ABSENT:
                    del state[_CALL]
                else:
                    state[_CALL] = own

    def _call(self, path: str, module: nn.Module, live: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a module, and write down what it was called with and which operations ran in it."""
        if self._in_leaf:
            return module._call_impl(*args, **kwargs)
        calls = self.recording.calls
        number = len(calls)
        entry = ModuleCall(path, live, len(self.recording.nodes))
        entry.parent = self._stack[-1] if self._stack else -1
        entry.args, entry.kwargs = self._known_only(args), self._known_only(kwargs)
        calls.append(entry)
        self._stack.append(number)
        try:
            with self._taken_whole(module, live):
                output = module._call_impl(*args, **kwargs)
        finally:
            self._stack.pop()
        entry.last = len(self.recording.nodes)
        entry.output = self._known_only(output)
        return output

    def _taken_whole(self, module: nn.Module, live: nn.Module) -> AbstractContextManager[None]:
        """While the block runs, the forward of `module` may be another."""
        return nullcontext()

    def _known_only(self, value: Any) -> Any:
        """`value` with tensors replaced by their nodes; a tensor not seen yet stays as it is."""
        if isinstance(value, Tensor):
            return self._known.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._known_only(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(self._known_only(item) for item in value)
        return value
