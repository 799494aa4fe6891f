"""Operations along dimensions: every entry there takes part in every other one, and all other dimensions pass.

A sort, a median, a Fourier transform over dimension 2 of ``(batch, channels, time)``: all of `time` must stay, and any
channel may go, since the operation treats each of them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from structprune.ops import zeros
from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Coupling, Indices, Result, register_op
from structprune.ops.relations import UNIT, Axes
from structprune.tracing.provenance import plain

Dims = tuple[int, ...]


def dims_of(node: fx.Node, rank: int, name: str = "dim", default: Any = None) -> Dims | None:
    """The dimensions that argument `name` of a call gives for a tensor of `rank`; None if they are no numbers.

    An argument that is left out, or empty, stands for all dimensions.
    """
    value = plain(arguments(node).get(name, default))
    chosen = [value] if isinstance(value, int) else value
    if chosen is None or (isinstance(chosen, (tuple, list)) and not chosen):
        return tuple(range(rank))
    if not isinstance(chosen, (tuple, list)) or any(isinstance(d, bool) or not isinstance(d, int) for d in chosen):
        return None
    return tuple(sorted({dim % rank for dim in chosen})) if rank else ()


def dimension(x: Operand, dim: Any) -> int | None:
    """`dim` counted from the front; None if it is no number."""
    return x.dim(dim) if isinstance(dim, int) and not isinstance(dim, bool) else None


def without(axes: Axes, dims: Sequence[int], rank: int) -> Axes:
    """`axes` with those of `dims` gone, or of size 1 where the result keeps its `rank`."""
    if rank == len(axes):
        return tuple(UNIT if at in dims else axis for at, axis in enumerate(axes))
    return tuple(axis for at, axis in enumerate(axes) if at not in dims)


def competing(c: Context, x: Operand, dims: int | Sequence[int] | None, reason: str = "") -> Result:
    """Every entry along `dims` takes part in every other one, so all of them must stay; other dimensions pass.

    Each result has the dimensions of `x` with other sizes at `dims`, or lacks them.
    """
    reason = reason or f"its channels compete in {c.where()}"
    if dims is None:
        return c.pin_all([x], reason)
    gone = (dims,) if isinstance(dims, int) else tuple(dims)
    for at in gone:
        c.pin(x.axes[at], reason)

    def axes(shape: Sequence[int]) -> Axes:
        if len(shape) != len(x.axes):
            return without(x.axes, gone, len(shape))
        new = iter(c.fresh([shape[at] for at in gone], reason))
        return tuple(next(new) if at in gone else axis for at, axis in enumerate(x.axes))

    if isinstance(c.shape, list):
        return [None if shape is None else axes(shape) for shape in c.shape]
    return axes(c.shape)


def _over(name: str = "dim", default: Any = None, reason: str = "") -> Coupling:
    """The coupling of an operation along the dimensions in argument `name`; `default` where it has none."""

    def coupling(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
        """Every entry along the dimensions takes part in every other one."""
        return competing(c, x, dims_of(c.node, len(x.axes), name, default), reason and f"{reason} {c.where()}")

    return coupling


register_op("sort", indices=Indices.PASSED_FIRST)(_over())
register_op("argsort", indices=Indices.ORDERED)(_over())
register_op("msort", indices=Indices.PASSED)(_over(default=0))
register_op(
    *["log_softmax", "_log_softmax", "python.log_softmax", "python.softmin", "cumprod", "logcumsumexp", "cummax"],
    *["cummin", "python.gumbel_softmax"],
)(_over())
register_op(
    *["amax", "amin", "logsumexp", "prod", "all", "argmax", "argmin", "aminmax", "kthvalue", "mode", "median"],
    *["nanmedian", "hash_tensor"],
)(_over())


@register_op("_safe_softmax")
def safe_softmax(c: Context, x: Operand, dim: Any, *_: Any) -> Result:
    """A softmax that gives zero where everything is left out."""
    return competing(c, x, dimension(x, dim))


@register_op("quantile", "nanquantile")
def quantile(c: Context, x: Operand, q: Any, *_: Any, **__: Any) -> Result:
    """Each of several quantiles is had alone; they stand in a dimension before the others."""
    dims = dims_of(c.node, len(x.axes))
    if dims is None:
        return competing(c, x, None)
    for at in dims:
        c.pin(x.axes[at], f"its channels compete in {c.where()}")
    keeps = bool(plain(arguments(c.node).get("keepdim")))
    rest = without(x.axes, dims, len(x.axes) if keeps else -1)
    return (*(q.axes if isinstance(q, Operand) else ()), *rest)


def _running(z: zeros.ZeroContext) -> zeros.Zeros:
    """A sum up to each channel; what it runs over must be zero."""
    source = z.tensors[0]
    zero = list(z.of(source))
    for at in dims_of(z.node, len(z.axes)) or ():
        if not zero[at]:
            z.summed(source, at)
        zero[at] = False
    return tuple(zero)


@register_op("cumsum", zeros=_running)
def cumsum(c: Context, x: Operand, dim: Any = None, **_: Any) -> Result:
    """Sums up to each channel: those that are off add nothing, which the rule for zeros makes sure of."""
    return competing(c, x, None) if dimension(x, dim) is None else x.axes


# -- linear ones: where the others are zero, so is the result ----------------------------------------------------------

_TRANSFORMED = "it is transformed by"


def _fourier(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """All dimensions, or the last ones if only their sizes are told."""
    sizes = arguments(c.node).get("s")
    rank = len(x.axes)
    dims = dims_of(c.node, rank)
    if arguments(c.node).get("dim") is None and isinstance(sizes, (tuple, list)):
        dims = tuple(range(rank - len(sizes), rank))
    return competing(c, x, dims, f"{_TRANSFORMED} {c.where()}")


register_op(
    *["fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2", "fft_ifft2", "fft_rfft2"],
    *["fft_irfft2", "fft_hfft2", "fft_ihfft2", "fft_fftshift", "fft_ifftshift"],
    zeros=zeros.moved_first,
)(_over(reason=_TRANSFORMED))
register_op(*["fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_hfftn", "fft_ihfftn"], zeros=zeros.moved_first)(
    _fourier
)


def _other_zeros(z: zeros.ZeroContext) -> zeros.Zeros:
    """Sums of neighbours along a dimension: zero where all that goes in is."""
    known = [z.of(tensor) for tensor in z.tensors]
    return tuple(
        axis.free and all(len(zero) == len(z.axes) and zero[at] for zero in known) for at, axis in enumerate(z.axes)
    )


@register_op("diff", zeros=_other_zeros)
def diff(c: Context, x: Operand, *_: Any, **named: Any) -> Result:
    """Differences of neighbours, with other tensors put before and behind."""
    dims = dims_of(c.node, len(x.axes), default=-1)
    before, behind = (arguments(c.node).get(name) for name in ("prepend", "append"))
    if dims is None:
        return c.pin_all([x, *operands_in(named)], f"its channels compete in {c.where()}")
    reason = f"its channels compete in {c.where()}"
    for node in (before, behind):
        if isinstance(node, fx.Node):
            for at, (axis, other) in enumerate(zip(x.axes, c.axes[node.meta["index"]], strict=True)):
                if at in dims:
                    c.pin(other, reason)
                else:
                    c.same(axis, other)
    return competing(c, x, dims, reason)


@register_op("trapezoid", "trapz", "cumulative_trapezoid", zeros=zeros.moved_first)
def trapezoid(c: Context, y: Operand, x: Any = None, **_: Any) -> Result:
    """Integrates `y` along a dimension; `x` are places of the entries, in that dimension alone or everywhere."""
    dims = dims_of(c.node, len(y.axes), default=-1)
    if dims is None:
        return c.pin_all([y], f"its channels compete in {c.where()}")
    for places in operands_in(x):
        if len(places.axes) == 1:
            c.pin(places.axes[0], f"its entries are places in {c.where()}")
        else:
            for at in dims:
                c.pin(places.axes[at], f"its entries are places in {c.where()}")
            ones = Operand(c.node, without(places.axes, dims, len(places.axes)))
            c.broadcast([Operand(c.node, without(y.axes, dims, len(y.axes))), ones])
    return competing(c, y, dims, f"it is summed over by {c.where()}")


@register_op("gradient", zeros=zeros.moved_first)
def gradient(c: Context, x: Operand, *_: Any, **named: Any) -> Result:
    """Slopes along each dimension, one result for each."""
    reason = f"its channels compete in {c.where()}"
    places = list(operands_in(named))
    dims = dims_of(c.node, len(x.axes))
    if dims is None or len(places) > len(x.axes):
        return c.pin_all([x, *places], reason)
    for operand in places:
        for axis in operand.axes:
            c.pin(axis, reason)
    return competing(c, x, dims, reason)


def _renormed(z: zeros.ZeroContext) -> zeros.Zeros:
    """A norm over all dimensions but one: what it sums over must be zero, and stays so."""
    source = z.tensors[0]
    zero = z.of(source)
    kept = dims_of(z.node, len(zero)) or ()
    for at, off in enumerate(zero):
        if at not in kept and not off:
            z.summed(source, at)
    return zero


@register_op("renorm", zeros=_renormed, over_kept=None)
def renorm(c: Context, x: Operand, *_: Any, **__: Any) -> Result:
    """Each part along a dimension is scaled down to a largest norm; zeros add nothing to it."""
    dims = dims_of(c.node, len(x.axes)) or ()
    c.reduces_over(x, [at for at in range(len(x.axes)) if at not in dims])
    return x.axes
