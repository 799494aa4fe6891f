"""Every way of coupling channels: the pruned network is the original with those channels switched off."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from support import oracle
from support.cases import Case, Dims, all_cases
from support.snapshot import assert_untouched, snapshot
from torch import nn

import structprune
from structprune.coupling.solve import connected_components
from structprune.errors import RuleError

CASES = all_cases()
PRUNABLE = [case for case in CASES if case.thins]


def thinned(original: nn.Module, slim: nn.Module) -> dict[str, set[int]]:
    """The dimensions in which each tensor shrank."""
    after = oracle.floating_tensors(slim)
    return {
        name: {dim for dim, size in enumerate(tensor.shape) if after[name].shape[dim] < size}
        for name, tensor in oracle.floating_tensors(original).items()
    }


def missing(expected: Mapping[str, Dims], found: Mapping[str, set[int]]) -> dict[str, set[int]]:
    wanted = {name: {dims} if isinstance(dims, int) else set(dims) for name, dims in expected.items()}
    return {name: dims - found[name] for name, dims in wanted.items() if dims - found[name]}


@pytest.mark.parametrize("ratio", [0.5, 0.3])
@pytest.mark.parametrize("case", PRUNABLE, ids=str)
def test_equals_the_original_with_the_channels_off(case: Case, ratio: float) -> None:
    model, inputs = oracle.jitter(case.build(), seed=1), oracle.double(case.inputs())
    before = snapshot(model)
    for seed in (0, 1):
        plan = structprune.plan(model, inputs, ratio=ratio, importance=structprune.Random(seed))
        slim = plan.apply(model)
        oracle.check(model, slim, plan, inputs)
    assert_untouched(model, before)


@pytest.mark.parametrize("case", PRUNABLE, ids=str)
def test_half_of_the_channels_really_go(case: Case) -> None:
    """All that can be thinned is thinned by `prune`, and its result is what the plan alone gives."""
    model, inputs = oracle.jitter(case.build(), seed=2), oracle.double(case.inputs())
    before = snapshot(model)
    slim = structprune.prune(model, inputs, ratio=0.5, importance="l2")
    assert_untouched(model, before)
    left = missing(case.thins, thinned(model, slim))
    assert not left, f"still whole: {left}\n" + str(structprune.DependencyGraph(model, inputs).pinned())
    planned = structprune.plan(model, inputs, ratio=0.5, importance="l2")
    assert planned.removed
    oracle.check(model, slim, planned, inputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.pinned], ids=str)
def test_what_stays_whole_says_why(case: Case) -> None:
    graph = structprune.DependencyGraph(case.build(), case.inputs())
    for layer, reason in case.pinned.items():
        explanation = graph.explain(layer)
        assert "pinned" in explanation
        assert reason in explanation


@pytest.mark.parametrize("case", PRUNABLE, ids=str)
def test_slim_networks_can_be_pruned_again(case: Case) -> None:
    """Attributes and shapes are consistent enough after surgery to go through everything once more."""
    model, inputs = oracle.jitter(case.build(), seed=3), oracle.double(case.inputs())
    slim = structprune.prune(model, inputs, ratio=0.3, importance="l2")
    plan = structprune.plan(slim, inputs, ratio=0.3, importance="random")
    oracle.check(slim, plan.apply(slim), plan, inputs)


def test_norms_over_the_size_of_a_head_go_with_it() -> None:
    """Of heads and their size, whole heads go by default; asked for, the size goes."""
    case = next(case for case in CASES if str(case) == "QueryKeyNorm")
    model, inputs = oracle.jitter(case.build(), seed=2), oracle.double(case.inputs())
    plan = structprune.plan(model, inputs, ratio=0.5, axes=["head_size"])
    assert {"qn.weight", "kn.weight", "kn.bias", "q.weight", "v.weight"} <= plan.removed.keys()
    oracle.check(model, plan.apply(model), plan, inputs)


def test_what_joins_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy 1.11 went on without an error where it could not read the ints that it was given."""
    from scipy.sparse import csgraph

    monkeypatch.setattr(csgraph, "connected_components", lambda graph, directed: (1, np.zeros(4, dtype=np.int32)))
    assert connected_components(4, np.array([0, 1, 2]), np.array([1, 2, 3])).tolist() == [0, 0, 0, 0]
    monkeypatch.setattr(csgraph, "connected_components", lambda graph, directed: (4, np.arange(4)))
    with pytest.raises(RuleError, match="scipy did not join what it was given"):
        connected_components(4, np.array([0, 2]), np.array([2, 3]))
    monkeypatch.setattr(csgraph, "connected_components", lambda graph, directed: (0, np.full(4, -9999)))
    with pytest.raises(RuleError, match="scipy did not join"):
        connected_components(4, np.array([0, 2]), np.array([2, 3]))
