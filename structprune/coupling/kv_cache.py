"""Bytes of keys and values that a language model keeps for each token, read off the attention in its trace."""

from __future__ import annotations

from math import prod

from torch import fx

from structprune.coupling.costs import Count
from structprune.coupling.propagate import Channels
from structprune.ops import op_of
from structprune.ops.arguments import arguments, tensors
from structprune.tracing.trace import Trace

_WEIGHTS = ("parameter", "constant")


class KeyValueCache:
    """What attention keeps for each token as a function of the living channels.

    Keys and values are the operands of ``scaled_dot_product_attention``, or those of two products of activations with a
    softmax between them. Where heads are repeated for several queries, they count once, as a cache holds them.

    Args:
        recorded: a trace of the model.
        channels: its axes.

    Attributes:
        kept: the tensors that a cache would hold.
    """

    def __init__(self, recorded: Trace, channels: Channels) -> None:
        self.kept = tuple(dict.fromkeys(_stored(found) for node in recorded.nodes for found in _keys_and_values(node)))
        self._channels = channels
        given = next((n for n in recorded.nodes if n.meta["name"] == "input" and n.meta.get("shape")), None)
        self._samples = 1 if given is None else int(given.meta["shape"][0])

    def bytes(self, count: Count) -> float:
        """Bytes for one token, when `count` gives the living channels of each axis."""
        found = 0.0
        for node, tokens in self.kept:
            axes = self._channels.axes[node.meta["index"]]
            found += prod(count(axis) for axis in axes) * node.meta["dtype"].itemsize / (tokens * self._samples)
        return found


def _keys_and_values(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The keys and the values that an operation attends to, each with its number of positions."""
    given = arguments(node) if node.op.startswith("call_") else {}
    if node.meta["name"] == "scaled_dot_product_attention":
        key, value = given["key"], given["value"]
        return [(key, key.meta["shape"][-2]), (value, value.meta["shape"][-2])]
    if not _is_softmax(node):
        return []
    scores = _product_before(node)
    values = _values_behind(node)
    if scores is None or values is None:
        return []
    positions = node.meta["shape"][-1]
    return [(tensors(scores)[1], positions), (values, positions)]


def _is_softmax(node: fx.Node) -> bool:
    return node.meta["name"].removeprefix("python.").removeprefix("_") in ("softmax", "safe_softmax")


def _is_product(node: fx.Node) -> bool:
    """Whether an operation multiplies two tensors of activations."""
    known = op_of(node.meta["name"])
    held = tensors(node) if node.op.startswith("call_") else []
    product = known is not None and known.contraction is not None and len(held) == 2
    return product and all(tensor.meta["name"] not in _WEIGHTS for tensor in held)


def _passes(node: fx.Node) -> bool:
    """Whether an operation treats each entry alone, or moves them."""
    known = op_of(node.meta["name"])
    return known is not None and (known.elementwise or known.views or known.moves)


def _product_before(node: fx.Node) -> fx.Node | None:
    """The product of queries and keys that a softmax is taken of, scaled and masked in between."""
    while node.op.startswith("call_") and (held := tensors(node)):
        node = held[0]
        if _is_product(node):
            return node
        if not _passes(node):
            return None
    return None


def _values_behind(node: fx.Node) -> fx.Node | None:
    """The values that the result of a softmax is multiplied with."""
    pending, seen = list(node.users), set[fx.Node]()
    while pending:
        user = pending.pop(0)
        if user in seen:
            continue
        seen.add(user)
        if _is_product(user):
            return tensors(user)[1]
        if user.op.startswith("call_") and _passes(user):
            pending += list(user.users)
    return None


def _stored(found: tuple[fx.Node, int]) -> tuple[fx.Node, int]:
    """The smallest tensor that keys or values are a repetition or another view of."""
    node, tokens = found
    best = node
    while node.op.startswith("call_") and (held := tensors(node)):
        known = op_of(node.meta["name"])
        if known is None or not (known.views or known.moves) or len(held) != 1:
            break
        node = held[0]
        if not isinstance(node.meta.get("shape"), tuple):
            break
        if prod(node.meta["shape"]) <= prod(best.meta["shape"]):
            best = node
    return best, tokens
