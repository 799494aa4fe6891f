"""Packed sequences into recurrent layers, and sizes that contradict each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import structprune


class _Packed(nn.Module):
    def __init__(self, kind: str, last: bool, sorted_: bool) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.r = getattr(nn, kind)(16, 24, batch_first=True, num_layers=2, bidirectional=last)
        self.h = nn.Linear(24, 3)
        self.last, self.sorted = last, sorted_

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), lengths, True, enforce_sorted=self.sorted)
        out, state = self.r(packed)
        if self.last:
            return self.h((state[0] if isinstance(state, tuple) else state)[-1])
        return self.h(nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sorted_", [False, True])
def test_packed_sequences_are_pruned(kind: str, last: bool, sorted_: bool) -> None:
    torch.manual_seed(0)
    model = _Packed(kind, last, sorted_).double().eval()
    inputs = (torch.randn(2, 7, 6).double(), torch.tensor([7, 4]))
    slim = structprune.prune(model, inputs, ratio=0.5, round_to=1)
    assert (slim.r.input_size, slim.r.hidden_size) == (8, 12)


class _QuotientOfQuotient(nn.Module):
    """With fewer than 32 channels there is no head, and the outer quotient has no value."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 32
        self.q, self.o = nn.Linear(12, 128), nn.Linear(128, 12)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        b, n, c = q.shape
        heads = c // self.head_dim
        return self.o(q.reshape(b, n, heads, c // heads).relu().flatten(2))


def test_a_quotient_by_nothing_is_no_crash() -> None:
    model, x = _QuotientOfQuotient().double().eval(), torch.randn(1, 7, 12).double()
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    assert structprune.verify(model, plan.apply(model), plan, x).ok


class _SizedByTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.width = 8

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        noise = torch.zeros(1, count.max(), self.width, dtype=x.dtype)
        return self.b(self.a(x) + noise)


def test_a_size_that_is_a_tensor_is_not_taken_for_the_next_one() -> None:
    model = _SizedByTensor().double().eval()
    inputs = (torch.randn(2, 5, 6).double(), torch.tensor([5, 3]))
    slim = structprune.prune(model, inputs, ratio=0.5, round_to=1)
    assert (slim.a.out_features, slim.width) == (4, 4)


class _States(nn.Module):
    """The state and the cell that an LSTM begins with come from layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.cell, self.a = nn.Linear(5, 8), nn.Linear(5, 8), nn.LSTM(5, 8, batch_first=True)
        self.h = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = x.mean(1)
        return self.h(self.a(x, (self.state(features)[None], self.cell(features)[None]))[0])


def test_the_state_and_the_cell_lose_the_same_channels() -> None:
    torch.manual_seed(0)
    model, x = _States().double().eval(), torch.randn(3, 4, 5).double()
    plan = structprune.plan(model, x, ratio=0.5)
    assert plan.removed["state.weight"] == plan.removed["cell.weight"]
    assert structprune.verify(model, plan.apply(model), plan, x).ok
