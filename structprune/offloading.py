"""Weights that hooks of accelerate keep in another memory or on disk, and bring when a layer runs.

Analysis and surgery work on a double of such a model that holds all weights itself: those in memory are shared, those
on disk are mapped into memory, so that the system reads a page when it is needed and drops it when memory is short. The
result gets hooks of the same kind over its own weights; those on disk go to a new folder, which is removed when no
model needs it any more.

Hooks are known by the full names of their classes, so that nothing has to be imported to recognise them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import UnsupportedModelError
from structprune.extras import require
from structprune.tracing.shadow import shadow_of
from structprune.tracing.state import join, modules_of

# What a module that came with such hooks is marked by while it has none; copies take the mark along.
MARK = "_structprune_offloaded"
_ALIGN, _CPU = "accelerate.hooks.AlignDevicesHook", "accelerate.hooks.CpuOffload"
# What `dispatch_model` puts onto a model to warn of moving it; each is bound to that very model.
_WARNINGS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


class Placement:
    """What the hooks of one module do with its weights. A copy of a module shares it.

    Args:
        hooks: all of them, in order.
        on_disk: names, from the module, of the tensors that lie on disk.
    """

    def __init__(self, hooks: tuple[Any, ...], on_disk: frozenset[str]) -> None:
        self.hooks, self.on_disk = hooks, on_disk

    def __deepcopy__(self, memo: dict[int, Any]) -> Placement:
        """Itself: a copy would copy all weights."""
        return self


class _Folder:
    """A folder of weights that goes when nothing holds this object any more; copies of a model share it."""

    def __init__(self, beside: Path | None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="structprune-", dir=beside))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Folder:
        """Itself: the copy reads the same files."""
        return self


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate on a module, chains of them taken apart."""

    def parts(hook: Any) -> Iterator[Any]:
        if _is(hook, "accelerate.hooks.SequentialHook"):
            for part in hook.hooks:
                yield from parts(part)
        elif hook is not None:
            yield hook

    return tuple(parts(module.__dict__.get("_hf_hook")))


def _is(hook: Any, *names: str) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(hook).__mro__)


def _places(hook: Any) -> bool:
    return _is(hook, _ALIGN, _CPU)


def is_placed(model: nn.Module) -> bool:
    """Whether hooks of accelerate move the weights or activations of `model`; not of a double, whose hooks are ours."""
    modules = [module for _, module in modules_of(model)]
    if any(MARK in vars(module) for module in modules):
        return False
    return any(_places(hook) for module in modules for hook in _hooks_of(module))


# -- the double -------------------------------------------------------------------------------------------------------


def at_hand(model: nn.Module) -> nn.Module:
    """A double of `model` without hooks that move weights, holding all weights itself; other models as they are.

    Args:
        model: not wrapped.

    Raises:
        UnsupportedModelError: the hooks are of a kind that cannot be taken off.
    """
    if not is_placed(model):
        return model
    values = _values(model)
    shadow = shadow_of(model, lambda _, tensor: values.get(id(tensor), tensor), tracked=False)
    for path, module in modules_of(model):
        _strip(shadow.model.get_submodule(path), module, path)
    for name in _WARNINGS:
        shadow.model.__dict__.pop(name, None)
    _move_between_devices(shadow.model)
    return shadow.model


def _values(model: nn.Module) -> dict[int, Tensor]:
    """What stands in the place of each offloaded tensor, by its ``id``; tied ones are one."""
    values: dict[int, Tensor] = {}
    by_storage: dict[Any, Tensor] = {}
    named: dict[str, Tensor] = {}
    for path, module in modules_of(model):
        for name, tensor, hook in _offloaded(module):
            if id(tensor) not in values:
                value, place = _stored(hook, name, tensor)
                value = by_storage.setdefault(place, value) if place is not None else value
                values[id(tensor)] = value
            named[join(path, name)] = tensor
    for target, source in _tied(model):
        if target in named and source in named and named[target].shape == named[source].shape:
            values[id(named[target])] = values[id(named[source])]
    return values


def _offloaded(module: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, stand-in and hook of each tensor that a hook of this module brings."""
    for hook in _hooks_of(module):
        if not (_is(hook, _ALIGN) and hook.offload):
            continue
        for name, tensor in _brought_by(hook, module):
            if tensor.is_meta:
                yield name, tensor, hook


def _brought_by(hook: Any, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names, from its module, and tensors that an offloading hook sees to."""
    deep = hook.place_submodules
    yield from module.named_parameters(recurse=deep, remove_duplicate=False)
    if hook.offload_buffers:
        yield from module.named_buffers(recurse=deep, remove_duplicate=False)


def _stored(hook: Any, name: str, like: Tensor) -> tuple[Tensor, Any]:
    """The value of an offloaded tensor, and where it lies in memory, if it does."""
    file = _file_of(hook.weights_map, name)
    if file is None:
        value = hook.weights_map[name]
    else:
        value = torch.from_file(str(file), shared=False, size=like.numel(), dtype=like.dtype).view(like.shape)
    value = value.detach().to(like.dtype)
    if not isinstance(like, nn.Parameter):
        return value, None
    place = None
    if not _on_disk(hook.weights_map, name) and value.numel():
        place = value.data_ptr(), value.dtype, value.shape, value.stride()
    made = nn.Parameter(value, requires_grad=like.requires_grad)
    vars(made).update(vars(like))
    return made, place


def _located(weights: Any, name: str) -> tuple[Any, str]:
    """The map that holds an entry, and its name there."""
    while hasattr(weights, "prefix") and hasattr(weights, "dataset"):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    return weights, name


def _on_disk(weights: Any, name: str) -> bool:
    held, full = _located(weights, name)
    return hasattr(held, "index") and full not in held.state_dict


def _file_of(weights: Any, name: str) -> Path | None:
    """The file of an entry that holds its numbers and nothing else; None for one in memory or in a file of many."""
    if not _on_disk(weights, name):
        return None
    held, full = _located(weights, name)
    known = held.index[full]
    if known.get("safetensors_file") is not None or not held.save_folder:
        return None
    return Path(held.save_folder) / f"{full}.dat"


def _tied(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of parameters that are one, as the models of transformers tell them: files on disk no longer do."""
    for path, module in modules_of(model):
        keys = module.__dict__.get("all_tied_weights_keys")
        for target, source in (keys or {}).items():
            yield join(path, target), join(path, source)


def _strip(double: nn.Module, module: nn.Module, path: str) -> None:
    """Take the hooks that place weights off `double`, the double of `module` or itself, and leave a mark there."""
    hooks = _hooks_of(module)
    if not any(map(_places, hooks)):
        return
    if "_old_forward" not in double.__dict__ or "forward" not in double.__dict__:
        raise UnsupportedModelError(
            f"{path or 'The model'!r} is hooked by accelerate in a way that cannot be taken off. Take the hooks off "
            "with accelerate.hooks.remove_hook_from_submodules, prune the model, and put them on the result."
        )
    on_disk = frozenset(name for name, _, hook in _offloaded(module) if _on_disk(hook.weights_map, name))
    double.__dict__[MARK] = Placement(hooks, on_disk)
    _unhook(double)
    others = [hook for hook in hooks if not _places(hook)]
    for hook in others:
        require("accelerate.hooks", "A hooked model", "models").add_hook_to_module(double, hook, append=True)


def _unhook(module: nn.Module) -> None:
    old = module.__dict__.pop("_old_forward")
    del module.__dict__["_hf_hook"]
    own = isinstance(old, MethodType) and old.__self__ is module
    if own and old.__func__ is type(module).forward:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = old


def _move_between_devices(double: nn.Module) -> None:
    """Where weights lie on several devices, let hooks take activations to the weights."""
    if len({tensor.device for tensor in double.parameters()}) < 2:
        return
    hooks = require("accelerate.hooks", "A hooked model", "models")
    for _, module in modules_of(double):
        mark: Placement | None = module.__dict__.get(MARK)
        for hook in () if mark is None else mark.hooks:
            if _is(hook, _ALIGN):
                here = {tensor.device for tensor in module.parameters()}
                device = here.pop() if len(here) == 1 else hook.execution_device
                moves = hooks.AlignDevicesHook(device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys)
                hooks.add_hook_to_module(module, moves, append=True)


# -- hooks put back ---------------------------------------------------------------------------------------------------


def hooked(model: nn.Module) -> nn.Module:
    """Give a model that was made of a double the hooks that its modules are marked by; itself if none is.

    Raises:
        OSError: the weights that lie on disk cannot be written.
    """
    marked = [(path, module, module.__dict__.pop(MARK)) for path, module in modules_of(model) if MARK in vars(module)]
    if not marked:
        return model
    api = require("accelerate.hooks", "A hooked model", "models")
    weights = _new_map(marked)
    tied = {tensor.data_ptr(): {} for tensor in _held_twice(model)}
    for path, module, placement in marked:
        others = iter([hook for hook in _hooks_of(module) if not _places(hook)])
        if "_hf_hook" in module.__dict__:
            _unhook(module)
        for hook in placement.hooks:
            new = _over(hook, weights, path, tied) if _places(hook) else next(others)
            api.add_hook_to_module(module, new, append=True)
    return model


def _over(hook: Any, weights: Any, path: str, tied: dict[int, Any]) -> Any:
    """A hook of the same kind over other weights, for the module at `path`."""
    api = require("accelerate.hooks", "A hooked model", "models")
    if _is(hook, _CPU):
        return api.CpuOffload(hook.execution_device, hook.prev_module_hook)
    offload = require("accelerate.utils.offload", "A hooked model", "models")
    return api.AlignDevicesHook(
        hook.execution_device,
        offload=hook.offload,
        io_same_device=hook.io_same_device,
        weights_map=offload.PrefixedDataset(weights, f"{path}." if path else "") if hook.offload else None,
        offload_buffers=hook.offload_buffers,
        place_submodules=hook.place_submodules,
        skip_keys=hook.skip_keys,
        tied_params_map=tied,
    )


def _held_twice(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for _, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in seen:
            yield tensor
        seen.add(id(tensor))


def _new_map(marked: Iterable[tuple[str, nn.Module, Placement]]) -> Any:
    """The weights of all offloaded modules by name: those that were on disk in a folder, the others in memory."""
    offload = require("accelerate.utils.offload", "A hooked model", "models")
    memory: dict[str, Tensor] = {}
    disk: dict[str, Tensor] = {}
    beside: Path | None = None
    for path, module, placement in marked:
        for hook in placement.hooks:
            if not (_is(hook, _ALIGN) and hook.offload):
                continue
            for name, tensor in _brought_by(hook, module):
                where = disk if name in placement.on_disk else memory
                where[join(path, name)] = tensor.detach()
            beside = beside or _parent_folder(hook)
    if not disk:
        return offload.OffloadedWeightsLoader(state_dict=memory)
    folder = _Folder(beside)
    offload.offload_state_dict(str(folder.path), disk)
    loader = offload.OffloadedWeightsLoader(state_dict=memory, save_folder=str(folder.path))
    loader.folder = folder
    return loader


def _parent_folder(hook: Any) -> Path | None:
    """The folder that holds the folder of a hook's weights; None for one of many files, which need not be ours."""
    folder = getattr(_located(hook.weights_map, "")[0], "save_folder", None)
    return Path(os.path.abspath(folder)).parent if folder else None


@contextmanager
def held_in_place(model: nn.Module) -> Generator[None]:
    """While the block runs, `model` itself holds all its weights and has no hooks; afterwards hooks over what it holds.

    If the block fails, the model is as it was. Models without such hooks are left alone.
    """
    if not is_placed(model):
        yield
        return
    values = _values(model)
    before = [(store, dict(store)) for module in model.modules() for store in _stores(module)]
    try:
        for path, module in modules_of(model):
            _strip(module, module, path)
        for store, held in before:
            store.update({key: values[id(tensor)] for key, tensor in held.items() if id(tensor) in values})
        yield
        hooked(model)
    except BaseException:  # an interrupt too must leave the model as it was; raised again
        for store, held in before:
            store.clear()
            store.update(held)
        raise


def _stores(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module), module._parameters, module._buffers
