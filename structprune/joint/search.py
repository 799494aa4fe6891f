"""How many branches go before channels do: several numbers are tried, and the network that loses least is taken.

Branches stand in an order: what is lost without them over what they save. For a number of them, the model without them
is planned by widths as any other model is, to what is left to be saved. What each of these networks loses is measured
on the network itself, so that blocks and channels are weighed on one scale. Where there is data, the best of them, the
one with the fewest branches removed and the one with the most are recovered cheaply, and what they still lose decides.
With few batches that is a rough measure: on others, a network that was not chosen may do better.

For example, with a target that 5 of 12 blocks alone would meet::

    tried        0, 1, 3, 4 and 5 blocks, each with as many channels as it then takes
    lost         0.61, 0.44, 0.30, 0.33, 0.52
    around 3     2: 0.35
    recovered    0, 2, 3 and 5 blocks: 0.21, 0.14, 0.15, 0.40
    chosen       2 blocks and the channels that go with them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from structprune.coupling.graph import ChannelGraph
from structprune.depth.finding import find
from structprune.depth.ordering import Chosen, Saved, candidates_of, choices
from structprune.depth.plan import DepthPlan, Tried
from structprune.depth.records import PlacedBranch
from structprune.depth.removal import Removal, cut_model
from structprune.depth.scoring import Scorer
from structprune.errors import PlanError
from structprune.joint.amounts import Amounts, saved_by
from structprune.joint.candidates import Candidate, best_of, between, with_recovered
from structprune.joint.judge import batches_for, judge_of
from structprune.joint.shares import shares_of
from structprune.latency.measure import Latency
from structprune.latency.predict import Calibration
from structprune.ops import op_of
from structprune.planning.build import plan_removal
from structprune.planning.decide import Decision, Ranking
from structprune.planning.latency_target import NEAR, calibration_of, decide_by_prediction
from structprune.planning.options import PlanOptions
from structprune.planning.plan import Plan, Settings, plans_of
from structprune.planning.targets import target_of
from structprune.recovery.selection import Reconstruction
from structprune.tracing.state import collection_paused, held_tensors
from structprune.tracing.trace import ExampleInputs, trace
from structprune.wrapping import prunable

DecideForLatency = Callable[[ChannelGraph, PlanOptions, Ranking], Decision]
# Plans the channels of a model; the last argument decides where the target is a time.
PlanWidths = Callable[[nn.Module, ExampleInputs, PlanOptions, DecideForLatency], Plan]
# So many numbers of branches are tried at first, evenly spread; then those between the best one and its neighbours,
# up to so many in all.
FIRST, MOST = 5, 9
# By this share a limit may be missed for rounding.
ROUNDING = 1e-9
# So often a plan is made for a time that was missed.
ATTEMPTS = 3
# Scores that are differences of two whole networks: those that are left are scored anew after each choice.
OF_NETWORKS = ("loss", "kl", "error")


class Search:
    """The search for one plan.

    Args:
        model: the model, wrapped or not.
        example_inputs: what it runs on.
        options: what is asked for; they name blocks or branches.
        plan_widths: plans the channels of a model.
        asked: what the plan records as asked for; by default the options.

    Raises:
        PlanError: nothing may go, or there is nothing to judge by.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        options: PlanOptions,
        plan_widths: PlanWidths,
        asked: PlanOptions | None = None,
    ) -> None:
        self._model, self._inputs, self._plan_widths = prunable(model), example_inputs, plan_widths
        batches = batches_for(options, example_inputs).held()
        # Every network is judged on the same batches, also those of a generator.
        held = replace(options, data=batches, loss=None, forward=None) if options.data is not None else options
        self._asked, self._options = asked or options, held
        with collection_paused():
            self._graph = ChannelGraph(self._model, example_inputs, outputs=_tuple(options.outputs))
            recorded = trace(self._model, example_inputs, operations=op_of)
            self._ignored = [self._graph.path_of(layer) for layer in _tuple(options.ignore) or ()]
            self._units = [
                item for item in candidates_of(find(self._model, recorded), options.depth) if not self._is_ignored(item)
            ]
        if not self._units:
            named = " and ".join(sorted(options.depth))
            raise PlanError(f"{named} are asked for, and the model has none that may go. See structprune.branches.")
        # Blocks are made of branches, and stacks of blocks: a share of them is one of the parts that hold no other.
        self._finest = [
            item for item in self._units if not any(other.own_nodes < item.own_nodes for other in self._units)
        ]
        self._scorer = Scorer(self._model, recorded, batches)
        self._score = options.branch_score or ("loss" if batches.has_loss else "error")
        self._judge = judge_of(self._model, recorded, batches, options, self._score)
        self._refused: dict[str, str] = {}
        self._not_recovered = ""
        self._calibration: Calibration | None = None
        self._known: dict[tuple[str, ...], dict[str, float]] = {}

    def _is_ignored(self, item: PlacedBranch) -> bool:
        """Whether a layer that is to stay whole would go with a branch."""
        held = (*item.branch.layers, *item.branch.tensors, item.branch.module)
        return any(name == path or name.startswith(f"{path}.") for name in held for path in self._ignored)

    def _order(self, units: Sequence[PlacedBranch], price: Saved | None) -> Iterator[Chosen]:
        """What goes if one branch goes, if two go, and so on."""
        return choices(self._scorer, units, self._score, self._score in OF_NETWORKS, price, self._may_go)

    def _may_go(self, item: PlacedBranch) -> bool:
        """Whether the model can be changed so that a branch is gone."""
        try:
            self._cut((item,))
        except PlanError as error:
            self._refused[item.branch.name] = str(error)
            return False
        return True

    def _left(self, chosen: Chosen, amounts: Amounts) -> dict[str, float]:
        """The amounts of the model without some branches, counted and measured once."""
        names = tuple(sorted(item.branch.name for item in chosen))
        if names not in self._known:
            self._known[names] = amounts.of(self._cut(chosen))
        return self._known[names]

    def _cut(self, chosen: Chosen) -> nn.Module:
        """The model without some branches, on the same tensors."""
        names = [item.branch.name for item in chosen]
        return cut_model(self._model, self._inputs, names) if names else self._model

    # -- a ratio -------------------------------------------------------------------------------------------------

    def for_ratio(self) -> Plan:
        """The plan that removes a share of the blocks, and a share of the channels of what is left.

        Raises:
            PlanError: a name in the ratio matches nothing, or so many cannot go.
        """
        chosen: list[PlacedBranch] = []
        for share, units in shares_of(self._finest, self._graph, self._options.ratio_or_default).items():
            count = int(min(share, self._options.max_ratio) * len(units) + 0.5)
            sets = list(islice(self._order(units, None), count))
            if len(sets) < count:
                raise PlanError(f"ratio asks for {count} of {len(units)} to go, and no more than {len(sets)} can.")
            chosen += sets[-1] if sets else ()
        if len(chosen) == len(self._finest):
            raise PlanError(f"ratio asks for all {len(chosen)} that may go; at least one stays. Ask for less.")
        cut = self._cut(tuple(chosen))
        widths = self._planned(cut, self._of_widths())
        return self._finished(joined(cut, widths, len(chosen)), {}, {}, {})

    # -- a target ------------------------------------------------------------------------------------------------

    def for_target(self) -> Plan:
        """The plan that meets the target and loses least.

        Raises:
            PlanError: the target cannot be met.
        """
        asked = self._options.target or {}
        amounts = Amounts(self._model, self._inputs, asked, self._options.latency)
        before = amounts.whole()
        limits = target_of(asked, before).limits
        sets = self._sets(amounts, before, limits)
        tried: dict[int, Candidate] = {}
        last = len(sets) - 1
        first = {round(last * step / (FIRST - 1)) for step in range(FIRST)}
        for count in sorted(first) if self._options.width_axes != () else (last,):
            tried[count] = self._candidate(sets[count], amounts, limits)
        while (count := between(tried)) is not None and len(tried) < MOST:
            tried[count] = self._candidate(sets[count], amounts, limits)
        if self._options.data is not None and not self._judge.solves:
            tried, self._not_recovered = with_recovered(tried, self._lost_when_recovered)
        best = best_of(tried)
        if best is None:
            why = f" Refused: {next(iter(self._refused.items()))}." if self._refused else ""
            raise PlanError(f"The target cannot be met. With {last} branches removed: {tried[last].reason}{why}")
        plan, after = self._kept_to(limits, amounts, sets[best], tried[best])
        if isinstance(plan, DepthPlan):
            plan = replace(plan, tried=tuple(Tried(n, each.lost, each.recovered) for n, each in sorted(tried.items())))
        return self._finished(plan, before, limits, after)

    def _lost_when_recovered(self, plan: Plan) -> float:
        return self._judge.lost_when_recovered(plan.apply(self._model))

    def _kept_to(
        self, limits: Mapping[str, float], amounts: Amounts, chosen: Chosen, candidate: Candidate
    ) -> tuple[Plan, dict[str, float]]:
        """The plan and the amounts of its network; planned anew where it was measured to be too slow, or too fast."""
        assert candidate.plan is not None
        tried = [(candidate.plan, amounts.of(candidate.plan.apply(self._model)))]
        if "latency" not in limits:
            return tried[0]

        def ratio(each: tuple[Plan, dict[str, float]]) -> float:
            return each[1]["latency"] / limits["latency"]

        aim = dict(limits)
        while len(tried) < ATTEMPTS and tried[-1][0].slices and not 1 - 2 * NEAR <= ratio(tried[-1]) <= 1 + NEAR:
            aim["latency"] /= ratio(tried[-1])
            again = self._candidate(chosen, amounts, aim).plan
            if again is None:
                break
            tried.append((again, amounts.of(again.apply(self._model))))
        return min(tried, key=lambda each: (ratio(each) > 1 + NEAR, abs(ratio(each) - 1)))

    def _sets(self, amounts: Amounts, before: Mapping[str, float], limits: Mapping[str, float]) -> list[Chosen]:
        """What goes if no branch goes, if one goes, and so on: as many as meet the target alone, but never all."""
        seconds = amounts.times(self._scorer) if "latency" in limits else {}
        price = saved_by(self._scorer, limits, seconds)
        most = min(len(self._finest) - 1, int(self._options.max_ratio * len(self._finest)))
        wanted = {kind: 1 - limit / before[kind] for kind, limit in limits.items()}
        sets: list[Chosen] = [()]
        if max(wanted.values()) <= 0:
            return sets
        for chosen in self._order(self._units, price):
            gone = price.removed_nodes(chosen)
            if sum(item.own_nodes <= gone for item in self._finest) > most:
                break
            sets.append(chosen)
            saved = price.shares(chosen)
            if all(saved[kind] >= share - NEAR for kind, share in wanted.items()):
                left = self._left(chosen, amounts)
                if _within(left, limits):
                    break
        # Where savings are guessed, fewer may have been enough.
        while len(sets) > 2 and {"latency", "memory"} & limits.keys():
            if not _within(self._left(sets[-2], amounts), limits):
                break
            sets.pop()
        return sets

    def _candidate(self, chosen: Chosen, amounts: Amounts, limits: Mapping[str, float]) -> Candidate:
        """What comes of these branches with the channels that then have to go."""
        try:
            cut = self._cut(chosen)
            left = self._left(chosen, amounts)
            shares = {kind: limit * (1 + ROUNDING) / left[kind] for kind, limit in limits.items() if left[kind]}
            target = {kind: share for kind, share in shares.items() if share < 1}
            if target and self._options.width_axes == ():
                missed = ", ".join(f"{kind} {left[kind]:,.6g} of at most {limits[kind]:,.6g}" for kind in target)
                return Candidate(None, reason=f"there remain {missed}, and no channels may go.")
            latency = self._options.latency if "latency" in target else None
            asked = self._of_widths(target=target, latency=latency) if target else None
            widths = self._planned(cut, asked, left.get("latency", 0.0) / 1e3)
        except PlanError as error:
            return Candidate(None, reason=str(error))
        slim = widths.apply(cut) if widths.slices else cut
        return Candidate(joined(cut, widths, len(chosen)), self._judge.lost(slim))

    # -- both ----------------------------------------------------------------------------------------------------

    def _of_widths(self, **changes: Any) -> PlanOptions | None:
        """What is asked for of the channels; None if none may go."""
        axes = self._options.width_axes
        return None if axes == () else replace(self._options, axes=axes, branch_score=None, **changes)

    def _planned(self, cut: nn.Module, asked: PlanOptions | None, seconds: float = 0.0) -> Plan:
        """The channels that go of a model without some branches; none if nothing is asked for.

        Args:
            cut: the model.
            asked: what is asked for of its channels.
            seconds: the time that it takes as it is, for a target of latency.
        """
        if asked is None:
            with collection_paused(), torch.no_grad():
                graph = ChannelGraph(cut, self._inputs, outputs=_tuple(self._options.outputs))
                return plan_removal(graph, np.zeros(0, dtype=np.int64))
        asked = replace(asked, ignore=self._ignored_in(cut))
        if isinstance(asked.importance, Reconstruction) and asked.target is not None and asked.scope is None:
            fitted = asked.importance.fit(ChannelGraph(cut, self._inputs), self._scorer.batches)
            asked = replace(asked, importance=fitted, scope=fitted)
        return self._plan_widths(cut, self._inputs, asked, partial(self._by_prediction, seconds=seconds))

    def _by_prediction(
        self, graph: ChannelGraph, options: PlanOptions, ranking: Ranking, *, seconds: float
    ) -> Decision:
        """The channels that go so that the model is predicted to be as fast as asked; it takes `seconds` now.

        Predictions are calibrated once, on the whole model, and scaled to what each smaller one takes.
        """
        if self._calibration is None:
            self._calibration = calibration_of(graph, options, ranking)
        return decide_by_prediction(graph, options, ranking, calibration=self._calibration, whole=seconds)

    def _ignored_in(self, cut: nn.Module) -> list[str]:
        """The layers that stay whole, by the names that they have without the branches."""
        if cut is self._model:
            return self._ignored
        names = _removal_of(cut).names
        ignored: dict[str, None] = {}
        for path in self._ignored:
            for name in held_tensors(self._model):
                inside = name == path or name.startswith(f"{path}.")
                if inside and (now := names.get(name, name)) is not None:
                    ignored[now.removesuffix(name.removeprefix(path))] = None
        return list(ignored)

    def _finished(
        self,
        plan: Plan,
        before: Mapping[str, float],
        limits: Mapping[str, float],
        after: Mapping[str, float],
    ) -> Plan:
        """The plan with what was asked for, of the whole model, and what is reached."""
        settings = plan.settings
        left = {**settings.left, **(plan.removal.settings if isinstance(plan, DepthPlan) else {})}
        if self._refused:
            left["branches"] = "; ".join(f"{name} stays: {reason}" for name, reason in self._refused.items())
        if self._not_recovered:
            left["recovery"] = f"what is chosen was compared without recovery: {self._not_recovered}"
        reached = {kind: after[kind] / before[kind] for kind in limits}
        timed = "latency" in limits
        measured = self._measured(*(each["latency"] for each in (before, limits, after))) if timed else {}
        if timed and "latency" in settings.reached:
            # Of the network without the branches a share was predicted to be left.
            gone = plan.removal.branches if isinstance(plan, DepthPlan) else ()
            measured["predicted_ms"] = settings.reached["latency"] * self._known[tuple(sorted(gone))]["latency"]
        asked = self._asked.recorded(self._graph)
        return replace(
            plan,
            settings=Settings(
                asked=asked, reached=reached, measured=measured, left=left, over_survivors=settings.over_survivors
            ),
        )

    def _measured(self, before: float, limit: float, after: float) -> dict[str, Any]:
        latency = self._options.latency or Latency()
        return {
            "backend": latency.backend if latency.timer is None else type(latency.timer).__name__,
            "threads": latency.threads or torch.get_num_threads(),
            "before_ms": before,
            "limit_ms": limit,
            "measured_ms": after,
            "met": after <= limit * (1 + NEAR),
        }


def _tuple(given: Any) -> tuple[Any, ...] | None:
    """An option that was checked: a tuple, or None."""
    return given


def _within(amounts: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(amounts[kind] <= limit * (1 + ROUNDING) for kind, limit in limits.items())


def _removal_of(cut: nn.Module) -> Removal:
    removal: Any = plans_of(cut)[-1]
    assert isinstance(removal, Removal)
    return removal


def joined(cut: nn.Module, widths: Plan, count: int) -> Plan:
    """The plan of `count` branches that are cut and of the channels of what is left."""
    return DepthPlan.of(_removal_of(cut), widths) if count else widths


def search(model: nn.Module, example_inputs: ExampleInputs, options: PlanOptions, plan_widths: PlanWidths) -> Plan:
    """A plan of branches and channels.

    Args:
        model: the model, wrapped or not.
        example_inputs: what it runs on.
        options: what is asked for; they name blocks or branches.
        plan_widths: plans the channels of a model.

    Raises:
        PlanError: what is asked for cannot be planned.
    """
    searching = Search(model, example_inputs, options, plan_widths)
    return searching.for_ratio() if options.target is None else searching.for_target()
