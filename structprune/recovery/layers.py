"""Which layers are solved again, and what each has to meet: read off the trace.

With channels of ``conv1`` removed in ``y = bn2(conv2(relu(bn1(conv1(x)))))`` and ``y + x``, the result of ``conv2`` has
changed. It is the `Consumer` to solve: its result has to bring the sum ``y + x`` to the original's, and a constant can
be added to the bias of ``bn2``. While channels are chosen, ``conv2`` is a `GroupConsumer` of the group that ``conv1``
makes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group, Member
from structprune.coupling.solve import Mask
from structprune.ops import kind_of, layer_of, op_of
from structprune.ops.arguments import arguments
from structprune.ops.op import CONVOLUTIONS, Norm
from structprune.ops.relations import Axis, Ids


@dataclass(frozen=True, slots=True)
class Consumer:
    """An operation with a held weight that is solved, and the later operation whose result it has to correct.

    Attributes:
        node: number of the operation.
        weight: name of its weight.
        bias: name of the parameter that takes a constant: its own bias or that of the batch norm behind it; None if
            there is neither.
        norms: numbers of the batch norms between it and `target`.
        target: number of the operation whose result has to meet the original's: itself, a norm or a sum behind it.
        diagonal: whether the weight scales each channel by itself (norms and plain products).
        own_bias: whether `bias` is added before `norms` scale.
    """

    node: int
    weight: str
    bias: str | None
    norms: tuple[int, ...]
    target: int
    diagonal: bool = False
    own_bias: bool = True

    @property
    def layer(self) -> str:
        """Path of the module that holds the weight."""
        return self.weight.rpartition(".")[0] or self.weight


def consumers(
    graph: ChannelGraph, removed: Mask, begins: Collection[fx.Node] = (), without: Collection[fx.Node] = ()
) -> list[Consumer]:
    """The layers to solve once channels or operations are removed, in the order of the forward.

    Args:
        graph: of the original.
        removed: marks the components that are removed.
        begins: operations whose results differ though no channel of theirs is removed.
        without: operations that are removed themselves.
    """
    changed = changed_operations(graph, removed, begins)
    layers: list[Consumer] = []
    last_into: dict[int, int] = {}  # for each target, the last layer that goes into it
    for node in graph.trace.nodes:
        if layer_of(node.meta["name"]) is None or node in without:
            continue
        consumer = as_consumer(graph, node)
        if consumer is not None and graph.trace.nodes[consumer.target] in changed:
            last_into[consumer.target] = consumer.node
            layers.append(consumer)
    # Of several layers that go into one sum the last one corrects it; the others meet their own results.
    layers = [c if last_into[c.target] == c.node else _without_sum(graph, c) for c in layers]
    covered = {number for consumer in layers for number in consumer.norms}
    scaling = [norm for norm in _scaling_layers(graph, changed) if graph.trace.nodes[norm.node] not in without]
    layers += [norm for norm in scaling if norm.node not in covered]
    return sorted(layers, key=lambda c: c.node)


# -- what has changed ------------------------------------------------------------------------------------------------


def kept_indices(graph: ChannelGraph, removed: Mask, row: Axis) -> Ids | None:
    """Original indices that are kept along a dimension of channels, or None if all are.

    Of 4 channels in the components 7, 8, 9 and 9, with ``removed[8]`` set, it is [0, 2, 3].
    """
    if not row.free:
        return None
    lost = removed[graph.components.of(row)]
    return np.flatnonzero(~lost) if lost.any() else None


class KeptParts(Sequence[Tensor]):
    """The kept channels of the original's results, each made when it is asked for: a copy of all would double them.

    Args:
        results: of each batch, with all channels.
        kept: the indices of each dimension that are kept; None where all are. With those of 6 of 8 channels in
            dimension 1, (16, 8, 5, 5) becomes (16, 6, 5, 5).
    """

    def __init__(self, results: list[Tensor], kept: Sequence[Ids | None]) -> None:
        self._results, self._kept = results, kept

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, number: Any) -> Any:
        tensor = self._results[number]
        for dim, index in enumerate(self._kept):
            if index is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        return tensor

    def shape(self, number: int) -> list[int]:
        """The shape of one of them."""
        sizes = list(self._results[number].shape)
        return [size if index is None else len(index) for size, index in zip_longest(sizes, self._kept)]


def changed_operations(graph: ChannelGraph, removed: Mask, begins: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The operations whose kept channels differ from the original's, or may.

    The first ones sum over dimensions with removed channels, which their result does not have, or normalise over them.
    Recurrent ones sum over channels that their result has as well.
    """
    changed: set[fx.Node] = set()
    normalising = {reduction.node for reduction in graph.channels.relations.reductions}
    for node in graph.trace.nodes:
        sources = node.all_input_nodes
        if node in begins or any(source in changed for source in sources):
            changed.add(node)
            continue
        lost = set().union(*(_removed_components(graph, removed, source) for source in sources))
        sums = kind_of(node.meta["name"]) == "recurrent" or node.meta["index"] in normalising
        if lost and (sums or not lost <= _removed_components(graph, removed, node)):
            changed.add(node)
    return changed


def _removed_components(graph: ChannelGraph, removed: Mask, node: fx.Node) -> set[int]:
    """The removed components among the channels of a result."""
    axes = graph.channels.axes[node.meta["index"]]
    components: set[int] = set()
    for axis in axes if isinstance(axes, tuple) else ():
        if isinstance(axis, Axis) and axis.free:
            on_axis = graph.components.of(axis)
            components.update(on_axis[removed[on_axis]].tolist())
    return components


# -- what a layer has to meet ----------------------------------------------------------------------------------------


def as_consumer(graph: ChannelGraph, node: fx.Node, sums: bool = True) -> Consumer | None:
    """A layer's operation as one to solve, or None if its weight is not held, or is used in several places.

    Args:
        graph: of the original.
        node: the operation.
        sums: whether its target may be a sum that its result goes into.
    """
    layer, given = layer_of(node.meta["name"]), arguments(node)
    assert layer is not None
    weight, x = owned_name(given.get(layer.weight)), given.get(layer.input)
    if weight is None or not isinstance(x, fx.Node):
        return None
    if node.meta["name"] == "addmm" and (node.kwargs.keys() & {"alpha", "beta"}):
        return None
    return _with_target(node, weight, owned_name(given.get(layer.bias)), sums)


def _with_target(node: fx.Node, weight: str, bias: str | None, sums: bool) -> Consumer:
    """Follow the result through batch norms and operations that do nothing, up to the sum that it goes into."""
    own_bias, norms, at = True, list[int](), node
    while (user := _only_user(at)) is not None:
        name = user.meta["name"]
        if name == "batch_norm" and user.args and user.args[0] is at and kind_of(node.meta["name"]) in CONVOLUTIONS:
            norms.append(user.meta["index"])
            shift = owned_name(arguments(user).get("bias"))
            if shift is not None:
                bias, own_bias = shift, False
        elif name == "add" and sums and _is_sum(user, at):
            at = user
            break
        elif not _is_identity(user):
            break
        at = user
    return Consumer(node.meta["index"], weight, bias, tuple(norms), at.meta["index"], own_bias=own_bias)


def _without_sum(graph: ChannelGraph, consumer: Consumer) -> Consumer:
    """The same layer with a target in front of the sum."""
    node = graph.trace.nodes[consumer.node]
    layer = layer_of(node.meta["name"])
    bias = None if layer is None else owned_name(arguments(node).get(layer.bias))
    return _with_target(node, consumer.weight, bias, sums=False)


def owned_name(value: Any) -> str | None:
    """The name of a tensor that the model holds and that only one operation uses."""
    if isinstance(value, fx.Node) and value.meta["name"] == "parameter" and len(value.users) == 1:
        return str(value.target)
    return None


def _is_identity(node: fx.Node) -> bool:
    """Whether an operation returns its input in eval mode: dropout, or a copy in another layout."""
    known, sources = op_of(node.meta["name"]), node.all_input_nodes
    if known is None or not sources:
        return False
    same = all(sources[0].meta.get(key) == node.meta.get(key) for key in ("shape", "dtype"))
    return same and (known.converts or known.training_only)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _is_sum(node: fx.Node, part: fx.Node) -> bool:
    """Whether `node` adds `part` to another tensor of the same shape, once."""
    others = [arg for arg in node.args if arg is not part]
    return (
        len(node.args) == 2
        and len(others) == 1
        and isinstance(others[0], fx.Node)
        and not node.kwargs
        and others[0].meta.get("shape") == part.meta["shape"] == node.meta.get("shape")
    )


# -- layers that scale channels --------------------------------------------------------------------------------------


def _scaling_layers(graph: ChannelGraph, changed: set[fx.Node]) -> Iterator[Consumer]:
    """Norms, and products with a held vector, whose result has changed."""
    for node in graph.trace.nodes:
        if node not in changed:
            continue
        op, number = op_of(node.meta["name"]), node.meta["index"]
        if op is not None and op.norm is not None:
            given = arguments(node)
            weight, bias = owned_name(given.get(op.norm.weight)), owned_name(given.get(op.norm.bias))
            if weight is not None and _is_by_channel(op.norm, given):
                yield Consumer(number, weight, bias, (), number, diagonal=True)
        elif node.meta["name"] == "mul" and "writes" not in node.meta:
            weight = _scaling_vector(node)
            if weight is not None:
                yield Consumer(number, weight, None, (), number, diagonal=True)


def _is_by_channel(norm: Norm, given: dict[str, Any]) -> bool:
    """Whether a norm's weight has one dimension."""
    shape = given.get(norm.shape)
    return not norm.shape or (isinstance(shape, (tuple, list)) and len(shape) == 1)


def _scaling_vector(node: fx.Node) -> str | None:
    """The held vector by which a product scales the last dimension of a tensor: ``x * scale``, (2, 5, 8) by (8,)."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for vector, x in (node.args, node.args[::-1]):
        name = owned_name(vector)
        if name is None or not isinstance(vector, fx.Node) or not isinstance(x, fx.Node):
            continue
        shape = vector.meta["shape"]
        if len(shape) == 1 and node.meta["shape"] == x.meta["shape"] and shape[-1] == x.meta["shape"][-1]:
            return name
    return None


# -- the consumers of a group ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupConsumer:
    """An operation that sums over the channels of a group.

    Attributes:
        node: the operation.
        places: the features that each channel makes, shape ``(channels, features of a channel)``.
    """

    node: fx.Node
    places: Tensor

    @property
    def number(self) -> int:
        """Of the operation."""
        return self.node.meta["index"]


# The dimension of the weight that the input's channels have, by the kind of its contraction.
_INPUT_DIM = {"linear": 1, "product": 0, "convolution": 1, "transposed": 0}


def group_consumers(graph: ChannelGraph, group: Group) -> list[GroupConsumer]:
    """Operations that sum over the channels of a group with a held weight and without groups of their own.

    They are in the order of the group's members, and of the forward for each.
    """
    consumers: list[GroupConsumer] = []
    for member in group.members:
        for node in graph.trace.nodes:
            if layer_of(node.meta["name"]) is None:
                continue
            if not any(str(source.target) == member.tensor for source in node.all_input_nodes):
                continue
            kernel = _kernel_size(node, member)
            if kernel is None:
                continue
            places = _places(member.positions, member.channels, group.channels, kernel)
            if places is not None:
                consumers.append(GroupConsumer(node, places))
    return consumers


def _kernel_size(node: fx.Node, member: Member) -> int | None:
    """Entries of a layer's kernel, if a group's member is its weight with the channels of its input; else None."""
    layer, given = layer_of(node.meta["name"]), arguments(node)
    assert layer is not None
    weight, groups = given.get(layer.weight), given.get("groups") or 1
    input_dim = _INPUT_DIM.get(layer.kind)
    if not isinstance(weight, fx.Node) or str(weight.target) != member.tensor or groups != 1:
        return None
    shape = weight.meta["shape"]
    return int(np.prod(shape[2:])) if member.dim == input_dim and len(shape) >= 2 else None


def _places(positions: np.ndarray, channels: np.ndarray, count: int, kernel: int) -> Tensor | None:
    """The features that each channel makes, shape ``(count, features)``; None if not all make equally many.

    Args:
        positions: indices along the weight's dimension of input channels, shape ``(entries,)``.
        channels: the channel of the group at each of them.
        count: number of channels.
        kernel: entries of the kernel; input channel ``i`` makes features ``i * kernel`` to ``(i + 1) * kernel - 1``.

    Example:
        Two channels at the positions 0, 2 and 1, 3, with a kernel of 2 entries:

        >>> _places(np.array([0, 1, 2, 3]), np.array([0, 1, 0, 1]), 2, 2)
        tensor([[0, 1, 4, 5],
                [2, 3, 6, 7]])
    """
    order = np.lexsort((positions, channels))
    numbers = np.bincount(channels, minlength=count)
    if numbers.min() != numbers.max() or not numbers.max():
        return None
    by_channel = positions[order].reshape(count, -1)
    return torch.from_numpy((by_channel[:, :, None] * kernel + np.arange(kernel)).reshape(count, -1))
