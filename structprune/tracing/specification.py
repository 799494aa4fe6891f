"""Example inputs as data: shapes and types without values, to be written to a file and traced again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def specify(value: Any) -> Any:
    """A JSON value that says what `value` looks like; a tensor becomes its shape and type."""
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [specify(item) for item in value]}
    if isinstance(value, list):
        return {"list": [specify(item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): specify(item) for key, item in value.items()}}
    return {"value": value if isinstance(value, (bool, int, float, str, type(None))) else None}


def unspecify(data: Any) -> Any:
    """Stand-ins on the ``meta`` device for what `specify` described."""
    if "tensor" in data:
        return torch.empty(data["tensor"], dtype=getattr(torch, data["dtype"]), device="meta")
    if "tuple" in data:
        return tuple(unspecify(item) for item in data["tuple"])
    if "list" in data:
        return [unspecify(item) for item in data["list"]]
    if "dict" in data:
        return {key: unspecify(item) for key, item in data["dict"].items()}
    return data["value"]
