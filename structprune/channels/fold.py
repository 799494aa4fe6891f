"""Factors that change with a size, and the parameters that can take them up.

Scaled dot-product attention divides by the square root of the head's size. When the size shrinks, the factor of the
original is restored by scaling what makes the query: its projection's weights and bias, or the norm before it. The
search runs backwards from the operation through operations that carry a factor along.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structprune.channels.relations import Scale
from structprune.tracing.provenance import plain
from structprune.tracing.trace import Trace

MOVEMENT = frozenset({
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "unsqueeze", "squeeze", "getitem",
    "select", "narrow", "chunk", "split", "split_with_sizes", "unbind", "contiguous", "clone", "expand", "flip", "roll",
    "T", "mT", "t", "python.split",
})  # fmt: skip
HOMOGENEOUS = frozenset({"neg", "to", "float", "half", "bfloat16", "double", "type_as", "dropout", "detach", "relu"})
SUMS = frozenset({"add", "sub", "cat", "stack"})
CONTRACTIONS = frozenset({"matmul", "bmm", "mm", "python.einsum"})
AFFINE = {"linear": -1, "conv1d": 1, "conv2d": 1, "conv3d": 1, "layer_norm": -1, "rms_norm": -1, "batch_norm": 1}  # the dimension of a layer's channels


@dataclass(frozen=True, slots=True)
class Carrier:
    """Entries of a parameter that are multiplied: those at `positions` of dimension `dim`, or all if that is None."""

    tensor: str
    dim: int
    positions: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Fold:
    """Where the factor `scale` can be taken up."""

    scale: Scale
    carriers: tuple[Carrier, ...]


class _NoCarrier(Exception):
    """The factor cannot be carried further back."""


def fold(trace: Trace, scale: Scale) -> Fold | None:
    """The parameters that take up `scale`; None where there are none, or where they feed something else too."""
    node = trace.nodes[scale.node]
    source = node.args[scale.argument] if len(node.args) > scale.argument else node.kwargs.get("query")
    if not isinstance(source, fx.Node):
        return None
    try:
        return Fold(scale, tuple(_Search(trace, node).run(source)))
    except _NoCarrier:
        return None


class _Search:
    """One walk backwards; `masks` holds which entries of each visited tensor are to be multiplied."""

    def __init__(self, trace: Trace, consumer: fx.Node) -> None:
        self._trace = trace
        self._consumer = consumer
        self._masks: dict[fx.Node, Tensor] = {}
        self._queue: list[int] = []

    def run(self, source: fx.Node) -> list[Carrier]:
        carriers: list[Carrier] = []
        self._ask(source, torch.ones(source.meta["shape"], dtype=torch.bool))
        while self._queue:
            node = self._trace.nodes[-heapq.heappop(self._queue)]
            carriers += self._step(node, self._masks[node])
        for node, mask in self._masks.items():
            self._check_users(node, mask)
        return carriers

    def _ask(self, node: fx.Node, mask: Tensor) -> None:
        known = self._masks.get(node)
        if known is None:
            self._masks[node] = mask
            heapq.heappush(self._queue, -node.meta["index"])
        else:
            self._masks[node] = known | mask

    def _step(self, node: fx.Node, mask: Tensor) -> list[Carrier]:
        name = node.meta["name"]
        if name == "part":
            parent = node.args[0]
            assert isinstance(parent, fx.Node)
            if parent.meta["name"] in MOVEMENT:
                self._back(parent, node.args[1], mask)
                return []
        elif name in MOVEMENT:
            self._back(node, None, mask)
            return []
        elif name in HOMOGENEOUS:
            self._ask(_tensors(node)[0], mask)
            return []
        elif name in SUMS:
            self._sum(node, mask)
            return []
        elif name in ("mul", "div"):
            self._product(node, mask)
            return []
        elif name in CONTRACTIONS:
            if not bool(mask.all()):
                raise _NoCarrier
            source = _tensors(node)[0]
            self._ask(source, torch.ones(source.meta["shape"], dtype=torch.bool))
            return []
        elif name in AFFINE:
            self._affine(node, mask)
            return []
        elif name == "parameter":
            return [Carrier(str(node.target), *_line(mask))]
        raise _NoCarrier

    def _back(self, node: fx.Node, part: Any, mask: Tensor) -> None:
        source = _tensors(node)[0]
        numbers = torch.arange(mask.new_empty(source.meta["shape"]).numel(), dtype=torch.int32)
        moved = _run(node, numbers.view(source.meta["shape"]))
        moved = moved if part is None else moved[part]
        back = torch.zeros(numbers.shape, dtype=torch.bool)
        back[moved[mask].long()] = True
        self._ask(source, back.view(source.meta["shape"]))

    def _sum(self, node: fx.Node, mask: Tensor) -> None:
        tensors = _tensors(node)
        if not bool(mask.all()) or len(tensors) + (node.meta["name"] in ("add", "sub")) < 2:
            raise _NoCarrier
        if node.meta["name"] in ("add", "sub") and len(tensors) < 2:
            raise _NoCarrier  # adding a number is not homogeneous
        for tensor in tensors:
            self._ask(tensor, torch.ones(tensor.meta["shape"], dtype=torch.bool))

    def _product(self, node: fx.Node, mask: Tensor) -> None:
        tensors = _tensors(node)
        first = [t for t in tensors if t.meta["name"] == "parameter"] or [
            t for t in tensors if t.meta["shape"] == node.meta["shape"]
        ]
        if not first or (node.meta["name"] == "div" and first[0] is not node.args[0]):
            raise _NoCarrier
        chosen = first[0]
        while mask.dim() > len(chosen.meta["shape"]):
            if not torch.equal(mask.any(0), mask.all(0)):
                raise _NoCarrier
            mask = mask.any(0)
        if tuple(mask.shape) != tuple(chosen.meta["shape"]):
            raise _NoCarrier
        self._ask(chosen, mask)

    def _affine(self, node: fx.Node, mask: Tensor) -> None:
        """Scale the weight and bias of a layer: the entries that make the masked channels."""
        name = node.meta["name"]
        parameters = [t for t in _tensors(node)[1:]]
        if name in ("batch_norm", "instance_norm"):
            parameters = [t for t in (node.args[1], node.args[2]) if isinstance(t, fx.Node)]
        flat = _lines(mask, AFFINE[name])
        along = flat.any(1)
        if not parameters or not torch.equal(along, flat.all(1)):
            raise _NoCarrier
        for parameter in parameters:
            shape = parameter.meta["shape"]
            if len(shape) > 1 and name in ("layer_norm", "rms_norm"):
                raise _NoCarrier
            self._ask(parameter, along.view(-1, *[1] * (len(shape) - 1)).expand(shape))

    def _check_users(self, node: fx.Node, mask: Tensor) -> None:
        """Whatever else reads the tensor must read other entries of it."""
        if node in self._trace.outputs:
            raise _NoCarrier
        for user in node.users:
            if user is self._consumer or user in self._masks or user.op == "output":
                continue
            if user.meta["name"] not in MOVEMENT or _tensors(user)[0] is not node:
                raise _NoCarrier
            moved = _run(user, mask)
            for place, piece in enumerate(moved if isinstance(moved, (tuple, list)) else [moved]):
                parts = [p for p in user.users if p.meta["name"] == "part" and p.args[1] == place]
                if bool(piece.any()) and (not parts or any(p not in self._masks and p.users for p in parts)):
                    raise _NoCarrier


def _lines(mask: Tensor, dim: int) -> Tensor:
    """The mask as a matrix with one line for each index of `dim`."""
    return mask.movedim(dim, 0).reshape(mask.shape[dim], -1)


def _line(mask: Tensor) -> tuple[int, tuple[int, ...] | None]:
    """The mask of a parameter as positions along one dimension."""
    if bool(mask.all()):
        return 0, None
    for dim in range(mask.dim()):
        flat = _lines(mask, dim)
        if torch.equal(flat.any(1), flat.all(1)):
            return dim, tuple(torch.nonzero(flat.any(1)).flatten().tolist())
    raise _NoCarrier


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
