"""Norms that a forward writes out: which mean or spread of a tensor serves to normalise that very tensor.

- ``x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)``: the mean divides the tensor that it is made of.
- ``(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)``: the mean is subtracted, and a spread divides.
- ``x * sigmoid(x.mean(-1, keepdim=True))`` is a gate, and ``x - x.mean(-1, keepdim=True)`` centred only: no norms.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from structprune.ops.arguments import arguments, tensors
from structprune.ops.op import Scaling, op_of
from structprune.tracing.provenance import plain

_SPREADS = frozenset({"mean", "var", "std", "var_mean", "std_mean", "nanmean"})
_HELD = ("parameter", "constant")


def normalises(statistic: fx.Node) -> bool:
    """Whether a forward uses a mean or a spread for nothing but to normalise the tensor that it is taken of.

    A spread divides; a mean may be subtracted where a spread over the same dimensions divides later.
    """
    line = _line(tensors(statistic)[0])
    users = list(statistic.users)
    if not users or any(user.op == "output" for user in users):
        return False
    if statistic.meta["name"] in ("var_mean", "std_mean"):
        # The spread is part 0, the mean is part 1.
        return all(user.args[1] == 1 or _divides(user, line) for user in users) and all(
            user.args[1] == 0 or _subtracted(user, line) for user in users
        )
    return _divides(statistic, line) or (_subtracted(statistic, line) and _divided_later(statistic, line))


def _line(node: fx.Node) -> list[fx.Node]:
    """`node`, and what it is made of entry by entry, alone or with tensors that are broadcast."""
    sources = [node]
    while (source := _whole_operand(sources[-1])) is not None:
        sources.append(source)
    return sources


def _whole_operand(node: fx.Node) -> fx.Node | None:
    """The one operand of the shape of `node`, an elementwise operation; None if there are several or none."""
    known = op_of(node.meta["name"])
    if known is None or not known.elementwise or known.norm is not None:
        return None
    whole = {t for t in tensors(node) if t.meta.get("shape") == node.meta.get("shape") and t.meta["name"] not in _HELD}
    return whole.pop() if len(whole) == 1 else None


def _divides(value: fx.Node, line: list[fx.Node], inverse: bool = False) -> bool:
    """Whether `value`, or its reciprocal if `inverse`, is used for nothing but to divide a tensor made as `line` is."""
    return bool(value.users) and all(_divided_by(user, value, line, inverse) for user in value.users)


def _divided_by(user: fx.Node, value: fx.Node, line: list[fx.Node], inverse: bool) -> bool:
    if user.op == "output":
        return False
    name = user.meta["name"]
    others = [node for node in tensors(user) if node is not value]
    under = name == "div" and user.args[0] is not value
    if any(node in line for other in others for node in _line(other)):
        return (name == "mul" and inverse) or (under and not inverse)
    if any(node.meta["name"] not in _HELD for node in others):
        return False
    turned = _turned(user, under)
    return turned is not None and _divides(user, line, inverse != turned)


def _turned(user: fx.Node, under: bool) -> bool | None:
    """Whether an operation on a spread turns it into a reciprocal; None if it does something else."""
    name = user.meta["name"]
    if name == "pow":
        exponent = plain(arguments(user).get("exponent"))
        return exponent < 0 if isinstance(exponent, (int, float)) else None
    if name in ("add", "sqrt", "clamp", "clamp_min", "maximum", "mul"):
        return False
    if name in ("rsqrt", "reciprocal", "div"):
        return name != "div" or under
    known = op_of(name)
    passes = known is not None and (known.views or known.scaling is Scaling.HOMOGENEOUS) and name not in ("relu", "neg")
    return False if passes else None


def _subtracted(mean: fx.Node, line: list[fx.Node]) -> bool:
    """Whether `mean` is used for nothing but to be subtracted from a tensor made as `line` is."""
    for user in mean.users:
        if user.op == "output" or user.meta["name"] != "sub" or len(user.args) < 2 or user.args[1] is not mean:
            return False
        first = user.args[0]
        if not isinstance(first, fx.Node) or not any(node in line for node in _line(first)):
            return False
    return True


def _divided_later(mean: fx.Node, line: list[fx.Node]) -> bool:
    """Whether a spread over the dimensions of `mean`, of the same tensor, divides all that the mean centres."""
    dims = _dims(mean)
    spreads = [
        node
        for start in line[:4]
        for node in _made_from(start)
        if node is not mean and node.meta["name"] in _SPREADS and _dims(node) == dims and _is_spread(node)
    ]
    return bool(spreads)


def _is_spread(node: fx.Node) -> bool:
    """Whether a mean or spread divides the tensor that it is taken of."""
    line = _line(tensors(node)[0])
    if node.meta["name"] in ("var_mean", "std_mean"):
        return any(user.op != "output" and user.args[1] == 0 and _divides(user, line) for user in node.users)
    return _divides(node, line)


def _made_from(start: fx.Node) -> Iterator[fx.Node]:
    """What reads `start`, or a tensor that is made of it entry by entry."""
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.op == "output" or user in seen:
                continue
            seen.add(user)
            yield user
            if _whole_operand(user) is node:
                waiting.append(user)


def _dims(node: fx.Node) -> object:
    """The dimensions that a reduction names, counted from the front; None for all."""
    value = plain(arguments(node).get("dim"))
    rank = len(tensors(node)[0].meta["shape"])
    chosen = [value] if isinstance(value, int) else value
    return tuple(sorted(d % rank for d in chosen)) if isinstance(chosen, (tuple, list)) and chosen else None
