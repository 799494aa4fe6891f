"""What each layer has and takes, before and after a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from structprune.checking import Check, instance, is_number
from structprune.coupling.costs import Count, LayerCost, count_layers
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.random_removals import Counter
from structprune.depth.paths import PathsAfter, by_names_before
from structprune.errors import UnknownLayerError
from structprune.planning.plan import Plan
from structprune.surgery.verify import removed_components

Pair = tuple[int, int]
# Seconds by layer: of the model as it is and, if measured, of the smaller one.
Times = Sequence[Mapping[str, float]]


def _are_times(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and is_number(v) for k, v in value.items())


TIMES = Check(
    lambda value: isinstance(value, (tuple, list)) and len(value) <= 2 and all(map(_are_times, value)),
    "give a list of one or two results of structprune.layer_times",
)
PLAN = instance(Plan, "give a structprune.Plan").or_none
_NOTHING = LayerCost(0, 0)
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
        seconds: measured time of its own operations; None if it was not measured.
    """

    path: str
    kind: str
    channels: Pair | None
    macs: Pair
    params: Pair
    seconds: tuple[float, float] | None = None


def counts(graph: ChannelGraph, plan: Plan | None) -> tuple[Counter, Counter]:
    """What counts the kept channels of an axis before and after `plan`."""
    before = graph.counter()
    return before, before if plan is None else graph.counter(removed_components(graph, by_names_before(plan)))


def layer_rows(
    graph: ChannelGraph, before: Count, after: Count, times: Times = (), plan: Plan | None = None
) -> list[LayerRow]:
    """A row for each module that holds parameters, multiplies or takes time, in the order of the model.

    Args:
        graph: the coupled channels.
        before: counts kept channels of axes of the model as it is.
        after: the same after the plan.
        times: seconds by layer of the model as it is and, if measured, of the smaller one.
        plan: the plan, of which nothing is left of layers that go with a branch.
    """
    paths = PathsAfter(graph.model, plan)
    old = count_layers(graph.model, graph.trace, graph.channels, before)
    new = count_layers(graph.model, graph.trace, graph.channels, after)
    rows: list[LayerRow] = []
    for path, module in graph.model.named_modules(remove_duplicate=False):
        now = paths.of(path)
        seconds = _seconds(path, now, times)
        if path not in old and not seconds:
            continue
        cost, left = old.get(path, _NOTHING), _NOTHING if now is None else new.get(path, _NOTHING)
        width = _width(graph, path, before, after) if path in old else None
        if width is not None and now is None:
            width = width[0], 0
        macs, params = (cost.macs, left.macs), (cost.params, left.params)
        rows.append(LayerRow(path, type(module).__name__, width, macs, params, seconds))
    return rows


def _seconds(path: str, now: str | None, times: Times) -> tuple[float, float] | None:
    """The times of a layer, which has another path in the smaller model, or none."""
    if not any(path in each for each in times):
        return None
    last = path if len(times) == 1 else now
    return times[0].get(path, 0.0), 0.0 if last is None else times[-1].get(last, 0.0)


def _width(graph: ChannelGraph, path: str, before: Count, after: Count) -> Pair | None:
    if not path:  # what the model returns is no width of a layer
        return None
    try:
        _, axis = graph.output_axis(path)
    except UnknownLayerError:  # it takes no part in the forward
        return None
    return before(axis), after(axis)


def blocks(rows: list[LayerRow]) -> list[LayerRow]:
    """The rows summed up by block: as deep into the model as a short table allows."""
    best: dict[str, list[LayerRow]] = {}
    for depth in range(1, 1 + max((row.path.count(".") + 1 for row in rows), default=0)):
        by_block: dict[str, list[LayerRow]] = {}
        for row in rows:
            by_block.setdefault(".".join(row.path.split(".")[:depth]), []).append(row)
        if len(by_block) > _MOST_BLOCKS and best:
            break
        best = by_block
    return [
        LayerRow(
            path,
            f"{len(mine)} layers" if len(mine) > 1 else mine[0].kind,
            None,
            _sum(mine, "macs"),
            _sum(mine, "params"),
            _sum_seconds(mine),
        )
        for path, mine in best.items()
    ]


def _sum(rows: list[LayerRow], name: str) -> Pair:
    pairs: list[Pair] = [getattr(row, name) for row in rows]
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)


def _sum_seconds(rows: list[LayerRow]) -> tuple[float, float] | None:
    pairs = [row.seconds for row in rows if row.seconds]
    return (sum(before for before, _ in pairs), sum(after for _, after in pairs)) if pairs else None
