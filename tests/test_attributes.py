"""Attributes are repaired by provenance in models of other libraries, which structprune knows nothing of."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support import oracle
from support.cases import normal
from support.snapshot import assert_untouched, snapshot
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torchvision.models import SwinTransformer as TorchSwin
from torchvision.models import VisionTransformer as TorchViT
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import structprune

IMAGE = normal(2, 3, 32, 32)
WORDS = {"input_ids": torch.arange(14).reshape(2, 7) % 37, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
WORDS["attention_mask"][1, 5:] = 0


def timm_vit() -> nn.Module:
    return TimmViT(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5)


def timm_deit() -> nn.Module:
    return timm.create_model(
        "deit3_small_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5
    )


def torchvision_vit() -> nn.Module:
    return TorchViT(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=64, num_classes=5)


def timm_swin() -> nn.Module:
    return TimmSwin(
        img_size=32, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5
    )


def torchvision_swin() -> nn.Module:
    return TorchSwin(
        patch_size=[2, 2], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )


def bert_config(**kwargs: Any) -> BertConfig:
    return BertConfig(
        vocab_size=37,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
        **kwargs,
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(bert_config())


def bert_by_hand() -> nn.Module:
    """Attention by matmul and softmax rather than one fused call; the pooled and last states come out."""
    return BertModel(bert_config(attn_implementation="eager"))


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


MODELS = {
    build.__name__: (build, inputs)
    for build, inputs in (
        (timm_vit, IMAGE),
        (timm_deit, IMAGE),
        (torchvision_vit, IMAGE),
        (timm_swin, IMAGE),
        (torchvision_swin, IMAGE),
        (bert, WORDS),
        (bert_by_hand, WORDS),
        (llama, WORDS),
    )
}


@pytest.mark.parametrize("importance", ["l2", "random"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_original_with_the_channels_off(name: str, importance: str) -> None:
    build, example = MODELS[name]
    model, inputs = oracle.jitter(build(), seed=0), oracle.double(example)
    before = snapshot(model)
    # Each width by itself, whatever a configuration could describe.
    plan = structprune.plan(model, inputs, ratio=0.5, importance=importance, uniform=False)
    slim = plan.apply(model)
    assert_untouched(model, before)
    oracle.check(model, slim, plan, inputs)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, slim)]
    assert sizes[1] < 0.6 * sizes[0], sizes
    assert type(slim) is type(model)


def test_timm_vit() -> None:
    slim = structprune.prune(timm_vit(), IMAGE, ratio=0.5)
    for block in slim.blocks:
        attn = block.attn
        assert attn.qkv.out_features == attn.qkv.weight.shape[0] == 3 * attn.num_heads * attn.head_dim
        assert attn.attn_dim == attn.num_heads * attn.head_dim == attn.proj.in_features
        assert (attn.num_heads, attn.head_dim) != (4, 12)
        assert block.norm1.normalized_shape == (attn.qkv.in_features,)
    assert slim.pos_embed.shape[2] == slim.cls_token.shape[2] == slim.patch_embed.proj.out_channels < 48


def test_torchvision_vit() -> None:
    slim = structprune.prune(torchvision_vit(), IMAGE, ratio=0.5)
    width = slim.conv_proj.out_channels
    assert slim.hidden_dim == slim.class_token.shape[2] == slim.encoder.pos_embedding.shape[2] == width < 48
    for layer in slim.encoder.layers:
        assert layer.self_attention.embed_dim == width
        assert layer.ln_1.normalized_shape == (width,)
        assert layer.self_attention.in_proj_weight.shape[1] == width


def group_of(graph: structprune.DependencyGraph, tensor: str, channels: int) -> structprune.Group:
    """The prunable group of so many channels that thins the outputs of `tensor`."""
    members = ((group, m) for group in graph.groups() for m in group.members)
    return next(group for group, m in members if (m.tensor, m.dim, group.channels) == (tensor, 0, channels))


def test_bert() -> None:
    model, inputs = oracle.jitter(bert(), seed=1), oracle.double(WORDS)
    slim: Any = oracle.jitter(bert(), seed=1)
    graph = structprune.DependencyGraph(slim, inputs)
    plan = graph.prune_group(group_of(graph, "bert.encoder.layer.1.attention.self.query.weight", 12), [1, 7])
    first, second = (layer.attention.self for layer in slim.bert.encoder.layer)
    assert (first.attention_head_size, second.attention_head_size) == (12, 10)
    assert (second.query.out_features, second.value.out_features) == (40, 40)
    oracle.check(model, slim, plan, inputs)
    slim = structprune.prune(bert(), WORDS, ratio=0.5)
    assert slim.bert.embeddings.word_embeddings.embedding_dim == slim.classifier.in_features == 24
    assert [layer.intermediate.dense.out_features for layer in slim.bert.encoder.layer] == [32, 32]


def test_llama_keeps_its_tie_and_its_pairs_of_rotation() -> None:
    slim: Any = structprune.prune(llama(), WORDS, ratio=0.5)
    assert slim.lm_head.weight is slim.model.embed_tokens.weight
    for layer in slim.model.layers:
        attn = layer.self_attn
        assert attn.q_proj.out_features == attn.num_key_value_groups * attn.k_proj.out_features
        assert layer.mlp.gate_proj.out_features == layer.mlp.down_proj.in_features == 24


@pytest.mark.parametrize("build", [timm_swin, torchvision_swin])
def test_swin(build: Any) -> None:
    model = build()
    slim = structprune.prune(model, IMAGE, ratio=0.5)
    tables = [name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 4
    attentions = [m for m in slim.modules() if hasattr(m, "relative_position_bias_table")]
    for attn in attentions:
        assert attn.relative_position_bias_table.shape[1] == attn.num_heads
        assert attn.qkv.out_features % (3 * attn.num_heads) == 0


def test_the_scale_of_attention_stays_when_the_size_of_heads_changes() -> None:
    """Remove some indices from every head and nothing else: the softmax must still divide by the old root."""
    model, inputs = oracle.jitter(timm_vit(), seed=1), IMAGE.double()
    slim: Any = oracle.jitter(timm_vit(), seed=1)
    graph = structprune.DependencyGraph(slim, inputs)
    plan = graph.prune_group(group_of(graph, "blocks.0.attn.qkv.weight", 12), [0, 5, 7])
    attn = slim.blocks[0].attn
    assert (attn.num_heads, attn.head_dim, attn.attn_dim) == (4, 9, 36)
    assert slim.blocks[1].attn.head_dim == 12
    oracle.check(model, slim, plan, inputs)


def test_whole_heads_can_go() -> None:
    model, inputs = oracle.jitter(timm_vit(), seed=2), IMAGE.double()
    slim: Any = oracle.jitter(timm_vit(), seed=2)
    graph = structprune.DependencyGraph(slim, inputs)
    plan = graph.prune_group(group_of(graph, "blocks.1.attn.qkv.weight", 4), [2])
    attn = slim.blocks[1].attn
    assert (attn.num_heads, attn.head_dim, attn.attn_dim) == (3, 12, 36)
    oracle.check(model, slim, plan, inputs)
