"""Who sees what a model calls: the torch API under canonical names, and the model's modules, in this thread alone."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from structprune.tracing.opaque import OPAQUE, Opaque, opaque_of
from structprune.tracing.vocabulary import HANDED_OUT, VALUES, Call, Kind, Lookup, call_of

MOVES = frozenset({"cpu", "cuda", "pin_memory"})  # a tensor on another device is the same tensor to a graph
ASKED = VALUES - HANDED_OUT  # what Python asks for: no operation of a graph, unless it is answered with a tensor


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
        self._away = False  # inside something that is taken as a whole: what it calls is its own affair
        self._paths: dict[int, str] = {}

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

    @abstractmethod
    def _seen(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, or answer for the size of a tensor."""

    @abstractmethod
    def _called(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module of the model by `call_module`."""

    @abstractmethod
    def _leaf(
        self, opaque: Opaque, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Run the forward of a module that is declared opaque: one operation."""

    @contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """While the block runs, calls of the modules of `model` in this thread are seen too."""
        self._paths = {id(module): path for path, module in model.named_modules()}
        with _patched(model):
            _watchers().append(self)
            try:
                yield
            finally:
                _watchers().remove(self)

    def module_called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module that this thread called."""
        path = self._paths.get(id(module))
        if path is None or self._away:
            return call_module(module, *args, **kwargs)
        return self._called(path, module, args, kwargs)

    def forward_called(
        self, opaque: Opaque, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Run the forward of an opaque module that this thread called."""
        if id(module) not in self._paths or self._away:
            return forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # unlike calls of the torch API, this one arrives with the mode on
            return self._leaf(opaque, module, forward, args, kwargs)


def tensors_taken(value: Any) -> Iterator[Tensor]:
    """The tensors in the arguments of an operation in order, with repeats."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_taken(item)
    elif isinstance(value, dict):
        yield from tensors_taken(list(value.values()))
    elif isinstance(value, slice):
        yield from tensors_taken((value.start, value.stop, value.step))


def holds_tensor(result: Any) -> bool:
    """Whether what an operation returned is a tensor, or several of them."""
    return isinstance(result, Tensor) or (
        isinstance(result, (tuple, list)) and any(isinstance(item, Tensor) for item in result)
    )


_local = threading.local()
_lock = threading.Lock()
_users: Counter[int] = Counter()  # of each patch: of opaque modules by their ids, of all calls by 0
_original: list[Callable[..., Any]] = [nn.Module.__call__]


def _watchers() -> list[CallMode]:
    """The modes that watch modules in this thread, the innermost last."""
    found: list[CallMode] | None = getattr(_local, "watchers", None)
    if found is None:
        found = _local.watchers = []
    return found


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module as if nobody watched."""
    return _original[0](module, *args, **kwargs)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``nn.Module.__call__`` is while any thread watches."""
    watchers = _watchers()
    return watchers[-1].module_called(module, args, kwargs) if watchers else call_module(module, *args, **kwargs)


class _Whole:
    """The forward of an opaque module while any thread watches it; `own` is what the instance had there."""

    def __init__(self, opaque: Opaque, module: nn.Module) -> None:
        self._opaque, self._module, self._forward = opaque, module, module.forward
        self.own = {key: module.__dict__[key] for key in ("forward",) if key in module.__dict__}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watchers = _watchers()
        if not watchers:
            return self._forward(*args, **kwargs)
        return watchers[-1].forward_called(self._opaque, self._module, self._forward, args, kwargs)


@contextmanager
def _patched(model: nn.Module) -> Generator[None]:
    """While the block runs, calls of modules and forwards of opaque ones ask the watchers of their thread.

    Several threads may watch: the first puts the patches in, and the last takes them back.
    """
    opaque = [(module, o) for module in model.modules() if (o := opaque_of(module)) is not None] if OPAQUE else []
    with _lock:
        if not _users[0]:
            _original[0], nn.Module.__call__ = nn.Module.__call__, _call
        for module, declared in opaque:
            if not _users[id(module)]:
                module.__dict__["forward"] = _Whole(declared, module)
        _users.update([0, *(id(module) for module, _ in opaque)])
    try:
        yield
    finally:
        with _lock:
            _users.subtract([0, *(id(module) for module, _ in opaque)])
            if not _users[0]:
                nn.Module.__call__ = _original[0]
            for module, _ in opaque:
                if _users[id(module)] == 0:
                    del _users[id(module)]
                    module.__dict__.update(module.__dict__.pop("forward").own)
