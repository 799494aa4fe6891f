"""Models with adapters: the configuration of what they adapt is repaired, and the adapters follow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import oracle
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import structprune

IDS = {"input_ids": torch.arange(40).reshape(4, 10), "use_cache": False}
# What peft says about the future of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 64, "tie_word_embeddings": tied,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def adapted(base: Any, **options: Any) -> Any:
    how = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]} | options
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **how)).eval()
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**IDS).logits


ADAPTERS = {
    "some layers": {},
    "all layers": {"target_modules": "all-linear"},
    "weights decomposed": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "ranks by layer": {"use_rslora": True, "rank_pattern": {"q_proj": 8}},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = adapted(llama(), **ADAPTERS[kind])
    plan = structprune.plan(model, IDS, ratio=0.5)
    assert "config" not in plan.settings.left
    slim = plan.apply(model)
    oracle.check(model, slim, plan, IDS, tol=1e-5)
    config = slim.get_base_model().config
    assert config is slim.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    ranks = {name: len(tensor) for name, tensor in slim.named_parameters() if "lora_A" in name}
    assert ranks == {name: len(tensor) for name, tensor in model.named_parameters() if "lora_A" in name}
    whole = copy.deepcopy(slim).merge_and_unload()
    assert oracle.relative_error(logits(whole), logits(slim)) < 1e-5
    whole.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), logits(whole))
    slim.save_pretrained(tmp_path / "adapter")
    copy.deepcopy(slim).unload().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(slim))


def test_tied_tables_and_recovery(tmp_path: Path) -> None:
    model = adapted(llama(tied=True))
    slim = structprune.recover(structprune.prune(model, IDS, ratio=0.25), model, [IDS])
    assert type(slim) is type(model)
    slim.merge_and_unload().save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(slim))


def test_sizes_in_the_words_of_the_configuration() -> None:
    sizes = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    slim = structprune.prune(adapted(llama()), IDS, target=sizes)
    assert {name: getattr(slim.config, name) for name in sizes} == sizes
    assert len(slim.get_base_model().model.layers) == 2


def test_blocks(tmp_path: Path) -> None:
    model = adapted(llama())
    block = next(branch for branch in structprune.branches(model, IDS) if branch.kind == "block")
    slim = structprune.remove_branches(model, IDS, [block])
    assert slim.config.num_hidden_layers == 2
    whole = slim.merge_and_unload()
    whole.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(whole))


def test_a_rank_goes_if_its_axis_is_named() -> None:
    """The base can be loaded; of the rank no configuration of transformers says anything."""
    model = adapted(llama())
    plan = structprune.plan(model, IDS, ratio=0.5, axes=["mlp"])
    assert "lora_A.default.weight' , which is no part" in plan.settings.left["config"].replace("',", "' ,")
    slim = plan.apply(model)
    oracle.check(model, slim, plan, IDS, tol=1e-5)
    assert slim.config.intermediate_size == 32


def test_adapters_that_transformers_puts_in() -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    slim = structprune.prune(model, IDS, ratio=0.5)
    assert (slim.config.hidden_size, slim.config.intermediate_size) == (16, 32)


class Beside(nn.Module):
    """An adapter of one's own: a thin path beside a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.thin, self.layer = nn.Linear(layer.in_features, 2, bias=False), layer
        self.back = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.back(self.thin(x).relu())


def test_adapters_of_ones_own() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = Beside(layer.mlp.down_proj)
    slim = structprune.prune(model, IDS, ratio=0.5)
    assert (slim.config.hidden_size, slim.config.intermediate_size) == (16, 32)
    assert slim.model.layers[0].mlp.down_proj.thin.out_features == 2
