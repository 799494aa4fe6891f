"""Factors that change with a size, and the parameters that can take them up.

Scaled dot-product attention divides by the square root of the head's size. When the size shrinks, the factor of the
original is restored by scaling what makes the query: its projection's weights and bias, or the norm before it. The
search runs backwards from the operation through operations that carry a factor along.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops import op_of
from structprune.ops.arguments import arguments
from structprune.ops.op import Scaling
from structprune.ops.relations import Scale
from structprune.tracing.provenance import plain
from structprune.tracing.trace import Trace


@dataclass(frozen=True, slots=True)
class ScaledParameter:
    """Entries of a parameter that are multiplied: those at `positions` of dimension `dim`, or all if that is None.

    What the forward multiplies by may be the parameter and a number, as in ``x * (1 + weight)``: the sum of the entries
    and `offset` is multiplied then. With `inverse`, by one over the factor.
    """

    tensor: str
    dim: int
    positions: tuple[int, ...] | None
    offset: float = 0.0
    inverse: bool = False


# An operation, and the tensor that it takes and that is to be multiplied.
Place = tuple[fx.Node, fx.Node]


@dataclass(frozen=True, slots=True)
class Compensation:
    """Where the factor `scale` can be taken up."""

    scale: Scale
    scaled: tuple[ScaledParameter, ...]


def scaling_of(node: fx.Node) -> Scaling:
    """How a factor passes an operation."""
    known = op_of(node.meta["name"])
    if known is None or (known.scaling is Scaling.MOVES and len(_tensors(node)) > 1):
        return Scaling.NONE  # where another tensor says where to, it cannot be followed
    return known.scaling


class NotCompensableError(Exception):
    """The factor cannot be carried further."""


def scaled_before(trace: Trace, scale: Scale, masks: Masks) -> tuple[ScaledParameter, ...]:
    """The parameters that make what `scale` multiplies, and nothing else.

    Raises:
        NotCompensableError: there are none, or they feed something else too.
    """
    node = trace.all_nodes[scale.node]
    operands = _tensors(node)
    source = node.args[scale.argument] if len(node.args) > scale.argument else operands[0] if operands else None
    if not isinstance(source, fx.Node):
        raise NotCompensableError
    return tuple(_Search(trace, [(node, source)], masks).run())


def scaled_together(trace: Trace, places: Sequence[Place], masks: Masks) -> tuple[ScaledParameter, ...]:
    """The parameters that make what several operations take; all of it is multiplied by one factor.

    A table that is the weight of a last layer too may take it up, if what makes that layer's input takes up the
    inverse.

    Args:
        trace: the recorded forward.
        places: operations, each with the tensor that it takes and that is to be multiplied.
        masks: kept over all searches.

    Raises:
        NotCompensableError: there are none, or they feed something else too.
    """
    search = _Search(trace, places, masks, tied=True)
    scaled = search.run()
    if search.tied:
        again = _Search(trace, search.tied, masks).run()
        if {each.tensor for each in again} & {each.tensor for each in scaled}:
            raise NotCompensableError
        scaled += [replace(each, inverse=True) for each in again]
    return tuple(scaled)


class Masks:
    """Masks and what movements make of them; the layers of a network repeat, and so do these."""

    def __init__(self) -> None:
        self._full: dict[tuple[int, ...], Tensor] = {}
        self._moved: dict[object, Tensor] = {}
        self._whole: dict[int, bool] = {}
        self._along: dict[tuple[int, int], Tensor | None] = {}
        self._reached: dict[object, list[bool]] = {}
        self._used_masks: list[Tensor] = []

    def full(self, shape: tuple[int, ...]) -> Tensor:
        """The mask that holds everything."""
        mask = self._full.get(shape)
        if mask is None:
            mask = self._full[shape] = torch.ones(shape, dtype=torch.bool)
            self._whole[id(mask)] = True
        return mask

    def is_full(self, mask: Tensor) -> bool:
        """Whether the mask holds everything."""
        whole = self._whole.get(id(mask))
        if whole is None:
            whole = self._whole[id(mask)] = bool(mask.all())
            self._used_masks.append(mask)
        return whole

    def along(self, mask: Tensor, dim: int) -> Tensor | None:
        """The mask as one of the indices of `dim`; None where the other dimensions matter too."""
        key = (id(mask), dim)
        if key not in self._along:
            flat = _lines(mask, dim)
            line = flat.any(1)
            self._along[key] = line if torch.equal(line, flat.all(1)) else None
            self._used_masks.append(mask)
        return self._along[key]

    def forward(self, node: fx.Node, mask: Tensor) -> list[bool]:
        """Whether anything of `mask`, a mask of the input of a movement, is in its result, or in each of its parts."""
        key = (str(node.target), str(plain(_others(node))), id(mask))
        if key not in self._reached:
            moved = _run(node, mask)
            pieces = moved if isinstance(moved, (tuple, list)) else [moved]
            self._reached[key] = [bool(piece.any()) for piece in pieces]
            self._used_masks.append(mask)
        return self._reached[key]

    def back(self, node: fx.Node, part: Any, mask: Tensor) -> Tensor:
        """The entries of the input of a movement that land in `mask`, a mask of its result (or of a part of it)."""
        shape = _tensors(node)[0].meta["shape"]
        key = (str(node.target), str(plain(_others(node))), shape, part, id(mask))
        source = self._moved.get(key)
        if source is None:
            numbers = torch.arange(prod(shape), dtype=torch.int32).view(shape)
            moved = _run(node, numbers)
            moved = moved if part is None else moved[part]
            flat = torch.zeros(prod(shape), dtype=torch.bool)
            flat[(moved if self.is_full(mask) else moved[mask]).reshape(-1).long()] = True
            source = flat.view(shape)
            source = self._moved[key] = self.full(shape) if bool(flat.all()) else source
            self._used_masks.append(mask)  # so that no other mask gets its id
        return source


def _others(node: fx.Node) -> Any:
    """The arguments of a node that are no tensors."""
    return fx.map_arg((node.args, node.kwargs), lambda _: None)


class _Search:
    """One walk backwards; `masks` holds which entries of each visited tensor are to be multiplied.

    Args:
        trace: the recorded forward.
        places: operations, each with the tensor that it takes and that is to be multiplied.
        cache: masks, kept over all searches.
        tied: whether layers may have a parameter as their weight that is multiplied.

    Attributes:
        tied: such layers, each with its input.
    """

    def __init__(self, trace: Trace, places: Sequence[Place], cache: Masks, *, tied: bool = False) -> None:
        self._trace = trace
        self._cache = cache
        self._places = list(places)
        self._masks: dict[fx.Node, Tensor] = {}
        self._scaled: set[tuple[fx.Node, fx.Node]] = set()  # an operation, and the argument by which it is scaled
        self._queue: list[int] = []
        self._offsets: dict[fx.Node, float] = {}
        self._may_be_tied = tied
        self.tied: list[Place] = []

    def run(self) -> list[ScaledParameter]:
        """The parameters that take the factor up."""
        scaled: list[ScaledParameter] = []
        for _, source in self._places:
            self._ask(source, self._cache.full(source.meta["shape"]))
        while self._queue:
            node = self._trace.all_nodes[-heapq.heappop(self._queue)]
            scaled += self._step(node, self._masks[node])
        for node, mask in self._masks.items():
            self._check_users(node, mask)
        return scaled

    def _ask(self, node: fx.Node, mask: Tensor, user: fx.Node | None = None) -> None:
        """`node` is to be multiplied where `mask` holds, so that the result of `user` is."""
        if user is not None:
            self._scaled.add((user, node))
        known = self._masks.get(node)
        if known is None:
            self._masks[node] = mask
            heapq.heappush(self._queue, -node.meta["index"])
        elif known is not mask:
            self._masks[node] = known | mask

    def _step(self, node: fx.Node, mask: Tensor) -> list[ScaledParameter]:
        name = node.meta["name"]
        if name == "parameter":
            return [ScaledParameter(str(node.target), *_line(mask), self._offsets.get(node, 0.0))]
        if name == "part" and isinstance(parent := node.args[0], fx.Node) and scaling_of(parent) is Scaling.MOVES:
            self._back(parent, node.args[1], mask)
            return []
        scaling = scaling_of(node)
        if scaling is Scaling.MOVES:
            self._back(node, None, mask)
        elif scaling is Scaling.HOMOGENEOUS:
            self._ask(_tensors(node)[0], mask, node)
        elif scaling is Scaling.SUM or scaling is Scaling.CONTRACTION:
            self._whole(node, mask)
        elif scaling is Scaling.PRODUCT:
            self._product(node, mask)
        elif scaling is Scaling.LAYER:
            self._affine(node, mask)
        else:
            raise NotCompensableError
        return []

    def _back(self, node: fx.Node, part: Any, mask: Tensor) -> None:
        user = node if part is None else None  # `_check_users` looks at the other parts
        self._ask(_tensors(node)[0], self._cache.back(node, part, mask), user)

    def _whole(self, node: fx.Node, mask: Tensor) -> None:
        """Scale all of a sum by scaling each term, all of a contraction by scaling its first factor."""
        tensors = _tensors(node)
        gain = _gain(node)
        if gain is not None:
            parameter, self._offsets[gain[0]] = tensors[0], gain[1]
            return self._ask(parameter, mask, node)
        if not self._cache.is_full(mask) or (node.meta["name"] in ("add", "sub") and len(tensors) < 2):
            raise NotCompensableError  # adding a number is not homogeneous
        for tensor in tensors if scaling_of(node) is Scaling.SUM else tensors[:1]:
            self._ask(tensor, self._cache.full(tensor.meta["shape"]), node)

    def _product(self, node: fx.Node, mask: Tensor) -> None:
        tensors = _tensors(node)
        first = [t for t in tensors if t.meta["name"] == "parameter"]
        first = first or [t for t in tensors if _gain(t) is not None]
        first = first or [t for t in tensors if t.meta["shape"] == node.meta["shape"]]
        if not first or (node.meta["name"] == "div" and first[0] is not node.args[0]):
            raise NotCompensableError
        chosen = first[0]
        while mask.dim() > len(chosen.meta["shape"]):
            if not torch.equal(mask.any(0), mask.all(0)):
                raise NotCompensableError
            mask = mask.any(0)
        if tuple(mask.shape) != tuple(chosen.meta["shape"]):
            raise NotCompensableError
        self._ask(chosen, mask, node)

    def _affine(self, node: fx.Node, mask: Tensor) -> None:
        """Scale the weight and bias of a layer: the entries that make the masked channels."""
        known = op_of(node.meta["name"])
        assert known is not None
        learnt = known.norm or known.contraction
        assert learnt is not None
        given = arguments(node)
        named = (given.get(learnt.weight), given.get(learnt.bias))
        parameters = [parameter for parameter in named if isinstance(parameter, fx.Node)]
        along = self._cache.along(mask, known.channel_dim)
        if along is None or not parameters:
            raise NotCompensableError
        for parameter in parameters:
            shape = parameter.meta["shape"]
            if len(shape) > 1 and known.norm is not None:
                raise NotCompensableError
            # By the columns of a table, and of a matrix that is multiplied from the right.
            made = known.contraction is not None and known.contraction.kind in ("embedding", "product")
            entries = along if made else along.view(-1, *[1] * (len(shape) - 1))
            self._ask(parameter, entries.expand(shape), node)

    def _once(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether `user` takes `node` as the argument by which it is scaled, and nowhere else.

        Of ``(x @ x.T) @ x`` the first factor is scaled, and of that one `x`: which would scale the other two as well.
        """
        if (user, node) in self._scaled:
            if scaling_of(user) is Scaling.SUM:
                return True  # every term is scaled
        elif (user, node) not in self._places:
            return False
        places: list[fx.Node] = []
        fx.map_arg((user.args, user.kwargs), places.append)
        return places.count(node) == 1

    def _check_users(self, node: fx.Node, mask: Tensor) -> None:
        """Whatever else reads the tensor must read other entries of it."""
        if node in self._trace.outputs.values() or node in self._trace.training_outputs:
            raise NotCompensableError
        for user in node.users:
            if user.op == "output" or self._once(user, node) or self._is_tied(user, node, mask):
                continue
            if user in self._masks or scaling_of(user) is not Scaling.MOVES or _tensors(user)[0] is not node:
                raise NotCompensableError
            for place, reached in enumerate(self._cache.forward(user, mask)):
                if reached and self._reads_part(user, place):
                    raise NotCompensableError

    def _is_tied(self, user: fx.Node, node: fx.Node, mask: Tensor) -> bool:
        """Whether `user` is a layer whose weight is a parameter that is multiplied as a whole; notes its input."""
        known = op_of(user.meta["name"])
        if not self._may_be_tied or known is None or known.contraction is None or not self._cache.is_full(mask):
            return False
        given = arguments(user)
        source = given.get(known.contraction.input)
        biased = isinstance(given.get(known.contraction.bias), fx.Node)
        if given.get(known.contraction.weight) is not node or not isinstance(source, fx.Node) or biased:
            return False
        self.tied.append((user, source))
        return source not in self._masks and known.contraction.kind != "embedding"

    def _reads_part(self, user: fx.Node, place: int) -> bool:
        """Whether anything off the path reads the result of a movement, or its part number `place`."""
        parts = [p for p in user.users if p.meta["name"] == "part" and p.args[1] == place]
        return not parts or any(p not in self._masks and p.users for p in parts)


def _gain(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The parameter and the number of a sum of both, such as ``1 + weight.float()``; None if `node` is no such sum."""
    numbers = [value for value in node.args if isinstance(value, (int, float)) and not isinstance(value, bool)]
    found = _tensors(node)
    if node.meta["name"] != "add" or len(numbers) != 1 or len(node.args) != 2 or node.kwargs or len(found) != 1:
        return None
    parameter = found[0]
    while scaling_of(parameter) is Scaling.HOMOGENEOUS and parameter.meta["name"] != "relu":
        parameter = _tensors(parameter)[0]
    return (parameter, float(plain(numbers[0]))) if parameter.meta["name"] == "parameter" else None


def _lines(mask: Tensor, dim: int) -> Tensor:
    """The mask as a matrix with one line for each index of `dim`."""
    return mask.movedim(dim, 0).reshape(mask.shape[dim], -1)


def line_of(along: Tensor) -> tuple[int, ...] | None:
    """The positions at which a mask of one dimension holds; None for all."""
    return None if bool(along.all()) else tuple(torch.nonzero(along).flatten().tolist())


def _line(mask: Tensor) -> tuple[int, tuple[int, ...] | None]:
    """The mask of a parameter as positions along one dimension."""
    # A mask that was expanded from one dimension is read there, without looking at every entry.
    spread = [dim for dim in range(mask.dim()) if mask.stride(dim) and mask.shape[dim] > 1]
    for dim in spread if len(spread) == 1 else range(mask.dim()):
        if len(spread) == 1:
            line = mask[tuple(slice(None) if d == dim else 0 for d in range(mask.dim()))]
        else:
            flat = _lines(mask, dim)
            line = flat.any(1)
            if not torch.equal(line, flat.all(1)):
                continue
        return dim, line_of(line)
    raise NotCompensableError


def _tensors(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def _run(node: fx.Node, value: Tensor) -> Any:
    """Run a movement on another tensor of the same shape."""
    source = _tensors(node)[0]

    def swap(item: Any) -> Any:
        return value if item is source else plain(item)

    args = [swap(item) for item in node.args]
    kwargs = {key: swap(item) for key, item in node.kwargs.items()}
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
