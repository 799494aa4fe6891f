"""Which channels go: scores, scopes, ratios and targets put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from structprune.errors import PlanError
from structprune.graph import ChannelGraph
from structprune.groups import Group
from structprune.importance.base import Importance, check_scores, comparable
from structprune.latency.predict import Moved, TimeModel
from structprune.latency.specs import Use
from structprune.latency.widths import Widths
from structprune.ops.relations import Ids
from structprune.planning.build import tensors_of
from structprune.planning.ratios import Ratio, as_json, ratio_of
from structprune.planning.rounding import Rounding, check_axes, thinned_groups
from structprune.planning.scopes import Curves, Scope, Steps, Unit, Worth, check_scope, lost, savings, steps_of
from structprune.planning.scopes import as_json as scope_as_json
from structprune.planning.targets import Kept, Target, amounts, kept_for, target_of
from structprune.planning.time_saved import Knapsack, Piece


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for; see `structprune.plan`.

    Raises:
        PlanError: a setting is out of its range, or both a ratio and a target are given.
    """

    ratio: Ratio | None
    target: Mapping[str, float] | None
    scope: Scope
    axes: Iterable[str] | None
    rounding: Rounding

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_axes(self.axes)
        if self.ratio is not None and self.target is not None:
            raise PlanError(
                "Both ratio and target are given. A ratio says what each group loses, a target what remains."
            )
        if isinstance(self.scope, Curves) and self.target is None:
            raise PlanError("Curves as a scope say what thinning costs, not how much is to go: give a target as well.")
        if self.scope == "per_cost" and self.target is None:
            raise PlanError("scope='per_cost' weighs importance against what is saved: give a target, not a ratio.")


class Decision:
    """The channels to remove from a graph.

    Args:
        graph: the coupled channels.
        score: what a channel is worth.
        request: what is asked for.
        time: predicts the time of the network, for a target of latency.

    Attributes:
        kept: how many channels each group that may be thinned keeps.
        chosen: the components that go.
        settings: what was asked for and, with a target, what is reached; plain data.
    """

    def __init__(self, graph: ChannelGraph, score: Importance, request: Request, time: TimeModel | None = None) -> None:
        self._graph = graph
        self._score = score
        self._time = time
        self._tensors = tensors_of(graph)
        self._order: dict[Group, Ids] = {}
        self._scores: dict[Group, np.ndarray] = {}
        self.settings = _plain(request, graph)
        target = self._target(request)
        if target is None:
            ratio = ratio_of(graph, 0.5 if request.ratio is None else request.ratio)
        else:
            guess = _guess(target, self._before)
            ratio = ratio_of(graph, guess)
        measured = [None] * len(graph.groups()) if time is None else time.steps(Widths(graph, graph.groups()))
        feasible = {
            group: request.rounding.feasible(group, graph.roles, graph.bounds(group), step)
            for group, step in zip(graph.groups(), measured, strict=True)
        }
        groups = thinned_groups(graph, ratio, feasible, check_axes(request.axes))
        if request.scope != "local":
            self._rank(groups)
        units = _units(graph, groups, feasible)
        if time is not None and (request.scope in ("global", "per_cost") or isinstance(request.scope, Curves)):
            steps = self._by_time(units, request.scope, time)
        else:
            steps = steps_of(units, self._scores, request.scope, graph.roles, ratio, self._worth(request))
        if target is None:
            kept = steps.kept_at(ratio)
        else:
            self._rank(groups)
            kept = kept_for(steps, target, self._amounts)
            found = self._amounts(kept)
            self.settings["reached"] = {name: found[name] / self._before[name] for name in target.limits}
        self.kept = kept
        self.chosen = self._gone(kept)

    def _target(self, request: Request) -> Target | None:
        if request.target is None:
            return None
        self._before = self._amounts({})
        return target_of(request.target, self._before)

    def _worth(self, request: Request) -> Worth:
        if request.scope == "per_cost":
            return Worth(False, savings(self._graph, request.target or (), self._tensors))
        return Worth(request.scope != "isomorphic" and not comparable(self._score))

    def _by_time(self, units: Sequence[Unit], scope: Scope, time: TimeModel) -> Steps:
        """The steps in the order that loses least importance for the time that it saves."""
        relative = scope != "per_cost" and not comparable(self._score)

        def loss(group: Group, counts: np.ndarray) -> np.ndarray:
            if isinstance(scope, Curves):
                return scope.depth(group, counts[-2::-1])
            gone = np.cumsum(lost(self._scores[group], np.diff(counts)[::-1], relative))
            return _of_what_is_left(gone, group.channels) if relative else gone

        losses = [
            np.sum([loss(group, unit.counts[:, i]) for i, group in enumerate(unit.groups)], axis=0) for unit in units
        ]
        groups = [group for unit in units for group in unit.groups]
        return Knapsack(units, losses, _pieces(time, Widths(self._graph, groups))).steps()

    def _rank(self, groups: Iterable[Group]) -> None:
        for group in groups:
            if group not in self._order:
                scores = check_scores(self._score(group, self._tensors), group).double().cpu().numpy()
                self._scores[group] = scores
                # Of equal scores the later channel goes first, so that the result is stable.
                self._order[group] = group.components[np.lexsort((-np.arange(len(scores)), scores))]

    def _gone(self, kept: Kept) -> Ids:
        """The components that go, the least important ones of each group."""
        thinned = [group for group, count in kept.items() if count < group.channels]
        self._rank(thinned)
        gone = [self._order[group][: group.channels - kept[group]] for group in thinned]
        return np.concatenate([np.zeros(0, dtype=np.int64), *gone])

    def _amounts(self, kept: Kept) -> dict[str, float]:
        count = self._graph.counter(self._graph.components.dead(self._gone(kept)))
        found = amounts(
            self._graph.costs.at(count), sum(kept.get(group, group.channels) for group in self._graph.groups())
        )
        if self._time is not None:
            thinned = any(number < group.channels for group, number in kept.items())
            measured = None if thinned else self._time.whole
            found["latency"] = 1e3 * (measured or self._time.seconds(count))
        return found


def _of_what_is_left(gone: np.ndarray, whole: int) -> np.ndarray:
    """Losses that count the more, the less of a group is left: ``-whole * log(share of the importance kept)``.

    Scores over their mean tell channels of a group apart, but not how bad it is to be left with few of them. Taken as
    they are, they would leave one channel to a layer of a few costly ones.
    """
    return -whole * np.log1p(-np.clip(gone / whole, 0, 1 - 1e-9))


def _pieces(time: TimeModel, widths: Widths) -> list[Piece]:
    """What takes time, each with the groups that it follows; what follows none is left out."""

    def piece(part: Use | Moved) -> Piece | None:
        rows = part.rows if isinstance(part, Moved) else [row for held in part.rows.values() for row in held]
        groups = widths.groups_of(rows)
        known: dict[tuple[float, ...], float] = {}

        def seconds(shares: list[float]) -> float:
            key = tuple(shares[group] for group in groups)
            if key not in known:
                known[key] = time.share(part, widths.counter(shares))
            return known[key]

        return Piece(groups, seconds) if groups else None

    return [found for part in time.parts if (found := piece(part)) is not None]


def _units(graph: ChannelGraph, groups: Iterable[Group], feasible: Mapping[Group, np.ndarray]) -> list[Unit]:
    """The groups one by one, and balanced ones together: none of those is thinned unless all of them are."""
    known, free = graph.groups(), set(groups)
    units: list[Unit] = []
    together: set[Group] = set()
    for balanced in graph.balanced():
        members = tuple(known[number] for number in balanced.groups)
        together.update(members)
        if free.issuperset(members):
            allowed = [np.isin(balanced.counts[:, i], feasible[group]) for i, group in enumerate(members)]
            units.append(Unit(members, _nested(balanced.counts, np.all(allowed, axis=0))))
    return [Unit((group,), feasible[group][:, None]) for group in groups if group not in together] + units


def _nested(counts: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The allowed lines, of which none keeps more of any group than the next; the last one always."""
    lines = [counts[-1]]
    for line in counts[:-1][allowed[:-1]][::-1]:
        if (line <= lines[-1]).all():
            lines.append(line)
    return np.stack(lines[::-1])


def _guess(target: Target, before: Mapping[str, float]) -> float:
    """The ratio that comes near to a target: parameters and MACs fall with the square of the width."""

    def ratio(name: str, limit: float) -> float:
        left = min(1.0, limit / before[name])
        return 1 - (sqrt(left) if name in ("params", "macs") else left)

    return min(0.99, max(ratio(name, limit) for name, limit in target.limits.items()))


def _plain(request: Request, graph: ChannelGraph) -> dict[str, object]:
    asked: dict[str, object] = {}
    if request.target is None:
        asked["ratio"] = as_json(0.5 if request.ratio is None else request.ratio, graph)
    else:
        asked["target"] = dict(request.target)
    asked["scope"] = scope_as_json(request.scope)
    axes = check_axes(request.axes)
    asked["axes"] = None if axes is None else sorted(axes)
    asked["round_to"] = request.rounding.round_to
    asked["min_channels"] = request.rounding.min_channels
    asked["max_ratio"] = request.rounding.max_ratio
    return asked
