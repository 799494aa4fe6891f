"""Small networks to quantise, and batches for them."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A transformer's layers over tokens, and a classifier on two dimensions."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm, self.head = (
            nn.Linear(64, 128),
            nn.Linear(128, 64),
            nn.LayerNorm(64),
            nn.Linear(64, 9),
        )

    def forward(self, x):
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))).mean(1))


def convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    return net


def batches(*shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]
