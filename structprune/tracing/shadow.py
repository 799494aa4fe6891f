"""A shadow of a model: the same tree of modules, to be traced in its place, so that the model itself is never touched.

Modules, and what they hold that leads to modules or tensors (lists, dicts, hooks, bound methods, partials, closures,
settings), are copied one level at a time; tensors are replaced, everything else is shared. Another thread may run the
model meanwhile, and whatever a forward leaves behind (buffers, caches, attributes, hooks) is left on the shadow.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from structprune.tracing.opaque import copied_module
from structprune.tracing.provenance import SizeInt
from structprune.tracing.state import INTERNAL, Held, held_tensors, is_config, modules_of, track

_INERT = frozenset({float, bool, str, type(None)})
_PLAIN = _INERT | {int, complex, bytes, SizeInt, type}
_CONTAINERS = frozenset({list, dict, OrderedDict, set})


@dataclass(frozen=True, slots=True)
class Shadow:
    """A model's double.

    Attributes:
        model: the double.
        names: the names of its tensors, by ``id``.
        originals: the model's own modules by ``id`` of their doubles.
        stands_for: the stand-in of each of the model's own tensors, by ``id`` of the latter.
    """

    model: nn.Module
    names: dict[int, str]
    originals: dict[int, nn.Module]
    stands_for: dict[int, Tensor]


def shadow_of(
    model: nn.Module,
    replace: Callable[[str, Tensor], Tensor],
    tracked: bool = True,
    held: Mapping[str, Held] | None = None,
) -> Shadow:
    """The shadow of `model`.

    Args:
        model: any module.
        replace: gives the stand-in of a tensor, from its name and itself.
        tracked: whether the int attributes of its modules and their settings remember where they came from.
        held: the tensors of `model`, where they are known.
    """
    return _Copier(tracked).run(model, replace, held_tensors(model) if held is None else held)


@dataclass
class _Copier:
    tracked: bool
    memo: dict[int, Any] = field(default_factory=dict)
    referenced: list[Any] = field(default_factory=list)

    def run(self, model: nn.Module, replace: Callable[[str, Tensor], Tensor], tensors: Mapping[str, Held]) -> Shadow:
        """Tensors first, then the modules, so that what leads to them finds their doubles."""
        names: dict[int, str] = {}
        stands_for: dict[int, Tensor] = {}
        for name, held in tensors.items():
            if id(held.tensor) not in stands_for:
                new = replace(name, held.tensor)
                self.memo[id(held.tensor)] = stands_for[id(held.tensor)] = new
                names[id(new)] = name
        modules = modules_of(model)
        self._copy_scripted(model, stands_for)
        written = [(path, module) for path, module in modules if not isinstance(module, ScriptModule)]
        for _, module in written:
            self.memo[id(module)] = object.__new__(type(module))
        for path, module in written:
            state = self.memo[id(module)].__dict__
            state.update(module.__dict__)
            same = _INERT if self.tracked else _PLAIN
            for key, value in module.__dict__.items():
                kind = type(value)
                if kind in same:
                    continue
                if kind in _CONTAINERS and not value:  # most of what a module holds are dicts without hooks
                    state[key] = kind()
                else:
                    state[key] = self.copied(value) if key in INTERNAL else self._attribute(path, (key,), value)
        originals = {id(self.memo[id(module)]): module for _, module in modules}
        return Shadow(self.memo[id(model)], names, originals, stands_for)

    def _copy_scripted(self, model: nn.Module, stands_for: dict[int, Tensor]) -> None:
        for _, module in modules_of(model):
            if isinstance(module, ScriptModule) and id(module) not in self.memo:
                made = copied_module(module, lambda tensor: stands_for[id(tensor)])
                self.memo.update((id(old), new) for old, new in zip(module.modules(), made.modules(), strict=True))

    def _attribute(self, path: str, chain: tuple[str, ...], value: Any) -> Any:
        if self.tracked and type(value) in (int, tuple, list):
            with_origin = track(path, chain, value)
            return self.copied(value) if with_origin is value else with_origin
        if is_config(value) and id(value) not in self.memo and _is_plain(value):
            new = self._shell(value)
            for key, item in value.__dict__.items():
                new.__dict__[key] = self._attribute(path, (*chain, key), item)
            return new
        return self.copied(value)

    def _shell(self, value: Any) -> Any:
        """An empty object of the same class, which is from now on the copy of `value`."""
        new = self.memo[id(value)] = object.__new__(type(value))
        self.referenced.append(value)
        return new

    def copied(self, value: Any) -> Any:
        """`value`, or a copy of it where it leads to a module or tensor of the model, or can be changed in place."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        known = self.memo.get(id(value))
        if known is not None:
            return known
        if kind in _CONTAINERS:
            return self._container(value)
        if isinstance(value, tuple):
            return self._tuple(value)
        if kind is types.MethodType:
            owner = self.copied(value.__self__)
            return value if owner is value.__self__ else types.MethodType(self.copied(value.__func__), owner)
        if kind is functools.partial:
            return self._partial(value)
        if kind is types.FunctionType:
            return self._function(value)
        if not isinstance(value, (type, Tensor, nn.Module)) and _is_plain(value):
            return self._object(value)
        return value

    def _container(self, value: Any) -> Any:
        new = self.memo[id(value)] = type(value)()
        self.referenced.append(value)
        if isinstance(value, dict):
            new.update({key: self.copied(item) for key, item in value.items()})
        elif isinstance(value, set):
            new.update(self.copied(item) for item in value)
        else:
            new.extend(self.copied(item) for item in value)
        return new

    def _tuple(self, value: Any) -> Any:
        if all(type(item) in _PLAIN for item in value):
            return value
        items = [self.copied(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _partial(self, value: functools.partial[Any]) -> Any:
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = self.copied(value.func), self.copied(value.args), self.copied(value.keywords)
        same = func is parts[0] and args is parts[1] and all(keywords[key] is item for key, item in parts[2].items())
        return value if same else functools.partial(func, *args, **keywords)

    def _function(self, value: types.FunctionType) -> Any:
        """A function whose closure or defaults lead to the model gets others: ``lambda m, x, y: y * model.gain``."""
        self.memo[id(value)] = value  # one that calls itself
        self.referenced.append(value)
        held = [_content(cell) for cell in value.__closure__ or ()]
        cells = [self.copied(item) if _leads(item) else item for item in held]
        defaults = self.copied(value.__defaults__ or ())
        if all(a is b for a, b in zip(held, cells, strict=True)) and defaults is (value.__defaults__ or defaults):
            return value
        closure = tuple(
            old if a is b else types.CellType(b) for old, a, b in zip(value.__closure__ or (), held, cells, strict=True)
        )
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults or None, closure or None)
        new.__kwdefaults__ = value.__kwdefaults__
        new.__dict__.update(value.__dict__)
        self.memo[id(value)] = new
        return new

    def _object(self, value: Any) -> Any:
        """An object of a plain class is copied only if something in it is: a hook that holds a module, say."""
        self.memo[id(value)] = value
        self.referenced.append(value)
        items = {key: self.copied(item) for key, item in value.__dict__.items()}
        if not any(_differs(items[key], item) for key, item in value.__dict__.items()):
            return value
        new = self._shell(value)
        new.__dict__.update(items)
        return new


def _differs(new: Any, old: Any) -> bool:
    """Whether a copy is more than another container of the same."""
    if new is old:
        return False
    if type(old) in (dict, OrderedDict):
        return any(_differs(new[key], item) for key, item in old.items())
    if type(old) is list:
        return any(_differs(a, b) for a, b in zip(new, old, strict=True))
    return type(old) is not set or any(item not in old for item in new)


def _leads(value: Any) -> bool:
    """Whether a value in a closure may lead to the model; its containers are the function's own to change."""
    return isinstance(value, (nn.Module, Tensor, types.MethodType, types.FunctionType, functools.partial))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _is_plain(value: Any) -> bool:
    """Whether `value` is an object of a class written in Python that keeps all its state in ``__dict__``."""
    kind = type(value)
    return (
        kind.__new__ is object.__new__
        and hasattr(value, "__dict__")
        and not kind.__module__.startswith(("torch", "builtins", "threading", "logging"))
        and kind.__basicsize__ <= object.__basicsize__ + 16
    )
