"""What ``model.config`` must say once layers are gone, where the class of a model is built from one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

from torch import nn

from structprune.planning.built_from_config import (
    Numbers,
    UnknownError,
    is_built_from_config,
    numbers_in,
    rebuilt,
    state_shapes,
)
from structprune.planning.configured_part import ConfiguredPart, described_module, part_like
from structprune.tracing.state import is_config
from structprune.tracing.trace import preserved_random_state

# Classes are built for the check; more combinations than these are not tried.
TRIES = 32
Setting = tuple[str, Any, Any]  # name, value before, value after


def repair_config(
    model: nn.Module,
    shortened: Mapping[str, tuple[int, Sequence[int]]],
    thinner: Sequence[str],
    undo: list[Callable[[], None]],
) -> str:
    """Make the settings of `model` say that its lists are shorter, if they can.

    A number of layers is a number in the configuration that is the length of a list; a list of as many entries says
    something of each layer. Which of them change is tried: the class built from the new configuration must have the
    very tensors of the model.

    Args:
        model: the smaller model.
        shortened: length before, and places that are left, of each list that lost items, by its path.
        thinner: paths of modules that lost tensors of their own, which no configuration can describe.
        undo: gets what takes the change back.

    Returns:
        Why the configuration had to stay as it is; empty if it did not.
    """
    if not is_built_from_config(model) or not (shortened or thinner):
        return ""
    inside = tuple(f"{path}." for path in thinner)
    lacks = f"a model built from it has what {', '.join(thinner[:3])} lost; structprune.save and load keep it"
    if not shortened:
        return lacks
    with preserved_random_state():
        for settings in islice(_choices(model.config, shortened), TRIES):
            built = _built(model, settings)
            if built is not None and _is_like(built, model, inside):
                for one in _all_configs(model):
                    _keep(one, undo)
                    _set(one, settings)
                return lacks if thinner and state_shapes(built).keys() - state_shapes(model).keys() else ""
    return "no numbers in it give a model with these layers left; structprune.save and load keep them"


def _built(model: nn.Module, settings: Sequence[Setting]) -> nn.Module | None:
    """The class of `model`, built from its configuration with these settings; None if it cannot be built."""
    changed = copy.deepcopy(model.config)
    for one in _configs(changed):
        _set(one, settings)
    try:
        return rebuilt(type(described_module(model)[1]), changed)
    except UnknownError:
        return None


def _is_like(built: nn.Module, model: nn.Module, inside: tuple[str, ...]) -> bool:
    """Whether `built` has the modules and tensors of `model`, and others only in the modules `inside`."""
    try:
        part = _part(model, built)
    except UnknownError:
        return False
    shapes, wanted = state_shapes(built), state_shapes(model) if part is None else part.shapes(model)
    same = all(shapes.get(name) == shape for name, shape in wanted.items())
    more = shapes.keys() - wanted.keys()
    return same and all(f"{name}.".startswith(inside) for name in more) and _alike(built, model, inside, part)


def _part(model: nn.Module, built: nn.Module) -> ConfiguredPart | None:
    """Where the modules of `built` are in `model`, if something stands around them; None if not.

    A model that lost what no configuration describes has other modules than `built`.
    """
    return part_like(model, built) if described_module(model)[0] else None


def _keep(config: Any, undo: list[Callable[[], None]]) -> None:
    before = dict(vars(config))

    def restore() -> None:
        vars(config).clear()
        vars(config).update(before)

    undo.append(restore)


def _choices(config: Any, shortened: Mapping[str, tuple[int, Sequence[int]]]) -> Iterator[tuple[Setting, ...]]:
    """Settings that may have to change together, few numbers first; lists of the old length always change."""
    numbers: list[Setting] = []
    lists: list[Setting] = []
    for length, left in dict.fromkeys((length, tuple(left)) for length, left in shortened.values()):
        for one in _configs(config):
            held: dict[str, Any] = vars(one)
            for name, value in held.items():
                if type(value) is int and value == length:
                    numbers.append((name, value, len(left)))
                elif isinstance(value, (list, tuple)) and len(value) == length:
                    items: list[Any] = [value[place] for place in left]
                    lists.append((name, value, items if isinstance(value, list) else tuple(items)))
    numbers = list(dict.fromkeys(numbers))
    for count in range(len(numbers) + 1):
        for chosen in combinations(numbers, count):
            if len({name for name, _, _ in chosen}) == len(chosen):
                yield (*chosen, *lists)


def _set(config: Any, settings: Sequence[Setting]) -> None:
    for name, before, after in settings:
        if name in vars(config) and vars(config)[name] == before:
            vars(config)[name] = after


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    yield config
    for value in vars(config).values():
        if is_config(value) and callable(getattr(value, "to_dict", None)):
            yield from _configs(value)


def _all_configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration that a module of the model holds, once."""
    seen: set[int] = set()
    for module in model.modules():
        if is_built_from_config(module):
            for one in _configs(module.config):
                if id(one) not in seen:
                    seen.add(id(one))
                    yield one


def _alike(built: nn.Module, model: nn.Module, inside: tuple[str, ...], part: ConfiguredPart | None) -> bool:
    """Whether the modules of two models have the same names, and the same numbers and texts as attributes."""
    ours, (theirs, numbers) = dict(built.named_modules()), _held(model, part)
    if theirs.keys() - ours.keys() or not all(f"{path}.".startswith(inside) for path in ours.keys() - theirs.keys()):
        return False
    numbers = {place: value for place, value in numbers.items() if "config" not in place[1]}
    others = {place: value for place, value in numbers_in(built).items() if "config" not in place[1]}
    shared = numbers.keys() & others.keys()
    texts = all(_texts(ours[path]) == _texts(module) for path, module in theirs.items())
    return texts and all(numbers[place] == others[place] for place in shared)


def _held(model: nn.Module, part: ConfiguredPart | None) -> tuple[dict[str, nn.Module], Numbers]:
    """Modules of a model and the numbers that they hold, by the names that the class has for them."""
    modules, numbers = dict(model.named_modules()), numbers_in(model)
    if part is None:
        return modules, numbers
    modules = {part.inner[path]: module for path, module in modules.items() if path in part.inner}
    return modules, {(part.inner[path], chain): n for (path, chain), n in numbers.items() if path in part.inner}


def _texts(module: nn.Module) -> dict[str, str]:
    return {key: value for key, value in vars(module).items() if type(value) is str and key != "name_or_path"}
