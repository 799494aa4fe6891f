"""Small configurations of the classes of transformers, from the names and the types of their fields.

A configuration is made of its class's own defaults, with numbers of these names made small, in the configurations
inside it too. Where these do not fit together, other values of some names are tried. A class that still does not build
gets a *thorough* one: more names by how they end, lists as long as there are layers, values typed as the annotation
asks, rotary sections that fill the small heads, and what `NEEDED` says that single configurations cannot do without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 99
# The token in place of which an image goes, in thorough configurations; those of text are greater.
IMAGE = 5
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
_VALUES: dict[str, Any] = {name: value for value, names in _SMALL.items() for name in names}


# What is tried where a small configuration does not build or run: values of names that classes tie to others.
OTHERS: tuple[dict[str, Any], ...] = (
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
    return fields - {name for name, meant in getattr(kind, "attribute_map", {}).items() if name != meant}


def configuration(kind: Any, others: dict[str, Any]) -> Any:
    """A small configuration of this class, with small ones inside; `others` go before, None for a class's own value.

    With `thorough` among these, all rules below are followed too.
    """
    others = dict(others)
    thorough = others.pop("thorough", False)
    known = {**_VALUES, **others}
    settings = {name: known[name] for name in known.keys() & _fields(kind) if known[name] is not None}
    if settings.pop("layer_types", None) == "shortened":
        settings |= _shortened(kind, settings)
    if thorough:
        return _thorough(kind, settings, others)
    for name, inside in kind.sub_configs.items():
        if isinstance(inside, type) and hasattr(inside, "sub_configs") and inside.__name__ != "AutoConfig":
            settings[name] = configuration(inside, others).to_dict()
        else:
            default = getattr(kind(), name)
            if default is not None:
                settings[name] = configuration(type(default), others).to_dict()
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


# -- thorough configurations -----------------------------------------------------------------------------------------

# What a number means whose name ends so, if it is none of the above.
_ENDING: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "hash_byte_group_vocab"),
    VOCABULARY - 1: ("blank_token_id",),
    IMAGE: ("image_token_id", "image_token_index", "image_patch_id"),
    IMAGE + 1: ("video_token_id", "video_token_index"),
    IMAGE + 2: ("audio_token_id", "audio_token_index"),
    96: ("ffn_hidden_size", "intermediate_size", "mlp_dim"),
    64: (
        "hidden_size", "hidden_dim", "adapter_in_dim", "adapter_out_dim", "adapter_input_size", "hidden_sizes",
        "embed_dim", "hidden_size_global",
    ),
    48: ("share_expert_dim",),
    128: ("max_seq_len",),
    32: ("base_channels",),
    16: ("num_position_embeddings",),
    8: ("sliding_window",),
    4: ("num_query_tokens", "latent_query_num", "num_attention_heads", "num_key_value_heads", "n_heads"),
    2: ("moe_k", "moe_top_k", "top_k_experts", "kv_n_heads", "depths", "resampler_depth"),
}  # fmt: skip
_ENDS = {end: value for value, ends in _ENDING.items() for end in ends}
THOROUGH: tuple[dict[str, Any], ...] = (
    {"num_key_value_heads": 4},
    {},
    {"num_key_value_heads": 4, "num_hidden_layers": 4},
    {"num_kv_shared_layers": 0},
    {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    {"patch_size": None, "image_size": None},
)
_KINDS_OF_LAYERS = {"layer_types": ["full_attention"], "mlp_layer_types": ["dense", "sparse"]}


def _thorough(kind: Any, settings: dict[str, Any], others: dict[str, Any]) -> Any:
    default = _default(kind)
    annotations = _annotations(kind)
    for name, annotation in annotations.items():
        if name not in settings and name not in others:
            end = next((value for end, value in _ENDS.items() if name.endswith(end)), None)
            if end is not None and "int" in annotation and not name.startswith("use_"):
                settings[name] = end
    for name in settings.keys() & annotations.keys():
        settings[name] = _typed(settings[name], vars(default).get(name), annotations[name])
    settings |= _layers(kind, default, settings, annotations)
    settings |= _rotary(kind, default, settings, annotations)
    for name in annotations:
        if name.endswith("_config"):
            inside = vars(default).get(name)
            spec = getattr(kind, "sub_configs_defaults", {}).get(name)
            given = dict(getattr(spec, "init_kwargs", {}))
            if inside is not None or spec is not None:
                settings[name] = _inside(type(inside), spec, {**others, "thorough": True}, given)
    settings |= NEEDED.get(kind.__name__, {})
    return kind(**settings)


def _inside(kind: Any, spec: Any, others: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A thorough configuration of one inside another, with what the outer one gives it that is no size."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind is type(None):
        kind = (
            CONFIG_MAPPING[spec.model_type]
            if getattr(spec, "model_type", None)
            else getattr(spec, "config_class", spec)
        )
    made = configuration(kind, others).to_dict()
    plain = {name: value for name, value in given.items() if name not in _VALUES and not isinstance(value, dict)}
    return {**made, **{name: value for name, value in plain.items() if not name.endswith(tuple(_ENDS))}}


class _Nothing:
    """Stands for the defaults of a configuration that is none without settings."""


def _default(kind: Any) -> Any:
    """The configuration of a class without settings."""
    try:
        return kind()
    except Exception:  # a class may raise anything where it is none without settings
        return _Nothing()


def _annotations(kind: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= {name: str(hint) for name, hint in vars(base).get("__annotations__", {}).items()}
    return {name: hint for name, hint in found.items() if name in _fields(kind)}


def _typed(value: Any, default: Any, annotation: str) -> Any:
    """A number as the list that a field asks for: with as many numbers as by default, and this as the largest."""
    if type(value) is not int or re.search(r"(^|\| )int( \||$)|<class 'int'>", annotation):
        return value
    if isinstance(default, (list, tuple)) and default and all(type(item) is int for item in default):
        if len(set(default)) > 1:
            return [max(1, item * value // max(default)) for item in default]
        return [value] * len(default)
    return [value, value] if "list[int]" in annotation else value


def _layers(kind: Any, default: Any, settings: dict[str, Any], annotations: Mapping[str, str]) -> dict[str, Any]:
    """Lists with an entry for each layer, with one of each kind first."""
    counts = [name for name in ("num_hidden_layers", "num_layers", "n_layer") if name in annotations]
    if not counts:
        return {}
    count, whole = settings.get(counts[0], 2), vars(default).get(counts[0])
    lists: dict[str, Any] = {}
    for name in annotations:
        found = vars(default).get(name)
        if isinstance(found, (list, tuple)) and len(found) == whole and name not in settings:
            distinct = list(dict.fromkeys(found)) if all(isinstance(item, str) for item in found) else []
            lists[name] = (distinct + list(found))[:count]
        elif found is None and name in _KINDS_OF_LAYERS:
            lists[name] = (_KINDS_OF_LAYERS[name] * count)[:count]
    return lists


def _rotary(kind: Any, default: Any, settings: dict[str, Any], annotations: Mapping[str, str]) -> dict[str, Any]:
    """Rotary parameters where they have parts for axes of an image, which fill half a head, or differ by layer type."""
    if "rope_parameters" not in annotations:
        return {}
    found = vars(default).get("rope_parameters") or {}
    if annotations["rope_parameters"].startswith("dict[str, ") and "RopeParameters" in annotations["rope_parameters"]:
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        return {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), plain)}
    ignored = getattr(kind, "ignore_keys_at_rope_validation", ())
    if "mrope_section" not in {*ignored, *found} or found.get("rope_type") == "axial":
        return {}
    size = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    half = int(size * found.get("partial_rotary_factor", 1.0)) // 2
    side = 3 * half // 8
    return {"rope_parameters": {"rope_theta": 10000.0, **found, "mrope_section": [side, side, half - 2 * side]}}


# What single configurations cannot do without, by their class: no rule gives it.
_VOCABULARY_MAP = {"<image>": IMAGE, "<|extra_200|>": IMAGE + 1, "IMGIMGA": 10, "IMGIMGB": 11}
NEEDED: dict[str, dict[str, Any]] = {
    "ChameleonConfig": {"vocabulary_map": _VOCABULARY_MAP},
    "Emu3Config": {"vocabulary_map": _VOCABULARY_MAP},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ReformerConfig": {
        "is_decoder": True, "hash_seed": 0, "axial_pos_shape": [4, 2], "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "attention_head_size": 16,
        "hidden_size": 64, "feed_forward_size": 96, "max_position_embeddings": 8,
    },
    "XmodConfig": {"default_language": "en_XX", "is_decoder": True},
    "ZambaConfig": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "num_hidden_layers": 3,
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
    },
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 2 * IMAGE},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 2 * IMAGE},
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [64, 64], "mlp_dim": 96, "global_attn_indexes": [1]},
    "Dots3NoteTextConfig": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
        "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    },
    "ParakeetEncoderConfig": {"projection_hidden_size": 64, "projection_bias": False},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0},
    "Molmo2AdapterConfig": {"vision_feature_layer": [0, 1]},
    "PerceptionLMConfig": {
        "vision_config": {
            "model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224",
            "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8},
        }
    },
    "FastVlmConfig": {
        "vision_config": {"model_type": "timm_wrapper", "architecture": "fastvit_t8", "hidden_size": 768},
    },
}  # fmt: skip
