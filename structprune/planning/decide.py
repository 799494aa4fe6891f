"""Which channels go: scores, scopes, ratios and targets put together.

For example, two groups of 8 and 6 channels, a ratio of 0.5 and the global scope::

    ratio        0.5 of the 14 channels are to go
    rounding     the groups may keep (2, 4, 6, 8) and (2, 4, 6): their states
    scopes       every step from one state to the next smaller one, the least important step first
    targets      as many steps from the front as it takes: 4 and 4 are kept, say
    Decision     the 4 and 2 channels with the lowest scores of each group
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from structprune.coupling.costs import KeyValueCache
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.random_removals import Counter
from structprune.errors import PlanError
from structprune.importance.base import Importance, check_scores, comparable
from structprune.latency.predict import TimeModel
from structprune.latency.widths import Widths
from structprune.ops.relations import Ids
from structprune.planning.allocation import ENTRIES, SECONDS, Problem, allocate
from structprune.planning.build import Description, describe, tensors_of
from structprune.planning.built_from_config import is_built_from_config
from structprune.planning.configured_part import not_rebuilt
from structprune.planning.describable import DescribableWidths, describable
from structprune.planning.dimensions import chains_of, widths_for
from structprune.planning.neighbourhood import Fit
from structprune.planning.options import PlanOptions
from structprune.planning.plan import Settings
from structprune.planning.ratios import ratio_of
from structprune.planning.reasons import left_whole, not_describable, why_nothing
from structprune.planning.rounding import Rounding, divisors, prunable_groups
from structprune.planning.scopes import (
    CoupledGroups,
    Curves,
    KnownCounts,
    Scope,
    ScoreNormalisation,
    Steps,
    check_names,
    ordered_steps,
    savings,
)
from structprune.planning.targets import Amounts, Kept, Target, amounts, kept_for, target_of
from structprune.planning.time_saved import losses_in_states, steps_by_time
from structprune.planning.uniform import UniformWidths, alike, lost_by, together

# So many widths near those that were decided are tried where a configuration cannot describe these.
NEAREST = 4


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The channels to remove from a graph.

    Attributes:
        kept: how many channels each group keeps; groups that may not be chosen are left out.
        chosen: the components that go.
        settings: what was asked for and, with a target, what is reached and what was measured.
        described: what the model's configuration then says, where that was asked.
    """

    kept: Mapping[Group, int]
    chosen: Ids
    settings: Settings
    described: Description | None = None


class Ranking:
    """The scores of each group and the order in which its channels go, computed when first asked for."""

    def __init__(self, graph: ChannelGraph, score: Importance, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._score = score
        self._tensors = tensors_of(graph) if tensors is None else tensors
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
    if options.dimensions:
        return _of_dimensions(graph, options, ranking)
    deciding = Deciding(graph, options, ranking, time)
    return _uniform(deciding) if deciding.uniform else deciding.decision(None)


def _uniform(deciding: Deciding) -> Decision:
    """One width for each axis over all layers; where the model has a configuration, in steps that it can describe."""
    graph, options = deciding.graph, deciding.options
    widths = alike(graph)
    decision = deciding.decision(widths)
    if not is_built_from_config(graph.model):
        return decision
    described = describe(graph, decision.chosen)
    if described.reason is None:
        return replace(decision, described=described)
    if not options.uniform and not_rebuilt(graph.model) is not None:
        return replace(deciding.decision(None), described=None)
    all_wanted = options.width_axes is not None or options.uniform is True
    steps = describable(graph, widths, deciding.feasible, wanted=deciding.chosen, all_wanted=all_wanted)
    try:
        tied = deciding.decision(steps.widths)
    except PlanError:  # too little may go so; what was asked for comes before what the configuration can describe
        if options.uniform:
            raise
        return replace(decision, described=described)
    described = describe(graph, tied.chosen)
    if described.reason is None:
        return replace(tied, described=described)
    # Each width can be described, and not those of all: a width that has to be a multiple of the number of heads, say.
    for kept in islice(deciding.describable(steps, tied.kept), NEAREST):
        near = deciding.decided(kept, steps.widths)
        again = describe(graph, near.chosen)
        if again.reason is None:
            return replace(near, described=again)
    return replace(tied, described=described)


def _of_dimensions(graph: ChannelGraph, options: PlanOptions, ranking: Ranking) -> Decision:
    """The channels that go so that the configuration says exactly what the target asks for.

    Raises:
        PlanError: the model cannot have these sizes.
    """
    numbers = chains_of(graph.model, options.dimensions)
    reason = "of the channels that may go, none give all of its shapes"
    for kept in islice(widths_for(graph, numbers), NEAREST):
        chosen = ranking.removed(kept)
        described = describe(graph, chosen, numbers)
        if described.reason is None:
            settings = Settings(asked=options.recorded(graph))
            return Decision(kept=kept, chosen=chosen, settings=settings, described=described)
        reason = described.reason
    raise PlanError(f"The target cannot be met: {options.dimensions} gives no model to prune to, as {reason}.")


class Deciding:
    """What is known before the numbers of channels are chosen.

    Args:
        graph: the coupled channels.
        options: what is asked for.
        ranking: the scores of the channels.
        time: predicts the time of the network, for a target of latency.

    Attributes:
        uniform: whether all layers get the same widths.
        feasible: the numbers of channels that each group may keep.
        chosen: the groups that may lose channels.
    """

    def __init__(self, graph: ChannelGraph, options: PlanOptions, ranking: Ranking, time: TimeModel | None) -> None:
        self.graph, self.options, self._ranking, self._time = graph, options, ranking, time
        groups = graph.groups()
        self._scope = options.scope_or_default
        check_names(self._scope, graph)
        self._measure = _Measure(graph, ranking, time, options.target or ())
        self._before = {} if options.target is None else self._measure({})
        self._target = None if options.target is None else target_of(options.target, self._before)
        self._ratio = ratio_of(
            graph, options.ratio_or_default if self._target is None else _guess(self._target, self._before)
        )
        rounding = Rounding(options.round_to, *_placed(graph), options.min_channels, options.max_ratio)
        shared = divisors(graph, options.tensor_parallel or 1)
        steps_measured = [None] * len(groups) if time is None else time.steps(Widths(graph, groups))
        self.feasible = {
            group: rounding.feasible(group, graph.roles, graph.bounds(group), step, shared[group])
            for group, step in zip(groups, steps_measured, strict=True)
        }
        if isinstance(self._scope, KnownCounts):
            self.feasible = {group: self._scope.known(group, counts) for group, counts in self.feasible.items()}
        self.uniform = options.is_uniform(is_built_from_config(graph.model))
        self._axes = None if options.width_axes is None else frozenset(options.width_axes)
        self.chosen = prunable_groups(graph, self._ratio, self.feasible, self._axes, heads_first=self.uniform)

    def decision(self, widths: UniformWidths | None) -> Decision:
        """The channels that go; with `widths`, so that the groups of each keep the same share.

        Raises:
            PlanError: a target cannot be met.
        """
        graph, ranking = self.graph, self._ranking
        if self._scope != "local":
            ranking.rank(self.chosen)
        all_coupled = together(graph, self.chosen, self.feasible, widths)
        if self._target is None:
            kept = self._steps(all_coupled).kept_at(self._ratio)
        else:
            ranking.rank(self.chosen)
            problem = self._problem(all_coupled, self._target)
            kept = self._within(problem, self._target, None if widths is None else lost_by(problem, self._relative))
            if self.options.allocates_exactly and all_coupled:
                kept = self._allocated(kept, all_coupled, self._target)
        return self.decided(kept, widths)

    @property
    def _relative(self) -> bool:
        """Whether losses of groups are relative to their own importance."""
        return not isinstance(self._scope, Curves) and _relative(self._scope, self._ranking)

    def _within(self, problem: Problem, target: Target, lost: Callable[[Kept], float] | None) -> Kept:
        stays = partial(left_whole, self.graph, self.chosen, self._axes)
        return kept_for(self._steps(problem.all_coupled), target, self._measure, stays, lost)

    def describable(self, widths: DescribableWidths, kept: Mapping[Group, int]) -> Iterable[Kept]:
        """Other numbers of channels that a configuration may describe where it does not describe `kept`.

        Without a target, the nearest first; else those first that lose least within it.
        """
        near = widths.near(kept, self.feasible)
        if near is None:
            return ()
        if self._target is None:
            return near.nearest()
        return near.within(self._fit(widths.widths, self._target))

    def _fit(self, widths: UniformWidths, target: Target) -> Fit:
        all_coupled = together(self.graph, self.chosen, self.feasible, widths)
        lost = lost_by(self._problem(all_coupled, target), self._relative)

        def misses(kept: Kept) -> float:
            return target.misses(self._measure(kept))

        def fitted(kept: Kept, free: Collection[Group]) -> Kept | None:
            held = [each if set(free).issuperset(each.groups) else each.held(kept) for each in all_coupled]
            least = {group: int(n) for each in held for group, n in zip(each.groups, each.counts[0], strict=True)}
            if misses(least) > 0:
                return None
            return self._within(self._problem(held, target), target, lost)

        return Fit(misses, lost, fitted)

    def _allocated(self, kept: Kept, all_coupled: list[CoupledGroups], target: Target) -> Kept:
        """What an exact choice keeps in place of the greedy one."""
        how = self.options.allocation
        return allocate(self._problem(all_coupled, target), kept, seconds=SECONDS[how], entries=ENTRIES[how])

    def problem(self) -> Problem:
        """What is to be chosen within the target, where each group has a width of its own.

        Raises:
            PlanError: there is no target.
        """
        if self._target is None:
            raise PlanError("There is no target to search within. Give target=, such as {'macs': 0.5}.")
        self._ranking.rank(self.chosen)
        return self._problem(together(self.graph, self.chosen, self.feasible, None), self._target)

    def _problem(self, all_coupled: list[CoupledGroups], target: Target) -> Problem:
        return Problem(
            graph=self.graph,
            all_coupled=all_coupled,
            losses=[np.append(lost[::-1], 0.0) for lost in _losses(all_coupled, self._scope, self._ranking)],
            target=target,
            measure=self._measure,
            counter=self._measure.counter,
            time=self._time,
        )

    def decided(self, kept: Kept, widths: UniformWidths | None) -> Decision:
        """The decision by which each group keeps so many channels."""
        graph, options, ranking = self.graph, self.options, self._ranking
        reached: dict[str, float] = {}
        if self._target is not None:
            after = self._measure(kept)
            reached = {name: after[name] / self._before[name] for name in self._target.limits}
        gone = ranking.removed(kept)
        left = {} if len(gone) else {"nothing": why_nothing(graph, options, self.chosen, self.feasible)}
        if widths is not None and widths.whole:
            left["axes"] = not_describable(graph, widths)
        settings = Settings(asked=options.recorded(graph), reached=reached, left=left)
        return Decision(kept=kept, chosen=gone, settings=settings)

    def _steps(self, all_coupled: Sequence[CoupledGroups]) -> Steps:
        """The order in which channels go."""
        scope, ranking = self._scope, self._ranking
        if self._time is not None and (scope in ("global", "per_cost") or isinstance(scope, Curves)):
            return steps_by_time(self.graph, all_coupled, _losses(all_coupled, scope, ranking), self._time)
        normalisation = _normalisation(self.graph, self.options, ranking)
        return ordered_steps(all_coupled, ranking.scores, scope, self.graph.roles, self._ratio, normalisation)


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


def _relative(scope: Scope, ranking: Ranking) -> bool:
    """Whether what is lost of a group is weighed against all that it has, as scores of groups are in no common unit."""
    return scope != "per_cost" and not ranking.comparable


def _losses(all_coupled: Sequence[CoupledGroups], scope: Scope, ranking: Ranking) -> list[np.ndarray]:
    """What coupled groups lose in each state but the whole, where importance is weighed against what is saved."""
    return losses_in_states(all_coupled, ranking.scores, scope, _relative(scope, ranking))


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
        reached = amounts(graph.costs.at(count), sum(kept.get(group, group.channels) for group in graph.groups()))
        if self._cache is not None:
            reached["kv_cache"] = self._cache.bytes(count)
        if self._time is not None:
            chosen = any(number < group.channels for group, number in kept.items())
            measured = None if chosen else self._time.whole
            reached["latency"] = 1e3 * (measured or self._time.seconds(count))
        return reached

    def counter(self, kept: Kept) -> Counter:
        """Counts the channels of axes when each group keeps so many."""
        return self._graph.counter(self._graph.components.removed(self._ranking.removed(kept)))


def _guess(target: Target, before: Amounts) -> float:
    """The ratio that comes near to a target: parameters and MACs fall with the square of the width."""

    def ratio(name: str, limit: float) -> float:
        left = min(1.0, limit / before[name])
        return 1 - (sqrt(left) if name in ("params", "macs") else left)

    return min(0.99, max(ratio(name, limit) for name, limit in target.limits.items()))
