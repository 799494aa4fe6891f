"""Operations that sum over channels: convolutions, linear layers, matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops.arguments import tensors
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import AxesOf, Contraction, Count, Pair, Scaling, register_op
from structprune.ops.relations import Axes, Axis
from structprune.ops.zeros import ZeroContext, Zeros, unknown
from structprune.tracing.provenance import Arithmetic, Constant, Dim, SizeFloat, plain

# -- what else is known of a layer: where it is zero, what it costs, what it sums away -------------------------------


def _volume(axes: Sequence[Axis], count: Count) -> int:
    return prod(count(axis) for axis in axes)


def _layer_zeros(at: int, across: int, out: int) -> Any:
    """Zeros of a layer with weights and biases, whose channels are dimension `at` of its input and of its result.

    `out` and `across` are the dimensions of the weight along which it makes channels and sums them up.
    """

    def rule(z: ZeroContext) -> Zeros:
        x, weight, *bias = z.tensors
        axes, zero, incoming = z.axes_of(x), z.of(weight), z.of(x)
        # It sums over its input channels: removed ones must be zero in the input or in the weight.
        if not (zero[min(across, len(zero) - 1)] or incoming[at % len(axes)]):
            z.summed(x, at % len(axes))
        place = at % len(z.axes) if len(zero) > 1 else -1
        made = zero[out] and all(z.of(b)[0] for b in bias)
        return tuple(made if d == place else not bias and d < len(incoming) and incoming[d] for d in range(len(z.axes)))

    return rule


def _convolution_macs(node: fx.Node, axes: AxesOf, count: Count) -> int:
    """Each entry of the result sums over the channels of a group and the kernel."""
    return _volume(axes(node), count) * _volume(axes(tensors(node)[1])[1:], count)


def _transposed_macs(node: fx.Node, axes: AxesOf, count: Count) -> int:
    """Each entry of the input goes to the channels of a group and the kernel."""
    x, weight = tensors(node)[:2]
    return _volume(axes(x), count) * _volume(axes(weight)[1:], count)


def _product_macs(node: fx.Node, axes: AxesOf, count: Count) -> int:
    """Each entry of the result sums over the last dimension of the first factor."""
    first = tensors(node)[_factors(node)]
    return _volume(axes(node), count) * count(axes(first)[-1])


def _factors(node: fx.Node) -> int:
    """Where the first of two factors stands among the tensors: ``addmm`` takes what is added first."""
    return 1 if node.meta["name"] in _ADDED else 0


_ADDED = frozenset({"addmm", "addmv", "baddbmm"})


def _layer_pairs(dim: int, weight_dim: int) -> Any:
    return lambda node: (Pair(0, dim, 1, weight_dim),)


def _product_pairs(node: fx.Node) -> Iterator[Pair]:
    left = _factors(node)
    yield Pair(left, -1, left + 1, -2)
    yield Pair(left + 1, -2, left, -1)


def _product_zeros(z: ZeroContext) -> Zeros:
    """A matrix product; what it sums over must be zero in one of its factors."""
    first = _factors(z.node)
    a, b = z.tensors[first : first + 2]
    left: tuple[bool, ...] = z.of(a)
    right: tuple[bool, ...] = z.of(b)
    if not (left[-1] or right[max(0, len(right) - 2)]):
        z.summed(a, len(left) - 1)
    result = [False] * len(z.axes)
    if len(left) > 1 and len(right) > 1:
        result[-1], result[-2] = right[-1], left[-2]
        for back in range(3, len(z.axes) + 1):
            result[-back] = any(len(zero) >= back and zero[-back] for zero in (left, right))
    elif z.axes:
        result[-1] = (left[:-1] if len(left) > 1 else right)[-1:] == (True,)
    if first:  # what is added must be zero too
        bias = z.tensors[0]
        return tuple(
            off and z.whole(bias, d - len(result)) and z.of(bias)[d - len(result)] for d, off in enumerate(result)
        )
    return tuple(result)


def _distance_zeros(z: ZeroContext) -> Zeros:
    """A sum over differences: both must be zero."""
    a, b = z.tensors
    if not (z.of(a)[-1] and z.of(b)[-1]):
        z.summed(a, len(z.of(a)) - 1)
    return unknown(z)


def _bilinear_zeros(z: ZeroContext) -> Zeros:
    """Weights and bias of an output that is removed are zero; either input is summed away."""
    *inputs, weight = z.tensors[:3]
    zero = z.of(weight)
    for x, across in zip(inputs, (1, 2), strict=True):
        if not (zero[across] or z.of(x)[-1]):
            z.summed(x, len(z.of(x)) - 1)
    made = zero[0] and all(z.of(b)[0] for b in z.tensors[3:])
    return (False,) * (len(z.axes) - 1) + (made,)


def _fit(x: Any, weight: Any, bias: Any, groups: Any) -> bool:
    """Whether a convolution takes a batch, a weight and a bias of these shapes and types."""
    if x.dim() != weight.dim() or x.dtype != weight.dtype:
        return False
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return False
    return bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype)


def _conv_shape(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> Tensor | None:
    """A convolution over a batch: of 8 positions, a kernel of 3 with a stride of 2 and no padding makes 3."""
    # Asked here, a tracked number would be taken for one that the forward asks for.
    stride, padding, dilation, groups = (plain(value) for value in (stride, padding, dilation, groups))
    dims = weight.dim() - 2
    if isinstance(padding, str) or not x.is_contiguous() or not _fit(x, weight, bias, groups):
        return None
    each = [(value,) * dims if isinstance(value, int) else value for value in (stride, padding, dilation)]
    if any(len(values) != dims for values in each):
        return None
    sizes = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], *each, strict=True)
    ]
    shape = (x.shape[0], weight.shape[0], *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device) if min(sizes) > 0 else None


def _linear_shape(x: Any, weight: Any, bias: Any = None, **named: Any) -> Tensor | None:
    if named or x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        return None
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _convolution(dims: int, transposed: bool = False) -> dict[str, Any]:
    """What is known of a convolution over `dims` dimensions; weight ``(out, in, ...)``, or ``(in, out, ...)``."""
    at, across = -1 - dims, 0 if transposed else 1
    kind = "transposed" if transposed else "convolution"
    return {
        "zeros": _layer_zeros(at, across, 1 - across),
        "macs": _transposed_macs if transposed else _convolution_macs,
        "contraction": Contraction(kind, _layer_pairs(at, across), "input", "weight", "bias"),
        "scaling": Scaling.NONE if transposed else Scaling.LAYER,
    }


# -- how layers and products couple channels -------------------------------------------------------------------------


def _bias(c: Context, bias: Operand | None, axis: Axis) -> None:
    if bias is not None:
        c.same(axis, bias.axes[0])


def _pointwise(weight: Operand, stride: Any, padding: Any) -> bool:
    """Whether each position is computed from itself alone."""

    def every(value: Any, wanted: int) -> bool:
        return all(item == wanted for item in (value if isinstance(value, (tuple, list)) else (value,)))

    return all(axis.size == 1 for axis in weight.axes[2:]) and every(stride, 1) and every(padding, 0)


def _spatial(c: Context, weight: Operand, x_rows: Sequence[Axis], shape: Sequence[int]) -> Axes:
    reason = f"it is a position that {c.where()} slides over"
    for axis in (*weight.axes[2:], *x_rows):
        c.pin(axis, reason)
    return c.fresh(shape, reason)


@register_op("conv1d", shape=_conv_shape, **_convolution(1))
@register_op("conv2d", shape=_conv_shape, **_convolution(2))
@register_op("conv3d", shape=_conv_shape, **_convolution(3))
def convolution(
    c: Context, x: Operand, weight: Operand, bias: Operand | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Axes:  # fmt: skip
    """Weight ``(out, in / groups, *kernel)``: grouped, a product of groups x channels in a group on both sides."""
    at = len(x.axes) - (len(weight.axes) - 2) - 1
    channels, out = x.axes[at], weight.axes[0]
    if groups == 1:
        c.same(channels, weight.axes[1])
    else:
        count = int(groups)
        group_in, inside = c.split(channels, (count, channels.size // count))
        group_out, _ = c.split(out, (count, out.size // count))
        c.same(group_in, group_out)
        c.same(inside, weight.axes[1])
        c.expect(groups, group_in)
    _bias(c, bias, out)
    if _pointwise(weight, stride, padding):
        return (*x.axes[:at], out, *x.axes[at + 1 :])
    return (*x.axes[:at], out, *_spatial(c, weight, x.axes[at + 1 :], c.shape[at + 1 :]))


@register_op("conv_transpose1d", **_convolution(1, transposed=True))
@register_op("conv_transpose2d", **_convolution(2, transposed=True))
@register_op("conv_transpose3d", **_convolution(3, transposed=True))
def transposed_convolution(
    c: Context, x: Operand, weight: Operand, bias: Operand | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Axes:  # fmt: skip
    """Weight ``(in, out / groups, *kernel)``."""
    at = len(x.axes) - (len(weight.axes) - 2) - 1
    c.same(x.axes[at], weight.axes[0])
    out = weight.axes[1]
    if groups != 1:
        count = int(groups)
        group, _ = c.split(weight.axes[0], (count, weight.axes[0].size // count))
        c.expect(groups, group)
        out = c.merged([group, out])
    _bias(c, bias, out)
    return (*x.axes[:at], out, *_spatial(c, weight, x.axes[at + 1 :], c.shape[at + 1 :]))


@register_op(
    "linear", zeros=_layer_zeros(-1, 1, 0), macs=_product_macs, scaling=Scaling.LAYER, channel_dim=-1,
    contraction=Contraction("linear", _layer_pairs(-1, -1), "input", "weight", "bias"), shape=_linear_shape,
)  # fmt: skip
def linear(c: Context, x: Operand, weight: Operand, bias: Operand | None = None) -> Axes:
    """Weight ``(out, in)``."""
    c.same(x.axes[-1], weight.axes[-1])
    if len(weight.axes) == 1:
        return x.axes[:-1]
    _bias(c, bias, weight.axes[0])
    return (*x.axes[:-1], weight.axes[0])


def _bilinear_macs(node: fx.Node, axes: AxesOf, count: Count) -> int:
    """Each entry of the result sums over both inputs."""
    return _volume(axes(node), count) * _volume(axes(tensors(node)[2])[1:], count)


@register_op(
    "bilinear", zeros=_bilinear_zeros, macs=_bilinear_macs,
    contraction=Contraction("bilinear", lambda _: (Pair(0, -1, 2, 1), Pair(1, -1, 2, 2))),
)  # fmt: skip
def bilinear(c: Context, left: Operand, right: Operand, weight: Operand, bias: Operand | None = None) -> Axes:
    """Weight ``(out, in1, in2)``."""
    c.same(left.axes[-1], weight.axes[1])
    c.same(right.axes[-1], weight.axes[2])
    _bias(c, bias, weight.axes[0])
    batch = c.broadcast([Operand(left.node, left.axes[:-1]), Operand(right.node, right.axes[:-1])])
    return (*batch, weight.axes[0])


_PRODUCT: dict[str, Any] = {"zeros": _product_zeros, "macs": _product_macs}


@register_op(
    "matmul", **_PRODUCT, scaling=Scaling.CONTRACTION,
    contraction=Contraction("product", _product_pairs, "self", "other"),
)  # fmt: skip
@register_op(
    "mm", **_PRODUCT, scaling=Scaling.CONTRACTION, contraction=Contraction("product", _product_pairs, "self", "mat2")
)
@register_op("bmm", **_PRODUCT, scaling=Scaling.CONTRACTION, contraction=Contraction("product", _product_pairs))
@register_op("mv", "dot", "vdot", **_PRODUCT, contraction=Contraction("product", _product_pairs))
def matmul(c: Context, a: Operand, b: Operand, *_: Any, **__: Any) -> Axes:
    """Axes of `a` times columns of `b`; leading dimensions broadcast."""
    return _product(c, a, b)


def _product(c: Context, a: Operand, b: Operand) -> Axes:
    c.same(a.axes[-1], b.axes[max(0, len(b.axes) - 2)])
    batch = c.broadcast([Operand(a.node, a.axes[:-2]), Operand(b.node, b.axes[:-2])])
    return (*batch, *a.axes[-2:-1], *(b.axes[-1:] if len(b.axes) > 1 else ()))


@register_op(
    "addmm", **_PRODUCT, contraction=Contraction("product", _product_pairs, "mat1", "mat2", "self"),
    scaling=Scaling.LAYER, channel_dim=-1,
)  # fmt: skip
@register_op("addmv", "baddbmm", **_PRODUCT, contraction=Contraction("product", _product_pairs))
def addmm(c: Context, bias: Operand, *factors: Any, **named: Any) -> Axes:
    """A product plus a tensor that broadcasts to it."""
    a, b = operands_in(factors, named)
    return c.broadcast([Operand(c.node, _product(c, a, b)), bias])


@register_op("cdist", zeros=_distance_zeros, macs=_product_macs)
def cdist(c: Context, a: Operand, b: Operand, *_: Any, **__: Any) -> Axes:
    """Distances between the rows of two matrices: a sum over the last dimension."""
    c.same(a.axes[-1], b.axes[-1])
    batch = c.broadcast([Operand(a.node, a.axes[:-2]), Operand(b.node, b.axes[:-2])])
    return (*batch, a.axes[-2], b.axes[-2])


# -- scaled dot-product attention ------------------------------------------------------------------------------------


def _zeros(z: ZeroContext) -> Zeros:
    """Scores are summed over the head's size, in which query or key must be zero."""
    query, key, value = z.tensors[:3]
    if not (z.of(query)[-1] or z.of(key)[-1]):
        z.summed(query, len(z.of(query)) - 1)
    # Where a query is zero it attends to all alike, so only values make a head or a batch entry zero.
    batch = (z.whole(value, back) and z.of(value)[back] for back in range(-len(z.axes), -2))
    return (*batch, False, z.of(value)[-1])


def _macs(node: fx.Node, axes: AxesOf, count: Count) -> int:
    """Scores of every query with every key, and sums of values by them."""
    query, key, value = (axes(n) for n in tensors(node)[:3])
    scores = prod(count(axis) for axis in query[:-1]) * count(key[-2])
    return scores * (count(query[-1]) + count(value[-1]))


def _shape(q: Any, k: Any, v: Any, mask: Any = None, *rest: Any, **named: Any) -> Tensor | None:
    plain = mask is None and named.get("attn_mask") is None and not named.get("enable_gqa") and len(rest) < 4
    if not plain or q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not q.dtype == k.dtype == v.dtype:
        return None
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        return None
    # As the fused kernels give it: heads are inner to tokens in memory.
    out = torch.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=q.dtype, device=q.device)
    return out.transpose(1, 2)


@register_op(
    "scaled_dot_product_attention", zeros=_zeros, macs=_macs, shape=_shape,
    contraction=Contraction("attention", lambda _: (Pair(0, -1, 1, -1),)),
)  # fmt: skip
def attention(
    c: Context, query: Operand, key: Operand, value: Operand, attn_mask: Operand | None = None, dropout_p: Any = 0.0,
    is_causal: Any = False, scale: Any = None, enable_gqa: Any = False,
) -> Axes:  # fmt: skip
    """Query ``(..., heads, length, size)``; the size is summed over, and scales the softmax by ``size ** -0.5``."""
    heads = query.axes[:-2]
    others = [Operand(x.node, x.axes[:-2]) for x in (key, value)]
    if enable_gqa:
        mine, theirs = query.axes[-3], key.axes[-3]
        if mine.size != theirs.size:
            group, _ = c.split(mine, (theirs.size, mine.size // theirs.size))
            c.same(group, theirs)
        c.same(theirs, value.axes[-3])
        others = []
        for x in (key, value):
            c.broadcast([Operand(x.node, x.axes[:-3]), Operand(query.node, query.axes[:-3])])
    heads = c.broadcast([Operand(query.node, heads), *others])
    c.same(query.axes[-1], key.axes[-1])
    c.same(key.axes[-2], value.axes[-2])
    reason = f"it is a position that {c.where()} attends to"
    for axis in (query.axes[-2], key.axes[-2]):
        c.pin(axis, reason)
    if attn_mask is not None:
        c.broadcast([Operand(c.node, (*heads, query.axes[-2], key.axes[-2])), attn_mask])
    if scale is None:
        size = Dim(query.node.meta["index"], len(query.axes) - 1)
        c.relations.scale_of(c.node.meta["index"], 0, Arithmetic("**", pow, size, Constant(-0.5)), query.axes[-1])
    elif isinstance(scale, SizeFloat):
        c.scale(0, scale, query.axes[-1])
    return (*heads, query.axes[-2], value.axes[-1])
