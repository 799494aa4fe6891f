"""Means over channels count all of them: weights take up the factor, or the channels stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from torch import Tensor, nn

import structprune

torch.set_num_threads(1)

Between = Callable[[Tensor], Tensor]


class Averaged(nn.Module):
    """A convolution, something over its channels, a linear layer."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.conv, self.head, self.between = nn.Conv2d(3, 8, 1), nn.Linear(16, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.conv(x)).flatten(1))


def pruned(model: nn.Module, x: Tensor) -> tuple[structprune.Plan, nn.Module]:
    """A plan of half the channels and its network, which computes what the original does with plain zeros."""
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    slim = plan.apply(model)
    if plan.thinnings:
        oracle.check(model, slim, plan, x)
    assert structprune.verify(model, slim, plan, x).ok
    return plan, slim


def image() -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# One and the same mean, as people write it.
SPELLINGS: dict[str, Between] = {
    "mean": lambda y: y.mean(1),
    "keepdim": lambda y: y.mean(dim=1, keepdim=True),
    "function": lambda y: torch.mean(y, dim=(1,)),
    "axis": lambda y: y.mean(axis=-3),
    "sum over shape": lambda y: y.sum(1) / y.shape[1],
    "sum over size": lambda y: y.sum(1).div(y.size(1)),
    "sum times inverse": lambda y: y.sum(1) * (1 / y.shape[1]),
    "sum over root twice": lambda y: y.sum(1) / math.sqrt(y.shape[1]) / y.shape[1] ** 0.5,
    "divided first": lambda y: (y / y.shape[1]).sum(1),
    "einsum": lambda y: torch.einsum("bchw->bhw", y) / y.shape[1],
    "after a ReLU": lambda y: F.relu(y).mean(1),
    "two dimensions": lambda y: y.mean((1, 2)).repeat(1, 4),
    "moved": lambda y: y.permute(0, 2, 3, 1).mean(-1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mean_over_channels_is_what_it_was(spelling: str) -> None:
    model, x = oracle.jitter(Averaged(SPELLINGS[spelling]), 0), image()
    plan, slim = pruned(model, x)
    assert len(plan.removed["conv.weight"][0]) == 4
    assert "over_survivors" not in plan.settings
    assert torch.allclose(oracle.switch_off(model, plan.removed)(x), slim(x), rtol=1e-9)


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.mean(1) + y.sum(1),  # the same weights make both
        lambda y: torch.sigmoid(y).mean(1),
        lambda y: (y * torch.sigmoid(y.mean(1, keepdim=True))).sum(1),
        lambda y: (y - y.mean(1, keepdim=True)).square().sum(1),  # centred only: no norm
        lambda y: (y * y.square().mean(1, keepdim=True) ** 0.5).sum(1) + y.sum(1),  # multiplied: no norm
    ],
)
def test_where_nothing_takes_up_the_factor_the_channels_stay(between: Between) -> None:
    model, x = oracle.jitter(Averaged(between), 0), image()
    plan, _ = pruned(model, x)
    assert "conv.weight" not in plan.removed


class Gated(nn.Module):
    """A spatial gate from the mean of the channels, which go on to be used: the gate's weights take up the factor."""

    def __init__(self, gate: int = 1) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.other, self.gate = nn.Conv2d(3, gate, 1), nn.Conv2d(1 + gate, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.norm(self.conv(x)))
        both = torch.cat([self.other(x), y.mean(1, keepdim=True)], 1)
        return self.last(y * torch.sigmoid(self.gate(both)))


def test_what_reads_a_mean_takes_up_the_factor() -> None:
    model, x = oracle.jitter(Gated(), 0), image()
    plan, _ = pruned(model, x)
    (rescale,) = plan.rescales
    assert (rescale.tensor, rescale.dim, rescale.positions, rescale.factor) == ("gate.weight", 1, (1,), 0.5)


class Reused(Gated):
    """The weights that read the mean read another tensor too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        mean = self.gate(torch.cat([y.mean(1, keepdim=True), self.other(x)], 1))
        return self.last(y * mean) + self.gate(x[:, :2])


def test_weights_that_read_something_else_take_up_nothing() -> None:
    plan, _ = pruned(oracle.jitter(Reused(), 0), image())
    assert "conv.weight" not in plan.removed


class TwiceReturned(Gated):
    """The mean is an output."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        mean = y.mean(1, keepdim=True)
        return self.last(y), mean


def test_a_mean_that_is_returned_keeps_the_channels() -> None:
    plan, _ = pruned(oracle.jitter(TwiceReturned(), 0), image())
    assert not plan.removed


# -- norms that a forward writes out -----------------------------------------------------------------------------------


def _layer_norm(y: Tensor) -> Tensor:
    centred = y - y.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)


def _by_both(y: Tensor, var: Tensor, mean: Tensor) -> Tensor:
    return (y - mean) * torch.rsqrt(var + 1e-6)


def _response(length: Tensor) -> Tensor:
    return length / (length.mean(1, keepdim=True) + 1e-6)


HAND_WRITTEN: dict[str, Between] = {
    "RMS": lambda y: y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6),
    "RMS by a root": lambda y: y / (y * y).mean(1, keepdim=True).add(1e-6).sqrt(),
    "RMS by a reciprocal": lambda y: y * (1 / (y.pow(2).mean(1, keepdim=True) + 1e-6) ** 0.5),
    "layer norm": _layer_norm,
    "layer norm by var": lambda y: (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + 1e-6).sqrt(),
    "layer norm by var_mean": lambda y: _by_both(y, *torch.var_mean(y, 1, keepdim=True)),
    "response": lambda y: y * _response(y.norm(dim=(2, 3), keepdim=True)),
}


class Normed(nn.Module):
    def __init__(self, norm: Between) -> None:
        super().__init__()
        self.conv, self.last, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)))


@pytest.mark.parametrize("norm", HAND_WRITTEN)
def test_norms_written_by_hand_run_over_what_is_left_and_are_named(norm: str) -> None:
    model, x = oracle.jitter(Normed(HAND_WRITTEN[norm]), 0), image()
    plan, _ = pruned(model, x)
    assert len(plan.removed["conv.weight"][0]) == 4
    assert all(name.startswith("the model (") for name in plan.settings["over_survivors"])
