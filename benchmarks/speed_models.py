"""The models of ``tool_speed.py``: how each is built, on which inputs, and what makes its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any, list[str]]

LLAMA_70B = "llama-3-70b on meta"


def _torchvision(name: str, head: str) -> Built:
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224), [head]


def _bert_base() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig()).eval()
    return model, {"input_ids": torch.randint(0, 30000, (1, 32))}, ["classifier"]


def _llama(**settings: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def _llama_32() -> Built:
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 32, "vocab_size": 1000}
    # The cache would be among the outputs, which the peer cannot follow.
    model = _llama(**sizes, num_attention_heads=8, num_key_value_heads=8, use_cache=False)
    return model, {"input_ids": torch.randint(0, 1000, (1, 16))}, ["lm_head"]


def llama_70b() -> Built:
    """Llama 3 with 70 billion parameters, without storage."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    with torch.device("meta"):
        model = _llama(**sizes, num_attention_heads=64, num_key_value_heads=8)
        ids = torch.zeros(1, 16, dtype=torch.long)
    return model, {"input_ids": ids}, ["lm_head"]


def chain(depth: int) -> Built:
    """Convolutions of 8 to 16 channels, each with a ReLU, one after the other."""
    layers: list[nn.Module] = []
    width = 3
    for position in range(depth):
        layers += [nn.Conv2d(width, 8 + position % 9, 3, padding=1), nn.ReLU()]
        width = 8 + position % 9
    return nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8), [str(2 * (depth - 1))]


CHAINS = {f"chain of {depth}": depth for depth in (100, 1000, 5000)}

MODELS: dict[str, Callable[[], Built]] = {
    "resnet18": lambda: _torchvision("resnet18", "fc"),
    "resnet50": lambda: _torchvision("resnet50", "fc"),
    "mobilenet_v2": lambda: _torchvision("mobilenet_v2", "classifier.1"),
    "shufflenet_v2_x1_0": lambda: _torchvision("shufflenet_v2_x1_0", "fc"),
    "densenet121": lambda: _torchvision("densenet121", "classifier"),
    "densenet201": lambda: _torchvision("densenet201", "classifier"),
    "vit_b_16": lambda: _torchvision("vit_b_16", "heads.head"),
    "swin_t": lambda: _torchvision("swin_t", "head"),
    "bert-base": _bert_base,
    "llama of 32 layers": _llama_32,
    **{name: (lambda depth=depth: chain(depth)) for name, depth in CHAINS.items()},
    LLAMA_70B: llama_70b,
}
