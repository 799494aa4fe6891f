"""Weight decay with a strength for each channel, and gradients of penalties added by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structprune
from structprune.errors import PlanError
from structprune.importance.weight import norm_scales
from structprune.training import ChannelDecay, GroupLasso, add_gradient, shrinkage

X = torch.randn(2, 3, 8, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


def test_its_gradient_is_the_strength_times_the_weights() -> None:
    model = network()
    graph = structprune.DependencyGraph(model, X)
    strength = torch.tensor([1.0, 2.0, 3.0, 0.0])
    ChannelDecay(graph, {graph.groups()[0]: strength})(model).backward()
    for weight, dim in ((model[0].weight, 0), (model[0].bias, 0), (model[1].weight, 0), (model[3].weight, 1)):
        shape = [-1 if d == dim else 1 for d in range(weight.dim())]
        assert torch.allclose(weight.grad, weight.detach() * strength.view(shape))
    assert model[3].bias.grad is None  # an output of the model


def test_chosen_parameters_alone() -> None:
    model = network()
    graph = structprune.DependencyGraph(model, X)
    ChannelDecay(graph, {graph.groups()[0]: torch.ones(4)}, ["0.bias"])(model).backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == {"0.bias"}
    scales = GroupLasso(graph, 0.5, parameters=norm_scales(graph, ["batch_norm"]))
    assert torch.allclose(scales(model), 0.5 * model[1].weight.abs().sum())


def test_shrinkage_is_that_of_depgraph() -> None:
    scores = torch.tensor([0.5, 4.5, 2.5])
    assert torch.allclose(shrinkage(scores, alpha=3), 2 ** (3 * (4.5 - scores) / (4.5 - 0.5)))
    assert torch.equal(shrinkage(torch.ones(3)), torch.ones(3))  # where all are worth the same, none is pulled harder
    with pytest.raises(PlanError, match="alpha is -1"):
        shrinkage(scores, alpha=-1)


def test_gradients_are_added_where_there_are_some() -> None:
    model = network()
    model[3].bias.requires_grad_(False)
    penalty = GroupLasso(structprune.DependencyGraph(model, X), 0.1)
    add_gradient(penalty, model)
    assert all(each.grad is None for each in model.parameters())
    both = copy.deepcopy(model)
    (both(X).square().mean() + penalty(both)).backward()
    model(X).square().mean().backward()
    with torch.no_grad():
        add_gradient(penalty, model)
    for one, other in zip(model.parameters(), both.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.allclose(one.grad, other.grad, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    model = network()
    graph = structprune.DependencyGraph(model, X)
    group = graph.groups()[0]
    for strengths in ({}, {group: torch.ones(3)}, {group: 1.0}, {"0": torch.ones(4)}):
        with pytest.raises(PlanError, match="one strength a channel"):
            ChannelDecay(graph, strengths)
    with pytest.raises(PlanError, match="names of parameters"):
        GroupLasso(graph, parameters="0.bias")
    penalty = ChannelDecay(graph, {group: torch.ones(4)})
    graph.prune_group("0", [0])
    with pytest.raises(PlanError, match="the model was pruned since"):
        penalty(model)
