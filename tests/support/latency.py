"""Networks whose operations are timed, and a machine whose times are known."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from structprune.coupling.graph import ChannelGraph
from structprune.latency.specs import OpSpec, uses


def macs_of(spec, widths):
    """Multiply-accumulates of an operation; an image keeps its size."""
    at = spec.at(widths)
    if spec.kind == "matmul":
        return at.get("batch", 1) * at["rows"] * at.get("in", 1) * at["out"]
    if spec.kind == "attention":
        return 2 * at["batch"] * at["heads"] * at["query"] * at["key"] * at["size"]
    image = [v for k, v in at.items() if k[0] == "x"]
    kernel = [v for k, v in at.items() if k[0] == "k"]
    return at["n"] * at["out"] * at["in"] * at["groups"] * int(np.prod(image)) * int(np.prod(kernel))


class Machine:
    """A device whose operations take time in steps of `step` channels; a network takes the sum and `rest`."""

    def __init__(self, step=1, rest=1e-4, slower=1.0):
        self.step, self.rest, self.slower, self.calls = step, rest, slower, []

    def operations(self, points):
        self.calls.append(len(points))
        padded = [(s, tuple(-(-w // self.step) * self.step for w in widths)) for s, widths in points]
        return [1e-9 * macs_of(spec, widths) + 1e-9 for spec, widths in padded]

    def networks(self, models, example_inputs):
        found = []
        for model in models:
            graph = ChannelGraph(model, example_inputs)
            points = [(use.spec, use.spec.widths) for use in uses(graph.trace, graph.channels)]
            found.append(self.slower * sum(self.operations(points)) + self.rest)
        return found


class Convolutions(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.wide = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.grouped = nn.Conv2d(2 * width, width, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.grouped(F.relu(self.depthwise(F.relu(self.wide(F.relu(self.stem(x)))))))
        return self.head(F.relu(self.norm(self.up(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        scores = torch.matmul(q, k.transpose(-1, -2)).softmax(-1)
        return self.out((attended + scores @ v).transpose(1, 2).flatten(2))


IMAGES = torch.randn(2, 3, 8, 8)
NONE = np.zeros(0, dtype=int)
TOKENS = torch.randn(2, 5, 32)
NETWORKS = {"convolutions": (Convolutions, IMAGES), "attention": (Attention, TOKENS)}


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


def spec_of(**sizes):
    return OpSpec("matmul", (("rows", 8), *sizes.items()), tuple(sizes), (("weight", True),))
