"""Branches of models of the zoo, alone and all at once: the model without them is the original with them at zero.

The code is that of ``benchmarks/depth.py``, which runs more of them.
"""

from __future__ import annotations

import random

import pytest
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


def test_recovery_makes_up_for_blocks_that_are_gone() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), *(Residual() for _ in range(4)), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(512, 6)
    slim = structprune.remove_branches(model, x, structprune.choose_branches(model, x, [x], count=1))
    state = {key: value.clone() for key, value in slim.state_dict().items()}
    recovered = structprune.recover(slim, model, list(x.split(128)), rounds=1)
    held_out = torch.randn(256, 6)
    before, after = ((one(held_out) - model(held_out)).norm() for one in (slim, recovered))
    assert after < 0.7 * before
    assert len(recovered) == len(slim)
    assert all(torch.equal(value, state[key]) for key, value in slim.state_dict().items())
    thin = structprune.prune(recovered, x, ratio=0.25, round_to=1)
    assert structprune.recover(thin, recovered, [x], rounds=0)(x).shape == model(x).shape
    with pytest.raises(structprune.errors.RecoveryError, match="more was done"):
        structprune.recover(thin, model, [x])
