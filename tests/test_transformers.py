"""Models of transformers in small: generation after pruning, and configurations that tell the truth."""

from __future__ import annotations

import pytest
import torch
from support.snapshot import assert_untouched, snapshot
from support.transformers_models import CAUSAL, MODELS, Model, made, outputs, reloaded

import structprune
from structprune.ops import op_of
from structprune.tracing.trace import trace


@pytest.mark.parametrize("model", CAUSAL.values(), ids=CAUSAL)
def test_generates_the_same_with_and_without_cache(model: Model) -> None:
    network, inputs = made(model)
    before = snapshot(network)
    slim = structprune.prune(network, inputs, ratio=0.5, uniform=False, **model.options)
    assert_untouched(network, before)
    assert sum(p.numel() for p in slim.parameters()) < 0.7 * sum(p.numel() for p in network.parameters())
    given = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = slim.generate(**given, **how, use_cache=False)
    assert torch.equal(slim.generate(**given, **how, use_cache=True), plain)
    if slim._can_compile_fullgraph:  # what transformers asks of a model with a static cache
        assert torch.equal(slim.generate(**given, **how, cache_implementation="static", disable_compile=True), plain)


# A number of a configuration may mean more than a width (a table of positions), or a tensor of that width may take no
# part in the forward: no configuration then gives what pruning all axes does. Fewer axes may do, see UNIFORM; by
# default only those are pruned.
NOT_ALL_AXES = {
    "marian": "'model.encoder.embed_positions.weight' is not saved but computed",
    "dinov2": "'dinov2.embeddings.mask_token', which the forward does not use on the example inputs",
}
UNIFORM = {
    **{name: (model, {}) for name, model in MODELS.items() if name not in NOT_ALL_AXES},
    "marian": (MODELS["marian"], {"axes": ["mlp"]}),  # its heads together are as wide as the model
}


@pytest.mark.parametrize(("model", "options"), UNIFORM.values(), ids=UNIFORM)
def test_a_uniformly_pruned_model_is_saved_and_loaded_through_its_configuration(model, options, tmp_path) -> None:
    network, inputs = made(model)
    original = network.config.to_dict()
    plan = structprune.plan(network, inputs, ratio=0.5, **model.options, **options)
    slim = structprune.Plan.from_json(plan.to_json()).apply(network)
    assert "config" not in plan.settings
    assert network.config.to_dict() == original
    assert slim.config is not network.config
    assert slim.config.to_dict() != original
    again = reloaded(slim, tmp_path)
    assert torch.equal(outputs(again, inputs), outputs(slim, inputs))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (again, slim, network)]
    assert sizes[0] == sizes[1] < 0.95 * sizes[2]


@pytest.mark.parametrize("name", NOT_ALL_AXES)
def test_a_configuration_that_cannot_say_it_is_left_and_the_plan_tells(name: str, tmp_path) -> None:
    network, inputs = made(MODELS[name])
    plan = structprune.plan(network, inputs, ratio=0.5, uniform=False, **MODELS[name].options)
    assert NOT_ALL_AXES[name] in plan.settings["config"]
    assert "config unchanged" in str(plan)
    slim = plan.apply(network)
    assert slim.config.to_dict() == network.config.to_dict()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        reloaded(slim, tmp_path)


def test_layers_of_different_widths_are_told(tmp_path) -> None:
    network, inputs = made(MODELS["llama"])
    ratio = {"model.layers.0.mlp.up_proj": 0.5, "model.layers.1.mlp.up_proj": 0.25}
    ratio |= {name.replace("up_proj", "gate_proj"): share for name, share in ratio.items()}
    plan = structprune.plan(network, inputs, ratio=ratio)
    assert "model.config.intermediate_size would have to be" in plan.settings["config"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        reloaded(plan.apply(network), tmp_path)


def test_a_size_of_heads_that_rotates_cannot_be_loaded_and_says_so() -> None:
    network, inputs = made(MODELS["llama"])
    plan = structprune.plan(network, inputs, ratio=0.5, axes=["head_size"])
    assert "'model.rotary_emb.inv_freq' is not saved" in plan.settings["config"]
    assert not any("config" in edit.chain for edit in plan.attribute_edits)


def test_attributes_that_the_forward_does_not_read_tell_the_truth_too() -> None:
    network, inputs = made(MODELS["bert"])
    slim = structprune.prune(network, inputs, ratio=0.5)
    attention = slim.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size) == (2, 16, 32)
    assert (slim.config.hidden_size, slim.config.num_attention_heads, slim.config.intermediate_size) == (32, 2, 48)
    assert slim.config.num_hidden_layers == 2


def test_pruned_twice_and_in_place(tmp_path) -> None:
    network, inputs = made(MODELS["llama"])
    settings = network.config
    axes = ["hidden", "mlp"]
    once = structprune.prune(network, inputs, ratio=0.25, axes=axes, inplace=True)
    assert once.config is settings
    twice = structprune.prune(once, inputs, ratio=0.5, axes=axes)
    assert (once.config.hidden_size, twice.config.hidden_size) == (48, 24)
    assert torch.equal(outputs(reloaded(twice, tmp_path), inputs), outputs(twice, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "whisper", "mixtral", "qwen3-moe"])
def test_masks_and_positions_need_no_weights(name: str) -> None:
    """Branches on masks are followed on stand-ins, so that models on the meta device can be planned."""
    network, inputs = made(MODELS[name])
    for given in (inputs, {**inputs, "use_cache": False} if name in CAUSAL else inputs):
        assert not trace(network, given, operations=op_of).real
    wanted = [(t.tensor, t.dim, len(t.removed)) for t in structprune.plan(network, inputs).slices]
    with torch.device("meta"):
        empty = type(network)(network.config)
    planned = structprune.plan(empty, inputs, importance="random")
    assert [(t.tensor, t.dim, len(t.removed)) for t in planned.slices] == wanted


def test_a_mask_with_padding_takes_the_other_branch() -> None:
    network, inputs = made(MODELS["llama"])
    inputs["attention_mask"][0, :3] = 0
    assert not trace(network, inputs, operations=op_of).real
    plan = structprune.plan(network, inputs, ratio=0.5)
    assert structprune.verify(network, plan.apply(network), plan, inputs).ok


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_by_each_implementation(name: str, how: str) -> None:
    network, inputs = made(MODELS[name])
    network.set_experts_implementation(how)
    plan = structprune.plan(network, inputs, ratio=0.5)
    slim = plan.apply(network)
    assert structprune.verify(network, slim, plan, inputs).ok
    up = next(tensor for tensor in plan.removed if tensor.endswith("experts.gate_up_proj"))
    # The loop over experts that were hit hands their numbers to Python, so all of them stay.
    assert set(plan.removed[up]) == ({1, 2} if how == "eager" else {0, 1, 2})
