"""Sections that must keep equally many channels: what may be kept together, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support import oracle
from support.cases import CASES, all_cases
from support.snapshot import assert_untouched, snapshot
from torch import nn

import structprune
from structprune.errors import PlanError

all_cases()


def jittered(name: str) -> tuple[nn.Module, torch.Tensor]:
    case = CASES[name]
    return oracle.jitter(case.build(), seed=4), oracle.double(case.inputs())


def test_halves_choose_for_themselves() -> None:
    model, inputs = jittered("HalvesApart")
    graph = structprune.DependencyGraph(model, inputs)
    (balanced,) = graph.balanced()
    left, right = (graph.groups()[number] for number in balanced.groups)
    assert {left.channels, right.channels} == {8}
    assert np.array_equal(balanced.counts, np.arange(1, 9)[:, None].repeat(2, 1))
    plan = graph.prune_group("stem", [0, 1, 2, 8, 13, 15])
    assert plan.removed["stem.weight"][0] == (0, 1, 2, 8, 13, 15)
    oracle.check(jittered("HalvesApart")[0], model, plan, inputs)


def test_unequal_halves_are_refused() -> None:
    model, inputs = jittered("HalvesApart")
    graph = structprune.DependencyGraph(model, inputs)
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"equally many channels.*\[6, 8\] would be left.*DependencyGraph.balanced"):
        graph.prune_group("stem", [0, 1])
    assert_untouched(model, before)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("name", ["ShuffledUnits", "OddShuffledUnits"])
def test_shuffled_channels_go_to_other_places(name: str, ratio: float) -> None:
    """Behind a shuffle the survivors stand in another order, and the weights that read them follow."""
    model, inputs = jittered(name)
    plan = structprune.plan(model, inputs, ratio=ratio, importance=structprune.Random(0))
    assert any(sliced.order is not None for sliced in plan.slices)
    again = structprune.Plan.from_json(plan.to_json())
    assert again == plan
    oracle.check(model, again.apply(model), plan, inputs)
    assert structprune.verify(model, again.apply(model), plan, inputs).ok
    unordered = dataclasses.replace(plan, slices=tuple(dataclasses.replace(t, order=None) for t in plan.slices))
    with pytest.raises(AssertionError, match="relative error"):
        oracle.check(model, unordered.apply(model), plan, inputs)


@pytest.mark.parametrize("name", ["SectionsOfHeads", "HalvesCutAgain"])
def test_sections_that_something_else_looks_at_are_tied(name: str) -> None:
    assert not structprune.DependencyGraph(*jittered(name)).balanced()


@pytest.mark.parametrize("name", ["ShuffledUnits", "OddShuffledUnits", "HalvesApart", "CrossStage"])
def test_each_choice_can_be_planned(name: str) -> None:
    """Every line of counts gives a network that runs and is right."""
    model, inputs = jittered(name)
    generator = np.random.default_rng(0)
    graph = structprune.DependencyGraph(model, inputs)
    groups = graph.groups()
    for balanced in graph.balanced():
        for line in balanced.counts[:-1]:
            chosen = [
                generator.permutation(groups[number].components)[keep:]
                for number, keep in zip(balanced.groups, line, strict=True)
            ]
            plan = structprune.planning.build.plan_removal(graph, np.concatenate(chosen))
            oracle.check(model, plan.apply(model), plan, inputs)


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("name", ["ShuffledUnits", "OddShuffledUnits", "HalvesApart"])
def test_every_scope_keeps_the_balance(name: str, scope: str) -> None:
    model, inputs = jittered(name)
    for asked in ({"ratio": 0.4}, {"target": {"params": 0.5}}, {"ratio": 0.5, "round_to": 4}):
        plan = structprune.plan(model, inputs, scope=scope, **asked)
        assert plan.removed
        oracle.check(model, plan.apply(model), plan, inputs)


def test_sensitivity_thins_balanced_groups_together() -> None:
    model, inputs = jittered("HalvesApart")

    def near(other: nn.Module, x: torch.Tensor) -> float:
        return -float((other(x) - model(x)).abs().mean())

    found = structprune.sensitivity(model, inputs, inputs, near, ratios=(0.25, 0.5))
    assert len(found.curves) == len(structprune.DependencyGraph(model, inputs).groups())
    assert structprune.plan(model, inputs, scope=found, target={"params": 0.6}).removed
