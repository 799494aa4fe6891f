"""Random networks, random channels: always equal to the original with those channels switched off.

The two tests draw 520 networks between them, the same ones each time. A drawn network may ignore a channel (the mean of
an instance norm is its bias), so it is not asked that the removed ones mattered.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, assume, example, given, note, settings
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
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def drawn(chain: Sequence[Any], head: str, seed: int) -> tuple[RandomNetwork, torch.Tensor]:
    torch.set_num_threads(1)
    model = RandomNetwork(chain, head)
    oracle.jitter(model, seed)
    return model, normal(2, 3, SIZE, SIZE, seed=seed).double()


@NETWORKS
@example((("Split", (("Depthwise", 1), ("Conv", 6, 1, False), ("Shuffle",)), "cat"),), "conv", 0, 0.5)
@given(chains(), heads(), st.integers(0, 999), st.sampled_from((0.25, 0.5, 0.75)))
def test_planned_channels(chain: Sequence[Any], head: str, seed: int, ratio: float) -> None:
    model, inputs = drawn(chain, head, seed)
    before = snapshot(model)
    plan = structprune.plan(model, inputs, ratio=ratio, importance=structprune.Random(seed))
    note(f"removed: {plan.removed}")
    slim = plan.apply(model)
    assert_untouched(model, before)
    assume(plan.removed)  # a few networks hang together so that all or nothing may go
    oracle.check(model, slim, plan, inputs, matters=False)


@NETWORKS
@given(chains(), heads(), st.integers(0, 999), st.data())
def test_chosen_channels(chain: Sequence[Any], head: str, seed: int, data: st.DataObject) -> None:
    """Some channels of some group: either all that goes with them goes, or they are refused and nothing happens."""
    model, inputs = drawn(chain, head, seed)
    slim = copy.deepcopy(model)
    graph = structprune.DependencyGraph(slim, inputs)
    groups = graph.groups()
    assume(groups)
    group = data.draw(st.sampled_from(range(len(groups))).map(groups.__getitem__))
    gone = data.draw(
        st.sets(st.integers(0, group.channels - 1), min_size=1, max_size=max(1, group.channels - 1)).map(sorted)
    )
    before = snapshot(slim)
    try:
        plan = graph.prune_group(group, gone)
    except PlanError as refusal:
        note(f"refused: {refusal}")
        assert_untouched(slim, before)
        return
    note(f"removed: {plan.removed}")
    assert plan.removed
    oracle.check(model, slim, plan, inputs, matters=False)
