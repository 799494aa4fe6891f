"""What was read from a file, before anything is done with it: its version, and the form of every field.

A plan may come from anywhere. It names tensors, modules and attributes and holds numbers; whatever else stands in it is
refused here, so that surgery meets nothing that it was not written for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

E = TypeVar("E")
Data = dict[str, Any]
# Lifts what a version wrote to the form of the next one.
Migration = Callable[[Data], Data]

# What one tensor may hold, and how deep inputs and settings may be nested: far more than any model needs.
LARGEST = 2**60
DEEPEST = 64
# How many layers, edits, inputs or names there may be: far more than any model has, and soon read.
MOST = 2**19


class FormError(Exception):
    """What was read does not have the form that it must have; the message says which part."""


def up_to_date(data: Any, current: int, migrations: Mapping[int, Migration], what: str) -> Data:
    """A JSON object of some version in the form of the current version.

    Args:
        data: what was read.
        current: the version that is written now; versions begin at 1.
        migrations: for each older version, the step to the next one.
        what: names the object in messages.

    Raises:
        FormError: it has no version, or a later one, or more objects than a model could need.
    """
    bounded(data)
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:
        raise FormError(f"{what} has no schema version")
    if schema > current:
        raise FormError(f"{what} has schema {schema}; this version reads up to {current}. Upgrade structprune")
    for version in range(schema, current):
        data = {**migrations[version](data), "schema": version + 1}
    return data


def bounded(data: Any) -> Any:
    """What was read, unchanged, after checking that it has no more objects than a model could need.

    Raises:
        FormError: it has.
    """
    level: list[Any] = [data] if isinstance(data, (dict, list)) else []
    count = 0
    while level:
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        # Most values are channels: numbers, of which there may be any number.
        level = [value for values in inner for value in values if isinstance(value, (dict, list, str))]
        level, count = [value for value in level if not isinstance(value, str)], count + len(level)
        if count > MOST:
            raise FormError(f"it holds more than {MOST:,} objects, lists and names")
    return data


@contextmanager
def json_of(what: str, raises: type[Exception]) -> Generator[None]:
    """A block that reads `what` from JSON text: whatever is wrong with the text is told by an error of one type.

    Example:
        >>> with json_of("a number", KeyError):
        ...     float("[]")
        Traceback (most recent call last):
        KeyError: "This is not the JSON of a number: ValueError: could not convert string to float: '[]'."
    """
    try:
        yield
    except (FormError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, FormError) else f"{type(error).__name__}: {error}"
        raise raises(f"This is not the JSON of {what}: {why}.") from error


def _as_tuple(value: Any) -> Any:
    """A list, and those that stand in it, as tuples."""
    if not isinstance(value, list):
        return value
    items: list[Any] = value
    return tuple(tuple(item) if isinstance(item, list) else item for item in items)


def record(kind: Callable[..., E], data: Any) -> E:
    """A record from its JSON object, whose lists are tuples.

    Raises:
        FormError: a field is missing, unknown, or holds something of another kind than it should.
    """
    name = getattr(kind, "__name__", "record")
    if not isinstance(data, dict):
        raise FormError(f"a {name} is {data!r:.60}")
    values = {key: _as_tuple(value) for key, value in data.items()}
    for key, value in values.items():
        if key not in FIELDS or not FIELDS[key](value):
            raise FormError(f"{name}.{key} is {value!r:.60}")
    try:
        return kind(**values)
    except TypeError as error:  # a field too many or too few
        raise FormError(str(error)) from error


def texts(data: Any, length: int | None = None) -> tuple[str, ...]:
    """A list of strings as a tuple.

    Raises:
        FormError: it is something else, or of another length.
    """
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise FormError(f"a list of names is {data!r:.60}")
    if length is not None and len(data) != length:
        raise FormError(f"{length} names are {data!r:.60}")
    return tuple(data)


def inputs(data: Any) -> Any:
    """The description of example inputs (see `structprune.tracing.containers`), unchanged.

    Raises:
        FormError: it describes nothing that can be made.
    """
    _inputs(data, 0, 0)
    return data


def _inputs(data: Any, depth: int, tensors: int) -> int:
    """Check a part of the description that `tensors` tensors come before; how many there are with it."""
    if not isinstance(data, dict) or depth > DEEPEST:
        raise FormError(f"a description of inputs is {data!r:.60}")
    if data.keys() == {"tensor", "dtype"}:
        if not _is_tensor(data["tensor"], data["dtype"]):
            raise FormError(f"an input is a tensor of shape {data['tensor']!r:.60} and type {data['dtype']!r:.60}")
        return tensors + 1
    if data.keys() == {"again"}:
        if type(data["again"]) is not int or not 0 <= data["again"] < tensors:
            raise FormError(f"an input is the same as number {data['again']!r:.60} of the tensors before it")
    elif data.keys() == {"value"}:
        if not isinstance(data["value"], (bool, int, float, str, type(None))):
            raise FormError(f"an input is {data['value']!r:.60}")
    else:
        for item in _contained(data):
            tensors = _inputs(item, depth + 1, tensors)
    return tensors


def _contained(data: Data) -> Iterable[Any]:
    """What the description of a container holds."""
    if data.keys() in ({"tuple"}, {"list"}) and isinstance(next(iter(data.values())), list):
        return next(iter(data.values()))
    if data.keys() == {"dict"} and isinstance(data["dict"], dict):
        return data["dict"].values()
    raise FormError(f"a description of inputs is {data!r:.60}")


def settings(data: Any) -> Data:
    """What a plan was asked for, unchanged.

    Raises:
        FormError: it is no object, or nested too deep.
    """
    if not isinstance(data, dict):
        raise FormError(f"the settings are {data!r:.60}")
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return data
    raise FormError("the settings are nested too deep")


# -- fields -----------------------------------------------------------------------------------------------------------


def _is_tensor(shape: Any, dtype: Any) -> bool:
    return (
        isinstance(shape, list)
        and all(_is_count(size) for size in shape)
        and math.prod(shape) < LARGEST
        and isinstance(dtype, str)
        and isinstance(getattr(torch, dtype, None), torch.dtype)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_text, value))


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value)) and len(set(value)) == len(value)


def _are_indices_or_none(value: Any) -> bool:
    return value is None or _are_indices(value)


def _is_number_or_none(value: Any) -> bool:
    """An attribute of a configuration may have been None, where another number gave the size."""
    return value is None or _is_number(value)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and math.isfinite(value))


def _are_sections(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_are_indices, value))


def _is_place(value: Any) -> bool:
    """Numbers and names on the way to a value inside others."""
    return isinstance(value, tuple) and all(_is_int(step) or isinstance(step, str) for step in value)


def _is_chain(value: Any) -> bool:
    """The same from a module; no name that Python gives a meaning of its own leads anywhere else."""
    return _is_place(value) and bool(value) and not any(str(step).startswith("__") for step in value)


FIELDS: dict[str, Callable[[Any], bool]] = {
    "tensor": _is_text,
    "module": _is_text,
    "layer": _is_text,
    "axis": _is_text,
    "dim": _is_count,
    "size": _is_count,
    "operation": _is_count,
    "groups": _is_count,
    "before": _is_count,
    "after": _is_count,
    "params": _is_count,
    "macs": _is_count,
    "weight_bytes": _is_count,
    "peak_activation_bytes": _is_count,
    "old": _is_number_or_none,
    "new": _is_number,
    "factor": _is_factor,
    "offset": _is_factor,
    "removed": _are_indices,
    "order": _are_indices_or_none,
    "sections": _are_sections,
    "weight": _is_text,
    "vectors": _are_texts,
    "positions": _are_indices_or_none,
    "chain": _is_chain,
    "place": _is_place,
}
