"""Nested tuples, lists and dicts, as calls take and give them: what is in them.

`torch.utils._pytree` does the same for containers that are registered with it. Arguments of recorded calls also hold
slices, and subclasses of dict and tuple that no one registered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Path = tuple[Any, ...]
"""Keys and positions that lead to something: ``("states", 0)`` is ``value["states"][0]``."""


def leaves_of(value: Any, kind: type[T], slices: bool = False) -> Iterator[T]:
    """The objects of a type in nested tuples, lists and dicts, in order; with `slices`, in bounds of slices too.

    Example:
        >>> list(leaves_of({"a": [1, (2, "b")], "c": slice(3, None)}, int))
        [1, 2]
    """
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves_of(item, kind, slices)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves_of(item, kind, slices)
    elif slices and isinstance(value, slice):
        yield from leaves_of((value.start, value.stop, value.step), kind, slices)


def located(value: Any, kind: type[T], path: Path = ()) -> Iterator[tuple[Path, T]]:
    """The objects of a type in nested tuples, lists and dicts, in order, each with the path that leads to it.

    Example:
        >>> list(located({"a": [1, (2, "b")]}, int))
        [(('a', 0), 1), (('a', 1, 0), 2)]
    """
    if isinstance(value, kind):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from located(item, kind, (*path, position))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from located(item, kind, (*path, key))


# -- example inputs as data: shapes and types without values, to be written to a file and traced again ---------------


def specify(value: Any) -> Any:
    """A JSON value that says what `value` looks like.

    A tensor becomes its shape and type; one that was there before, ``{"again": 0}`` for the first of all tensors.
    """
    return _specified(value, {})


def _specified(value: Any, known: dict[int, int]) -> Any:
    if isinstance(value, Tensor):
        if id(value) in known:
            return {"again": known[id(value)]}
        known[id(value)] = len(known)
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_specified(item, known) for item in value]}
    if isinstance(value, list):
        return {"list": [_specified(item, known) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _specified(item, known) for key, item in value.items()}}
    return {"value": value if isinstance(value, (bool, int, float, str, type(None))) else None}


def unspecify(data: Any, *, ones: bool = False) -> Any:
    """Stand-ins on the ``meta`` device for what `specify` described.

    With `ones`, whole numbers and flags are ones that have values, for forwards that look at masks.
    """
    return _made(data, [], ones)


def _made(data: Any, known: list[Tensor], ones: bool) -> Any:
    if "again" in data:
        return known[data["again"]]
    if "tensor" in data:
        dtype = getattr(torch, data["dtype"])
        if ones and not (dtype.is_floating_point or dtype.is_complex):
            # One number for all entries: a plan may come from a file, and name any shape.
            known.append(torch.ones((), dtype=dtype).expand(data["tensor"]))
        else:
            known.append(torch.empty(data["tensor"], dtype=dtype, device="meta"))
        return known[-1]
    if "tuple" in data:
        return tuple(_made(item, known, ones) for item in data["tuple"])
    if "list" in data:
        return [_made(item, known, ones) for item in data["list"]]
    if "dict" in data:
        return {key: _made(item, known, ones) for key, item in data["dict"].items()}
    return data["value"]
