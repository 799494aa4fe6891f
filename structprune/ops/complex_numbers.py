"""Complex numbers: made of two real tensors, or seen as pairs of real numbers in a last dimension."""

from __future__ import annotations

from structprune.ops import zeros
from structprune.ops.context import Context, Operand
from structprune.ops.elementwise import elementwise
from structprune.ops.op import register_op
from structprune.ops.relations import Axes
from structprune.ops.zeros import ZeroContext, Zeros

register_op("complex", "polar", zeros=zeros.by_value, elementwise=True)(elementwise)


def _pair_zeros(z: ZeroContext) -> Zeros:
    """Both numbers of a pair are zero where it is."""
    zero = z.of(z.tensors[0])
    return (*zero, False)[: len(z.axes)]


@register_op("view_as_complex", zeros=_pair_zeros, views=True)
def view_as_complex(c: Context, x: Operand) -> Axes:
    """Pairs in the last dimension become one number."""
    c.pin(x.axes[-1], f"it holds the two parts of a complex number of {c.where()}")
    return x.axes[:-1]


@register_op("view_as_real", zeros=_pair_zeros, views=True)
def view_as_real(c: Context, x: Operand) -> Axes:
    """A last dimension for the two parts of each number."""
    return (*x.axes, *c.fresh([2], f"it holds the two parts of a complex number of {c.where()}"))
