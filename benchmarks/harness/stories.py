"""A small Llama trained on children's stories: its tokens, its perplexity, and text of its own to learn from."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from support.torchvision_shim import make_torchvision_importable
from torch import Tensor, nn

from harness import cifar
from structprune.training import finetune

NAME = "stories260k"
WINDOW = 256
BEGIN = 1  # the token that every story begins with


def load_stories() -> nn.Module:
    """The trained network, in eval mode."""
    make_torchvision_importable()
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(cifar.require_data() / NAME).eval()


def windows(part: int) -> Tensor:
    """The first or second half of the stories' tokens, in windows of shape ``(n, 256)``."""
    tokens = np.load(cifar.require_data() / NAME / "tokens.npy").astype(np.int64)
    half = tokens[: len(tokens) // 2] if part == 0 else tokens[len(tokens) // 2 :]
    return torch.from_numpy(half[: len(half) // WINDOW * WINDOW].reshape(-1, WINDOW))


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Of all tokens of the windows but their first."""
    total = count = 0.0
    for ids in tokens.split(16):
        losses = nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + float(losses), count + ids[:, 1:].numel()
    return float(np.exp(total / count))


def as_batch(ids: Tensor) -> dict[str, Any]:
    """What the model takes."""
    return {"input_ids": ids, "use_cache": False}


def written(model: Any, count: int, seed: int, length: int = WINDOW, batch: int = 64) -> Tensor:
    """Rows of text that the model writes when it is given nothing but the beginning of a story: ``(count, length)``."""
    torch.manual_seed(seed)
    begin = torch.full((batch, 1), BEGIN)
    new = {"min_new_tokens": length - 1, "max_new_tokens": length - 1}
    found = [
        model.generate(
            input_ids=begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, pad_token_id=0, **new
        )
        for _ in range(count // len(begin))
    ]
    return torch.cat(found)


def distilled(slim: nn.Module, dense: nn.Module, tokens: Tensor, epochs: int, seed: int) -> nn.Module:
    """The pruned network taught by the dense one on the tokens and on text that the dense one wrote: no labels."""
    own = written(dense, 896, seed)
    text, held = torch.cat([tokens, own[64:]]), own[:64]
    batches = torch.utils.data.DataLoader(
        text.tolist(), batch_size=16, shuffle=True, collate_fn=lambda ids: as_batch(torch.tensor(ids))
    )
    student = copy.deepcopy(slim)
    finetune(
        student,
        batches,
        [as_batch(ids) for ids in held.split(16)],
        epochs=epochs,
        teacher=dense,
        soft=1.0,
        temperature=1.0,
        optimizer=torch.optim.AdamW(student.parameters(), lr=0.003, weight_decay=0.0),
        seed=seed,
    )
    return student
