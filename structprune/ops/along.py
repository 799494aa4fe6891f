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
from structprune.ops.zeros import ZeroContext, Zeros
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
    """Each of several quantiles is computed alone; they stand in a dimension before the others."""
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


# -- losses: entry by entry, then a sum or a mean over all of them, or neither ---------------------------------------

_NONE, _SUM = 0, 2


def _reduction(node: fx.Node) -> Any:
    return plain(arguments(node).get("reduction"))


def _reduced(c: Context, axes: Axes) -> Axes:
    """The result, with a dimension for each of `axes` or with none: of a mean, all channels must stay."""
    reduction = _reduction(c.node)
    if reduction == _NONE:
        return axes
    if reduction != _SUM:
        for axis in axes:
            c.pin(axis, f"it is averaged over by {c.where()}")
    return ()


def _each_zeros(z: ZeroContext) -> Zeros:
    """Entries of which the loss is zero add nothing to a sum; whether it is, the loss itself is asked."""
    if _reduction(z.node) == _NONE:
        return zeros.by_value(z)
    if _reduction(z.node) == _SUM:
        rank = max(len(z.axes_of(tensor)) for tensor in z.tensors)
        for back in range(-rank, 0):
            _summed(z, back)
    return ()


def _summed(z: ZeroContext, back: int) -> None:
    having = [(at, tensor) for at, tensor in enumerate(z.tensors) if len(z.axes_of(tensor)) >= -back]
    size = max(z.axes_of(tensor)[back].size for _, tensor in having)
    off = frozenset(at for at, tensor in having if z.axes_of(tensor)[back].size == size and z.of(tensor)[back])
    if not off or not zeros.gives_zero(z.node, off, {"reduction": _NONE}):
        for _, tensor in having:
            z.summed(tensor, back)


@register_op(
    *["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div", "soft_margin_loss"],
    *["binary_cross_entropy_with_logits", "poisson_nll_loss", "hinge_embedding_loss", "margin_ranking_loss"],
    zeros=_each_zeros,
)  # fmt: skip
def each(c: Context, *args: Any, **named: Any) -> Axes:
    """A loss of each entry: inputs, targets and weights of the same place are the same channels."""
    return _reduced(c, c.broadcast(list(operands_in(args, named))))


def _batch_of(c: Context, x: Operand, target: Operand, at: int) -> Axes:
    """All dimensions but that of the classes, which are those of the target."""
    rest = tuple(axis for place, axis in enumerate(x.axes) if place != at)
    return _tied(c, rest, target.axes)


def _tied(c: Context, axes: Axes, others: Sequence[Any]) -> Axes:
    return tuple(c.same(axis, other) for axis, other in zip(axes, others, strict=True))


def _whole(c: Context, axes: Axes) -> Axes:
    """A sum of losses that are not zero where what goes in is: all of them must stay."""
    if _reduction(c.node) != _NONE:
        for axis in axes:
            c.pin(axis, f"the losses of all its entries are summed by {c.where()}")
    return _reduced(c, axes)


@register_op(
    "cross_entropy_loss", "nll_loss", "nll_loss2d", "nll_loss_nd", "multi_margin_loss", "multilabel_margin_loss"
)
def classes(c: Context, x: Operand, target: Operand, *args: Any, **named: Any) -> Axes:
    """Classes compete, in dimension 1 or in the only one; targets count them, or have a number for each."""
    at = min(1, len(x.axes) - 1)
    reason = f"its channels compete in {c.where()}"
    c.pin(x.axes[at], reason)
    for weight in operands_in(args, named):
        c.same(x.axes[at], weight.axes[0])
    if len(target.axes) == len(x.axes):
        target = Operand(target.node, _tied(c, x.axes, target.axes))
        axes = tuple(axis for place, axis in enumerate(target.axes) if place != at)
    else:
        axes = _batch_of(c, x, target, at)
    return _whole(c, axes)


@register_op("cosine_embedding_loss", "triplet_margin_loss")
def embeddings(c: Context, *args: Any, **named: Any) -> Axes:
    """Compares the last dimensions of vectors; a target says what each pair is to be."""
    operands = list(operands_in(args, named))
    vectors = [x for x in operands if len(x.axes) == max(len(y.axes) for y in operands)]
    axes = c.broadcast(vectors)
    c.pin(axes[-1], f"it is summed over by {c.where()}")
    targets = [x for x in operands if x not in vectors]
    return _whole(c, c.broadcast([Operand(c.node, axes[:-1]), *targets]))


@register_op("ctc_loss")
def alignments(c: Context, scores: Operand, targets: Operand, *args: Any, **named: Any) -> Any:
    """Sums over all alignments of a sequence of scores with one of labels."""
    operands = list(operands_in(scores, targets, args, named))
    return c.pin_all(operands, f"its entries are aligned by {c.where()}")
