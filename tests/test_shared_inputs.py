"""Example inputs that are one and the same tensor stay so: a forward may ask whether they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune.errors import PlanError
from structprune.ops import op_of
from structprune.tracing.containers import specify, unspecify
from structprune.tracing.trace import trace


class _Attention(nn.Module):
    """Multi-head attention, which projects all three at once where query, key and value are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.a, self.h = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 16),
            nn.Linear(16, 3),
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.h(self.a(self.attention(q, k, v)[0]).relu())


class _Same(nn.Module):
    """Which layer runs is decided by whether the two inputs are one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, pair: Any) -> Tensor:
        left, right = pair
        layer = self.a if left is right else self.b
        return self.h(layer(left).relu())


class _Fold(nn.Module):
    """With a literal size behind operations that are as many as the caller says."""

    def forward(self, x: Tensor, same: bool) -> Tensor:
        return (x.relu() if same else x.relu() * 2 + x).view(-1, 8)


class _Literal(_Same):
    def __init__(self) -> None:
        super().__init__()
        self.fold = _Fold()

    def forward(self, pair: Any) -> Tensor:
        return self.h(self.fold(self.a(pair[0]), pair[0] is pair[1]))


def _names(model: nn.Module, inputs: Any) -> list[str]:
    return [node.meta["name"] for node in trace(model, inputs, operations=op_of).nodes]


def test_a_shared_tensor_takes_the_way_that_it_takes_in_a_run() -> None:
    model, x = _Attention().eval(), torch.randn(2, 5, 8)
    assert _names(model, (x, x, x)).count("input") == 1
    assert _names(model, (x, x.clone(), x.clone())).count("input") == 3
    assert _names(model, (x, x, x)).count("linear") < _names(model, (x, x.clone(), x.clone())).count("linear")


@pytest.mark.parametrize("shared", [True, False])
def test_attention_over_shared_inputs_is_exact(shared: bool) -> None:
    torch.manual_seed(0)
    model, x = _Attention().double().eval(), torch.randn(2, 5, 8).double()
    inputs = (x, x, x) if shared else (x, x.clone(), x.clone())
    slim = structprune.prune(model, inputs, ratio=0.5, round_to=1)
    assert slim.a.out_features == 8


def test_a_branch_on_identity_is_followed() -> None:
    torch.manual_seed(0)
    model, x = _Same().double().eval(), torch.randn(2, 6).double()
    plan = structprune.plan(model, ((x, x),), ratio=0.5, round_to=1)
    assert {layer.layer for layer in plan.layers} == {"a"}
    plan = structprune.plan(model, ((x, x.clone()),), ratio=0.5, round_to=1)
    assert {layer.layer for layer in plan.layers} == {"b"}


def test_a_plan_in_a_file_knows_which_inputs_are_one() -> None:
    torch.manual_seed(0)
    model, x = _Literal().double().eval(), torch.randn(2, 6).double()
    plan = structprune.plan(model, ((x, x),), ratio=0.5, round_to=1)
    assert plan.literal_edits
    slim = structprune.Plan.from_json(plan.to_json()).apply(model)
    assert structprune.verify(model, slim, plan, ((x, x),)).ok


def test_the_description_of_shared_inputs() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(4)
    data = specify((x, {"y": y, "again": [x, y]}))
    assert data == {
        "tuple": [
            {"tensor": [2, 3], "dtype": "float32"},
            {"dict": {"y": {"tensor": [4], "dtype": "float32"}, "again": {"list": [{"again": 0}, {"again": 1}]}}},
        ]
    }
    made = unspecify(data)
    assert made[1]["again"][0] is made[0]
    assert made[1]["again"][1] is made[1]["y"]


@pytest.mark.parametrize("number", [1, -1, True, "0"])
def test_a_reference_to_no_tensor_is_refused(number: Any) -> None:
    plan = structprune.plan(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3), ratio=0.5)
    inputs = {"tuple": [{"tensor": [1, 3], "dtype": "float32"}, {"again": number}]}
    data = {**json.loads(plan.to_json()), "inputs": inputs}
    with pytest.raises(PlanError, match="same as number"):
        structprune.Plan.from_data(data)
