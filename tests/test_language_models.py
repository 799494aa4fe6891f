"""What vLLM and llama.cpp have against a pruned decoder, and GGUF files read back tensor by tensor."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import structprune
from structprune.errors import ExportError, MissingExtraError
from structprune.export.language_models import _interleaved

needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="the extra gguf is not installed here")


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


IDS = {"input_ids": torch.arange(10)[None], "use_cache": False}


@pytest.fixture(scope="module")
def slim():
    return structprune.prune(llama(), IDS, ratio=0.25, axes=("mlp",))


# -- objections ---------------------------------------------------------------------------------------------------


def configured(**sizes):
    model = nn.Linear(1, 1)
    whole = {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 14336,
    }  # fmt: skip
    model.config = SimpleNamespace(**(whole | sizes))
    return model


def test_nothing_is_said_against_llama_3():
    assert structprune.serving_objections(configured()) == ()
    assert structprune.serving_objections(configured(), tensor_parallel=16) == ()  # key-value heads are repeated


@pytest.mark.parametrize(
    ("server", "sizes", "refused", "reason"),
    [
        ("vllm", {"num_attention_heads": 30, "hidden_size": 3840}, True, "30 query heads cannot be shared evenly by 8"),
        ("llama.cpp", {"num_attention_heads": 30}, True, "30 query heads cannot be shared evenly by 8"),
        ("vllm", {"head_dim": 63}, True, "rotary positions turn pairs"),
        ("vllm", {"head_dim": 20}, True, "a head has 20 numbers: FlashAttention takes multiples of 8"),
        ("vllm", {"head_dim": 100}, False, "heads of 100 run by the Triton kernels"),
        ("vllm", {"head_dim": 104}, False, "heads of 104 do not run on the CPU"),
        ("llama.cpp", {"intermediate_size": 14330}, False, "rows of 14330 .* stay in 16 bits"),
        ("llama.cpp", {"intermediate_size": 14368}, False, "rows of 14368 .* fall back to blocks of 32"),
        ("llama.cpp", {"head_dim": 120}, False, "heads of 120 .* no quantised cache of keys"),
    ],
)
def test_shapes_that_are_objected_to(server, sizes, refused, reason):
    found = structprune.serving_objections(configured(**sizes), server)
    (hit,) = [each for each in found if re.search(reason, each.reason)]
    assert (hit.server, hit.refused) == (server, refused)


@pytest.mark.parametrize(
    ("sizes", "devices", "reason"),
    [
        ({"num_attention_heads": 24}, 16, "24 (query heads) cannot be divided among 16"),
        ({"intermediate_size": 14334}, 4, "14334 (width of the MLP) cannot be divided among 4"),
        ({"num_key_value_heads": 8}, 12, "8 key-value heads and 12 devices"),
    ],
)
def test_devices_that_do_not_divide_it(sizes, devices, reason):
    found = structprune.serving_objections(configured(**sizes), "vllm", tensor_parallel=devices)
    assert any(each.refused and each.reason.startswith(reason) for each in found)


def test_a_pruned_llama_is_looked_at_as_it_is(slim):
    reasons = [each.reason for each in structprune.serving_objections(slim, "llama.cpp")]
    assert any("rows of 96 (MLP)" in reason for reason in reasons)
    uneven = structprune.prune(
        llama(), IDS, ratio={f"model.layers.0.mlp.{name}_proj": 0.5 for name in ("up", "gate")}, uniform=False
    )
    with pytest.raises(ExportError, match="servers build one width for all layers"):
        structprune.serving_objections(uneven)
    with pytest.raises(ExportError, match="Linear has no configuration"):
        structprune.serving_objections(nn.Linear(2, 2))
    with pytest.raises(ExportError, match="does not say intermediate_size as one number"):
        structprune.serving_objections(configured(intermediate_size=[3, 4]))


# -- GGUF ----------------------------------------------------------------------------------------------------------


def turned(x, angles, pairs):
    """Rotary positions on heads of shape ``(tokens, size)``; `pairs` are the two numbers that are turned together."""
    first, second = pairs
    out = x.clone()
    out[:, first] = x[:, first] * angles.cos() - x[:, second] * angles.sin()
    out[:, second] = x[:, first] * angles.sin() + x[:, second] * angles.cos()
    return out


def test_the_order_of_channels_makes_both_kinds_of_rotary_positions_agree():
    """Half a head apart in transformers, side by side in llama.cpp: products of queries and keys are the same."""
    size, x = 8, torch.randn(5, 6)
    angles = torch.arange(5.0)[:, None] * 0.3 ** torch.arange(size // 2)
    query, key = torch.randn(2, size, 6)
    half = torch.arange(size // 2)
    apart = [turned(x @ w.T, angles, (half, half + size // 2)) for w in (query, key)]
    beside = [turned(x @ _interleaved(w, 1).T, angles, (2 * half, 2 * half + 1)) for w in (query, key)]
    torch.testing.assert_close(apart[0] @ apart[1].T, beside[0] @ beside[1].T)


def test_gguf_is_an_extra(monkeypatch, slim, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'structprune\[gguf\]'"):
        structprune.export_gguf(slim, tmp_path / "m.gguf")


@needs_gguf
@pytest.mark.parametrize(
    ("weights", "most", "quantized"), [("f32", 0, 0), ("f16", 1e-3, 0), ("q8_0", 0.01, 16), ("q4_0", 0.15, 16)]
)
def test_what_is_read_back_is_the_pruned_model(slim, tmp_path, weights, most, quantized):
    import gguf

    found = structprune.export_gguf(slim, tmp_path / "m.gguf", weights=weights)
    assert (found.tensors, found.quantized) == (len(list(slim.parameters())), quantized)
    assert found.bytes == (tmp_path / "m.gguf").stat().st_size
    assert (found.max_relative_error > 0) == (weights != "f32")
    assert found.max_relative_error <= most
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    said = {name: reader.fields[f"llama.{name}"].contents() for name in ("feed_forward_length", "attention.key_length")}
    assert said == {"feed_forward_length": 96, "attention.key_length": 16}
    held = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    # By hand: of each head of 16, rows 0, 2, 4 ... are its first half.
    query = slim.model.layers[1].self_attn.q_proj.weight.detach().numpy().reshape(4, 16, 64)
    for head, rows in zip(query, held["blk.1.attn_q.weight"].reshape(4, 16, 64), strict=True):
        np.testing.assert_allclose(rows[0::2], head[:8], atol=0.15 * np.abs(head).max() if most else 0)
        np.testing.assert_allclose(rows[1::2], head[8:], atol=0.15 * np.abs(head).max() if most else 0)


@needs_gguf
def test_a_tied_head_is_the_embedding_and_narrow_rows_stay_in_16_bits(tmp_path):
    model = llama(tie_word_embeddings=True, intermediate_size=100)
    found = structprune.export_gguf(model, tmp_path / "m.gguf", weights="q4_0")
    assert found.tensors == len(list(model.parameters()))
    assert found.quantized == 1 + 2 * 6  # the rows of down_proj are 100 long


@needs_gguf
def test_a_file_that_is_read_back_otherwise_is_not_written(slim, tmp_path, monkeypatch):
    import gguf

    dequantize = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: dequantize(data, kind) * 1.5)
    with pytest.raises(ExportError, match="is read back otherwise"):
        structprune.export_gguf(slim, tmp_path / "m.gguf", weights="q8_0")
    assert list(tmp_path.iterdir()) == []


@needs_gguf
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "has no place in a GGUF file"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rotary positions are scaled"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        structprune.export_gguf(llama(**changes), tmp_path / "m.gguf")
    other = llama()
    other.config.model_type = "other"
    with pytest.raises(ExportError, match="is no Llama"):
        structprune.export_gguf(other, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []
