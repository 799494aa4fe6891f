"""Checks of the arguments of public functions: `require` makes them before any work is done.

An error names the argument, what was given and what is allowed. What needs the model, such as whether a layer of that
name exists, is checked where it is looked up; the options of a plan, in `structprune.planning.checks`.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structprune.errors import PlanError

# So many characters of what was given are shown.
_SHOWN = 80
_PLAIN = (str, bytes, bool, int, float, type(None), tuple, list, dict, set)


@dataclass(frozen=True, slots=True)
class Check:
    """What an argument may be.

    Attributes:
        fits: whether a value may be given.
        allowed: what is allowed, for the message.
    """

    fits: Callable[[Any], bool]
    allowed: str

    @property
    def or_none(self) -> Check:
        """The same, or None."""
        return Check(lambda value: value is None or self.fits(value), f"{self.allowed}, or None")


def require(given: Mapping[str, Any], error: type[Exception] = PlanError, /, **checks: Check) -> None:
    """Check arguments by name; those of `given` that no check is for are passed over.

    Args:
        given: the arguments: ``locals()`` at the beginning of a function.
        error: what is raised.
        checks: by the name of the argument.

    Example:
        >>> require({"rows": 0}, ValueError, rows=whole(1))
        Traceback (most recent call last):
        ValueError: rows is 0; give a whole number of at least 1.
    """
    for name, check in checks.items():
        if not check.fits(given[name]):
            raise error(f"{name} is {shown(given[name])}; {check.allowed}.")


def shown(value: Any) -> str:
    """A value for a message: plain data as it is, cut where it is long, all else by its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if not isinstance(value, _PLAIN):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


# -- numbers, flags and words -----------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(least: int) -> Check:
    """A whole number of at least `least`."""
    return Check(lambda value: is_whole(value) and value >= least, f"give a whole number of at least {least}")


def real(
    *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf, below: float = math.inf
) -> Check:
    """A finite number between bounds."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    said = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))

    def fits(value: Any) -> bool:
        return is_number(value) and least <= value <= most and above < value < below

    return Check(fits, f"give a number {said}".rstrip())


FLAG = Check(lambda value: isinstance(value, bool), "give True or False")
SEED = whole(0)
TEXT = Check(lambda value: isinstance(value, str), "give a text")


def one_of(names: Collection[str]) -> Check:
    """One of these words."""
    return Check(lambda value: isinstance(value, str) and value in names, f"give one of {', '.join(map(repr, names))}")


def some_of(names: Collection[str]) -> Check:
    """Several of these words, at least one, in a tuple or a list."""

    def fits(value: Any) -> bool:
        return (
            isinstance(value, (tuple, list)) and bool(value) and all(isinstance(v, str) and v in names for v in value)
        )

    return Check(fits, f"give some of {', '.join(map(repr, names))} in a tuple")


def several(check: Check, what: str) -> Check:
    """Several numbers that all pass a check, at least one."""

    def fits(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and bool(value) and all(map(check.fits, value))

    return Check(fits, f"give {what}, in a tuple")


def pair(what: str) -> Check:
    """So many texts in a tuple, for a pair of labels say."""
    return Check(
        lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, str) for v in value),
        f"give {what}",
    )


# -- models and what goes into them -----------------------------------------------------------------------------------

MODEL = Check(lambda value: isinstance(value, nn.Module), "give the model, an nn.Module")
LAYER = Check(
    lambda value: isinstance(value, nn.Module) or (isinstance(value, str) and bool(value)),
    "a layer is a module of the model or its dotted name",
)

LAYER_OR_DIMENSION = Check(
    lambda value: (
        LAYER.fits(value)
        or (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and is_whole(value[1]))
    ),
    f"{LAYER.allowed}, or a pair of a tensor's name and a dimension",
)
INDICES = Check(
    lambda value: (
        isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes)) and all(map(is_whole, value))
    ),
    "give a list of the numbers of channels, counted from 0",
)


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _are_inputs(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if not isinstance(value, (tuple, list, Mapping)):
        return False
    leaves = list(_leaves(value))
    return not leaves or not all(isinstance(leaf, (bool, int, float, str, type(None))) for leaf in leaves)


INPUTS = Check(
    _are_inputs,
    "give a tensor, a tuple of positional arguments or a dict of keyword arguments, with tensors in them and not "
    "their shapes",
)


def instance(kind: type | tuple[type, ...], allowed: str) -> Check:
    """An object of a class."""
    return Check(lambda value: isinstance(value, kind), allowed)


def function(*arguments: str) -> Check:
    """Something to call with so many positional arguments; their names are for the message."""
    said = f"give a function of {' and '.join(arguments)}" if arguments else "give a function without arguments"

    def fits(value: Any) -> bool:
        if not callable(value) or isinstance(value, nn.Module):
            return False
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # a builtin does not tell
            return True
        try:
            signature.bind(*arguments)
        except TypeError:
            return False
        return True

    return Check(fits, said)


ON_BATCH = function("model", "batch")
OPTIMIZER = instance(torch.optim.Optimizer, "give an optimizer of torch")
DATA = Check(
    lambda value: isinstance(value, Iterable) and not isinstance(value, (Tensor, Mapping, str, bytes, nn.Module)),
    "give an iterable of batches; a single batch goes into a list",
)
PATH = Check(
    lambda value: isinstance(value, (str, os.PathLike)) and bool(os.fspath(value)) and "\0" not in str(value),
    "give the path of a file or folder",
)
