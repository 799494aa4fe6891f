"""Rules that come from outside: what they say nothing about stays whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from structprune.ops.context import Context, Operand
from structprune.ops.op import Result
from structprune.ops.relations import Row, Rows


class Watched(tuple[Row, ...]):
    """Rows of an operand that note which of them a rule looked at."""

    _seen: set[int]

    def __new__(cls, rows: Rows) -> Self:
        """Rows of which none has been asked for yet."""
        made = super().__new__(cls, rows)
        made._seen = set()
        return made

    def unseen(self) -> list[Row]:
        """The rows that nobody asked for."""
        return [tuple.__getitem__(self, dim) for dim in range(len(self)) if dim not in self._seen]

    def __getitem__(self, at: Any) -> Any:
        places = range(len(self))[at]
        self._seen.update(places if isinstance(places, range) else [places])
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[Row]:
        self._seen.update(range(len(self)))
        return super().__iter__()


def call_watched(
    c: Context, function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Result:
    """What a rule says; rows of its operands that it neither looked at nor returned are pinned."""
    seen: list[Watched] = []

    def watched(value: Any) -> Any:
        if isinstance(value, Operand):
            rows = Watched(value.rows)
            seen.append(rows)
            return Operand(value.node, rows)
        if isinstance(value, (tuple, list)):
            return type(value)(watched(item) for item in value)
        if isinstance(value, dict):
            return {key: watched(item) for key, item in value.items()}
        return value

    result = function(c, *watched(args), **watched(kwargs))
    if isinstance(result, list):
        result = [None if rows is None else tuple(rows) for rows in result]
    elif result is not None:
        result = tuple(result)
    for rows in seen:
        for row in rows.unseen():
            c.pin(row, f"the rule for {name} does not say what it is")
    return result
