"""The arguments of a recorded call under the names that torch's own signature gives them.

A call may give an argument by position or by keyword, and sizes one by one or as a tuple: ``x.view(2, 8)``,
``x.view((2, 8))`` and ``x.view(size=(2, 8))`` are one call. Here each becomes the same list of named arguments, so that
nothing else has to know the spellings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from structprune.tracing.calls import operands

__all__ = ["Parameter", "arguments", "bind", "positional", "signatures", "tensors"]

# How functions and methods spell what the operator's schema calls otherwise.
_KEYWORDS = {
    "input": "self", "axis": "dim", "keepdims": "keepdim", "shape": "size", "x": "self", "dims": "dim",
    "tensor": "self", "x1": "self",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an operator: its name, what it takes, its default, and whether only a keyword gives it."""

    name: str
    kind: str
    keyword: bool
    default: Any
    required: bool


Signature = tuple[Parameter, ...]
# Where the value of a parameter stands in a call: ("at", 1), ("from", 1) for all from there on, or ("key", "dim").
Place = tuple[str, Any]


def _kind(value: Any) -> str:
    """A letter for each kind of value that overloads tell apart."""
    if isinstance(value, (Tensor, fx.Node)) or hasattr(value, "axes"):
        return "T"
    if isinstance(value, bool):
        return "b"
    if isinstance(value, int):
        return "i"
    if isinstance(value, float):
        return "f"
    if value is None:
        return "n"
    if isinstance(value, str):
        return "s"
    if isinstance(value, torch.dtype):
        return "d"
    if isinstance(value, (tuple, list)):
        inner = {_kind(item) for item in value}
        return f"[{inner.pop() if len(inner) == 1 else '*' if inner else ''}]"
    return "?"


def _kind_of_type(kind: str) -> str:
    """The letters that a parameter of this type takes."""
    optional = kind.startswith("Optional[")
    inner = kind[9:-1] if optional else kind
    known = {
        "Tensor": "T", "int": "idT", "number": "bif", "Scalar": "bif", "float": "fib", "bool": "bi", "str": "s",
        "Device": "?", "Generator": "?", "complex": "?",
    }  # fmt: skip
    letters = known.get(inner, "?" if not inner.startswith("List[") else "")
    if inner.startswith("List["):
        element = inner[5:-1].removeprefix("Optional[").rstrip("]")
        letters = {"Tensor": "[T]|[]|[*]", "int": "[i]|[]|[*]|i", "bool": "[b]|b", "float": "[f]|[i]|[*]|f|i",
                   "number": "[i]|[f]|[*]"}.get(element, "?")  # fmt: skip
    return letters + ("|n" if "|" in letters else "n") if optional else letters


def _takes(parameter: Parameter, kind: str) -> bool:
    accepted = parameter.kind
    return kind in accepted.split("|") if "|" in accepted else kind in accepted


@cache
def signatures(name: str) -> tuple[Signature, ...]:
    """The signatures of the operator of this canonical name, one an overload; empty where torch has none."""
    space, _, bare = name.rpartition("::")
    overloads: list[Signature] = []
    for schema in torch._C._jit_get_schemas_for_operator(f"{space or 'aten'}::{bare}"):
        parameters = tuple(
            Parameter(
                argument.name,
                _kind_of_type(str(argument.type)),
                argument.kwarg_only,
                argument.default_value if argument.has_default_value() else None,
                not argument.has_default_value(),
            )
            for argument in schema.arguments
        )
        if not any(p.name == "out" or "Dimname" in p.kind for p in parameters):
            overloads.append(parameters)
    return tuple(overloads)


@cache
def _python_signature(function: Callable[..., Any]) -> Signature | None:
    """The signature of a function written in Python; None if it takes any number of arguments."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    return tuple(
        Parameter(p.name, "?", p.kind is p.KEYWORD_ONLY, None if p.default is p.empty else p.default, False)
        for p in parameters
    )


@lru_cache(maxsize=65536)
def _places(name: str, kinds: tuple[str, ...], keywords: tuple[tuple[str, str], ...]) -> tuple[Signature, Any] | None:
    """The first overload that takes such a call, and where each of its parameters stands in it."""
    for signature in signatures(name):
        places = _fit(signature, kinds, dict(keywords))
        if places is not None:
            return signature, places
    return None


def _fit(signature: Signature, kinds: Sequence[str], keywords: Mapping[str, str]) -> tuple[Place | None, ...] | None:
    """Where each parameter of `signature` stands in a call of these kinds of values; None if it does not fit."""
    positions = _fit_positions([p for p in signature if not p.keyword], kinds)
    named = None if positions is None else _fit_keywords(signature, keywords, positions.keys())
    if positions is None or named is None:
        return None
    at = positions | named
    if any(p.required and p.name not in at for p in signature):
        return None
    return tuple(at.get(p.name) for p in signature)


def _fit_positions(positional: Sequence[Parameter], kinds: Sequence[str]) -> dict[str, Place] | None:
    at: dict[str, Place] = {}
    for number, kind in enumerate(kinds):
        if number >= len(positional):
            return None
        parameter = positional[number]
        if number == len(positional) - 1 and "[i]" in parameter.kind and set(kinds[number:]) <= {"i", "T"}:
            at[parameter.name] = ("from", number)  # x.view(2, 8)
            break
        if parameter.kind != "?" and not _takes(parameter, kind):
            return None
        at[parameter.name] = ("at", number)
    return at


def _fit_keywords(signature: Signature, keywords: Mapping[str, str], taken: Container[str]) -> dict[str, Place] | None:
    at: dict[str, Place] = {}
    names = {p.name: p for p in signature}
    for key, kind in keywords.items():
        name = key if key in names else _keyword(key, names)
        if name is None or name in taken or name in at:
            return None
        if names[name].kind != "?" and not _takes(names[name], kind):
            return None
        at[name] = ("key", key)
    return at


def _keyword(key: str, names: Mapping[str, Parameter]) -> str | None:
    """The name in the schema of an argument that functions and methods call `key`."""
    other = _KEYWORDS.get(key)
    if other in names:
        return other
    return next((name for name in names if _KEYWORDS.get(name) == key), None)


def bind(name: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by the names of torch's signature, in its order; None where torch does not say.

    Parameters that may be left out have their default. Sizes given one by one come as a tuple.

    Args:
        name: canonical name of the operation.
        target: what is called, for functions written in Python.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Example:
        >>> bind("transpose", None, (torch.zeros(2, 3), 0), {"dim1": 1})["dim1"]
        1
    """
    if name.startswith("python."):
        signature = _python_signature(target)
        if signature is None:
            return None
        places = _fit(signature, [_kind(a) for a in args], {key: _kind(v) for key, v in kwargs.items()})
    else:
        kinds = tuple(_kind(value) for value in args)
        fitting = _places(name, kinds, tuple((key, _kind(value)) for key, value in kwargs.items()))
        signature, places = fitting if fitting is not None else (None, None)
    if signature is None or places is None:
        return None
    bound: dict[str, Any] = {}
    for parameter, place in zip(signature, places, strict=True):
        if place is None:
            bound[parameter.name] = parameter.default
        else:
            how, where = place
            bound[parameter.name] = (
                args[where] if how == "at" else tuple(args[where:]) if how == "from" else kwargs[where]
            )
    return bound


def positional(
    name: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The same call with all that may be given by position given so, and the rest, where given, by keyword."""
    bound = bind(name, target, args, kwargs)
    if bound is None:
        return list(args), dict(kwargs)
    signature = _python_signature(target) if name.startswith("python.") else None
    keywords = {p.name for p in signature or _signature_of(name, args, kwargs) if p.keyword}
    given = set(kwargs)
    return (
        [value for key, value in bound.items() if key not in keywords],
        {key: value for key, value in bound.items() if key in keywords and (key in given or value is not None)},
    )


def _signature_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature:
    kinds = tuple(_kind(value) for value in args)
    fitting = _places(name, kinds, tuple((key, _kind(value)) for key, value in kwargs.items()))
    assert fitting is not None
    return fitting[0]


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of a recorded operation in the order of torch's signature, with repeats.

    ``torch.matmul(other=y, input=x)`` takes `x` first.
    """
    if not node.kwargs:
        return operands(node)
    nodes: list[fx.Node] = []
    fx.map_arg(tuple(arguments(node).values()), nodes.append)
    return nodes


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a recorded operation by name, as `bind` gives them; where torch is silent, by position ("0")."""
    known = node.meta.get("arguments")
    if known is None:
        args = node.args[:1] if node.target is getattr else node.args
        known = bind(node.meta["name"], node.target, args, node.kwargs)
        if known is None:
            known = {str(place): value for place, value in enumerate(args)} | dict(node.kwargs)
        node.meta["arguments"] = known
    return known
