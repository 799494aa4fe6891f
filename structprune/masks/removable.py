"""Which channels may go without a change of what the network computes, and the constants that they leave behind.

At first all channels that can go count as removable. The operations are looked at from the last to the first: where an
operation of whose result something is kept needs a channel, the channel is kept. What is still removable in the end is
the largest set that can go. A channel is not needed where it is a constant that a layer can take into its bias, or
where all weights that read it are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.solve import Mask
from structprune.masks.constants import Constants
from structprune.masks.folding import Fold, Places, all_by_channel, by_channel, part_of_state
from structprune.masks.layer_calls import KINDS, Layer
from structprune.masks.states import along
from structprune.ops import layer_of, op_of
from structprune.ops.arguments import tensors
from structprune.ops.relations import Axis, Ids
from structprune.tracing.trace import describe

# Place of an argument and its dimension -> the zeros of what it is multiplied by there.
_Summed = dict[tuple[int, int], Mask | None]


class RemovableChannels:
    """The channels that may go.

    Args:
        graph: the coupled channels of the network.
        constants: its constants.

    Attributes:
        removed: for each component, whether it goes.
        compensations: what is added to biases once they are gone.
        reasons: why a component stays, by its number.
    """

    def __init__(self, graph: ChannelGraph, constants: Constants) -> None:
        self._graph, self._constants = graph, constants
        self._places = Places(graph)
        self.reasons: dict[int, str] = {}
        self._off = np.zeros(graph.components.count, dtype=bool)
        for group in graph.groups():
            self._off[group.components] = True
        self._reduced: dict[int, list[Axis]] = {}
        for reduction in graph.channels.relations.reductions:
            self._reduced.setdefault(reduction.node, []).extend(reduction.axes)
        self._refresh()
        while self._sweep() or self._allow():
            pass
        self.compensations = [
            compensation for layer in constants.layers.values() if (compensation := self._fold(layer)) is not None
        ]

    @property
    def chosen(self) -> Ids:
        """The roots that go."""
        return np.flatnonzero(self._off)

    # -- what must be kept ---------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        self.removed: Mask = self._graph.components.removed(self.chosen)

    def off(self, axis: Axis) -> Mask:
        """Which indices of a dimension go."""
        return self.removed[self._graph.components.of(axis)] if axis.free else np.zeros(axis.size, dtype=bool)

    def _keep(self, axis: Axis, which: Mask, why: str) -> bool:
        """Keep the channels `which` of a dimension; whether one of them was removable before."""
        parts = self._graph.components.of(axis)[which & self.off(axis)]
        if not len(parts):
            return False
        _, roots = self._graph.roots.of(parts)
        for number in (*parts.tolist(), *roots.tolist()):
            self.reasons.setdefault(number, why)
        self._off[roots] = False
        self._refresh()
        return True

    def _sweep(self) -> bool:
        """Look at each operation once; whether any channel turned out to be needed."""
        changed = False
        for node in reversed(self._graph.trace.all_nodes):
            if node.op.startswith("call_") and node.meta["name"] != "part" and self._gives(node):
                changed = self._look(node) or changed
        return changed

    def _gives(self, node: fx.Node) -> bool:
        """Whether anything of the result is kept."""
        axes = self._graph.channels.axes[node.meta["index"]]
        results = axes if isinstance(axes, list) else [axes]
        return any(
            part is not None and not any(self.off(axis).all() and axis.size for axis in part) for part in results
        )

    def _look(self, node: fx.Node) -> bool:
        if node.meta["index"] >= len(self._graph.trace.nodes):
            return self._in_training(node)
        if node in self._constants.apart:
            return False
        if node in self._constants.layers:
            return self._look_at_layer(self._constants.layers[node])
        changed = False
        normalised, summed = self._normalised(node), self._needed(node)
        where = describe(node, self._graph.trace)
        for place, source in enumerate(tensors(node)):
            for dim, axis in enumerate(self._constants.axes(source)):
                if axis.free and self.off(axis).any():
                    zero = along(self._constants.of(source), dim).numpy()
                    which, why = _read_of(axis, (place, dim), zero, normalised, summed)
                    changed = self._keep(axis, which, why.format(where)) or changed
        return changed

    def _normalised(self, node: fx.Node) -> set[object]:
        """The keys of the axes that an operation normalises over; a plain sum does not normalise."""
        known = op_of(node.meta["name"])
        if known is not None and known.over_kept is None:
            return set()
        return {axis.key for axis in self._reduced.get(node.meta["index"], ())}

    def _needed(self, node: fx.Node) -> _Summed | None:
        """The dimensions that an operation sums away, with the zeros of what they are multiplied by there.

        None if it is not known which those are.
        """
        known = op_of(node.meta["name"])
        if known is None or known.contraction is None or not known.own:
            return None
        if known.contraction.kind not in KINDS | {"attention"} or node.meta["index"] in self._graph.channels.unforeseen:
            return None
        given = tensors(node)
        zeros: _Summed = {}
        for pair in known.contraction.pairs(node):
            for mine, dim, theirs, other in (
                (pair.operand, pair.dim, pair.weight, pair.weight_dim),
                (pair.weight, pair.weight_dim, pair.operand, pair.dim),
            ):
                a, b = self._constants.axes(given[mine]), self._constants.axes(given[theirs])
                if -dim > len(a):
                    continue
                zero = None
                if -other <= len(b) and b[other].free:
                    zero = along(self._constants.of(given[theirs]), other % len(b)).numpy()
                zeros[mine, dim % len(a)] = zero
        return zeros

    def _look_at_layer(self, layer: Layer) -> bool:
        axis = self._constants.axes(layer.x)[layer.dim]
        if not self.off(axis).any():
            return False
        where = describe(layer.node, self._graph.trace)
        weight = self._constants.weight(layer.weight)
        kept = torch.from_numpy(~self.off(self._constants.axes(layer.node)[layer.dim]))
        read = by_channel(layer.read(weight, kept), layer.dim).numpy() != 0
        state = self._constants.of(layer.x)
        known = all_by_channel(state.known, layer.dim, axis.size).numpy()
        zero = all_by_channel(state.zero, layer.dim, axis.size).numpy()
        changed = self._keep(axis, read & ~known, f"it is read by {where}")
        bearing = read & known & ~zero & self.off(axis)
        if not bearing.any():
            return changed
        if (why := self._places.missing(layer)) is not None:
            return self._keep(axis, bearing, why) or changed
        _, uneven = layer.added(part_of_state(state, layer, bearing), weight)
        if bool((uneven.reshape(-1) & kept).any()):
            blamed = bearing & layer.uneven_channels(weight, kept).numpy()
            blamed = blamed if blamed.any() else bearing
            why = f"it is a constant that {where} adds unevenly: less at the border than inside"
            changed = self._keep(axis, blamed, why) or changed
        return changed

    def _in_training(self, node: fx.Node) -> bool:
        """An operation of training mode alone (an auxiliary head): what its own weights read stays."""
        if layer_of(node.meta["name"]) is None:
            return False
        used = {n.target for n in self._graph.trace.nodes if n.meta["name"] == "parameter"}
        given = tensors(node)
        if any(source.meta["name"] == "parameter" and source.target in used for source in given):
            return False
        changed = False
        for source in given:
            if source.meta["name"] != "parameter":
                for axis in self._constants.axes(source):
                    if axis.free:
                        why = f"it is read by {describe(node, self._graph.trace)} in training mode"
                        changed = self._keep(axis, np.ones(axis.size, dtype=bool), why) or changed
        return changed

    # -- what the sizes allow ------------------------------------------------------------------------------------

    def _allow(self) -> bool:
        """Channels that stay because no dimension may be empty, and sections have to fit; whether there are any."""
        changed = False
        for slot in self._graph.slots:
            if slot.axis.size and self.off(slot.axis).all():
                one = np.arange(slot.axis.size) == 0
                changed = self._keep(slot.axis, one, "a layer keeps at least one channel") or changed
        groups = self._graph.groups()
        for balanced in self._graph.balanced():
            changed = self._fit([groups[number] for number in balanced.groups], balanced.counts) or changed
        for group in groups:
            least, step = self._graph.bounds(group)
            kept = int((~self._off[group.components]).sum())
            wanted = max(least, -(-kept // step) * step)
            if kept < group.channels and wanted > kept:
                changed = self._keep_more(
                    group.components, wanted - kept, f"at least {least}, a multiple of {step}, stay"
                )
        return changed

    def _fit(self, groups: Sequence[Group], counts: Ids) -> bool:
        """Sections keep the smallest numbers that fit, at least those kept so far; whether that is more."""
        kept = np.array([int((~self._off[group.components]).sum()) for group in groups])
        enough = counts[(counts >= kept).all(1)]
        line = enough[enough.sum(1).argmin()]
        changed = False
        for group, more in zip(groups, line - kept, strict=True):
            changed = (
                self._keep_more(group.components, int(more), "sections of equal size keep equally many") or changed
            )
        return changed

    def _keep_more(self, components: Ids, count: int, why: str) -> bool:
        chosen = components[self._off[components]][:count]
        if not len(chosen):
            return False
        for number in chosen.tolist():
            self.reasons.setdefault(number, why)
        self._off[chosen] = False
        self._refresh()
        return True

    def _fold(self, layer: Layer) -> Fold | None:
        """The constant that the channels which go leave behind in the result of a layer."""
        gone = self.off(self._constants.axes(layer.x)[layer.dim])
        if not gone.any():
            return None
        kept = torch.from_numpy(~self.off(self._constants.axes(layer.node)[layer.result_dim]))
        constants = part_of_state(self._constants.of(layer.x), layer, gone)
        return self._places.compensation(layer, self._constants.weight(layer.weight), constants, kept)


def _read_of(
    axis: Axis, at: tuple[int, int], zero: Mask, normalised: set[object], summed: _Summed | None
) -> tuple[Mask, str]:
    """Which channels of an argument an operation reads, and how; in the text ``{}`` stands for the operation.

    Args:
        axis: the channels.
        at: place of the argument, and its dimension.
        zero: the channels that are zero there.
        normalised: keys of the axes that it normalises over.
        summed: what it sums over, with the zeros of the other factor; None if that is not known.
    """
    if axis.key in normalised:
        return np.ones_like(zero), "{} normalises over it"
    if summed is None:
        return ~zero, "it is needed by {}"
    if at not in summed:
        return np.zeros_like(zero), ""
    other = summed[at]
    either = zero | other if other is not None and len(other) == len(zero) else zero
    return ~either, "it is summed over by {}"
