"""The oracle catches an engine that is wrong: rules broken on purpose, and a plan that lost a part."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from support import oracle
from support.cases import CASES, all_cases, normal
from support.random_network import SIZE, RandomNetwork
from torch import nn

import structprune
from structprune.ops import OPS

all_cases()


def untied(c: Any, x: Any, *_: Any, **__: Any) -> Any:
    """The second operand of an elementwise operation is forgotten."""
    return x.axes


def swapped(c: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """What is concatenated is taken to lie the other way round."""
    return RULES_AS_THEY_ARE["cat"].coupling(c, list(reversed(tensors)), *args, **kwargs)


def unmoved(c: Any, x: Any, *_: Any, **__: Any) -> Any:
    """A permutation of the channels is overlooked."""
    return x.axes


RULES_AS_THEY_ARE = dict(OPS)
BROKEN = [
    ("add", untied, ((("Residual", (("Conv", 8, 3, True),), False),), "conv")),
    ("mul", untied, ((("Residual", (("Conv", 8, 3, True),), True),), "conv")),
    ("cat", swapped, ((("Branches", ((("Conv", 8, 3, True),), (("Conv", 8, 1, True),)), False),), "conv")),
    ("flip", unmoved, ((("Reorder", "flip"),), "mean")),
]


@pytest.mark.parametrize(("operation", "rule", "network"), BROKEN)
def test_sees_a_broken_rule(operation: str, rule: Any, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is wrong but gives rows of the right sizes makes a network that runs, and computes something else."""
    model = oracle.jitter(RandomNetwork(*network), seed=0)
    inputs = normal(2, 3, SIZE, SIZE).double()

    def pruned() -> tuple[nn.Module, Any]:
        plan = structprune.plan(model, inputs, ratio=0.5, importance=structprune.Random(2))
        return plan.apply(model), plan

    oracle.check(model, *pruned(), inputs)
    monkeypatch.setitem(OPS, operation, dataclasses.replace(OPS[operation], coupling=rule))
    slim, plan = pruned()
    slim(inputs)  # it runs: only its numbers can tell
    with pytest.raises(AssertionError, match="relative error"):
        oracle.check(model, slim, plan, inputs)


def test_sees_a_softmax_whose_scale_was_not_kept() -> None:
    """The root of a head's size changes with the size; a plan that loses its factors must not pass."""
    model, inputs = oracle.jitter(CASES["TimmAttention"].build(), seed=0), CASES["TimmAttention"].inputs().double()
    graph = structprune.DependencyGraph(copy.deepcopy(model), inputs)
    both = [group for group in graph.groups() if "attn.qkv.weight, dim 0: 12 a" in str(group)]
    assert len(both) == 2, "whole heads, and an index in every head"
    plan = graph.prune_group(both[1], [1])
    assert plan.rescales
    oracle.check(model, plan.apply(model), plan, inputs)
    lost = dataclasses.replace(plan, rescales=()).apply(model)
    with pytest.raises(AssertionError, match="relative error"):
        oracle.check(model, lost, plan, inputs)
