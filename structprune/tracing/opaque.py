"""Modules that the tracer does not look into: what users declare about their kernels.

Such a module becomes a single operation, named after its class, whose arguments are the tensors and ints that it holds,
followed by what it was called with. `structprune.ops.opaque` registers the rule that goes with it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.jit import ScriptFunction, ScriptModule
from torch.jit._state import _try_get_jit_cached_function
from torch.overrides import _get_current_function_mode

from structprune.tracing.provenance import SizeInt, plain
from structprune.tracing.state import held_tensors, join


@dataclass(frozen=True, slots=True)
class Opaque:
    """A class of modules that are taken as a whole.

    Attributes:
        name: the name of its operation.
        kind: the class.
        shape: gives, from the module and its arguments on the ``meta`` device, empty results of the right shape; None
            if the forward itself can do that.
    """

    name: str
    kind: type[nn.Module]
    shape: Callable[..., Any] | None


OPAQUE: dict[type[nn.Module], Opaque] = {}
# What scripted modules do is not seen, whatever they were made from.
SCRIPTED = Opaque("module.torchscript", ScriptModule, None)


def opaque_of(module: nn.Module) -> Opaque | None:
    """What was declared for the class of `module`, or for one whose forward it inherits."""
    if isinstance(module, ScriptModule):
        return SCRIPTED
    if not OPAQUE:
        return None
    kind = type(module)
    return next((OPAQUE[base] for base in kind.__mro__ if base in OPAQUE and kind.forward is base.forward), None)


def opaque_call(*args: Any, **kwargs: Any) -> Any:
    """Stands in graphs for the call of such a module; graphs call the module itself instead."""
    raise NotImplementedError("An opaque module is called through the module that holds it.")


def holdings(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the tracked ints of a module and its children, by dotted name."""
    tensors = {name: held.tensor for name, held in held_tensors(module).items()}
    numbers = {
        join(path, key): value
        for path, part in module.named_modules()
        for key, value in part.__dict__.items()
        if _tracked(value)
    }
    return tensors, numbers


def _tracked(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(_tracked(item) for item in value)
    return type(value) is SizeInt


@contextmanager
def untracked(module: nn.Module) -> Generator[None]:
    """While the block runs, the ints of a module are plain ones: what its forward does with them is not tracked."""
    before = [
        (part.__dict__, key, value)
        for part in module.modules()
        for key, value in part.__dict__.items()
        if _tracked(value)
    ]
    for state, key, value in before:
        state[key] = plain(value)
    try:
        yield
    finally:
        for state, key, value in before:
            state[key] = value


# -- torchScript inside a model: functions run as the Python that they were made from, modules are taken as a whole ---


@runtime_checkable
class SeesScripted(Protocol):
    """A ``TorchFunctionMode`` that sees calls of scripted functions, which torch itself hands to no mode."""

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
    """Count a mode that begins (1) or ends (-1) to see calls of scripted functions, in all threads together."""
    global _watchers
    with _lock:
        _watchers += change
        ScriptFunction.__call__ = _call if _watchers else _compiled_call


def copied_module(module: ScriptModule, tensor_of: Callable[[Tensor], Tensor]) -> ScriptModule:
    """A scripted module of its own with other tensors: `tensor_of` gives them from those of `module`."""
    with torch.no_grad():
        made = copy.deepcopy(module)
    for original, part in zip(module.modules(), made.modules(), strict=True):
        for old, new in zip(_stores(original), _stores(part), strict=True):
            for name, tensor in old.items():
                if tensor is not None:
                    new[name] = tensor_of(tensor)
    return made


def _stores(module: Any) -> tuple[Any, Any]:
    """What a scripted module holds: dict-like views of its compiled object, which take tensors of any kind."""
    return module._parameters, module._buffers
