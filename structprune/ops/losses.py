"""Losses: entry by entry, then a sum or a mean over all of them, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from structprune.ops import zeros
from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import register_op
from structprune.ops.relations import Axes
from structprune.ops.zeros import ZeroContext, Zeros
from structprune.tracing.provenance import plain

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
