"""One width for each axis over all layers, in steps that a configuration can describe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.transformers_models import MODELS, made, outputs, reloaded
from torch import Tensor, nn

import structprune
from structprune.errors import PlanError
from structprune.planning.scopes import CoupledGroups, Steps
from structprune.planning.targets import Target, kept_for

# What no configuration of these says is left whole by default; of BLOOM and DINOv2 it says nothing smaller at all.
SAID = [name for name in MODELS if name not in ("bloom", "dinov2")]


def removed(plan: structprune.Plan, pattern: str) -> set[tuple[int, ...]]:
    """The channels that tensors with this in their names lose along their first dimension."""
    return {cut.removed for cut in plan.slices if cut.dim == 0 and pattern in cut.tensor}


@pytest.mark.parametrize(
    "asked", [{"ratio": 0.5}, {"ratio": 0.3, "scope": "global"}, {"target": {"macs": 0.8}}], ids=str
)
@pytest.mark.parametrize("name", SAID)
def test_a_plain_call_gives_what_from_pretrained_loads(name: str, asked: dict[str, Any], tmp_path) -> None:
    network, inputs = made(MODELS[name])
    plan = structprune.plan(network, inputs, **asked, **MODELS[name].options)
    assert plan.slices
    assert "config" not in plan.settings.left
    assert "rehearsal" not in plan.settings.left
    slim = plan.apply(network)
    structprune.verify(network, slim, plan, inputs).raise_for_error()
    again = reloaded(slim, tmp_path)
    assert torch.equal(outputs(again, inputs), outputs(slim, inputs))


def test_layers_have_one_width_and_channels_of_their_own() -> None:
    network, inputs = made(MODELS["llama"])
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            network.model.layers[1].mlp.get_submodule(name).weight[:60].mul_(0.01)
    plan = structprune.plan(network, inputs, target={"params": 0.6}, scope="global")
    first, second = removed(plan, "gate_proj")
    assert len(first) == len(second)
    assert first != second
    free = structprune.plan(network, inputs, target={"params": 0.6}, scope="global", uniform=False)
    assert len({len(gone) for gone in removed(free, "gate_proj")}) == 2


def test_numbers_that_a_configuration_ties_shrink_together() -> None:
    """GPT-2 has one number for its width and for that of all its heads; BERT's pooler is as wide as its stream."""
    network, inputs = made(MODELS["gpt2"])
    slim = structprune.prune(network, inputs, target={"params": 0.6}, scope="global")
    assert slim.config.n_embd == 16 * slim.config.n_head < 64
    network, inputs = made(MODELS["bert"])
    slim = structprune.prune(network, inputs, target={"params": 0.6}, scope="global")
    assert slim.bert.pooler.dense.out_features == slim.config.hidden_size < 64


def test_query_heads_go_apart_from_key_value_heads(tmp_path) -> None:
    """How often keys are repeated follows, also where the forward of the example inputs does not repeat them."""
    network, inputs = made(MODELS["llama"])
    plan = structprune.plan(network, inputs, ratio={"*.q_proj": 0.5}, uniform=True)
    slim = plan.apply(network)
    assert (slim.config.num_attention_heads, slim.config.num_key_value_heads) == (4, 4)
    assert slim.model.layers[0].self_attn.num_key_value_groups == 1
    again = reloaded(slim, tmp_path)
    masked = {**inputs, "attention_mask": torch.ones(2, 9, dtype=torch.long).tril(6)[:, :9]}
    masked["attention_mask"][0, :4] = 0
    for given in (inputs, masked):
        assert torch.equal(outputs(again, given), outputs(slim, given))


def test_what_no_configuration_says_stays_whole_by_default_and_the_plan_tells() -> None:
    network, inputs = made(MODELS["marian"])
    plan = structprune.plan(network, inputs, ratio=0.5, outputs=["logits"])
    assert {axis.axis for axis in plan.axes if axis.after < axis.before} == {"mlp"}
    assert "no configuration could describe it" in plan.settings.left["axes"]
    named = structprune.plan(network, inputs, ratio=0.5, axes=["hidden"], outputs=["logits"])
    assert {axis.axis for axis in named.axes if axis.after < axis.before} == {"hidden"}
    assert "axes" not in named.settings.left
    assert "config" in named.settings.left


def test_what_a_target_needs_comes_before_what_a_configuration_says() -> None:
    network, inputs = made(MODELS["marian"])
    plan = structprune.plan(network, inputs, target={"params": 0.5}, outputs=["logits"])
    assert plan.settings.reached["params"] <= 0.5
    assert "config" in plan.settings.left
    with pytest.raises(PlanError, match="The target cannot be met"):
        structprune.plan(network, inputs, target={"params": 0.05}, outputs=["logits"])


def test_heads_go_as_a_whole_unless_their_size_is_named() -> None:
    network, inputs = made(MODELS["llama"])
    for ratio in (0.1, 0.25, 0.5, 0.7):
        axes = structprune.plan(network, inputs, ratio=ratio, round_to=1).axes
        assert all(axis.before == axis.after for axis in axes if axis.axis == "head_size")
    (size,) = structprune.plan(network, inputs, ratio=0.5, axes=["head_size"]).axes[-1:]
    assert (size.axis, size.after) == ("head_size", 2)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("share", [0.85, 0.7, 0.6])
def test_a_target_is_met_by_the_finest_width_beside_heads(kind: str, scope: str, share: float) -> None:
    """64 is divided by 8, 4 and 2 heads alone: where 6 would do, an MLP one channel wider would miss the target."""
    network, inputs = made(MODELS["llama"])
    settings = {**MODELS["llama"].settings, "intermediate_size": 95}
    narrower, _ = made(MODELS["llama"]._replace(settings=settings))
    whole, less = (getattr(structprune.cost(each, inputs), kind) for each in (network, narrower))
    options = {"axes": ("mlp", "heads"), "scope": scope, "round_to": 1, "importance": "l2"}
    plan = structprune.plan(network, inputs, target={kind: share}, uniform=True, **options)
    assert share - (whole - less) / whole < plan.settings.reached[kind] <= share
    assert "config" not in plan.settings.left


def test_heads_that_meet_a_target_alone_go_beside_no_other_width() -> None:
    network, inputs = made(MODELS["llama"])
    plan = structprune.plan(network, inputs, target={"kv_cache": 0.7}, axes=("mlp", "heads"), round_to=1)
    assert plan.settings.reached["kv_cache"] == 0.5
    assert {axis.axis for axis in plan.axes if axis.after < axis.before} == {"heads"}


def test_large_steps_are_given_back_where_small_ones_do() -> None:
    """Widths of 3 and 20 steps, of 100 and 10 each; the last large one would take 80 too many."""
    large, small = (CoupledGroups((name,), np.arange(n + 1)[:, None]) for name, n in (("large", 3), ("small", 20)))  # type: ignore[arg-type]
    order = np.append(np.array([0.2, 0.5, 0.8]), np.linspace(0.1, 0.9, 20))
    steps = Steps([large, small], np.repeat([0, 1], [3, 20]), order)

    def measure(kept: Any) -> dict[str, float]:
        return {"params": 100.0 * kept["large"] + 10.0 * kept["small"]}

    def lost(kept: Any) -> float:
        return 3.0 - kept["large"] + (20 - kept["small"]) / 20

    for limit in range(15, 500, 7):
        kept: Any = kept_for(steps, Target({"params": limit}), measure, lost=lost)
        states = [(a, b) for a in range(4) for b in range(21) if 100 * a + 10 * b <= limit]
        least = min(lost({"large": a, "small": b}) for a, b in states)
        assert measure(kept)["params"] <= limit
        assert kept["small"] == 20 or measure(kept)["params"] > limit - 10
        assert lost(kept) <= least + 0.5


class Stack(nn.Module):
    """Two blocks of the same widths, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2))
        with torch.no_grad():
            self.blocks[1][0].weight[8:].mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic", "per_cost"])
def test_models_without_a_configuration_are_uniform_if_asked(scope: str) -> None:
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(2, 8)
    plan = structprune.plan(model, x, target={"params": 0.6}, scope=scope, uniform=True)
    first, second = removed(plan, "0.weight")
    assert len(first) == len(second) > 0
    assert first != second
    assert plan.settings.reached["params"] <= 0.6
    free = structprune.plan(model, x, target={"params": 0.6}, scope="global")
    assert len({len(gone) for gone in removed(free, "0.weight")}) == 2


@pytest.mark.parametrize(("heads", "pairs", "devices"), [(8, 4, 4), (8, 2, 4), (8, 4, 2), (8, 8, 2)])
def test_devices_share_layers_in_equal_parts(heads: int, pairs: int, devices: int) -> None:
    settings = {**MODELS["llama"].settings, "num_attention_heads": heads, "num_key_value_heads": pairs}
    network, inputs = made(MODELS["llama"]._replace(settings=settings))
    for ratio in (0.2, 0.4, 0.6):
        options = {"ratio": ratio, "scope": "global", "round_to": 1, "importance": "random"}
        config = structprune.prune(network, inputs, tensor_parallel=devices, **options).config
        sizes = [config.num_attention_heads, config.intermediate_size, config.hidden_size]
        assert all(size % devices == 0 for size in sizes)
        assert config.num_key_value_heads % devices == 0 or config.num_key_value_heads == pairs
        assert sizes != [heads, 96, 64]


def test_uniform_is_true_or_false() -> None:
    with pytest.raises(PlanError, match="uniform is 'yes'; give True or False, or None"):
        structprune.plan(Stack(), torch.randn(2, 8), uniform="yes")
    with pytest.raises(PlanError, match="tensor_parallel is 0"):
        structprune.plan(Stack(), torch.randn(2, 8), tensor_parallel=0)
