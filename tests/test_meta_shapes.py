"""Shapes that records tell without running an operation are those that the operation gives on ``meta``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune.ops import op_of


def _layout(result: Any) -> list[tuple[torch.Size, tuple[int, ...], torch.dtype]]:
    tensors: list[Tensor] = list(result) if isinstance(result, tuple) else [result]
    return [(t.shape, t.stride(), t.dtype) for t in tensors]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (3, 2, 2), (1, 1, 3)])
def test_convolutions(dims: int, groups: int, stride: int, padding: int, dilation: int) -> None:
    name = f"conv{dims}d"
    x, weight = torch.empty(2, 4, *[9] * dims, device="meta"), torch.empty(6, 4 // groups, *[3] * dims, device="meta")
    known = op_of(name)
    assert known is not None
    assert known.shape is not None
    for value in (int, lambda n: (n,) * dims):
        args = (x, weight, torch.empty(6, device="meta"), value(stride), value(padding), value(dilation), groups)
        assert _layout(known.shape(*args)) == _layout(getattr(torch, name)(*args))
    wrong = torch.empty(2, 5, *[9] * dims, device="meta")
    assert known.shape(wrong, weight, None, 1, 0, 1, groups) is None


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers(kind: str, both: bool, batch_first: bool, layers: int) -> None:
    made = getattr(nn, kind)(4, 6, layers, bidirectional=both, batch_first=batch_first, device="meta")
    x = torch.empty(3, 5, 4, device="meta")
    state = torch.zeros(layers * (1 + both), 3 if batch_first else 5, 6, device="meta")
    hx = (state, state) if kind == "LSTM" else state
    out, last = made(x, hx)
    known = op_of({"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[kind])
    assert known is not None
    assert known.shape is not None
    found = known.shape(x, hx, made._flat_weights, True, layers, 0.0, False, both, batch_first)
    assert _layout(found) == _layout((out, *(last if isinstance(last, tuple) else (last,))))


def test_a_number_that_a_shape_is_computed_from_is_not_taken_for_one_that_the_forward_asks_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 4, 1))
    slim = structprune.prune(model, torch.randn(1, 3, 8, 8), ratio=0.5, round_to=1)
    assert slim[1].groups == 12
