"""Normalisations and reductions: over thinned channels they run over the survivors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structprune.ops import zeros
from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Indices, Norm, Result, Scaling, op_of, register_op
from structprune.ops.relations import UNIT, Rows


def _batch_norm_shape(x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, *_: Any) -> Tensor | None:
    parts = [part for part in (weight, bias, mean, var) if part is not None]
    if training or x.dim() < 2 or any(part.shape != x.shape[1:2] for part in parts):
        return None
    return torch.empty_like(x) if all(part.dtype == x.dtype for part in parts) else None


def _layer_norm_shape(x: Any, shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Tensor | None:
    parts = [part for part in (weight, bias) if isinstance(part, Tensor)]
    inner = tuple(x.shape[x.dim() - len(shape) :])
    if inner != tuple(int(size) for size in shape) or any(part.shape != inner for part in parts):
        return None
    same = all(part.dtype == x.dtype for part in parts)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if same else None


def _normalised(at: int, keeps: bool = False) -> zeros.ZeroRule:
    """Channels of dimension `at` whose scale and shift are removed are zero; without those, as they came in."""

    def rule(z: zeros.ZeroContext) -> zeros.Zeros:
        x, parameters = z.of(z.tensors[0]), z.tensors[1:]
        place = at % len(z.rows)
        zero = x[place] if not parameters else all(z.of(p)[-1] for p in parameters)
        rest = keeps or not parameters
        return tuple(zero if d == place else rest and x[d] for d in range(len(z.rows)))

    return rule


_STATISTICS = Norm("weight", "bias", statistics=("running_mean", "running_var"))


@register_op(
    "batch_norm", zeros=_normalised(1), norm=_STATISTICS, elementwise=True, scaling=Scaling.LAYER, over_kept=True,
    shape=_batch_norm_shape,
)  # fmt: skip
@register_op("instance_norm", zeros=_normalised(1), norm=_STATISTICS, over_kept=True)
def batch_norm(c: Context, x: Operand, *statistics: Any, **named: Any) -> Rows:
    """Weight, bias, running mean and running variance have one entry a channel."""
    for operand in operands_in(statistics, named):
        c.same(x.rows[1], operand.rows[0])
    # Standardised weights are normalised over their input channels by a batch norm over "positions".
    c.survivors(x, [at for at in range(len(x.rows)) if at != 1])
    return x.rows


_SHAPED = Norm("weight", "bias", "normalized_shape")


@register_op(
    "layer_norm", zeros=_normalised(-1), norm=_SHAPED, scaling=Scaling.LAYER, channel_dim=-1, over_kept=True,
    shape=_layer_norm_shape,
)  # fmt: skip
@register_op(
    "rms_norm", zeros=_normalised(-1, keeps=True), norm=Norm("weight", shape="normalized_shape"), scaling=Scaling.LAYER,
    channel_dim=-1, over_kept=True,
)  # fmt: skip
def layer_norm(c: Context, x: Operand, shape: Sequence[Any], *affine: Any, **named: Any) -> Rows:
    """Normalises over the last ``len(shape)`` dimensions; weight and bias have that shape."""
    first = len(x.rows) - len(shape)
    for operand in operands_in(affine, named):
        for row, other in zip(x.rows[first:], operand.rows, strict=True):
            c.same(row, other)
    for size, row in zip(shape, x.rows[first:], strict=True):
        c.expect(size, row)
    c.survivors(x, range(first, len(x.rows)))
    return x.rows


@register_op("group_norm", zeros=_normalised(1), norm=Norm("weight", "bias"), over_kept=True)
def group_norm(c: Context, x: Operand, groups: int, *affine: Any, **named: Any) -> Rows:
    """Channels are a grid of groups x channels in a group."""
    row = x.rows[1]
    for operand in operands_in(affine, named):
        c.same(row, operand.rows[0])
    if groups != 1:
        outer, _ = c.split(row, (int(groups), row.size // int(groups)))
        c.expect(groups, outer)
    c.survivors(x, (1,))
    return x.rows


@register_op("_weight_norm", zeros=zeros.everywhere, over_kept=True)
def weight_norm(c: Context, v: Operand, g: Operand, dim: int = 0) -> Rows:
    """``g * v / |v|``, with one norm for each index of `dim`."""
    if g.rows[v.dim(dim)].size > 1:
        c.same(v.rows[v.dim(dim)], g.rows[v.dim(dim)])
    c.survivors(v, range(len(v.rows)))
    return v.rows


_COMPETING = """
_log_softmax cummax cummin cumprod diff log_softmax logcumsumexp python.gumbel_softmax python.log_softmax python.softmin
renorm
"""
_SUMS = "mean sum var std var_mean std_mean norm linalg_vector_norm nansum nanmean frobenius_norm"
_CHOICES = "amax amin logsumexp prod any all argmax argmin median aminmax mode count_nonzero nuclear_norm"


@register_op("sort", indices=Indices.PASSED_FIRST)
@register_op("msort", indices=Indices.PASSED)
@register_op("argsort", indices=Indices.ORDERED)
@register_op(*_COMPETING.split())
def along(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Result:
    """Every channel along `dim` takes part in every other one."""
    return competing(c, x, dimension(x, kwargs.get("dim", args[0] if args else -1)))


@register_op("kthvalue")
def kthvalue(c: Context, x: Operand, k: int, dim: int = -1, *_: Any, **__: Any) -> Result:
    """The k-th largest along `dim`."""
    return competing(c, x, dimension(x, dim))


def _running(z: zeros.ZeroContext) -> zeros.Zeros:
    """A sum up to each channel; what it runs over must be zero."""
    dim, source = arguments(z.node).get("dim"), z.tensors[0]
    at = dim % len(z.rows) if isinstance(dim, int) else 0
    zero = z.of(source)
    if not zero[at]:
        z.summed(source, at)
    return tuple(z and place != at for place, z in enumerate(zero))


@register_op("cumsum", zeros=_running)
def cumsum(c: Context, x: Operand, dim: Any = None, **_: Any) -> Result:
    """Sums up to each channel: those that are off add nothing, which the rule for zeros makes sure of."""
    return competing(c, x, None) if dimension(x, dim) is None else x.rows


def dimension(x: Operand, dim: Any) -> int | None:
    """`dim` counted from the front; None if it is no number."""
    return x.dim(dim) if isinstance(dim, int) and not isinstance(dim, bool) else None


def competing(c: Context, x: Operand, at: int | None) -> Result:
    """Every channel along dimension `at` takes part in every other one, so all of them must stay."""
    reason = f"its channels compete in {c.where()}"
    if at is None:
        return c.pin_all([x], reason)
    c.pin(x.rows[at], reason)

    def rows(shape: Sequence[int]) -> Rows:
        return (*x.rows[:at], *c.fresh([shape[at]], reason), *x.rows[at + 1 :])

    if isinstance(c.shape, list):
        return [None if shape is None else rows(shape) for shape in c.shape]
    return rows(c.shape)


def _largest_or_reduced(z: zeros.ZeroContext) -> zeros.Zeros:
    """``torch.max(a, b)`` compares entry by entry."""
    return zeros.by_value(z) if len(z.tensors) > 1 else zeros.unknown(z)


@register_op(*_SUMS.split(), zeros=zeros.reduced, over_kept=True)
@register_op("max", "min", zeros=_largest_or_reduced)
@register_op(*_CHOICES.split())
def reduction(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Result:
    """Dimensions disappear, or keep size 1; sums, means, and norms run over the survivors."""
    name = c.node.meta["name"]
    if args and isinstance(args[0], Operand):  # torch.max(a, b) compares entry by entry
        return c.broadcast([x, args[0]])
    args = args[1:] if name in ("norm", "linalg_vector_norm") and args else args
    dims = kwargs.get("dim", kwargs.get("axis", args[0] if args and not isinstance(args[0], bool) else None))
    named = [dims] if isinstance(dims, int) else list(dims) if dims is not None else list(range(len(x.rows)))
    gone = {x.dim(dim) for dim in named} or set(range(len(x.rows)))
    known = op_of(name)
    if known is not None and known.over_kept:
        c.survivors(x, sorted(gone))
    else:
        for at in gone:
            c.pin(x.rows[at], f"its channels compete in {c.where()}")
    shape = c.shape[0] if isinstance(c.shape, list) else c.shape
    if len(shape) == len(x.rows):
        rows = tuple(UNIT if at in gone else row for at, row in enumerate(x.rows))
    else:
        rows = tuple(row for at, row in enumerate(x.rows) if at not in gone)
    return [rows for _ in c.shape] if isinstance(c.shape, list) else rows


@register_op("python.local_response_norm")
def local_response_norm(c: Context, x: Operand, *_: Any, **__: Any) -> Rows:
    """Every channel is divided by a norm over its neighbours."""
    c.pin(x.rows[1], f"its neighbours take part in {c.where()}")
    return x.rows


@register_op("cosine_similarity", "pairwise_distance")
def similarity(c: Context, a: Operand, b: Operand, dim: int = 1, *_: Any, **__: Any) -> Rows:
    """A normalised product, or a distance with a constant in each entry, summed over one dimension."""
    rows = c.broadcast([a, b])
    c.pin(rows[int(dim) if c.node.meta["name"] == "cosine_similarity" else -1], f"it is summed over by {c.where()}")
    at = int(dim) % len(rows) if c.node.meta["name"] == "cosine_similarity" else len(rows) - 1
    return tuple(row for place, row in enumerate(rows) if place != at)
