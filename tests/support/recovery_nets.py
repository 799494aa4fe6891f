"""Small networks for the tests of recovery, with channels that the others can replace, and how far they are off."""

from __future__ import annotations

import torch
from torch import nn

import structprune
from structprune.planning.build import plan_removal

# Of eight channels three are removed; `copy_channels` makes them multiples of ones that are kept.
GONE = [1, 4, 6]
KEPT = [0, 2, 3, 5, 7]
COPIED_FROM = [0, 2, 7]


def copy_channels(*tensors, factor=2.0):
    """Make the removed channels multiples of kept ones; all these tensors have them in dimension 0."""
    for tensor in tensors:
        with torch.no_grad():
            tensor[GONE] = factor * tensor[COPIED_FROM]


def copy_norm(norm):
    """The same for a batch norm in front of which the channels are equal: scale and shift are multiples."""
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias):
            tensor[GONE] = 2.0 * tensor[COPIED_FROM]
        for tensor in (norm.running_mean, norm.running_var):
            tensor[GONE] = tensor[COPIED_FROM]


def jittered(model):
    """All parameters and statistics random, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(3)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def conv_net(consumer, *middle):
    return jittered(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *middle, consumer))


def linear_net(consumer):
    return jittered(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), consumer))


IMAGES = (24, 3, 9, 8)
TOKENS = (24, 5, 6)


def removal(model, x, layer, indices=GONE):
    graph = structprune.DependencyGraph(model, x)
    return plan_removal(graph, graph.chosen(layer, indices))


def data_of(shape, parts=3):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return list(x.chunk(parts))


def error(model, original, data):
    """Relative error of the outputs."""
    with torch.no_grad():
        ours, theirs = torch.cat([model(x) for x in data]), torch.cat([original(x) for x in data])
    return float((ours - theirs).norm() / theirs.norm())
