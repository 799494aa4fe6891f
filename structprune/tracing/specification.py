"""Example inputs as data: shapes and types without values, to be written to a file and traced again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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


def unspecify(data: Any) -> Any:
    """Stand-ins on the ``meta`` device for what `specify` described."""
    return _made(data, [])


def _made(data: Any, known: list[Tensor]) -> Any:
    if "again" in data:
        return known[data["again"]]
    if "tensor" in data:
        known.append(torch.empty(data["tensor"], dtype=getattr(torch, data["dtype"]), device="meta"))
        return known[-1]
    if "tuple" in data:
        return tuple(_made(item, known) for item in data["tuple"])
    if "list" in data:
        return [_made(item, known) for item in data["list"]]
    if "dict" in data:
        return {key: _made(item, known) for key, item in data["dict"].items()}
    return data["value"]
