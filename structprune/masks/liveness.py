"""Which channels may go without a change of what the network computes, and the constants that they leave behind.

All channels that can go are taken to be off at first. The operations are looked at from the last to the first: where
one that still gives something needs a channel, the channel lives. What is off in the end is the most that can be. A
channel is not needed where it is a constant that a layer can take into its bias, or where all weights that read it are
zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from structprune.channels.solver import Mask
from structprune.graph import ChannelGraph
from structprune.groups import Group
from structprune.masks.constants import Constants
from structprune.masks.folding import Fold, Places, all_by_channel, by_channel, part_of_state
from structprune.masks.layer_calls import KINDS, Layer
from structprune.masks.states import along
from structprune.ops import layer_of, op_of
from structprune.ops.arguments import tensors
from structprune.ops.relations import Ids, Row
from structprune.surgery.reference import SUMS
from structprune.tracing.trace import describe


class Liveness:
    """The channels that may go.

    Args:
        graph: the coupled channels of the network.
        constants: its constants.

    Attributes:
        dead: for each component, whether it goes.
        folds: what is added to biases once they are gone.
        reasons: why a component stays, by its number.
    """

    def __init__(self, graph: ChannelGraph, constants: Constants) -> None:
        self._graph, self._constants = graph, constants
        self._places = Places(graph)
        self.reasons: dict[int, str] = {}
        self._off = np.zeros(graph.components.count, dtype=bool)
        for group in graph.groups():
            self._off[group.components] = True
        self._survivors: dict[int, list[Row]] = {}
        for survivors in graph.channels.relations.survivors:
            self._survivors.setdefault(survivors.node, []).extend(survivors.rows)
        self._refresh()
        while self._sweep() or self._allow():
            pass
        self.folds = [fold for found in constants.layers.values() if (fold := self._fold(found)) is not None]

    @property
    def chosen(self) -> Ids:
        """The roots that go."""
        return np.flatnonzero(self._off)

    # -- what must live ------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        self.dead: Mask = self._graph.components.dead(self.chosen)

    def off(self, row: Row) -> Mask:
        """Which indices of a dimension go."""
        return self.dead[self._graph.components.of(row)] if row.free else np.zeros(row.size, dtype=bool)

    def _keep(self, row: Row, which: Mask, why: str) -> bool:
        """The channels `which` of a dimension live; whether that is news."""
        parts = self._graph.components.of(row)[which & self.off(row)]
        if not len(parts):
            return False
        _, roots = self._graph.roots.of(parts)
        for number in (*parts.tolist(), *roots.tolist()):
            self.reasons.setdefault(number, why)
        self._off[roots] = False
        self._refresh()
        return True

    def _sweep(self) -> bool:
        """Look at each operation once; whether any channel turned out to live."""
        news = False
        for node in reversed(self._graph.trace.everything):
            if node.op.startswith("call_") and node.meta["name"] != "part" and self._gives(node):
                news = self._look(node) or news
        return news

    def _gives(self, node: fx.Node) -> bool:
        """Whether anything of the result lives."""
        rows = self._graph.channels.rows[node.meta["index"]]
        results = rows if isinstance(rows, list) else [rows]
        return any(part is not None and not any(self.off(row).all() and row.size for row in part) for part in results)

    def _look(self, node: fx.Node) -> bool:
        if node.meta["index"] >= len(self._graph.trace.nodes):
            return self._in_training(node)
        if node in self._constants.apart:
            return False
        if node in self._constants.layers:
            return self._look_at_layer(self._constants.layers[node])
        news = False
        where = describe(node, self._graph.trace)
        normalised = {row.key for row in self._survivors.get(node.meta["index"], ())}
        summed = node.meta["name"] in SUMS
        checked = self._needed(node)
        for place, source in enumerate(tensors(node)):
            for dim, row in enumerate(self._constants.rows(source)):
                if not row.free or not self.off(row).any():
                    continue
                zero = along(self._constants.of(source), dim).numpy()
                if row.key in normalised and not summed:
                    news = self._keep(row, ~np.zeros_like(zero), f"{where} normalises over it") or news
                elif checked is None:
                    news = self._keep(row, ~zero, f"it is needed by {where}") or news
                elif (place, dim) in checked:
                    other = checked[place, dim]
                    both = zero | other if other is not None and len(other) == len(zero) else zero
                    news = self._keep(row, ~both, f"it is summed over by {where}") or news
        return news

    def _needed(self, node: fx.Node) -> dict[tuple[int, int], Mask | None] | None:
        """The dimensions that an operation sums away, with the zeros of what they are multiplied by there.

        None if it is not known which those are.
        """
        known = op_of(node.meta["name"])
        if known is None or known.contraction is None or not known.own:
            return None
        if known.contraction.kind not in KINDS | {"attention"} or node.meta["index"] in self._graph.channels.unforeseen:
            return None
        given = tensors(node)
        found: dict[tuple[int, int], Mask | None] = {}
        for pair in known.contraction.pairs(node):
            for mine, dim, theirs, other in (
                (pair.operand, pair.dim, pair.weight, pair.weight_dim),
                (pair.weight, pair.weight_dim, pair.operand, pair.dim),
            ):
                a, b = self._constants.rows(given[mine]), self._constants.rows(given[theirs])
                if -dim > len(a):
                    continue
                zero = None
                if -other <= len(b) and b[other].free:
                    zero = along(self._constants.of(given[theirs]), other % len(b)).numpy()
                found[mine, dim % len(a)] = zero
        return found

    def _look_at_layer(self, layer: Layer) -> bool:
        row = self._constants.rows(layer.x)[layer.dim]
        if not self.off(row).any():
            return False
        where = describe(layer.node, self._graph.trace)
        weight = self._constants.weight(layer.weight)
        living = torch.from_numpy(~self.off(self._constants.rows(layer.node)[layer.dim]))
        read = by_channel(layer.read(weight, living), layer.dim).numpy() != 0
        state = self._constants.of(layer.x)
        known = all_by_channel(state.known, layer.dim, row.size).numpy()
        zero = all_by_channel(state.zero, layer.dim, row.size).numpy()
        news = self._keep(row, read & ~known, f"it is read by {where}")
        bearing = read & known & ~zero & self.off(row)
        if not bearing.any():
            return news
        if (why := self._places.missing(layer)) is not None:
            return self._keep(row, bearing, why) or news
        _, uneven = layer.added(part_of_state(state, layer, bearing), weight)
        if bool((uneven.reshape(-1) & living).any()):
            blamed = bearing & layer.uneven_channels(weight, living).numpy()
            blamed = blamed if blamed.any() else bearing
            why = f"it is a constant that {where} adds unevenly: less at the border than inside"
            news = self._keep(row, blamed, why) or news
        return news

    def _in_training(self, node: fx.Node) -> bool:
        """An operation of training mode alone (an auxiliary head): what its own weights read stays."""
        if layer_of(node.meta["name"]) is None:
            return False
        used = {n.target for n in self._graph.trace.nodes if n.meta["name"] == "parameter"}
        given = tensors(node)
        if any(source.meta["name"] == "parameter" and source.target in used for source in given):
            return False
        news = False
        for source in given:
            if source.meta["name"] != "parameter":
                for row in self._constants.rows(source):
                    if row.free:
                        why = f"it is read by {describe(node, self._graph.trace)} in training mode"
                        news = self._keep(row, np.ones(row.size, dtype=bool), why) or news
        return news

    # -- what the sizes allow ------------------------------------------------------------------------------------

    def _allow(self) -> bool:
        """Channels that stay because no dimension may be empty, and sections have to fit; whether there are any."""
        news = False
        for slot in self._graph.slots:
            if slot.row.size and self.off(slot.row).all():
                one = np.arange(slot.row.size) == 0
                news = self._keep(slot.row, one, "a layer keeps at least one channel") or news
        groups = self._graph.groups()
        for balanced in self._graph.balanced():
            news = self._fit([groups[number] for number in balanced.groups], balanced.counts) or news
        for group in groups:
            least, step = self._graph.bounds(group)
            kept = int((~self._off[group.components]).sum())
            wanted = max(least, -(-kept // step) * step)
            if kept < group.channels and wanted > kept:
                news = self._revive(group.components, wanted - kept, f"at least {least}, a multiple of {step}, stay")
        return news

    def _fit(self, groups: Sequence[Group], counts: Ids) -> bool:
        """Sections keep the fewest that fit and are no fewer than live; whether that is more."""
        kept = np.array([int((~self._off[group.components]).sum()) for group in groups])
        enough = counts[(counts >= kept).all(1)]
        line = enough[enough.sum(1).argmin()]
        news = False
        for group, more in zip(groups, line - kept, strict=True):
            news = self._revive(group.components, int(more), "sections of equal size keep equally many") or news
        return news

    def _revive(self, components: Ids, count: int, why: str) -> bool:
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
        gone = self.off(self._constants.rows(layer.x)[layer.dim])
        if not gone.any():
            return None
        living = torch.from_numpy(~self.off(self._constants.rows(layer.node)[layer.result_dim]))
        constants = part_of_state(self._constants.of(layer.x), layer, gone)
        return self._places.fold(layer, self._constants.weight(layer.weight), constants, living)
