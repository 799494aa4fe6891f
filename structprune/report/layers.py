"""What each layer has and takes, before and after a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from structprune.channels.trials import Counter
from structprune.cost import Count, LayerCost, count_layers
from structprune.errors import UnknownLayerError
from structprune.graph import ChannelGraph
from structprune.plan import Plan
from structprune.surgery.verify import dead_components

Pair = tuple[int, int]
# A summary by block has no more rows than this.
_MOST_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer before and after.

    Attributes:
        path: of the module; of a block that was summed up, the block's.
        kind: name of its class.
        channels: output channels; None where there are none, as for a block.
        macs: multiply-accumulates.
        params: entries of its parameters.
    """

    path: str
    kind: str
    channels: Pair | None
    macs: Pair
    params: Pair


def counts(graph: ChannelGraph, plan: Plan | None) -> tuple[Counter, Counter]:
    """What counts the living channels of a row before and after `plan`."""
    nothing = np.zeros(graph.components.count, dtype=bool)
    before = graph.counter(nothing)
    return before, before if plan is None else graph.counter(dead_components(graph, plan))


def layer_rows(graph: ChannelGraph, before: Count, after: Count) -> list[LayerRow]:
    """A row for each module that holds parameters or multiplies, in the order of the model."""
    old = count_layers(graph.model, graph.trace, graph.channels, before)
    new = count_layers(graph.model, graph.trace, graph.channels, after)
    kinds = {path: type(module).__name__ for path, module in graph.model.named_modules(remove_duplicate=False)}
    found: list[LayerRow] = []
    for path, cost in old.items():
        left = new.get(path, LayerCost(0, 0))
        width = _width(graph, path, before, after)
        found.append(LayerRow(path, kinds[path], width, (cost.macs, left.macs), (cost.params, left.params)))
    return found


def _width(graph: ChannelGraph, path: str, before: Count, after: Count) -> Pair | None:
    if not path:  # what the model returns is no width of a layer
        return None
    try:
        _, row = graph.output_row(path)
    except UnknownLayerError:  # it takes no part in the forward
        return None
    return before(row), after(row)


def blocks(rows: list[LayerRow]) -> list[LayerRow]:
    """The rows summed up by block: as deep into the model as a short table allows."""
    best: dict[str, list[LayerRow]] = {}
    for depth in range(1, 1 + max((row.path.count(".") + 1 for row in rows), default=0)):
        found: dict[str, list[LayerRow]] = {}
        for row in rows:
            found.setdefault(".".join(row.path.split(".")[:depth]), []).append(row)
        if len(found) > _MOST_BLOCKS and best:
            break
        best = found
    return [
        LayerRow(
            path,
            f"{len(mine)} layers" if len(mine) > 1 else mine[0].kind,
            None,
            _sum(mine, "macs"),
            _sum(mine, "params"),
        )
        for path, mine in best.items()
    ]


def _sum(rows: list[LayerRow], name: str) -> Pair:
    pairs: list[Pair] = [getattr(row, name) for row in rows]
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)
