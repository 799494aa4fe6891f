"""Targets in the words of a model's configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.transformers_models import MODELS, made, outputs, reloaded

import structprune
from structprune.errors import PlanError

ASKED = [
    ("llama", {"intermediate_size": 50}),
    ("llama", {"num_attention_heads": 4}),
    ("llama", {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ("llama", {"num_hidden_layers": 1}),
    ("llama", {"num_hidden_layers": 1, "intermediate_size": 50, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ("gemma2", {"intermediate_size": 31}),
    ("gemma3", {"hidden_size": 48}),
    ("gpt2", {"n_embd": 32}),
    ("t5", {"d_model": 40}),
    ("gpt2", {"n_embd": 32, "n_head": 2, "n_inner": 100}),
    ("bert", {"num_hidden_layers": 1, "intermediate_size": 50}),
    ("bart", {"encoder_ffn_dim": 40, "decoder_layers": 1}),
    ("mixtral", {"num_local_experts": 3, "intermediate_size": 40}),
    ("phi3", {"intermediate_size": 41}),
]


@pytest.mark.parametrize(("name", "asked"), ASKED, ids=[f"{name}-{'-'.join(asked)}" for name, asked in ASKED])
def test_exact_sizes_are_met(name: str, asked: dict[str, int], tmp_path) -> None:
    network, inputs = made(MODELS[name])
    before = network.config.to_dict()
    plan = structprune.plan(network, inputs, target=asked, **MODELS[name].options)
    assert network.config.to_dict() == before
    slim = plan.apply(network)
    structprune.verify(network, slim, plan, inputs).raise_for_error()
    changed = {key for key, value in slim.config.to_dict().items() if before.get(key) != value}
    assert {key: getattr(slim.config, key) for key in asked} == asked
    assert changed == asked.keys()
    assert plan.settings.asked["target"] == asked
    again = reloaded(slim, tmp_path)
    assert torch.equal(outputs(again, inputs), outputs(slim, inputs))


def test_prune_takes_sizes_too_and_a_plan_of_them_is_kept_as_text() -> None:
    network, inputs = made(MODELS["gpt2"])
    slim = structprune.prune(network, inputs, target={"n_inner": 100})
    assert (slim.config.n_inner, network.config.n_inner) == (100, None)
    plan = structprune.plan(network, inputs, target={"n_inner": 100})
    again = structprune.Plan.from_json(plan.to_json()).apply(network)
    assert again.config.n_inner == 100
    shorter = structprune.prune(network, inputs, target={"n_layer": 1})
    assert len(shorter.transformer.h) == shorter.config.n_layer == 1


def test_the_best_channels_stay() -> None:
    network, inputs = made(MODELS["llama"])
    with torch.no_grad():
        network.model.layers[0].mlp.gate_proj.weight[10:20].mul_(0.001)
        network.model.layers[0].mlp.up_proj.weight[10:20].mul_(0.001)
        network.model.layers[0].mlp.down_proj.weight[:, 10:20].mul_(0.001)
    plan = structprune.plan(network, inputs, target={"intermediate_size": 86})
    (removed,) = [cut.removed for cut in plan.slices if cut.tensor == "model.layers.0.mlp.gate_proj.weight"]
    assert removed == tuple(range(10, 20))


REFUSED = [
    ("llama", {"intermediate": 48}, "known are channels, .* and of the model's configuration .*intermediate_size"),
    ("llama", {"intermediate_size": 100}, "asks for 100 of intermediate_size, and there are 96"),
    ("llama", {"intermediate_size": 48.5}, "whole numbers"),
    ("llama", {"num_attention_heads": 6}, "not a multiple"),
    ("llama", {"head_dim": 4}, "inv_freq"),
    ("llama", {"num_hidden_layers": 0}, "names 'num_hidden_layers'"),
    ("llama", {"intermediate_size": 48, "params": 0.5}, "no amounts beside them"),
    ("bloom", {"n_head": 2}, "names 'n_head'|The target cannot be met"),
    ("t5", {"num_layers": 1}, "1 layers less in 'encoder.block', of which 0 can go"),
]


@pytest.mark.parametrize(("name", "asked", "message"), REFUSED, ids=[str(asked) for _, asked, _ in REFUSED])
def test_what_cannot_be_met_is_refused(name: str, asked: dict[str, Any], message: str) -> None:
    network, inputs = made(MODELS[name])
    with pytest.raises(PlanError, match=message):
        structprune.plan(network, inputs, target=asked, **MODELS[name].options)


def test_axes_and_scopes_say_nothing_beside_sizes() -> None:
    network, inputs = made(MODELS["llama"])
    for options in ({"axes": ["mlp"]}, {"scope": "global"}):
        with pytest.raises(PlanError, match="no axes and no scope"):
            structprune.plan(network, inputs, target={"intermediate_size": 48}, **options)


def test_a_model_without_a_configuration_has_no_such_words() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    with pytest.raises(PlanError, match="which this model is not"):
        structprune.plan(model, torch.randn(1, 4), target={"width": 4})
