"""Small images in two classes, a network for them, and what compressors are given."""

from __future__ import annotations

import torch
from torch import nn

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(192, 1, 6, 6, generator=GENERATOR)
Y = (X.flatten(1)[:, :18].sum(1) > 0).long()


def batches(first, last, size=32):
    return [(X[i : i + size], Y[i : i + size]) for i in range(first, last, size)]


TRAIN, CHOOSE, TEST = batches(0, 128), batches(128, 160), batches(160, 192, 16)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def trained_network():
    """The network, trained on its data."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        for x, y in TRAIN:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def given(**more):
    return {"trainloader": TRAIN, "valloader": CHOOSE, "criterion": nn.CrossEntropyLoss(), **more}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
