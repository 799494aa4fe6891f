"""Operations that make tensors from sizes."""

from __future__ import annotations

from typing import Any

from structprune.ops import zeros
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Result, register_op
from structprune.ops.relations import Axes


def _zeros_of(z: zeros.ZeroContext) -> zeros.Zeros:
    return (z.node.meta["name"] in ("zeros", "new_zeros"),) * len(z.axes)


@register_op("zeros", "ones", "full", zeros=_zeros_of, creates=True)
@register_op("empty", creates=True, random=True)
def constant(c: Context, *args: Any, **kwargs: Any) -> Axes:
    """A constant: as many channels as are asked for, and any of them may go."""
    return _constant(c, args, kwargs)


def _constant(c: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes:
    given = kwargs.get("size") or args
    sizes = given[0] if given and isinstance(given[0], (tuple, list)) else given
    axes = tuple(c.new_axis(size) for size in c.shape)
    for size, axis in zip(sizes, axes, strict=False):
        if isinstance(size, Operand):
            c.pin(axis, f"its size is the value of a tensor in {c.where()}")
        c.expect(size, axis)
    return axes


@register_op("new_zeros", "new_ones", "new_full", zeros=_zeros_of, creates=True)
@register_op("new_empty", creates=True, random=True)
def constant_like(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Result:
    """A constant of the type of `x`."""
    return _constant(c, args, kwargs)


_POSITIONS = """
arange as_tensor bartlett_window blackman_window eye hamming_window hann_window kaiser_window linspace logspace
new_tensor range scalar_tensor tensor tril_indices triu_indices
"""


@register_op(*_POSITIONS.split(), creates=True)
@register_op("rand", "randn", "randint", "randperm", "empty_strided", creates=True, random=True)
@register_op("multinomial", random=True)
@register_op("from_numpy", "nonzero")
def positions(c: Context, *args: Any, **kwargs: Any) -> Result:
    """Values that depend on their position."""
    return c.pin_all(list(operands_in(args, kwargs)), f"its values count positions, made by {c.where()}")


@register_op("_assert", "_set_grad_enabled", "set_requires_grad", "set_data", "_assert_async", "manual_seed")
def nothing(c: Context, *_: Any, **__: Any) -> Axes:
    """No tensor comes out."""
    return ()
