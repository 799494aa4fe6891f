"""A small network in float64 with its data, and scores of its weights."""

from __future__ import annotations

import torch
from torch import nn

from structprune.masks import Saliency

F64 = torch.float64


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2, groups=2), nn.Flatten(), nn.Linear(8 * 9, 4)
    ).double().eval()  # fmt: skip


X = torch.randn(6, 4, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
DATA = [X[:2], X[2:]]
NAMES = ["0.weight", "2.weight", "4.weight"]


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def of(model: nn.Module, importance, **options) -> Saliency:
    return Saliency.of(model, X[:1], importance, data=DATA, loss=loss, **options)
