"""Which channels go: scores, scopes, ratios and targets put together.

For example, two groups of 8 and 6 channels, a ratio of 0.5 and the global scope::

    ratio        0.5 of the 14 channels are to go
    rounding     the groups may keep (2, 4, 6, 8) and (2, 4, 6): their states
    scopes       every step from one state to the next smaller one, the least important step first
    targets      as many steps from the front as it takes: 4 and 4 are kept, say
    Decision     the 4 and 2 channels with the lowest scores of each group
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch

from structprune.coupling.costs import KeyValueCache
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.random_removals import Counter
from structprune.coupling.roles import AXES
from structprune.importance.base import Importance, check_scores, comparable
from structprune.latency.predict import TimeModel
from structprune.latency.widths import Widths
from structprune.ops.relations import Ids
from structprune.planning.allocation import ENTRIES, SECONDS, Problem, allocate
from structprune.planning.build import tensors_of
from structprune.planning.options import PlanOptions
from structprune.planning.plan import Settings
from structprune.planning.ratios import ratio_of
from structprune.planning.rounding import Rounding, prunable_groups
from structprune.planning.scopes import (
    CoupledGroups,
    Curves,
    Scope,
    ScoreNormalisation,
    Steps,
    check_names,
    ordered_steps,
    savings,
)
from structprune.planning.targets import Amounts, Kept, Target, amounts, kept_for, target_of
from structprune.planning.time_saved import losses_in_states, steps_by_time


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The channels to remove from a graph.

    Attributes:
        kept: how many channels each group keeps; groups that may not be chosen are left out.
        chosen: the components that go.
        settings: what was asked for and, with a target, what is reached and what was measured.
    """

    kept: Mapping[Group, int]
    chosen: Ids
    settings: Settings


class Ranking:
    """The scores of each group and the order in which its channels go, computed when first asked for."""

    def __init__(self, graph: ChannelGraph, score: Importance) -> None:
        self._score = score
        self._tensors = tensors_of(graph)
        self._order: dict[Group, Ids] = {}
        self.comparable = comparable(score)
        self.scores: dict[Group, np.ndarray] = {}

    def rank(self, groups: Iterable[Group]) -> None:
        """Score the groups that have no scores yet."""
        for group in groups:
            if group not in self._order:
                scores = check_scores(self._score(group, self._tensors), group).double().cpu().numpy()
                self.scores[group] = scores
                # Of equal scores the later channel goes first, so that the result is stable.
                self._order[group] = group.components[np.lexsort((-np.arange(len(scores)), scores))]

    def removed(self, kept: Kept) -> Ids:
        """The components that go, the least important ones of each group."""
        chosen = [group for group, count in kept.items() if count < group.channels]
        self.rank(chosen)
        gone = [self._order[group][: group.channels - kept[group]] for group in chosen]
        return np.concatenate([np.zeros(0, dtype=np.int64), *gone])


def decide_channels(
    graph: ChannelGraph, options: PlanOptions, ranking: Ranking, time: TimeModel | None = None
) -> Decision:
    """The channels to remove from a graph.

    Args:
        graph: the coupled channels.
        options: what is asked for.
        ranking: the scores of the channels.
        time: predicts the time of the network, for a target of latency.

    Raises:
        PlanError: a target cannot be met, or a name in the options matches nothing.
    """
    groups = graph.groups()
    scope = options.scope_or_default
    check_names(scope, graph)
    measure = _Measure(graph, ranking, time, options.target or ())
    before = {} if options.target is None else measure({})
    target = None if options.target is None else target_of(options.target, before)
    ratio = ratio_of(graph, options.ratio_or_default if target is None else _guess(target, before))
    rounding = Rounding(options.round_to, *_placed(graph), options.min_channels, options.max_ratio)
    steps_measured = [None] * len(groups) if time is None else time.steps(Widths(graph, groups))
    feasible = {
        group: rounding.feasible(group, graph.roles, graph.bounds(group), step)
        for group, step in zip(groups, steps_measured, strict=True)
    }
    axes = None if options.width_axes is None else frozenset(options.width_axes)
    chosen = prunable_groups(graph, ratio, feasible, axes)
    if scope != "local":
        ranking.rank(chosen)
    all_coupled = _coupled(graph, chosen, feasible)
    steps: Steps
    if time is not None and (scope in ("global", "per_cost") or isinstance(scope, Curves)):
        steps = steps_by_time(graph, all_coupled, _losses(all_coupled, scope, ranking), time)
    else:
        normalisation = _normalisation(graph, options, ranking)
        steps = ordered_steps(all_coupled, ranking.scores, scope, graph.roles, ratio, normalisation)
    reached: dict[str, float] = {}
    if target is None:
        kept = steps.kept_at(ratio)
    else:
        ranking.rank(chosen)
        kept = kept_for(
            steps,
            target,
            measure,
            lambda: _left_whole(graph, chosen, axes),
        )
        if options.allocates_exactly and all_coupled:
            losses = [np.append(lost[::-1], 0.0) for lost in _losses(all_coupled, scope, ranking)]
            problem = Problem(
                graph=graph,
                all_coupled=all_coupled,
                losses=losses,
                target=target,
                measure=measure,
                counter=measure.counter,
                time=time,
            )
            kept = allocate(problem, kept, seconds=SECONDS[options.allocation], entries=ENTRIES[options.allocation])
        after = measure(kept)
        reached = {name: after[name] / before[name] for name in target.limits}
    gone = ranking.removed(kept)
    left = {} if len(gone) else {"nothing": _why_nothing(graph, options, chosen, feasible)}
    return Decision(
        kept=kept, chosen=gone, settings=Settings(asked=options.recorded(graph), reached=reached, left=left)
    )


def _placed(graph: ChannelGraph) -> tuple[torch.device, torch.dtype]:
    """Where the model's weights are, and their type."""
    for parameter in graph.model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def _normalisation(graph: ChannelGraph, options: PlanOptions, ranking: Ranking) -> ScoreNormalisation:
    """How the scores of groups that compete are compared."""
    scope = options.scope_or_default
    if scope == "per_cost":
        return ScoreNormalisation(False, savings(graph, options.target or (), tensors_of(graph)))
    return ScoreNormalisation(scope != "isomorphic" and not ranking.comparable)


def _losses(all_coupled: Sequence[CoupledGroups], scope: Scope, ranking: Ranking) -> list[np.ndarray]:
    """What coupled groups lose in each state but the whole, where importance is weighed against what is saved."""
    relative = scope != "per_cost" and not ranking.comparable
    return losses_in_states(all_coupled, ranking.scores, scope, relative)


# So many of the layers that stay whole are named in a message.
_NAMED = 5


def _left_whole(graph: ChannelGraph, chosen: Sequence[Group], axes: Collection[str] | None) -> str:
    """What may not go, and why: the channels that layers make, and the groups on axes that were not asked for."""
    pinned = graph.pinned()
    weights = [slot for slot in graph.slots if (slot.tensor, slot.dim) in graph.roles.producers]
    found = [f"{name} ({pinned[name]})" for slot in weights if (name := f"{slot.tensor}, dim {slot.dim}") in pinned]
    more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
    present = {group.axis for group in graph.groups()}
    others = [axis for axis in AXES if axis in present and axes is not None and axis not in axes]
    parts = [*found[:_NAMED], *more, *([f"{' and '.join(others)}, as axes= asks"] if others else [])]
    if not parts:
        return ""
    return f" {'Left whole are' if chosen else 'Nothing may go:'} {'; '.join(parts)}."


def _why_nothing(
    graph: ChannelGraph, options: PlanOptions, thinned: Sequence[Group], feasible: Mapping[Group, np.ndarray]
) -> str:
    """Why no channel goes, the main reasons."""
    stuck = [group for group in thinned if len(feasible[group]) == 1]
    free = [group for group in thinned if len(feasible[group]) > 1]
    parts: list[str] = []
    if free and options.target is not None:
        parts.append("the target is met as it is")
    elif free:
        steps = ", ".join(f"{g.name} of {g.channels} goes by {g.channels - feasible[g][-2]}" for g in free[:_NAMED])
        parts.append(f"the ratio asks for less than half a step of any group: {steps}")
    if stuck:
        limits = f"round_to={options.round_to}, min_channels={options.min_channels}, max_ratio={options.max_ratio:g}"
        parts.append(f"{', '.join(group.name for group in stuck[:_NAMED])}: no smaller width is allowed by {limits}")
    whole = _left_whole(graph, thinned, None if options.axes is None else frozenset(options.axes))
    return "; ".join([*parts, *([whole.strip().removesuffix(".")] if whole else [])]) or "the model has no channels"


class _Measure:
    """Tells what there is of everything that a target may limit.

    Args:
        graph: the coupled channels.
        ranking: which channels of a group go first.
        time: predicts the time of the network, for a target of latency.
        wanted: names of `structprune.planning.targets.TARGETS`.
    """

    def __init__(self, graph: ChannelGraph, ranking: Ranking, time: TimeModel | None, wanted: Collection[str]) -> None:
        self._graph, self._ranking, self._time = graph, ranking, time
        self._cache = KeyValueCache(graph.trace, graph.channels) if "kv_cache" in wanted else None

    def __call__(self, kept: Kept) -> dict[str, float]:
        """The amounts when each group keeps so many channels (all by default)."""
        graph = self._graph
        count = self.counter(kept)
        found = amounts(graph.costs.at(count), sum(kept.get(group, group.channels) for group in graph.groups()))
        if self._cache is not None:
            found["kv_cache"] = self._cache.bytes(count)
        if self._time is not None:
            chosen = any(number < group.channels for group, number in kept.items())
            measured = None if chosen else self._time.whole
            found["latency"] = 1e3 * (measured or self._time.seconds(count))
        return found

    def counter(self, kept: Kept) -> Counter:
        """Counts the channels of axes when each group keeps so many."""
        return self._graph.counter(self._graph.components.removed(self._ranking.removed(kept)))


def _coupled(graph: ChannelGraph, groups: Iterable[Group], feasible: Mapping[Group, np.ndarray]) -> list[CoupledGroups]:
    """The groups one by one, and balanced ones together: none of those is chosen unless all of them are."""
    known, chosen = graph.groups(), set(groups)
    found: list[CoupledGroups] = []
    together: set[Group] = set()
    for balanced in graph.balanced():
        members = tuple(known[number] for number in balanced.groups)
        together.update(members)
        if chosen.issuperset(members):
            allowed = [np.isin(balanced.counts[:, i], feasible[group]) for i, group in enumerate(members)]
            found.append(CoupledGroups(members, _nested(balanced.counts, np.all(allowed, axis=0))))
    alone = [CoupledGroups((group,), feasible[group][:, None]) for group in groups if group not in together]
    return alone + found


def _nested(counts: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The allowed lines, of which none keeps more of any group than the next; the last one always."""
    lines = [counts[-1]]
    for line in counts[:-1][allowed[:-1]][::-1]:
        if (line <= lines[-1]).all():
            lines.append(line)
    return np.stack(lines[::-1])


def _guess(target: Target, before: Amounts) -> float:
    """The ratio that comes near to a target: parameters and MACs fall with the square of the width."""

    def ratio(name: str, limit: float) -> float:
        left = min(1.0, limit / before[name])
        return 1 - (sqrt(left) if name in ("params", "macs") else left)

    return min(0.99, max(ratio(name, limit) for name, limit in target.limits.items()))
