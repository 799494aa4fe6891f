"""`Pruner`: pruning in steps between which the model is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import nn
from torch.optim import Optimizer

from structprune.api import coupled_channels, decide
from structprune.checking import (
    INPUTS,
    MODEL,
    OPTIMIZER,
    function,
    instance,
    is_number,
    is_whole,
    one_of,
    require,
    shown,
    whole,
)
from structprune.coupling.groups import Group
from structprune.dependency_graph import DependencyGraph
from structprune.errors import PlanError
from structprune.optimizers import remap_optimizer
from structprune.planning.build import plan_removal
from structprune.planning.options import PlanKeywords, PlanOptions, takes_options
from structprune.planning.plan import Plan, plans_of, replay
from structprune.tracing.trace import ExampleInputs

# The share of all that is to go that is gone at the share t of the steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "one-shot": lambda t: 1.0,
    "linear": lambda t: t,
    # Zhu & Gupta, To prune, or not to prune, 2017, equation 1, from no sparsity and without their start and frequency.
    "cubic": lambda t: 1 - (1 - t) ** 3,
}
Schedule = str | Callable[[float], float]
Key = tuple[str, str, int]


@takes_options
class Pruner:
    """Prunes a model in place, step by step; train it in between.

    How many channels each group keeps in the end is decided at the start, as `structprune.plan` with the same options
    decides it; which ones go is decided anew at each step.

    Args:
        model: any ``nn.Module`` whose forward can be traced; changed in place by `step`.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        steps: number of steps, from 1.
        schedule: ``"cubic"`` (most goes early), ``"linear"``, ``"one-shot"`` (all in the first step), or a function
            from the share of the steps done, above 0 to 1, to the share of the channels gone, from 0 to 1.
        optimizer: its state is carried along, so that training goes on as if the removed channels had never been.
        state: what `state_dict` of a Pruner with the same options gave, to go on from there. The model is then given as
            it was built; what was done to it is done again, so that the weights of the checkpoint fit.
        options: those of `structprune.plan` (`structprune.planning.options.PlanOptions`).

    Raises:
        PlanError: what is asked for cannot be planned, or `state` belongs to another schedule or model.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> pruner = structprune.Pruner(model, torch.randn(1, 4), steps=4, schedule="linear", ratio=0.5, round_to=1)
        >>> widths = []
        >>> while not pruner.done:
        ...     plan = pruner.step()  # and train for an epoch
        ...     widths.append(model[0].out_features)
        >>> widths
        [14, 12, 10, 8]
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        steps: int,
        schedule: Schedule = "cubic",
        optimizer: Optimizer | None = None,
        state: Mapping[str, Any] | None = None,
        **options: Unpack[PlanKeywords],
    ) -> None:
        require(locals(), model=MODEL, example_inputs=INPUTS, steps=whole(1), optimizer=OPTIMIZER.or_none)
        if isinstance(schedule, str):
            require(locals(), schedule=one_of(SCHEDULES))
        else:
            require(locals(), schedule=function("the share of the steps done"))
        self.model = model
        self.steps = steps
        self.taken = 0
        self._inputs = example_inputs
        self._schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        self._optimizer = optimizer
        self._options = PlanOptions(**options)
        # By group: how many channels it has before the first step and after the last.
        self._ends: dict[Key, tuple[int, int]]
        if state is None:
            graph = coupled_channels(self.model, self._inputs, self._options)
            kept = decide(graph, self._options).kept
            self._ends = {
                key: (group.channels, kept.get(group, group.channels)) for group, key in keys_of(graph.groups()).items()
            }
        else:
            self._go_on(state)

    @property
    def done(self) -> bool:
        """Whether all steps were taken."""
        return self.taken == self.steps

    def step(self, plan: Plan | None = None) -> Plan:
        """Remove the next share of the channels.

        Args:
            plan: what to carry out, instead of deciding it here: `next_plan` of another process, so that all agree.

        Returns:
            The plan that was carried out.

        Raises:
            PlanError: all steps were taken, or the schedule gives something that is no share.
        """
        plan = self.next_plan() if plan is None else plan
        plan.apply(self.model, inplace=True)
        if self._optimizer is not None:
            remap_optimizer(self._optimizer, plan, self.model)
        self.taken += 1
        return plan

    def next_plan(self) -> Plan:
        """What the next `step` removes; nothing is changed.

        Raises:
            PlanError: all steps were taken, or the schedule gives something that is no share.
        """
        if self.done:
            raise PlanError(f"All {self.steps} steps were taken. Make a new Pruner to go further.")
        share = self._schedule((self.taken + 1) / self.steps)
        if not is_number(share) or not 0 <= share <= 1:
            raise PlanError(
                f"The schedule gives {shown(share)} at step {self.taken + 1}; it must give shares from 0 to 1."
            )
        graph = coupled_channels(self.model, self._inputs, self._options)
        decision = decide(graph, self._now(graph, share))
        with torch.no_grad():
            asked = {**decision.settings.asked, "ratio": None, "step": self.taken + 1, "share": share}
            settings = replace(decision.settings, asked=asked)
            return plan_removal(graph, decision.chosen, settings, described=decision.described)

    def state_dict(self) -> dict[str, Any]:
        """Where the pruning is, for a checkpoint: numbers, strings and lists of them.

        A state dict of the model holds no shapes to build. Give this to a new `Pruner` as ``state``, with the model as
        it was built; then load the model's and the optimizer's state dicts.

        Example:
            >>> import torch, structprune
            >>> def build():
            ...     return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
            >>> model, x = build(), torch.randn(1, 4)
            >>> pruner = structprune.Pruner(model, x, steps=4, schedule="linear", ratio=0.5)
            >>> plan = pruner.step()
            >>> checkpoint = {"pruner": pruner.state_dict(), "model": model.state_dict()}
            >>> model = build()
            >>> pruner = structprune.Pruner(
            ...     model, x, steps=4, schedule="linear", ratio=0.5, state=checkpoint["pruner"]
            ... )
            >>> model.load_state_dict(checkpoint["model"]), pruner.taken
            (<All keys matched successfully>, 1)
        """
        return {
            "steps": self.steps,
            "taken": self.taken,
            "ends": [[*key, *ends] for key, ends in self._ends.items()],
            "plans": [plan.to_json() for plan in plans_of(self.model)],
        }

    def _go_on(self, state: Mapping[str, Any]) -> None:
        require(locals(), state=instance(Mapping, "give what state_dict returned"))
        if missing := sorted({"steps", "taken", "ends", "plans"} - set(state)):
            raise PlanError(f"state is {state!r:.60}, without {', '.join(missing)}. Give what state_dict returned.")
        lists = isinstance(state["plans"], list) and isinstance(state["ends"], list)
        counts = is_whole(state["steps"]) and is_whole(state["taken"]) and 0 <= state["taken"] <= state["steps"]
        # A step takes a group nearer to its end; steps that round to nothing make no plan.
        started = counts and lists and bool(state["ends"] or not state["taken"])
        if not started or not all(map(_is_end, state["ends"])):
            raise PlanError(f"state is {state!r:.60}, which is not what state_dict returned.")
        if state["steps"] != self.steps:
            raise PlanError(
                f"The state is that of a Pruner of {state['steps']} steps, and this one has {self.steps}. Go on with "
                "the same schedule."
            )
        replay(self.model, map(Plan.from_json, state["plans"]))
        self._ends = {(name, axis, number): (start, end) for name, axis, number, start, end in state["ends"]}
        self.taken = state["taken"]

    def _now(self, graph: DependencyGraph, share: float) -> PlanOptions:
        """What is asked for now, so that afterwards `share` of all that is to go is gone."""
        return replace(
            self._options,
            ratio=self._ratio(graph, share),
            target=None,
            latency=None,
            scope="local",
            allocation="greedy",
        )

    def _ratio(self, graph: DependencyGraph, share: float) -> Callable[[Group], float]:
        """The share that each group must lose now, from what it has."""
        left: dict[Group, float] = {}
        for group, key in keys_of(graph.groups()).items():
            start, end = self._ends.get(key, (group.channels, group.channels))
            left[group] = min(1.0, (start - share * (start - end)) / group.channels)
        shares = left_together(graph, left)
        return lambda group: 1 - shares[group]


def left_together(graph: DependencyGraph, left: Mapping[Group, float]) -> dict[Group, float]:
    """The shares of its channels that each group keeps; those whose numbers depend on each other keep one share."""
    shares = dict(left)
    for balanced in graph.balanced():
        members = [graph.groups()[number] for number in balanced.groups]
        kept = sum(left[group] * group.channels for group in members) / sum(group.channels for group in members)
        shares |= dict.fromkeys(members, kept)
    return shares


def _is_end(entry: Any) -> bool:
    """Whether this may be the name, axis and number of a group, and its channels before the first step and at last."""
    kinds = (str, str, int, int, int)
    return isinstance(entry, (list, tuple)) and len(entry) == 5 and all(map(isinstance, entry, kinds))


def keys_of(groups: Iterable[Group]) -> dict[Group, Key]:
    """Names of groups that stay the same while their channels go."""
    seen: Counter[tuple[str, str]] = Counter()
    keys: dict[Group, Key] = {}
    for group in groups:
        keys[group] = (group.name, group.axis, seen[group.name, group.axis])
        seen[group.name, group.axis] += 1
    return keys
