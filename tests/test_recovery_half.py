"""Recovery of models in half precision: solved in float32, on weights that stay as they are."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.peak_memory import needs_proc, peak_over_weights
from support.snapshot import assert_untouched, snapshot
from torch import nn

import structprune

HALF = (torch.float16, torch.bfloat16)


class Tied(nn.Module):
    """With a tied weight, a buffer, and a branch that depends on the type."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.again, self.head = nn.Linear(24, 16), nn.Linear(16, 5)
        self.again.weight = self.down.weight
        self.register_buffer("scale", torch.rand(16) + 0.5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3)) * self.scale
        if x.dtype == torch.float16:  # as some language models have it
            x = x.clamp(-1e3, 1e3)
        hidden = torch.relu(self.up(x))
        return self.head(x + self.down(hidden) + self.again(hidden))


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def networks(dtype, make=Tied):
    """The dense and the pruned model, and images, in this type."""
    torch.manual_seed(0)
    model = make().eval()
    data = [torch.randn(64, 3, 8, 8).to(dtype) for _ in range(4)]
    model = model.to(dtype)
    return model, structprune.prune(model, data[0], ratio=0.5, round_to=1), data


def widened(model):
    return copy.deepcopy(model).float()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rounds", [0, 3])
def test_the_weights_are_those_of_float32_rounded(dtype, rounds):
    model, slim, data = networks(dtype)
    found = structprune.recover(slim, model, data, rounds=rounds)
    wide = structprune.recover(widened(slim), widened(model), [x.float() for x in data], rounds=rounds)
    ours, theirs = structprune.recovery_report(found), structprune.recovery_report(wide)
    assert replace(ours, candidates=()) == replace(theirs, candidates=())
    assert any(row.changed for row in ours.layers)
    # The candidates are compared with the weights that they hold: the solved one with rounded ones.
    errors = [[row.error for row in report.candidates] for report in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    for name, value in found.state_dict().items():
        assert value.dtype == slim.state_dict()[name].dtype
        assert torch.equal(value, wide.state_dict()[name].to(value.dtype)), name
    assert found.again.weight is found.down.weight


@pytest.mark.parametrize("dtype", HALF)
def test_it_gains_as_much_as_in_float32(dtype):
    model, slim, data = networks(dtype, plain)

    @torch.no_grad()
    def results(one, kind):
        return torch.cat([one(x.to(kind)) for x in data]).float()

    def missing(one, kind):
        return float((results(one, kind) - wanted).norm() / wanted.norm())

    wanted = results(widened(model), torch.float32)
    found = structprune.recover(slim, model, data)
    assert any(row.producers for row in structprune.recovery_report(found).layers)
    wide = structprune.recover(widened(slim), widened(model), [x.float() for x in data])
    assert missing(found, dtype) < missing(wide, torch.float32) + 0.02 < 0.5 * missing(slim, dtype)


@pytest.mark.parametrize("which", ["model", "slim"])
def test_one_of_the_models_alone_may_be_in_half_precision(which):
    model, slim, data = networks(torch.bfloat16)
    model, slim = (widened(model), slim) if which == "slim" else (model, widened(slim))
    found = structprune.recover(slim, model, data)
    assert found.up.weight.dtype == slim.up.weight.dtype
    assert not torch.equal(found.up.weight, slim.up.weight)


def test_the_models_stay_as_they_were():
    model, slim, data = networks(torch.float16)
    slim.train()
    model.up.weight.requires_grad_(False)
    before = [snapshot(one) for one in (model, slim)]
    found = structprune.recover(slim, model, data)
    for one, was in zip((model, slim), before, strict=True):
        assert_untouched(one, was)
    assert found.training
    assert all(p.dtype == torch.float16 for p in found.parameters())


DEEP = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024, dtype=torch.bfloat16), nn.Linear(1024, 256, dtype=torch.bfloat16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

with torch.no_grad():
    model = nn.Sequential(*(Block() for _ in range(160)))
data = [torch.randn(64, 256, dtype=torch.bfloat16)]
weights = sum(p.numel() * p.element_size() for p in model.parameters())
slim = structprune.prune(model, data[0], ratio=0.9, importance="random", verify=False)
"""


@needs_proc
def test_no_model_is_copied_in_float32():
    # The new model holds a tenth of the weights; one float32 copy of the original would hold twice as much as it.
    assert 0 < peak_over_weights(DEEP, "structprune.recover(slim, model, data, rounds=0)") < 0.9
