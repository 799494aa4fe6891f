"""Nested tuples, lists and dicts, as calls take and give them: what is in them.

`torch.utils._pytree` does the same for containers that are registered with it. Arguments of recorded calls also hold
slices, and subclasses of dict and tuple that no one registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

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
