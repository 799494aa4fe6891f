"""transformers: small configurations with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo_models.entry import Entry

VOCABULARY = 99
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_TEXT = {"vocab_size": VOCABULARY, **_SIZES}
_LANGUAGE = {**_TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_LANGUAGE, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}
_DISENTANGLED = {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
_DISTILLED = {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 8}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
_BART = {
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 96))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 64,
}
_CLIP_TEXT = {**_LANGUAGE, "projection_dim": 32}
_SAM_IMAGE = {"output_channels": 32, "num_pos_feats": 16, "global_attn_indexes": [1], "window_size": 4}
_SAM_MASK = {"hidden_size": 32, "num_attention_heads": 4, "mlp_dim": 48, "iou_head_hidden_dim": 32}
_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}

# Class name without its "Config" -> (model class, settings of the configuration, kind of inputs).
_MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("Bert", "BertForSequenceClassification", _TEXT, "text"),
    "bert-mlm": ("Bert", "BertForMaskedLM", _TEXT, "text"),
    "bert-base-model": ("Bert", "BertModel", _TEXT, "text"),
    "roberta": ("Roberta", "RobertaForSequenceClassification", _LANGUAGE, "text"),
    "distilbert": ("DistilBert", "DistilBertForSequenceClassification", _DISTILLED, "text"),
    "distilbert-mlm": ("DistilBert", "DistilBertForMaskedLM", _DISTILLED, "text"),
    "albert": ("Albert", "AlbertForSequenceClassification", {**_TEXT, "embedding_size": 32}, "text"),
    "electra": ("Electra", "ElectraForSequenceClassification", {**_TEXT, "embedding_size": 32}, "text"),
    "deberta-v2": ("DebertaV2", "DebertaV2ForSequenceClassification", _DISENTANGLED, "text"),
    "deberta-v2-mlm": ("DebertaV2", "DebertaV2ForMaskedLM", _DISENTANGLED, "text"),
    "modernbert": ("ModernBert", "ModernBertForSequenceClassification", {**_LANGUAGE, "cls_token_id": 1}, "text"),
    "roberta-mlm": ("Roberta", "RobertaForMaskedLM", _LANGUAGE, "text"),
    "albert-mlm": ("Albert", "AlbertForMaskedLM", {**_TEXT, "embedding_size": 32}, "text"),
    "electra-mlm": ("Electra", "ElectraForMaskedLM", {**_TEXT, "embedding_size": 32}, "text"),
    "modernbert-mlm": ("ModernBert", "ModernBertForMaskedLM", {**_LANGUAGE, "cls_token_id": 1}, "text"),
    "gpt2": ("GPT2", "GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}, "causal"),
    "opt": ("OPT", "OPTForCausalLM", {**_LANGUAGE, "ffn_dim": 96, "word_embed_proj_dim": 64}, "causal"),
    "gpt-neox": ("GPTNeoX", "GPTNeoXForCausalLM", _LANGUAGE, "causal"),
    "bloom": (
        "Bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "causal",
    ),
    "llama": ("Llama", "LlamaForCausalLM", _GROUPED, "causal"),
    "llama-with-cache": ("Llama", "LlamaForCausalLM", _GROUPED, "text"),
    "llama-tied": ("Llama", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}, "causal"),
    "mistral": ("Mistral", "MistralForCausalLM", _GROUPED, "causal"),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", _GROUPED, "causal"),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}, "causal"),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 16}, "causal"),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", {**_GROUPED, "head_dim": 16}, "causal"),
    "phi3": ("Phi3", "Phi3ForCausalLM", _GROUPED, "causal"),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", _GROUPED, "causal"),
    "mixtral": ("Mixtral", "MixtralForCausalLM", {**_EXPERTS, "num_local_experts": 4}, "causal"),
    "qwen3-moe": (
        "Qwen3Moe",
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
        "causal",
    ),
    "mamba2": (
        "Mamba2",
        "Mamba2ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
        "causal",
    ),
    "t5": ("T5", "T5ForConditionalGeneration", {"vocab_size": VOCABULARY, **_T5}, "seq2seq"),
    "t5-encoder": ("T5", "T5EncoderModel", {"vocab_size": VOCABULARY, **_T5}, "text"),
    "bart": ("Bart", "BartForConditionalGeneration", {"vocab_size": VOCABULARY, **_BART}, "seq2seq"),
    "marian": (
        "Marian",
        "MarianMTModel",
        {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0, **_BART},
        "seq2seq",
    ),
    "whisper": (
        "Whisper",
        "WhisperForConditionalGeneration",
        {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_mel_bins": 16, "max_source_positions": 16, **_BART},
        "mel",
    ),
    "wav2vec2": (
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        {
            **_TEXT,
            "conv_dim": (32, 32, 32),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 3),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        "wave",
    ),
    "vit": ("ViT", "ViTForImageClassification", _IMAGE, "image"),
    "dinov2": ("Dinov2", "Dinov2ForImageClassification", _IMAGE, "image"),
    "swin": (
        "Swin",
        "SwinForImageClassification",
        {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "image64",
    ),
    "convnext": ("ConvNext", "ConvNextForImageClassification", _STAGES, "image64"),
    "segformer": (
        "Segformer",
        "SegformerForSemanticSegmentation",
        {**_STAGES, "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 32},
        "image64",
    ),
    "detr": (
        "Detr",
        "DetrForObjectDetection",
        {**_BART, "num_queries": 5, "use_timm_backbone": False, "use_pretrained_backbone": False},
        "image64",
    ),
    "clip": (
        "CLIP",
        "CLIPModel",
        {"text_config": _CLIP_TEXT, "vision_config": _IMAGE, "projection_dim": 32},
        "image+text",
    ),
    "siglip": ("Siglip", "SiglipModel", {"text_config": _LANGUAGE, "vision_config": _IMAGE}, "image+text"),
    "sam": (
        "Sam",
        "SamModel",
        {
            "vision_config": {**_IMAGE, "image_size": 64, **_SAM_IMAGE},
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
            "mask_decoder_config": _SAM_MASK,
        },
        "image+points",
    ),
    "llava": (
        "Llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_GROUPED, "model_type": "llama"},
            "vision_config": {**_IMAGE, "model_type": "clip_vision_model"},
        },
        "llava",
    ),
}  # fmt: skip


def _ids(length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, length))


def _inputs(kind: str) -> dict[str, Any]:
    if kind == "text":
        return {"input_ids": _ids(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    if kind == "causal":
        return {"input_ids": _ids(), "use_cache": False}
    if kind == "seq2seq":
        return {"input_ids": _ids(), "decoder_input_ids": _ids(7), "use_cache": False}
    if kind == "mel":
        return {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": _ids(7), "use_cache": False}
    if kind == "wave":
        return {"input_values": torch.randn(2, 800)}
    size = 32 if kind in ("image", "image+text", "llava") else 64
    found: dict[str, Any] = {"pixel_values": torch.randn(1, 3, size, size)}
    if kind == "image+text":
        found |= {"input_ids": torch.cat([_ids()[:1, :11], torch.tensor([[2]])], 1)}
    if kind == "image+points":
        found |= {"input_points": torch.rand(1, 1, 2, 2) * 64}
    if kind == "llava":
        image = torch.full((1, 16), VOCABULARY - 1)  # one token for each of 16 patches
        found |= {"input_ids": torch.cat([_ids(3)[:1], image, _ids(4)[:1]], 1), "use_cache": False}
    return found


def make(name: str) -> tuple[nn.Module, Any]:
    """A small model with random weights, and its keyword inputs."""
    import transformers

    config_class, model_class, settings, kind = _MODELS[name]
    if name == "llava":
        settings = {**settings, "image_token_id": VOCABULARY - 1, "image_seq_length": 16}
        settings |= {"vision_feature_select_strategy": "default", "vision_feature_layer": -2}
    if name == "detr":
        settings = {**settings, "backbone_config": transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], out_features=["stage4"]
        )}  # fmt: skip
    config = getattr(transformers, f"{config_class}Config")(**settings)
    return getattr(transformers, model_class)(config), _inputs(kind)


class Returns(nn.Module):
    """A model that returns some of its outputs only, as ``plan(..., outputs=...)`` takes it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, **inputs: Any) -> tuple[Any, ...]:
        output = self.model(**inputs)
        return tuple(output[name] for name in self.names)


# Models that return hidden states besides what they are used for: a second time without these.
_USED_FOR = {
    "bert-base-model": ("pooler_output",),
    "bart": ("logits",),
    "marian": ("logits",),
    "t5": ("logits",),
    "detr": ("logits", "pred_boxes"),
    "clip": ("logits_per_image",),
    "siglip": ("logits_per_image",),
}


def without_states(name: str) -> tuple[nn.Module, Any]:
    """A model that returns only what it is used for, and its keyword inputs."""
    model, inputs = make(name)
    return Returns(model, _USED_FOR[name]), inputs


def entries() -> list[Entry]:
    """All of them, and those that return hidden states once more without these."""
    whole = [Entry("transformers", name, lambda name=name: make(name)) for name in _MODELS]
    return whole + [
        Entry("transformers", f"{name}-{names[0].replace('_', '-')}", lambda name=name: without_states(name))
        for name, names in _USED_FOR.items()
    ]
