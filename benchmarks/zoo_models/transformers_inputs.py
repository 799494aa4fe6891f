"""Inputs of the classes of transformers: text, and what else a forward asks for by the names of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo_models.transformers_small import IMAGE, VOCABULARY

BATCH, LENGTH, TARGETS = 2, 8, 6


def plain_inputs(model: Any, seq2seq: bool) -> list[dict[str, Any]]:
    """Text for a model, alone, without a cache, and with an image."""
    ids = torch.randint(4, VOCABULARY - 1, (BATCH, LENGTH))
    text: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder or seq2seq:
        text["decoder_input_ids"] = torch.randint(4, VOCABULARY - 1, (BATCH, TARGETS))
    image = {"pixel_values": torch.randn(BATCH, 3, 32, 32)}
    return [text, {**text, "use_cache": False}, {**text, **image}, image]


def thorough_inputs(model: Any, seq2seq: bool) -> Iterator[dict[str, Any]]:
    """Text, and with it whatever the forward takes of an image, sound or state, with places for it in the text."""
    text = _text(model, seq2seq)
    yield text
    yield {**text, "use_cache": False}
    takes = inspect.signature(model.forward).parameters
    others = {name: make(model) for name, make in _MADE.items() if name in takes}
    for images in _images(model):
        if "pixel_values" in takes:
            others["pixel_values"] = images
        for places in _places(model):
            given = {
                **_with_places(text, places),
                **{name: value for name, value in others.items() if value is not None},
            }
            for name in ("image_embeds_position_mask",):
                if name in takes:
                    given[name] = given["input_ids"] == IMAGE
            yield given
            yield {**given, "use_cache": False}
            if "decoder_input_ids" in given:
                yield {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask")}
        if "pixel_values" not in takes:
            break


def _text(model: Any, seq2seq: bool) -> dict[str, Any]:
    books = _number(model.config, "num_codebooks", 1)
    ids = torch.randint(2 * IMAGE, VOCABULARY - 1, (BATCH * books, LENGTH))
    text: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
    if model.config.is_encoder_decoder or seq2seq:
        text["decoder_input_ids"] = torch.randint(2 * IMAGE, VOCABULARY - 1, (BATCH, TARGETS))
    return text


def _with_places(text: dict[str, Any], places: int) -> dict[str, Any]:
    ids = torch.cat([torch.full((BATCH, places), IMAGE), text["input_ids"][:BATCH]], 1)
    return {**text, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and all inside it."""
    yield config
    for name, value in list(vars(config).items()):
        if name.endswith("_config") and hasattr(value, "to_dict"):
            yield from _configs(value)


def _number(config: Any, name: str, default: int) -> int:
    """The first number of this name in a configuration or one inside it."""
    for each in _configs(config):
        value = vars(each).get(name)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if type(value) is int:
            return value
    return default


def _images(model: nn.Module) -> Iterator[Tensor]:
    """One image a text, and the same as one of several."""
    side = _number(model.config, "image_size", 32)
    image = torch.randn(BATCH, _number(model.config, "num_channels", 3), side, side)
    yield image
    yield image[:, None]
    yield image[:, None].expand(-1, 4, -1, -1, -1).contiguous()


def _places(model: nn.Module) -> list[int]:
    """How many tokens of a text may stand for an image: what is asked for by name, or one for each patch."""
    named = [_number(model.config, name, 0) for name in ("num_query_tokens", "latent_query_num")]
    patches = (_number(model.config, "image_size", 32) // max(1, _number(model.config, "patch_size", 8))) ** 2
    counts = (*named, 4 * max(named), patches, patches + 1, patches // 4)
    return [*dict.fromkeys(count for count in counts if count), 0]


def _ids(_: Any) -> Tensor:
    return torch.randint(2 * IMAGE, VOCABULARY - 1, (BATCH, LENGTH))


def _boxes(_: Any) -> Tensor:
    corner = torch.rand(BATCH, LENGTH, 2) / 2
    return torch.cat([corner, corner + 0.25], 2)


def _flattened_patches(model: Any) -> Tensor:
    """Pix2Struct's: row and column of each patch, and its pixels."""
    places = torch.arange(16).reshape(1, 16, 1).expand(BATCH, -1, -1) // torch.tensor([4, 1]) % 4 + 1.0
    return torch.cat([places, torch.randn(BATCH, 16, _number(model.config, "patch_embed_hidden_size", 768))], 2)


def _features(model: Any) -> Tensor:
    return torch.randn(
        BATCH, _number(model.config, "num_mel_bins", 128), LENGTH * _number(model.config, "audio_length_per_tok", 8)
    )


def _of_state(name: str) -> Any:
    def state(model: Any) -> Tensor:
        return torch.randn(BATCH, _number(model.config, name, 32))

    return state


def _noise(model: Any) -> Tensor:
    return torch.randn(BATCH, _number(model.config, "chunk_size", 8), _number(model.config, "max_action_dim", 32))


_MADE: dict[str, Any] = {
    "qformer_input_ids": _ids,
    "bbox": _boxes,
    "flattened_patches": _flattened_patches,
    "input_features": _features,
    "state": _of_state("max_state_dim"),
    "noise": _noise,
    "timestep": lambda _: torch.rand(BATCH),
    "pixel_attention_mask": lambda _: torch.ones(BATCH, 1, dtype=torch.bool),
    "image_attention_mask": lambda _: torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
}
