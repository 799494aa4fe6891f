"""Normalisations and reductions: over thinned channels they run over the survivors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from structprune.ops.context import Context, Operand, Result, operands_in, rule
from structprune.ops.relations import UNIT, Rows


@rule("batch_norm", "instance_norm")
def batch_norm(c: Context, x: Operand, *statistics: Any, **named: Any) -> Rows:
    """Weight, bias, running mean and running variance have one entry a channel."""
    for operand in operands_in(statistics, named):
        c.same(x.rows[1], operand.rows[0])
    # Standardised weights are normalised over their input channels by a batch norm over "positions".
    c.survivors(x, [at for at in range(len(x.rows)) if at != 1])
    return x.rows


@rule("layer_norm", "rms_norm")
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


@rule("group_norm")
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


@rule("_weight_norm")
def weight_norm(c: Context, v: Operand, g: Operand, dim: int = 0) -> Rows:
    """``g * v / |v|``, with one norm for each index of `dim`."""
    if g.rows[v.dim(dim)].size > 1:
        c.same(v.rows[v.dim(dim)], g.rows[v.dim(dim)])
    c.survivors(v, range(len(v.rows)))
    return v.rows


@rule("log_softmax", "_log_softmax", "python.log_softmax", "python.softmin", "cumprod", "logcumsumexp", "cummax",
      "cummin", "sort", "argsort", "msort", "renorm", "gumbel_softmax", "python.gumbel_softmax",
      "diff")  # fmt: skip
def along(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Result:
    """Every channel along `dim` takes part in every other one."""
    return competing(c, x, dimension(x, kwargs.get("dim", args[0] if args else -1)))


@rule("kthvalue")
def kthvalue(c: Context, x: Operand, k: int, dim: int = -1, *_: Any, **__: Any) -> Result:
    """The k-th largest along `dim`."""
    return competing(c, x, dimension(x, dim))


@rule("cumsum")
def cumsum(c: Context, x: Operand, dim: Any = None, **_: Any) -> Result:
    """Sums up to each channel: those that are off add nothing, which `channels.zeros` makes sure of."""
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


@rule("mean", "sum", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "amax", "amin", "logsumexp",
      "nansum", "nanmean", "max", "min", "prod", "any", "all", "argmax", "argmin", "median", "aminmax", "mode",
      "count_nonzero", "frobenius_norm", "nuclear_norm")  # fmt: skip
def reduction(c: Context, x: Operand, *args: Any, **kwargs: Any) -> Result:
    """Dimensions disappear, or keep size 1; sums, means, and norms run over the survivors."""
    name = c.node.meta["name"]
    if args and isinstance(args[0], Operand):  # torch.max(a, b) compares entry by entry
        return c.broadcast([x, args[0]])
    args = args[1:] if name in ("norm", "linalg_vector_norm") and args else args
    dims = kwargs.get("dim", kwargs.get("axis", args[0] if args and not isinstance(args[0], bool) else None))
    named = [dims] if isinstance(dims, int) else list(dims) if dims is not None else list(range(len(x.rows)))
    gone = {x.dim(dim) for dim in named} or set(range(len(x.rows)))
    if name in _OVER_SURVIVORS:
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


_OVER_SURVIVORS = frozenset({"mean", "sum", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
                             "nansum", "nanmean", "frobenius_norm"})  # fmt: skip


@rule("python.local_response_norm")
def local_response_norm(c: Context, x: Operand, *_: Any, **__: Any) -> Rows:
    """Every channel is divided by a norm over its neighbours."""
    c.pin(x.rows[1], f"its neighbours take part in {c.where()}")
    return x.rows


@rule("cosine_similarity", "pairwise_distance")
def similarity(c: Context, a: Operand, b: Operand, dim: int = 1, *_: Any, **__: Any) -> Rows:
    """A normalised product, or a distance with a constant in each entry, summed over one dimension."""
    rows = c.broadcast([a, b])
    c.pin(rows[int(dim) if c.node.meta["name"] == "cosine_similarity" else -1], f"it is summed over by {c.where()}")
    at = int(dim) % len(rows) if c.node.meta["name"] == "cosine_similarity" else len(rows) - 1
    return tuple(row for place, row in enumerate(rows) if place != at)
