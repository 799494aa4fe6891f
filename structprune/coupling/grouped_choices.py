"""Other channels in each group of a grouped convolution, equally many of each.

The weight of a grouped convolution is ``(out, in / groups, ...)``, and its rows for one group multiply the channels of
this group alone. Of 4 channels in 2 groups, ``[[0, 1], [2, 3]]``, one may keep 0 and 3 as well as 0 and 2: then rows of
the first group keep their first column, and those of the second group their second column::

    weight[0:out/2, [0]],  weight[out/2:out, [1]]

The product (groups x channels in a group) says that all groups keep the same ones, since one dimension of the weight
stands for all groups. A choice for each group leaves the product, and is exact where nothing but such weights looks at
the channels in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.naming import Dimension, Layer
from structprune.coupling.solve import FactoredAxis, Mask
from structprune.ops import op_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.relations import Axis, Ids
from structprune.tracing.provenance import plain


@dataclass(frozen=True, slots=True, eq=False)
class GroupedChoice:
    """A removal that takes other channels from each group.

    Attributes:
        removed: the components that go. Of those that stand for a position in every group, the last ones are marked:
            they only count.
        positions: those components, shape ``(channels in a group,)``.
        kept: the positions that stay in each group, shape ``(groups, kept in a group)``; of a group that goes as a
            whole, the first ones.
    """

    removed: Mask
    positions: Ids
    kept: NDArray[np.int64]


def grouped_choice(
    graph: ChannelGraph, target: Group | Layer | Dimension, indices: Sequence[int]
) -> GroupedChoice | None:
    """The removal of output channels `indices` of a layer, if that takes equally many but other ones of each group.

    None where whole factors say the same, where the groups would keep different numbers, or where more than the weights
    of grouped convolutions looks at the channels in a group.
    """
    if isinstance(target, Group):
        return None
    axis = graph.output_axis(target)[1]
    gone = np.zeros(axis.size, dtype=bool)
    picked = np.asarray(list(indices), dtype=np.int64)
    if not axis.free or not len(picked) or picked.min() < 0 or picked.max() >= axis.size:
        return None
    gone[picked] = True
    parts = graph.components.of(axis)
    factored = _only_product(graph, parts)
    if factored is None or not len(graph.roots.taking(parts, picked)[1]):
        return None
    lines = gone.reshape(factored.cells.shape)
    whole = np.asarray(lines.all(axis=1))
    counts = (~lines[~whole]).sum(axis=1)
    if not len(counts) or counts.min() != counts.max() or not _seen_by_weights_alone(graph, factored):
        return None
    removed = np.zeros(graph.components.count, dtype=bool)
    removed[factored.factors[0][whole]] = True
    removed = graph.components.closure(removed)
    removed[parts[gone]] = True
    removed[factored.factors[1][counts[0] :]] = True
    # A stable sort by what goes puts the positions that stay first, in their order.
    kept = np.argsort(lines, axis=1, kind="stable")[:, : counts[0]]
    return GroupedChoice(removed, factored.factors[1], np.where(whole[:, None], np.arange(counts[0]), kept))


def _only_product(graph: ChannelGraph, parts: Ids) -> FactoredAxis | None:
    """The product ``(groups, channels in a group)`` that has these channels as its cells, if no other one has some."""
    inside = np.zeros(graph.components.count, dtype=bool)
    inside[parts] = True
    products = [f for f in graph.components.factored_axes if inside[f.cells].any()]
    factors = [part for f in graph.components.factored_axes for part in f.factors]
    if len(products) != 1 or products[0].dims != (0, 1) or any(inside[part].any() for part in factors):
        return None
    free = bool(graph.components.roots[products[0].factors[1]].all() and not graph.components.pinned[parts].any())
    return products[0] if free and np.array_equal(products[0].cells.ravel(), parts) else None


def _seen_by_weights_alone(graph: ChannelGraph, factored: FactoredAxis) -> bool:
    """Whether the positions in a group belong to the second dimension of weights of grouped convolutions alone."""
    positions = np.zeros(graph.components.count, dtype=bool)
    positions[factored.factors[1]] = True

    def holds(axis: Axis) -> bool:
        return axis.free and bool(positions[graph.components.of(axis)].any())

    others = [part for f in graph.components.factored_axes if f is not factored for part in (f.cells, *f.factors)]
    if any(positions[part].any() for part in others) or any(map(holds, _counted(graph))):
        return False
    groups = len(factored.factors[0])
    if not all(_only_weighs_groups(graph, node, groups, holds) for node in graph.trace.all_nodes):
        return False
    scaled = {(c.tensor, c.dim) for compensation in graph.compensations for c in compensation.scaled}
    return not any(holds(slot.axis) and (slot.tensor, slot.dim) in scaled for slot in graph.slots)


def _counted(graph: ChannelGraph) -> Iterator[Axis]:
    """The axes whose numbers of channels, or pieces of them, mean something to the forward."""
    relations = graph.channels.relations
    for each in (*relations.constraints, *relations.bounds, *relations.scales):
        yield each.axis
    for axis, _ in relations.pieces:
        yield axis
    for reduction in relations.reductions:
        yield from reduction.axes


def _only_weighs_groups(graph: ChannelGraph, node: fx.Node, groups: int, holds: Callable[[Axis], bool]) -> bool:
    """Whether a tensor has no axis that `holds` but dimension 1, of the weight of convolutions of so many groups."""
    axes = graph.channels.axes[node.meta["index"]]
    for each in axes if isinstance(axes, list) else [axes]:
        held = [dim for dim, axis in enumerate(each or ()) if holds(axis)]
        if held and not (held == [1] and _weighs_groups(node, groups)):
            return False
    return True


def _weighs_groups(node: fx.Node, groups: int) -> bool:
    """Whether a tensor is a parameter that serves for nothing but the weight of convolutions of so many groups."""
    return node.meta["name"] == "parameter" and all(_is_grouped(user, node, groups) for user in node.users)


def _is_grouped(user: fx.Node, weight: fx.Node, groups: int) -> bool:
    known = None if user.op == "output" else op_of(user.meta["name"])
    if known is None or known.contraction is None or known.contraction.kind not in ("convolution", "transposed"):
        return False
    return tensors(user)[1] is weight and plain(arguments(user).get("groups", 1)) == groups
