"""The single changes by which branches leave a model, and how they are carried out and taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from structprune.surgery.edits import Rewritten, install

LISTS = (nn.Sequential, nn.ModuleList)


@dataclass(slots=True)
class Steps:
    """What is to be done, by the paths of the modules.

    Attributes:
        forwards: modules that get another forward.
        emptied: modules of which all tensors and children go.
        dropped: modules that go, or the names of tensors that do.
        shortened: items that are taken out of lists, by the path of the list.
        kept: names of tensors that stay even where the module that holds them goes, since others use them.
    """

    forwards: dict[str, Rewritten]
    emptied: list[str]
    dropped: list[str]
    shortened: dict[str, list[str]]
    kept: frozenset[str] = frozenset()


Undo = list[Callable[[], None]]


def carry_out(model: nn.Module, steps: Steps, undo: Undo) -> dict[str, str]:
    """Change `model`, and note how to take it back.

    Returns:
        The new path of each item of a list that has moved, by its old path.
    """
    for path, forward in steps.forwards.items():
        install(model.get_submodule(path), forward, undo)
    for path in steps.emptied:
        _empty(model.get_submodule(path), path, steps.kept, undo)
    for path in steps.dropped:
        _drop(model, path, steps.kept, undo)
    moved: dict[str, str] = {}
    # Inner lists first, while the paths around them are what they were.
    for path, keys in sorted(steps.shortened.items(), key=lambda item: -item[0].count(".")):
        moved |= _shorten(model.get_submodule(path), path, set(keys), undo)
    return moved


def _keep(store: dict[str, Any], undo: Undo) -> None:
    before = dict(store)

    def restore() -> None:
        store.clear()
        store.update(before)

    undo.append(restore)


def _empty(module: nn.Module, path: str, kept: frozenset[str], undo: Undo) -> None:
    for store in (module._parameters, module._buffers):
        _keep(store, undo)
        for name in store:
            if f"{path}.{name}" not in kept:
                store[name] = None
    _keep(module._modules, undo)
    for name, child in module._modules.items():
        inner = f"{path}.{name}"
        if child is not None and any(one.startswith(f"{inner}.") for one in kept):
            _empty(child, inner, kept, undo)
        else:
            module._modules[name] = None


def _drop(model: nn.Module, path: str, kept: frozenset[str], undo: Undo) -> None:
    if any(one.startswith(f"{path}.") for one in kept):
        _empty(model.get_submodule(path), path, kept, undo)
        return
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    for store in (holder._parameters, holder._buffers):
        if name in store:
            _keep(store, undo)
            store[name] = None
    children: dict[str, Any] = holder._modules
    if name in children:
        _keep(children, undo)
        # In a list each place holds a module.
        children[name] = nn.Identity() if isinstance(holder, (*LISTS, nn.ModuleDict)) else None


def _shorten(holder: nn.Module, path: str, gone: set[str], undo: Undo) -> dict[str, str]:
    """Take items out of a list; numbered ones are numbered anew, and so are numbers by which they know their place."""
    items = dict(holder._modules)
    numbered = list(items) == [str(i) for i in range(len(items))]
    left = [(key, module) for key, module in items.items() if key not in gone]
    moved: dict[str, str] = {}
    _keep(holder._modules, undo)
    holder._modules.clear()
    places = _places(list(items.values())) if numbered else []
    for number, (key, module) in enumerate(left):
        new = str(number) if numbered else key
        holder._modules[new] = module
        if new != key:
            moved[f"{path}.{key}" if path else key] = f"{path}.{new}" if path else new
            for inner, name in places:
                assert module is not None, "places are known only where each item is a module"
                part = module.get_submodule(inner)
                _keep(part.__dict__, undo)
                part.__dict__[name] = number
    return moved


def _places(items: list[nn.Module | None]) -> list[tuple[str, str]]:
    """The ints that tell each item of a list its number: path inside of the item, and attribute.

    A layer's ``attention.layer_idx`` is 0 in the first layer, 1 in the second one, and so on.
    """
    if len(items) < 2:
        return []
    places: set[tuple[str, str]] | None = None
    for number, item in enumerate(items):
        here = {
            (inner, name)
            for inner, part in (item.named_modules() if item is not None else ())
            for name, value in part.__dict__.items()
            if type(value) is int and value == number
        }
        places = here if places is None else places & here
    return sorted(places or ())


def paths_of(moved: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """The new name of each of `names`, when modules have moved."""
    names_now: dict[str, str] = {}
    for name in names:
        old = name.split(".")
        steps = list(old)
        for length in range(1, len(old) + 1):
            path = ".".join(old[:length])
            if path in moved:
                steps[length - 1] = moved[path].rpartition(".")[2]
        names_now[name] = ".".join(steps)
    return names_now
