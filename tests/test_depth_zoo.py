"""Branches of models of the zoo, alone and all at once: the model without them is the original with them at zero.

The code is that of ``benchmarks/depth.py``, which runs more of them.
"""

from __future__ import annotations

import random

import torch
from support import oracle
from support.depth import error_without, removable
from support.zoo import each_of, entry_of, zoo_check

import structprune

MODELS = (
    "torchvision/mobilenet_v3_small",
    "timm/dla/dla46x_c",
    "timm/cspnext/cspnext_tiny",
    "transformers/swin",
    "transformers/bert-mlm",
    "transformers/gemma3",
    "transformers/t5",
    "transformers/whisper",
    "generation/unet-with-attention",
)
# Branches that are tried alone, drawn at random.
MOST = 4


@each_of(MODELS)
def test_branches_are_removed_exactly(key: str) -> None:
    model, inputs = zoo_check.built(entry_of(key))
    model, inputs = zoo_check.jittered(model, torch.float64).eval(), oracle.double(inputs)
    names = [branch.name for branch in structprune.branches(model, inputs)]
    draw = random.Random(0)
    for chosen in [[name] for name in draw.sample(names, min(MOST, len(names)))]:
        assert error_without(model, inputs, chosen)[1] < 1e-10, chosen
    draw.shuffle(names)
    chosen = removable(model, inputs, names)
    slim, error = error_without(model, inputs, chosen)
    assert error < 1e-10, chosen
    assert zoo_check.parameters(slim) < zoo_check.parameters(model)
