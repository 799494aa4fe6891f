"""Factors computed from the number of channels are made up for: what goes, goes, and the result is what it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import structprune

Scale = Callable[[Any, Tensor, Tensor], Tensor]


class _Attention(nn.Module):
    """Attention with one head, whose scores are scaled by their width at run time."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.q, self.k, self.v, self.h = (*(nn.Linear(6, 16) for _ in range(3)), nn.Linear(16, 3))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.h(self.scale(self, q @ k.transpose(1, 2), q).softmax(-1) @ v)


TRACKED: dict[str, Scale] = {
    "times a power": lambda m, w, q: w * q.shape[-1] ** -0.5,
    "over a root": lambda m, w, q: w / math.sqrt(q.shape[-1]),
    "over a power": lambda m, w, q: w / q.shape[-1] ** 0.5,
    "times one over a root": lambda m, w, q: w * (1 / math.sqrt(q.shape[-1])),
    "over an attribute's root": lambda m, w, q: w / math.sqrt(m.q.out_features),
}


def _pruned(model: nn.Module, x: Tensor, ratio: float = 0.5) -> tuple[structprune.Plan, Any]:
    plan = structprune.plan(model, x, ratio=ratio, round_to=1)
    slim = plan.apply(model)
    report = structprune.verify(model, slim, plan, x)
    assert report.ok, str(report)
    assert torch.equal(structprune.Plan.from_json(plan.to_json()).apply(model)(x), slim(x))
    return plan, slim


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("name", TRACKED)
def test_the_scale_of_scores_is_made_up_for(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    model, x = _Attention(TRACKED[name]).double().eval(), torch.randn(2, 5, 6).double()
    plan, slim = _pruned(model, x, ratio)
    assert slim.q.out_features == 16 * (1 - ratio)
    assert {rescale.tensor for rescale in plan.rescales} == {"q.weight", "q.bias"}


class _Embedding(nn.Module):
    """A table whose entries are scaled by its own width, as in the first transformer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a, self.h = nn.Embedding(13, 16, padding_idx=0), nn.Linear(16, 3)
        self.g = nn.Linear(16, 13, bias=False)
        if tied:
            self.g.weight = self.a.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.a(x) * self.a.embedding_dim**0.5
        return self.h(hidden), self.g(hidden)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_an_embedding_table_takes_up_the_factor(ratio: float) -> None:
    torch.manual_seed(0)
    model, x = _Embedding().double().eval(), torch.arange(10).view(2, 5)
    plan, slim = _pruned_tokens(model, x, ratio)
    assert slim.a.embedding_dim == 16 * (1 - ratio)
    assert {rescale.tensor for rescale in plan.rescales} == {"a.weight"}


def test_a_table_that_is_the_output_layer_too_does_not() -> None:
    torch.manual_seed(0)
    model, x = _Embedding(tied=True).double().eval(), torch.arange(10).view(2, 5)
    plan, slim = _pruned_tokens(model, x, 0.5)
    assert slim.a.embedding_dim == 16
    assert not plan.rescales


def _pruned_tokens(model: nn.Module, x: Tensor, ratio: float) -> tuple[structprune.Plan, Any]:
    plan = structprune.plan(model, x, ratio=ratio, round_to=1)
    slim = plan.apply(model)
    assert structprune.verify(model, slim, plan, x).ok
    return plan, slim


LOST: dict[str, Scale] = {
    "int": lambda m, w, q: w * int(q.shape[-1]) ** -0.5,
    "root of an int": lambda m, w, q: w / math.sqrt(int(q.shape[-1])),
    "one over a root": lambda m, w, q: w * (1 / math.sqrt(int(q.shape[-1]))),
    "len": lambda m, w, q: w / len(m.q.weight),
    "in place": lambda m, w, q: w.mul_(int(q.shape[-1]) ** -0.5),
    "float": lambda m, w, q: w * float(q.shape[-1]) ** -0.5,
    "math.pow": lambda m, w, q: w * math.pow(q.shape[-1], -0.5),
    "NumPy": lambda m, w, q: w / np.sqrt(int(q.shape[-1])),
}


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("name", LOST)
def test_a_power_of_a_lost_number_is_found_again(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    model, x = _Attention(LOST[name]).double().eval(), torch.randn(2, 5, 6).double()
    plan, slim = _pruned(model, x, ratio)
    assert slim.q.out_features == 16 * (1 - ratio)
    assert {rescale.tensor for rescale in plan.rescales} == {"q.weight", "q.bias"}


def test_a_removal_by_hand_finds_it_too() -> None:
    torch.manual_seed(0)
    model, x = _Attention(LOST["int"]).double().eval(), torch.randn(2, 5, 6).double()
    original = copy.deepcopy(model)
    graph = structprune.DependencyGraph(model, x)
    plan = graph.prune_group("q", [0, 5])
    assert structprune.verify(original, model, plan, x).ok
    assert {rescale.tensor for rescale in plan.rescales} == {"q.weight", "q.bias"}
    (group,) = [group for group in graph.groups() if group.name == "q"]
    graph.prune_group(group, [1])
    assert model.q.out_features == 13


OTHERS: dict[str, Scale] = {
    "inputs added": lambda m, w, q: w * (q.shape[1] + q.shape[-1]) ** -0.5,
    "inputs added, lost": lambda m, w, q: w * (int(q.shape[1]) + int(q.shape[-1])) ** -0.5,
    "a logarithm of NumPy": lambda m, w, q: w / np.log(int(q.shape[-1])),
    "a fraction": lambda m, w, q: w * Fraction(int(q.shape[-1]), 3).__float__(),
    "a branch": lambda m, w, q: w * 2 if float(q.shape[-1]) > 8 else w,
    "a logarithm": lambda m, w, q: w / math.log(int(q.shape[-1])),
    "a tensor": lambda m, w, q: w / torch.tensor(int(q.shape[-1]), dtype=w.dtype).sqrt(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_factors_keep_the_channels(name: str) -> None:
    torch.manual_seed(0)
    model, x = _Attention(OTHERS[name]).double().eval(), torch.randn(2, 5, 6).double()
    plan, slim = _pruned(model, x)
    assert slim.q.out_features == 16
    assert not plan.rescales


def test_a_factor_that_inputs_multiply_is_made_up_for_at_all_their_sizes() -> None:
    torch.manual_seed(0)
    model = _Attention(lambda m, w, q: w * (q.shape[1] * q.shape[-1]) ** -0.5).double().eval()
    plan, _ = _pruned(model, torch.randn(2, 5, 6).double())
    assert plan.rescales
    other = torch.randn(3, 9, 6).double()
    assert structprune.verify(model, plan.apply(model), plan, other).ok


def test_a_power_that_nothing_can_take_up_keeps_the_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.h = nn.Linear(6, 16), nn.Sigmoid(), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.n(self.a(x))
            return self.h(hidden * int(hidden.shape[-1]) ** -0.5 + self.n(hidden))

    torch.manual_seed(0)
    plan, slim = _pruned(Net().double().eval(), torch.randn(2, 6).double())
    assert slim.a.out_features == 16
    assert not plan.rescales


class Powers(nn.Module):
    """Something of several powers of one layer's result, divided by its width."""

    def __init__(self, power: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.power = nn.Linear(6, 8), nn.Linear(8, 3), power

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last((self.power(y) / y.shape[-1]).sigmoid())


@pytest.mark.parametrize(
    "power",
    [
        lambda y: (y @ y.mT) @ y,
        lambda y: torch.einsum("bnc,bmc->bnm", y, y) @ y,
        lambda y: y * y,
        lambda y: y * y.relu(),
        lambda y: y.mul(y.sum(1, keepdim=True)),
        lambda y: (y.split(4, -1)[0] @ y[..., 4:].mT) @ y,
    ],
)
def test_what_is_made_of_several_factors_is_not_scaled_by_one_parameter(power: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Powers(power).double().eval(), torch.randn(2, 5, 6).double()
    assert structprune.plan(model, x, ratio=0.5, round_to=1).rescales == ()


@pytest.mark.parametrize(
    "power",
    [lambda y: torch.cat(y.chunk(2, -1)[::-1], -1), lambda y: y - y.relu(), lambda y: y + y.flip(1).relu()],
)
def test_terms_of_a_sum_are_scaled_by_what_makes_them_all(power: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Powers(power).double().eval(), torch.randn(2, 5, 6).double()
    plan, _ = _pruned(model, x)
    assert {rescale.tensor for rescale in plan.rescales} == {"first.weight", "first.bias"}
