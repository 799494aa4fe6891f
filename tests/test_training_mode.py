"""Layers that only the forward in training mode uses: auxiliary heads shrink with what they read."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn

import structprune

X = torch.randn(1, 3, 8, 8)


class WithHead(nn.Module):
    """A small network with an auxiliary classifier, as GoogLeNet and Inception have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.aux_conv = nn.Conv2d(16, 12, 6)
        self.aux_norm = nn.BatchNorm2d(12)
        self.aux_out = nn.Linear(12, 5)
        self.body = nn.Conv2d(16, 8, 3)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.out(self.body(x).mean((2, 3)))
        if not self.training:
            return y
        return y, self.aux_out(torch.relu(self.aux_norm(self.aux_conv(x))).flatten(1))


class NeedsLabels(WithHead):
    """The forward in training mode asks for what the example inputs do not give."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.training and labels is None:
            raise ValueError("labels are needed in training")
        return super().forward(x)


def test_the_head_shrinks_with_what_it_reads() -> None:
    model = oracle.jitter(WithHead(), seed=0)
    inputs = oracle.double(X)
    before = snapshot(model)
    plan = structprune.plan(model, inputs, ratio=0.5)
    assert_untouched(model, before)
    slim = plan.apply(model)
    oracle.check(model, slim, plan, inputs)
    assert slim.aux_conv.weight.shape == (6, 8, 6, 6)
    assert slim.aux_out.weight.shape == (5, 6)
    slim.train()
    main, aux = slim(oracle.double(torch.randn(4, 3, 8, 8)))
    assert main.shape == aux.shape == (4, 5)
    (main.sum() + aux.sum()).backward()


def test_in_training_mode_it_computes_what_the_original_does_with_the_channels_off() -> None:
    model = oracle.jitter(WithHead(), seed=0)
    plan = structprune.plan(model, oracle.double(X), ratio=0.5)
    slim = plan.apply(model)
    with torch.no_grad():
        for sliced in plan.slices:
            tensor = model.get_parameter(sliced.tensor) if "running" not in sliced.tensor else None
            if tensor is not None:
                tensor.index_fill_(sliced.dim, torch.tensor(sliced.removed), 0)
    batch = oracle.double(torch.randn(6, 3, 8, 8))
    for ours, theirs in zip(slim.train()(batch), model.train()(batch), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_the_cost_is_that_of_inference() -> None:
    model = WithHead()
    without = structprune.cost(model, X).macs
    by_hand = 36 * 16 * 3 * 9 + 16 * 8 * 16 * 9 + 8 * 5
    assert without == by_hand


def test_a_forward_that_cannot_run_in_training_mode_is_told_of() -> None:
    plan = structprune.plan(NeedsLabels(), X, ratio=0.5)
    assert "labels are needed" in str(plan.settings["training"])
    assert not any(t.tensor.startswith("aux") for t in plan.slices)
    assert "training" not in structprune.plan(WithHead(), X, ratio=0.5).settings


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_layers_of_the_head_are_looked_up_like_others(ratio: float) -> None:
    graph = structprune.DependencyGraph(WithHead(), X)
    assert graph.group("aux_conv").channels == 12
    assert "training mode" in graph.explain("aux_out")
    slim = structprune.prune(WithHead(), X, ratio=ratio, ignore=["aux_conv"])
    assert slim.aux_conv.weight.shape[0] == 12
