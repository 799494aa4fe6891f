"""A model's class, built from its configuration with other numbers: shapes, attributes, and what it refuses."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from structprune.tracing.provenance import Arithmetic, SizeFloat, SizeInt, plain
from structprune.tracing.state import INTERNAL, is_config

Chain = tuple[str | int, ...]
Place = tuple[str, Chain]
Numbers = dict[Place, Any]


class UnknownError(Exception):
    """The configuration cannot describe what the pruned model is; the message says why."""


def is_built_from_config(model: nn.Module) -> bool:
    """Whether a model holds settings that it can be built from."""
    config = getattr(model, "config", None)
    return is_config(config) and callable(getattr(config, "to_dict", None))


def number_at(config: Any, chain: Chain) -> Any:
    """What a configuration holds at the end of a chain of names and positions, as `assign` sets it.

    Some have numbers that are refused when asked for, since layers have their own.
    """
    value = config
    for step in chain:
        if isinstance(step, int):
            value = value[step]
        else:
            value = vars(value)[step] if step in vars(value) else getattr(value, step)
    return value


def accepts(model: nn.Module, numbers: Mapping[Chain, int]) -> bool:
    """Whether the configuration of `model` can be read back with other numbers, by their chains from the model."""
    config = copy.deepcopy(model.config)
    for chain, value in numbers.items():
        assign(config, chain[1:], value)
    try:
        read_back(config)
    except UnknownError:
        return False
    return True


def read_back(config: Any) -> Any:
    """A configuration written and read, as saving and loading do: it may check its numbers, or tie them to others."""
    read = getattr(config, "from_dict", None)
    if not callable(read):
        return config
    try:
        return read(config.to_dict())
    except Exception as error:  # its checks may raise anything; it only means that it cannot be loaded
        cause = error.__cause__ or error
        raise UnknownError(f"it could not be read back ({type(cause).__name__}: {cause})") from error


def assign(config: Any, chain: Sequence[str | int], value: int) -> None:
    """Set a number in a configuration, without its own checks: those see it whole, when the class is built."""
    owner, steps = config, list(chain)
    while len(steps) > 1 and isinstance(steps[1], str):
        owner = getattr(owner, str(steps.pop(0)))
    name = str(steps[0])
    vars(owner)[name] = _replaced(vars(owner)[name], steps[1:], value)


def _replaced(value: Any, steps: Sequence[Any], new: int) -> Any:
    if not steps:
        return new
    items = list(value)
    items[steps[0]] = _replaced(items[steps[0]], steps[1:], new)
    return type(value)(items)


def rebuilt(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """An object of the class, without memory for its weights."""
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # a constructor may raise anything; it only means that this is no way to build it
        raise UnknownError(f"the class cannot be built from it ({type(error).__name__}: {error})") from error


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a state dict would hold."""
    return {name: tuple(map(int, tensor.shape)) for name, tensor in model.state_dict(keep_vars=True).items()}


def numbers_in(model: nn.Module) -> Numbers:
    """Every number in the attributes of the modules and of the settings that they hold, by its place."""
    numbers: Numbers = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in INTERNAL:
                _collect(numbers, seen, path, (key,), value)
    return numbers


def _collect(numbers: Numbers, seen: set[int], path: str, chain: tuple[str | int, ...], value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        numbers[path, chain] = value
    elif isinstance(value, (tuple, list)) and len(value) <= 64:
        for i, item in enumerate(value):
            if isinstance(item, (int, float, tuple)):
                _collect(numbers, seen, path, (*chain, i), item)
    elif is_config(value) and id(value) not in seen:
        seen.add(id(value))
        for key, item in vars(value).items():
            _collect(numbers, seen, path, (*chain, key), item)


class _IntType(type):
    """The type of `_Int`: ``int(a / b)`` of tracked numbers stays tracked, and ``isinstance(x, int)`` works on."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], SizeFloat):
            return SizeInt(int(plain(args[0])), Arithmetic("int", int, args[0].expression))
        return args[0] if len(args) == 1 and isinstance(args[0], SizeInt) else int(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)


class _Int(metaclass=_IntType):
    """Takes the place of ``int`` while a constructor runs."""


@contextmanager
def tracking_int(model: nn.Module) -> Generator[None]:
    """``int`` keeps track of numbers in the files that define the modules of `model`."""
    names = {type(module).__module__ for module in model.modules()}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules and not name.startswith("torch")]
    changed: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
    try:
        for scope in files:
            changed.append((scope, {"int": scope["int"]} if "int" in scope else {}))
            scope["int"] = _Int
        yield
    finally:
        for scope, before in changed:
            del scope["int"]
            scope.update(before)
