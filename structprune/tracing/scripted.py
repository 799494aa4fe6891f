"""TorchScript inside a model: functions run as the Python that they were made from, modules are taken as a whole."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.jit import ScriptFunction, ScriptModule
from torch.jit._state import _try_get_jit_cached_function
from torch.overrides import _get_current_function_mode


@runtime_checkable
class SeesScripted(Protocol):
    """A ``TorchFunctionMode`` that is told of calls of scripted functions, which torch itself hands to no mode."""

    def scripted(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for the call of a scripted function."""
        ...


def source_of(function: Any) -> Callable[..., Any] | None:
    """The Python function that ``torch.jit.script`` compiled; None for one that was traced or loaded from a file.

    What ``torch.jit.trace`` makes is not what its Python function does: the sizes of the trace stand in it as numbers.
    """
    source = vars(function).get("_torchdynamo_inline")
    compiled = None if source is None else _try_get_jit_cached_function(source)
    return source if compiled is not None and compiled.qualified_name == function.qualified_name else None


def scripted_call(*args: Any, **kwargs: Any) -> Any:
    """Stands in graphs for the call of a compiled function whose source is not known."""
    raise NotImplementedError("A compiled function is called through the forward that calls it.")


_compiled_call: Callable[..., Any] = ScriptFunction.__call__
_lock = threading.Lock()
_watchers = 0


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What scripted functions do while a mode wants to see them; in other threads, what they always do."""
    mode = _get_current_function_mode()
    if isinstance(mode, SeesScripted) and torch._C._is_torch_function_mode_enabled():
        return mode.scripted(self, args, kwargs)
    return _compiled_call(self, *args, **kwargs)


def watch_scripted(change: int) -> None:
    """One mode more or less that is told of calls of scripted functions, in whatever thread."""
    global _watchers
    with _lock:
        _watchers += change
        ScriptFunction.__call__ = _call if _watchers else _compiled_call


def copied_module(module: ScriptModule, tensor_of: Callable[[Tensor], Tensor]) -> ScriptModule:
    """A scripted module of its own with other tensors: `tensor_of` gives them from those of `module`."""
    with torch.no_grad():
        made = copy.deepcopy(module)
    for live, part in zip(module.modules(), made.modules(), strict=True):
        for old, new in zip(_stores(live), _stores(part), strict=True):
            for name, tensor in old.items():
                if tensor is not None:
                    new[name] = tensor_of(tensor)
    return made


def _stores(module: Any) -> tuple[Any, Any]:
    """What a scripted module holds: dict-like views of its compiled object, which take tensors of any kind."""
    return module._parameters, module._buffers
