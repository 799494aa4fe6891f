"""Operations that add tensors, and those of which repeating them changes nothing: what branches are told by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from structprune.coupling.costs import is_view
from structprune.ops import op_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.op import Scaling
from structprune.ops.zeros import by_value, gives_zero
from structprune.tracing.provenance import plain

_VALUES = (-8.0, -2.5, -1.0, -0.25, 0.0, 0.3, 1.0, 3.5, 7.0)
# They return their argument itself where there is nothing to do.


def is_float(node: Any) -> bool:
    """Whether a node holds one floating tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("dtype"), torch.dtype) and (
        node.meta["dtype"].is_floating_point
    )  # fmt: skip


def is_itself(node: fx.Node) -> bool:
    """Whether an operation gave its first argument as it is: a change to the type that it has already."""
    known, sources = op_of(node.meta["name"]), tensors(node)
    if known is None or not known.converts or not is_float(node) or not sources:
        return False
    source = sources[0]
    return is_float(source) and all(source.meta[key] == node.meta[key] for key in ("shape", "dtype"))


def stacked(node: fx.Node) -> fx.Node | None:
    """For ``torch.stack(terms, dim).sum(dim)``, the node of the stack; None for other operations."""
    if node.meta["name"] != "sum":
        return None
    given = arguments(node)
    stack, dims = given.get("self"), given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(stack, fx.Node) or stack.meta["name"] != "stack" or len(stack.users) != 1 or not dims:
        return None
    rank = len(stack.meta["shape"])
    along = arguments(stack).get("dim") or 0
    return stack if [int(dim) % rank for dim in dims] == [int(along) % rank] else None


def terms_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that an operation adds, in the order of its arguments; empty for operations that are no sum.

    What is subtracted, or scaled by ``alpha``, is a term too.
    """
    stack = stacked(node)
    if stack is not None:
        return tuple(n for n in arguments(stack).get("tensors") or () if isinstance(n, fx.Node))
    known = op_of(node.meta["name"])
    if known is None or not known.elementwise or known.scaling is not Scaling.SUM:
        return ()
    given = arguments(node)
    both = tuple(term for term in (given.get("self"), given.get("other")) if isinstance(term, fx.Node))
    return both if len(both) == 2 and all(map(is_float, (*both, node))) else ()


def stands_alone(node: fx.Node, position: int) -> bool:
    """Whether a sum of two with the other term at zero is the term at `position` itself."""
    if position == 0:
        return True
    return node.meta["name"] == "add" and arguments(node).get("alpha", 1) in (None, 1)


def passes_zero(node: fx.Node, zero: Callable[[fx.Node], bool]) -> bool:
    """Whether an operation gives zeros where the tensors that `zero` names are zero, whatever the others are."""
    inputs = tensors(node)
    if node.meta["name"] == "part" or not inputs:
        return bool(inputs)
    known = op_of(node.meta["name"])
    if known is None or not isinstance(node.meta.get("dtype", None), torch.dtype):
        return known is not None and known.views and zero(inputs[0])
    if known.zeros is by_value:
        return gives_zero(node, frozenset(i for i, tensor in enumerate(inputs) if zero(tensor)))
    moved = known.views or known.moves or known.scaling in (Scaling.HOMOGENEOUS, Scaling.MOVES)
    return moved and zero(inputs[0])


def repeats(node: fx.Node, value: fx.Node) -> bool:
    """Whether `node`, an operation on one tensor, leaves `value` as it is, since that comes from the same operation.

    So does a ReLU: all entries of `value` are entries of an earlier ReLU's result, or zeros that padding added.
    """
    known = op_of(node.meta["name"])
    inputs = tensors(node)
    if known is None or not known.elementwise or known.random or known.zeros is not by_value or len(inputs) != 1:
        return False
    return _made_by(node, value) and _is_idempotent(node)


def _made_by(node: fx.Node, value: fx.Node) -> bool:
    while value.op.startswith("call_"):
        if value.meta["name"] == node.meta["name"] and _rest(value) == _rest(node):
            return True
        known, inputs = op_of(value.meta["name"]), tensors(value)
        selects = is_view(value) or (known is not None and (known.moves or known.selects))
        if not selects or not inputs:
            return False
        value = inputs[0]
    return False


def _rest(node: fx.Node) -> tuple[str, ...]:
    """The arguments of an operation besides its tensors; whether it works in place is none of them."""
    given = {key: value for key, value in arguments(node).items() if key not in ("self", "inplace", "0")}
    if node.meta["name"] in ("relu", "relu6") or op_of(node.meta["name"]) is None:
        given = {}
    return tuple(f"{key}={plain(value)}" for key, value in sorted(given.items()))


def _is_idempotent(node: fx.Node) -> bool:
    """Whether applying an operation on one tensor twice is applying it once; it is run on a few numbers."""
    x = torch.tensor(_VALUES, dtype=torch.float64)
    try:
        once = _run(node, x)
        return (
            once.shape == x.shape and torch.equal(_run(node, once), once) and float(_run(node, x * 0).abs().sum()) == 0
        )
    except (RuntimeError, TypeError, NotImplementedError, ValueError):
        return False  # it does not run on such a tensor: nothing is known


def _run(node: fx.Node, x: Tensor) -> Tensor:
    args, kwargs = plain(fx.map_arg((node.args, node.kwargs), lambda _: x.clone()))
    function: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    return function(*(args[1:] if node.op == "call_method" else args), **kwargs)
