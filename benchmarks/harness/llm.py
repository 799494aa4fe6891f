"""A Llama of 5.9 M parameters, as `benchmarks/train_llm.py` trains it on text that the small one writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from support.torchvision_shim import make_torchvision_importable
from torch import nn

from harness import ROOT, stories
from harness.training import half_is_fast
from structprune.training import finetune

CACHE = ROOT / "benchmarks" / ".cache"
WEIGHTS = CACHE / "llm.safetensors"
TEXT = CACHE / "llm_text"
STATE = CACHE / "llm_training.pt"
LOG = ROOT / "benchmarks" / "results" / "train_llm.json"
CONFIG = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def build(**changes: Any) -> nn.Module:
    """Transformers' Llama: width 256, 8 layers of 8 heads, of which two share keys and values; not trained."""
    make_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(CONFIG | changes)))


def load_llm(path: Path = WEIGHTS, biases: bool = False, tied: bool = True) -> nn.Module:
    """The trained network, in eval mode.

    Args:
        path: of its weights.
        biases: whether all linear layers in the blocks have one, of zero.
        tied: whether the embedding is the last layer too, or that one a copy of it.

    Raises:
        FileNotFoundError: it has not been trained on this machine; the message says how to.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here. Run python benchmarks/train_llm.py first (20 minutes).")
    model: Any = build(attention_bias=biases, mlp_bias=biases, tie_word_embeddings=tied)
    absent, unknown = model.load_state_dict(load_file(path), strict=False)
    if unknown or any(not name.endswith((".bias", "lm_head.weight")) for name in absent):
        raise ValueError(f"{path} is of another network: {[*absent, *unknown][:3]}. Train it again.")
    with torch.no_grad():
        for name in absent:
            if name.endswith(".bias"):
                model.get_parameter(name).zero_()
        if not tied:
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.tie_weights()
    return model.eval()


def distilled(slim: nn.Module, dense: nn.Module, epochs: int, seed: int) -> nn.Module:
    """A pruned network taught by the dense one on the first 1,024 rows of the text that this was trained on.

    Raises:
        FileNotFoundError: there is no such text on this machine; the message says how to make it.
    """
    files = sorted(TEXT.glob("*.npy"))[:5]
    if len(files) < 5:
        raise FileNotFoundError(f"{TEXT} holds too little text. Run python benchmarks/train_llm.py first (20 minutes).")
    rows = torch.from_numpy(np.concatenate([np.load(file) for file in files])).long()[:, -stories.WINDOW :]
    text, held = rows[:1024], rows[1024:1088]
    batches = torch.utils.data.DataLoader(
        text.tolist(), batch_size=8, shuffle=True, collate_fn=lambda ids: stories.as_batch(torch.tensor(ids))
    )
    student = copy.deepcopy(slim)
    finetune(
        student,
        batches,
        [stories.as_batch(ids) for ids in held.split(16)],
        epochs=epochs,
        teacher=dense,
        soft=1.0,
        temperature=1.0,
        amp=half_is_fast(),
        optimizer=torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0),
        seed=seed,
    )
    return student


def log() -> dict[str, Any]:
    """What the training reported."""
    return json.loads(LOG.read_text())
