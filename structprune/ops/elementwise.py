"""Operations that treat every entry alone: channels of the same place are kept or removed together.

Whatever torch tags as pointwise belongs to this family by itself; only what differs from it is listed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from structprune.ops import zeros
from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Indices, Op, Result, Scaling, default_for_pointwise, like, register_op
from structprune.ops.relations import Axes
from structprune.tracing.provenance import SizeFloat


def same_shape(x: Any, *_: Any, **named: Any) -> Tensor | None:
    """One floating tensor in, one of the same shape and type out."""
    plain = isinstance(x, Tensor) and x.is_floating_point() and not named.keys() & {"out", "dtype"}
    return like(x) if plain else None


def _joined_shape(x: Any, y: Any = None, **named: Any) -> Tensor | None:
    if not isinstance(x, Tensor) or named or not x.is_floating_point():
        return None
    if isinstance(y, Tensor):
        return like(x) if y.shape == x.shape and y.dtype == x.dtype else None
    return like(x) if isinstance(y, (int, float)) else None


def elementwise(c: Context, *args: Any, **kwargs: Any) -> Result:
    """Tensors of broadcastable shape in, tied channels out."""
    operands = list(operands_in(args, kwargs))
    axes = c.broadcast(operands)
    return [axes for _ in c.shape] if isinstance(c.shape, list) else axes


@default_for_pointwise
def _of_torch(name: str) -> Op:
    """The record of an operation that torch tags as pointwise."""
    return Op(name=name, coupling=elementwise, zeros=zeros.by_value, elementwise=True)


# Pointwise, though torch does not tag them so.
_UNTAGGED = """
conj fill float_power floor_divide imag invert isclose isreal log_sigmoid lshift real rshift softsign special_ndtr
tanhshrink
"""
# Met so often in a forward that their results' shapes are told without running them.
_ACTIVATIONS = "elu gelu hardsigmoid hardswish hardtanh leaky_relu mish relu6 sigmoid silu tanh"
_BY_VALUE: dict[str, Any] = {"zeros": zeros.by_value, "elementwise": True}
register_op(*_UNTAGGED.split(), **_BY_VALUE)(elementwise)
register_op(*_ACTIVATIONS.split(), **_BY_VALUE, shape=same_shape)(elementwise)
register_op("relu", **_BY_VALUE, scaling=Scaling.HOMOGENEOUS, shape=same_shape)(elementwise)
register_op("neg", **_BY_VALUE, scaling=Scaling.HOMOGENEOUS)(elementwise)
register_op("add", "sub", **_BY_VALUE, scaling=Scaling.SUM, shape=_joined_shape)(elementwise)


def unary(c: Context, x: Operand, *_: Any, **__: Any) -> Axes:
    """One tensor in, the same channels out; another tensor may say which type, with no tie to its channels."""
    return x.axes


_KEPT: dict[str, Any] = {"zeros": zeros.kept, "elementwise": True}
_COPIES: dict[str, Any] = _KEPT | {"indices": Indices.PASSED}
_TYPES = "to type_as type float double half bfloat16"
_SAME = """
alias bool byte char cpu cuda lift_fresh pin_memory requires_grad resolve_conj resolve_neg share_memory short
"""
_PASSED: dict[str, Any] = _COPIES | {"scaling": Scaling.HOMOGENEOUS}
register_op(*_TYPES.split(), **_PASSED, converts=True)(unary)
register_op("clone", **_PASSED)(unary)
register_op("contiguous", **_PASSED, moves=True, views=True, converts=True)(unary)
register_op("detach", **_PASSED, moves=True, views=True)(unary)
register_op("int", "long", **_COPIES)(unary)
register_op(*_SAME.split(), **_KEPT)(unary)


def _kept_unless_training(z: zeros.ZeroContext) -> zeros.Zeros:
    """The alpha forms put a constant in the place of what they drop."""
    return zeros.unknown(z) if arguments(z.node).get("train") else zeros.kept(z)


# A trace is of a forward in eval mode, where dropout does nothing; a forward may leave it on.
_DROPOUT: dict[str, Any] = {"elementwise": True, "random": True, "training_only": True}
register_op("dropout", **_DROPOUT, zeros=zeros.kept, scaling=Scaling.HOMOGENEOUS, views=True, shape=same_shape)(unary)
register_op("feature_dropout", "native_dropout", **_DROPOUT, zeros=zeros.kept)(elementwise)
register_op("alpha_dropout", "feature_alpha_dropout", **_DROPOUT, zeros=_kept_unless_training)(unary)
_DRAWN = "bernoulli cauchy exponential geometric log_normal poisson random rrelu uniform"
register_op(*_DRAWN.split(), random=True)(unary)
register_op("normal", random=True)(elementwise)  # means and deviations may both be tensors
register_op("rand_like", "randn_like", "randint_like", random=True, creates=True)(unary)
register_op("empty_like", random=True, creates=True, indices=Indices.ORDERED)(unary)
register_op("zeros_like", "zero", zeros=zeros.everywhere, creates=True, indices=Indices.ORDERED)(unary)
register_op("ones_like", "full_like", creates=True, indices=Indices.ORDERED)(unary)


@register_op("mul", "div", zeros=zeros.by_value, elementwise=True, scaling=Scaling.PRODUCT, shape=_joined_shape)
def product(c: Context, *args: Any, **kwargs: Any) -> Result:
    """A product; a number among the factors may follow a size that changes (``head_dim ** -0.5``)."""
    operands = list(operands_in(args, kwargs))
    for position, other in ((0, 1), (1, 0)):
        if len(args) > 1 and _follows(c, args[other]) and isinstance(args[position], Operand):
            c.scale(position, args[other], operands[0].axes[-1], divides=c.node.meta["name"] == "div")
    return c.broadcast(operands)


def _follows(c: Context, value: Any) -> bool:
    """Whether a number was computed from sizes or attributes, so that it may change with the channels."""
    return isinstance(value, SizeFloat) or c.tracked(value)


@register_op("where", zeros=zeros.by_value, elementwise=True)
def where(c: Context, *args: Any, **kwargs: Any) -> Result:
    """One of two tensors at each place; of a condition alone, the places at which it holds."""
    operands = list(operands_in(args, kwargs))
    if isinstance(c.shape, list):
        return c.pin_all(operands, f"its places are looked up by data in {c.where()}")
    return c.broadcast(operands)


@register_op("copy", zeros=zeros.by_value, elementwise=True)
def copy(c: Context, target: Operand, source: Operand, *_: Any, **__: Any) -> Axes:
    """`source` is written into `target`."""
    return c.broadcast([target, source])


@register_op("prelu", zeros=zeros.kept, elementwise=True)
def prelu(c: Context, x: Operand, weight: Operand) -> Axes:
    """One slope a channel, or one for all."""
    if weight.axes and weight.axes[0].size > 1:
        c.same(x.axes[1], weight.axes[0])
    return x.axes


def _zero_in_all(z: zeros.ZeroContext) -> zeros.Zeros:
    """What is known of several results is what holds for all of them."""
    return tuple(all(z.whole(t, back) and z.of(t)[back] for t in z.tensors) for back in range(-len(z.axes), 0))


@register_op("broadcast_tensors", zeros=_zero_in_all, views=True)
def broadcast_tensors(c: Context, *tensors: Any) -> list[Axes | None]:
    """Each tensor expanded to the common shape."""
    operands = list(operands_in(tensors))
    axes = c.broadcast(operands)
    return [axes for _ in operands]


@register_op("glu", zeros=zeros.moved)
def glu(c: Context, x: Operand, dim: int = -1) -> Axes:
    """First half times the sigmoid of the second."""
    at = x.dim(dim)
    first, _ = c.sections(x.axes[at], 2)
    return (*x.axes[:at], first, *x.axes[at + 1 :])


@register_op("tril", "triu", zeros=zeros.kept)
def triangle(c: Context, x: Operand, *_: Any, **__: Any) -> Axes:
    """What is zeroed depends on the position in the last two dimensions."""
    for axis in x.axes[-2:]:
        c.pin(axis, f"its position decides what {c.where()} zeroes")
    return x.axes
