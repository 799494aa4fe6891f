"""A small network, its data, and runs of `finetune` on it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from structprune.training import finetune

CLASSES = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(96, CLASSES)
    )


def samples(count: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (count,), generator=generator)
    x = torch.randn(count, 1, 6, 6, generator=generator) + y.view(-1, 1, 1, 1)
    return TensorDataset(x, y)


class Noisy(TensorDataset):
    """Augments by each of the three generators."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y


def loaders(own_generator: bool = False) -> tuple[DataLoader[Any], DataLoader[Any]]:
    held, other = Noisy(*samples().tensors), samples(30)
    if not own_generator:
        return DataLoader(held, 8, shuffle=True), DataLoader(other, 16)
    shuffling, drawing = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    # Validation on batches of drawn samples, so that its generator decides the score.
    drawn = RandomSampler(other, replacement=True, num_samples=20, generator=drawing)
    return (
        DataLoader(held, 8, shuffle=True, generator=shuffling),
        DataLoader(other, 16, sampler=drawn, generator=drawing),
    )


class KilledError(Exception):
    pass


def run(model: nn.Module, *, own_generator: bool = False, stop: int | None = None, **options: Any):
    def end_of(epoch: int) -> None:
        if epoch == stop:
            raise KilledError

    train, validate = loaders(own_generator)
    chosen = {"epochs": 4, "lr": 0.05, "progress": False, "on_epoch": end_of, **options}
    return finetune(model, train, validate, **chosen)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
