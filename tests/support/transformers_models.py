"""Models of transformers in small, their inputs, and how they are saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 99
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZES, **SPECIAL, "num_attention_heads": 8}
GROUPED = {**TEXT, "num_key_value_heads": 4}
WIDE_HEADS = {**GROUPED, "head_dim": 16}
GPT = {**SPECIAL, "n_layer": 2, "n_head": 4}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
SIDES = {"layers": 2, "ffn_dim": 96, "attention_heads": 4}
BOTH = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDES.items()}
SEQ2SEQ = {**SPECIAL, **BOTH, "d_model": 64, "decoder_start_token_id": 1}
MEL = {"num_mel_bins": 16, "max_source_positions": 16, "suppress_tokens": None, "begin_suppress_tokens": None}
T5 = {**SPECIAL, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
ZAMBA = {
    **SIZES, **SPECIAL, "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 16,
    "mamba_ngroups": 2, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 8, "num_mem_blocks": 1,
    "adapter_rank": 8,
}  # fmt: skip
MAMBA = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8}


class Model(NamedTuple):
    """A class, what its configuration is called if not like it, and what goes into that."""

    kind: str
    config: str
    settings: Mapping[str, Any]
    inputs: str = "text"
    options: Mapping[str, Any] = {}


LOGITS = {"outputs": ["logits"]}  # what the encoder gives is returned too, and would keep its width
CAUSAL = {
    "llama": Model("LlamaForCausalLM", "Llama", GROUPED),
    "mistral": Model("MistralForCausalLM", "Mistral", GROUPED),
    "qwen2": Model("Qwen2ForCausalLM", "Qwen2", GROUPED),
    "qwen3": Model("Qwen3ForCausalLM", "Qwen3", WIDE_HEADS),
    "gemma": Model("GemmaForCausalLM", "Gemma", WIDE_HEADS),
    "gemma2": Model("Gemma2ForCausalLM", "Gemma2", WIDE_HEADS),
    "gemma3": Model("Gemma3ForCausalLM", "Gemma3Text", WIDE_HEADS),
    "phi3": Model("Phi3ForCausalLM", "Phi3", GROUPED),
    "olmo2": Model("Olmo2ForCausalLM", "Olmo2", GROUPED),
    "gpt2": Model("GPT2LMHeadModel", "GPT2", {**GPT, "n_embd": 64}),
    "opt": Model("OPTForCausalLM", "OPT", {**TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt-neox": Model("GPTNeoXForCausalLM", "GPTNeoX", TEXT),
    "bloom": Model("BloomForCausalLM", "Bloom", {**GPT, "hidden_size": 64}),
    "mpt": Model("MptForCausalLM", "Mpt", {**SPECIAL, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "codegen": Model("CodeGenForCausalLM", "CodeGen", {**GPT, "n_embd": 64, "n_head": 8, "rotary_dim": 4}),
    "falcon": Model("FalconForCausalLM", "Falcon", TEXT),
    "recurrentgemma": Model(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemma",
        {**GROUPED, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
    ),
    "mixtral": Model("MixtralForCausalLM", "Mixtral", {**GROUPED, "num_experts_per_tok": 2, "num_local_experts": 4}),
    "qwen3-moe": Model(
        "Qwen3MoeForCausalLM",
        "Qwen3Moe",
        {**WIDE_HEADS, "num_experts_per_tok": 2, "num_experts": 8, "moe_intermediate_size": 48},
    ),
    "zamba2": Model("Zamba2ForCausalLM", "Zamba2", ZAMBA),
    "mamba2": Model("Mamba2ForCausalLM", "Mamba2", {**SPECIAL, "hidden_size": 64, "num_hidden_layers": 2, **MAMBA}),
    "t5": Model("T5ForConditionalGeneration", "T5", T5, "seq2seq", LOGITS),
    "bart": Model("BartForConditionalGeneration", "Bart", SEQ2SEQ, "seq2seq", LOGITS),
    "marian": Model("MarianMTModel", "Marian", SEQ2SEQ, "seq2seq", LOGITS),
    "whisper": Model("WhisperForConditionalGeneration", "Whisper", {**SEQ2SEQ, **MEL}, "mel", LOGITS),
}
OTHERS = {
    "bert": Model("BertForSequenceClassification", "Bert", {**SIZES, "vocab_size": VOCABULARY}),
    "distilbert": Model(
        "DistilBertForSequenceClassification",
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    ),
    "vit": Model("ViTForImageClassification", "ViT", IMAGE, "image"),
    "dinov2": Model("Dinov2ForImageClassification", "Dinov2", IMAGE, "image"),
}
MODELS = CAUSAL | OTHERS


def tokens(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, length))


def made(model: Model) -> tuple[nn.Module, dict[str, Any]]:
    """The model with weights far from their start, and inputs for it."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{model.config}Config")(**model.settings)
    network = getattr(transformers, model.kind)(settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:  # tables of positions are computed, and loaded as such
                parameter.add_(0.1 * torch.randn_like(parameter))
    if model.inputs == "image":
        return network, {"pixel_values": torch.randn(2, 3, 32, 32)}
    if model.inputs == "mel":
        return network, {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": tokens(5)}
    if model.inputs == "seq2seq":
        return network, {"input_ids": tokens(9), "decoder_input_ids": tokens(5)}
    return network, {"input_ids": tokens(9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def outputs(network: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return network(**inputs)["logits"]


def reloaded(network: Any, folder: Any) -> Any:
    network.save_pretrained(folder)
    return type(network).from_pretrained(folder).eval()
