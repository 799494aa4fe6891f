"""Who sees what a model calls: the torch API under canonical names, and the model's modules, in this thread alone."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from structprune.tracing.opaque import Opaque, opaque_of
from structprune.tracing.vocabulary import HANDED_OUT, VALUES, Call, Kind, call_of

MOVES = frozenset({"cpu", "cuda", "pin_memory"})  # a tensor on another device is the same tensor to a graph
ASKED = VALUES - HANDED_OUT  # what Python asks for: no operation of a graph, unless it is answered with a tensor


class CallMode(TorchFunctionMode, ABC):
    """Sees each call of the torch API while it is active, and each call of a model's modules while it is `watching`.

    Functions written in Python are opened: their bodies run under the mode, so that only builtins are seen. Questions
    that need no operation (``x.dim()``) are answered and not seen.

    Args:
        leaves: whether the Python function of this name is taken as a whole.
    """

    def __init__(self, leaves: Callable[[str], bool]) -> None:
        super().__init__()
        self._leaves = leaves
        self._opening: list[Call] = []
        self._away = False  # inside something that is taken as a whole: what it calls is its own affair
        self._paths: dict[int, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call of the torch API."""
        kwargs = kwargs or {}
        call = call_of(func, self._leaves)
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
        with _PATCHES.forwards(model), _PATCHES.calls():
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


def _watchers() -> list[CallMode]:
    """The modes that watch modules in this thread, the innermost last."""
    found: list[CallMode] | None = getattr(_local, "watchers", None)
    if found is None:
        found = _local.watchers = []
    return found


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module as if nobody watched."""
    return _PATCHES.original(module, *args, **kwargs)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``nn.Module.__call__`` is while any thread watches."""
    watchers = _watchers()
    return watchers[-1].module_called(module, args, kwargs) if watchers else call_module(module, *args, **kwargs)


class _Patches:
    """What is exchanged in modules while any thread watches: put in by the first, taken back by the last of them."""

    def __init__(self) -> None:
        self.original: Callable[..., Any] = nn.Module.__call__
        self._lock = threading.Lock()
        self._watching = 0
        self._whole: dict[int, int] = {}

    @contextmanager
    def calls(self) -> Generator[None]:
        """While the block runs, ``nn.Module.__call__`` asks the watchers of its thread."""
        with self._lock:
            if not self._watching:
                self.original, nn.Module.__call__ = nn.Module.__call__, _call
            self._watching += 1
        try:
            yield
        finally:
            with self._lock:
                self._watching -= 1
                if not self._watching:
                    nn.Module.__call__ = self.original

    @contextmanager
    def forwards(self, model: nn.Module) -> Generator[None]:
        """While the block runs, the forwards of modules declared opaque do so too; their hooks are seen as always."""
        found = [(module, opaque) for module in model.modules() if (opaque := opaque_of(module)) is not None]
        with self._lock:
            for module, opaque in found:
                count = self._whole[id(module)] = self._whole.get(id(module), 0) + 1
                if count == 1:
                    module.__dict__["forward"] = _Whole(opaque, module, module.__dict__.get("forward"))
        try:
            yield
        finally:
            with self._lock:
                for module, _ in found:
                    self._whole[id(module)] -= 1
                    if not self._whole[id(module)]:
                        del self._whole[id(module)]
                        own = module.__dict__.pop("forward").own
                        if own is not None:
                            module.__dict__["forward"] = own


class _Whole:
    """The forward of an opaque module while it is watched; `own` is what the instance had in its place, if anything."""

    def __init__(self, opaque: Opaque, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self._opaque, self._module, self.own = opaque, module, own
        self._forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watchers = _watchers()
        if not watchers:
            return self._forward(*args, **kwargs)
        return watchers[-1].forward_called(self._opaque, self._module, self._forward, args, kwargs)


_PATCHES = _Patches()
