"""Random networks, random channels: always equal to the original with those channels switched off.

The two tests draw 520 networks between them, the same ones each time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support import oracle
from support.cases import normal
from support.random_network import SIZE, RandomNetwork, chains, heads
from support.snapshot import assert_untouched, snapshot

import structprune
from structprune.errors import PlanError

NETWORKS = settings(
    max_examples=260,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def drawn(chain: Sequence[Any], head: str, seed: int) -> tuple[RandomNetwork, torch.Tensor]:
    torch.set_num_threads(1)
    model = RandomNetwork(chain, head)
    oracle.jitter(model, seed)
    return model, normal(2, 3, SIZE, SIZE, seed=seed).double()


@NETWORKS
@given(chains(), heads(), st.integers(0, 999), st.sampled_from((0.25, 0.5, 0.75)))
def test_planned_channels(chain: Sequence[Any], head: str, seed: int, ratio: float) -> None:
    model, inputs = drawn(chain, head, seed)
    before = snapshot(model)
    torch.manual_seed(seed)
    plan = structprune.plan(model, inputs, ratio=ratio, importance="random")
    note(f"removed: {plan.removed}")
    slim = plan.apply(model)
    torch.set_rng_state(before["random state"])
    assert_untouched(model, before)
    if ratio == 0.5:
        assert plan.removed, "nothing could be removed"
    oracle.check(model, slim, plan, inputs)


@NETWORKS
@given(chains(), heads(), st.integers(0, 999), st.data())
def test_chosen_channels(chain: Sequence[Any], head: str, seed: int, data: st.DataObject) -> None:
    """Some channels of some group: either all that goes with them goes, or they are refused and nothing happens."""
    model, inputs = drawn(chain, head, seed)
    slim = copy.deepcopy(model)
    graph = structprune.DependencyGraph(slim, inputs)
    groups = graph.groups()
    assert groups, "nothing could be removed"
    group = data.draw(st.sampled_from(range(len(groups))).map(groups.__getitem__))
    gone = data.draw(st.sets(st.integers(0, group.channels - 1), min_size=1, max_size=group.channels).map(sorted))
    before = snapshot(slim)
    try:
        plan = graph.prune_group(group, gone)
    except PlanError as refusal:
        note(f"refused: {refusal}")
        assert_untouched(slim, before)
        return
    note(f"removed: {plan.removed}")
    assert plan.removed
    oracle.check(model, slim, plan, inputs)
