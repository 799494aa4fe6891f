"""Factors that what reads a tensor can take up, where what makes it cannot.

    h = conv(x); h * sigmoid(gate(h.mean(1, keepdim=True)))

The mean runs over fewer channels once some are removed. The weights of `conv` make `h` too, so they cannot be scaled;
those of `gate` read the mean and nothing else. The search runs forwards from the scaled result to such weights.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from structprune.coupling.compensation import (
    Compensation,
    Masks,
    NotCompensableError,
    ScaledParameter,
    line_of,
    scaled_before,
    scaling_of,
)
from structprune.ops import op_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.op import Scaling
from structprune.ops.relations import Scale
from structprune.tracing.provenance import plain
from structprune.tracing.trace import Trace


class SearchAhead:
    """One walk forwards; `masks` holds which entries of each visited tensor are multiplied.

    Args:
        trace: the recorded forward.
        cache: masks, kept over all walks.
    """

    def __init__(self, trace: Trace, cache: Masks) -> None:
        self._trace = trace
        self._cache = cache
        self._masks: dict[fx.Node, Tensor] = {}
        self._queue: list[tuple[int, int]] = []
        self._nodes: list[fx.Node] = []
        self._outputs = {*trace.outputs.values(), *trace.training_outputs}

    def run(self, source: fx.Node) -> list[ScaledParameter]:
        """The weights that take up a factor on all of `source`.

        Raises:
            NotCompensableError: some of what reads it cannot.
        """
        scaled: list[ScaledParameter] = []
        self._reach(source, self._cache.full(source.meta["shape"]))
        while self._queue:
            scaled += self._step(self._nodes[heapq.heappop(self._queue)[1]])
        return scaled

    def _reach(self, node: fx.Node, mask: Tensor) -> None:
        """`node` is multiplied where `mask` holds, so all that reads it has to be looked at."""
        if node in self._outputs or "compared" in node.meta or "writes" in node.meta:
            raise NotCompensableError
        self._masks[node] = mask
        for user in node.users:
            if user.op == "output":
                raise NotCompensableError
            if user not in self._nodes:
                heapq.heappush(self._queue, (user.meta["index"], len(self._nodes)))
                self._nodes.append(user)

    def _step(self, node: fx.Node) -> list[ScaledParameter]:
        known = op_of(node.meta["name"])
        scaled = [t for t in tensors(node) if t in self._masks]
        first = tensors(node)[0]
        if known is not None and known.contraction is not None and self._reads(node, scaled):
            return [self._weight(node, scaled[0])]
        scaling = scaling_of(node)
        if scaling is Scaling.MOVES and tensors(node) == [first]:
            self._move(node, first)
        elif scaling is Scaling.HOMOGENEOUS and tensors(node) == [first]:
            self._reach(node, self._masks[first])
        elif scaling is Scaling.SUM:
            self._sum(node)
        elif self._once(node, scaled):
            self._reach(node, self._product(node, scaling, scaled[0]))
        else:
            raise NotCompensableError
        return []

    def _product(self, node: fx.Node, scaling: Scaling, scaled: fx.Node) -> Tensor:
        """The mask of a product or a contraction of which one factor is scaled."""
        mask = self._masks[scaled]
        if scaling is Scaling.PRODUCT and (node.meta["name"] != "div" or node.args[0] is scaled):
            return mask.expand(node.meta["shape"])
        if scaling is Scaling.CONTRACTION and self._cache.is_full(mask):
            return self._cache.full(node.meta["shape"])
        raise NotCompensableError

    def _once(self, node: fx.Node, scaled: list[fx.Node]) -> bool:
        """Whether one argument of `node` is scaled, and stands in one place."""
        places: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), places.append)
        return len(scaled) == 1 and places.count(scaled[0]) == 1

    def _whole(self, node: fx.Node) -> bool:
        """Whether all of a tensor is multiplied."""
        return node in self._masks and self._cache.is_full(self._masks[node])

    def _reads(self, node: fx.Node, scaled: list[fx.Node]) -> bool:
        """Whether `node` is a layer that reads what is scaled, with a weight that nothing else reads."""
        known = op_of(node.meta["name"])
        assert known is not None
        assert known.contraction is not None
        given = arguments(node)
        weight = given.get(known.contraction.weight)
        return (
            self._once(node, scaled)
            and given.get(known.contraction.input) is scaled[0]
            and isinstance(weight, fx.Node)
            and weight.meta["name"] == "parameter"
            and set(weight.users) == {node}
            and weight not in self._outputs
        )

    def _weight(self, node: fx.Node, source: fx.Node) -> ScaledParameter:
        """The entries of a layer's weight that meet what is scaled."""
        known = op_of(node.meta["name"])
        assert known is not None
        assert known.contraction is not None
        weight = arguments(node)[known.contraction.weight]
        mask, shape = self._masks[source], weight.meta["shape"]
        if self._cache.is_full(mask):
            return ScaledParameter(str(weight.target), 0, None)
        operands = tensors(node)
        pairs = [
            pair
            for pair in known.contraction.pairs(node)
            if operands[pair.operand] is source and operands[pair.weight] is weight
        ]
        if len(pairs) != 1:
            raise NotCompensableError
        at, across = pairs[0].dim % mask.dim(), pairs[0].weight_dim % len(shape)
        along = self._cache.along(mask, at)
        if along is None or len(along) != shape[across]:
            raise NotCompensableError
        return ScaledParameter(str(weight.target), across, line_of(along))

    def _move(self, node: fx.Node, source: fx.Node) -> None:
        moved = run_movement(node, {source: self._masks[source]})
        if not isinstance(moved, (tuple, list)):
            self._reach(node, moved)
            return
        for part in node.users:
            if part.meta["name"] != "part" or not isinstance(part.args[1], int):
                raise NotCompensableError
            if bool(moved[part.args[1]].any()):
                self._reach(part, moved[part.args[1]])

    def _sum(self, node: fx.Node) -> None:
        """Tensors one behind the other, of which some are scaled; or a sum, of which all terms are."""
        known = op_of(node.meta["name"])
        terms = tensors(node)
        if known is not None and known.elementwise:
            if len(terms) < 2 or not all(map(self._whole, terms)):  # adding a number is not homogeneous
                raise NotCompensableError
            self._reach(node, self._cache.full(node.meta["shape"]))
            return
        nothing = {t: torch.zeros(t.meta["shape"], dtype=torch.bool) for t in terms if t not in self._masks}
        self._reach(node, run_movement(node, nothing | {t: self._masks[t] for t in terms if t in self._masks}))


def run_movement(node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
    """Run a movement on other tensors of the same shapes."""
    args, kwargs = plain(fx.map_arg((node.args, node.kwargs), lambda held: values[held]))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def compensations(trace: Trace, scales: Sequence[Scale]) -> list[Compensation | None]:
    """For each scale the parameters before or behind it that take it up; None where there are none."""
    masks = Masks()
    return [_fold(trace, scale, masks) for scale in scales]


def _fold(trace: Trace, scale: Scale, masks: Masks) -> Compensation | None:
    try:
        return Compensation(scale, scaled_before(trace, scale, masks))
    except NotCompensableError:
        pass
    node = trace.all_nodes[scale.node]
    if scaling_of(node) not in (Scaling.PRODUCT, Scaling.CONTRACTION) or scale.argument:
        return None  # the result is not the factor times the argument
    try:
        return Compensation(scale, tuple(SearchAhead(trace, masks).run(node)))
    except NotCompensableError:
        return None
