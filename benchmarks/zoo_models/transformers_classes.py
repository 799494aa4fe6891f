"""Every causal, encoder-decoder and vision-language class of the installed transformers, from a small configuration.

A configuration is made of its class's own defaults, with numbers of these names made small, in the configurations
inside it too. Where these do not fit together, other values of some names are tried, and other inputs. What does not
build or run so either is written down as such. By hand is only what `transformers_small.NEEDED` lists.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo_models.entry import Entry
from zoo_models.transformers_inputs import plain_inputs, thorough_inputs
from zoo_models.transformers_small import OTHERS, THOROUGH, configuration

_LARGEST = 20_000_000  # entries of the parameters of a small model
_WORKED: dict[str, dict[str, Any]] = {}  # the values with which a class built and ran, so that they are sought once
_LISTS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


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
    drawn = torch.get_rng_state()
    for others in [_WORKED[name]] if name in _WORKED else [*OTHERS, *({**each, "thorough": True} for each in THOROUGH)]:
        torch.set_rng_state(drawn)
        try:
            config = configuration(config_class, others)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            if size > _LARGEST:
                continue
            model = model_class(config).eval()
        except Exception as error:  # a class may raise anything on settings that do not fit
            first = first or error
            continue
        given = thorough_inputs if "thorough" in others else plain_inputs
        for inputs in given(model, kind == "seq2seq"):
            built = built or (model, inputs)
            try:
                with torch.no_grad():
                    model(**inputs)
            except Exception as error:  # a forward may raise anything on inputs that it does not take
                first = first or error
            else:
                _WORKED[name] = others
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
