"""Pruned language models for vLLM and llama.cpp: whether their shapes are accepted, and GGUF files read back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor, nn

from structprune.checking import MODEL, PATH, one_of, require, whole
from structprune.errors import ExportError
from structprune.extras import require as required
from structprune.files import drafts_in, put, target_of

Server: TypeAlias = Literal["vllm", "llama.cpp"]
SERVERS: tuple[Server, ...] = ("vllm", "llama.cpp")
# Head sizes that the CPU backend of vLLM has kernels for (vllm/v1/attention/backends/cpu_attn.py).
VLLM_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
# vLLM's FlashAttention takes multiples of 8 up to 256 (flash_attn.py), its Triton kernels 32 and more (triton_attn.py).
VLLM_STEP, VLLM_MOST, VLLM_LEAST = 8, 256, 32
# Numbers that share a scale: of Q4_0 and Q8_0, and of the k-quants (QK8_0 and QK_K in ggml-common.h).
BLOCK, SUPER_BLOCK = 32, 256
WEIGHTS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
# How far numbers read back may be off, as a share of the largest of their block: half a step of 10, 127 and 8 levels.
_OFF = {"f32": 0.0, "f16": 2**-10, "q8_0": 0.51 / 127 + 2**-10, "q4_0": 1.01 / 8 + 2**-10}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Objection:
    """Why a program does not take a model, or not in full. See `structprune.serving_objections` for an example.

    Attributes:
        server: The program.
        refused: Whether it does not load or run the model at all; else it is slower, or some of its options are closed.
        reason: What is asked, what the model has, and what to plan.
    """

    server: Server
    refused: bool
    reason: str


@dataclass(frozen=True)
class _Shapes:
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int

    @classmethod
    def of(cls, config: Any) -> _Shapes:
        names = ("hidden_size", "num_attention_heads", "intermediate_size")
        numbers = [getattr(config, name, None) for name in names]
        if not all(isinstance(value, int) and value > 0 for value in numbers):
            lacking = [name for name, value in zip(names, numbers, strict=True) if not isinstance(value, int)]
            raise ExportError(
                f"the configuration does not say {', '.join(lacking) or names} as one number for all layers; plan with "
                "uniform widths (structprune.plan(..., uniform=...))"
            )
        hidden, heads, mlp = (int(value) for value in numbers if value is not None)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return cls(hidden, heads, kv_heads, int(getattr(config, "head_dim", None) or hidden // heads), mlp)


def serving_objections(
    model: nn.Module, server: Server | None = None, *, tensor_parallel: int = 1
) -> tuple[Objection, ...]:
    """What vLLM and llama.cpp have against the shapes of a decoder of transformers, with reasons.

    What is asked was taken from their sources: vLLM's ``supports_head_size`` of each attention backend and the
    assertions of its models on heads and devices; llama.cpp's ``load_hparams``, its block sizes, and those of its
    caches of keys and values. Neither is run here: that there is no objection is no proof that a build takes the model.

    Args:
        model: A decoder whose configuration says its widths, such as ``LlamaForCausalLM``.
        server: ``"vllm"`` or ``"llama.cpp"``; both if not given.
        tensor_parallel: Devices among which vLLM divides each layer.

    Returns:
        What they refuse, and what they take but not with all kernels; empty if all is well.

    Raises:
        ExportError: The model has no such configuration, or it does not say the widths of the layers there are.

    Example:
        >>> from types import SimpleNamespace
        >>> model = nn.Linear(1, 1)
        >>> sizes = dict(hidden_size=96, num_attention_heads=3, num_key_value_heads=2, intermediate_size=100)
        >>> model.config = SimpleNamespace(**sizes)
        >>> [each.refused for each in serving_objections(model, "llama.cpp")][0]
        True
    """
    require(locals(), ExportError, model=MODEL, server=one_of(SERVERS).or_none, tensor_parallel=whole(1))
    shapes = _Shapes.of(_config(model))
    _check_layers(model, shapes)
    raised: list[Objection] = []
    for name in SERVERS if server is None else (server,):
        raised += _both(name, shapes)
        raised += _vllm(shapes, tensor_parallel) if name == "vllm" else _llama_cpp(shapes)
    return tuple(raised)


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise ExportError(f"{type(model).__name__} has no configuration; give a decoder of transformers")
    return config


def _check_layers(model: nn.Module, shapes: _Shapes) -> None:
    """That the layers have the widths that the configuration says: servers build them from it."""
    wanted = {
        "q_proj": (shapes.heads * shapes.head_size, shapes.hidden),
        "k_proj": (shapes.kv_heads * shapes.head_size, shapes.hidden),
        "v_proj": (shapes.kv_heads * shapes.head_size, shapes.hidden),
        "o_proj": (shapes.hidden, shapes.heads * shapes.head_size),
        "up_proj": (shapes.mlp, shapes.hidden),
        "gate_proj": (shapes.mlp, shapes.hidden),
        "down_proj": (shapes.hidden, shapes.mlp),
    }
    for path, module in model.named_modules():
        kind = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and kind in wanted and tuple(module.weight.shape) != wanted[kind]:
            raise ExportError(
                f"{path} has the shape {list(module.weight.shape)}, and the configuration says {list(wanted[kind])}; "
                "servers build one width for all layers: plan with uniform widths (structprune.plan(..., uniform=...))"
            )


def _both(server: Server, shapes: _Shapes) -> Iterator[Objection]:
    if shapes.heads % shapes.kv_heads:
        yield Objection(
            server,
            True,
            f"{shapes.heads} query heads cannot be shared evenly by {shapes.kv_heads} key-value heads; plan a multiple",
        )
    if shapes.head_size % 2:
        yield Objection(server, True, f"rotary positions turn pairs, and a head has {shapes.head_size} numbers")


def _vllm(shapes: _Shapes, devices: int) -> Iterator[Objection]:
    size = shapes.head_size
    flash = size % VLLM_STEP == 0 and size <= VLLM_MOST
    if not flash and size < VLLM_LEAST:
        yield Objection(
            "vllm",
            True,
            f"a head has {size} numbers: FlashAttention takes multiples of {VLLM_STEP} up to {VLLM_MOST}, the Triton "
            f"kernels {VLLM_LEAST} and more",
        )
    elif not flash:
        yield Objection("vllm", False, f"heads of {size} run by the Triton kernels, not by FlashAttention")
    if size not in VLLM_CPU_HEADS:
        known = ", ".join(map(str, VLLM_CPU_HEADS))
        yield Objection("vllm", False, f"heads of {size} do not run on the CPU, which takes {known}")
    for name, number in (("query heads", shapes.heads), ("width of the MLP", shapes.mlp)):
        if number % devices:
            yield Objection("vllm", True, f"{number} ({name}) cannot be divided among {devices} devices")
    more, fewer = max(shapes.kv_heads, devices), min(shapes.kv_heads, devices)
    if more % fewer:
        yield Objection(
            "vllm", True, f"{shapes.kv_heads} key-value heads and {devices} devices: neither divides the other"
        )


def _llama_cpp(shapes: _Shapes) -> Iterator[Objection]:
    rows = {"hidden_size": shapes.hidden, "heads x head size": shapes.heads * shapes.head_size, "MLP": shapes.mlp}
    for name, length in rows.items():
        if length % BLOCK:
            yield Objection(
                "llama.cpp", False, f"rows of {length} ({name}) are no multiple of {BLOCK} and stay in 16 bits"
            )
        elif length % SUPER_BLOCK:
            yield Objection(
                "llama.cpp",
                False,
                f"rows of {length} ({name}) are no multiple of {SUPER_BLOCK}: k-quants fall back to blocks of {BLOCK}",
            )
    if shapes.head_size % BLOCK:
        yield Objection(
            "llama.cpp", False, f"heads of {shapes.head_size} are no multiple of {BLOCK}: no quantised cache of keys"
        )


# -- GGUF -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file that was read back. See `structprune.export_gguf` for an example.

    Attributes:
        path: The file.
        bytes: Its size.
        tensors: How many tensors it holds.
        quantized: How many of them are quantised.
        max_relative_error: Largest difference of a number read back, as a share of the largest of its tensor.
    """

    path: Path
    bytes: int
    tensors: int
    quantized: int
    max_relative_error: float


def export_gguf(
    model: nn.Module, path: str | os.PathLike[str], *, weights: Literal["f32", "f16", "q8_0", "q4_0"] = "f16"
) -> GgufExport:
    """Write a pruned Llama as a GGUF file for llama.cpp, and compare every tensor that is read back with the model's.

    The names and the order of query and key channels are those of llama.cpp's own converter. The tokenizer, which
    pruning leaves as it was, is not written: take it from the GGUF file of the original model, or use the file with
    token ids. llama.cpp itself is not run.

    Args:
        model: A ``LlamaForCausalLM`` of uniform widths (`structprune.serving_objections` says what else it takes).
        path: Where the ``.gguf`` file goes; its folder must exist.
        weights: The type of matrices. ``"q8_0"`` and ``"q4_0"`` have blocks of 32 with one scale; matrices whose rows
            are no multiple of that stay ``"f16"``. Norms stay ``"f32"``.

    Returns:
        The path, the size, what was quantised, and the largest difference.

    Raises:
        MissingExtraError: gguf is not installed.
        ExportError: The model is no Llama, has biases or scaled rotary positions, llama.cpp would refuse its shapes, or
            a tensor is read back otherwise.

    Example::

        slim = structprune.prune(llama, {"input_ids": ids}, ratio=0.25)
        structprune.export_gguf(slim, "slim.gguf", weights="q8_0")
    """
    require(locals(), ExportError, model=MODEL, path=PATH, weights=one_of(WEIGHTS))
    gguf = required("gguf", "GGUF", "gguf")
    config = _config(model)
    if getattr(config, "model_type", None) != "llama":
        raise ExportError(f"{type(model).__name__} is no Llama; other architectures have names and orders of their own")
    refused = [each.reason for each in serving_objections(model, "llama.cpp") if each.refused]
    if refused:
        raise ExportError(f"llama.cpp does not take {type(model).__name__}: {'; '.join(refused)}")
    shapes, rope = _Shapes.of(config), _rope(config)
    matrices = _named(model, shapes)
    try:
        target = target_of(Path(path))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}") from error
    with drafts_in(target.parent) as folder:
        draft = folder / target.name
        writer = gguf.GGUFWriter(str(draft), "llama")
        _head(writer, config, shapes, rope)
        kinds = {name: _kind(array, weights) for name, array in matrices.items()}
        for name, array in matrices.items():
            kind = gguf.GGMLQuantizationType[WEIGHTS[kinds[name]]]
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        worst = _read_back(gguf, draft, matrices, kinds)
        size = draft.stat().st_size
        put(draft, target)
    quantized = sum(kind.startswith("q") for kind in kinds.values())
    return GgufExport(Path(path), size, len(matrices), quantized, worst)


def _rope(config: Any) -> float:
    """The base of rotary positions, which transformers has kept under two names."""
    parameters = getattr(config, "rope_parameters", None) or {}
    scaling = getattr(config, "rope_scaling", None) or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ExportError(f"rotary positions are scaled ({kind}); only plain ones are written")
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def _head(writer: Any, config: Any, shapes: _Shapes, rope: float) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shapes.hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(shapes.mlp)
    writer.add_head_count(shapes.heads)
    writer.add_head_count_kv(shapes.kv_heads)
    # A pruned model's heads need no longer be hidden size / heads wide, which is what llama.cpp assumes.
    writer.add_key_length(shapes.head_size)
    writer.add_value_length(shapes.head_size)
    writer.add_rope_dimension_count(shapes.head_size)
    writer.add_rope_freq_base(rope)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _named(model: nn.Module, shapes: _Shapes) -> dict[str, Any]:
    """Every parameter under its name in a GGUF file, as float32, in the order of channels that llama.cpp asks for."""
    tensors: dict[str, Any] = {}
    # A head that is tied to the embedding is one parameter, and llama.cpp takes the embedding where there is no head.
    for path, parameter in model.named_parameters():
        layer, _, kind = path.rpartition(".")
        name = _OUTSIDE.get(layer)
        if layer.startswith("model.layers."):
            number, _, rest = layer.removeprefix("model.layers.").partition(".")
            name = f"blk.{number}.{_LAYER[rest]}" if rest in _LAYER else None
        if name is None or kind != "weight":
            raise ExportError(f"{path} has no place in a GGUF file of a Llama; take it out of the model")
        tensor = parameter.detach().float().cpu()
        if rest_heads := {"attn_q": shapes.heads, "attn_k": shapes.kv_heads}.get(name.rpartition(".")[2]):
            tensor = _interleaved(tensor, rest_heads)
        tensors[f"{name}.weight"] = tensor.numpy()
    return tensors


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head so that the two numbers that rotary positions turn together lie side by side.

    transformers keeps them half a head apart: of a head of 4, rows 0 1 2 3 become 0 2 1 3.

    Example:
        >>> import torch
        >>> _interleaved(torch.arange(4.0)[:, None], 1).flatten().tolist()
        [0.0, 2.0, 1.0, 3.0]
    """
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _kind(array: Any, weights: str) -> str:
    if array.ndim == 1:
        return "f32"
    return "f16" if weights.startswith("q") and array.shape[-1] % BLOCK else weights


def _read_back(gguf: Any, file: Path, wanted: Mapping[str, Any], kinds: Mapping[str, str]) -> float:
    """The largest relative difference of a tensor in the file.

    Raises:
        ExportError: a tensor is missing, of another shape, or further off than its type explains.
    """
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    if held.keys() != wanted.keys():
        raise ExportError(f"the GGUF file holds other tensors than were written: {sorted(held.keys() ^ wanted.keys())}")
    worst = 0.0
    for name, array in wanted.items():
        read = gguf.quants.dequantize(held[name].data, held[name].tensor_type).reshape(array.shape)
        blocks = (BLOCK,) if kinds[name].startswith("q") else (1,)
        off = np.abs(read - array).reshape(-1, *blocks).max(1)
        # Numbers too small for 16 bits are read back as zero.
        limit = _OFF[kinds[name]] * np.abs(array).reshape(-1, *blocks).max(1) + (kinds[name] != "f32") * 2.0**-24
        if not (off <= limit).all():
            raise ExportError(f"{name} is read back otherwise than it was written, by up to {float(off.max()):.3g}")
        worst = max(worst, float(off.max()) / max(float(np.abs(array).max()), 1e-30))
    return worst
