"""What a model holds, and how to run it on other tensors without changing the model.

`Holdings` lists the tensors of a model by name. `swapped_tensors` replaces them by empty ones on the ``meta`` device,
or by copies where real values are needed, replaces int attributes by tracked ones, and puts everything back afterwards:
attributes, buffers, caches, hooks, mode, random state.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from structprune.tracing.provenance import Attribute, SizeInt

INTERNAL = frozenset({
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_is_full_backward_hook", "training", "_is_hf_initialized", "_compiled_call_impl",
    "_structprune_kept", "_structprune_plans", "_structprune_offloaded",
})  # fmt: skip


_NO_TENSORS = frozenset({bool, int, float, str, type(None), dict, OrderedDict, set, tuple, list})


class Held(NamedTuple):
    """A tensor that a module holds under `name`: a parameter, a buffer or a plain attribute."""

    module: nn.Module
    key: str
    store: dict[str, Any]
    tensor: Tensor

    @property
    def temporary(self) -> bool:
        """Whether it is no part of the state dict, so that a forward is free to replace it."""
        state = self.module.__dict__
        return self.store is state or self.key in state["_non_persistent_buffers_set"]


def join(path: str, name: str) -> str:
    """Dotted name of `name` inside the module at `path`."""
    return f"{path}.{name}" if path else name


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives, whose nested generators take several times as long."""
    modules: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            modules.append((path, module))
            if children := module._modules:
                inside = [
                    (f"{path}.{key}" if path else key, child) for key, child in children.items() if child is not None
                ]
                pending += reversed(inside)
    return modules


def module_finder(model: nn.Module) -> Callable[[str], nn.Module]:
    """What ``model.get_submodule`` does, for the paths of many modules."""
    modules = dict(modules_of(model))
    return lambda path: modules[path] if path in modules else model.get_submodule(path)


def held_tensors(model: nn.Module) -> dict[str, Held]:
    """Every tensor that the modules of `model` hold, by dotted name; a tied one appears under each of its names."""
    tensors: dict[str, Held] = {}
    for path, module in modules_of(model):
        state = module.__dict__
        for store in (module._parameters, module._buffers, state):
            for key, value in store.items():
                # Of the some thirty attributes of a module most are of these types: a look at the type is cheaper.
                if type(value) not in _NO_TENSORS and isinstance(value, Tensor):
                    tensors[join(path, key)] = Held(module, key, store, value)
    return tensors


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that puts the attributes of all modules back as they are now."""
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        state = module.__dict__
        saved.append((state, dict(state)))
        for value in state.values():
            # Hooks are held in OrderedDicts: one that a forward registers, and notes in a flag, goes with that flag.
            if type(value) in (dict, OrderedDict):
                saved.append((value, dict(value)))

    def restore() -> None:
        for current, before in saved:
            current.clear()
            current.update(before)

    return restore


def track(module: str, chain: tuple[str | int, ...], value: Any) -> Any:
    """`value` with its ints tracked; itself if it holds none."""
    if type(value) is int:
        return SizeInt(value, Attribute(module, chain))
    if (
        type(value) in (tuple, list)
        and value
        and len(value) <= 64
        and all(type(item) in (int, tuple) for item in value)
    ):
        return type(value)(track(module, (*chain, i), item) for i, item in enumerate(value))
    return value


def dictionaries(model: nn.Module) -> dict[tuple[str, str], frozenset[Any]]:
    """Keys of the plain dicts that modules hold, by module path and attribute."""
    return {
        (path, name): frozenset(value)
        for path, module in modules_of(model)
        for name, value in module.__dict__.items()
        if type(value) is dict and name not in INTERNAL
    }


def caches(model: nn.Module, before: dict[tuple[str, str], frozenset[Any]]) -> tuple[tuple[str, str], ...]:
    """The dicts in which a forward has put tensors of its own since `before`: it keeps results there."""
    return tuple(
        (path, name)
        for (path, name), keys in before.items()
        if any(
            isinstance(value, Tensor) and key not in keys
            for key, value in getattr(model.get_submodule(path), name).items()
        )
    )


def is_config(value: Any) -> bool:
    """Whether `value` is an object that holds settings: it has attributes of its own and is no machinery of torch."""
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, nn.Module, Tensor))
        and not callable(value)
        and not kind.__module__.startswith(("torch", "builtins"))
    )


def _track_object(module: str, chain: tuple[str, ...], held: Any, seen: set[int], stack: ExitStack) -> None:
    if id(held) in seen:
        return
    seen.add(id(held))
    state = held.__dict__
    before = dict(state)

    def restore() -> None:
        state.clear()
        state.update(before)

    stack.callback(restore)
    for key, value in before.items():
        if is_config(value):
            _track_object(module, (*chain, key), value, seen, stack)
        else:
            state[key] = track(module, (*chain, key), value)


def tracked_object(module: str, chain: tuple[str, ...], held: Any, stack: ExitStack) -> None:
    """Track the ints of a settings object that `module` holds at `chain`, and of those in it, until `stack` ends."""
    _track_object(module, chain, held, set(), stack)


def _track_attributes(model: nn.Module, stack: ExitStack) -> None:
    seen: set[int] = set()
    for path, module in model.named_modules():
        state = module.__dict__
        for key, value in list(state.items()):
            if key in INTERNAL:
                continue
            kind = type(value)
            if kind is int or kind is tuple or kind is list:
                state[key] = track(path, (key,), value)
            elif kind not in (bool, str, float, dict, type(None)) and is_config(value):
                _track_object(path, (key,), value, seen, stack)


@contextmanager
def collection_paused() -> Generator[None]:
    """No garbage is collected while the block runs: graphs are many objects, of which few become garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_stance_lock = threading.Lock()
_stances: list[Any] = []  # the one that is set, and a place for each further trace that runs meanwhile


@contextmanager
def eager() -> Generator[None]:
    """What is compiled runs as it is written, so that its operations are seen.

    The stance is one for all threads: the first of several traces sets it, and the last one puts it back.
    """
    # Nothing can be compiled before torch._dynamo is loaded, and loading it takes a second.
    if "torch._dynamo.eval_frame" not in sys.modules:
        yield
        return
    with _stance_lock:
        _stances.append(None if _stances else torch.compiler.set_stance("force_eager"))
        if len(_stances) == 1:
            _stances[0].__enter__()
    try:
        yield
    finally:
        with _stance_lock:
            if len(_stances) > 1:
                _stances.pop()
            else:
                _stances.pop().__exit__(None, None, None)


def meta_like(tensor: Tensor) -> Tensor:
    """A tensor on the ``meta`` device of the same shape, type and class."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def copy_buffer(tensor: Tensor) -> Tensor:
    """The tensor itself if it is a parameter; else a copy, since forwards write into buffers."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


@contextmanager
def swapped_tensors(
    model: nn.Module, replace: Callable[[Tensor], Tensor], track: bool = True
) -> Generator[dict[int, str]]:
    """While the block runs, the tensors of `model` are replaced through `replace`, and its ints tracked if `track`.

    Yields the names of the replaced tensors by ``id``. Everything is put back at the end, whatever happens.
    """
    swapped: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    with ExitStack() as stack:
        stack.enter_context(eager())
        stack.callback(_snapshot(model))
        for name, held in held_tensors(model).items():
            new = swapped.get(id(held.tensor))
            if new is None:
                new = swapped[id(held.tensor)] = replace(held.tensor)
                names[id(new)] = name
            held.store[held.key] = new
        for module in model.modules():
            for key, value in list(module.__dict__.items()):
                # nn.RNNBase keeps its parameters in a list as well.
                if type(value) in (list, tuple) and any(isinstance(item, Tensor) for item in value):
                    module.__dict__[key] = type(value)(
                        swapped.get(id(item), item) if isinstance(item, Tensor) else item for item in value
                    )
        if track:
            _track_attributes(model, stack)
        yield names
