"""Rules that come from outside: what they say nothing about stays whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from structprune.ops.context import Context, Operand
from structprune.ops.op import Result
from structprune.ops.relations import Axes, Axis


class Watched(tuple[Axis, ...]):
    """Axes of an operand that note which of them a rule looked at."""

    _seen: set[int]

    def __new__(cls, axes: Axes) -> Self:
        """Axes of which none has been asked for yet."""
        made = super().__new__(cls, axes)
        made._seen = set()
        return made

    def unseen(self) -> list[Axis]:
        """The axes that nobody asked for."""
        return [tuple.__getitem__(self, dim) for dim in range(len(self)) if dim not in self._seen]

    def __getitem__(self, at: Any) -> Any:
        places = range(len(self))[at]
        self._seen.update(places if isinstance(places, range) else [places])
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[Axis]:
        self._seen.update(range(len(self)))
        return super().__iter__()


def call_watched(
    c: Context, function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Result:
    """What a rule says; axes of its operands that it neither looked at nor returned are pinned."""
    seen: list[Watched] = []

    def watched(value: Any) -> Any:
        if isinstance(value, Operand):
            axes = Watched(value.axes)
            seen.append(axes)
            return Operand(value.node, axes)
        if isinstance(value, (tuple, list)):
            return type(value)(watched(item) for item in value)
        if isinstance(value, dict):
            return {key: watched(item) for key, item in value.items()}
        return value

    result = function(c, *watched(args), **watched(kwargs))
    if isinstance(result, list):
        result = [None if axes is None else tuple(axes) for axes in result]
    elif result is not None:
        result = tuple(result)
    for axes in seen:
        for axis in axes.unseen():
            c.pin(axis, f"the rule for {name} does not say what it is")
    return result
