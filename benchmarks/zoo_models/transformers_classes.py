"""Every causal, encoder-decoder and vision-language class of the installed transformers, from a small configuration.

A configuration is made of its class's own defaults, with numbers of these names made small, in the configurations
inside it too. Where these do not fit together, other values of some names are tried, and other inputs. What does not
build or run so either is written down as such; nothing is done by hand for one class.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo_models.entry import Entry

VOCABULARY = 99
_LARGEST = 20_000_000  # entries of the parameters of a small model
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
    16: (
        "head_dim", "d_kv", "kv_channels", "attention_head_size", "state_size", "mamba_d_state", "rotary_dim",
        "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim",
    ),
    8: ("chunk_size", "mamba_chunk_size", "patch_size"),
    32: ("image_size", "kv_lora_rank", "q_lora_rank"),
    128: ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "seq_length"),
    0: ("pad_token_id", "first_k_dense_replace"),
    1: ("bos_token_id", "decoder_start_token_id", "n_shared_experts", "n_group", "topk_group"),
    3: ("eos_token_id",),
}  # fmt: skip
_VALUES = {name: value for value, names in _SMALL.items() for name in names}


# What is tried where a small configuration does not build or run: values of names that classes tie to others.
_OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_heads": 8},
    {"num_experts_per_tok": 1, "moe_topk": 1, "top_k": 1},
    {"num_attention_heads": 16},
    {"head_dim": None},
    {"patch_size": None, "image_size": None},
    {"is_decoder": True},
    {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    {"layer_types": "shortened"},
    {"layer_types": "shortened", "num_hidden_layers": 4, "num_layers": 4},
    {"num_hidden_layers": None, "num_layers": None},
)
_LISTS_OF_LAYERS = ("layer_types", "layers_block_type", "attention_types", "attention_layers", "mlp_layer_types")


def _fields(kind: Any) -> set[str]:
    fields: set[str] = set()
    for base in kind.__mro__:
        fields |= set(vars(base).get("__annotations__", ()))
    return fields - set(getattr(kind, "attribute_map", {}))


def _configuration(kind: Any, others: dict[str, Any]) -> Any:
    """A small configuration of this class, with small ones inside; `others` go before, None for a class's own value."""
    known = {**_VALUES, **others}
    settings = {name: known[name] for name in known.keys() & _fields(kind) if known[name] is not None}
    if settings.pop("layer_types", None) == "shortened":
        settings |= _shortened(kind, settings)
    for name, inside in kind.sub_configs.items():
        if isinstance(inside, type) and hasattr(inside, "sub_configs") and inside.__name__ != "AutoConfig":
            settings[name] = _configuration(inside, others).to_dict()
        else:
            default = getattr(kind(), name)
            if default is not None:
                settings[name] = _configuration(type(default), others).to_dict()
    rotary = getattr(kind(), "rope_parameters", None) if "rope_parameters" in _fields(kind) else None
    if isinstance(rotary, dict) and "mrope_section" in rotary:  # parts of half a head
        settings["rope_parameters"] = {**rotary, "mrope_section": [2, 3, 3]}
    return kind(**settings)


def _shortened(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Lists that say something of each layer, with one entry of each kind first, for as few layers as there are."""
    default = kind()
    count = settings.get("num_hidden_layers", settings.get("num_layers", 2))
    lists: dict[str, Any] = {}
    for name in _LISTS_OF_LAYERS:
        whole = getattr(default, name, None)
        if isinstance(whole, list) and whole and all(isinstance(item, str) for item in whole):
            distinct = list(dict.fromkeys(whole))
            lists[name] = (distinct + whole)[:count]
    return lists


def _inputs(model: Any, seq2seq: bool) -> list[dict[str, Any]]:
    """Text for a model, alone, without a cache, and with an image."""
    ids = torch.randint(4, VOCABULARY - 1, (2, 8))
    text: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder or seq2seq:
        text["decoder_input_ids"] = torch.randint(4, VOCABULARY - 1, (2, 6))
    image = {"pixel_values": torch.randn(2, 3, 32, 32)}
    return [text, {**text, "use_cache": False}, {**text, **image}, image]


def make(kind: str, model_type: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model with random weights, and text for it.

    Raises:
        Exception: what the class raised on the first configuration, if it builds from none or runs on no input.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, name)
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    first: Exception | None = None
    built: tuple[nn.Module, dict[str, Any]] | None = None
    for others in _OTHERS:
        try:
            config = _configuration(config_class, others)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            if size > _LARGEST:
                continue
            model = model_class(config).eval()
        except Exception as error:  # a class may raise anything on settings that do not fit
            first = first or error
            continue
        for inputs in _inputs(model, kind == "seq2seq"):
            built = built or (model, inputs)
            try:
                with torch.no_grad():
                    model(**inputs)
            except Exception as error:  # a forward may raise anything on inputs that it does not take
                first = first or error
            else:
                return model, inputs
    if built is not None:
        return built
    raise first or ValueError(f"small configurations give more than {_LARGEST:,} parameters")


def entries() -> list[Entry]:
    """All of them, each class once."""
    from transformers.models.auto import modeling_auto

    found: dict[str, Entry] = {}
    for kind, listed in _LISTS.items():
        for model_type, names in getattr(modeling_auto, listed).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, Entry(kind, name, partial(make, kind, model_type, name)))
    return list(found.values())
