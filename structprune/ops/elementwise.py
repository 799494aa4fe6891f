"""Operations that treat every entry alone: channels of the same place are the same."""

from __future__ import annotations

from typing import Any

from structprune.ops.context import Context, Operand, Result, operands_in, rule
from structprune.ops.relations import Rows
from structprune.tracing.provenance import SizeFloat

UNARY = """
abs acos acosh asin asinh atan atanh bernoulli bitwise_not bfloat16 bool ceil celu celu_ clone contiguous cos cosh
cpu cuda deg2rad detach digamma double dropout elu erf erfc erfinv exp exp2 exponential expm1 feature_dropout fill float
floor frac gelu glu_ half hardshrink hardsigmoid hardswish hardtanh int invert isfinite isinf isnan leaky_relu lgamma
log log10 log1p log2 log_sigmoid logical_not logit long mish nan_to_num neg positive pos reciprocal relu relu6
requires_grad rrelu round rsqrt selu short sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign sqrt
square tan tanh tanhshrink threshold trunc type zero alpha_dropout native_dropout normal uniform char byte resolve_conj
resolve_neg real imag conj angle alias lift_fresh feature_alpha_dropout random ones_like zeros_like empty_like full_like
rand_like randn_like pin_memory share_memory logsigmoid i0 special_erf stochastic_depth zeros_like_
"""
ELEMENTWISE = """
add addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor clamp clamp_max clamp_min copysign div dist_ eq
floor_divide fmax fmin fmod ge gt heaviside hypot ldexp le lerp logaddexp logaddexp2 logical_and logical_or
logical_xor lt masked_fill maximum minimum mul ne nextafter pow remainder sub where xlogy bitwise_left_shift
bitwise_right_shift lshift rshift isclose float_power
"""


@rule(*UNARY.split())
def unary(c: Context, x: Operand, *_: Any, **__: Any) -> Rows:
    """One tensor in, the same channels out."""
    return x.rows


@rule("to", "type_as")
def convert(c: Context, x: Operand, *_: Any, **__: Any) -> Rows:
    """A change of type or device; another tensor may say which, with no tie to its channels."""
    return x.rows


@rule(*ELEMENTWISE.split())
def elementwise(c: Context, *args: Any, **kwargs: Any) -> Result:
    """Tensors of broadcastable shape in, tied channels out."""
    operands = list(operands_in(args, kwargs))
    if isinstance(c.shape, list):  # ``where`` of a condition alone: the places at which it holds
        return c.pin_all(operands, f"its places are looked up by data in {c.where()}")
    if c.node.meta["name"] in ("mul", "div"):
        for position, other in ((0, 1), (1, 0)):
            if len(args) > 1 and isinstance(args[other], SizeFloat) and isinstance(args[position], Operand):
                value = args[other]
                if c.node.meta["name"] == "div":
                    value = 1.0 / value
                c.scale(position, value, operands[0].rows[-1])
    return c.broadcast(operands)


@rule("copy", "copy_")
def copy(c: Context, target: Operand, source: Operand, *_: Any, **__: Any) -> Rows:
    """`source` is written into `target`."""
    return c.broadcast([target, source])


@rule("prelu")
def prelu(c: Context, x: Operand, weight: Operand) -> Rows:
    """One slope a channel, or one for all."""
    if weight.rows and weight.rows[0].size > 1:
        c.same(x.rows[1], weight.rows[0])
    return x.rows


@rule("broadcast_tensors")
def broadcast_tensors(c: Context, *tensors: Any) -> list[Rows | None]:
    """Each tensor expanded to the common shape."""
    operands = list(operands_in(tensors))
    rows = c.broadcast(operands)
    return [rows for _ in operands]


@rule("expand_as")
def expand_as(c: Context, x: Operand, other: Operand) -> Rows:
    """`x` repeated to the shape of `other`."""
    return c.broadcast([x, other])


@rule("glu")
def glu(c: Context, x: Operand, dim: int = -1) -> Rows:
    """First half times the sigmoid of the second."""
    at = x.dim(dim)
    first, _ = c.sections(x.rows[at], 2)
    return (*x.rows[:at], first, *x.rows[at + 1 :])


@rule("tril", "triu")
def triangle(c: Context, x: Operand, *_: Any, **__: Any) -> Rows:
    """What is zeroed depends on the position in the last two dimensions."""
    for row in x.rows[-2:]:
        c.pin(row, f"its position decides what {c.where()} zeroes")
    return x.rows
