"""Calibration on padded batches: the same as on sequences without padding, whichever side it is on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import structprune
from structprune.errors import PlanError, RecoveryError
from structprune.importance.base import fitted, importance_of
from structprune.padding import unpadded
from structprune.recovery.selection import Reconstruction

LENGTHS = (7, 12, 9, 12, 5, 10, 11, 8) * 4
LONGEST = max(LENGTHS)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 50, (length,), generator=generator) for length in LENGTHS]


def padded(side: str, sequences: list[Tensor]) -> dict[str, Tensor]:
    """One batch of all of them; what stands at padding must not matter."""
    ids, mask = torch.full((len(sequences), LONGEST), 3), torch.zeros(len(sequences), LONGEST, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        at = slice(LONGEST - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, at], mask[row, at] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def alone(sequences: list[Tensor]) -> list[dict[str, Tensor]]:
    """The sequences without padding, those of one length in a batch."""
    groups: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        groups.setdefault(len(sequence), []).append(sequence)
    stacked = [torch.stack(group) for group in groups.values()]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in stacked]


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).double().eval()


def gpt2() -> nn.Module:
    """Positions are absolute: the same sequence further right is another."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 50, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**sizes)).double().eval()


EXAMPLE = {"input_ids": torch.arange(8)[None] + 1, "attention_mask": torch.ones(1, 8, dtype=torch.long)}
MODELS = {"rotary": llama, "absolute": gpt2}


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).loss


def scores(model: nn.Module, importance: Any, data: list[Any]) -> list[Tensor]:
    graph = structprune.DependencyGraph(model, EXAMPLE)
    score = fitted(importance_of(importance), graph, data, loss, None)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    return [score(group, held) for group in graph.groups()]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("importance", ["wanda", "flap", "taylor", "obd_fisher", "kfac", "obs"])
def test_scores(importance: str, kind: str, side: str) -> None:
    model = MODELS[kind]()
    expected = scores(model, importance, alone(sequences()))
    assert close(scores(model, importance, [padded(side, sequences())]), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_reconstruction(side: str) -> None:
    model = llama()
    theirs = scores(model, Reconstruction(), alone(sequences()))
    assert close(scores(model, Reconstruction(), [padded(side, sequences())]), theirs)


def every_other(group: structprune.Group, tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.arange(group.channels) % 2 + 1.0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_recovered(kind: str, side: str) -> None:
    model = MODELS[kind]()
    with torch.no_grad():  # of two channels each makes the same, so that one can do the work of both
        for name, weight in model.named_parameters():
            if "gate_proj" in name or "up_proj" in name:
                weight[1::2] = weight[::2]
            elif "c_fc.weight" in name:
                weight[:, 1::2] = weight[:, ::2]
    slim = structprune.prune(model, EXAMPLE, ratio=0.5, axes=["mlp"], importance=every_other)
    ours = structprune.recover(slim, model, [padded(side, sequences())])
    theirs = structprune.recover(slim, model, alone(sequences()))
    assert close(list(ours.parameters()), list(theirs.parameters()))
    assert structprune.recovery_report(ours).kept != "as given"


def test_what_stands_at_padding_does_not_matter() -> None:
    model, batch = llama(), padded("right", sequences())
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 49)}
    assert close(scores(model, "wanda", [batch]), scores(model, "wanda", [other]))


def test_a_decoder_has_padding_of_its_own() -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double().eval()
    example = {**EXAMPLE, "labels": torch.arange(1, 6)[None]}
    targets = [sequence[: 2 + row % 3] for row, sequence in enumerate(reversed(sequences()))]
    labels = torch.full((len(LENGTHS), LONGEST), -100)
    apart: list[dict[str, Tensor]] = []
    for row, (sequence, target) in enumerate(zip(sequences(), targets, strict=True)):
        labels[row, : len(target)] = target
        ids = sequence[None]
        apart.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target[None]})
    for side in ("left", "right"):
        batch = padded(side, sequences()) | {"labels": labels}
        graph = structprune.DependencyGraph(model, example)
        held = dict(model.named_parameters())
        both = [fitted(importance_of("wanda"), graph, data, None, None) for data in ([batch], apart)]
        assert close(*([score(group, held) for group in graph.groups()] for score in both))


# -- how batches are divided ----------------------------------------------------------------------------------------


def test_batches_without_padding_are_left_alone() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    features = {"input_features": torch.ones(2, 80, 6), "attention_mask": torch.tensor([[1] * 6, [0] * 6])}
    for batch in (ids, (ids, ids), {"input_ids": ids}, {"input_ids": ids, "attention_mask": ids}, features, [], "text"):
        assert unpadded(batch)[0] is batch


def test_all_that_belongs_to_a_sequence_is_cut() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]])
    batch = {
        "input_ids": torch.arange(12).view(4, 3), "attention_mask": mask, "position_ids": torch.arange(3)[None],
        "embeddings": torch.arange(24).view(4, 3, 2), "choice": torch.arange(4), "scale": torch.tensor(2.0),
        "flag": True,
    }  # fmt: skip
    first, second = unpadded(batch)
    assert first["input_ids"].tolist() == [[1, 2], [7, 8]]
    assert first["position_ids"].tolist() == [[1, 2]]
    assert first["embeddings"].shape == (2, 2, 2)
    assert (first["choice"].tolist(), second["choice"].tolist()) == ([0, 2], [1])
    assert (first["flag"], float(first["scale"])) == (True, 2.0)
    pair = unpadded((BatchEncoding(batch), torch.arange(4)))
    assert isinstance(pair[0][0], BatchEncoding)
    assert pair[0][0].input_ids.tolist() == [[1, 2], [7, 8]]
    assert pair[1][1].tolist() == [1]


def test_zeros_between_ones_stay() -> None:
    ids = torch.arange(4)[None]
    (part,) = unpadded({"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1, 0]])})
    assert part["attention_mask"].tolist() == [[1, 0, 1]]


def test_what_cannot_be_divided_is_refused() -> None:
    batch = padded("left", sequences()) | {"pixel_values": torch.ones(3, 4)}
    with pytest.raises(PlanError, match=r"'pixel_values' in the batch has the shape \[3, 4\].*batches of one sample"):
        structprune.plan(llama(), EXAMPLE, ratio=0.5, importance="wanda", data=[batch])
    model = llama()
    with pytest.raises(RecoveryError, match="batches of one sample each"):
        structprune.recover(structprune.prune(model, EXAMPLE, ratio=0.5), model, [batch])
