"""Costs are counted once for a model and then evaluated at any widths."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import structprune
from structprune.coupling.costs import node_macs
from structprune.coupling.polynomials import Evaluator, Polynomial, total


class Attention(nn.Module):
    """Scaled dot-product attention beside an ``einsum`` with a broadcast operand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.mix = nn.Parameter(torch.randn(1, 16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.einsum("bnc,bcd->bnd", self.out(y) + x, self.mix)


class Recurrent(nn.Module):
    """An LSTM between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 12, 2, bidirectional=True, batch_first=True)
        self.last = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lstm(self.first(x))[0])


def convolutions() -> nn.Module:
    """Plain, grouped and transposed convolutions with a norm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.ConvTranspose2d(16, 8, 2),
        nn.Flatten(),
        nn.Linear(8 * 25, 4),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (convolutions, (2, 3, 8, 8)),
    "attention": (Attention, (2, 5, 16)),
    "recurrent": (Recurrent, (2, 5, 6)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_evaluated_cost_is_that_of_the_smaller_model(name: str, ratio: float) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    plan = structprune.plan(model, x, ratio=ratio, round_to=1)
    assert plan.layers
    assert plan.before == structprune.cost(model, x)
    assert plan.after == structprune.cost(plan.apply(model), x)


@pytest.mark.parametrize("name", MODELS)
def test_each_operation_is_counted_as_by_itself(name: str) -> None:
    make, shape = MODELS[name]
    graph = structprune.DependencyGraph(make(), torch.randn(shape))
    dead = graph.components.removed(graph.groups()[0].components[:2])
    count = graph.counter(dead)
    assert graph.costs.at(count).macs == sum(node_macs(node, graph.channels, count) for node in graph.trace.nodes)


def test_a_target_counts_each_operation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[object] = []

    def counting(node, channels, count):
        counted.append(node)
        return node_macs(node, channels, count)

    monkeypatch.setattr(sys.modules["structprune.coupling.costs"], "node_macs", counting)
    plan = structprune.plan(convolutions(), torch.randn(2, 3, 8, 8), target={"macs": 0.5, "params": 0.6}, round_to=1)
    assert plan.after.macs <= 0.5 * plan.before.macs
    assert counted
    assert len(counted) == len(set(counted))


def test_a_graph_counts_anew_once_it_was_pruned() -> None:
    model, x = convolutions(), torch.randn(2, 3, 8, 8)
    graph = structprune.DependencyGraph(model, x)
    before = graph.costs.at(lambda axis: axis.size)
    plan = graph.prune_group("0", [0, 3])
    assert (before, graph.costs.at(lambda axis: axis.size)) == (plan.before, plan.after)


def test_polynomials_are_evaluated_together() -> None:
    a, b = Polynomial({(0,): 1}, 8), Polynomial({(1,): 1}, 1)
    values = [a * a * 3 + b, total([a, b, a, 4]), 7, a * 0]
    assert Evaluator(values, unknowns=2)([5, 2]).tolist() == [3 * 25 + 2, 5 + 2 + 5 + 4, 7, 0]
    assert max(1, b, a) is a
    assert max(a, 1) is a


def test_numbers_beyond_64_bits_do_not_overflow() -> None:
    width = Polynomial({(0,): 1}, 2**40)
    assert Evaluator([width * width], unknowns=1)([2**40]).tolist() == [2**80]
