"""Operations that make tensors from sizes."""

from __future__ import annotations

from typing import Any

from structprune.channels.relations import Rows
from structprune.channels.rules.table import Context, Operand, Result, operands_in, rule


@rule("zeros", "ones", "empty", "full")
def constant(c: Context, *args: Any, **kwargs: Any) -> Rows:
    """A constant: as many channels as are asked for, and any of them may go."""
    return _constant(c, args, kwargs)


@rule("new_zeros", "new_ones", "new_empty", "new_full")
def constant_like(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Rows:
    """A constant of the type of `x`."""
    return _constant(c, args, kwargs)


def _constant(c: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    given = kwargs.get("size") or args
    sizes = given[0] if given and isinstance(given[0], (tuple, list)) else given
    rows = tuple(c.axis(size) for size in c.shape)
    for size, row in zip(sizes, rows, strict=False):
        if isinstance(size, Operand):
            c.pin(row, f"its size is the value of a tensor in {c.where()}")
        c.expect(size, row)
    return rows


@rule("arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "tensor", "as_tensor",
      "scalar_tensor", "tril_indices", "triu_indices", "hann_window", "hamming_window", "new_tensor", "range",
      "from_numpy", "nonzero", "empty_strided")  # fmt: skip
def positions(c: Context, *args: Any, **kwargs: Any) -> Result:
    """Values that depend on their position."""
    return c.pin_all(list(operands_in(args, kwargs)), f"its values count positions, made by {c.where()}")


@rule("_assert", "_set_grad_enabled", "set_requires_grad", "set_data", "_assert_async", "manual_seed")
def nothing(c: Context, *_: Any, **__: Any) -> Rows:
    """No tensor comes out."""
    return ()
