"""The exact allocation: against all choices there are on tiny networks, and never worse than the greedy one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.depth_nets import residuals
from support.latency import NETWORKS, Machine, seeded
from support.networks import IDS, Transformer, exact
from support.random_network import RandomNetwork, chains, heads
from torch import nn

import structprune
from structprune.errors import PlanError
from structprune.planning import allocation, decide
from structprune.planning.allocation import Problem
from structprune.planning.programme import Limit, solved

X = torch.randn(2, 3, 8, 8)


class Crossed(nn.Module):
    """Widths that meet in products, in a sum and in a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 8, 1)
        self.other = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(torch.cat([x, F.relu(self.other(x))], 1).mean((2, 3)))


@pytest.fixture
def problems(monkeypatch):
    """The problems that plans pose while the test runs, each with the greedy and the exact choice."""
    found: list[tuple[Problem, tuple[int, ...], tuple[int, ...]]] = []

    def kept(problem, greedy, **limits):
        chosen = allocation.allocate(problem, greedy, **limits)
        found.append((problem, problem.states(greedy), problem.states(chosen)))
        return chosen

    monkeypatch.setattr(decide, "allocate", kept)
    return found


def least(problem: Problem) -> float:
    """What is lost by the best of all choices within the limits, each of them counted."""
    choices = product(*(range(len(coupled.counts)) for coupled in problem.all_coupled))
    lost = sorted((problem.lost(states), states) for states in choices)
    return next(loss for loss, states in lost if problem.target.misses(problem.measure(problem.kept(states))) <= 0)


# -- the programme ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_programme_finds_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [4, 3, 5, 1, 3]
    losses = [np.sort(rng.random(size))[::-1] for size in sizes]
    over = [(0, 1), (1, 2), (0, 2, 4), (3, 4), (2,), (0, 1)]
    tables = [[(owners, rng.random([sizes[i] for i in owners])) for owners in over] for _ in range(2)]
    constants = (0.1, 0.0)

    def amounts(states):
        return [
            constant + sum(float(table[tuple(states[i] for i in owners)]) for owners, table in held)
            for constant, held in zip(constants, tables, strict=True)
        ]

    choices = list(product(*map(range, sizes)))
    most = np.quantile([amounts(states) for states in choices], 0.15, axis=0)
    limits = [Limit(held, constant, float(m)) for held, constant, m in zip(tables, constants, most, strict=True)]
    lost = {states: sum(loss[i] for loss, i in zip(losses, states, strict=True)) for states in choices}
    fits = [states for states in choices if (np.array(amounts(states)) <= most).all()]
    found = solved(losses, limits, 60.0)
    assert found is not None
    assert found.proven
    assert found.states in fits
    assert lost[found.states] == pytest.approx(min(lost[states] for states in fits), rel=2e-4)


def test_no_choice_within_the_limits() -> None:
    losses = [np.array([1.0, 0.0])]
    assert solved(losses, [Limit([((0,), np.array([2.0, 3.0]))], 0.0, 1.0)], 5.0) is None
    assert solved(losses, [Limit([], 2.0, 1.0)], 5.0) is None


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        {"macs": 0.5},
        {"params": 0.4},
        {"memory": 0.6},
        {"channels": 0.5},
        {"macs": 0.6, "params": 0.5},
        {"macs": 0.5, "memory": 0.7, "channels": 0.8},
    ],
    ids=str,
)
def test_a_plan_is_the_best_of_all(target, problems) -> None:
    torch.manual_seed(0)
    model = Crossed().eval()
    plan = structprune.plan(model, X, target=target, allocation="exact", round_to=1)
    (problem, greedy, chosen), *_ = problems
    assert problem.lost(chosen) == pytest.approx(least(problem), rel=2e-4)
    assert problem.lost(chosen) <= problem.lost(greedy)
    assert all(plan.settings.reached[name] <= share for name, share in target.items())
    assert plan.settings.asked["scope"] == "global"
    exact(model, X, plan)


def test_balanced_groups_and_heads_are_chosen_together(problems) -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
            self.head = nn.Conv2d(12, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = F.relu(self.stem(x)).chunk(2, 1)
            return self.head(torch.cat([F.relu(self.left(left)), F.relu(self.right(right))], 1)).mean((2, 3))

    torch.manual_seed(0)
    model = Shuffled().eval()
    plan = structprune.plan(model, X, target={"macs": 0.5}, allocation="exact", round_to=1)
    problem, _, chosen = problems[-1]
    assert any(len(coupled.groups) > 1 for coupled in problem.all_coupled)
    assert problem.lost(chosen) == pytest.approx(least(problem), rel=2e-4)
    exact(model, X, plan)


@pytest.mark.parametrize("target", [{"params": 0.5}, {"kv_cache": 0.5}, {"kv_cache": 0.75, "macs": 0.5}], ids=str)
def test_attention_with_heads_and_head_sizes(target, problems) -> None:
    torch.manual_seed(0)
    model = Transformer().eval()
    axes = ["heads", "head_size", "mlp"]
    plan = structprune.plan(model, IDS, target=target, allocation="exact", round_to=1, axes=axes)
    problem, greedy, chosen = problems[-1]
    assert problem.lost(chosen) <= problem.lost(greedy)
    assert all(plan.settings.reached[name] <= share for name, share in target.items())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chain=chains(), head=heads(), seed=st.integers(0, 5), share=st.sampled_from([0.3, 0.5, 0.7]))
def test_random_networks_keep_no_less_than_by_the_greedy_choice(problems, chain, head, seed, share) -> None:
    torch.manual_seed(seed)
    model = RandomNetwork(chain, head).eval()
    x = torch.randn(2, 3, 5, 5)
    try:
        plan = structprune.plan(model, x, target={"macs": share}, allocation="auto", scope="global", round_to=1)
    except PlanError as error:
        assert "cannot be met" in str(error)  # noqa: PT017, the error is one of two right ends
        return
    if problems:
        problem, greedy, chosen = problems.pop()
        assert problem.lost(chosen) <= problem.lost(greedy)
    assert plan.after.macs <= share * plan.before.macs


def test_many_widths_are_chosen_by_finer_and_finer_programmes(problems, monkeypatch) -> None:
    monkeypatch.setitem(allocation.ENTRIES, "exact", (60,))
    torch.manual_seed(0)
    model = Crossed().eval()
    structprune.plan(model, X, target={"macs": 0.5}, allocation="exact", round_to=1)
    problem, greedy, chosen = problems[-1]
    assert problem.lost(chosen) < problem.lost(greedy)
    assert problem.lost(chosen) <= 1.1 * least(problem)


def test_a_target_of_latency(problems) -> None:
    build, x = NETWORKS["convolutions"]
    model = seeded(build)
    latency = structprune.Latency(timer=Machine(step=4))
    plan = structprune.plan(model, x, target={"latency": 0.5, "params": 0.6}, allocation="exact", latency=latency)
    assert plan.settings.measured["met"]
    assert plan.settings.reached["params"] <= 0.6
    for problem, greedy, chosen in problems:
        assert problem.lost(chosen) <= problem.lost(greedy)
        assert problem.target.misses(problem.measure(problem.kept(chosen))) <= 0


def test_measured_curves_are_a_loss_too(problems) -> None:
    torch.manual_seed(0)
    model = Crossed().eval()
    wanted = model(X).detach()
    curves = structprune.sensitivity(
        model, X, X, lambda model, x: -float((model(x) - wanted).square().mean()), ratios=(0.25, 0.5, 0.75)
    )
    plan = structprune.plan(model, X, target={"macs": 0.5}, scope=curves, allocation="exact", round_to=1)
    problem, greedy, chosen = problems[-1]
    assert problem.lost(chosen) == pytest.approx(least(problem), rel=2e-4)
    assert problem.lost(chosen) <= problem.lost(greedy)
    assert plan.settings.reached["macs"] <= 0.5


def test_changes_of_the_output_are_added_up(problems) -> None:
    torch.manual_seed(0)
    model = Crossed().eval()
    graph = structprune.DependencyGraph(model, X)
    fitted = structprune.Reconstruction().fit(graph, [torch.randn(16, 3, 8, 8)])
    asked = {"importance": fitted, "scope": fitted, "target": {"macs": 0.5}, "round_to": 1}
    structprune.plan(model, X, **asked, allocation="exact")
    problem, greedy, chosen = problems[-1]
    assert problem.lost(chosen) == pytest.approx(least(problem), rel=2e-4)
    assert problem.lost(chosen) <= problem.lost(greedy)
    for group, loss in zip((c.groups[0] for c in problem.all_coupled), problem.losses, strict=True):
        prices = fitted.depth(group, np.arange(group.channels - 1, 0, -1))
        less = loss[-2::-1] - loss[:0:-1]  # what each channel adds, the first to go first
        np.testing.assert_allclose(less / prices, less[0] / prices[0])


def test_widths_of_which_there_are_too_many_for_one_table(problems) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 240), nn.ReLU(), nn.Linear(240, 240), nn.ReLU(), nn.Linear(240, 8)).eval()
    plan = structprune.plan(model, torch.randn(1, 8), target={"macs": 0.4}, allocation="exact", round_to=1)
    problem, _, chosen = problems[-1]
    assert 0.395 < plan.settings.reached["macs"] <= 0.4
    assert problem.lost(chosen) == pytest.approx(least(problem), rel=1e-3)


def test_protected_layers_steps_and_bounds_hold() -> None:
    torch.manual_seed(0)
    model = Crossed().eval()
    plan = structprune.plan(
        model, X, target={"macs": 0.85}, allocation="exact", round_to=2, min_channels=3, max_ratio=0.5, ignore="other"
    )
    widths = {layer.layer: layer.after for layer in plan.layers}
    assert "other" not in widths
    assert all(after % 2 == 0 and after >= 4 for after in widths.values())


def test_automatic_is_greedy_where_groups_do_not_compete() -> None:
    torch.manual_seed(0)
    model = Crossed().eval()
    for asked in ({"ratio": 0.5}, {"target": {"macs": 0.5}}, {"target": {"macs": 0.5}, "scope": "isomorphic"}):
        plans = [structprune.plan(model, X, round_to=1, **asked, allocation=each) for each in ("auto", "greedy")]
        assert plans[0].layers == plans[1].layers


def test_blocks_go_first_and_the_widths_of_what_is_left_are_exact(problems) -> None:
    model, x = residuals()
    plan = structprune.plan(
        model, x, target={"params": 0.5}, axes=("blocks", "widths"), data=[x], allocation="exact", round_to=1
    )
    assert plan.settings.reached["params"] <= 0.5
    assert problems


def test_steps_end_at_the_widths_that_were_chosen() -> None:
    torch.manual_seed(0)
    model = Crossed().eval()
    asked = {"target": {"macs": 0.5}, "allocation": "exact", "round_to": 1}
    wanted = {layer.layer: layer.after for layer in structprune.plan(model, X, **asked).layers}
    pruner = structprune.Pruner(model, X, steps=2, **asked)
    while not pruner.done:
        pruner.step()
    for name, width in wanted.items():
        assert getattr(pruner.model, name).weight.shape[0] == width


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ratio": 0.5}, "allocation='exact' chooses widths for a target, and none is given"),
        ({"target": {"macs": 0.5}, "scope": "local"}, "lets all groups compete"),
        ({"target": {"macs": 0.5}, "scope": "isomorphic"}, "lets all groups compete"),
        ({"target": {"macs": 0.5}, "scope": [["stem"]]}, "lets all groups compete"),
        ({"target": {"macs": 1e-9}}, "The target cannot be met"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen_exactly(asked, said) -> None:
    with pytest.raises(PlanError, match=said):
        structprune.plan(Crossed(), X, allocation="exact", **asked)
