"""Every causal, encoder-decoder and vision-language class of the installed transformers, from a small configuration.

A configuration is made of its class's own defaults, with numbers of these names made small, in the configurations
inside it too. What does not build or run so is written down as such; nothing is done by hand for one class.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from zoo_models.entry import Entry

VOCABULARY = 99
_LISTS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
# What a number of this name means, wherever it stands.
_SMALL: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "decoder_vocab_size", "text_vocab_size"),
    64: (
        "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "attention_hidden_size", "embedding_size",
        "word_embed_proj_dim", "projection_dim", "out_hidden_size", "encoder_hidden_size", "lru_width",
    ),
    96: (
        "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
        "mlp_dim", "feed_forward_size", "ffn_hidden_dim",
    ),
    48: ("moe_intermediate_size", "shared_expert_intermediate_size"),
    2: (
        "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth",
        "num_decoder_layers", "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "n_groups", "top_k",
        "mamba_n_groups", "num_attention_groups", "moe_topk", "num_encoder_layers",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_encoder_attention_heads",
        "num_decoder_attention_heads",
    ),
    16: ("head_dim", "d_kv", "kv_channels", "attention_head_size", "state_size", "mamba_d_state", "rotary_dim"),
    8: ("chunk_size", "mamba_chunk_size", "patch_size"),
    32: ("image_size", "kv_lora_rank", "q_lora_rank"),
    128: ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "seq_length"),
    0: ("pad_token_id", "first_k_dense_replace"),
    1: ("bos_token_id", "decoder_start_token_id", "n_shared_experts", "n_group", "topk_group"),
    3: ("eos_token_id",),
}  # fmt: skip
_VALUES = {name: value for value, names in _SMALL.items() for name in names}


def _configuration(kind: Any) -> Any:
    """A small configuration of this class, with small ones inside."""
    fields: set[str] = set()
    for base in kind.__mro__:
        fields |= set(vars(base).get("__annotations__", ()))
    settings: dict[str, Any] = {name: value for name, value in _VALUES.items() if name in fields}
    aliases = set(getattr(kind, "attribute_map", {}))
    settings = {name: value for name, value in settings.items() if name not in aliases}
    for name, inside in kind.sub_configs.items():
        if isinstance(inside, type) and hasattr(inside, "sub_configs") and inside.__name__ != "AutoConfig":
            settings[name] = _configuration(inside).to_dict()
        else:
            default = getattr(kind(), name)
            if default is not None:
                settings[name] = _configuration(type(default)).to_dict()
    return kind(**settings)


def make(kind: str, model_type: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model with random weights, and text for it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, name)
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    model = model_class(_configuration(config_class))
    ids = torch.randint(4, VOCABULARY - 1, (2, 8))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder or kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.randint(4, VOCABULARY - 1, (2, 6))
    return model, inputs


def entries() -> list[Entry]:
    """All of them, each class once."""
    from transformers.models.auto import modeling_auto

    found: dict[str, Entry] = {}
    for kind, listed in _LISTS.items():
        for model_type, names in getattr(modeling_auto, listed).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, Entry(kind, name, partial(make, kind, model_type, name)))
    return list(found.values())
